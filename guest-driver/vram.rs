// SPDX-License-Identifier: GPL-2.0
//! Who owns which page of VRAM, and which block goes home when there is no room.
//!
//! VRAM is managed in blocks of 2 MiB, the size of a huge folio and the unit of eviction. A block
//! holds data pages of one address space, or page tables, or nothing. For each data page it is
//! known at which virtual address it was put, so that eviction finds it through the page tables of
//! its process. That address is a hint: mremap and fork move and share pages without telling.
//!
//! A page that has failed is given to nobody again, once it comes back, until the device is reset.
//!
//! Contents are not this file's business: who takes a page overwrites all of it.
//!
//! Locking: one spinlock, taken last of all locks; pages come back from contexts that can't sleep.

use kernel::{
    new_spinlock,
    page::PAGE_SHIFT,
    prelude::*,
    sync::{
        atomic::{Atomic, Relaxed},
        SpinLock,
    },
    time::{Delta, Instant, Monotonic},
};

use crate::{kapi::pagemap::DevicePage, module_parameters, sort::sort_by_key};
use farfault_protocol::address::VramAddr;

/// log2 of [`BLOCK_PAGES`]: the order of a huge folio.
pub(crate) const BLOCK_ORDER: u32 = 9;
/// Pages of a block.
pub(crate) const BLOCK_PAGES: usize = 1 << BLOCK_ORDER;
const WORDS: usize = BLOCK_PAGES / 64;

/// A block stays so long at least where others want its room, or it would go before it was used: the
/// module's parameter.
fn least_stay() -> Delta {
    Delta::from_millis(i64::from(*module_parameters::least_stay.value()))
}

/// A page of VRAM, by number.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) struct VramPage(pub(crate) u32);

impl VramPage {
    /// Where the page begins.
    pub(crate) const fn address(self) -> VramAddr {
        VramAddr::new((self.0 as u64) << PAGE_SHIFT)
    }

    /// The page that an address is in.
    pub(crate) const fn containing(address: VramAddr) -> Self {
        Self((address.get() >> PAGE_SHIFT) as u32)
    }

    const fn block(self) -> usize {
        self.0 as usize / BLOCK_PAGES
    }

    const fn slot(self) -> usize {
        self.0 as usize % BLOCK_PAGES
    }
}

impl From<DevicePage> for VramPage {
    fn from(page: DevicePage) -> Self {
        Self(page.0 as u32)
    }
}

impl From<VramPage> for DevicePage {
    fn from(page: VramPage) -> Self {
        Self(page.0 as usize)
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Use {
    Free,
    Data { context: u32 },
    Tables,
}

#[derive(Clone)]
struct Block {
    usage: Use,
    /// No page of it is handed out while it goes home.
    evicting: bool,
    free: [u64; WORDS],
    free_pages: u32,
    /// Pages that have failed.
    failed: [u64; WORDS],
    /// Those of them that nobody has any more.
    retired: [u64; WORDS],
    retired_pages: u32,
    /// When it was last taken from or mapped, in ticks of `State::clock`.
    used_at: u64,
    /// When its first page was taken.
    came_at: Option<Instant<Monotonic>>,
}

impl Block {
    const EMPTY: Self = Self {
        usage: Use::Free,
        evicting: false,
        free: [u64::MAX; WORDS],
        free_pages: BLOCK_PAGES as u32,
        failed: [0; WORDS],
        retired: [0; WORDS],
        retired_pages: 0,
        used_at: 0,
        came_at: None,
    };

    /// Whether it may go to make room.
    fn has_stayed(&self) -> bool {
        self.came_at
            .is_none_or(|came_at| came_at.elapsed() >= least_stay())
    }

    fn take_lowest(&mut self) -> Option<usize> {
        let word = self.free.iter().position(|&w| w != 0)?;
        let bit = self.free[word].trailing_zeros() as usize;
        self.free[word] &= !(1 << bit);
        self.free_pages -= 1;
        Some(word * 64 + bit)
    }

    fn give_back(&mut self, slot: usize) {
        if !self.is_used(slot) {
            return;
        }
        let (word, bit) = (slot / 64, 1 << (slot % 64));
        if self.has_failed(slot) {
            self.retired[word] |= bit;
            self.retired_pages += 1;
        } else {
            self.free[word] |= bit;
            self.free_pages += 1;
        }
    }

    /// Takes note that a page has failed.
    fn fail(&mut self, slot: usize) {
        let (word, bit) = (slot / 64, 1 << (slot % 64));
        let was_free = self.free[word] & bit != 0;
        self.failed[word] |= bit;
        if was_free {
            self.free[word] &= !bit;
            self.free_pages -= 1;
            self.retired[word] |= bit;
            self.retired_pages += 1;
        }
    }

    fn has_failed(&self, slot: usize) -> bool {
        self.failed[slot / 64] & (1 << (slot % 64)) != 0
    }

    fn is_used(&self, slot: usize) -> bool {
        (self.free[slot / 64] | self.retired[slot / 64]) & (1 << (slot % 64)) == 0
    }

    fn failed_pages_in_use(&self) -> usize {
        let words = self.failed.iter().zip(&self.retired);
        words
            .map(|(failed, retired)| (failed & !retired).count_ones() as usize)
            .sum()
    }

    /// Whether nobody has a page of it.
    fn is_unused(&self) -> bool {
        (self.free_pages + self.retired_pages) as usize == BLOCK_PAGES
    }
}

struct State {
    blocks: KVVec<Block>,
    /// By page: the virtual address that it was put at.
    addresses: KVVec<u64>,
    clock: u64,
    free_pages: usize,
    retired_pages: usize,
}

impl State {
    fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    fn find(&self, usage: Use) -> Option<usize> {
        self.blocks
            .iter()
            .position(|b| b.usage == usage && !b.evicting && b.free_pages != 0)
    }

    /// Takes a block of which no page is in use.
    fn take_block(&mut self, usage: Use) -> Option<VramPage> {
        let whole = |b: &Block| b.usage == Use::Free && b.free_pages as usize == BLOCK_PAGES;
        let index = self.blocks.iter().position(|b| whole(b) && !b.evicting)?;
        let now = self.tick();
        let block = self.blocks.get_mut(index)?;
        block.usage = usage;
        block.used_at = now;
        block.came_at = Some(Instant::now());
        block.free = [0; WORDS];
        block.free_pages = 0;
        self.free_pages -= BLOCK_PAGES;
        Some(VramPage((index * BLOCK_PAGES) as u32))
    }

    /// Takes one page for `usage`, from a block begun for it or from a new one.
    fn take_page(&mut self, usage: Use, hint: usize) -> Option<VramPage> {
        let begun = match self.blocks.get(hint) {
            Some(b) if b.usage == usage && !b.evicting && b.free_pages != 0 => Some(hint),
            _ => self.find(usage),
        };
        let index = begun.or_else(|| self.find(Use::Free))?;
        let now = self.tick();
        let block = self.blocks.get_mut(index)?;
        if block.usage == Use::Free {
            block.came_at = Some(Instant::now());
        }
        block.usage = usage;
        block.used_at = now;
        let slot = block.take_lowest()?;
        self.free_pages -= 1;
        Some(VramPage((index * BLOCK_PAGES + slot) as u32))
    }
}

/// Pages that were taken and have no folio yet. What is left is given back on drop.
pub(crate) struct Reservation<'a> {
    vram: &'a Vram,
    /// Whole blocks, by their first page; the last is the next to be used.
    blocks: KVec<VramPage>,
    /// Single pages, likewise.
    pages: KVec<VramPage>,
}

impl Reservation<'_> {
    /// The next single page; a block is broken for it if there is no other.
    pub(crate) fn page(&mut self) -> Option<VramPage> {
        if let Some(page) = self.pages.pop() {
            return Some(page);
        }
        let block = self.blocks.pop()?;
        for page in (block.0 + 1..block.0 + BLOCK_PAGES as u32).rev() {
            // There is room for a block.
            let _ = self.pages.push_within_capacity(VramPage(page));
        }
        Some(block)
    }

    /// A whole block, if there is one; its first page.
    pub(crate) fn block(&mut self) -> Option<VramPage> {
        self.blocks.pop()
    }

    /// How many pages are left.
    pub(crate) fn len(&self) -> usize {
        self.pages.len() + self.blocks.len() * BLOCK_PAGES
    }
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        while let Some(block) = self.blocks.pop() {
            self.vram.give_back(block, BLOCK_ORDER);
        }
        while let Some(page) = self.pages.pop() {
            self.vram.give_back(page, 0);
        }
    }
}

/// A data page, by the virtual address that it was put at.
#[derive(Clone, Copy)]
pub(crate) struct Resident {
    pub(crate) address: usize,
}

/// The least recently used block, chosen to go home. It takes no new pages until this drops.
pub(crate) struct Victim<'a> {
    vram: &'a Vram,
    index: usize,
    context: u32,
}

impl Victim<'_> {
    /// The address space whose pages it holds.
    pub(crate) fn context(&self) -> u32 {
        self.context
    }

    /// Whether the page belongs to the block.
    pub(crate) fn contains(&self, page: VramPage) -> bool {
        page.block() == self.index
    }

    /// Its pages, from the first one in use on: what was before that may look as if it still were, and mm
    /// would pass over all behind it.
    pub(crate) fn pages(&self) -> core::ops::Range<usize> {
        let state = self.vram.state.lock();
        let block = state.blocks.get(self.index);
        let is_used = |slot: &usize| block.is_some_and(|block| block.is_used(*slot));
        let first = (0..BLOCK_PAGES).find(is_used).unwrap_or(0);
        self.index * BLOCK_PAGES + first..(self.index + 1) * BLOCK_PAGES
    }

    /// Whether none of its pages is in use any more.
    pub(crate) fn is_empty(&self) -> bool {
        let state = self.vram.state.lock();
        let block = state.blocks.get(self.index);
        block.is_none_or(Block::is_unused)
    }

    /// Pages of the block that are in use and can go, in `into`, sorted by their address.
    pub(crate) fn residents(&self, into: &mut KVec<Resident>) -> Result {
        into.clear();
        into.reserve(BLOCK_PAGES, GFP_KERNEL)?;
        let state = self.vram.state.lock();
        let Some(block) = state.blocks.get(self.index) else {
            return Ok(());
        };
        let can_go = |slot: &usize| block.is_used(*slot) && !block.has_failed(*slot);
        for slot in (0..BLOCK_PAGES).filter(can_go) {
            let number = self.index * BLOCK_PAGES + slot;
            let resident = Resident {
                address: state.addresses.get(number).copied().unwrap_or(0) as usize,
            };
            // There is room for a whole block.
            let _ = into.push_within_capacity(resident);
        }
        drop(state);
        sort_by_key(into, |resident| resident.address);
        Ok(())
    }

    /// Says that it was used after all: another block's turn.
    pub(crate) fn spare(self) {
        let mut state = self.vram.state.lock();
        let now = state.tick();
        if let Some(block) = state.blocks.get_mut(self.index) {
            block.used_at = now;
        }
    }
}

impl Drop for Victim<'_> {
    fn drop(&mut self) {
        let mut state = self.vram.state.lock();
        if let Some(block) = state.blocks.get_mut(self.index) {
            block.evicting = false;
            if block.is_unused() {
                block.usage = Use::Free;
            }
        }
    }
}

/// The allocator of all VRAM.
#[pin_data]
pub(crate) struct Vram {
    pages: usize,
    /// Whether any page has failed, to be asked without the lock.
    any_failed: Atomic<bool>,
    #[pin]
    state: SpinLock<State>,
}

impl Vram {
    /// `pages` is a multiple of [`BLOCK_PAGES`].
    pub(crate) fn new(pages: usize) -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            state <- new_spinlock!(State {
                blocks: KVVec::from_elem(Block::EMPTY, pages / BLOCK_PAGES, GFP_KERNEL)?,
                addresses: KVVec::from_elem(0, pages, GFP_KERNEL)?,
                clock: 0,
                free_pages: pages,
                retired_pages: 0,
            }),
            any_failed: Atomic::new(false),
            pages,
        })
    }

    /// Pages in all.
    pub(crate) fn pages(&self) -> usize {
        self.pages
    }

    /// Pages that nobody has.
    pub(crate) fn free_pages(&self) -> usize {
        self.state.lock().free_pages
    }

    /// Pages that have failed and that nobody has any more.
    pub(crate) fn retired_pages(&self) -> usize {
        self.state.lock().retired_pages
    }

    /// Pages that have failed and that somebody still has: they go nowhere.
    pub(crate) fn failed_pages_in_use(&self) -> usize {
        if !self.any_failed.load(Relaxed) {
            return 0;
        }
        let state = self.state.lock();
        state.blocks.iter().map(Block::failed_pages_in_use).sum()
    }

    /// Takes note that a page has failed: it is given to nobody any more.
    pub(crate) fn fail(&self, page: VramPage) {
        let mut state = self.state.lock();
        let Some(block) = state.blocks.get_mut(page.block()) else {
            return;
        };
        let before = block.free_pages;
        block.fail(page.slot());
        let retired = (before - block.free_pages) as usize;
        state.free_pages -= retired;
        state.retired_pages += retired;
        drop(state);
        self.any_failed.store(true, Relaxed);
    }

    /// Whether a page has failed.
    pub(crate) fn has_failed(&self, page: VramPage) -> bool {
        self.any_failed.load(Relaxed) && {
            let state = self.state.lock();
            let block = state.blocks.get(page.block());
            block.is_some_and(|block| block.has_failed(page.slot()))
        }
    }

    /// Takes up to `wanted` data pages for `context`: whole blocks as far as there are empty ones and
    /// so many are wanted, and else pages from here and there.
    pub(crate) fn reserve(&self, context: u32, wanted: usize) -> Result<Reservation<'_>> {
        let mut room = Reservation {
            vram: self,
            blocks: KVec::with_capacity(wanted / BLOCK_PAGES, GFP_KERNEL)?,
            // Before there is a lock to be held: the rest, a broken block, or the blocks that are not.
            pages: KVec::with_capacity(wanted.max(BLOCK_PAGES), GFP_KERNEL)?,
        };
        let usage = Use::Data { context };
        let mut state = self.state.lock();
        while wanted - room.len() >= BLOCK_PAGES {
            let Some(block) = state.take_block(usage) else {
                break;
            };
            let _ = room.blocks.push_within_capacity(block);
        }
        let mut hint = usize::MAX;
        while room.len() < wanted {
            let Some(page) = state.take_page(usage, hint) else {
                break;
            };
            hint = page.block();
            let _ = room.pages.push_within_capacity(page);
        }
        drop(state);
        // In the order in which they were taken, so that neighbours stay neighbours.
        room.blocks.reverse();
        room.pages.reverse();
        Ok(room)
    }

    /// Takes a page for a page table.
    pub(crate) fn take_table(&self) -> Option<VramPage> {
        self.state.lock().take_page(Use::Tables, usize::MAX)
    }

    /// Gives `1 << order` pages back. May be called where sleeping is not allowed.
    pub(crate) fn give_back(&self, page: VramPage, order: u32) {
        let mut state = self.state.lock();
        let (mut freed, mut retired) = (0, 0);
        if let Some(block) = state.blocks.get_mut(page.block()) {
            let slots = page.slot()..(page.slot() + (1 << order)).min(BLOCK_PAGES);
            let before = (block.free_pages, block.retired_pages);
            slots.for_each(|slot| block.give_back(slot));
            freed = block.free_pages - before.0;
            retired = block.retired_pages - before.1;
            if block.is_unused() {
                block.usage = Use::Free;
            }
        }
        state.free_pages += freed as usize;
        state.retired_pages += retired as usize;
    }

    /// Records where folios were put: each with its first page, order and address.
    pub(crate) fn put_at(&self, folios: impl Iterator<Item = (VramPage, u32, usize)>) {
        let mut state = self.state.lock();
        for (page, order, address) in folios {
            let first = page.0 as usize;
            if let Some(addresses) = state.addresses.get_mut(first..first + (1 << order)) {
                for (i, slot) in addresses.iter_mut().enumerate() {
                    *slot = (address + (i << PAGE_SHIFT)) as u64;
                }
            }
        }
    }

    /// The address space that a page was taken for.
    pub(crate) fn context_of(&self, page: VramPage) -> Option<u32> {
        match self.state.lock().blocks.get(page.block())?.usage {
            Use::Data { context } => Some(context),
            Use::Free | Use::Tables => None,
        }
    }

    /// Notes that the blocks of the pages were used just now.
    pub(crate) fn touch(&self, pages: impl Iterator<Item = VramPage>) {
        let mut last = usize::MAX;
        let mut state = self.state.lock();
        for page in pages.filter(|page| core::mem::replace(&mut last, page.block()) != page.block())
        {
            let now = state.tick();
            if let Some(block) = state.blocks.get_mut(page.block()) {
                block.used_at = now;
            }
        }
    }

    /// The block that was not used for the longest time, of one address space or of any.
    pub(crate) fn victim(&self, of: Option<u32>) -> Option<Victim<'_>> {
        self.victim_among(|_, context| of.is_none_or(|of| of == context))
    }

    /// Likewise, of any, but none that has only just come.
    pub(crate) fn victim_that_stayed(&self) -> Option<Victim<'_>> {
        self.victim_among(|block, _| block.has_stayed())
    }

    fn victim_among(&self, may_go: impl Fn(&Block, u32) -> bool) -> Option<Victim<'_>> {
        let mut state = self.state.lock();
        let (index, context) = state
            .blocks
            .iter()
            .enumerate()
            .filter(|(_, block)| !block.evicting)
            .filter_map(|(index, block)| match block.usage {
                Use::Data { context } if may_go(block, context) => {
                    Some((index, context, block.used_at))
                }
                _ => None,
            })
            .min_by_key(|&(_, _, used_at)| used_at)
            .map(|(index, context, _)| (index, context))?;
        state.blocks.get_mut(index)?.evicting = true;
        Some(Victim {
            vram: self,
            index,
            context,
        })
    }
}
