// SPDX-License-Identifier: MIT OR Apache-2.0
//! Jobs: what each kernel computes, what a launch refuses, whose turn it is.

use crate::rig::*;
use farfault_device::gpu::Settings;
use farfault_protocol::{
    address::GpuVa,
    command::Status,
    event::{Access, JobStatus},
    submit::Kernel,
};

const VA: u64 = 0x4000_0000;
/// No wave ever gets this far.
const ENDLESS: u64 = u64::MAX;

/// A context 0 with 64 pages of VRAM at VA and 64 pages of RAM behind them.
fn rig() -> Rig {
    let mut rig = Rig::new();
    rig.create_context(0);
    rig.map(0, VA, vram(0), 64, RW);
    rig.map(0, VA + 64 * PAGE, system(MIB), 64, RW);
    rig
}

fn result(rig: &mut Rig, kernel: Kernel, arguments: &[u64], waves: u32) -> u64 {
    rig.launch(0, 1, kernel, arguments, waves);
    rig.run();
    rig.take_result(1)
}

#[test]
fn range_kernels_compute_over_both_memories_with_any_number_of_waves() {
    for waves in [1, 2, 3, 7, 200] {
        let mut rig = rig();
        // 120 pages, begun and ended inside of a page.
        let (start, length) = (VA + 24, 120 * PAGE - 64);
        let words = length / 8;
        result(&mut rig, Kernel::Fill, &[start, length, 3], waves);
        assert_eq!(
            result(&mut rig, Kernel::Sum, &[start, length], waves),
            3 * words
        );
        result(&mut rig, Kernel::Add, &[start, length, 4], waves);
        assert_eq!(
            result(&mut rig, Kernel::Sum, &[start, length], waves),
            7 * words
        );
        assert_eq!(rig.vram_word(16), 0);
        assert_eq!(rig.vram_word(24), 7);
        assert_eq!(rig.ram_word(MIB), 7);
        let copied = [VA + 64 * PAGE, VA, 64 * PAGE];
        result(&mut rig, Kernel::Copy, &copied, waves);
        assert_eq!(
            [MIB, MIB + 16, MIB + 24].map(|at| rig.ram_word(at)),
            [0, 0, 7]
        );
    }
}

#[test]
fn add_and_sum_wrap_around() {
    let mut rig = rig();
    result(&mut rig, Kernel::Fill, &[VA, 16, u64::MAX], 1);
    assert_eq!(result(&mut rig, Kernel::Sum, &[VA, 16], 2), u64::MAX - 1);
    result(&mut rig, Kernel::Add, &[VA, 16, 2], 1);
    assert_eq!(rig.vram_word(8), 1);
}

#[test]
fn range_of_nothing_ends_at_once() {
    let mut rig = rig();
    assert_eq!(result(&mut rig, Kernel::Sum, &[0, 0], 5), 0);
}

#[test]
fn atomic_add_counts_every_addition() {
    let mut rig = rig();
    // More than one work's worth.
    assert_eq!(
        result(&mut rig, Kernel::AtomicAdd, &[VA, 3, 2000], 1),
        3 * 1999
    );
    result(&mut rig, Kernel::AtomicAdd, &[VA, 1, 100], 50);
    assert_eq!(rig.vram_word(0), 3 * 2000 + 5000);
    assert_eq!(result(&mut rig, Kernel::AtomicAdd, &[VA, 1, 0], 2), 0);
}

#[test]
fn compare_and_swap_stores_only_where_expected() {
    let mut rig = rig();
    assert_eq!(
        result(&mut rig, Kernel::CompareAndSwap, &[VA + 8, 0, 5], 1),
        0
    );
    assert_eq!(
        result(&mut rig, Kernel::CompareAndSwap, &[VA + 8, 1, 6], 1),
        5
    );
    assert_eq!(rig.vram_word(8), 5);
}

#[test]
fn pointer_chase_follows_pointers_over_pages_and_back() {
    let mut rig = rig();
    // The low bits are ignored, as is the rest of the last word.
    let hops = [
        (0, 40),
        (40, 8 + 5),
        (8, PAGE + 16 + 3),
        (PAGE + 16, 64 * PAGE),
        (64 * PAGE, 0),
    ];
    for (at, to) in hops {
        let value = VA + to;
        match at {
            at if at < 64 * PAGE => rig.set_vram_word(at, value),
            at => rig.set_ram_word(MIB + at - 64 * PAGE, value),
        }
    }
    assert_eq!(
        result(&mut rig, Kernel::PointerChase, &[VA, 3], 1),
        VA + PAGE + 19
    );
    assert_eq!(
        result(&mut rig, Kernel::PointerChase, &[VA, 4], 1),
        VA + 64 * PAGE
    );
    assert_eq!(result(&mut rig, Kernel::PointerChase, &[VA, 5000], 1), VA);
    assert_eq!(result(&mut rig, Kernel::PointerChase, &[VA, 0], 1), 0);
}

#[test]
fn launch_wrong_is_refused() {
    let mut rig = rig();
    let with = |change: fn(&mut Vec<u8>)| {
        let mut request = launch(0, 1, Kernel::Sum, &[VA, 8], 1);
        change(&mut request);
        request
    };
    let l = |kernel, arguments: &[u64], waves| launch(0, 1, kernel, arguments, waves);
    let cases = [
        (launch(1, 1, Kernel::Sum, &[VA, 8], 1), Status::BadContext),
        (launch(64, 1, Kernel::Sum, &[VA, 8], 1), Status::BadContext),
        (with(|r| r[12] = 0), Status::BadArgument),
        (with(|r| r[12] = 8), Status::BadArgument),
        (with(|r| r[28] = 1), Status::Malformed),
        (with(|r| r[48] = 1), Status::Malformed),
        (with(|r| r[4] = 56), Status::Malformed),
        (l(Kernel::Fill, &[VA, 8, 0, 1], 1), Status::Malformed),
        (l(Kernel::Sum, &[VA, 8], 0), Status::BadArgument),
        (l(Kernel::Sum, &[VA, 8], 4097), Status::LimitExceeded),
        (l(Kernel::Sum, &[VA + 4, 8], 1), Status::Misaligned),
        (l(Kernel::Sum, &[VA, 12], 1), Status::Misaligned),
        (l(Kernel::Copy, &[VA, VA + 4, 8], 1), Status::Misaligned),
        (l(Kernel::AtomicAdd, &[VA + 1, 1, 1], 1), Status::Misaligned),
        (
            l(Kernel::CompareAndSwap, &[VA + 1, 1, 1], 1),
            Status::Misaligned,
        ),
        (l(Kernel::PointerChase, &[VA + 1, 1], 1), Status::Misaligned),
        (
            l(Kernel::CompareAndSwap, &[VA, 1, 1], 2),
            Status::BadArgument,
        ),
        (l(Kernel::PointerChase, &[VA, 1], 2), Status::BadArgument),
        (l(Kernel::Sum, &[u64::MAX - 7, 16], 1), Status::BadAddress),
        (
            l(Kernel::Copy, &[VA, u64::MAX - 7, 16], 1),
            Status::BadAddress,
        ),
    ];
    for (request, expected) in cases {
        assert_eq!(rig.submit(&request).0, expected, "{request:?}");
    }
    assert!(rig.gpu.jobs().is_empty());
}

#[test]
fn launch_beyond_jobs_or_waves_is_busy_until_one_ends() {
    let mut rig = rig();
    let endless = [VA, 1, ENDLESS];
    rig.launch(0, 1, Kernel::AtomicAdd, &endless, 4000);
    assert_eq!(
        rig.try_launch(0, 2, Kernel::AtomicAdd, &endless, 97),
        Status::Busy
    );
    assert_eq!(
        rig.try_launch(0, 2, Kernel::AtomicAdd, &endless, 96),
        Status::Ok
    );
    assert_eq!(
        rig.try_launch(0, 2, Kernel::Sum, &[VA, 8], 1),
        Status::BadArgument
    );
    rig.control_ok(&kill_job(0, 1));
    assert_eq!(
        rig.try_launch(0, 1, Kernel::Sum, &[VA, 8], 4000),
        Status::Ok
    );
    rig.control_ok(&kill_job(0, 1));
    rig.control_ok(&kill_job(0, 2));
    rig.take_events();

    for fence in 0..1024 {
        rig.launch(0, fence, Kernel::PointerChase, &[VA, ENDLESS], 1);
    }
    let sum = [VA, 8];
    assert_eq!(rig.try_launch(0, 5000, Kernel::Sum, &sum, 1), Status::Busy);
    // Those that have ended count until their event has a buffer.
    (0..1024).for_each(|fence| drop(rig.control_ok(&kill_job(0, fence))));
    assert!(rig.gpu.jobs().is_empty() && rig.gpu.queues().waiting_fences > 900);
    rig.gpu.post_event_buffers(2000);
    rig.launch(0, 5000, Kernel::Sum, &sum, 1);
}

#[test]
fn system_page_without_ram_is_a_bus_error_of_that_job_alone() {
    let mut rig = rig();
    // The second page is in the hole between two pieces of RAM.
    rig.map(0, VA + 200 * PAGE, system(8 * MIB - PAGE), 2, RW);
    let hole = VA + 201 * PAGE;
    let cases = [
        (Kernel::Sum, vec![hole - 16, 32], Access::Read),
        (Kernel::Fill, vec![hole - 16, 32, 1], Access::Write),
        (Kernel::Add, vec![hole - 16, 32, 1], Access::Write),
        (Kernel::Copy, vec![VA, hole - 16, 32], Access::Read),
        (Kernel::Copy, vec![hole - 16, VA, 32], Access::Write),
        (Kernel::AtomicAdd, vec![hole, 1, 1], Access::Atomic),
        (Kernel::CompareAndSwap, vec![hole, 1, 1], Access::Atomic),
        (Kernel::PointerChase, vec![hole + 8, 1], Access::Read),
    ];
    for (kernel, arguments, access) in cases {
        rig.launch(0, 3, kernel, &arguments, 1);
        rig.run();
        let fence = rig.take_fence();
        assert_eq!(fence.status.get(), JobStatus::BusError.raw(), "{kernel:?}");
        assert_eq!(fence.page, GpuVa::new(hole), "{kernel:?}");
        assert_eq!((fence.access, fence.cause), (access.raw(), 0));
    }
    assert_eq!(result(&mut rig, Kernel::Sum, &[VA + PAGE, 8], 1), 0);
}

#[test]
fn huge_page_in_place_of_a_read_only_small_one_is_walked_to_once() {
    let mut rig = rig();
    let va = 2 * MIB;
    let store = [va, 8, 1];
    rig.map(0, va, vram(0), 1, 0);
    rig.launch(0, 1, Kernel::Sum, &[va, 8], 1);
    rig.run();
    rig.take_result(1);
    // More permissions need no invalidation (manual, section 7.7).
    rig.map_huge(0, va, vram(0), RW);
    for (count, misses) in [(1, 1), (2, 0)] {
        let before = rig.gpu.stats().compute_mmu.misses;
        rig.launch(0, 2, Kernel::Add, &store, 1);
        rig.run();
        rig.take_result(2);
        assert_eq!(rig.gpu.stats().compute_mmu.misses - before, misses);
        assert_eq!(rig.vram_word(0), count);
    }
    assert_eq!(rig.gpu.tlb().len(), 1);
}

#[test]
fn huge_page_over_touching_pieces_of_ram_is_used_as_one() {
    let mut rig = rig();
    let va = 0x8000_0000;
    rig.map_huge(0, va, system(24 * MIB - 2 * MIB), RW);
    rig.map_huge(0, va + 2 * MIB, system(24 * MIB), RW);
    result(&mut rig, Kernel::Fill, &[va, 4 * MIB, 2], 3);
    assert_eq!(result(&mut rig, Kernel::Sum, &[va, 4 * MIB], 5), MIB);
}

#[test]
fn endless_jobs_hinder_neither_others_nor_control() {
    let mut rig = rig();
    for fence in 0..20 {
        rig.launch(0, fence, Kernel::AtomicAdd, &[VA, 1, ENDLESS], 100);
    }
    rig.create_context(1);
    rig.map(1, VA, vram(0), 1, RW);
    rig.launch(1, 99, Kernel::Sum, &[VA, PAGE], 1);
    // Two contexts take turns, so the second work or the one after is the sum's.
    for _ in 0..4 {
        assert!(rig.step());
    }
    assert_eq!(rig.take_fence().fence.get(), 99);
    rig.control_ok(&invalidate(0, 0, 1 << 48));
    for fence in 0..20 {
        rig.control_ok(&kill_job(0, fence));
    }
    assert_eq!(rig.take_events().len(), 20);
    rig.run();
    assert!(rig.gpu.is_idle());
}

#[test]
fn jobs_and_waves_take_turns() {
    let mut rig = rig();
    let va = VA + 64 * PAGE;
    rig.launch(0, 1, Kernel::AtomicAdd, &[va, 1, ENDLESS], 10);
    rig.launch(0, 2, Kernel::AtomicAdd, &[va + 8, 1, ENDLESS], 1);
    for _ in 0..100 {
        assert!(rig.step());
    }
    let (first, second) = (rig.ram_word(MIB), rig.ram_word(MIB + 8));
    assert!(
        first.abs_diff(second) <= 512,
        "{first} {second}: jobs share evenly"
    );
}

#[test]
fn kill_with_an_access_in_flight_ends_the_job_after_it() {
    let mut rig = rig();
    rig.launch(0, 1, Kernel::AtomicAdd, &[VA, 1, ENDLESS], 3);
    let work = rig.gpu.next_work().unwrap();
    rig.control_ok(&kill_job(0, 1));
    rig.control_ok(&kill_job(0, 1));
    assert_eq!(rig.take_events(), [], "an access is still in flight");
    assert!(rig.gpu.jobs()[0].failing);
    assert!(
        rig.gpu.next_work().is_none(),
        "a failing job begins nothing"
    );
    rig.finish(work);
    let fence = rig.take_fence();
    assert_eq!(fence.status.get(), JobStatus::Killed.raw());
    assert_eq!(
        (fence.page.get(), fence.access, fence.result.get()),
        (0, 0, 0)
    );
}

#[test]
fn reset_drops_everything_and_zeroes_vram_after_work_in_flight() {
    let mut rig = rig();
    rig.set_vram_word(40 * MIB, 7);
    rig.launch(0, 1, Kernel::Fill, &[VA, 8 * PAGE, 5], 8);
    let work = rig.gpu.next_work().unwrap();
    let (tag, pending) = rig.try_control(&invalidate(0, VA, PAGE));
    assert_eq!(pending, None);
    rig.gpu.reset();
    assert!(rig.gpu.is_resetting() && rig.gpu.next_work().is_none());
    assert_eq!(rig.control(&nop()).status, Status::Busy);
    rig.finish(work);
    assert!(!rig.gpu.is_resetting());
    assert_eq!(
        rig.late(tag),
        None,
        "a request from before the reset is answered"
    );
    assert_eq!(rig.take_events(), []);
    assert!(rig.gpu.contexts().is_empty() && rig.gpu.jobs().is_empty());
    assert_eq!(rig.gpu.vram().written, 0);
    assert_eq!(rig.gpu.queues().event_buffers, 0);
    assert_eq!([0, 40 * MIB].map(|at| rig.vram_word(at)), [0, 0]);
    // It works again, and sequence numbers begin anew.
    rig.gpu.post_event_buffers(4);
    rig.create_context(0);
    rig.launch(0, 1, Kernel::Sum, &[VA, 8], 1);
    rig.run();
    assert_eq!(rig.take_faults()[0].sequence.get(), 1);
    assert!(rig.gpu.tlb().is_empty());
}

#[test]
fn limits_of_the_settings_hold() {
    let mut settings = Settings::new(VRAM);
    settings.limits.max_contexts = 1;
    settings.limits.max_jobs = 1;
    settings.limits.max_waves = 2;
    let mut rig = Rig::with(settings);
    rig.create_context(0);
    let root = rig.new_table();
    assert_eq!(
        rig.control(&create_context(1, root)).status,
        Status::BadContext
    );
    assert_eq!(
        rig.try_launch(0, 0, Kernel::Sum, &[0, 8], 3),
        Status::LimitExceeded
    );
    assert_eq!(rig.try_launch(0, 0, Kernel::Sum, &[0, 8], 1), Status::Ok);
    assert_eq!(rig.try_launch(0, 1, Kernel::Sum, &[0, 8], 1), Status::Busy);
}
