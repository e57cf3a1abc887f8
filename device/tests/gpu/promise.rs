// SPDX-License-Identifier: MIT OR Apache-2.0
//! The invalidation promise: what the kernel's MMU notifiers rest on. Work is held un-retired, as a
//! thread would that is in the middle of an access.

use crate::rig::*;
use farfault_device::gpu::{Settings, Work};
use farfault_protocol::{command::Status, pte::Pte, submit::Kernel};

const VA: u64 = 0x10_0000_0000;

/// Contexts 0 and 1 with 8 pages of RAM each, and a job of 8 waves in each that fills them.
fn rig() -> Rig {
    let mut rig = Rig::new();
    for context in 0..2 {
        rig.create_context(context);
        rig.map(context, VA, system(MIB * u64::from(context)), 8, RW);
    }
    rig
}

fn next(rig: &mut Rig) -> Work {
    rig.gpu.next_work().expect("there is work")
}

/// Works of an 8-wave fill, one for each page.
fn works(rig: &mut Rig, context: u32) -> Vec<Work> {
    rig.launch(context, 1, Kernel::Fill, &[VA, 8 * PAGE, 1], 8);
    (0..8).map(|_| next(rig)).collect()
}

#[test]
fn invalidate_waits_for_the_access_in_flight_that_uses_the_range() {
    let mut rig = rig();
    let mut works = works(&mut rig, 0);
    rig.unmap(0, VA + 3 * PAGE, 1);
    let (tag, now) = rig.try_control(&invalidate(0, VA + 3 * PAGE, PAGE));
    assert_eq!(now, None, "an access to the page is in flight");
    let user = works.remove(3);
    works.drain(..).for_each(|work| rig.finish(work));
    assert_eq!(rig.late(tag), None);
    assert_eq!(rig.ram_word(3 * PAGE), 0);
    rig.finish(user);
    assert_eq!(rig.ram_word(3 * PAGE), 1, "the access was allowed to end");
    assert_eq!(rig.late(tag).unwrap().status, Status::Ok);
    assert_eq!(rig.gpu.stats().control.waited, 1);
}

#[test]
fn invalidate_does_not_wait_for_other_ranges_or_contexts() {
    let mut rig = rig();
    let held = works(&mut rig, 0);
    let page = |context, page| invalidate(context, VA + page * PAGE, PAGE);
    rig.control_ok(&page(1, 0));
    rig.control_ok(&page(0, 8));
    rig.control_ok(&invalidate(0, 0, VA));
    rig.control_ok(&invalidate(0, VA + 8 * PAGE, (1 << 48) - VA - 8 * PAGE));
    held.into_iter().for_each(|work| rig.finish(work));
}

#[test]
fn invalidate_of_more_than_the_access_waits_for_it() {
    for (start, length) in [(VA - 2 * MIB, 4 * MIB), (VA - PAGE, 2 * PAGE), (0, 1 << 48)] {
        let mut rig = rig();
        rig.launch(0, 1, Kernel::Sum, &[VA + 8, 8], 1);
        let work = next(&mut rig);
        rig.control_ok(&invalidate(0, VA - PAGE, PAGE));
        let (tag, now) = rig.try_control(&invalidate(0, start, length));
        assert_eq!(now, None, "{start:#x}");
        rig.finish(work);
        assert!(rig.late(tag).is_some());
    }
}

#[test]
fn both_ends_of_a_copy_are_held() {
    for page in [0, 4] {
        let mut rig = rig();
        rig.launch(0, 1, Kernel::Copy, &[VA, VA + 4 * PAGE, PAGE], 1);
        let work = next(&mut rig);
        rig.control_ok(&invalidate(0, VA + PAGE, PAGE));
        let (tag, now) = rig.try_control(&invalidate(0, VA + page * PAGE, PAGE));
        assert_eq!(now, None, "page {page}");
        rig.finish(work);
        assert!(rig.late(tag).is_some());
    }
}

#[test]
fn words_are_held_too() {
    for (kernel, arguments) in [
        (Kernel::AtomicAdd, vec![VA, 1, 1]),
        (Kernel::CompareAndSwap, vec![VA, 0, 1]),
        (Kernel::PointerChase, vec![VA + 64, 1]),
        (Kernel::Sum, vec![VA, 8]),
        (Kernel::Add, vec![VA, 8, 1]),
    ] {
        let mut rig = rig();
        rig.launch(0, 1, kernel, &arguments, 1);
        let work = next(&mut rig);
        let (tag, now) = rig.try_control(&invalidate(0, VA, PAGE));
        assert_eq!(now, None, "{kernel:?}");
        rig.finish(work);
        assert!(rig.late(tag).is_some());
    }
}

#[test]
fn all_of_a_huge_leaf_is_held_wherever_the_access_is() {
    let (first, last) = (VA, VA + 2 * MIB - PAGE);
    for (kernel, arguments) in [
        (Kernel::Fill, vec![first, PAGE, 1]),
        (Kernel::Sum, vec![last, PAGE]),
        (Kernel::Copy, vec![last, VA - PAGE, PAGE]),
        (Kernel::Copy, vec![VA - PAGE, first, PAGE]),
        (Kernel::AtomicAdd, vec![last, 1, 1]),
        (Kernel::CompareAndSwap, vec![first, 0, 1]),
        (Kernel::PointerChase, vec![last + 64, 1]),
    ] {
        let mut rig = Rig::new();
        rig.create_context(0);
        rig.map(0, VA - PAGE, system(0), 1, RW);
        rig.map_huge(0, VA, vram(2 * MIB), RW);
        rig.map(0, VA + 2 * MIB, system(MIB), 1, RW);
        rig.launch(0, 1, kernel, &arguments, 1);
        let work = next(&mut rig);
        let entry = rig.entry(0, VA, 1);
        rig.write_pte(entry, 0);
        rig.control_ok(&invalidate(0, VA - 2 * PAGE, PAGE));
        rig.control_ok(&invalidate(0, VA + 2 * MIB, PAGE));
        let (tag, now) = rig.try_control(&invalidate(0, VA + 5 * PAGE, PAGE));
        assert_eq!(now, None, "{kernel:?} {arguments:x?}");
        rig.finish(work);
        assert!(rig.late(tag).is_some());
    }
}

#[test]
fn work_that_begins_later_uses_the_new_translation_and_does_not_prolong_the_wait() {
    let mut rig = rig();
    rig.launch(0, 1, Kernel::AtomicAdd, &[VA, 1, u64::MAX], 3);
    let old = next(&mut rig);
    let entry = rig.entry(0, VA, 0);
    rig.write_pte(entry, Pte::leaf(vram(MIB), RW).0);
    let (tag, now) = rig.try_control(&invalidate(0, VA, PAGE));
    assert_eq!(now, None);
    // There is always one in flight on the range from now on.
    let newer = next(&mut rig);
    for _ in 0..5 {
        let next = next(&mut rig).execute(&rig.ram);
        rig.gpu.retire(next);
    }
    rig.finish(old);
    assert!(rig.late(tag).is_some(), "newer accesses hold up the answer");
    let before = rig.ram_word(0);
    rig.finish(newer);
    assert_eq!(rig.ram_word(0), before, "a newer access used the old page");
    rig.control_ok(&kill_job(0, 1));
    assert!(rig.vram_word(MIB) > 0);
}

#[test]
fn commands_behind_an_invalidation_wait_and_keep_their_order() {
    let mut rig = rig();
    let works = works(&mut rig, 0);
    let entry = rig.entry(0, VA, 0);
    let request = [
        invalidate(0, VA, PAGE),
        write_ptes(&[pte_run(entry, 0, 0, 1)]),
        invalidate(0, VA + PAGE, PAGE),
        read_ptes(0, VA, 1),
    ]
    .concat();
    let (first, now) = rig.try_control(&request);
    assert_eq!(now, None);
    let (second, now) = rig.try_control(&destroy_context(9));
    assert_eq!(now, None, "a later request overtakes");
    let (third, _) = rig.try_control(&nop());
    assert!(rig.page_is_mapped(0, VA));
    for (index, work) in works.into_iter().enumerate() {
        rig.finish(work);
        assert!(!rig.page_is_mapped(0, VA), "after {index}");
        assert_eq!(rig.replies.contains_key(&first), index >= 1);
    }
    let answer = rig.late(first).unwrap();
    assert_eq!((answer.status, answer.completed), (Status::Ok, 4));
    assert_eq!(answer.data, [0]);
    assert_eq!(rig.late(second).unwrap().status, Status::BadContext);
    assert_eq!(rig.late(third).unwrap().status, Status::Ok);
}

#[test]
fn destroy_waits_for_accesses_of_its_context_only_and_nothing_of_it_is_told_later() {
    let mut rig = rig();
    let of_zero = works(&mut rig, 0);
    let of_one = works(&mut rig, 1);
    let (tag, now) = rig.try_control(&destroy_context(0));
    assert_eq!(now, None);
    assert_eq!(rig.try_launch_now(0), Status::BadContext);
    of_zero.into_iter().for_each(|work| rig.finish(work));
    assert_eq!(rig.late(tag).unwrap().status, Status::Ok);
    assert_eq!(rig.take_events(), []);
    of_one.into_iter().for_each(|work| rig.finish(work));
    rig.run();
    assert_eq!(rig.take_fence().header.context.get(), 1);
    assert_eq!(rig.gpu.contexts().len(), 1);
}

#[test]
fn requests_waiting_are_bounded() {
    let mut rig = rig();
    let works = works(&mut rig, 0);
    let (first, _) = rig.try_control(&invalidate(0, VA, PAGE));
    let refused = (0..2000)
        .filter_map(|_| rig.try_control(&nop()).1)
        .inspect(|answer| assert_eq!(answer.status, Status::Busy))
        .count();
    assert_eq!(refused, 2000 - 1024);
    works.into_iter().for_each(|work| rig.finish(work));
    assert!(rig.late(first).is_some());
    assert_eq!(rig.replies.len(), 1024);
}

#[test]
fn translations_are_really_cached_so_that_a_missing_invalidation_shows() {
    let mut rig = rig();
    rig.launch(0, 1, Kernel::Fill, &[VA, 8, 1], 1);
    rig.run();
    rig.unmap(0, VA, 1);
    rig.launch(0, 2, Kernel::Fill, &[VA, 8, 2], 1);
    rig.run();
    assert_eq!(rig.ram_word(0), 2, "the TLB still translates");
    rig.control_ok(&invalidate(0, VA, PAGE));
    rig.take_events();
    rig.launch(0, 3, Kernel::Fill, &[VA, 8, 3], 1);
    rig.run();
    assert_eq!(rig.take_faults().len(), 1);
}

#[test]
fn invalidate_reaches_both_engines_and_both_page_sizes() {
    let mut rig = Rig::with(Settings::new(VRAM));
    rig.gpu.post_event_buffers(99);
    rig.create_context(0);
    rig.create_context(1);
    for context in 0..2 {
        rig.map(context, VA, vram(0), 2, RW);
        rig.map_huge(context, VA + 2 * MIB, vram(2 * MIB), RW);
        for (fence, va) in [VA, VA + 2 * MIB].into_iter().enumerate() {
            rig.launch(context, fence as u64, Kernel::Fill, &[va, 2 * PAGE, 1], 1);
            rig.launch(context, 9 + fence as u64, Kernel::Sum, &[va, 2 * PAGE], 1);
        }
    }
    rig.run();
    assert_eq!(rig.gpu.tlb().len(), 12);
    // One small page, and a page in the middle of the huge one.
    rig.control_ok(&invalidate(0, VA + PAGE, PAGE));
    assert_eq!(rig.gpu.tlb().len(), 10);
    rig.control_ok(&invalidate(0, VA + 3 * MIB, PAGE));
    assert_eq!(rig.gpu.tlb().len(), 8);
    rig.control_ok(&invalidate(0, 0, 1 << 48));
    let left = rig.gpu.tlb();
    assert_eq!(left.len(), 6);
    assert!(left.iter().all(|entry| entry.context == 1));
    rig.control_ok(&destroy_context(1));
    assert_eq!(rig.gpu.tlb(), []);
}

impl Rig {
    /// As the tables are, not by way of the control queue, which may be waiting.
    fn page_is_mapped(&self, context: u32, va: u64) -> bool {
        let tables = self.gpu.page_tables(context).unwrap();
        tables
            .mappings
            .iter()
            .any(|m| (m.start..m.start + m.length).contains(&va))
    }

    fn try_launch_now(&mut self, context: u32) -> Status {
        self.try_launch(context, 77, Kernel::Sum, &[VA, 8], 1)
    }
}
