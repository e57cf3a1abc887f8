// SPDX-License-Identifier: MIT OR Apache-2.0
//! Memory that fails: who is told, who fails, and that no data comes out. Manual, section 10.6.

use crate::rig::*;
use farfault_device::gpu::{PoisonError, Settings};
use farfault_protocol::{
    address::{GpuVa, SystemAddr, VramAddr},
    command::Status,
    event::{Access, ErrorCode, JobStatus},
    submit::{CopyRun, Kernel},
};

/// Where page 0 of the poisoned rig's context is mapped, eight pages of VRAM in a row.
const VA: u64 = 16 * MIB;
/// The third of these.
const BAD: u64 = 2 * PAGE;

/// A rig with a page that has failed, and nobody told.
fn rig() -> Rig {
    let mut rig = Rig::new();
    rig.create_context(0);
    rig.map(0, VA, vram(0), 8, RW);
    assert_eq!(
        rig.copy(&[CopyRun::fill(7, VramAddr::new(0), 8 * 4096)]),
        (Status::Ok, 0)
    );
    rig.gpu.poison(VramAddr::new(BAD + 8)).unwrap();
    rig
}

fn errors(rig: &mut Rig) -> Vec<(u32, u64)> {
    let events = rig.take_events().into_iter();
    let error = |event| match event {
        Event::Error(error) => (error.code.get(), error.detail.get()),
        other => panic!("not an error: {other:?}"),
    };
    events.map(error).collect()
}

#[test]
fn poisoned_page_is_reported_once() {
    let mut rig = rig();
    let poisoned = ErrorCode::MemoryPoisoned.raw();
    assert_eq!(errors(&mut rig), [(poisoned, BAD)]);
    rig.gpu.poison(VramAddr::new(BAD)).unwrap();
    assert_eq!(errors(&mut rig), []);
    rig.gpu.poison(VramAddr::new(BAD + PAGE)).unwrap();
    assert_eq!(errors(&mut rig), [(poisoned, BAD + PAGE)]);
    let pages: Vec<u64> = rig.gpu.vram().poisoned.iter().map(|p| p.page).collect();
    assert_eq!(pages, [BAD, BAD + PAGE]);
}

#[test]
fn report_without_a_buffer_waits_for_one() {
    let mut rig = Rig::with(Settings::new(VRAM));
    for page in [3, 1] {
        rig.gpu.poison(VramAddr::new(page * PAGE)).unwrap();
    }
    assert_eq!(errors(&mut rig), []);
    for page in [3, 1] {
        rig.gpu.post_event_buffers(1);
        let poisoned = ErrorCode::MemoryPoisoned.raw();
        assert_eq!(errors(&mut rig), [(poisoned, page * PAGE)]);
    }
}

#[test]
fn copy_whose_destination_ends_before_it_faults_there() {
    let mut rig = rig();
    rig.take_events();
    // The destination's second page is not mapped. In the source it would be the poisoned one, which
    // is not behind the first in VRAM.
    let (to, from) = (VA + 16 * PAGE, VA + 32 * PAGE);
    rig.map(0, to, vram(MIB), 1, RW);
    rig.map(0, from, vram(0), 1, RW);
    rig.map(0, from + PAGE, vram(BAD), 1, RW);
    rig.launch(0, 1, Kernel::Copy, &[to, from, 2 * PAGE], 1);
    rig.run();
    let pages: Vec<u64> = rig
        .take_faults()
        .iter()
        .map(|fault| fault.page.get())
        .collect();
    assert_eq!(pages, [to + PAGE]);
}

#[test]
fn job_that_touches_it_fails_with_its_page() {
    let mut rig = rig();
    rig.take_events();
    let bad = VA + BAD;
    let cases: [(Kernel, &[u64], Access); 8] = [
        (Kernel::Sum, &[VA, 8 * PAGE], Access::Read),
        (Kernel::Fill, &[VA, 8 * PAGE, 1], Access::Write),
        (Kernel::Add, &[bad - 8, 16, 1], Access::Write),
        (Kernel::Copy, &[VA + 5 * PAGE, bad, 8], Access::Read),
        (Kernel::Copy, &[bad, VA + 5 * PAGE, 8], Access::Write),
        (Kernel::AtomicAdd, &[bad + 64, 1, 1], Access::Atomic),
        (Kernel::CompareAndSwap, &[bad + 64, 7, 8], Access::Atomic),
        (Kernel::PointerChase, &[bad + 4088, 1], Access::Read),
    ];
    for (kernel, arguments, access) in cases {
        rig.launch(0, 1, kernel, arguments, 1);
        rig.run();
        let fence = rig.take_fence();
        assert_eq!(
            fence.status.get(),
            JobStatus::MemoryError.raw(),
            "{kernel:?}"
        );
        assert_eq!(fence.page, GpuVa::new(bad), "{kernel:?}");
        assert_eq!((fence.access, fence.cause), (access.raw(), 0), "{kernel:?}");
        assert_eq!(fence.result.get(), 0, "{kernel:?}");
    }
    // What is beside it is as it was, or as it was filled.
    rig.launch(0, 1, Kernel::Sum, &[VA + 4 * PAGE, PAGE], 1);
    rig.run();
    rig.take_result(1);
}

#[test]
fn chase_that_comes_to_it_from_another_page_fails_with_its_page() {
    let mut rig = Rig::new();
    rig.create_context(0);
    rig.map_huge(0, VA, vram(2 * MIB), RW);
    rig.gpu.poison(VramAddr::new(2 * MIB + BAD)).unwrap();
    rig.take_events();
    // At the end of the page before it.
    rig.set_vram_word(2 * MIB + BAD - 8, VA + BAD);
    rig.launch(0, 1, Kernel::PointerChase, &[VA + BAD - 8, 2], 1);
    rig.run();
    let fence = rig.take_fence();
    assert_eq!(fence.page.get(), VA + BAD);
}

#[test]
fn copy_that_touches_it_fails_with_its_run_and_gives_no_data() {
    let mut rig = rig();
    rig.take_events();
    let (good, out) = (VramAddr::new(0), SystemAddr::new(MIB));
    let whole = CopyRun::download(good, out, 8 * 4096);
    let before = CopyRun::download(good, out, 2 * 4096);
    assert_eq!(rig.copy(&[before, whole]), (Status::Poisoned, 1));
    assert_eq!(
        rig.ram_words(MIB + BAD, 512),
        vec![0; 512],
        "data of the page came out"
    );
    let into = CopyRun::upload(out, VramAddr::new(BAD + 4000), 96);
    assert_eq!(rig.copy(&[into]), (Status::Poisoned, 0));
    let zero = CopyRun::fill(0, VramAddr::new(BAD), 8);
    assert_eq!(rig.copy(&[zero]), (Status::Poisoned, 0));
    assert_eq!(rig.copy(&[before]), (Status::Ok, 0));
    let behind = CopyRun::download(VramAddr::new(BAD + PAGE), out, 4096);
    assert_eq!(rig.copy(&[behind]), (Status::Ok, 0));
}

#[test]
fn page_tables_in_it_go_on() {
    let mut rig = rig();
    let entry = rig.entry(0, VA, 0);
    rig.gpu.poison(entry).unwrap();
    rig.take_events();
    rig.launch(0, 1, Kernel::Sum, &[VA, 8], 1);
    rig.run();
    assert_eq!(rig.take_result(1), 7);
}

#[test]
fn zeroes_over_untouched_memory_find_it_too() {
    let mut rig = Rig::new();
    rig.gpu.poison(VramAddr::new(4 * MIB)).unwrap();
    let zero = CopyRun::fill(0, VramAddr::new(4 * MIB - PAGE), 8192);
    assert_eq!(rig.copy(&[zero]), (Status::Poisoned, 0));
}

#[test]
fn page_of_a_gpu_that_is_being_reset_cannot_be_poisoned() {
    let mut rig = rig();
    rig.launch(0, 1, Kernel::Fill, &[VA, PAGE, 1], 1);
    let work = rig.gpu.next_work().expect("there is work");
    rig.gpu.reset();
    let again = |rig: &mut Rig| rig.gpu.poison(VramAddr::new(0));
    assert_eq!(again(&mut rig), Err(PoisonError::Resetting));
    rig.finish(work);
    assert_eq!(again(&mut rig), Ok(()));
}

#[test]
fn reset_makes_all_memory_sound() {
    let mut rig = rig();
    rig.gpu.reset();
    rig.gpu.post_event_buffers(64);
    assert_eq!(errors(&mut rig), []);
    assert!(rig.gpu.vram().poisoned.is_empty());
    assert_eq!(rig.vram_word(BAD), 0);
}

#[test]
fn pages_that_cannot_be_poisoned_are_refused() {
    let mut rig = Rig::new();
    for outside in [VRAM, VRAM + PAGE, u64::MAX] {
        let refused = rig.gpu.poison(VramAddr::new(outside));
        assert_eq!(refused, Err(PoisonError::NotVram));
    }
    for page in 0..1024 {
        rig.gpu.poison(VramAddr::new(page * PAGE)).unwrap();
    }
    let one_more = rig.gpu.poison(VramAddr::new(1024 * PAGE));
    assert_eq!(one_more, Err(PoisonError::TooMany));
}
