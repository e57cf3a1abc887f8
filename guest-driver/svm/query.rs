// SPDX-License-Identifier: GPL-2.0
//! Where the pages are: the CPU's page tables and the GPU's own, side by side.
//!
//! Both are read under the update lock with the sequence checked, so that they are of one moment.

use super::{Service, Space, REGION_BYTES};
use crate::{
    kapi::{hmm::HmmPfn, mm::MmapLock},
    uapi,
    vram::{VramPage, BLOCK_ORDER},
};
use core::ops::Range;
use farfault_protocol::{
    address::GpuVa,
    pte::{Location, Pte},
};
use kernel::{mm::MmWithUser, page::PAGE_SHIFT, prelude::*};

/// Attempts at a range that keeps changing.
const ATTEMPTS: usize = 100;

/// A page of which nothing is known.
pub(crate) const UNKNOWN: uapi::Page = uapi::Page {
    cpu_place: uapi::Place::None.raw() as u8,
    cpu_flags: 0,
    gpu_place: uapi::Place::None.raw() as u8,
    gpu_flags: 0,
    advice: 0,
    reserved: [0; 3],
    cpu_vram: 0,
    gpu_vram: 0,
};

impl Space {
    /// Tells about the pages of a range, inside one region. `EFAULT`: part of it is not mapped.
    pub(crate) fn query(&self, range: Range<usize>, pages: &mut [uapi::Page]) -> Result {
        let mm = self.mm()?;
        let mut service = self.service()?;
        self.observe(&mut service, &mm, range.clone(), pages)?;
        let advice = self.advice.lock();
        for (i, page) in pages.iter_mut().enumerate() {
            page.advice = advice.at(range.start + (i << PAGE_SHIFT)).raw() as u8;
        }
        Ok(())
    }

    /// What the CPU's page tables have of a range, inside one region, at one moment; page by page,
    /// with whether it is in the GPU's VRAM. Addresses where nothing is mapped have an error entry.
    pub(crate) fn snapshot(
        &self,
        range: Range<usize>,
        mut each: impl FnMut(HmmPfn, bool),
    ) -> Result {
        let mm = self.mm()?;
        let map = self.gpu.pagemap()?;
        let mut service = self.service()?;
        let first = first_index(range.start);
        let span = region(range.start)..range.end;
        for _ in 0..ATTEMPTS {
            service.pfns.iter_mut().for_each(|p| *p = HmmPfn::NONE);
            let lock = MmapLock::read(&mm);
            let snapshot =
                self.mirror
                    .range_fault(&lock, span.clone(), map.owner(), &mut service.pfns);
            drop(lock);
            let snapshot = match snapshot {
                Err(e) if e == EBUSY => continue,
                snapshot => snapshot?,
            };
            let Some(valid) = snapshot.lock() else {
                continue;
            };
            let pages = valid.pfns().iter().skip(first);
            for &pfn in pages.take(range.len() >> PAGE_SHIFT) {
                each(pfn, pfn.pfn().is_some_and(|pfn| map.lookup(pfn).is_some()));
            }
            return Ok(());
        }
        Err(EBUSY)
    }

    /// Whether the GPU has all pages of a range mapped.
    pub(crate) fn is_mapped(&self, range: Range<usize>) -> Result<bool> {
        let tables = self.mirror.lock();
        let table = tables.table.as_ref().ok_or(ENODEV)?;
        for region in (region(range.start)..range.end).step_by(REGION_BYTES) {
            let mapped = table.mapped(region);
            let part = range.start.max(region)..range.end.min(region + REGION_BYTES);
            let mut indexes = first_index(part.start)..(part.end - region) >> PAGE_SHIFT;
            if !indexes.all(|index| mapped.has(index)) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// How many pages of a range the CPU's page tables have in VRAM.
    pub(super) fn count_in_vram(
        &self,
        service: &mut Service,
        mm: &MmWithUser,
        range: Range<usize>,
    ) -> Result<usize> {
        let map = self.gpu.pagemap()?;
        let mut count = 0;
        for region in (region(range.start)..range.end).step_by(REGION_BYTES) {
            let part = range.start.max(region)..range.end.min(region + REGION_BYTES);
            let mut looks = 0;
            while let Err(error) = self.look(mm, &map, region..part.end, &mut service.pfns) {
                looks += 1;
                if error != EBUSY || looks == ATTEMPTS {
                    return Err(error);
                }
            }
            let pages = service.pfns.iter().skip(first_index(part.start));
            count += pages
                .take(part.len() >> PAGE_SHIFT)
                .filter(|p| p.is_valid() && !p.is_error())
                .filter(|p| p.pfn().is_some_and(|pfn| map.lookup(pfn).is_some()))
                .count();
        }
        Ok(count)
    }

    fn observe(
        &self,
        service: &mut Service,
        mm: &MmWithUser,
        range: Range<usize>,
        pages: &mut [uapi::Page],
    ) -> Result {
        let map = self.gpu.pagemap()?;
        let first = first_index(range.start);
        for _ in 0..ATTEMPTS {
            let lock = MmapLock::read(mm);
            let mut at = range.start;
            while at < range.end {
                at = lock.vma_lookup(at).ok_or(EFAULT)?.end();
            }
            service.pfns.iter_mut().for_each(|p| *p = HmmPfn::NONE);
            let snapshot = self.mirror.range_fault(
                &lock,
                region(range.start)..range.end,
                map.owner(),
                &mut service.pfns,
            );
            drop(lock);
            let snapshot = match snapshot {
                Err(e) if e == EBUSY => continue,
                snapshot => snapshot?,
            };
            let Some(mut valid) = snapshot.lock() else {
                continue;
            };
            for (i, page) in pages.iter_mut().enumerate() {
                *page = UNKNOWN;
                let Some(&pfn) = valid.pfns().get(first + i) else {
                    continue;
                };
                let vram = pfn.pfn().and_then(|pfn| map.lookup(pfn));
                set_cpu(page, pfn, vram.map(VramPage::from));
            }
            let tables = valid.state();
            if tables.table.is_none() {
                return Err(ENODEV);
            }
            tables.batch.clear();
            let start = GpuVa::new(range.start as u64);
            tables
                .batch
                .read_ptes(self.context, start, pages.len() as u32)?;
            self.gpu.control(&mut tables.batch)?;
            for (page, pte) in pages.iter_mut().zip(tables.batch.ptes()) {
                set_gpu(page, pte);
            }
            return Ok(());
        }
        Err(EBUSY)
    }
}

fn region(address: usize) -> usize {
    address & !(REGION_BYTES - 1)
}

fn first_index(address: usize) -> usize {
    (address - region(address)) >> PAGE_SHIFT
}

fn set_cpu(page: &mut uapi::Page, pfn: HmmPfn, vram: Option<VramPage>) {
    if !pfn.is_valid() || pfn.is_error() {
        return;
    }
    page.cpu_place = uapi::Place::Ram.raw() as u8;
    if let Some(vram) = vram {
        page.cpu_place = uapi::Place::Vram.raw() as u8;
        page.cpu_vram = vram.address().get();
    }
    let flags = [
        (pfn.is_writable(), uapi::PAGE_WRITE),
        (pfn.order() >= BLOCK_ORDER, uapi::PAGE_HUGE),
    ];
    page.cpu_flags = set_of(&flags);
}

fn set_gpu(page: &mut uapi::Page, pte: Pte) {
    if !pte.has(Pte::VALID) {
        return;
    }
    page.gpu_place = uapi::Place::Ram.raw() as u8;
    if page.cpu_place == uapi::Place::None.raw() as u8 {
        // The GPU has it for itself: in RAM, where the CPU would fault.
        page.cpu_place = uapi::Place::Ram.raw() as u8;
    }
    if let Location::Vram(address) = pte.location() {
        page.gpu_place = uapi::Place::Vram.raw() as u8;
        page.gpu_vram = address.get();
    }
    let flags = [
        (pte.has(Pte::WRITABLE), uapi::PAGE_WRITE),
        (pte.has(Pte::HUGE), uapi::PAGE_HUGE),
        (pte.has(Pte::ATOMIC), uapi::PAGE_ATOMIC),
        (pte.has(Pte::ACCESSED), uapi::PAGE_ACCESSED),
        (pte.has(Pte::DIRTY), uapi::PAGE_DIRTY),
    ];
    page.gpu_flags = set_of(&flags);
}

fn set_of(flags: &[(bool, u8)]) -> u8 {
    let set = flags.iter().filter(|(set, _)| *set);
    set.fold(0, |all, (_, flag)| all | flag)
}
