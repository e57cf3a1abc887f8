// SPDX-License-Identifier: MIT OR Apache-2.0
//! Contexts: an address space each, with what waits in it (manual, section 4.3.2).

use super::{
    fault::{FaultTable, Waiter},
    mmu::Space,
};
use farfault_protocol::address::VramAddr;
use std::{
    collections::{BTreeMap, VecDeque},
    ops::Bound,
};

/// Number of engines; [`farfault_protocol::event::Engine`] counts them.
pub(crate) const ENGINES: usize = 2;

/// What a fence of a context stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FenceState {
    /// A job that has not ended.
    Job(u64),
    /// One that has, and whose event has no buffer yet.
    Ended,
}

/// One address space.
#[derive(Debug)]
pub(crate) struct Context {
    pub(crate) space: Space,
    /// For each engine, jobs with waves that can go on.
    pub(crate) ready: [VecDeque<u64>; ENGINES],
    /// For each engine, whether it has this context in its rotation.
    pub(crate) queued: [bool; ENGINES],
    pub(crate) faults: FaultTable,
    /// Names of jobs that are taken.
    pub(crate) fences: BTreeMap<u64, FenceState>,
}

impl Context {
    /// Takes note that a job ended. Its name is free when its event has a buffer.
    pub(crate) fn end_fence(&mut self, fence: u64) {
        self.fences.insert(fence, FenceState::Ended);
    }
}

/// All of them, by number.
#[derive(Debug, Default)]
pub(crate) struct Contexts {
    contexts: BTreeMap<u32, Context>,
    /// The context that a wave with an unreported fault was last taken from.
    retried: u32,
}

impl Contexts {
    /// Adds one. Whether the number was free.
    pub(crate) fn create(&mut self, number: u32, root: VramAddr) -> bool {
        if self.contexts.contains_key(&number) {
            return false;
        }
        let context = Context {
            space: Space {
                context: number,
                root,
            },
            ready: Default::default(),
            queued: Default::default(),
            faults: FaultTable::default(),
            fences: BTreeMap::new(),
        };
        self.contexts.insert(number, context);
        true
    }

    pub(crate) fn remove(&mut self, number: u32) -> Option<Context> {
        self.contexts.remove(&number)
    }

    pub(crate) fn get(&self, number: u32) -> Option<&Context> {
        self.contexts.get(&number)
    }

    pub(crate) fn get_mut(&mut self, number: u32) -> Option<&mut Context> {
        self.contexts.get_mut(&number)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Context> {
        self.contexts.values()
    }

    /// Whether a wave is parked whose fault found no buffer.
    pub(crate) fn any_unreported(&self) -> bool {
        self.iter().any(|context| context.faults.unreported() > 0)
    }

    /// Takes such a wave; the contexts take turns.
    pub(crate) fn pop_unreported(&mut self) -> Option<Waiter> {
        let waiting = |(_, context): &(&u32, &Context)| context.faults.unreported() > 0;
        let after = (Bound::Excluded(self.retried), Bound::Unbounded);
        let mut turn = self.contexts.range(after).chain(&self.contexts);
        let (&number, _) = turn.find(waiting)?;
        self.retried = number;
        self.get_mut(number)?.faults.pop_unreported()
    }

    /// Frees the name of a job that has ended.
    pub(crate) fn release_fence(&mut self, number: u32, fence: u64) {
        if let Some(context) = self.get_mut(number) {
            context.fences.remove(&fence);
        }
    }
}
