// SPDX-License-Identifier: MIT OR Apache-2.0
//! Work in flight, and which translations it holds (manual, section 4.4: the invalidation promise).

use super::mmu::Span;
use farfault_protocol::{address::GpuVa, event::Access};
use std::collections::{BTreeMap, BTreeSet};

/// Translations that a work uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Held {
    /// The first address of the access.
    pub(crate) start: GpuVa,
    /// What the leaves map, which is more: who invalidates a part of a leaf means all of it.
    pub(crate) span: Span,
    pub(crate) access: Access,
}

impl Held {
    fn overlaps(&self, start: GpuVa, length: u64) -> bool {
        let start = start.get();
        self.span.start < start.saturating_add(length) && start < self.span.end
    }
}

/// Whose work it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Owner {
    /// Nobody's: a turn for the shell.
    Nobody,
    /// A wave's access. The first range is the destination, or the only one.
    Wave {
        context: u32,
        job: u64,
        wave: u32,
        held: [Option<Held>; 2],
    },
    /// A copy list's.
    List(u64),
}

impl Owner {
    fn is_of(&self, number: u32) -> bool {
        matches!(self, Self::Wave { context, .. } if *context == number)
    }

    fn uses(&self, number: u32, start: GpuVa, length: u64) -> bool {
        match self {
            Self::Wave { context, held, .. } => {
                *context == number
                    && held
                        .iter()
                        .flatten()
                        .any(|held| held.overlaps(start, length))
            }
            Self::Nobody | Self::List(_) => false,
        }
    }
}

/// All works in flight, by a number never used again.
#[derive(Debug, Default)]
pub(crate) struct Flights {
    works: BTreeMap<u64, Owner>,
    next: u64,
}

impl Flights {
    /// A number for a work that takes off.
    pub(crate) fn begin(&mut self, owner: Owner) -> u64 {
        let id = self.next;
        self.next += 1;
        self.works.insert(id, owner);
        id
    }

    /// Whose work it was that ended.
    pub(crate) fn end(&mut self, id: u64) -> Option<Owner> {
        self.works.remove(&id)
    }

    /// How many there are.
    pub(crate) fn len(&self) -> usize {
        self.works.len()
    }

    /// Works that use a translation of a page of a range.
    pub(crate) fn using(&self, context: u32, start: GpuVa, length: u64) -> BTreeSet<u64> {
        self.collect(|owner| owner.uses(context, start, length))
    }

    /// Works of a context.
    pub(crate) fn of(&self, context: u32) -> BTreeSet<u64> {
        self.collect(|owner| owner.is_of(context))
    }

    fn collect(&self, wanted: impl Fn(&Owner) -> bool) -> BTreeSet<u64> {
        let works = self.works.iter();
        works
            .filter(|(_, owner)| wanted(owner))
            .map(|(&id, _)| id)
            .collect()
    }
}
