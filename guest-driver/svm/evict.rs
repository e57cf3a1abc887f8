// SPDX-License-Identifier: GPL-2.0
//! Room in VRAM, and everything home.
//!
//! What goes is a block: the one that was not used for the longest time, of those that did not come
//! just now. Its pages go home through the page tables of their process, under its mmap lock, at the
//! addresses where they were put. What is not found there (mremap moved it, only a forked child has
//! it, the process is gone) goes home through the pages themselves. That second way is for leftovers
//! only: mm's walk over the mappings of an anonymous page has no protection against an exiting process
//! there. So to make room it is taken only under the mmap lock of the owner, and never while the owner
//! exits or where it has closed its address space.
//!
//! Nobody may hold an mmap lock here: the victim's is taken. To make room that lock is tried for a
//! while only: a process that keeps it is spared.

use super::{flight::Flight, Space, REGION_BYTES};
use crate::{
    gpu::Gpu,
    kapi::{
        migrate::Collected,
        mm::MmapLock,
        trace::{self, Cause, Direction},
    },
    queue::Batch,
    vram::{Reservation, Resident, Victim, BLOCK_PAGES},
};
use farfault_protocol::{address::GpuVa, command::Status};
use kernel::{mm::MmWithUser, page::PAGE_SIZE, prelude::*};

/// Blocks sent home for one reservation.
const MOST_EVICTIONS: usize = 8;
/// Blocks found in use that are spared for one that was not.
const MOST_SPARED: usize = 4;
/// Blocks that are tried before there is no room.
const MOST_TRIED: usize = 16;
/// Address ranges of a block that are asked whether they were used.
const MOST_HARVESTED: usize = 4;
/// Rounds over what is left of an address space that closes.
const LAST_ROUNDS: usize = 3;

impl Gpu {
    /// Pages of VRAM for `context`, with other pages sent home if there are too few. May return less
    /// than `pages`, where nothing more can go.
    pub(crate) fn make_room(&self, context: u32, pages: usize) -> Result<Reservation<'_>> {
        for _ in 0..MOST_EVICTIONS + pages / BLOCK_PAGES {
            let reservation = self.vram.reserve(context, pages)?;
            if reservation.len() == pages {
                return Ok(reservation);
            }
            drop(reservation);
            // One that has only just come stays, and what wanted its room is used in RAM: or blocks would
            // come and go, and none be used.
            if self.evict_one(Cause::Evict, || self.vram.victim_that_stayed())? == 0 {
                break;
            }
        }
        self.vram.reserve(context, pages)
    }

    /// Sends the least recently used block home, whenever it came. Returns how many pages went.
    pub(crate) fn evict_block(&self, cause: Cause) -> Result<usize> {
        self.evict_one(cause, || self.vram.victim(None))
    }

    fn evict_one<'a>(
        &'a self,
        cause: Cause,
        victim: impl Fn() -> Option<Victim<'a>>,
    ) -> Result<usize> {
        let mut spared = 0;
        for _ in 0..MOST_TRIED {
            let Some(victim) = victim() else {
                break;
            };
            if spared < MOST_SPARED && self.was_used(&victim)? {
                spared += 1;
                victim.spare();
                continue;
            }
            // One that can't go just now, for whatever reason, must not keep the others.
            match self.send_home(&victim, cause) {
                Ok(moved) if moved != 0 => return Ok(moved),
                _ => victim.spare(),
            }
        }
        Ok(0)
    }

    /// Whether the GPU used the block since it was last asked.
    fn was_used(&self, victim: &Victim<'_>) -> Result<bool> {
        let mut residents = KVec::new();
        victim.residents(&mut residents)?;
        let mut batch = Batch::new()?;
        let regions = residents.chunk_by(|a, b| region(a) == region(b));
        for part in regions.take(MOST_HARVESTED) {
            let (Some(first), Some(last)) = (part.first(), part.last()) else {
                continue;
            };
            let pages = (last.address - first.address) / PAGE_SIZE + 1;
            batch.clear();
            let start = GpuVa::new(first.address as u64);
            batch.harvest_accessed(victim.context(), start, pages as u32)?;
            // A context that is closing says nothing: then its pages count as unused.
            let accessed = self.control_tolerating(&mut batch, Status::BadContext)?;
            if accessed.is_some_and(|accessed| accessed != 0) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Sends the pages of a block home. Returns how many went.
    fn send_home(&self, victim: &Victim<'_>, cause: Cause) -> Result<usize> {
        let mut residents = KVec::new();
        victim.residents(&mut residents)?;
        let mut moved = 0;
        let mm = match self.contexts.get(victim.context()) {
            Some(space) => match space.mm() {
                Ok(mm) => {
                    moved += space.bring_home(&mm, &residents, victim, cause)?;
                    Some(mm)
                }
                // A process that exits frees its own pages.
                Err(_) if matches!(cause, Cause::Evict) => return Ok(0),
                Err(_) => None,
            },
            // Nor is it known of one that has closed its address space whether it exits.
            None if matches!(cause, Cause::Evict) => return Ok(0),
            None => None,
        };
        victim.residents(&mut residents)?;
        if !residents.is_empty() {
            // Keeps exit out while the mappings of its pages are walked, and munmap from beginning: what that
            // does last, it does with this lock for reading (`docs/kernel-findings.md`, 1).
            let lock = mm.as_deref().map(|mm| match cause {
                Cause::Evict => MmapLock::read_soon(mm).ok_or(EBUSY),
                _ => Ok(MmapLock::read(mm)),
            });
            let _lock = lock.transpose()?;
            moved += self.bring_leftovers_home(victim, cause)?;
        }
        let context = Some(victim.context());
        if let Cause::Evict = cause {
            self.count(context, |c| &c.pages_evicted, moved as u64);
        }
        Ok(moved)
    }

    /// Brings the pages of a block home without knowing who maps them.
    fn bring_leftovers_home(&self, victim: &Victim<'_>, cause: Cause) -> Result<usize> {
        let map = self.pagemap()?;
        let collected = Collected::device_range(&map, victim.pages())?;
        let flight = Flight::home(self, &map, collected, |_| true, || false)?;
        let moved = flight.land()?.count();
        self.count(Some(victim.context()), |c| &c.pages_to_ram, moved as u64);
        trace::migrate(
            self.index(),
            victim.context(),
            0,
            0,
            Direction::ToSystem,
            cause,
            moved as u64,
            BLOCK_PAGES as u64,
        );
        Ok(moved)
    }

    /// Brings every page of the GPU home, or of one address space. Returns whether all came.
    pub(crate) fn bring_all_home(&self, of: Option<u32>, cause: Cause) -> bool {
        for _ in 0..LAST_ROUNDS {
            let mut left = false;
            for _ in 0..self.vram.pages() / BLOCK_PAGES {
                if self.reachable().is_err() {
                    return false;
                }
                let Some(victim) = self.vram.victim(of) else {
                    break;
                };
                // A page that is locked or referenced just now goes in the next round.
                let _ = self.send_home(&victim, cause);
                if !victim.is_empty() {
                    left = true;
                    victim.spare();
                }
            }
            if !left {
                return true;
            }
        }
        false
    }
}

impl Space {
    /// Brings pages of a block home, found at the addresses where they were put.
    fn bring_home(
        &self,
        mm: &MmWithUser,
        residents: &[Resident],
        victim: &Victim<'_>,
        cause: Cause,
    ) -> Result<usize> {
        let mut moved = 0;
        for part in residents.chunk_by(|a, b| region(a) == region(b)) {
            let (Some(first), Some(last)) = (part.first(), part.last()) else {
                continue;
            };
            let range = first.address..last.address + PAGE_SIZE;
            moved += self
                .some_to_ram(mm, range, cause, |page| victim.contains(page))?
                .pages;
        }
        Ok(moved)
    }

    /// Brings all pages of the address space home, when it closes.
    pub(super) fn bring_everything_home(&self) {
        self.gpu.bring_all_home(Some(self.context), Cause::Unbind);
    }
}

fn region(resident: &Resident) -> usize {
    resident.address / REGION_BYTES
}
