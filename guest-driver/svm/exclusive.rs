// SPDX-License-Identifier: GPL-2.0
//! Pages in RAM that the GPU alone may use for a while: what its atomics on RAM need (hardware
//! manual, section 7.3). A CPU that touches such a page gets it back, by way of the notifier.

use super::{
    fault::ATTEMPTS,
    page_table::{Entries, PageSet},
    Service, Space, REGION_BYTES,
};
use crate::{
    kapi::{mm::MmapLock, signal::fatal_signal_pending},
    vram::BLOCK_PAGES,
};
use core::ops::Range;
use farfault_protocol::{
    address::SystemAddr,
    pte::{Location, Pte},
};
use kernel::{mm::MmWithUser, page::PAGE_SHIFT, prelude::*};

impl Space {
    /// Takes the pages of a range from the CPU, on request; those in VRAM come home first.
    ///
    /// `EFAULT`: not mapped, or not for stores. `EOPNOTSUPP`: not anonymous. `EBUSY`: it kept
    /// changing, or the handler of a userfaultfd does not answer. Otherwise what is before the page that
    /// failed is the GPU's.
    pub(crate) fn make_exclusive(&self, range: Range<usize>) -> Result {
        let mm = self.mm()?;
        let mut at = range.start;
        while at < range.end {
            let region = at & !(REGION_BYTES - 1);
            let end = range.end.min(region + REGION_BYTES);
            let mut pages = PageSet::EMPTY;
            pages.insert_all((at - region) >> PAGE_SHIFT..(end - region) >> PAGE_SHIFT);
            let mut service = self.service()?;
            self.take_from_cpu(&mut service, &mm, region, &pages)?;
            drop(service);
            at = end;
            if fatal_signal_pending() {
                return Err(EINTR);
            }
        }
        Ok(())
    }

    /// The pages of a region that mm cannot take from the CPU: of shared memory, and of hugetlbfs.
    pub(super) fn shared_pages(&self, mm: &MmWithUser, region: usize) -> PageSet {
        let mut shared = PageSet::EMPTY;
        let lock = MmapLock::read(mm);
        let (mut at, end) = (region, region + REGION_BYTES);
        while let Some(vma) = lock.find_vma(at).filter(|vma| vma.start() < end) {
            at = vma.end();
            if vma.is_shared() || vma.is_hugetlb() {
                let part = vma.start().max(region)..at.min(end);
                shared.insert_all(
                    (part.start - region) >> PAGE_SHIFT..(part.end - region) >> PAGE_SHIFT,
                );
            }
        }
        shared
    }

    /// Whether the GPU has any page of a range for itself.
    pub(crate) fn has_exclusive(&self, range: Range<usize>) -> Result<bool> {
        let first = range.start & !(REGION_BYTES - 1);
        for region in (first..range.end).step_by(REGION_BYTES) {
            let pages = self.exclusive_pages(region)?;
            let part = range.start.max(region)..range.end.min(region + REGION_BYTES);
            let indexes = (part.start - region) >> PAGE_SHIFT..(part.end - region) >> PAGE_SHIFT;
            if !pages.within(indexes).is_empty() {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Gives the pages of a run that the GPU has for itself back to the CPU, as far as that works out.
    pub(super) fn give_back(&self, service: &mut Service, mm: &MmWithUser, run: Range<usize>) {
        for region in (run.start & !(REGION_BYTES - 1)..run.end).step_by(REGION_BYTES) {
            let pages = match self.exclusive_pages(region) {
                Ok(pages) if !pages.is_empty() => pages,
                _ => continue,
            };
            let inside = run.start.max(region)..run.end.min(region + REGION_BYTES);
            let indexes =
                (inside.start - region) >> PAGE_SHIFT..(inside.end - region) >> PAGE_SHIFT;
            // To look for such a page is to give it back.
            let _ = self.fault_in(service, mm, region, &pages.within(indexes), false);
        }
    }

    /// Unmaps what the GPU has of a range, for itself or not.
    pub(crate) fn unmap(&self, range: Range<usize>) -> Result {
        let mut tables = self.mirror.lock();
        self.mirror.unmap(&mut tables, range).map(|_| ())
    }

    /// The pages of a region that the GPU has for itself.
    pub(super) fn exclusive_pages(&self, region: usize) -> Result<PageSet> {
        let tables = self.mirror.lock();
        Ok(tables.table.as_ref().ok_or(ENODEV)?.exclusive(region))
    }

    /// Takes pages of a region from the CPU and maps them for atomics. Errors as for
    /// [`Space::make_exclusive`]; pages in VRAM come home.
    pub(super) fn take_from_cpu(
        &self,
        service: &mut Service,
        mm: &MmWithUser,
        region: usize,
        pages: &PageSet,
    ) -> Result {
        let range = region..region + REGION_BYTES;
        let (mut end, mut stopped) = (BLOCK_PAGES, None);
        for attempt in 0..ATTEMPTS {
            let had = self.exclusive_pages(region)?;
            let wanted = |index| index < end && pages.has(index) && !had.has(index);
            if !(0..BLOCK_PAGES).any(wanted) {
                return stopped.map_or(Ok(()), Err);
            }
            if attempt != 0 || is_watched(mm, range.clone()) {
                // The pages were not there, or not for stores, and the taking saw to that, which is a
                // change. Now it finds them so. For the handler of a userfaultfd it would not wait.
                let mut missing = PageSet::EMPTY;
                let indexes = (0..BLOCK_PAGES).filter(|&index| wanted(index));
                indexes.for_each(|index| missing.insert(index));
                let faulted = self.fault_in(service, mm, region, &missing, true);
                if faulted.is_err_and(|error| error == EAGAIN) {
                    continue;
                }
            }
            let mut supplies = self.supplies(region)?;
            let lock = MmapLock::read(mm);
            let taken = self
                .mirror
                .make_exclusive(&lock, range.clone(), wanted, &mut service.pfns)
                .inspect_err(|_| supplies.give_back(&self.gpu.vram))?;
            drop(lock);
            if let Some(error) = taken.stopped {
                // Up to here, whatever happens to what is behind.
                let taken = taken.snapshot.pfns().iter().enumerate();
                let mut refused = taken.filter(|(index, pfn)| wanted(*index) && !pfn.is_valid());
                end = refused.next().map_or(end, |(index, _)| index);
                stopped = Some(error);
            }
            let Some(mut valid) = taken.snapshot.lock() else {
                supplies.give_back(&self.gpu.vram);
                continue;
            };
            for (index, slot) in service.entries.iter_mut().enumerate() {
                let frame = valid.pfns().get(index).and_then(|pfn| pfn.pfn());
                *slot = frame.map_or(Pte::EMPTY, |frame| {
                    // mm takes the page for clean.
                    valid.mark_dirty(index);
                    let place = Location::System(SystemAddr::new(frame.phys()));
                    Pte::leaf(place, Pte::WRITABLE | Pte::ATOMIC)
                });
            }
            let tables = valid.state();
            tables.batch.clear();
            let entries = Entries::Exclusive(&service.entries);
            let mapped = match &mut tables.table {
                Some(table) => table.map(region, entries, &mut supplies, &mut tables.batch),
                None => Err(ENODEV),
            };
            let sent = mapped.and_then(|mapped| {
                // Nothing, where not even the first page could be taken.
                if !tables.batch.is_empty() {
                    self.gpu.control(&mut tables.batch)?;
                }
                self.count(|c| &c.pages_mapped, mapped as u64);
                Ok(())
            });
            drop(valid);
            supplies.give_back(&self.gpu.vram);
            sent?;
            return stopped.map_or(Ok(()), Err);
        }
        Err(EBUSY)
    }
}

/// Whether a userfaultfd watches any of a range.
fn is_watched(mm: &MmWithUser, range: Range<usize>) -> bool {
    let lock = MmapLock::read(mm);
    let mut at = range.start;
    while let Some(vma) = lock.find_vma(at).filter(|vma| vma.start() < range.end) {
        if vma.has_userfaultfd() {
            return true;
        }
        at = vma.end();
    }
    false
}
