// SPDX-License-Identifier: GPL-2.0
//! GPU faults: from the event to the replay (hardware manual, chapter 8).
//!
//! Faults of one address space are served by one worker, in batches: sorted by page, region by
//! region, with one control request for a region's entries. The replay goes with the last of them,
//! so that one fault costs one request. A fault that cannot be resolved ends its job alone.
//!
//! A region that keeps changing while it is looked at is given up after some attempts and replayed
//! all the same: its waves fault again and queue behind everybody else. So no fault starves
//! another, and the worker never spins.

use super::{residence::Pagemap, Service, Space, REGION_BYTES};
use crate::{
    kapi::{hmm::HmmPfn, mm::MmapLock, trace},
    sort::sort_by_key,
    svm::page_table::{Entries, Supplies},
    uapi::Advice,
    vram::{VramPage, BLOCK_ORDER, BLOCK_PAGES},
};
use core::ops::Range;
use farfault_protocol::{
    address::SystemAddr,
    event::{Access, FaultEvent},
    pte::{Location, Pte},
};
use kernel::{
    mm::MmWithUser,
    page::{PAGE_SHIFT, PAGE_SIZE},
    prelude::*,
};

/// Faults that are served at once; more wait for the replay that ends the batch, and come again.
pub(super) const MAX_BATCH: usize = 512;
/// Attempts at one region before its faults queue again.
const ATTEMPTS: usize = 16;
/// No process has memory from here on.
const ADDRESS_LIMIT: usize = 1 << 47;
/// Size, in pages, of the aligned group around a fault that is mapped along with it, as far as the
/// CPU has the pages already.
const MAP_AROUND: usize = BLOCK_PAGES / u64::BITS as usize;

/// A fault as the device reported it.
#[derive(Clone, Copy)]
pub(super) struct Fault {
    page: usize,
    access: Access,
    sequence: u64,
}

impl Fault {
    /// Begin of its region.
    fn region(&self) -> usize {
        self.page & !(REGION_BYTES - 1)
    }

    /// Index of its page in the region.
    fn index(&self) -> usize {
        (self.page - self.region()) >> PAGE_SHIFT
    }
}

/// Faults that wait for the worker.
pub(super) struct Pending {
    faults: KVec<Fault>,
    /// Highest sequence number seen, also of faults for which there was no room.
    through: u64,
    replay: bool,
}

impl Pending {
    pub(super) fn new() -> Result<Self> {
        Ok(Self {
            faults: KVec::with_capacity(MAX_BATCH, GFP_KERNEL)?,
            through: 0,
            replay: false,
        })
    }

    pub(super) fn push(&mut self, event: &FaultEvent) {
        self.replay = true;
        self.through = self.through.max(event.sequence.get());
        if let Some(access) = Access::from_raw(event.access) {
            // Without room it is not served, but replayed: the wave faults again.
            let _ = self.faults.push_within_capacity(Fault {
                page: event.page.get() as usize & !(PAGE_SIZE - 1),
                access,
                sequence: event.sequence.get(),
            });
        }
    }

    /// Asks for a replay although no fault was reported.
    pub(super) fn replay(&mut self) {
        self.replay = true;
    }

    /// Swaps the faults with an empty list; returns through which sequence number they go.
    fn take(&mut self, into: &mut KVec<Fault>) -> Option<u64> {
        into.clear();
        core::mem::swap(&mut self.faults, into);
        core::mem::take(&mut self.replay).then_some(self.through)
    }
}

/// Why pages of a region could not be mapped.
enum Failure {
    /// Nobody can resolve it: the address is not mapped, or not for this access.
    NoAccess,
    /// It changed too often, or memory is short: the waves shall fault again.
    Again,
}

impl Space {
    /// The worker: serves batches of faults until there are none.
    pub(super) fn serve_faults(&self) {
        let mut service = self.service.lock();
        loop {
            let through = self.pending.lock().take(&mut service.faults);
            let Some(through) = through else { return };
            if self.is_closing() {
                return;
            }
            if let Err(error) = self.serve_batch(&mut service, through) {
                // Only the device's own failures come so far; they were reported there.
                self.gpu.lose("faults could not be answered", error);
                return;
            }
        }
    }

    fn serve_batch(&self, service: &mut Service, through: u64) -> Result {
        service.failed.clear();
        let faults = core::mem::take(&mut service.faults);
        let result = self.serve_sorted(service, faults, through);
        let (faults, replayed) = result;
        self.count(|c| &c.gpu_faults, faults.len() as u64);
        self.count(|c| &c.gpu_faults_failed, service.failed.len() as u64);
        service.faults = faults;
        if replayed {
            return Ok(());
        }
        let mut tables = self.mirror.lock();
        let tables = &mut *tables;
        if tables.table.is_none() {
            return Ok(());
        }
        tables.batch.clear();
        for &sequence in &service.failed {
            tables.batch.cancel(self.context, sequence)?;
        }
        tables.batch.replay(self.context, through)?;
        self.gpu.control(&mut tables.batch).map(|_| ())
    }

    /// Serves faults region by region. Gives the list back, and whether the replay was sent.
    fn serve_sorted(
        &self,
        service: &mut Service,
        mut faults: KVec<Fault>,
        through: u64,
    ) -> (KVec<Fault>, bool) {
        let Ok(mm) = self.mm() else {
            // The process is gone, and with it all that its jobs could work on.
            for fault in &faults {
                let _ = service.failed.push_within_capacity(fault.sequence);
            }
            return (faults, false);
        };
        sort_by_key(&mut faults, |fault| fault.page);
        let (mapped, beyond) = faults.split_at(faults.partition_point(|f| f.page < ADDRESS_LIMIT));
        for fault in beyond {
            let _ = service.failed.push_within_capacity(fault.sequence);
        }
        let regions = mapped.chunk_by(|a, b| a.region() == b.region());
        let mut replayed = false;
        let last_region = mapped.last().map(Fault::region);
        for region in regions {
            let is_last = region.last().map(Fault::region) == last_region;
            replayed = self.serve_region(service, &mm, region, is_last.then_some(through));
        }
        (faults, replayed)
    }

    /// Serves the faults of one region. Returns whether it sent the replay that `through` asks for.
    fn serve_region(
        &self,
        service: &mut Service,
        mm: &MmWithUser,
        faults: &[Fault],
        through: Option<u64>,
    ) -> bool {
        let moved = self.place(service, mm, faults);
        match self.map_faults(service, mm, faults, moved, through) {
            Ok(replayed) => {
                self.trace_fault(faults, 0);
                replayed
            }
            Err(Failure::Again) => {
                self.trace_fault(faults, EBUSY.to_errno());
                false
            }
            // One of them is to blame: each by itself.
            Err(Failure::NoAccess) => {
                for fault in faults {
                    let one = core::slice::from_ref(fault);
                    let result = self.map_faults(service, mm, one, 0, None);
                    if let Err(Failure::NoAccess) = result {
                        let _ = service.failed.push_within_capacity(fault.sequence);
                        self.trace_fault(one, EFAULT.to_errno());
                    } else {
                        self.trace_fault(one, 0);
                    }
                }
                false
            }
        }
    }

    fn trace_fault(&self, faults: &[Fault], result: i32) {
        let Some(first) = faults.first() else { return };
        trace::fault(
            self.gpu.index(),
            self.context,
            first.page as u64,
            first.access.raw().into(),
            result,
            faults.len() as u64,
        );
    }

    /// Moves pages to where the advice wants them before they are mapped, as far as they can move.
    /// Returns the groups of pages that moved.
    fn place(&self, service: &mut Service, mm: &MmWithUser, faults: &[Fault]) -> u64 {
        let (Some(first), Some(last)) = (faults.first(), faults.last()) else {
            return 0;
        };
        let region = first.region();
        let end = last.page + PAGE_SIZE;
        let Ok(map) = self.gpu.pagemap() else {
            return 0;
        };
        // What is where now; a hint that may be out of date when it is used.
        let mut known = self.look(mm, &map, region..end, &mut service.pfns).is_ok();
        if known && self.break_sharing(service, mm, &map, faults) {
            known = self.look(mm, &map, region..end, &mut service.pfns).is_ok();
        }
        let mut done = region;
        let mut moved = 0;
        for fault in faults {
            if fault.page < done {
                continue;
            }
            let entry = service.pfns.get(fault.index()).copied();
            let entry = entry.filter(|e| known && e.is_valid() && !e.is_error());
            let in_vram = entry
                .and_then(HmmPfn::pfn)
                .is_some_and(|pfn| map.lookup(pfn).is_some());
            let (advised, advice) = self.advice.lock().range_at(fault.page);
            let huge = entry.is_some_and(|e| e.order() >= BLOCK_ORDER);
            let around = match advice {
                Advice::Default | Advice::PreferCpu if huge => region..region + REGION_BYTES,
                Advice::Default => fault.page..fault.page + run_length(faults, fault.page),
                Advice::PreferGpu => {
                    advised.start.max(region)..advised.end.min(region + REGION_BYTES)
                }
                Advice::PreferCpu => fault.page..fault.page + PAGE_SIZE,
                Advice::MapOnly => continue,
            };
            done = around.end;
            let pages = (around.start - region) >> PAGE_SHIFT..(around.end - region) >> PAGE_SHIFT;
            let cause = trace::Cause::GpuFault;
            let result = match (advice, in_vram) {
                (Advice::PreferCpu, true) => self.to_ram(&mut service.migration, mm, around, cause),
                (Advice::PreferCpu, false) | (_, true) => continue,
                (_, false) => self.to_vram(&mut service.migration, mm, around, cause),
            };
            // What does not move is mapped where it is: there is nothing to report.
            if result.is_ok_and(|count| count != 0) {
                moved |= Wanted::near(pages).groups;
            }
        }
        moved
    }

    /// Makes pages that the GPU wants to write writable for the CPU, where they are not. Moved as they
    /// are, a page shared with a child would come home again to be copied. Returns whether there were
    /// any.
    fn break_sharing(
        &self,
        service: &mut Service,
        mm: &MmWithUser,
        map: &Pagemap,
        faults: &[Fault],
    ) -> bool {
        let wanted = Wanted::of(faults);
        let is_shared = |index: usize, pfn: HmmPfn| {
            let write = wanted.access(index).is_some_and(|a| a != Access::Read);
            write && pfn.is_valid() && !pfn.is_error() && !pfn.is_writable()
        };
        let shared = |(index, pfn): (usize, &HmmPfn)| is_shared(index, *pfn);
        let (Some(first), true) = (faults.first(), service.pfns.iter().enumerate().any(shared))
        else {
            return false;
        };
        let region = first.region();
        let huge_in_vram = service.pfns.first().is_some_and(|head| {
            let in_vram = head.pfn().is_some_and(|pfn| map.lookup(pfn).is_some());
            in_vram && head.order() >= BLOCK_ORDER
        });
        for (index, pfn) in service.pfns.iter_mut().enumerate() {
            let shared = is_shared(index, *pfn);
            *pfn = HmmPfn::request(shared, shared);
        }
        if huge_in_vram {
            // mm does not copy part of a huge page of VRAM where it is.
            let all = region..region + REGION_BYTES;
            let _ = self.to_ram(&mut service.migration, mm, all, trace::Cause::GpuFault);
        }
        let lock = MmapLock::read(mm);
        let range = region..region + (wanted.end() << PAGE_SHIFT);
        // Where it fails, the attempt to map fails, and says why.
        let _ = self
            .mirror
            .range_fault(&lock, range, map.owner(), &mut service.pfns);
        true
    }

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

    /// Makes the CPU have the pages, and maps them on the GPU; also what there is of the groups
    /// `around`. Returns whether the replay that
    /// `through` asks for was sent along.
    fn map_faults(
        &self,
        service: &mut Service,
        mm: &MmWithUser,
        faults: &[Fault],
        around: u64,
        through: Option<u64>,
    ) -> Result<bool, Failure> {
        let Some(first) = faults.first() else {
            return Ok(false);
        };
        let region = first.region();
        let mut wanted = Wanted::of(faults);
        wanted.groups |= around;
        for _ in 0..ATTEMPTS {
            match self.try_map(service, mm, region, &wanted, through) {
                Err(e) if e == EBUSY => continue,
                // A page in VRAM that is read-only there, and mm will not make it writable where it
                // is: at home it can.
                Err(e) if e == EXDEV => {
                    let all = region..region + REGION_BYTES;
                    let cause = trace::Cause::GpuFault;
                    if self.to_ram(&mut service.migration, mm, all, cause).is_err() {
                        return Err(Failure::Again);
                    }
                }
                Err(e) if e == EFAULT || e == EPERM || e == EINVAL => {
                    return Err(Failure::NoAccess)
                }
                Err(_) => return Err(Failure::Again),
                Ok(replayed) => return Ok(replayed),
            }
        }
        Err(Failure::Again)
    }

    /// Tables for a mapping at `address`, where some may be missing.
    fn supplies(&self, address: usize) -> Result<Supplies> {
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

    /// Maps what is there of a range, inside one region, so that the GPU's next use need not fault.
    pub(super) fn map_ahead(&self, service: &mut Service, mm: &MmWithUser, range: Range<usize>) {
        let region = range.start & !(REGION_BYTES - 1);
        let pages = (range.start - region) >> PAGE_SHIFT..(range.end - region) >> PAGE_SHIFT;
        // Where it does not work out, the GPU faults.
        let _ = self.try_map(service, mm, region, &Wanted::near(pages), None);
    }

    /// One attempt. `EBUSY`: the range changed meanwhile. `EXDEV`: see `map_faults`.
    fn try_map(
        &self,
        service: &mut Service,
        mm: &MmWithUser,
        region: usize,
        wanted: &Wanted,
        through: Option<u64>,
    ) -> Result<bool> {
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
    ) -> Result<bool> {
        let map = self.gpu.pagemap()?;
        // From the region's begin on: hmm reports a huge page of VRAM wrongly to who starts in it.
        let count = wanted.end();
        for (index, pfn) in service.pfns.iter_mut().enumerate() {
            *pfn = match wanted.access(index) {
                None => HmmPfn::NONE,
                Some(access) => HmmPfn::request(true, access != Access::Read),
            };
        }
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
        let mut valid = snapshot.lock().ok_or(EBUSY)?;

        let head = valid.pfns().first().copied().unwrap_or(HmmPfn::NONE);
        let huge = head.is_valid() && !head.is_error() && head.order() >= BLOCK_ORDER;
        for (index, slot) in service.entries.iter_mut().enumerate() {
            *slot = Pte::EMPTY;
            // A huge entry stands for all.
            let (access, used) = if huge {
                (wanted.strongest(), index == 0)
            } else {
                (wanted.access(index), index < count && wanted.is_near(index))
            };
            if !used {
                continue;
            }
            let write = access.is_some_and(|a| a != Access::Read);
            let address = region + (index << PAGE_SHIFT);
            if access.is_none() && !advised.contains(&address) {
                continue;
            }
            let Some(leaf) = valid.pfns().get(index).and_then(|&p| leaf(&map, p, write)) else {
                if access.is_some() {
                    return Err(EFAULT);
                }
                continue;
            };
            if write && !leaf.has(Pte::WRITABLE) {
                return Err(EXDEV);
            }
            if access.is_none() && movable && !is_at_its_place(leaf, advice) {
                // Its own fault moves it.
                continue;
            }
            match leaf.location() {
                // The CPU's own entry may be clean; the GPU's store must not be forgotten.
                Location::System(_) if leaf.has(Pte::WRITABLE) => valid.mark_dirty(index),
                Location::System(_) => {}
                Location::Vram(address) => self.gpu.vram.touch(VramPage::containing(address)),
            }
            *slot = leaf;
        }

        let tables = valid.state();
        let table = tables.table.as_mut().ok_or(ENODEV)?;
        tables.batch.clear();
        let entries = match service.entries.first() {
            Some(&Pte(leaf)) if huge => Entries::Huge(Pte(leaf | Pte::HUGE)),
            _ => Entries::Small(&service.entries),
        };
        let mapped = table.map(region, entries, supplies, &mut tables.batch)?;
        let mut replayed = false;
        if let Some(through) = through {
            if tables.batch.has_room_for(service.failed.len()) {
                for &sequence in &service.failed {
                    tables.batch.cancel(self.context, sequence)?;
                }
                tables.batch.replay(self.context, through)?;
                replayed = true;
            }
        }
        self.gpu.control(&mut tables.batch)?;
        self.count(|c| &c.pages_mapped, mapped as u64);
        Ok(replayed)
    }
}

/// The leaf for a page as the CPU has it; memory of others and what is not there has none. RAM is
/// mapped for stores only where the GPU wants to store: else the page would count as dirty.
fn leaf(map: &Pagemap, pfn: HmmPfn, write: bool) -> Option<Pte> {
    if !pfn.is_valid() || pfn.is_error() {
        return None;
    }
    let frame = pfn.pfn()?;
    let (location, writable) = match map.lookup(frame) {
        Some(page) => {
            let page = VramPage::from(page);
            (Location::Vram(page.address()), pfn.is_writable())
        }
        None => {
            let address = SystemAddr::new(frame.phys());
            (Location::System(address), pfn.is_writable() && write)
        }
    };
    let flags = if writable {
        Pte::WRITABLE | Pte::ATOMIC
    } else {
        0
    };
    Some(Pte::leaf(location, flags))
}

/// Which pages of a region are to be mapped. Its groups are as many as a word has bits.
struct Wanted {
    /// By page: raw [`Access`], the strongest, or zero.
    pages: [u8; BLOCK_PAGES],
    /// By group of [`MAP_AROUND`] pages: one of them faulted.
    groups: u64,
}

impl Wanted {
    const NOTHING: Self = Self {
        pages: [0; BLOCK_PAGES],
        groups: 0,
    };

    /// What the faults of one region want, and what is near them.
    fn of(faults: &[Fault]) -> Self {
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
    fn near(pages: Range<usize>) -> Self {
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
    fn end(&self) -> usize {
        (u64::BITS - self.groups.leading_zeros()) as usize * MAP_AROUND
    }

    fn access(&self, index: usize) -> Option<Access> {
        Access::from_raw(*self.pages.get(index)?)
    }

    fn strongest(&self) -> Option<Access> {
        Access::from_raw(*self.pages.iter().max()?)
    }

    fn is_near(&self, index: usize) -> bool {
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

/// Bytes from `page` on that fault without a gap.
fn run_length(faults: &[Fault], page: usize) -> usize {
    let from = faults.partition_point(|f| f.page < page);
    let mut end = page;
    for fault in faults.iter().skip(from) {
        if fault.page > end {
            break;
        }
        end = fault.page + PAGE_SIZE;
    }
    end - page
}
