// SPDX-License-Identifier: MIT OR Apache-2.0
//! VRAM: one anonymous mapping that costs nothing until it is used (manual, chapter 1).
//!
//! This is the GPU's only file with `unsafe`: it gives pages back to the host, which vm-memory has
//! no call for. It knows nothing of who owns which byte. There are no locks: every access is
//! volatile or atomic, by any thread.
#![allow(unsafe_code, reason = "madvise, to give pages back to the host")]

use super::settings::{MIN_HOLE, NewError};
use farfault_protocol::address::{HUGE_PAGE_SHIFT, HUGE_PAGE_SIZE, VramAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use vm_memory::{MmapRegion, VolatileMemory, VolatileSlice};

/// The device's memory.
#[derive(Debug)]
pub struct Vram {
    region: MmapRegion,
    /// A bit for each 2 MiB that was written to since it was last given back whole.
    written: Vec<AtomicU64>,
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
        let words = (size >> HUGE_PAGE_SHIFT).div_ceil(64);
        let written = (0..words).map(|_| AtomicU64::new(0)).collect();
        Ok(Self { region, written })
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

    /// Numbers of the 2 MiB blocks that were written to since they were last given back whole.
    pub fn written_blocks(&self) -> impl Iterator<Item = u64> + '_ {
        self.written.iter().zip(0u64..).flat_map(|(word, index)| {
            let bits = word.load(Ordering::Relaxed);
            (0..64)
                .filter(move |bit| bits >> bit & 1 != 0)
                .map(move |bit| index * 64 + bit)
        })
    }

    /// Zeroes memory by giving it back to the host, as far as that is worth it: returns the bytes
    /// before and after, which are the caller's to zero. `None` if there is nothing to give back.
    pub fn punch_hole(&self, at: VramAddr, length: u64) -> Option<(u64, u64)> {
        let end = at.get().checked_add(length)?;
        let hole_start = at.get().checked_next_multiple_of(MIN_HOLE)?;
        let hole_end = end - end % MIN_HOLE;
        if hole_end <= hole_start || !self.contains(at, length) {
            return None;
        }
        if !self.discard(hole_start, hole_end - hole_start) {
            return None;
        }
        Some((hole_start - at.get(), end - hole_end))
    }

    /// Zeroes all of it.
    pub fn clear(&self) {
        if !self.discard(0, self.size()) {
            log::error!("VRAM was not given back to the host at reset: zeroing it by hand");
            if let Some(all) = self.slice(VramAddr::new(0), self.size()) {
                zero_by_hand(&all);
            }
        }
    }

    /// Gives `[start, start + length)` back, both multiples of [`MIN_HOLE`] and inside VRAM, which
    /// reads as zero then. Whether the host took it.
    fn discard(&self, start: u64, length: u64) -> bool {
        let Some(slice) = self.slice(VramAddr::new(start), length) else {
            return false;
        };
        let first = start.div_ceil(HUGE_PAGE_SIZE);
        let end = (start + length) / HUGE_PAGE_SIZE;
        for block in first..end {
            if let Some(word) = self.written.get((block / 64) as usize) {
                word.fetch_and(!(1 << (block % 64)), Ordering::Relaxed);
            }
        }
        let address = slice.ptr_guard_mut().as_ptr().cast();
        // SAFETY: the range is inside of `self.region`, a private anonymous mapping that lives as
        // long as `self`, so no other object's memory is touched. The pages stay mapped and read as
        // zero. Nobody holds a reference to plain data there: all accesses are volatile or atomic.
        let result = unsafe { libc::madvise(address, slice.len(), libc::MADV_DONTNEED) };
        result == 0
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
