// SPDX-License-Identifier: MIT OR Apache-2.0
//! The control queue: every command, and every status that it can end with.

use crate::rig::*;
use farfault_device::gpu::{Limits, Settings};
use farfault_protocol::{
    address::VramAddr, command::Status, config::ConfigSpace, pte::Pte, submit::Kernel,
};

const VA: u64 = 0x7f00_0000_0000;

fn status(rig: &mut Rig, request: &[u8]) -> Status {
    rig.control(request).status
}

/// The same command with one byte changed.
fn with_byte(mut request: Vec<u8>, at: usize, value: u8) -> Vec<u8> {
    request[at] = value;
    request
}

#[test]
fn config_space_tells_the_settings() {
    let gpu = Rig::with(Settings {
        serial: 7,
        ..Settings::new(VRAM)
    })
    .gpu;
    let config: ConfigSpace = gpu.config_space();
    assert_eq!(config.magic, *b"FARFAULT");
    assert_eq!(config.vram_size.get(), VRAM);
    assert_eq!(config.serial.get(), 7);
    assert_eq!(config.max_contexts.get(), Limits::default().max_contexts);
    assert_eq!(config.reserved, [0; 196]);
}

#[test]
fn vram_size_odd_is_refused() {
    for size in [0, 4096, 3 * MIB, 1 << 52] {
        assert!(farfault_device::gpu::Gpu::new(Settings::new(size)).is_err());
    }
}

#[test]
fn request_of_many_commands_executes_until_the_first_failure() {
    let mut rig = Rig::new();
    let request = [nop(), nop(), destroy_context(5), nop()].concat();
    let answer = rig.control(&request);
    assert_eq!((answer.status, answer.completed), (Status::BadContext, 2));
    let answer = rig.control(&[nop(), nop()].concat());
    assert_eq!((answer.status, answer.completed), (Status::Ok, 2));
}

#[test]
fn framing_wrong_is_malformed() {
    let mut rig = Rig::new();
    let short = &nop()[..4];
    for request in [
        vec![],
        short.to_vec(),
        with_byte(nop(), 4, 7),
        with_byte(nop(), 4, 0),
        with_byte(nop(), 4, 16),
        with_byte(nop(), 7, 0xff),
        with_byte(nop(), 2, 1),
        [nop(), short.to_vec()].concat(),
    ] {
        assert_eq!(status(&mut rig, &request), Status::Malformed, "{request:?}");
    }
    assert_eq!(rig.gpu.stats().malformed, 8);
}

#[test]
fn opcode_unknown_is_unknown_command() {
    let mut rig = Rig::new();
    for opcode in [11, 255] {
        let request = with_byte(nop(), 0, opcode);
        assert_eq!(status(&mut rig, &request), Status::UnknownCommand);
    }
}

#[test]
fn request_too_long_is_limit_exceeded_and_does_nothing() {
    let mut rig = Rig::new();
    let most = Limits::default().max_request / 8;
    let answer = rig.control(&nop().repeat(most as usize + 1));
    assert_eq!(
        (answer.status, answer.completed),
        (Status::LimitExceeded, 0)
    );
    let answer = rig.control(&nop().repeat(most as usize));
    assert_eq!((answer.status, answer.completed), (Status::Ok, most));
}

#[test]
fn reserved_fields_nonzero_are_malformed() {
    let mut rig = Rig::new();
    rig.create_context(1);
    let root = VramAddr::new(0);
    for request in [
        create_context(2, root),
        destroy_context(1),
        invalidate(1, 0, PAGE),
        replay(1, 0),
        cancel(1, 0),
        kill_job(1, 0),
    ] {
        assert_eq!(
            status(&mut rig, &with_byte(request, 12, 1)),
            Status::Malformed
        );
    }
    let run = write_ptes(&[pte_run(root, 0, 0, 1)]);
    assert_eq!(
        status(&mut rig, &with_byte(run, 8 + 28, 1)),
        Status::Malformed
    );
}

#[test]
fn command_of_another_size_is_malformed() {
    let mut rig = Rig::new();
    rig.create_context(1);
    for command in [
        nop(),
        create_context(2, VramAddr::new(0)),
        destroy_context(1),
        invalidate(1, 0, PAGE),
        replay(1, 0),
        cancel(1, 0),
        read_ptes(1, 0, 1),
        harvest(1, 0, 1),
        kill_job(1, 0),
        set_bus_master_word(0),
    ] {
        let length = command.len();
        let mut longer = with_byte(command, 4, length as u8 + 8);
        longer.extend([0; 8]);
        assert_eq!(status(&mut rig, &longer), Status::Malformed);
    }
    let no_runs = write_ptes(&[]);
    assert_eq!(status(&mut rig, &no_runs), Status::Malformed);
}

#[test]
fn context_made_twice_or_wrong_is_refused() {
    let mut rig = Rig::new();
    let root = VramAddr::new(0x1000);
    assert_eq!(status(&mut rig, &create_context(3, root)), Status::Ok);
    assert_eq!(
        status(&mut rig, &create_context(3, root)),
        Status::ContextExists
    );
    assert_eq!(
        status(&mut rig, &create_context(64, root)),
        Status::BadContext
    );
    let odd = VramAddr::new(0x1008);
    assert_eq!(
        status(&mut rig, &create_context(4, odd)),
        Status::Misaligned
    );
    for beyond in [VRAM, u64::MAX - 0xfff] {
        let request = create_context(4, VramAddr::new(beyond));
        assert_eq!(status(&mut rig, &request), Status::BadAddress);
    }
    assert_eq!(
        status(&mut rig, &create_context(63, VramAddr::new(VRAM - PAGE))),
        Status::Ok
    );
    assert_eq!(rig.gpu.contexts().len(), 2);
}

#[test]
fn context_unknown_is_bad_context_for_every_command() {
    let mut rig = Rig::new();
    for context in [0, 63, 64, u32::MAX] {
        for request in [
            destroy_context(context),
            invalidate(context, 0, PAGE),
            replay(context, 0),
            cancel(context, 1),
            read_ptes(context, 0, 1),
            harvest(context, 0, 1),
            kill_job(context, 1),
        ] {
            assert_eq!(status(&mut rig, &request), Status::BadContext);
        }
    }
}

#[test]
fn context_destroyed_can_be_made_again_with_the_same_fences() {
    let mut rig = Rig::new();
    rig.create_context(1);
    rig.launch(1, 9, Kernel::Sum, &[VA, PAGE], 1);
    rig.run();
    assert_eq!(rig.take_faults().len(), 1);
    assert_eq!(status(&mut rig, &destroy_context(1)), Status::Ok);
    assert!(rig.gpu.jobs().is_empty() && rig.gpu.faults().is_empty());
    rig.create_context(1);
    rig.launch(1, 9, Kernel::Sum, &[VA, PAGE], 1);
    rig.run();
    assert_eq!(rig.take_faults().len(), 1);
    assert_eq!(rig.gpu.stats().jobs.destroyed, 1);
}

#[test]
fn write_ptes_wrong_is_refused_and_writes_nothing() {
    let mut rig = Rig::new();
    let good = pte_run(VramAddr::new(0), 0xabc, 0, 1);
    let cases = [
        (pte_run(VramAddr::new(4), 1, 0, 1), Status::Misaligned),
        (pte_run(VramAddr::new(0), 1, 0, 0), Status::BadArgument),
        (pte_run(VramAddr::new(0), 1, 0, 513), Status::LimitExceeded),
        (pte_run(VramAddr::new(8), 1, 0, 512), Status::LimitExceeded),
        (pte_run(VramAddr::new(VRAM), 1, 0, 1), Status::BadAddress),
        (
            pte_run(VramAddr::new(u64::MAX - 7), 1, 0, 1),
            Status::BadAddress,
        ),
    ];
    for (bad, expected) in cases {
        assert_eq!(status(&mut rig, &write_ptes(&[good, bad])), expected);
    }
    assert_eq!(rig.vram_word(0), 0);
    assert_eq!(rig.gpu.stats().control.entries_written, 0);
}

#[test]
fn write_ptes_run_counts_by_its_step() {
    let mut rig = Rig::new();
    let last = VramAddr::new(VRAM - 16);
    let request = write_ptes(&[
        pte_run(VramAddr::new(PAGE - 24), 10, 5, 3),
        pte_run(last, u64::MAX, 1, 2),
    ]);
    rig.control_ok(&request);
    let words = [PAGE - 24, PAGE - 16, PAGE - 8, PAGE].map(|at| rig.vram_word(at));
    assert_eq!(words, [10, 15, 20, 0]);
    assert_eq!(
        [VRAM - 16, VRAM - 8].map(|at| rig.vram_word(at)),
        [u64::MAX, 0]
    );
}

#[test]
fn ranges_wrong_are_refused() {
    let mut rig = Rig::new();
    rig.create_context(0);
    let top = 1 << 48;
    let cases = [
        (invalidate(0, 1, PAGE), Status::Misaligned),
        (invalidate(0, 0, PAGE + 1), Status::Misaligned),
        (invalidate(0, 0, 0), Status::BadArgument),
        (invalidate(0, top - PAGE, 2 * PAGE), Status::BadAddress),
        (invalidate(0, u64::MAX - 0xfff, PAGE), Status::BadAddress),
        (invalidate(0, 0, top), Status::Ok),
        (read_ptes(0, 8, 1), Status::Misaligned),
        (read_ptes(0, 0, 0), Status::BadArgument),
        (read_ptes(0, 0, 513), Status::LimitExceeded),
        (read_ptes(0, top - PAGE, 2), Status::BadAddress),
        (read_ptes(0, top - PAGE, 1), Status::Ok),
        (harvest(0, 8, 1), Status::Misaligned),
        (harvest(0, 0, 0), Status::BadArgument),
        (harvest(0, 0, 513), Status::LimitExceeded),
        (harvest(0, top, 1), Status::BadAddress),
    ];
    for (request, expected) in cases {
        assert_eq!(status(&mut rig, &request), expected);
    }
}

#[test]
fn read_ptes_returns_leaves_as_they_are() {
    let mut rig = Rig::new();
    rig.create_context(0);
    rig.map(0, VA + 2 * PAGE, system(0x5000), 1, Pte::WRITABLE);
    rig.map_huge(0, VA + 2 * MIB, vram(4 * MIB), RW);
    let data = rig.control_ok(&read_ptes(0, VA, 4)).data;
    let leaf = Pte::leaf(system(0x5000), Pte::WRITABLE).0;
    assert_eq!(data, [0, 0, leaf, 0]);
    let data = rig.control_ok(&read_ptes(0, VA + 2 * MIB - PAGE, 3)).data;
    let huge = |page: u64| Pte::leaf(vram(4 * MIB + page * PAGE), RW | Pte::HUGE).0;
    assert_eq!(data, [0, huge(0), huge(1)]);
    let stats = rig.gpu.stats();
    assert_eq!(stats.compute_mmu.misses + stats.copy_mmu.misses, 0);
}

#[test]
fn read_ptes_of_many_commands_ends_at_the_limit_of_a_request() {
    let mut rig = Rig::new();
    rig.create_context(0);
    let answer = rig.control(&read_ptes(0, 0, 512).repeat(9));
    assert_eq!(
        (answer.status, answer.completed),
        (Status::LimitExceeded, 8)
    );
    assert_eq!(answer.data.len(), 8 * 512);
}

#[test]
fn accessed_and_dirty_are_set_by_use_and_harvested() {
    let mut rig = Rig::new();
    rig.create_context(0);
    rig.map(0, VA, vram(0), 4, RW);
    rig.launch(0, 1, Kernel::Sum, &[VA, 2 * PAGE], 1);
    rig.launch(0, 2, Kernel::Add, &[VA + 2 * PAGE, PAGE, 1], 1);
    rig.run();
    let marks = |rig: &mut Rig, page: u64| {
        let leaf = rig.leaf(0, VA + page * PAGE);
        (leaf.has(Pte::ACCESSED), leaf.has(Pte::DIRTY))
    };
    let all: Vec<_> = (0..4).map(|page| marks(&mut rig, page)).collect();
    assert_eq!(
        all,
        [(true, false), (true, false), (true, true), (false, false)]
    );
    assert_eq!(rig.control_ok(&harvest(0, VA, 4)).value, 3);
    assert_eq!(rig.control_ok(&harvest(0, VA, 4)).value, 0);
    assert_eq!(marks(&mut rig, 2), (false, true));
    // The translation is gone from the TLB, so that the next use is seen again.
    rig.launch(0, 3, Kernel::Sum, &[VA, PAGE], 1);
    rig.run();
    assert_eq!(marks(&mut rig, 0), (true, false));
}

#[test]
fn harvest_of_a_part_of_a_huge_leaf_counts_it_once() {
    let mut rig = Rig::new();
    rig.create_context(0);
    rig.map_huge(0, VA, vram(2 * MIB), RW);
    rig.launch(0, 1, Kernel::Sum, &[VA, 64], 1);
    rig.run();
    assert_eq!(rig.control_ok(&harvest(0, VA + 5 * PAGE, 9)).value, 1);
    assert!(!rig.leaf(0, VA).has(Pte::ACCESSED));
}

#[test]
fn first_store_after_a_load_marks_the_leaf_dirty_through_the_tlb() {
    let mut rig = Rig::new();
    rig.create_context(0);
    rig.map(0, VA, vram(0), 1, RW);
    rig.launch(0, 1, Kernel::Sum, &[VA, PAGE], 1);
    rig.run();
    rig.launch(0, 2, Kernel::Add, &[VA, PAGE, 1], 1);
    rig.run();
    assert!(rig.leaf(0, VA).has(Pte::DIRTY));
    // Now the TLB knows: the next store does not walk.
    let misses = rig.gpu.stats().compute_mmu.misses;
    rig.launch(0, 3, Kernel::Add, &[VA, PAGE, 1], 1);
    rig.run();
    assert_eq!(rig.gpu.stats().compute_mmu.misses, misses);
}

#[test]
fn kill_of_a_job_that_is_not_there_is_no_such_job() {
    let mut rig = Rig::new();
    rig.create_context(0);
    assert_eq!(status(&mut rig, &kill_job(0, 1)), Status::NoSuchJob);
    rig.map(0, VA, vram(0), 1, RW);
    rig.launch(0, 1, Kernel::Sum, &[VA, 8], 1);
    rig.run();
    assert_eq!(status(&mut rig, &kill_job(0, 1)), Status::NoSuchJob);
}
