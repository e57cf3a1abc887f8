// SPDX-License-Identifier: GPL-2.0
//! The GPU page table of one address space: which tables exist, and the commands that change them
//! (hardware manual, chapter 7).
//!
//! The entries themselves are in VRAM and nowhere else. What is kept here is where the tables are,
//! and one bit for each 4 KiB entry: whether it is valid, so that an invalidation of what was never
//! mapped costs the device nothing.
//!
//! It writes commands to a [`Batch`] and waits for nothing: the caller sends it. Tables are given
//! back only when all of them are cleared ([`PageTable::forget`]); one that became empty waits for
//! its range to be used again. So an invalidation allocates nothing and frees nothing.
//!
//! Locking: behind the address space's page-table lock.

use crate::{
    queue::Batch,
    vram::{Vram, VramPage, BLOCK_PAGES},
};
use core::ops::Range;
use farfault_protocol::{
    address::{GpuVa, VramAddr, HUGE_PAGE_SHIFT, HUGE_PAGE_SIZE},
    pte::{self, Pte, ENTRIES, ENTRY_SIZE, ROOT_LEVEL},
};
use kernel::{
    page::{PAGE_SHIFT, PAGE_SIZE},
    prelude::*,
    rbtree::{RBTree, RBTreeNodeReservation},
};

/// Most tables that one mapping can lack: of the levels 2, 1 and 0.
const MOST_MISSING: usize = ROOT_LEVEL as usize;
const WORDS: usize = BLOCK_PAGES / 64;

/// Pages of one region, by index.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct PageSet([u64; WORDS]);

impl PageSet {
    pub(crate) const EMPTY: Self = Self([0; WORDS]);
    pub(crate) const FULL: Self = Self([u64::MAX; WORDS]);

    pub(crate) fn has(&self, index: usize) -> bool {
        self.0[index / 64] & (1 << (index % 64)) != 0
    }

    pub(crate) fn insert(&mut self, index: usize) {
        self.0[index / 64] |= 1 << (index % 64);
    }

    pub(crate) fn insert_all(&mut self, range: Range<usize>) {
        for (i, word) in self.0.iter_mut().enumerate() {
            *word |= mask(&range, i);
        }
    }

    /// Those of a range of indexes.
    pub(crate) fn within(mut self, range: Range<usize>) -> Self {
        for (i, word) in self.0.iter_mut().enumerate() {
            *word &= mask(&range, i);
        }
        self
    }

    /// Those that are not in another set.
    pub(crate) fn without(mut self, other: &Self) -> Self {
        for (word, other) in self.0.iter_mut().zip(other.0) {
            *word &= !other;
        }
        self
    }

    pub(crate) fn is_full(&self) -> bool {
        *self == Self::FULL
    }

    fn remove(&mut self, index: usize) {
        self.0[index / 64] &= !(1 << (index % 64));
    }

    pub(crate) fn is_empty(&self) -> bool {
        *self == Self::EMPTY
    }
}

/// The bits of a range of indexes that are in word `i`.
fn mask(range: &Range<usize>, i: usize) -> u64 {
    let below = |end: usize| match end.saturating_sub(i * 64) {
        bits @ 0..64 => (1 << bits) - 1,
        _ => u64::MAX,
    };
    below(range.end) & !below(range.start)
}

/// The 2 MiB of addresses that a level-1 entry maps.
struct Region {
    /// Its level-0 table, linked unless `huge`.
    table: Option<VramPage>,
    /// The level-1 entry is a leaf.
    huge: bool,
    /// Pages whose level-0 entry is valid.
    mapped: PageSet,
    /// Of these, the ones in RAM that were taken from the CPU.
    exclusive: PageSet,
}

impl Region {
    const EMPTY: Self = Self {
        table: None,
        huge: false,
        mapped: PageSet::EMPTY,
        exclusive: PageSet::EMPTY,
    };

    fn set_mapped(&mut self, index: usize, exclusive: bool) {
        self.mapped.insert(index);
        if exclusive {
            self.exclusive.insert(index);
        } else {
            self.exclusive.remove(index);
        }
    }

    fn set_unmapped(&mut self, index: usize) {
        self.mapped.remove(index);
        self.exclusive.remove(index);
    }
}

/// Tables and nodes for one mapping, got before the page-table lock is taken.
pub(crate) struct Supplies {
    tables: [Option<VramPage>; MOST_MISSING],
    upper_nodes: [Option<RBTreeNodeReservation<u64, VramPage>>; MOST_MISSING - 1],
    region_node: Option<RBTreeNodeReservation<u64, Region>>,
}

impl Supplies {
    pub(crate) const NONE: Self = Self {
        tables: [None; MOST_MISSING],
        upper_nodes: [const { None }; MOST_MISSING - 1],
        region_node: None,
    };

    /// Enough for any mapping in one region. `ENOSPC`: no VRAM is left for tables.
    pub(crate) fn for_region(vram: &Vram) -> Result<Self> {
        let mut supplies = Self::NONE;
        for node in &mut supplies.upper_nodes {
            *node = Some(RBTreeNodeReservation::new(GFP_KERNEL)?);
        }
        supplies.region_node = Some(RBTreeNodeReservation::new(GFP_KERNEL)?);
        for i in 0..MOST_MISSING {
            supplies.tables[i] = vram.take_table();
            if supplies.tables[i].is_none() {
                supplies.give_back(vram);
                return Err(ENOSPC);
            }
        }
        Ok(supplies)
    }

    /// Returns what was not used.
    pub(crate) fn give_back(&mut self, vram: &Vram) {
        for table in self.tables.iter_mut().filter_map(Option::take) {
            vram.give_back(table, 0);
        }
    }

    fn table(&mut self) -> Result<VramPage> {
        self.tables.iter_mut().find_map(Option::take).ok_or(ENOSPC)
    }

    fn upper_node(&mut self) -> Result<RBTreeNodeReservation<u64, VramPage>> {
        self.upper_nodes
            .iter_mut()
            .find_map(Option::take)
            .ok_or(ENOSPC)
    }
}

/// What [`PageTable::map`] writes for the pages of one region.
pub(crate) enum Entries<'a> {
    /// By page; [`Pte::EMPTY`] leaves an entry as it is.
    Small(&'a [Pte]),
    /// The same, of pages in RAM that were taken from the CPU.
    Exclusive(&'a [Pte]),
    /// One leaf for all of it.
    Huge(Pte),
}

/// How far [`PageTable::unmap`] came.
pub(crate) struct Unmapped {
    /// Where to go on once the batch was sent; `None`: all is done.
    pub(crate) resume: Option<usize>,
    /// Whether the batch holds anything to send.
    pub(crate) any: bool,
}

/// The tables of one context.
pub(crate) struct PageTable {
    context: u32,
    root: VramPage,
    /// Tables of the levels 2 and 1, by [`upper_key`].
    upper: RBTree<u64, VramPage>,
    /// By address >> 21.
    regions: RBTree<u64, Region>,
    region_count: usize,
    tables: usize,
}

fn upper_key(level: u32, va: GpuVa) -> u64 {
    let covered = PAGE_SHIFT as u32 + pte::INDEX_BITS * (level + 1);
    (u64::from(level) << 60) | (va.get() >> covered)
}

fn entry_address(table: VramPage, index: u64) -> VramAddr {
    VramAddr::new(table.address().get() + index * ENTRY_SIZE)
}

fn write_zero_table(batch: &mut Batch, table: VramPage) -> Result {
    batch.write_ptes(table.address(), Pte::EMPTY, 0, ENTRIES as u32)
}

impl PageTable {
    /// An empty page table with its root at `root`; the batch clears it.
    pub(crate) fn new(context: u32, root: VramPage, batch: &mut Batch) -> Result<Self> {
        write_zero_table(batch, root)?;
        Ok(Self {
            context,
            root,
            upper: RBTree::new(),
            regions: RBTree::new(),
            region_count: 0,
            tables: 1,
        })
    }

    /// Where the root is.
    pub(crate) fn root(&self) -> VramAddr {
        self.root.address()
    }

    /// How many pages of VRAM the tables take.
    pub(crate) fn tables(&self) -> usize {
        self.tables
    }

    /// How many regions it has anything of.
    pub(crate) fn regions(&self) -> usize {
        self.region_count
    }

    /// Whether a mapping in the region of `address` may need [`Supplies`].
    pub(crate) fn lacks_tables(&self, address: usize) -> bool {
        match self.regions.get(&(address as u64 >> HUGE_PAGE_SHIFT)) {
            Some(region) => region.table.is_none(),
            None => true,
        }
    }

    /// Which pages of the region of `address` are mapped.
    pub(crate) fn mapped(&self, address: usize) -> PageSet {
        match self.regions.get(&(address as u64 >> HUGE_PAGE_SHIFT)) {
            Some(region) if region.huge => PageSet::FULL,
            Some(region) => region.mapped,
            None => PageSet::EMPTY,
        }
    }

    /// Which of them are in RAM and were taken from the CPU.
    pub(crate) fn exclusive(&self, address: usize) -> PageSet {
        let region = self.regions.get(&(address as u64 >> HUGE_PAGE_SHIFT));
        region.map_or(PageSet::EMPTY, |region| region.exclusive)
    }

    /// The table of `level` (1 or 2) for `va`, made and linked if need be.
    fn upper_table(
        &mut self,
        level: u32,
        va: GpuVa,
        supplies: &mut Supplies,
        batch: &mut Batch,
    ) -> Result<VramPage> {
        let key = upper_key(level, va);
        if let Some(&table) = self.upper.get(&key) {
            return Ok(table);
        }
        let parent = if level + 1 == ROOT_LEVEL {
            self.root
        } else {
            self.upper_table(level + 1, va, supplies, batch)?
        };
        let node = supplies.upper_node()?;
        let table = supplies.table()?;
        self.upper.insert(node.into_node(key, table));
        self.tables += 1;
        write_zero_table(batch, table)?;
        batch.write_ptes(
            entry_address(parent, pte::index(va, level + 1)),
            Pte::table(table.address()),
            0,
            1,
        )?;
        Ok(table)
    }

    /// Adds commands that map pages of the region that `address` is in. Returns how many pages.
    pub(crate) fn map(
        &mut self,
        address: usize,
        entries: Entries<'_>,
        supplies: &mut Supplies,
        batch: &mut Batch,
    ) -> Result<usize> {
        let va = GpuVa::new(address as u64).align_down(HUGE_PAGE_SIZE);
        let level1 = self.upper_table(1, va, supplies, batch)?;
        let level1_entry = entry_address(level1, pte::index(va, 1));
        let key = va.get() >> HUGE_PAGE_SHIFT;
        if self.regions.get(&key).is_none() {
            let node = supplies.region_node.take().ok_or(ENOSPC)?;
            self.regions.insert(node.into_node(key, Region::EMPTY));
            self.region_count += 1;
        }
        let region = self.regions.get_mut(&key).ok_or(EINVAL)?;
        // Entries for other pages were cleared before: what is mapped can only get more rights, or
        // leaves of another size (hardware manual, section 7.7).
        let resized = match &entries {
            Entries::Huge(_) => !region.mapped.is_empty(),
            Entries::Small(_) | Entries::Exclusive(_) => region.huge,
        };
        let exclusive = matches!(entries, Entries::Exclusive(_));
        let mapped = match entries {
            Entries::Huge(leaf) => {
                batch.write_ptes(level1_entry, leaf, 0, 1)?;
                region.huge = true;
                region.mapped = PageSet::EMPTY;
                region.exclusive = PageSet::EMPTY;
                BLOCK_PAGES
            }
            Entries::Small(entries) | Entries::Exclusive(entries) => {
                let table = match region.table {
                    Some(table) => table,
                    None => {
                        let table = supplies.table()?;
                        self.tables += 1;
                        *region.table.insert(table)
                    }
                };
                let linked = !region.huge && !region.mapped.is_empty();
                if !linked {
                    // It may hold entries of before: clear it, then show it.
                    write_zero_table(batch, table)?;
                    batch.write_ptes(level1_entry, Pte::table(table.address()), 0, 1)?;
                    region.huge = false;
                }
                write_small(region, table, entries, exclusive, batch)?
            }
        };
        if resized {
            batch.invalidate(self.context, va, HUGE_PAGE_SIZE)?;
        }
        Ok(mapped)
    }

    /// Adds commands that unmap the pages of `range` and invalidate them, as many as there is room
    /// for; those that were taken from the CPU stay, if `keep_exclusive`. Allocates nothing.
    pub(crate) fn unmap(
        &mut self,
        range: Range<usize>,
        keep_exclusive: bool,
        batch: &mut Batch,
    ) -> Result<Unmapped> {
        let mut cleared: Option<Range<usize>> = None;
        let mut resume = None;
        let first = range.start as u64 >> HUGE_PAGE_SHIFT;
        let mut cursor = self.regions.cursor_lower_bound_mut(&first);
        while let Some(mut at) = cursor {
            let (&key, region) = at.current_mut();
            let base = (key << HUGE_PAGE_SHIFT) as usize;
            if base >= range.end {
                break;
            }
            // A region's worth of runs, and the invalidation at the end.
            if !batch.has_room_for(BLOCK_PAGES / 2 + 2) {
                resume = Some(base.max(range.start));
                break;
            }
            let end = base + HUGE_PAGE_SIZE as usize;
            let touched = if region.huge {
                let va = GpuVa::new(base as u64);
                let table = self.upper.get(&upper_key(1, va)).copied().ok_or(EINVAL)?;
                batch.write_ptes(entry_address(table, pte::index(va, 1)), Pte::EMPTY, 0, 1)?;
                region.huge = false;
                Some(base..end)
            } else {
                let pages = (range.start.max(base) - base) >> PAGE_SHIFT
                    ..(range.end.min(end) - base).div_ceil(PAGE_SIZE);
                clear_small(region, pages, keep_exclusive, batch)?
                    .map(|p| base + (p.start << PAGE_SHIFT)..base + (p.end << PAGE_SHIFT))
            };
            if let Some(touched) = touched {
                let from = cleared.map_or(touched.start, |c| c.start);
                cleared = Some(from..touched.end);
            }
            cursor = at.move_next();
        }
        if let Some(cleared) = &cleared {
            let va = GpuVa::new(cleared.start as u64);
            batch.invalidate(self.context, va, cleared.len() as u64)?;
        }
        Ok(Unmapped {
            resume,
            any: cleared.is_some(),
        })
    }

    /// Adds commands that unmap everything. Once they were executed, [`PageTable::forget`] gives
    /// the tables back.
    pub(crate) fn clear(&self, batch: &mut Batch) -> Result {
        write_zero_table(batch, self.root)?;
        batch.invalidate(self.context, GpuVa::new(0), 1 << GpuVa::BITS)
    }

    /// Gives all tables but the root back. The device must not know them any more.
    pub(crate) fn forget(&mut self, vram: &Vram) {
        let upper = core::mem::replace(&mut self.upper, RBTree::new());
        let regions = core::mem::replace(&mut self.regions, RBTree::new());
        for &table in upper.values() {
            vram.give_back(table, 0);
        }
        for table in regions.values().filter_map(|region| region.table) {
            vram.give_back(table, 0);
        }
        self.tables = 1;
        self.region_count = 0;
    }

    /// Gives the root back, when the context is gone from the device.
    pub(crate) fn end(mut self, vram: &Vram) {
        self.forget(vram);
        vram.give_back(self.root, 0);
    }
}

/// Writes the entries that are not empty, consecutive pages as one run.
fn write_small(
    region: &mut Region,
    table: VramPage,
    entries: &[Pte],
    exclusive: bool,
    batch: &mut Batch,
) -> Result<usize> {
    let mut mapped = 0;
    let mut index = 0;
    while let Some(&first) = entries.get(index) {
        if first == Pte::EMPTY {
            index += 1;
            continue;
        }
        let mut count = 1;
        let step = PAGE_SIZE as u64;
        while entries
            .get(index + count)
            .is_some_and(|e| e.0 == first.0 + step * count as u64)
        {
            count += 1;
        }
        batch.write_ptes(
            entry_address(table, index as u64),
            first,
            step,
            count as u32,
        )?;
        for i in index..index + count {
            region.set_mapped(i, exclusive);
        }
        mapped += count;
        index += count;
    }
    Ok(mapped)
}

/// Clears the valid entries among `pages`; returns the range from the first to the last of them.
fn clear_small(
    region: &mut Region,
    pages: Range<usize>,
    keep_exclusive: bool,
    batch: &mut Batch,
) -> Result<Option<Range<usize>>> {
    let Some(table) = region.table else {
        return Ok(None);
    };
    let goes = |region: &Region, index| {
        region.mapped.has(index) && !(keep_exclusive && region.exclusive.has(index))
    };
    let mut touched: Option<Range<usize>> = None;
    let mut index = pages.start;
    while index < pages.end {
        if !goes(region, index) {
            index += 1;
            continue;
        }
        let first = index;
        while index < pages.end && goes(region, index) {
            region.set_unmapped(index);
            index += 1;
        }
        batch.write_ptes(
            entry_address(table, first as u64),
            Pte::EMPTY,
            0,
            (index - first) as u32,
        )?;
        touched = Some(touched.map_or(first, |t| t.start)..index);
    }
    Ok(touched)
}
