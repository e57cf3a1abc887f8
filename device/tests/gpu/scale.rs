// SPDX-License-Identifier: MIT OR Apache-2.0
//! Sizes at their limits: VRAM that is larger than the host, tables without end, all jobs at once.

use crate::rig::*;
use farfault_device::gpu::Settings;
use farfault_protocol::{
    address::VramAddr,
    command::Status,
    pte::{ENTRIES, Pte},
    submit::{CopyRun, Kernel},
};

const TIB: u64 = 1 << 40;

/// KiB of host memory behind the one mapping of this process that has at least this size. The host
/// makes neighbouring mappings one, so VRAM of other tests may be counted with it.
fn resident_kib(size: u64) -> u64 {
    let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let field = |line: &str, name: &str| -> Option<u64> {
        let rest = line.strip_prefix(name)?.trim();
        rest.strip_suffix(" kB")?.parse().ok()
    };
    let mut found = false;
    for line in smaps.lines() {
        if let Some(kib) = field(line, "Size:") {
            found = kib >= size / 1024;
        }
        if let (true, Some(kib)) = (found, field(line, "Rss:")) {
            return kib;
        }
    }
    panic!("no mapping of {size} bytes");
}

#[test]
fn vram_of_a_tebibyte_costs_what_is_used_of_it() {
    let size = TIB;
    let mut rig = Rig::with(Settings::new(size));
    rig.gpu.post_event_buffers(8);
    rig.create_context(0);
    let places = [0, 3 * MIB, TIB / 4, size - PAGE];
    for (index, place) in places.into_iter().enumerate() {
        rig.set_vram_word(place, index as u64 + 1);
        rig.map(0, index as u64 * PAGE, vram(place), 1, RW);
    }
    rig.launch(0, 1, Kernel::Sum, &[0, 4 * PAGE], 4);
    rig.run();
    assert_eq!(rig.take_result(1), 10);
    assert_eq!(rig.gpu.vram().written, 5 * 2 * MIB);
    // Zeroing a GiB that was never used costs nothing either.
    let zeroes: Vec<_> = (0..256)
        .map(|i| CopyRun::fill(0, VramAddr::new(TIB / 8 + i * 4 * MIB), 4 * MIB as u32))
        .collect();
    assert_eq!(rig.copy(&zeroes), (Status::Ok, 0));
    let used = resident_kib(size);
    assert!((32..=512 * 1024).contains(&used), "{used} KiB are resident");
    rig.gpu.reset();
    assert_eq!(rig.gpu.vram().written, 0);
}

#[test]
fn tables_that_point_to_themselves_can_be_looked_at() {
    let mut rig = Rig::new();
    let root = rig.new_table();
    let entries = pte_run(root, Pte::table(root).0, 0, ENTRIES as u32);
    rig.control_ok(&write_ptes(&[entries]));
    rig.control_ok(&create_context(0, root));
    let tables = rig.gpu.page_tables(0).unwrap();
    assert!(tables.truncated);
    // A table entry is a leaf too, once the walk is far enough down.
    assert!(rig.leaf(0, 0).has(Pte::VALID));
    rig.launch(0, 1, Kernel::Sum, &[0, PAGE], 1);
    rig.run();
    rig.take_result(1);
    // Its accessed bit, set by that, is reserved where the entry points to a table.
    assert_eq!(rig.leaf(0, 0), Pte::EMPTY);
}

#[test]
fn page_tables_are_shown_as_runs() {
    let mut rig = Rig::new();
    rig.create_context(0);
    rig.map(0, 0x1000, vram(0x8000), 3, RW);
    rig.map(0, 0x4000, vram(0x1000), 1, RW);
    rig.map(0, 0x5000, system(0x2000), 2, 0);
    rig.map_huge(0, 2 * MIB, vram(2 * MIB), 0);
    let shown: Vec<_> = rig
        .gpu
        .page_tables(0)
        .unwrap()
        .mappings
        .iter()
        .map(|m| (m.start, m.length, m.address, m.writable, m.huge))
        .collect();
    let expected = [
        (0x1000, 0x3000, 0x8000, true, false),
        (0x4000, 0x1000, 0x1000, true, false),
        (0x5000, 0x2000, 0x2000, false, false),
        (2 * MIB, 2 * MIB, 2 * MIB, false, true),
    ];
    assert_eq!(shown, expected);
    assert!(rig.gpu.page_tables(1).is_none());
}

#[test]
fn every_wave_parked_at_once_and_woken_at_once() {
    let mut rig = Rig::new();
    rig.create_context(0);
    rig.gpu.post_event_buffers(10_000);
    rig.launch(0, 1, Kernel::Add, &[0, 4096 * PAGE, 1], 4096);
    rig.run();
    assert_eq!(rig.take_faults().len(), 4096);
    rig.map(0, 0, vram(0), 4096, RW);
    rig.control_ok(&replay(0, u64::MAX));
    rig.run();
    rig.take_result(1);
    assert_eq!(rig.vram_word(4095 * PAGE + 8), 1);
    assert_eq!(rig.gpu.stats().faults.replayed, 4096);
}

#[test]
fn shell_gets_the_lock_back_while_many_waves_park() {
    let mut rig = Rig::new();
    rig.create_context(0);
    rig.launch(0, 1, Kernel::AtomicAdd, &[0, 1, 1], 4096);
    let mut turns = 0;
    while let Some(work) = rig.gpu.next_work() {
        assert_eq!(work.bytes(), 0);
        rig.finish(work);
        turns += 1;
    }
    assert_eq!(turns, 4096 / 64);
    assert_eq!(rig.take_faults().len(), 1);
}
