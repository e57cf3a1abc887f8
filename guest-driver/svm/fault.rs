// SPDX-License-Identifier: GPL-2.0
//! GPU faults: from the event to the replay (hardware manual, chapter 8).
//!
//! Faults of one address space are served by one worker, in batches: sorted by page, region by
//! region, with one control request for a region's entries. The replay goes with the last of them,
//! so that one fault costs one request. A fault that cannot be resolved ends its job alone.
//!
//! A region that keeps changing while it is looked at is given up after some attempts and replayed
//! all the same, after a pause: its waves fault again and queue behind everybody else. So no fault
//! starves another, and the worker never spins. Likewise a page for which the handler of a userfaultfd
//! is asked: it is waited for a short while, and then again after the others.

use super::{
    map::{Obstacle, Wanted},
    page_table::PageSet,
    residence::Pagemap,
    Service, Space, REGION_BYTES,
};
use crate::{
    gpu::unless_gone,
    kapi::{exclusive::is_not_anonymous, hmm::HmmPfn, mm::ADDRESS_LIMIT, trace},
    sort::sort_by_key,
    uapi::Advice,
    vram::BLOCK_ORDER,
};
use farfault_protocol::event::{Access, FaultEvent};
use kernel::{
    mm::MmWithUser,
    page::{PAGE_SHIFT, PAGE_SIZE},
    prelude::*,
    time::{delay::fsleep, Delta},
};

/// Faults that are served at once; more wait for the replay that ends the batch, and come again.
pub(super) const MAX_BATCH: usize = 512;
/// Attempts at one region before its faults queue again.
pub(super) const ATTEMPTS: usize = 16;
/// Pause after a batch in which a region was given up: its waves fault again at once.
const STUCK_PAUSE: Delta = Delta::from_millis(1);

/// A fault as the device reported it.
#[derive(Clone, Copy)]
pub(super) struct Fault {
    pub(super) page: usize,
    pub(super) access: Access,
    pub(super) sequence: u64,
    /// The job that faulted first.
    pub(super) fence: u64,
}

impl Fault {
    /// Begin of its region.
    fn region(&self) -> usize {
        self.page & !(REGION_BYTES - 1)
    }

    /// Index of its page in the region.
    pub(super) fn index(&self) -> usize {
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
                fence: event.fence.get(),
            });
        }
    }

    /// Asks for a replay although no fault was reported.
    pub(super) fn replay(&mut self) {
        self.replay = true;
    }

    /// Forgets all: the context has gone from the device, and its faults with it.
    pub(super) fn clear(&mut self) {
        self.faults.clear();
        self.through = 0;
        self.replay = false;
    }

    /// Swaps the faults with an empty list; returns through which sequence number they go.
    fn take(&mut self, into: &mut KVec<Fault>) -> Option<u64> {
        into.clear();
        core::mem::swap(&mut self.faults, into);
        core::mem::take(&mut self.replay).then_some(self.through)
    }
}

/// Whether nobody can resolve it: the address is not mapped, or not for this access.
fn is_refusal(error: Error) -> bool {
    [EFAULT, EPERM, EINVAL].contains(&error)
}

impl Space {
    /// The worker: serves batches of faults until there are none.
    pub(super) fn serve_faults(&self) {
        loop {
            // For one batch at a time: migrations and queries get their turn between.
            let Ok(mut service) = self.service() else {
                return;
            };
            // While the machine sleeps there is nobody to answer.
            if self.mirror.lock().table.is_none() {
                return;
            }
            let through = self.pending.lock().take(&mut service.faults);
            let Some(through) = through else { return };
            let served = self.serve_batch(&mut service, through);
            let stuck = core::mem::take(&mut service.stuck);
            drop(service);
            match served.or_else(unless_gone) {
                Ok(()) if stuck => fsleep(STUCK_PAUSE),
                Ok(()) => {}
                // Only the device's own failures come so far; they were reported there.
                Err(error) => return self.gpu.lose("faults could not be answered", error),
            }
        }
    }

    fn serve_batch(&self, service: &mut Service, through: u64) -> Result {
        service.failed.clear();
        let faults = core::mem::take(&mut service.faults);
        // Before the replay: who sees the job's end sees its faults.
        self.count(|c| &c.gpu_faults, faults.len() as u64);
        let (faults, replayed) = self.serve_sorted(service, faults, through);
        service.faults = faults;
        if replayed {
            return Ok(());
        }
        self.count(|c| &c.gpu_faults_failed, service.failed.len() as u64);
        let mut tables = self.mirror.lock();
        let tables = &mut *tables;
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
        self.serve_accesses(service, &mm, &mut faults);
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
        let Some(region) = faults.first().map(Fault::region) else {
            return false;
        };
        let mut wanted = Wanted::of(faults);
        wanted.groups |= self.place(service, mm, faults);
        match self.map_wanted(service, mm, region, &mut wanted, through) {
            Ok(replayed) => {
                self.trace_fault(faults, 0);
                replayed
            }
            // One of them is to blame, or has to wait: each by itself.
            Err(error) if is_refusal(error) || error == EAGAIN => {
                for fault in faults {
                    let one = core::slice::from_ref(fault);
                    let mut wanted = Wanted::of(one);
                    match self.map_wanted(service, mm, region, &mut wanted, None) {
                        Err(error) if is_refusal(error) => {
                            let _ = service.failed.push_within_capacity(fault.sequence);
                            self.trace_fault(one, error.to_errno());
                        }
                        Err(error) => {
                            service.stuck = true;
                            self.trace_fault(one, error.to_errno());
                        }
                        Ok(_) => self.trace_fault(one, 0),
                    }
                }
                false
            }
            // It changed too often, or memory is short: the waves shall fault again.
            Err(error) => {
                service.stuck = true;
                self.trace_fault(faults, error.to_errno());
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
        let look = |service: &mut Service| {
            self.look_for_merged(mm, &map, region..end, &mut service.pfns, faults)
        };
        let mut merged = look(service);
        if merged.is_ok() && self.break_sharing(service, mm, &map, faults) {
            merged = look(service);
        }
        let known = merged.is_ok();
        let merged = merged.unwrap_or(PageSet::EMPTY);
        let mut done = region;
        let mut moved = 0;
        for fault in faults {
            // Only an attempt to move a merged page would unmap it for all that share it.
            if fault.page < done || merged.has(fault.index()) {
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
                Advice::Default => {
                    let end = fault.page + run_length(faults, fault.page);
                    fault.page..end.min(advised.end)
                }
                Advice::PreferGpu => {
                    advised.start.max(region)..advised.end.min(region + REGION_BYTES)
                }
                Advice::PreferCpu => fault.page..fault.page + PAGE_SIZE,
                Advice::MapOnly => continue,
            };
            let end = around.end;
            let pages = (around.start - region) >> PAGE_SHIFT..(around.end - region) >> PAGE_SHIFT;
            let cause = trace::Cause::GpuFault;
            let result = match (advice, in_vram) {
                (Advice::PreferCpu, true) => {
                    let home = self.to_ram(mm, around, cause);
                    home.map(|home| home.pages != 0)
                }
                (Advice::PreferCpu, false) | (_, true) => continue,
                (_, false) => self.fault_to_vram(mm, around),
            };
            // The next ones have had their try with this one.
            done = end;
            // What does not move is mapped where it is: there is nothing to report.
            if result.is_ok_and(|any| any) {
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
        let mut pages = PageSet::EMPTY;
        for (index, pfn) in service.pfns.iter().enumerate() {
            if is_shared(index, *pfn) {
                pages.insert(index);
            }
        }
        if huge_in_vram {
            // mm does not copy part of a huge page of VRAM where it is.
            let all = region..region + REGION_BYTES;
            let _ = self.to_ram(mm, all, trace::Cause::GpuFault);
        }
        // Where it fails, the attempt to map fails, and says why.
        let _ = self.fault_in(service, mm, region, &pages, true);
        true
    }

    /// Makes the CPU have the wanted pages of a region, and maps them on the GPU, in a bounded number
    /// of attempts. Returns whether the replay that `through` asks for was sent along.
    ///
    /// `EBUSY`: the region kept changing. `EFAULT`, `EPERM`, `EINVAL`: a page is not there, or not
    /// for this access. `EAGAIN`: as for [`Space::fault_in`].
    pub(super) fn map_wanted(
        &self,
        service: &mut Service,
        mm: &MmWithUser,
        region: usize,
        wanted: &mut Wanted,
        through: Option<u64>,
    ) -> Result<bool> {
        for _ in 0..ATTEMPTS {
            match self.try_map(service, mm, region, wanted, through) {
                Ok(replayed) => return Ok(replayed),
                Err(Obstacle::Changed) => {}
                Err(Obstacle::ReadOnlyInVram) => {
                    let all = region..region + REGION_BYTES;
                    let cause = trace::Cause::GpuFault;
                    self.to_ram(mm, all, cause)?;
                }
                Err(Obstacle::Shared) => {
                    // Shared memory and hugetlbfs: mm has no way to keep the CPU from them. The GPU's
                    // atomics are atomic towards the CPU's (hardware manual, section 7.3).
                    wanted.shared_atomics = self.shared_pages(mm, region);
                    let alone = wanted.atomics().without(&wanted.shared_atomics);
                    let taken = self.take_from_cpu(service, mm, region, &alone);
                    if taken.err().is_some_and(is_not_anonymous) {
                        wanted.shared_atomics = PageSet::FULL;
                    } else {
                        taken?;
                    }
                }
                Err(Obstacle::Error(error)) => return Err(error),
            }
        }
        Err(EBUSY)
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
