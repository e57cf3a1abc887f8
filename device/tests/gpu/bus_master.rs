// SPDX-License-Identifier: MIT OR Apache-2.0
//! The word by which a driver keeps engines from RAM, whenever the device comes to look. Manual, section 10.4.

use crate::rig::*;
use farfault_protocol::{
    address::{SystemAddr, VramAddr},
    command::Status,
    event::JobStatus,
    submit::{CopyRun, Kernel},
};

/// Where pages of RAM are mapped, from [`DATA`] on.
const VA: u64 = 16 * MIB;
const DATA: u64 = MIB;
const PAGES: u64 = 8;
const WORD: u64 = 4 * MIB;

/// A rig whose driver has named [`WORD`], which is not zero.
fn rig() -> Rig {
    let mut rig = Rig::new();
    rig.create_context(0);
    rig.map(0, VA, system(DATA), PAGES, RW);
    rig.set_ram_word(WORD, 1);
    rig.control_ok(&set_bus_master_word(WORD));
    rig
}

/// Adds 1 to the first word of [`DATA`], so often that it goes on for many turns.
fn launch_counter(rig: &mut Rig, fence: u64) {
    rig.launch(0, fence, Kernel::AtomicAdd, &[VA, 1, 1 << 20], 1);
}

#[test]
fn job_goes_on_in_ram_while_the_word_is_not_zero() {
    let mut rig = rig();
    rig.launch(0, 1, Kernel::Fill, &[VA, PAGES * PAGE, 7], 2);
    rig.run();
    rig.take_result(1);
    assert_eq!(
        rig.ram_words(DATA, PAGES * PAGE / 8),
        [7; (PAGES * PAGE / 8) as usize]
    );
}

#[test]
fn word_that_becomes_zero_ends_a_job_in_ram_with_a_bus_error() {
    let mut rig = rig();
    launch_counter(&mut rig, 1);
    rig.step();
    let counted = rig.ram_word(DATA);
    assert_ne!(counted, 0);
    rig.set_ram_word(WORD, 0);
    rig.run();
    assert_eq!(rig.ram_word(DATA), counted);
    let fence = rig.take_fence();
    assert_eq!(fence.status.get(), JobStatus::BusError.raw());
    assert_eq!(fence.page.get(), VA);
}

#[test]
fn work_that_was_handed_out_finds_the_word_as_it_is_when_it_is_done() {
    let mut rig = rig();
    launch_counter(&mut rig, 1);
    let work = rig.gpu.next_work().unwrap();
    rig.set_ram_word(WORD, 0);
    rig.finish(work);
    assert_eq!(rig.ram_word(DATA), 0);
}

#[test]
fn word_is_looked_at_again_within_a_piece_of_work() {
    for kernel in [Kernel::Fill, Kernel::Copy, Kernel::Add] {
        let mut rig = rig();
        let source = VA + PAGES * PAGE;
        rig.map(0, source, vram(0), PAGES, RW);
        for page in 0..PAGES {
            rig.set_ram_word(DATA + page * PAGE, 1);
        }
        // It is in the second page, and the job itself makes it zero.
        let word = DATA + 2 * PAGE - 8;
        rig.set_ram_word(word, 1);
        rig.control_ok(&set_bus_master_word(word));
        let arguments = match kernel {
            Kernel::Fill => [VA, PAGES * PAGE, 0],
            Kernel::Copy => [VA, source, PAGES * PAGE],
            _ => [VA, PAGES * PAGE, u64::MAX],
        };
        rig.launch(0, 1, kernel, &arguments, 1);
        rig.run();
        let fence = rig.take_fence();
        assert_eq!(fence.status.get(), JobStatus::BusError.raw(), "{kernel:?}");
        assert_eq!(fence.page.get(), VA + 2 * PAGE, "{kernel:?}");
        let begins: Vec<u64> = (0..PAGES)
            .map(|page| rig.ram_word(DATA + page * PAGE))
            .collect();
        assert_eq!(begins, [0, 0, 1, 1, 1, 1, 1, 1], "{kernel:?}");
    }
}

#[test]
fn copies_between_ram_and_vram_fail_and_those_within_vram_do_not() {
    let mut rig = rig();
    rig.set_vram_word(0, 5);
    rig.set_ram_word(DATA, 3);
    rig.set_ram_word(WORD, 0);
    let (ram, start) = (SystemAddr::new(DATA), VramAddr::new(0));
    let inside = CopyRun::fill(9, VramAddr::new(PAGE), PAGE as u32);
    let down = CopyRun::download(start, ram, PAGE as u32);
    let up = CopyRun::upload(ram, start, PAGE as u32);
    assert_eq!(rig.copy(&[inside, down]), (Status::BadAddress, 1));
    assert_eq!(rig.copy(&[up]), (Status::BadAddress, 0));
    assert_eq!(rig.ram_word(DATA), 3);
    rig.set_ram_word(WORD, 1);
    assert_eq!((rig.vram_word(0), rig.vram_word(PAGE)), (5, 9));
}

#[test]
fn job_in_vram_alone_does_not_ask() {
    let mut rig = rig();
    let va = VA + MIB;
    rig.map(0, va, vram(0), 1, RW);
    rig.set_ram_word(WORD, 0);
    rig.launch(0, 1, Kernel::AtomicAdd, &[va, 1, 10], 1);
    rig.run();
    assert_eq!(rig.take_result(1), 9);
}

#[test]
fn word_where_no_ram_is_counts_as_zero() {
    // Behind all ranges, and between two of them.
    for word in [1 << 40, 12 * MIB, u64::MAX - 3] {
        let mut rig = rig();
        rig.control_ok(&set_bus_master_word(word));
        launch_counter(&mut rig, 1);
        rig.run();
        assert_eq!(rig.ram_word(DATA), 0);
        assert_eq!(rig.take_fence().status.get(), JobStatus::BusError.raw());
    }
}

#[test]
fn word_is_forgotten_when_the_driver_says_so_and_at_a_reset() {
    let mut rig = rig();
    rig.set_ram_word(WORD, 0);
    rig.control_ok(&set_bus_master_word(0));
    rig.launch(0, 1, Kernel::AtomicAdd, &[VA, 1, 10], 1);
    rig.run();
    assert_eq!(rig.take_result(1), 9);

    rig.control_ok(&set_bus_master_word(WORD));
    rig.gpu.reset();
    rig.gpu.post_event_buffers(1);
    let run = CopyRun::download(VramAddr::new(0), SystemAddr::new(DATA), 8);
    assert_eq!(rig.copy(&[run]), (Status::Ok, 0));
}

#[test]
fn word_that_is_not_aligned_is_refused_and_changes_nothing() {
    let mut rig = rig();
    for offset in [1, 2, 3] {
        let answer = rig.control(&set_bus_master_word(WORD + offset));
        assert_eq!(answer.status, Status::Misaligned);
    }
    rig.set_ram_word(WORD, 0);
    launch_counter(&mut rig, 1);
    rig.run();
    assert_eq!(rig.ram_word(DATA), 0);
    rig.control_ok(&set_bus_master_word(WORD + 4));
}
