// SPDX-License-Identifier: GPL-2.0
//! The driver reads and writes the process's memory through the GPU: a job that copies between the
//! process's addresses and memory of the kernel, or to other addresses of the process, with the GPU's
//! faults on the way.
//!
//! The kernel's memory is mapped for the GPU beyond the addresses of processes ([`WINDOW`]). One such
//! job of an address space runs at a time; what its faults do is told beforehand ([`OnFault`]).
//!
//! Locking: `Space::access` is the outermost of an address space's locks.

use super::{fault::Fault, map::Wanted, page_table::Entries, Service, Space, REGION_BYTES};
use crate::{
    kapi::{bounce::Bounce, mm::ADDRESS_LIMIT, trace::Cause},
    uapi,
};
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
/// What is mapped or fails together, where not all of a range can be mapped.
const WINDOW_BYTES: usize = 32 * PAGE_SIZE;
/// Parts of a long job that run at the same time.
const WAVES: u32 = 2;
/// Attempts at a job that lost its window: tables may be given up while it runs.
const ATTEMPTS: usize = 8;

/// What becomes of a fault of such a job.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum OnFault {
    /// The rest of the range is mapped where it is, page by page, or all of it fails.
    MapRest,
    /// Likewise, in RAM.
    MapRestInRam,
    /// The job fails with `ENOENT`.
    Refuse,
}

/// What a job of this kind may do to a range.
#[derive(Clone)]
struct Rule {
    range: Range<usize>,
    access: Access,
    on_fault: OnFault,
}

/// The job of this kind that runs.
pub(super) struct Running {
    fence: u64,
    rules: [Option<Rule>; 2],
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
        self.copy(to, from, range, Access::Read, on_fault)
    }

    /// Copies from the window's begin to the process. Returns how often the GPU faulted.
    pub(crate) fn store(&mut self, range: Range<usize>) -> Result<u64> {
        let (to, from) = (range.start, WINDOW);
        self.copy(to, from, range, Access::Write, OnFault::MapRest)
    }

    fn copy(
        &mut self,
        to: usize,
        from: usize,
        range: Range<usize>,
        access: Access,
        on_fault: OnFault,
    ) -> Result<u64> {
        let length = range.len();
        if length > self.len() {
            return Err(EINVAL);
        }
        let rule = Rule {
            range,
            access,
            on_fault,
        };
        let space = self.space;
        let rules = [Some(rule), None];
        let again = || self.map();
        space.run_copy([to, from, length], rules, again)
    }

    fn map(&mut self) -> Result {
        let space = self.space;
        let mut frames = self.bounce.as_mut().ok_or(EIO)?.frames().peekable();
        let mut at = WINDOW;
        while frames.peek().is_some() {
            let mut service = space.service()?;
            service.entries.fill(Pte::EMPTY);
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
            at += REGION_BYTES;
        }
        Ok(())
    }
}

impl Drop for Window<'_> {
    fn drop(&mut self) {
        let end = WINDOW + self.len();
        let unmapped = self.space.unmap(WINDOW..end).is_ok() || self.space.is_closed();
        // One that is lost may only be slow.
        if !unmapped || self.space.gpu.reachable().is_err() {
            // The device may use it yet, and nobody can tell when it is done.
            core::mem::forget(self.bounce.take());
        }
    }
}

impl Space {
    /// Copies what the GPU has mapped of a range to `to`, other memory of the process, which it maps.
    /// `ENOENT`: it has not all of it mapped. `EINVAL`: it has to be done in another way.
    pub(crate) fn copy_mapped(&self, range: Range<usize>, to: usize) -> Result {
        let end = to.checked_add(range.len()).ok_or(EINVAL)?;
        let apart = end <= range.start || range.end <= to;
        // Its tables must not crowd out those of the source.
        let tables = 2 * (range.len() / REGION_BYTES + 4);
        if !apart
            || (to | range.len()) % size_of::<u64>() != 0
            || tables > self.gpu.most_tables() / 2
        {
            return Err(EINVAL);
        }
        let _access = self.access.lock();
        let rule = |range, access, on_fault| {
            Some(Rule {
                range,
                access,
                on_fault,
            })
        };
        let from = range.start;
        let length = range.len();
        let rules = [
            rule(range, Access::Read, OnFault::Refuse),
            rule(to..end, Access::Write, OnFault::MapRestInRam),
        ];
        self.run_copy([to, from, length], rules, || Ok(()))?;
        Ok(())
    }

    /// Runs one of these jobs until it has succeeded or a rule says that it cannot; `again` comes before
    /// another attempt. Returns how often the GPU faulted. The caller has `Space::access`.
    fn run_copy(
        &self,
        arguments: [usize; 3],
        rules: [Option<Rule>; 2],
        mut again: impl FnMut() -> Result,
    ) -> Result<u64> {
        let inside =
            |rule: &Rule| rule.range.start < rule.range.end && rule.range.end <= ADDRESS_LIMIT;
        if !rules.iter().flatten().all(inside) {
            return Err(EFAULT);
        }
        let [to, from, length] = arguments.map(|argument| argument as u64);
        let waves = if length > MOST_BYTES as u64 { WAVES } else { 1 };
        let mut faults = 0;
        for _ in 0..ATTEMPTS {
            if self.mm().is_err() {
                return Err(EFAULT);
            }
            let fence = self.gpu.new_fence();
            *self.running.lock() = Some(Running {
                fence,
                rules: rules.clone(),
                faults: 0,
                error: None,
            });
            let ended = self
                .launch(fence, Kernel::Copy.raw(), waves, [to, from, length, 0])
                .and_then(|()| self.jobs.wait(fence, None, || self.gpu.ping()));
            let running = self.running.lock().take();
            let (counted, error) = running.map_or((0, None), |r| (r.faults, r.error));
            faults += counted;
            let (_, outcome) = ended.inspect_err(|_| {
                // It reaches nothing of a window once that is unmapped.
                let _ = self.kill(fence);
                self.jobs.abandon(fence);
            })?;
            match outcome.status {
                uapi::JobStatus::Ok => return Ok(faults),
                uapi::JobStatus::Fault => {}
                _ => return Err(EIO),
            }
            match error {
                Some(error) => return Err(error),
                // Its window went with the tables, or a fault of somebody else's was refused.
                None => again()?,
            }
        }
        Err(EBUSY)
    }

    /// Serves the faults of the job of this kind, if one runs, and takes them from the list.
    pub(super) fn serve_accesses(
        &self,
        service: &mut Service,
        mm: &MmWithUser,
        faults: &mut KVec<Fault>,
    ) {
        let running = self.running.lock();
        let Some((fence, rules)) = running.as_ref().map(|r| (r.fence, r.rules.clone())) else {
            return;
        };
        drop(running);
        let mut served = None;
        for fault in faults.iter().filter(|fault| fault.fence == fence) {
            let rule = rules.iter().flatten();
            let rule = rule
                .filter(|rule| rule.range.start & !(PAGE_SIZE - 1) <= fault.page)
                .find(|rule| fault.page < rule.range.end);
            let result = match rule {
                None => Err(EAGAIN),
                Some(rule) => self.serve_by_rule(service, mm, fault.page, rule),
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

    fn serve_by_rule(
        &self,
        service: &mut Service,
        mm: &MmWithUser,
        page: usize,
        rule: &Rule,
    ) -> Result {
        let rest = page..rule.range.end.next_multiple_of(PAGE_SIZE);
        match rule.on_fault {
            OnFault::Refuse => return Err(ENOENT),
            OnFault::MapRest => {}
            OnFault::MapRestInRam => {
                self.to_ram(mm, rest.clone(), Cause::Request)?;
            }
        }
        self.map_rest(service, mm, rest, rule.access)
    }

    /// Maps all pages of a range where they are. Where one cannot be mapped, the windows before it are
    /// mapped all the same.
    fn map_rest(
        &self,
        service: &mut Service,
        mm: &MmWithUser,
        range: Range<usize>,
        access: Access,
    ) -> Result {
        let mut map = |part: Range<usize>| {
            let region = part.start & !(REGION_BYTES - 1);
            let pages = (part.start - region) >> PAGE_SHIFT..(part.end - region) >> PAGE_SHIFT;
            let mut wanted = Wanted::pages(pages, access);
            self.map_wanted(service, mm, region, &mut wanted, None)
        };
        let mut at = range.start;
        while at < range.end {
            let region_end = (at & !(REGION_BYTES - 1)) + REGION_BYTES;
            let end = range.end.min(region_end);
            if let Err(error) = map(at..end) {
                while at < end {
                    let done = (at - range.start) % WINDOW_BYTES;
                    let window_end = end.min(at + WINDOW_BYTES - done);
                    map(at..window_end)?;
                    at = window_end;
                }
                return Err(error);
            }
            at = end;
        }
        Ok(())
    }
}
