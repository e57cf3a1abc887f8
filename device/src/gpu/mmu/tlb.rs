// SPDX-License-Identifier: MIT OR Apache-2.0
//! The TLB of one engine: a set-associative cache of leaves, tagged with the context (manual,
//! section 7.7). It knows nothing of page tables; what it holds is true until invalidated.

use super::walk::Leaf;
use farfault_protocol::{
    address::{GpuVa, HUGE_PAGE_SHIFT, HUGE_PAGE_SIZE, PAGE_SHIFT, PAGE_SIZE},
    event::Access,
    pte::{Location, Pte},
};

/// Sets of the array for 4 KiB pages, a power of two.
const SMALL_SETS: usize = 128;
/// Sets of the array for 2 MiB pages, a power of two.
const HUGE_SETS: usize = 16;
/// Entries of a set.
const WAYS: usize = 4;

/// A translation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Whose.
    pub context: u32,
    /// The virtual page's number, in pages of its size.
    pub number: u64,
    /// Whether it is one of 2 MiB.
    pub huge: bool,
    /// Where the page is.
    pub page: Location,
    /// Whether stores may use it.
    pub writable: bool,
    /// Whether atomics may use it.
    pub atomic: bool,
    /// Whether the leaf is marked as dirty: the first store must see to that.
    pub dirty: bool,
}

impl Entry {
    /// What a walk for `va` found.
    pub fn new(context: u32, va: GpuVa, leaf: &Leaf) -> Self {
        Self {
            context,
            number: page_number(va, leaf.is_huge()),
            huge: leaf.is_huge(),
            page: leaf.pte.location(),
            writable: leaf.pte.has(Pte::WRITABLE),
            atomic: leaf.pte.has(Pte::WRITABLE | Pte::ATOMIC),
            dirty: leaf.pte.has(Pte::DIRTY),
        }
    }

    /// The first address that it translates.
    pub fn start(&self) -> GpuVa {
        GpuVa::new(self.number << page_shift(self.huge))
    }

    fn allows(&self, access: Access) -> bool {
        match access {
            Access::Read => true,
            Access::Write => self.writable && self.dirty,
            Access::Atomic => self.atomic && self.dirty,
        }
    }
}

/// The sets of one page size.
#[derive(Debug)]
struct Array<const SETS: usize> {
    sets: [[Option<Entry>; WAYS]; SETS],
    /// The way that the next eviction from a set takes.
    victims: [u8; SETS],
}

impl<const SETS: usize> Array<SETS> {
    fn new() -> Self {
        Self {
            sets: [[None; WAYS]; SETS],
            victims: [0; SETS],
        }
    }

    fn lookup(&self, context: u32, number: u64) -> Option<&Entry> {
        self.sets
            .get(set_index::<SETS>(number))?
            .iter()
            .flatten()
            .find(|entry| entry.number == number && entry.context == context)
    }

    /// Whether a valid entry of another page had to go.
    fn insert(&mut self, new: Entry) -> bool {
        let index = set_index::<SETS>(new.number);
        let (Some(set), Some(victim)) = (self.sets.get_mut(index), self.victims.get_mut(index))
        else {
            return false;
        };
        let same = set.iter().position(|way| {
            way.is_some_and(|entry| entry.number == new.number && entry.context == new.context)
        });
        let free = || set.iter().position(Option::is_none);
        let (way, evicts) = match same.or_else(free) {
            Some(way) => (way, false),
            None => {
                *victim = (*victim + 1) % WAYS as u8;
                (usize::from(*victim), true)
            }
        };
        if let Some(way) = set.get_mut(way) {
            *way = Some(new);
        }
        evicts
    }

    /// Drops the entries with numbers `first` to `last`.
    fn invalidate(&mut self, context: u32, first: u64, last: u64) {
        let hit =
            |entry: &Entry| entry.context == context && (first..=last).contains(&entry.number);
        if last - first < SETS as u64 {
            for number in first..=last {
                if let Some(set) = self.sets.get_mut(set_index::<SETS>(number)) {
                    drop_from(set, hit);
                }
            }
        } else {
            self.sets.iter_mut().for_each(|set| drop_from(set, hit));
        }
    }
}

/// The cache.
#[derive(Debug)]
pub struct Tlb {
    small: Box<Array<SMALL_SETS>>,
    huge: Box<Array<HUGE_SETS>>,
}

impl Default for Tlb {
    fn default() -> Self {
        Self {
            small: Box::new(Array::new()),
            huge: Box::new(Array::new()),
        }
    }
}

impl Tlb {
    /// The translation of `va`, if the access may use it without a look at the tables.
    pub fn lookup(&self, context: u32, va: GpuVa, access: Access) -> Option<&Entry> {
        self.small
            .lookup(context, page_number(va, false))
            .or_else(|| self.huge.lookup(context, page_number(va, true)))
            .filter(|entry| entry.allows(access))
    }

    /// Adds a translation, in the place of older ones of the same addresses. Whether another valid
    /// one had to go.
    pub fn insert(&mut self, entry: Entry) -> bool {
        // No address is in both arrays: an older small page would hide a huge one that allows more,
        // and each store would walk.
        let Entry { context, .. } = entry;
        let start = entry.start();
        if entry.huge {
            let first = page_number(start, false);
            let last = first + HUGE_PAGE_SIZE / PAGE_SIZE - 1;
            self.small.invalidate(context, first, last);
            self.huge.insert(entry)
        } else {
            let around = page_number(start, true);
            self.huge.invalidate(context, around, around);
            self.small.insert(entry)
        }
    }

    /// Drops whatever translates an address of `[start, start + length)`.
    pub fn invalidate(&mut self, context: u32, start: GpuVa, length: u64) {
        let Some(last) = length.checked_sub(1) else {
            return;
        };
        let last = GpuVa::new(start.get().saturating_add(last));
        self.small
            .invalidate(context, page_number(start, false), page_number(last, false));
        self.huge
            .invalidate(context, page_number(start, true), page_number(last, true));
    }

    /// Drops the entries that `keep` does not want.
    pub fn retain(&mut self, keep: impl Fn(&Entry) -> bool) {
        let drop = |entry: &Entry| !keep(entry);
        self.small
            .sets
            .iter_mut()
            .for_each(|set| drop_from(set, drop));
        self.huge
            .sets
            .iter_mut()
            .for_each(|set| drop_from(set, drop));
    }

    /// Everything in it.
    pub fn entries(&self) -> impl Iterator<Item = &Entry> {
        let small = self.small.sets.iter().flatten().flatten();
        small.chain(self.huge.sets.iter().flatten().flatten())
    }
}

fn drop_from(set: &mut [Option<Entry>; WAYS], unwanted: impl Fn(&Entry) -> bool) {
    for way in set {
        if way.as_ref().is_some_and(&unwanted) {
            *way = None;
        }
    }
}

fn page_shift(huge: bool) -> u32 {
    if huge { HUGE_PAGE_SHIFT } else { PAGE_SHIFT }
}

fn page_number(va: GpuVa, huge: bool) -> u64 {
    va.get() >> page_shift(huge)
}

fn set_index<const SETS: usize>(number: u64) -> usize {
    number as usize % SETS
}
