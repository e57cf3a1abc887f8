// SPDX-License-Identifier: GPL-2.0
//! The driver reads and writes the process's memory through the GPU: a job that copies between the
//! process's addresses and memory of the kernel, with the GPU's faults on the way.
//!
//! The kernel's memory is mapped for the GPU beyond the addresses of processes ([`WINDOW`]). One such
//! job of an address space runs at a time; what its faults do is told beforehand ([`OnFault`]).
//!
//! Locking: `Space::access` is the outermost of an address space's locks.

use super::{
    fault::{Fault, ADDRESS_LIMIT},
    map::Wanted,
    page_table::Entries,
    Service, Space, REGION_BYTES,
};
use crate::{kapi::bounce::Bounce, uapi};
use core::ops::Range;
use farfault_protocol::{
    address::SystemAddr,
    event::Access,
    pte::{Location, Pte},
    submit::Kernel,
};
use kernel::{
    mm::MmWithUser,
    page::{PAGE_SHIFT, PAGE_SIZE},
    prelude::*,
    sync::lock::{mutex::MutexBackend, Guard},
};

/// Where the kernel's memory is in the GPU's address space.
const WINDOW: usize = ADDRESS_LIMIT;
/// Most bytes of one job: its pages' tables are few, and so are those of the window.
pub(crate) const MOST_BYTES: usize = 4 << 20;
/// Attempts at a job that lost its window: tables may be given up while it runs.
const ATTEMPTS: usize = 8;

/// What becomes of a fault of such a job.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum OnFault {
    /// The rest of the range is mapped where it is, page by page, or all of it fails.
    MapRest,
    /// The job fails with `ENOENT`.
    Refuse,
}

/// The job of this kind that runs.
pub(super) struct Running {
    fence: u64,
    range: Range<usize>,
    access: Access,
    on_fault: OnFault,
    faults: u64,
    error: Option<Error>,
}

/// Memory of the kernel that the GPU can reach, for one address space at a time.
pub(crate) struct Window<'a> {
    space: &'a Space,
    bounce: Option<Bounce>,
    _access: Guard<'a, (), MutexBackend>,
}

impl<'a> Window<'a> {
    /// Up to `bytes` bytes, at most [`MOST_BYTES`].
    pub(crate) fn new(space: &'a Space, bytes: usize) -> Result<Self> {
        let access = space.access.lock();
        let mut window = Self {
            space,
            bounce: Some(Bounce::new(bytes.min(MOST_BYTES))?),
            _access: access,
        };
        window.map()?;
        Ok(window)
    }

    /// How much fits in.
    pub(crate) fn len(&self) -> usize {
        self.bytes().len()
    }

    /// What it holds.
    pub(crate) fn bytes(&self) -> &[u8] {
        self.bounce.as_ref().map_or(&[], Bounce::bytes)
    }

    /// What it holds, to be changed.
    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        self.bounce.as_mut().map_or(&mut [], Bounce::bytes_mut)
    }

    /// Copies from the process to the window's begin. Returns how often the GPU faulted.
    pub(crate) fn load(&mut self, range: Range<usize>, on_fault: OnFault) -> Result<u64> {
        let (to, from) = (WINDOW, range.start);
        self.copy([to as u64, from as u64], range, Access::Read, on_fault)
    }

    /// Copies from the window's begin to the process. Returns how often the GPU faulted.
    pub(crate) fn store(&mut self, range: Range<usize>) -> Result<u64> {
        let (to, from) = (range.start, WINDOW);
        self.copy(
            [to as u64, from as u64],
            range,
            Access::Write,
            OnFault::MapRest,
        )
    }

    fn map(&mut self) -> Result {
        let space = self.space;
        let mut frames = self.bounce.as_mut().ok_or(EIO)?.frames().peekable();
        let mut at = WINDOW;
        while frames.peek().is_some() {
            let mut service = space.service()?;
            for (slot, frame) in service.entries.iter_mut().zip(frames.by_ref()) {
                let place = Location::System(SystemAddr::new(frame.phys()));
                *slot = Pte::leaf(place, Pte::WRITABLE);
            }
            let mut supplies = space.supplies(at)?;
            let mut tables = space.mirror.lock();
            let tables = &mut *tables;
            tables.batch.clear();
            let entries = Entries::Small(&service.entries);
            let mapped = match &mut tables.table {
                Some(table) => table.map(at, entries, &mut supplies, &mut tables.batch),
                None => Err(ENODEV),
            };
            let sent = mapped.and_then(|_| space.gpu.control(&mut tables.batch));
            supplies.give_back(&space.gpu.vram);
            sent?;
            service.entries.fill(Pte::EMPTY);
            at += REGION_BYTES;
        }
        Ok(())
    }

    fn copy(
        &mut self,
        [to, from]: [u64; 2],
        range: Range<usize>,
        access: Access,
        on_fault: OnFault,
    ) -> Result<u64> {
        if range.end > ADDRESS_LIMIT || range.start >= range.end {
            return Err(EFAULT);
        }
        if range.len() > self.len() {
            return Err(EINVAL);
        }
        let space = self.space;
        let mut faults = 0;
        for _ in 0..ATTEMPTS {
            if space.mm().is_err() {
                return Err(EFAULT);
            }
            let fence = space.gpu.new_fence();
            *space.running.lock() = Some(Running {
                fence,
                range: range.clone(),
                access,
                on_fault,
                faults: 0,
                error: None,
            });
            let arguments = [to, from, range.len() as u64, 0];
            let ended = space
                .launch(fence, Kernel::Copy.raw(), 1, arguments)
                .and_then(|()| space.jobs.wait(fence, None, || space.gpu.ping()));
            let running = space.running.lock().take();
            let (counted, error) = running.map_or((0, None), |r| (r.faults, r.error));
            faults += counted;
            let (_, outcome) = ended.inspect_err(|_| {
                // It reaches nothing of the window once that is unmapped.
                let _ = space.kill(fence);
                space.jobs.abandon(fence);
            })?;
            match outcome.status {
                uapi::JobStatus::Ok => return Ok(faults),
                uapi::JobStatus::Fault => {}
                _ => return Err(EIO),
            }
            match error {
                Some(error) => return Err(error),
                // Its window went with the tables, or a fault of somebody else's was refused.
                None => self.map()?,
            }
        }
        Err(EBUSY)
    }
}

impl Drop for Window<'_> {
    fn drop(&mut self) {
        let end = WINDOW + self.len();
        if self.space.unmap(WINDOW..end).is_err() && !self.space.is_closed() {
            // The device may use it yet, and nobody can tell when it is done.
            core::mem::forget(self.bounce.take());
        }
    }
}

impl Space {
    /// Serves the faults of the job of this kind, if one runs, and takes them from the list.
    pub(super) fn serve_accesses(
        &self,
        service: &mut Service,
        mm: &MmWithUser,
        faults: &mut KVec<Fault>,
    ) {
        let Some((fence, range, access, on_fault)) = self
            .running
            .lock()
            .as_ref()
            .map(|r| (r.fence, r.range.clone(), r.access, r.on_fault))
        else {
            return;
        };
        let mut served = None;
        for fault in faults.iter().filter(|fault| fault.fence == fence) {
            let result = match on_fault {
                _ if !range.contains(&fault.page) => Err(EAGAIN),
                OnFault::Refuse => Err(ENOENT),
                OnFault::MapRest => self.map_rest(service, mm, fault.page..range.end, access),
            };
            if result.is_err() {
                let _ = service.failed.push_within_capacity(fault.sequence);
            }
            served = Some(result);
        }
        faults.retain(|fault| fault.fence != fence);
        let (Some(result), Some(running)) = (served, &mut *self.running.lock()) else {
            return;
        };
        running.faults += 1;
        running.error = result.err().filter(|&error| error != EAGAIN);
    }

    /// Maps all pages of a range where they are.
    fn map_rest(
        &self,
        service: &mut Service,
        mm: &MmWithUser,
        range: Range<usize>,
        access: Access,
    ) -> Result {
        let mut at = range.start;
        while at < range.end {
            let region = at & !(REGION_BYTES - 1);
            let end = range.end.min(region + REGION_BYTES);
            let pages = (at - region) >> PAGE_SHIFT..(end - region).div_ceil(PAGE_SIZE);
            let mut wanted = Wanted::pages(pages, access);
            self.map_wanted(service, mm, region, &mut wanted, None)?;
            at = end;
        }
        Ok(())
    }
}
