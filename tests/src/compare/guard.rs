// SPDX-License-Identifier: MIT OR Apache-2.0
//! Keeps scripts away from what `lib/test_hmm.c` does not survive, by a small model of its state.
//!
//! The mock device has a table of entries for each descriptor, and one page table of the kernel's
//! beside it; the two can disagree:
//!
//! - A READ or WRITE that finds an entry missing faults on the rest of its range, and then takes
//!   device pages that it finds there for RAM: it oopses if one of them is its own device's.
//! - An entry goes when a notifier says so, when anything splits a huge page around it, and (for the
//!   descriptor that moved the page) when a CPU touches the page, a child's copy included.
//! - What invalidates entries invalidates the one after its range, too.
//! - Notifications about its own device's migrations are ignored, by every descriptor: one that did
//!   not ask for the migration keeps entries that lead to freed pages.
//!
//! So a READ or WRITE is allowed where no page can be on its device, or where all of them have
//! entries for sure; and no descriptor may move what another one of the same device has touched. The
//! model errs on the safe side: it forgets entries of whole blocks of 2 MiB, and remembers pages on
//! the device until they have come home for sure.

use super::{
    address::Range,
    script::{Call, NodeCall},
};
use std::collections::{BTreeMap, BTreeSet};

const BLOCK: u64 = 512;

/// A descriptor of this process.
#[derive(Clone, Debug)]
struct Descriptor {
    node: usize,
    /// Opened by the process that forked this one: the model knows nothing of that one any more.
    inherited: bool,
    /// Pages that may have entries.
    touched: BTreeSet<u64>,
    /// Pages that have one for sure, and whether it allows writing.
    sure: BTreeMap<u64, bool>,
}

/// The model for one process.
#[derive(Clone, Debug, Default)]
pub(super) struct Guard {
    descriptors: BTreeMap<String, Descriptor>,
    /// Pages that may be on a device, of each node.
    resident: [BTreeSet<u64>; 2],
    /// Private pages that the CPU's page table lets it write for sure.
    writable: BTreeSet<u64>,
}

impl Guard {
    pub(super) fn open(&mut self, name: &str, node: usize) {
        let descriptor = Descriptor {
            node,
            inherited: false,
            touched: BTreeSet::new(),
            sure: BTreeMap::new(),
        };
        self.descriptors.insert(name.to_owned(), descriptor);
    }

    /// The last one to close a descriptor brings all pages of the device home, as RELEASE does.
    pub(super) fn close(&mut self, name: &str, last: bool) {
        match self.descriptors.remove(name) {
            Some(descriptor) if last => self.release(descriptor.node),
            _ => {}
        }
    }

    fn release(&mut self, node: usize) {
        self.forget_entries();
        if let Some(resident) = self.resident.get_mut(node) {
            resident.clear();
        }
    }

    fn forget_entries(&mut self) {
        for descriptor in self.descriptors.values_mut() {
            descriptor.sure.clear();
        }
    }

    /// Something may have happened to the entries of these pages, and of their neighbours.
    pub(super) fn disturbed(&mut self, range: Range) {
        let pages = range.numbers();
        let blocks = pages.start / BLOCK * BLOCK..pages.end.next_multiple_of(BLOCK) + 1;
        for descriptor in self.descriptors.values_mut() {
            descriptor.sure.retain(|page, _| !blocks.contains(page));
        }
    }

    /// They may have another protection, or be others.
    pub(super) fn changed(&mut self, range: Range) {
        self.disturbed(range);
        let pages = range.numbers();
        self.writable.retain(|page| !pages.contains(page));
    }

    /// There is nothing any more.
    pub(super) fn emptied(&mut self, range: Range) {
        self.changed(range);
        self.came_home(range);
    }

    fn came_home(&mut self, range: Range) {
        let pages = range.numbers();
        for resident in &mut self.resident {
            resident.retain(|page| !pages.contains(page));
        }
    }

    pub(super) fn moved(&mut self, from: Range, to: Range) {
        let distance = to.numbers().start.wrapping_sub(from.numbers().start);
        let pages = from.numbers();
        let on_device = self.resident.clone().map(|resident| {
            let moved = resident.range(pages.clone());
            moved
                .map(|page| page.wrapping_add(distance))
                .collect::<Vec<_>>()
        });
        // Where nothing was mapped to be moved, what is at the other end stays.
        self.changed(to);
        self.emptied(from);
        for (resident, moved) in self.resident.iter_mut().zip(on_device) {
            resident.extend(moved);
        }
    }

    /// The CPU has had these pages.
    pub(super) fn used(&mut self, range: Range, written_private: bool) {
        self.disturbed(range);
        self.came_home(range);
        if written_private {
            self.writable.extend(range.numbers());
        }
    }

    /// Parent, when there is a new child.
    pub(super) fn forked(&mut self) {
        self.forget_entries();
        self.writable.clear();
    }

    /// The child itself.
    pub(super) fn is_child(&mut self) {
        self.forked();
        for descriptor in self.descriptors.values_mut() {
            descriptor.inherited = true;
        }
    }

    /// A child has done something, perhaps to pages that it shares with this process.
    pub(super) fn child_did_something(&mut self) {
        self.forget_entries();
        self.writable.clear();
    }

    /// Does test_hmm survive this call?
    pub(super) fn allows(&self, call: &NodeCall) -> bool {
        let Some(descriptor) = self.descriptors.get(&call.descriptor) else {
            return true;
        };
        let pages = call.range.numbers();
        let others_touched = || {
            let others = self
                .descriptors
                .iter()
                .filter(|(name, other)| **name != call.descriptor && other.node == descriptor.node);
            let mut touched = others.flat_map(|(_, other)| other.touched.range(pages.clone()));
            touched.next().is_some()
        };
        match call.call {
            Call::Read | Call::Write => {
                let resident = self.resident.get(descriptor.node);
                let on_device =
                    resident.is_some_and(|set| set.range(pages.clone()).next().is_some());
                let enough = |page| {
                    let entry = descriptor.sure.get(&page);
                    entry.is_some_and(|writable| *writable || call.call == Call::Read)
                };
                let known = !descriptor.inherited && pages.end > pages.start;
                !on_device && !descriptor.inherited || known && pages.clone().all(enough)
            }
            Call::ToDev | Call::ToSys => !descriptor.inherited && !others_touched(),
            Call::Exclusive | Call::Release => !descriptor.inherited,
            Call::Snapshot | Call::Check | Call::Flags | Call::Number(_) => true,
        }
    }

    /// What the call has done.
    pub(super) fn called(&mut self, call: &NodeCall, success: bool) {
        let name = &call.descriptor;
        let Some(descriptor) = self.descriptors.get(name) else {
            return;
        };
        let (range, node) = (call.range, descriptor.node);
        let pages = range.numbers();
        match call.call {
            Call::Read | Call::Write => {
                // With entries for all pages, nothing changes.
                if !pages
                    .clone()
                    .all(|page| descriptor.sure.contains_key(&page))
                {
                    self.disturbed(range);
                    if success {
                        self.came_home(range);
                    }
                }
            }
            Call::ToDev => {
                self.disturbed(range);
                if let Some(resident) = self.resident.get_mut(node) {
                    resident.extend(pages.clone());
                }
                let writable = |page| (page, self.writable.contains(&page));
                let entries: Vec<_> = pages.clone().map(writable).collect();
                if let (Some(descriptor), true) = (self.descriptors.get_mut(name), success) {
                    descriptor.sure.extend(entries);
                }
            }
            Call::ToSys => {
                self.disturbed(range);
                if let (Some(resident), true) = (self.resident.get_mut(node), success) {
                    resident.retain(|page| !pages.contains(page));
                }
            }
            Call::Exclusive => {
                self.changed(range);
                if success {
                    self.came_home(range);
                }
            }
            Call::Release => self.release(node),
            Call::Snapshot | Call::Check | Call::Flags | Call::Number(_) => return,
        }
        if let Some(descriptor) = self.descriptors.get_mut(name) {
            descriptor.touched.extend(pages);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compare::script::{Step, parse};

    fn call(line: &str) -> NodeCall {
        match parse(line).unwrap().unwrap().step {
            Step::Call(call) => call,
            other => panic!("{other:?}"),
        }
    }

    fn with_pages_on_device() -> Guard {
        let mut guard = Guard::default();
        guard.open("d", 0);
        guard.open("e", 1);
        guard.used(Range::parse("a:8").unwrap(), true);
        guard.called(&call("d to-dev a:8"), true);
        guard
    }

    #[test]
    fn pages_on_the_device_are_read_as_long_as_entries_are_sure() {
        let mut guard = with_pages_on_device();
        assert!(guard.allows(&call("d write a:8")));
        assert!(!guard.allows(&call("d read a:9")));
        assert!(guard.allows(&call("e read a:9")));
        guard.called(&call("d to-dev a+512:1"), true);
        assert!(guard.allows(&call("d read a+512:1")));
        guard.disturbed(Range::parse("a+511:1").unwrap());
        assert!(!guard.allows(&call("d read a+512:1")));
        guard.called(&call("d to-dev a:8"), true);
        guard.disturbed(Range::parse("a+100:1").unwrap());
        assert!(!guard.allows(&call("d read a:1")));
        guard.called(&call("d to-sys a:8"), true);
        assert!(guard.allows(&call("d read a:8")));
    }

    #[test]
    fn a_move_takes_pages_along_and_may_leave_those_at_its_end() {
        let mut guard = with_pages_on_device();
        let range = |text| Range::parse(text).unwrap();
        guard.moved(range("b:4"), range("a:4"));
        assert!(!guard.allows(&call("d read a:1")));
        guard.moved(range("a:8"), range("c:8"));
        assert!(!guard.allows(&call("d read c+7:1")));
        assert!(guard.allows(&call("d read a:8")));
    }

    #[test]
    fn a_second_descriptor_of_the_device_moves_nothing_that_was_touched() {
        let mut guard = with_pages_on_device();
        guard.open("f", 0);
        assert!(!guard.allows(&call("f to-sys a+7:4")));
        assert!(guard.allows(&call("f to-dev a+8:4")));
        assert!(!guard.allows(&call("f read a:1")));
        guard.close("f", true);
        assert!(guard.allows(&call("d read a:8")));
    }
}
