// SPDX-License-Identifier: GPL-2.0
//! From the CPU's page tables to the GPU's: snapshot, lock, recheck, write, all for one region.
//!
//! What the CPU has is asked each time and written to the GPU's tables under the update lock, if
//! nothing changed meanwhile; so there is nothing to keep in step.

use super::{
    fault::{Fault, ATTEMPTS},
    migrate::RunPages,
    mirror::Tables,
    residence::Pagemap,
    Service, Space, REGION_BYTES,
};
use crate::{
    kapi::{hmm::HmmPfn, mm::MmapLock, page_fault},
    svm::page_table::{Entries, PageSet, Supplies},
    uapi::Advice,
    vram::{VramPage, BLOCK_ORDER, BLOCK_PAGES},
};
use core::ops::Range;
use farfault_protocol::{
    address::SystemAddr,
    event::Access,
    pte::{Location, Pte},
};
use kernel::{mm::MmWithUser, page::PAGE_SHIFT, prelude::*, time::Delta};

/// Size, in pages, of the aligned group around a fault that is mapped along with it, as far as the
/// CPU has the pages already.
const MAP_AROUND: usize = BLOCK_PAGES / u64::BITS as usize;
/// How long a fault waits for the handler of a userfaultfd before others have their turn.
const HANDLER_WAIT: Delta = Delta::from_millis(10);
/// Regions that are looked at and mapped at once.
pub(super) const GROUP: usize = 8;
/// Page-table runs for tables of one region, at most.
const TABLE_RUNS: usize = 8;

/// Why an attempt to map pages failed.
pub(super) enum Obstacle {
    /// The range changed meanwhile: look again.
    Changed,
    /// A page in VRAM that is read-only there, and mm will not make it writable where it is: at home
    /// it can.
    ReadOnlyInVram,
    /// A page in RAM for an atomic access, which the GPU needs for itself ([`super::exclusive`]).
    Shared,
    /// Anything else. `EFAULT`, `EPERM` or `EINVAL`: it is not there, or not for this access.
    Error(Error),
}

impl From<Error> for Obstacle {
    fn from(error: Error) -> Self {
        if error == EBUSY {
            return Self::Changed;
        }
        Self::Error(error)
    }
}

impl Space {
    /// A snapshot without faults, to be believed by nobody who must be right.
    pub(super) fn look(
        &self,
        mm: &MmWithUser,
        map: &Pagemap,
        range: Range<usize>,
        pfns: &mut [HmmPfn],
    ) -> Result {
        pfns.iter_mut().for_each(|p| *p = HmmPfn::NONE);
        let lock = MmapLock::read(mm);
        self.mirror
            .range_fault(&lock, range, map.owner(), pfns)
            .map(|_| ())
    }

    /// Likewise; tells which of the pages with faults KSM has merged.
    pub(super) fn look_for_merged(
        &self,
        mm: &MmWithUser,
        map: &Pagemap,
        range: Range<usize>,
        pfns: &mut [HmmPfn],
        faults: &[Fault],
    ) -> Result<PageSet> {
        pfns.iter_mut().for_each(|p| *p = HmmPfn::NONE);
        let lock = MmapLock::read(mm);
        let snapshot = self.mirror.range_fault(&lock, range, map.owner(), pfns)?;
        drop(lock);
        let mut merged = PageSet::EMPTY;
        if let Some(valid) = snapshot.lock() {
            let indexes = faults.iter().map(Fault::index);
            indexes
                .filter(|&index| valid.is_merged(index))
                .for_each(|index| merged.insert(index));
        }
        Ok(merged)
    }

    /// Tables for a mapping at `address`, where some may be missing.
    pub(super) fn supplies(&self, address: usize) -> Result<Supplies> {
        let tables = self.mirror.lock();
        let table = tables.table.as_ref().ok_or(ENODEV)?;
        let (lacks, crowded) = (table.lacks_tables(address), self.gpu.is_crowded(table));
        drop(tables);
        if crowded {
            self.forget_mappings()?;
        }
        if !lacks && !crowded {
            return Ok(Supplies::NONE);
        }
        self.gpu.supplies()
    }

    /// Unmaps all and gives the tables back: the GPU faults on what it still needs.
    fn forget_mappings(&self) -> Result {
        let mut tables = self.mirror.lock();
        let tables = &mut *tables;
        let table = tables.table.as_mut().ok_or(ENODEV)?;
        tables.batch.clear();
        table.clear(&mut tables.batch)?;
        self.gpu.control(&mut tables.batch)?;
        table.forget(&self.gpu.vram);
        Ok(())
    }

    /// Maps pages of a run as far as the CPU has them, so that the GPU's next use need not fault: with
    /// `vram` those that are in VRAM, and else all, with all rights that the CPU has.
    pub(super) fn map_run(
        &self,
        service: &mut Service,
        mm: &MmWithUser,
        pages: &RunPages,
        vram: bool,
    ) {
        let mut regions = pages
            .regions()
            .filter(|(_, set)| !set.is_empty())
            .peekable();
        while let Some((first, _)) = regions.peek().copied() {
            let mut group = [(0, &PageSet::EMPTY); GROUP];
            let mut count = 0;
            while let Some(next) = regions.next_if(|(r, _)| *r < first + GROUP * REGION_BYTES) {
                group[count] = next;
                count += 1;
            }
            for _ in 0..ATTEMPTS {
                match self.try_map_group(service, mm, &group[..count], vram) {
                    Err(Obstacle::Changed) => {}
                    // Where it does not work out, the GPU faults.
                    _ => break,
                }
            }
        }
    }

    /// One attempt at up to [`GROUP`] regions that are near each other.
    fn try_map_group(
        &self,
        service: &mut Service,
        mm: &MmWithUser,
        group: &[(usize, &PageSet)],
        vram: bool,
    ) -> Result<(), Obstacle> {
        let mut supplies = [const { Supplies::NONE }; GROUP];
        let mut ready = Ok(());
        for (&(region, _), supplies) in group.iter().zip(&mut supplies) {
            ready = ready.and_then(|()| {
                *supplies = self.supplies(region)?;
                Ok::<_, Error>(())
            });
        }
        let result = ready
            .map_err(Obstacle::from)
            .and_then(|()| self.map_group(service, mm, group, vram, &mut supplies));
        for supplies in &mut supplies {
            supplies.give_back(&self.gpu.vram);
        }
        result
    }

    fn map_group(
        &self,
        service: &mut Service,
        mm: &MmWithUser,
        group: &[(usize, &PageSet)],
        vram: bool,
        supplies: &mut [Supplies],
    ) -> Result<(), Obstacle> {
        let (Some(&(first, _)), Some(&(last, _))) = (group.first(), group.last()) else {
            return Ok(());
        };
        let map = self.gpu.pagemap()?;
        service.group_pfns.fill(HmmPfn::NONE);
        let lock = MmapLock::read(mm);
        let snapshot = self.mirror.range_fault(
            &lock,
            first..last + REGION_BYTES,
            map.owner(),
            &mut service.group_pfns,
        )?;
        drop(lock);
        let mut valid = snapshot.lock().ok_or(Obstacle::Changed)?;
        for (region, set) in group {
            let at = (region - first) >> PAGE_SHIFT;
            let pfn = |index: usize| valid.pfns().get(at + index).copied();
            let in_vram = |index| {
                pfn(index)
                    .and_then(HmmPfn::pfn)
                    .and_then(|pfn| map.lookup(pfn))
            };
            let is_mapped = |&index: &usize| set.has(index) && (!vram || in_vram(index).is_some());
            let mapped = (0..BLOCK_PAGES).filter(is_mapped);
            // A huge page is dirty as a whole.
            let folios = if pfn(0).is_some_and(is_huge) {
                1
            } else {
                BLOCK_PAGES
            };
            mapped
                .take(folios)
                .for_each(|index| valid.mark_dirty(at + index));
        }
        let mut total = 0;
        let (pfns, tables) = valid.parts();
        let Tables { table, batch } = tables;
        let table = table.as_mut().ok_or(ENODEV)?;
        batch.clear();
        for (&(region, set), supplies) in group.iter().zip(supplies) {
            let at = (region - first) >> PAGE_SHIFT;
            let pfns = pfns.get(at..at + BLOCK_PAGES).ok_or(EINVAL)?;
            let mapped = table.mapped(region);
            for (index, (slot, &pfn)) in service.entries.iter_mut().zip(pfns).enumerate() {
                let wanted = set.has(index) && !mapped.has(index);
                let leaf = wanted.then(|| self.leaf(&map, pfn, !vram, false)).flatten();
                let leaf = leaf.filter(|leaf| !(vram && leaf.has(Pte::SYSTEM)));
                *slot = leaf.unwrap_or(Pte::EMPTY);
            }
            let head = pfns.first().copied().unwrap_or(HmmPfn::NONE);
            let entries = match service.entries.first() {
                Some(&leaf) if set.is_full() && leaf != Pte::EMPTY && is_huge(head) => {
                    Entries::Huge(Pte(leaf.0 | Pte::HUGE))
                }
                _ if service.entries.iter().all(|&leaf| leaf == Pte::EMPTY) => continue,
                _ => Entries::Small(&service.entries),
            };
            self.touch(&service.entries);
            total += table.map(region, entries, supplies, batch)?;
            if !batch.has_room_for(BLOCK_PAGES + TABLE_RUNS) {
                self.gpu.control(batch)?;
                batch.clear();
            }
        }
        if !batch.is_empty() {
            self.gpu.control(batch)?;
        }
        self.count(|c| &c.pages_mapped, total as u64);
        Ok(())
    }

    /// Notes that the pages in VRAM behind leaves are in use.
    fn touch(&self, leaves: &[Pte]) {
        let pages = leaves.iter().filter(|leaf| **leaf != Pte::EMPTY);
        self.gpu
            .vram
            .touch(pages.filter_map(|leaf| match leaf.location() {
                Location::Vram(address) => Some(VramPage::containing(address)),
                Location::System(_) => None,
            }));
    }

    /// Makes the CPU have pages of a region, for stores or only for loads; no others. `EFAULT`, `EPERM`:
    /// one is not mapped, or not so. `EAGAIN`: the handler of a userfaultfd has been asked for one, and
    /// takes its time, or a page of hugetlbfs is locked.
    pub(super) fn fault_in(
        &self,
        service: &mut Service,
        mm: &MmWithUser,
        region: usize,
        pages: &PageSet,
        write: bool,
    ) -> Result {
        let map = self.gpu.pagemap()?;
        let mut next = 0;
        let mut disturbed = 0;
        while let Some(first) = (next..BLOCK_PAGES).find(|&index| pages.has(index)) {
            let end = (first..BLOCK_PAGES).find(|&index| !pages.has(index));
            let end = end.unwrap_or(BLOCK_PAGES);
            // One run at a time: hmm faults in all from the first page that is missing to the end of
            // what it is asked about.
            let run = region + (first << PAGE_SHIFT)..region + (end << PAGE_SHIFT);
            let request = HmmPfn::request(true, write);
            service.pfns.fill(request);
            let lock = MmapLock::read(mm);
            let vma = lock.vma_lookup(run.start).ok_or(EFAULT)?;
            if vma.faults_by_itself() {
                // A page of hugetlbfs is as large as the region, or larger.
                next = if vma.is_hugetlb() {
                    BLOCK_PAGES
                } else {
                    first + 1
                };
                if !page_fault::fault_in(lock, run.start, write, HANDLER_WAIT)? {
                    return Err(EAGAIN);
                }
                continue;
            }
            // What is behind may be watched.
            let run = run.start..run.end.min(vma.end());
            let end = first + (run.len() >> PAGE_SHIFT);
            let owner = map.owner();
            let faulted = self
                .mirror
                .range_fault(&lock, run, owner, &mut service.pfns);
            next = match faulted {
                Err(error) if error != EBUSY => return Err(error),
                // A page that comes by a change of the tables ends the look; those before it are there.
                Err(_) => {
                    let there = service.pfns.iter().take(end - first);
                    let there = there.take_while(|&&pfn| pfn != request).count();
                    disturbed += usize::from(there == 0);
                    if disturbed >= ATTEMPTS {
                        // Whoever comes to look again sees it.
                        return Ok(());
                    }
                    first + there
                }
                Ok(_) => end,
            };
        }
        Ok(())
    }

    /// One attempt to make the CPU have the wanted pages and to map them; also what there is near
    /// them. Returns whether the replay that `through` asks for was sent along.
    pub(super) fn try_map(
        &self,
        service: &mut Service,
        mm: &MmWithUser,
        region: usize,
        wanted: &Wanted,
        through: Option<u64>,
    ) -> Result<bool, Obstacle> {
        let mut supplies = self.supplies(region)?;
        let result = self.try_map_with(service, mm, region, wanted, through, &mut supplies);
        supplies.give_back(&self.gpu.vram);
        result
    }

    fn try_map_with(
        &self,
        service: &mut Service,
        mm: &MmWithUser,
        region: usize,
        wanted: &Wanted,
        through: Option<u64>,
        supplies: &mut Supplies,
    ) -> Result<bool, Obstacle> {
        let map = self.gpu.pagemap()?;
        let exclusive = match wanted.alone {
            true => PageSet::EMPTY,
            false => self.exclusive_pages(region)?,
        };
        // What the GPU has for itself it has mapped with all rights; to look for it is to lose it.
        let access = |index| wanted.access(index).filter(|_| !exclusive.has(index));
        // From the region's begin on: hmm reports a huge page of VRAM wrongly to who starts in it.
        let count = wanted.end();
        service.pfns.fill(HmmPfn::NONE);
        let at = region + (wanted.first() << PAGE_SHIFT);
        let (advised, advice) = self.advice.lock().range_at(at);
        let lock = MmapLock::read(mm);
        // What can't move is at its place wherever it is.
        let movable = lock.vma_lookup(at).is_some_and(|vma| vma.is_anonymous());
        let snapshot = self.mirror.range_fault(
            &lock,
            region..region + (count << PAGE_SHIFT),
            map.owner(),
            &mut service.pfns,
        )?;
        drop(lock);
        let (mut reads, mut writes) = (PageSet::EMPTY, PageSet::EMPTY);
        for (index, &pfn) in snapshot.pfns().iter().enumerate() {
            match access(index) {
                Some(access) if is_missing(&map, pfn, access) => match access {
                    Access::Read => reads.insert(index),
                    Access::Write | Access::Atomic => writes.insert(index),
                },
                _ => {}
            }
        }
        if !(reads.is_empty() && writes.is_empty()) {
            self.fault_in(service, mm, region, &reads, false)?;
            self.fault_in(service, mm, region, &writes, true)?;
            return Err(Obstacle::Changed);
        }
        let mut valid = snapshot.lock().ok_or(Obstacle::Changed)?;

        let table = valid.state().table.as_ref().ok_or(ENODEV)?;
        let mapped = table.mapped(region);

        let head = valid.pfns().first().copied().unwrap_or(HmmPfn::NONE);
        let huge = is_huge(head) && !(wanted.alone && wanted.is_part());
        for (index, slot) in service.entries.iter_mut().enumerate() {
            *slot = Pte::EMPTY;
            // A huge entry stands for all.
            let (access, used) = if huge {
                (wanted.strongest(), index == 0)
            } else {
                (access(index), index < count && wanted.is_near(index))
            };
            if !used {
                continue;
            }
            let write = access.is_some_and(|a| a != Access::Read);
            let address = region + (index << PAGE_SHIFT);
            // What is mapped already may be so with more rights.
            let known = match huge {
                true => mapped.is_full(),
                false => mapped.has(index),
            };
            if known && !write {
                continue;
            }
            let near = access.is_none();
            if near && !advised.contains(&address) {
                continue;
            }
            let atomic = wanted.shared_atomics.has(index) && access == Some(Access::Atomic);
            let pfn = valid.pfns().get(index);
            let store = write || wanted.alone;
            let Some(leaf) = pfn.and_then(|&pfn| self.leaf(&map, pfn, store, atomic)) else {
                if access.is_some() {
                    return Err(EFAULT.into());
                }
                continue;
            };
            if write && !leaf.has(Pte::WRITABLE) {
                return Err(Obstacle::ReadOnlyInVram);
            }
            if access == Some(Access::Atomic) && !leaf.has(Pte::ATOMIC) {
                return Err(Obstacle::Shared);
            }
            if near && movable && !is_at_its_place(leaf, advice) {
                // Its own fault moves it.
                continue;
            }
            // The CPU's own entry may be clean, and for a page in VRAM it has nothing to say it with; the
            // GPU's store must not be forgotten.
            if leaf.has(Pte::WRITABLE) {
                valid.mark_dirty(index);
            }
            *slot = leaf;
        }
        self.touch(&service.entries);

        let tables = valid.state();
        let table = tables.table.as_mut().ok_or(ENODEV)?;
        tables.batch.clear();
        let mapped = match service.entries.first() {
            // All that was wanted is mapped already.
            _ if service.entries.iter().all(|&leaf| leaf == Pte::EMPTY) => 0,
            Some(&Pte(leaf)) if huge => {
                let leaf = Entries::Huge(Pte(leaf | Pte::HUGE));
                table.map(region, leaf, supplies, &mut tables.batch)?
            }
            _ => {
                let leaves = Entries::Small(&service.entries);
                table.map(region, leaves, supplies, &mut tables.batch)?
            }
        };
        // Before the replay: who sees the job's end sees its faults.
        self.count(|c| &c.pages_mapped, mapped as u64);
        let mut replayed = false;
        if let Some(through) = through {
            if tables.batch.has_room_for(service.failed.len()) {
                for &sequence in &service.failed {
                    tables.batch.cancel(self.context, sequence)?;
                }
                tables.batch.replay(self.context, through)?;
                self.count(|c| &c.gpu_faults_failed, service.failed.len() as u64);
                replayed = true;
            }
        }
        if !tables.batch.is_empty() {
            self.gpu.control(&mut tables.batch)?;
        }
        Ok(replayed)
    }

    /// The leaf for a page as the CPU has it; memory of others and what is not there has none. RAM is
    /// mapped for stores only where the GPU wants to store: else the page would count as dirty; and for
    /// atomics only where `atomic` says so.
    fn leaf(&self, map: &Pagemap, pfn: HmmPfn, write: bool, atomic: bool) -> Option<Pte> {
        if !pfn.is_valid() || pfn.is_error() {
            return None;
        }
        let frame = pfn.pfn()?;
        let leaf = match map.lookup(frame).map(VramPage::from) {
            Some(page) => {
                // What has failed can't go home to be copied for a writer, and has no data left that a
                // store could harm: the device answers any access with an error.
                let failed = pfn.order() == 0 && self.gpu.vram.has_failed(page);
                let flags = if pfn.is_writable() || failed {
                    Pte::WRITABLE | Pte::ATOMIC
                } else {
                    0
                };
                Pte::leaf(Location::Vram(page.address()), flags)
            }
            None => {
                let flags = match (pfn.is_writable() && write, atomic) {
                    (true, true) => Pte::WRITABLE | Pte::ATOMIC,
                    (true, false) => Pte::WRITABLE,
                    (false, _) => 0,
                };
                Pte::leaf(Location::System(SystemAddr::new(frame.phys())), flags)
            }
        };
        Some(leaf)
    }
}

/// Whether a page has to be faulted in for an access. One in VRAM that is read-only stays so.
fn is_missing(map: &Pagemap, pfn: HmmPfn, access: Access) -> bool {
    let in_vram = || pfn.pfn().is_some_and(|pfn| map.lookup(pfn).is_some());
    let there = pfn.is_valid() && !pfn.is_error();
    !there || (access != Access::Read && !pfn.is_writable() && !in_vram())
}

/// Whether an entry stands for all of its region.
fn is_huge(head: HmmPfn) -> bool {
    head.is_valid() && !head.is_error() && head.order() >= BLOCK_ORDER
}

/// Which pages of a region are to be mapped. Its groups are as many as a word has bits.
pub(super) struct Wanted {
    /// By page: raw [`Access`], the strongest, or zero.
    pages: [u8; BLOCK_PAGES],
    /// By group of [`MAP_AROUND`] pages: one of them faulted.
    pub(super) groups: u64,
    /// Nothing that is only near is mapped along.
    alone: bool,
    /// Pages in RAM that the CPU has, too, and that may be mapped for atomics.
    pub(super) shared_atomics: PageSet,
}

impl Wanted {
    const NOTHING: Self = Self {
        pages: [0; BLOCK_PAGES],
        groups: 0,
        alone: false,
        shared_atomics: PageSet::EMPTY,
    };

    /// These pages, for one kind of access, and no other.
    pub(super) fn pages(pages: Range<usize>, access: Access) -> Self {
        let mut wanted = Self::near(pages.clone());
        wanted.alone = true;
        if let Some(part) = wanted.pages.get_mut(pages) {
            part.fill(access.raw());
        }
        wanted
    }

    /// What the faults of one region want, and what is near them.
    pub(super) fn of(faults: &[Fault]) -> Self {
        let mut wanted = Self::NOTHING;
        for fault in faults {
            if let Some(page) = wanted.pages.get_mut(fault.index()) {
                *page = fault.access.raw().max(*page);
            }
            wanted.groups |= 1 << (fault.index() / MAP_AROUND);
        }
        wanted
    }

    /// What is there of some pages of a region.
    pub(super) fn near(pages: Range<usize>) -> Self {
        let mut wanted = Self::NOTHING;
        for index in pages {
            wanted.groups |= 1 << (index / MAP_AROUND);
        }
        wanted
    }

    /// The first page that matters.
    fn first(&self) -> usize {
        let first = self.pages.iter().position(|&access| access != 0);
        first.unwrap_or(self.groups.trailing_zeros() as usize % u64::BITS as usize * MAP_AROUND)
    }

    /// Pages from the region's begin to the last that matters.
    pub(super) fn end(&self) -> usize {
        (u64::BITS - self.groups.leading_zeros()) as usize * MAP_AROUND
    }

    pub(super) fn access(&self, index: usize) -> Option<Access> {
        Access::from_raw(*self.pages.get(index)?)
    }

    /// Whether some page of the region is not wanted.
    fn is_part(&self) -> bool {
        self.pages.contains(&0)
    }

    fn strongest(&self) -> Option<Access> {
        Access::from_raw(*self.pages.iter().max()?)
    }

    /// The pages that are wanted for atomics.
    pub(super) fn atomics(&self) -> PageSet {
        let mut set = PageSet::EMPTY;
        for (index, &access) in self.pages.iter().enumerate() {
            if access == Access::Atomic.raw() {
                set.insert(index);
            }
        }
        set
    }

    fn is_near(&self, index: usize) -> bool {
        if self.alone {
            return self.pages.get(index).is_some_and(|&page| page != 0);
        }
        self.groups & (1 << (index / MAP_AROUND)) != 0
    }
}

/// Whether a GPU fault would leave a page where the leaf has it.
fn is_at_its_place(leaf: Pte, advice: Advice) -> bool {
    match (advice, leaf.location()) {
        (Advice::MapOnly, _) => true,
        (Advice::PreferCpu, location) => matches!(location, Location::System(_)),
        (Advice::Default | Advice::PreferGpu, location) => matches!(location, Location::Vram(_)),
    }
}
