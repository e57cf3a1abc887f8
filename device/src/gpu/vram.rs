// SPDX-License-Identifier: MIT OR Apache-2.0
//! VRAM: one anonymous mapping that costs nothing until it is used (manual, chapter 1).
//!
//! The host is asked for huge pages: memory that is used for the first time then costs one page
//! fault of the host for 2 MiB. What was used stays until the reset: what the guest zeroes it is
//! about to use, and giving that back would cost all these faults anew.
//!
//! This is the GPU's only file with `unsafe`: it gives the host advice, which vm-memory has no call
//! for. It knows nothing of who owns which byte. Every access is volatile or atomic, by any thread;
//! the only lock is around the list of poisoned pages, and taken only where there are some.
#![allow(
    unsafe_code,
    reason = "madvise: huge pages, and pages given back to the host"
)]

use super::settings::NewError;
use farfault_protocol::address::{HUGE_PAGE_SHIFT, HUGE_PAGE_SIZE, PAGE_SHIFT, VramAddr};
use parking_lot::RwLock;
use std::{
    collections::BTreeSet,
    io,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
};
use vm_memory::{MmapRegion, VolatileMemory, VolatileSlice};

/// The device's memory.
#[derive(Debug)]
pub struct Vram {
    region: MmapRegion,
    /// A bit for each 2 MiB that was written to since the last reset.
    written: Vec<AtomicU64>,
    /// Numbers of the pages whose contents are lost.
    poisoned: RwLock<BTreeSet<u64>>,
    /// Whether there are any, to be asked at each access.
    any_poisoned: AtomicBool,
}

impl Vram {
    /// Reserves `size` bytes, which read as zero.
    pub fn new(size: u64) -> Result<Self, NewError> {
        if size == 0 || size % HUGE_PAGE_SIZE != 0 || size >> 52 != 0 {
            return Err(NewError::VramSize(size));
        }
        let bytes = usize::try_from(size).map_err(|_| NewError::VramSize(size))?;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let region = MmapRegion::build(None, bytes, protection, flags)
            .map_err(|source| NewError::Reserve { size, source })?;
        advise(&region, libc::MADV_HUGEPAGE)
            .unwrap_or_else(|error| log::debug!("VRAM will have no huge pages: {error}"));
        let words = (size >> HUGE_PAGE_SHIFT).div_ceil(64);
        let written = (0..words).map(|_| AtomicU64::new(0)).collect();
        Ok(Self {
            region,
            written,
            poisoned: RwLock::default(),
            any_poisoned: AtomicBool::new(false),
        })
    }

    /// Bytes of VRAM.
    pub fn size(&self) -> u64 {
        self.region.size() as u64
    }

    /// Whether `length` bytes from `at` on are all in VRAM.
    pub fn contains(&self, at: VramAddr, length: u64) -> bool {
        at.checked_add(length)
            .is_some_and(|end| end.get() <= self.size())
    }

    /// Bytes to be read, if all are in VRAM.
    pub fn slice(&self, at: VramAddr, length: u64) -> Option<VolatileSlice<'_, ()>> {
        let (at, length) = (usize::try_from(at.get()), usize::try_from(length));
        self.region.get_slice(at.ok()?, length.ok()?).ok()
    }

    /// Bytes to be written, if all are in VRAM.
    pub fn slice_mut(&self, at: VramAddr, length: u64) -> Option<VolatileSlice<'_, ()>> {
        let slice = self.slice(at, length)?;
        self.mark_written(at, length);
        Some(slice)
    }

    /// A 64-bit word, if it is in VRAM and aligned. [`Self::mark_written`] belongs to a store that
    /// is not to a word already in use.
    pub fn word(&self, at: VramAddr) -> Option<&AtomicU64> {
        let at = usize::try_from(at.get()).ok()?;
        self.region.get_atomic_ref(at).ok()
    }

    /// Makes the page around an address unreadable, until all is cleared. Whether it was readable.
    pub fn poison(&self, at: VramAddr) -> bool {
        // Nobody may take it for untouched, and its zeroes for granted.
        self.mark_written(at, 1);
        let new = self.poisoned.write().insert(at.get() >> PAGE_SHIFT);
        self.any_poisoned.store(true, Ordering::Release);
        new
    }

    /// The pages that were poisoned, in order.
    pub fn poisoned_pages(&self) -> Vec<VramAddr> {
        let pages = self.poisoned.read();
        let address = |page: &u64| VramAddr::new(page << PAGE_SHIFT);
        pages.iter().map(address).collect()
    }

    /// How many bytes from `at` on, `length` at most, can be accessed.
    pub fn sound_bytes(&self, at: VramAddr, length: u64) -> u64 {
        if !self.any_poisoned.load(Ordering::Acquire) {
            return length;
        }
        let first = at.get() >> PAGE_SHIFT;
        match self.poisoned.read().range(first..).next() {
            Some(page) => length.min((page << PAGE_SHIFT).saturating_sub(at.get())),
            None => length,
        }
    }

    /// Takes note that memory is in use.
    pub fn mark_written(&self, at: VramAddr, length: u64) {
        let Some(last) = length.checked_sub(1) else {
            return;
        };
        let first = at.get() >> HUGE_PAGE_SHIFT;
        let last = at.get().saturating_add(last) >> HUGE_PAGE_SHIFT;
        for block in first..=last {
            let bit = 1 << (block % 64);
            if let Some(word) = self.written.get((block / 64) as usize) {
                // The load keeps what all threads write to in all their caches.
                if word.load(Ordering::Relaxed) & bit == 0 {
                    word.fetch_or(bit, Ordering::Relaxed);
                }
            }
        }
    }

    /// Numbers of the 2 MiB blocks that were written to since the last reset.
    pub fn written_blocks(&self) -> impl Iterator<Item = u64> + '_ {
        self.written.iter().zip(0u64..).flat_map(|(word, index)| {
            let bits = word.load(Ordering::Relaxed);
            (0..64)
                .filter(move |bit| bits >> bit & 1 != 0)
                .map(move |bit| index * 64 + bit)
        })
    }

    /// The parts of a range that need not be zero: those in blocks that were written to.
    pub fn written_parts(
        &self,
        at: VramAddr,
        length: u64,
    ) -> impl Iterator<Item = (VramAddr, u64)> + '_ {
        let end = at.get().saturating_add(length);
        let mut next = at.get();
        std::iter::from_fn(move || {
            let start = next;
            next = end.min((start | (HUGE_PAGE_SIZE - 1)).saturating_add(1));
            (start < end).then_some((start, next - start))
        })
        .filter(|(start, _)| self.is_written(start >> HUGE_PAGE_SHIFT))
        .map(|(start, length)| (VramAddr::new(start), length))
    }

    fn is_written(&self, block: u64) -> bool {
        let word = self.written.get((block / 64) as usize);
        // What is outside of VRAM is found out where it is stored to.
        word.is_none_or(|word| word.load(Ordering::Relaxed) >> (block % 64) & 1 != 0)
    }

    /// Zeroes all of it, by giving it back to the host. No page is poisoned any more.
    pub fn clear(&self) {
        if let Err(error) = advise(&self.region, libc::MADV_DONTNEED) {
            log::error!("VRAM is zeroed by hand, as the host does not take it back: {error}");
            if let Some(all) = self.slice(VramAddr::new(0), self.size()) {
                zero_by_hand(&all);
            }
        }
        for word in &self.written {
            word.store(0, Ordering::Relaxed);
        }
        self.any_poisoned.store(false, Ordering::Release);
        self.poisoned.write().clear();
    }
}

/// Tells the host how all of `region`, an anonymous mapping, is used: `MADV_HUGEPAGE`, or
/// `MADV_DONTNEED`, after which it reads as zero.
fn advise(region: &MmapRegion, advice: libc::c_int) -> io::Result<()> {
    let start = region.as_ptr().cast();
    // SAFETY: The range is the region, a private anonymous mapping that lives as long as the borrow,
    // so no other object's memory is touched. Either advice leaves the pages mapped. Nobody holds a
    // reference to plain data there: all accesses are volatile or atomic.
    let result = unsafe { libc::madvise(start, region.size(), advice) };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn zero_by_hand(slice: &VolatileSlice<'_, ()>) {
    let zeroes = [0u8; 4096];
    let mut rest = slice.offset(0).ok();
    while let Some(slice) = rest.filter(|slice| !slice.is_empty()) {
        slice.copy_from(&zeroes);
        rest = slice.offset(zeroes.len().min(slice.len())).ok();
    }
}
