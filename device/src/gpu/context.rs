// SPDX-License-Identifier: MIT OR Apache-2.0
//! Contexts: an address space each, with what waits in it (manual, section 4.1).

use super::{fault::FaultTable, mmu::Space};
use farfault_protocol::address::VramAddr;
use std::collections::{BTreeMap, VecDeque};

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
pub(crate) struct Contexts(BTreeMap<u32, Context>);

impl Contexts {
    /// Adds one. Whether the number was free.
    pub(crate) fn create(&mut self, number: u32, root: VramAddr) -> bool {
        if self.0.contains_key(&number) {
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
        self.0.insert(number, context);
        true
    }

    pub(crate) fn remove(&mut self, number: u32) -> Option<Context> {
        self.0.remove(&number)
    }

    pub(crate) fn get(&self, number: u32) -> Option<&Context> {
        self.0.get(&number)
    }

    pub(crate) fn get_mut(&mut self, number: u32) -> Option<&mut Context> {
        self.0.get_mut(&number)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Context> {
        self.0.values()
    }

    /// Frees the name of a job that has ended.
    pub(crate) fn release_fence(&mut self, number: u32, fence: u64) {
        if let Some(context) = self.get_mut(number) {
            context.fences.remove(&fence);
        }
    }
}
