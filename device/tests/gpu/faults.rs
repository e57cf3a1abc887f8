// SPDX-License-Identifier: MIT OR Apache-2.0
//! Faults: merging, overflow, replay, cancellation, and who gets the last event buffer.

use crate::rig::*;
use farfault_device::gpu::Settings;
use farfault_protocol::{
    command::Status,
    event::{Access, Engine, ErrorCode, FaultCause, FenceEvent, JobStatus},
    pte::Pte,
    submit::Kernel,
};

const VA: u64 = 0x5555_0000_0000;

fn rig() -> Rig {
    let mut rig = Rig::new();
    rig.create_context(1);
    rig
}

fn rig_without_buffers() -> Rig {
    let mut rig = Rig::with(Settings::new(VRAM));
    rig.create_context(1);
    rig
}

fn assert_failed(fence: &FenceEvent, page: u64, access: Access, cause: FaultCause) {
    assert_eq!(fence.status.get(), JobStatus::Fault.raw());
    assert_eq!(fence.page.get(), page);
    assert_eq!((fence.access, fence.cause), (access.raw(), cause.raw()));
    assert_eq!(fence.result.get(), 0);
}

#[test]
fn fault_resolved_and_replayed_lets_the_job_end() {
    let mut rig = rig();
    rig.launch(1, 42, Kernel::Sum, &[VA + 8, 16], 1);
    rig.run();
    let [fault] = rig.take_faults()[..] else {
        panic!("not one fault");
    };
    assert_eq!(fault.header.context.get(), 1);
    assert_eq!(fault.page.get(), VA);
    assert_eq!(fault.sequence.get(), 1);
    assert_eq!(fault.fence.get(), 42);
    assert_eq!(fault.wave.get(), 0);
    assert_eq!(fault.access, Access::Read.raw());
    assert_eq!(fault.cause, FaultCause::NotPresent.raw());
    assert_eq!(fault.engine, Engine::Compute.raw());
    assert!(rig.gpu.is_idle());

    rig.set_ram_word(0x3008, 5);
    rig.set_ram_word(0x3010, 6);
    rig.map(1, VA, system(0x3000), 1, 0);
    rig.run();
    assert_eq!(rig.take_events(), [], "a mapping alone wakes nobody");
    rig.control_ok(&replay(1, 1));
    rig.run();
    assert_eq!(rig.take_result(42), 11);
    assert!(rig.gpu.faults().is_empty());
}

#[test]
fn fault_not_resolved_is_reported_again_after_replay() {
    let mut rig = rig();
    rig.launch(1, 1, Kernel::Sum, &[VA, 8], 1);
    for sequence in 1..4 {
        rig.run();
        let faults = rig.take_faults();
        assert_eq!(faults.len(), 1);
        assert_eq!(faults[0].sequence.get(), sequence);
        rig.control_ok(&replay(1, sequence));
    }
}

#[test]
fn causes_are_told_apart() {
    let mut rig = rig();
    rig.map(1, VA, vram(0), 1, 0);
    rig.map(1, VA + PAGE, vram(PAGE), 1, Pte::WRITABLE);
    rig.map(1, VA + 2 * PAGE, vram(VRAM), 1, RW);
    let bad_bit = rig.entry(1, VA + 3 * PAGE, 0);
    rig.write_pte(bad_bit, Pte::leaf(vram(0), RW).0 | 1 << 60);
    use FaultCause::*;
    let cases = [
        (Kernel::Fill, vec![VA, 8, 0], Access::Write, ReadOnly),
        (Kernel::Add, vec![VA, 8, 1], Access::Write, ReadOnly),
        (Kernel::AtomicAdd, vec![VA, 1, 1], Access::Atomic, ReadOnly),
        (
            Kernel::AtomicAdd,
            vec![VA + PAGE, 1, 1],
            Access::Atomic,
            NotAtomic,
        ),
        (
            Kernel::CompareAndSwap,
            vec![VA + PAGE, 1, 1],
            Access::Atomic,
            NotAtomic,
        ),
        (Kernel::Sum, vec![VA + 2 * PAGE, 8], Access::Read, BadEntry),
        (Kernel::Sum, vec![VA + 3 * PAGE, 8], Access::Read, BadEntry),
        (
            Kernel::Sum,
            vec![VA + 4 * PAGE, 8],
            Access::Read,
            NotPresent,
        ),
        (
            Kernel::PointerChase,
            vec![1 << 48, 1],
            Access::Read,
            BadAddress,
        ),
        (
            Kernel::Copy,
            vec![VA + PAGE, VA + 5 * PAGE, 8],
            Access::Read,
            NotPresent,
        ),
        (
            Kernel::Copy,
            vec![VA + 5 * PAGE, VA + PAGE, 8],
            Access::Write,
            NotPresent,
        ),
    ];
    for (kernel, arguments, access, cause) in cases {
        rig.launch(1, 7, kernel, &arguments, 1);
        rig.run();
        let faults = rig.take_faults();
        assert_eq!(faults.len(), 1, "{kernel:?}");
        let got = (faults[0].access, faults[0].cause);
        assert_eq!(
            got,
            (access.raw(), cause.raw()),
            "{kernel:?} {arguments:x?}"
        );
        rig.control_ok(&cancel(1, faults[0].sequence.get()));
        assert_failed(&rig.take_fence(), faults[0].page.get(), access, cause);
    }
}

#[test]
fn fault_of_a_reported_page_is_merged_unless_it_is_stronger() {
    let mut rig = rig();
    rig.launch(1, 1, Kernel::Add, &[VA, 8, 1], 1);
    rig.run();
    assert_eq!(rig.take_faults().len(), 1);
    rig.launch(1, 2, Kernel::Sum, &[VA + 64, 8], 1);
    rig.launch(1, 3, Kernel::Add, &[VA + 64, 8, 1], 1);
    rig.run();
    assert_eq!(rig.take_faults(), [], "weaker and equal ones are merged");
    rig.launch(1, 4, Kernel::AtomicAdd, &[VA, 1, 1], 3);
    rig.run();
    let [stronger] = rig.take_faults()[..] else {
        panic!("not one fault");
    };
    assert_eq!(stronger.access, Access::Atomic.raw());
    let stats = rig.gpu.stats().faults;
    assert_eq!((stats.reported, stats.merged), (2, 4));
    assert_eq!(rig.gpu.contexts()[0].parked_waves, 6);

    rig.map(1, VA, vram(0), 1, RW);
    rig.control_ok(&replay(1, stronger.sequence.get()));
    rig.run();
    assert_eq!(rig.take_events().len(), 4);
    assert_eq!(rig.gpu.stats().faults.replayed, 6);
}

#[test]
fn fault_of_another_context_is_not_merged_nor_replayed() {
    let mut rig = rig();
    rig.create_context(2);
    rig.launch(1, 1, Kernel::Sum, &[VA, 8], 1);
    rig.launch(2, 1, Kernel::Sum, &[VA, 8], 1);
    rig.run();
    assert_eq!(rig.take_faults().len(), 2);
    rig.control_ok(&replay(1, u64::MAX));
    assert!(rig.gpu.has_work());
    rig.run();
    let faults = rig.take_faults();
    assert_eq!(faults.len(), 1);
    assert_eq!(faults[0].header.context.get(), 1);
    // A cancellation by the other context's number is one that nobody waits for.
    rig.control_ok(&cancel(2, faults[0].sequence.get()));
    assert_eq!(rig.take_events(), []);
}

#[test]
fn replay_wakes_only_through_its_sequence() {
    let mut rig = rig();
    for page in 0..3 {
        rig.launch(1, page, Kernel::Sum, &[VA + page * PAGE, 8], 1);
    }
    rig.run();
    let sequences: Vec<_> = rig.take_faults().iter().map(|f| f.sequence.get()).collect();
    assert_eq!(sequences, [1, 2, 3]);
    rig.map(1, VA, vram(0), 3, RW);
    rig.control_ok(&replay(1, 2));
    rig.run();
    assert_eq!(rig.take_events().len(), 2);
    assert_eq!(rig.gpu.faults().len(), 1);
}

#[test]
fn overflow_loses_nothing() {
    let mut rig = rig_without_buffers();
    rig.gpu.post_event_buffers(2);
    rig.launch(1, 1, Kernel::Add, &[VA, 8 * PAGE, 1], 8);
    rig.run();
    assert_eq!(rig.take_faults().len(), 2);
    assert_eq!(rig.gpu.stats().faults.overflowed, 6);
    assert_eq!(rig.gpu.contexts()[0].unreported_waves, 6);

    // The first buffer tells that faults were lost, once.
    rig.gpu.post_event_buffers(1);
    let [Event::Error(error)] = rig.take_events()[..] else {
        panic!("not one error");
    };
    assert_eq!(error.code.get(), ErrorCode::FaultOverflow.raw());
    assert_eq!(error.detail.get(), 6);
    assert_eq!(error.header.context.get(), 0);
    // Then waves fault again by themselves, as many as there are buffers.
    rig.gpu.post_event_buffers(2);
    assert!(rig.gpu.has_work());
    rig.run();
    assert_eq!(rig.take_faults().len(), 2);
    assert!(!rig.gpu.has_work());
    // A replay through 0 wakes none that was reported, and all that were not.
    rig.map(1, VA, vram(0), 8, RW);
    rig.control_ok(&replay(1, 0));
    rig.run();
    assert_eq!(rig.gpu.stats().faults.replayed, 4);
    assert_eq!(rig.gpu.contexts()[0].parked_waves, 4);
    rig.gpu.post_event_buffers(1);
    rig.control_ok(&replay(1, u64::MAX));
    rig.run();
    assert_eq!(rig.take_result(1), 0);
}

#[test]
fn fault_without_a_buffer_is_tried_again_beside_a_job_without_end() {
    let mut rig = rig_without_buffers();
    // A word that points to itself.
    rig.map(1, VA, vram(0), 1, RW);
    rig.set_vram_word(0, VA);
    rig.launch(1, 1, Kernel::PointerChase, &[VA, u64::MAX], 1);
    rig.launch(1, 2, Kernel::Sum, &[VA + PAGE, 8], 1);
    for _ in 0..10 {
        assert!(rig.step());
    }
    assert_eq!(rig.gpu.contexts()[0].unreported_waves, 1);
    // The first is for the note.
    rig.gpu.post_event_buffers(2);
    assert!(matches!(rig.take_events()[..], [Event::Error(_)]));
    for _ in 0..1000 {
        assert!(rig.step());
    }
    let faults = rig.take_faults();
    assert!(matches!(faults[..], [fault] if fault.fence.get() == 2));
}

#[test]
fn contexts_take_turns_for_the_buffers_after_an_overflow() {
    let mut rig = rig_without_buffers();
    rig.create_context(2);
    for context in [1, 2] {
        rig.launch(context, 1, Kernel::Sum, &[VA, 4 * PAGE], 4);
    }
    rig.run();
    // The first is for the note.
    rig.gpu.post_event_buffers(1 + 4);
    rig.take_events();
    rig.run();
    let faults = rig.take_faults();
    let contexts: Vec<_> = faults.iter().map(|f| f.header.context.get()).collect();
    assert_eq!(
        contexts.iter().filter(|&&c| c == 1).count(),
        2,
        "{contexts:?}"
    );
}

#[test]
fn fences_wait_for_buffers_and_get_them_first() {
    let mut rig = rig_without_buffers();
    rig.map(1, VA, vram(0), 1, RW);
    rig.launch(1, 1, Kernel::Sum, &[VA, 8], 1);
    rig.launch(1, 2, Kernel::Sum, &[VA + PAGE, 8], 1);
    rig.launch(1, 3, Kernel::Sum, &[VA, 8], 1);
    rig.run();
    assert_eq!(rig.take_events(), []);
    assert_eq!(rig.gpu.queues().waiting_fences, 2);
    // The name is taken until the event has a buffer.
    assert_eq!(
        rig.try_launch(1, 1, Kernel::Sum, &[VA, 8], 1),
        Status::BadArgument
    );
    // It has ended by itself, so there is nothing to kill.
    rig.control_ok(&kill_job(1, 1));
    rig.gpu.post_event_buffers(3);
    let events = rig.take_events();
    assert!(matches!(
        events[..],
        [Event::Fence(a), Event::Fence(b), Event::Error(_)]
            if a.fence.get() == 1 && b.fence.get() == 3 && a.status.get() == 0
    ));
    assert_eq!(rig.try_launch(1, 1, Kernel::Sum, &[VA, 8], 1), Status::Ok);
}

fn drive_with_one_buffer(post_first: bool) {
    let mut rig = rig_without_buffers();
    rig.launch(1, 1, Kernel::Add, &[VA, 16 * PAGE, 3], 16);
    rig.gpu.post_event_buffers(1);
    for _ in 0..200 {
        rig.run();
        let events = rig.take_events();
        assert!(events.len() <= 1);
        for event in events {
            if post_first {
                rig.gpu.post_event_buffers(1);
            }
            match event {
                Event::Fault(fault) => {
                    let page = fault.page.get();
                    rig.map(1, page, vram(page - VA), 1, RW);
                    rig.control_ok(&replay(1, fault.sequence.get()));
                }
                Event::Error(_) => {
                    rig.control_ok(&replay(1, 0));
                }
                Event::Fence(fence) => {
                    assert_eq!(fence.status.get(), JobStatus::Ok.raw());
                    assert_eq!(rig.vram_word(15 * PAGE), 3);
                    return;
                }
            }
            if !post_first {
                rig.run();
                rig.gpu.post_event_buffers(1);
            }
        }
    }
    panic!("the job did not end");
}

#[test]
fn driver_with_one_buffer_that_posts_it_first_gets_everything_done() {
    drive_with_one_buffer(true);
}

#[test]
fn driver_with_one_buffer_that_posts_it_last_gets_everything_done() {
    drive_with_one_buffer(false);
}

#[test]
fn cancel_ends_all_jobs_that_wait_for_the_fault() {
    let mut rig = rig();
    rig.launch(1, 1, Kernel::Add, &[VA, 2 * PAGE, 1], 2);
    rig.launch(1, 2, Kernel::Add, &[VA + 8, 8, 1], 1);
    rig.launch(1, 3, Kernel::Add, &[VA + PAGE, 8, 1], 1);
    rig.run();
    let faults = rig.take_faults();
    let at = |page| faults.iter().find(|f| f.page.get() == page).unwrap();
    rig.control_ok(&cancel(1, at(VA).sequence.get()));
    let ended: Vec<_> = rig.take_events();
    assert_eq!(ended.len(), 2);
    for (event, name) in ended.iter().zip([1, 2]) {
        let Event::Fence(fence) = event else {
            panic!("{event:?}");
        };
        assert_eq!(fence.fence.get(), name);
        assert_failed(fence, VA, Access::Write, FaultCause::NotPresent);
    }
    // Job 3 still waits for the other page, on which job 1 faulted first.
    rig.map(1, VA, vram(0), 2, RW);
    rig.control_ok(&replay(1, u64::MAX));
    rig.run();
    assert_eq!(rig.take_result(3), 0);
    rig.control_ok(&cancel(1, 999));
}

#[test]
fn cancel_of_a_store_lets_a_load_of_the_same_page_try_itself() {
    let mut rig = rig();
    rig.launch(1, 1, Kernel::Add, &[VA, 8, 1], 1);
    rig.launch(1, 2, Kernel::Sum, &[VA, 8], 1);
    rig.run();
    let faults = rig.take_faults();
    assert_eq!(faults.len(), 1);
    rig.set_ram_word(0x3000, 8);
    rig.map(1, VA, system(0x3000), 1, 0);
    rig.control_ok(&cancel(1, faults[0].sequence.get()));
    assert_failed(&rig.take_fence(), VA, Access::Write, FaultCause::NotPresent);
    rig.run();
    assert_eq!(rig.take_result(2), 8);
}

#[test]
fn cancel_lets_no_wave_of_the_failing_job_go_on() {
    let mut rig = rig();
    // Three waves, of which the first stores to the page that the second loads from.
    rig.map(1, VA - PAGE, vram(0), 1, RW);
    rig.map(1, VA + PAGE, vram(PAGE), 2, RW);
    rig.launch(1, 1, Kernel::Copy, &[VA, VA - PAGE, 3 * PAGE], 3);
    let third = rig.gpu.next_work().unwrap();
    let faults = rig.take_faults();
    assert_eq!(rig.gpu.stats().faults.merged, 1);
    rig.control_ok(&cancel(1, faults[0].sequence.get()));
    assert!(rig.gpu.next_work().is_none(), "the second wave goes on");
    let stats = rig.gpu.stats().faults;
    assert_eq!((stats.cancelled, stats.replayed), (1, 0));
    rig.finish(third);
    assert_failed(&rig.take_fence(), VA, Access::Write, FaultCause::NotPresent);
}

#[test]
fn cancel_counts_no_replay_of_a_weaker_wave_whose_job_fails_by_another_one() {
    let mut rig = rig();
    rig.launch(1, 1, Kernel::Fill, &[VA, 8, 1], 1);
    rig.run();
    let faults = rig.take_faults();
    // The first of three waves loads from the page, the second stores to it: it is parked behind.
    rig.map(1, VA - PAGE, vram(0), 1, RW);
    rig.map(1, VA + PAGE, vram(PAGE), 1, RW);
    rig.map(1, VA + 2 * PAGE, vram(2 * PAGE), 1, RW);
    rig.launch(1, 2, Kernel::Copy, &[VA - PAGE, VA, 3 * PAGE], 3);
    let third = rig.gpu.next_work().unwrap();
    assert!(rig.gpu.next_work().is_none());
    assert_eq!(rig.gpu.stats().faults.merged, 2);

    rig.control_ok(&cancel(1, faults[0].sequence.get()));
    let stats = rig.gpu.stats().faults;
    assert_eq!((stats.cancelled, stats.replayed), (2, 0));
    assert!(rig.gpu.next_work().is_none(), "the first wave goes on");
    assert!(rig.gpu.faults().is_empty());
    let before: Vec<_> = rig.take_events();
    assert!(matches!(before[..], [Event::Fence(fence)] if fence.fence.get() == 1));
    rig.finish(third);
    assert_eq!(rig.take_fence().fence.get(), 2);
}

#[test]
fn record_is_forgotten_with_its_last_waiter() {
    let mut rig = rig();
    rig.launch(1, 1, Kernel::Sum, &[VA, 8], 1);
    rig.run();
    assert_eq!(rig.take_faults().len(), 1);
    rig.control_ok(&kill_job(1, 1));
    assert_eq!(rig.take_fence().status.get(), JobStatus::Killed.raw());
    assert!(rig.gpu.faults().is_empty());
    rig.launch(1, 2, Kernel::Sum, &[VA, 8], 1);
    rig.run();
    assert_eq!(rig.take_faults().len(), 1, "nobody would wake a merged one");
}

#[test]
fn context_destroyed_leaves_no_event_and_frees_its_buffers() {
    let mut rig = rig_without_buffers();
    rig.create_context(2);
    rig.gpu.post_event_buffers(1);
    rig.map(2, VA, vram(0), 1, RW);
    rig.launch(1, 1, Kernel::Sum, &[VA, 8], 1);
    while let Some(work) = rig.gpu.next_work() {
        let done = work.execute(&rig.ram);
        rig.gpu.retire(done);
    }
    // The fault has the only buffer and was not fetched; a fence of another context waits.
    assert_eq!(rig.gpu.faults().len(), 1);
    rig.launch_and_keep_events(2, 5, &[VA, 8]);
    assert_eq!(rig.gpu.queues().waiting_fences, 1);
    let outcome = rig.gpu.control(&destroy_context(1), 1);
    assert!(matches!(outcome, farfault_device::gpu::Outcome::Done(_)));
    let fence = rig.take_fence();
    assert_eq!((fence.header.context.get(), fence.fence.get()), (2, 5));
}

#[test]
fn bad_descriptors_are_reported_once_for_each_queue() {
    let mut rig = rig_without_buffers();
    for queue in [1, 1, 0, 1, 77] {
        rig.gpu.report_bad_descriptor(queue);
    }
    rig.gpu.post_event_buffers(5);
    let details: Vec<_> = rig
        .take_events()
        .iter()
        .map(|event| match event {
            Event::Error(e) if e.code.get() == ErrorCode::BadDescriptor.raw() => e.detail.get(),
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(details, [0, 1]);
}

impl Rig {
    /// Runs a sum to its end without fetching events.
    fn launch_and_keep_events(&mut self, context: u32, fence: u64, arguments: &[u64]) {
        let request = launch(context, fence, Kernel::Sum, arguments, 1);
        let _ = self.gpu.submit(&request, 1, &self.ram);
        while let Some(work) = self.gpu.next_work() {
            let done = work.execute(&self.ram);
            self.gpu.retire(done);
        }
    }
}
