// SPDX-License-Identifier: GPL-2.0
//! Shared virtual memory: one GPU address space that mirrors one process.
//!
//! | file | what it does |
//! | --- | --- |
//! | `mod` | opens and closes an address space; jobs and their ends |
//! | `mirror` | the MMU notifier: what the CPU unmaps, the GPU unmaps |
//! | `page_table` | the GPU's tables, as commands |
//! | `fault` | GPU faults: from the event to the replay |
//! | `exclusive` | pages in RAM that the GPU alone may use |
//! | `access` | the driver's own reads and writes through the GPU |
//! | `map` | from the CPU's page tables to the GPU's |
//! | `migrate` | pages to VRAM and home, for one address space |
//! | `flight` | pages on their way |
//! | `residence` | what mm asks of a page in VRAM: the CPU's fault, the last reference |
//! | `evict` | room in VRAM, and everything home |
//! | `query` | where the pages are |
//! | `advice`, `jobs` | tables of what the user said and submitted |
//!
//! # Locks, in the order in which they are taken
//!
//! Outermost, the lock of a file's first call (`kapi::chardev`), under which an address space is made.
//!
//! 0. `Space::access`: one of the driver's own jobs of an address space at a time.
//! 1. `Space::service`: one fault batch, migration or query of an address space at a time. Not taken
//!    for a CPU fault or an invalidation.
//! 2. the mmap lock of a process, for reading; page locks below it belong to mm.
//! 3. the update lock of the notifier (`mirror`): the GPU's page table. Under it: no allocation that
//!    can reclaim, no wait but for the device.
//! 4. `Jobs`, `Contexts`, `Vram`, the rings: leaves. None is held while another is taken,
//!    but for `Contexts` before `Jobs` when the device is lost.
//!
//! An eviction takes the mmap lock of another process: so nobody makes room in VRAM while holding 2.

pub(crate) mod access;
pub(crate) mod advice;
pub(crate) mod evict;
pub(crate) mod exclusive;
pub(crate) mod fault;
mod flight;
pub(crate) mod jobs;
pub(crate) mod map;
pub(crate) mod migrate;
pub(crate) mod mirror;
pub(crate) mod page_table;
pub(crate) mod query;
pub(crate) mod residence;

use self::{
    access::Running,
    advice::AdviceMap,
    fault::{Fault, Pending},
    jobs::{Jobs, Outcome},
    mirror::{Mirror, Tables},
    page_table::PageTable,
};
use crate::{
    gpu::Gpu,
    kapi::{folio::PMD_SIZE, hmm::HmmPfn, mm, mmu_interval::IntervalNotifier},
    queue::Batch,
    stats::Counters,
    uapi,
    vram::BLOCK_PAGES,
};
use core::ops::Range;
use farfault_protocol::{
    command::{CommandHeader, Status},
    event::{FaultEvent, FenceEvent, JobStatus},
    pte::Pte,
    submit::{Launch, Opcode},
    U32, U64,
};
use kernel::{
    mm::{Mm, MmWithUser},
    new_mutex, new_spinlock,
    prelude::*,
    sync::{
        aref::ARef,
        atomic::{Atomic, Relaxed},
        lock::{mutex::MutexBackend, Guard},
        poll::PollCondVar,
        Arc, Mutex, SpinLock,
    },
    workqueue::{impl_has_work, new_work, Work, WorkItem},
};

/// What one level-1 entry maps, and the most that is faulted or migrated at once.
pub(crate) const REGION_BYTES: usize = PMD_SIZE;

/// Memory for one piece of work at a time, allocated when the address space is opened.
pub(crate) struct Service {
    faults: KVec<Fault>,
    /// Sequence numbers of faults to be cancelled.
    failed: KVec<u64>,
    /// A region was given up.
    stuck: bool,
    pfns: KVVec<HmmPfn>,
    /// For several regions at once.
    group_pfns: KVVec<HmmPfn>,
    entries: KVVec<Pte>,
}

impl Service {
    fn new() -> Result<Self> {
        Ok(Self {
            faults: KVec::with_capacity(fault::MAX_BATCH, GFP_KERNEL)?,
            failed: KVec::with_capacity(fault::MAX_BATCH, GFP_KERNEL)?,
            stuck: false,
            pfns: KVVec::from_elem(HmmPfn::NONE, BLOCK_PAGES, GFP_KERNEL)?,
            group_pfns: KVVec::from_elem(HmmPfn::NONE, map::GROUP * BLOCK_PAGES, GFP_KERNEL)?,
            entries: KVVec::from_elem(Pte::EMPTY, BLOCK_PAGES, GFP_KERNEL)?,
        })
    }
}

/// A GPU address space and the process that it mirrors.
#[pin_data]
pub(crate) struct Space {
    gpu: Arc<Gpu>,
    context: u32,
    /// No job of this address space has a smaller one.
    first_fence: u64,
    /// The address space ends: no more faults are served.
    closing: Atomic<bool>,
    /// It has ended on the device.
    closed: Atomic<bool>,
    /// For tests: the next allocation for a migration fails.
    fail_next: Atomic<bool>,
    pub(crate) counters: Arc<Counters>,
    #[pin]
    pub(crate) jobs: Jobs,
    #[pin]
    advice: Mutex<AdviceMap>,
    #[pin]
    pending: SpinLock<Pending>,
    #[pin]
    access: Mutex<()>,
    #[pin]
    running: Mutex<Option<Running>>,
    #[pin]
    service: Mutex<Service>,
    #[pin]
    work: Work<Space>,
    #[pin]
    mirror: IntervalNotifier<Mirror>,
}

impl_has_work! {
    impl HasWork<Self> for Space { self.work }
}

impl WorkItem for Space {
    type Pointer = Arc<Self>;

    fn run(this: Arc<Self>) {
        this.serve_faults();
    }
}

impl Space {
    /// Mirrors the address space of `opener`, and notifies `ended` when a job ends. `ENOSPC`: the device
    /// has no context left, or no VRAM for its page tables. `ESRCH`: the process has ended. `EINTR`: a signal
    /// came first. `ENODEV`: the driver is unbound. `EIO`: the device is lost.
    pub(crate) fn open(gpu: &Arc<Gpu>, opener: &Mm, ended: &Arc<PollCondVar>) -> Result<Arc<Self>> {
        let mm = opener.mmget_not_zero().ok_or(ESRCH)?;
        gpu.usable()?;
        let context = gpu.contexts.reserve()?;
        let space = Self::create(gpu, context, &mm, ended.clone());
        let space = space.inspect_err(|_| gpu.contexts.release(context))?;
        gpu.contexts.publish(context, space.clone());
        // Who unbinds the driver closes what is published: if it was too late for that, it is now.
        let entered = gpu.usable().and_then(|()| space.enter_device());
        entered.inspect_err(|_| space.close(uapi::JobStatus::DeviceLost))?;
        Ok(space)
    }

    fn create(
        gpu: &Arc<Gpu>,
        context: u32,
        mm: &MmWithUser,
        ended: Arc<PollCondVar>,
    ) -> Result<Arc<Self>> {
        let counters = Arc::new(Counters::new(), GFP_KERNEL)?;
        let tables = Tables {
            table: None,
            batch: Batch::first()?,
        };
        let mirror = Mirror::new(gpu.clone(), context, counters.clone());
        Arc::pin_init(
            try_pin_init!(Self {
                gpu: gpu.clone(),
                context,
                first_fence: gpu.new_fence(),
                closing: Atomic::new(false),
                closed: Atomic::new(false),
                fail_next: Atomic::new(false),
                counters,
                jobs <- Jobs::new(ended),
                advice <- new_mutex!(AdviceMap::new()),
                pending <- new_spinlock!(Pending::new()?),
                access <- new_mutex!(()),
                running <- new_mutex!(None),
                service <- new_mutex!(Service::new()?),
                work <- new_work!("farfault_fault"),
                // Last: callbacks come as soon as it is there.
                mirror <- IntervalNotifier::new(
                    mm,
                    0..usize::MAX,
                    Ok::<_, Error>(mirror),
                    tables,
                ),
            }? Error),
            GFP_KERNEL,
        )
    }

    /// Makes the address space known to the device, with nothing mapped: the GPU's first use of a page
    /// faults. `ENODEV`: it ends. `EIO`: the device is lost.
    pub(crate) fn enter_device(&self) -> Result {
        let _service = self.service()?;
        let root = self.gpu.take_table()?;
        self.pending.lock().clear();
        let mut tables = self.mirror.lock();
        let Tables { table, batch } = &mut *tables;
        if table.is_some() {
            // It is there already.
            self.gpu.vram.give_back(root, 0);
            return Ok(());
        }
        batch.clear();
        let new = PageTable::new(self.context, root, batch)
            .inspect_err(|_| self.gpu.vram.give_back(root, 0))?;
        let named = self.gpu.name_bus_master_word(batch);
        let created = named.and_then(|()| batch.create_context(self.context, new.root()));
        match created.and_then(|()| self.gpu.control(batch)) {
            Ok(_) => *table = Some(new),
            Err(error) => {
                new.end(&self.gpu.vram);
                return Err(error);
            }
        }
        Ok(())
    }

    /// The number of the address space on the device.
    pub(crate) fn context(&self) -> u32 {
        self.context
    }

    /// The process's address space, if it still has users.
    fn mm(&self) -> Result<ARef<MmWithUser>> {
        self.mirror.mm().mmget_not_zero().ok_or(ESRCH)
    }

    /// Whether the caller is a thread of the mirrored process.
    pub(crate) fn is_current(&self) -> bool {
        mm::is_current_mm(self.mirror.mm())
    }

    /// The service lock. `ENODEV`: the address space ends.
    fn service(&self) -> Result<Guard<'_, Service, MutexBackend>> {
        let service = self.service.lock();
        // It is set before `close` takes the lock.
        if self.is_closing() {
            return Err(ENODEV);
        }
        Ok(service)
    }

    fn is_closing(&self) -> bool {
        self.closing.load(Relaxed)
    }

    /// Whether the GPU was taken from the address space.
    pub(crate) fn is_closed(&self) -> bool {
        self.closed.load(Relaxed)
    }

    /// Counts for the address space and for the GPU.
    fn count(&self, counter: impl Fn(&Counters) -> &Atomic<u64>, n: u64) {
        counter(&self.counters).fetch_add(n, Relaxed);
        counter(&self.gpu.counters).fetch_add(n, Relaxed);
    }

    /// Says where the pages of a range should be. What the GPU has mapped of it is unmapped, so that
    /// its next use asks. `ENOSPC`: too many ranges.
    pub(crate) fn advise(&self, range: Range<usize>, advice: uapi::Advice) -> Result {
        // No batch of faults that has read the advice before is under way then.
        let _service = self.service()?;
        self.advice.lock().set(range.clone(), advice)?;
        let mut tables = self.mirror.lock();
        self.mirror.unmap(&mut tables, range).map(|_| ())
    }

    /// Starts a job and returns its fence.
    pub(crate) fn submit(&self, kernel: u32, waves: u32, arguments: [u64; 4]) -> Result<u64> {
        let fence = self.gpu.new_fence();
        self.launch(fence, kernel, waves, arguments)?;
        Ok(fence)
    }

    fn launch(&self, fence: u64, kernel: u32, waves: u32, arguments: [u64; 4]) -> Result {
        self.jobs.begin(fence).map_err(|error| match error {
            // Closed: which of both is the GPU's to say.
            ENODEV => self.gpu.usable().err().unwrap_or(ENODEV),
            error => error,
        })?;
        let launch = Launch {
            header: CommandHeader::new(Opcode::Launch.raw(), size_of::<Launch>() as u32),
            context: self.context.into(),
            kernel: kernel.into(),
            fence: fence.into(),
            waves: waves.into(),
            reserved: U32::ZERO,
            arguments: arguments.map(U64::new),
        };
        let launched = self.gpu.launch(&launch);
        if let Err(error) = launched {
            self.jobs.abandon(fence);
            if error == ENODEV && !self.is_closing() {
                // It was reset behind our back: a machine that was paused does that.
                self.gpu.lose("the device does not know a context", EIO);
                return Err(EIO);
            }
        }
        launched
    }

    /// Ends a job. `ENOENT`: there is no such job.
    pub(crate) fn kill(&self, fence: u64) -> Result {
        if !self.jobs.is_running(fence)? {
            return Ok(());
        }
        // Without the lock the context could leave the device first, which the device would complain of.
        let mut tables = self.mirror.lock();
        let Tables { table, batch } = &mut *tables;
        if table.is_none() {
            return Ok(());
        }
        batch.clear();
        batch.kill_job(self.context, fence)?;
        // The job may have ended by itself in the meantime: both are fine.
        self.gpu
            .control_tolerating(batch, Status::NoSuchJob)
            .map(|_| ())
    }

    /// The device is lost, and the jobs with it.
    pub(crate) fn lose_jobs(&self) {
        let count = || self.count(|c| &c.jobs, 1);
        self.jobs.close(uapi::JobStatus::DeviceLost, count);
    }

    /// The device reports the end of a job.
    pub(crate) fn fence_event(&self, event: &FenceEvent) {
        let status = match JobStatus::from_raw(event.status.get()) {
            Some(JobStatus::Ok) => uapi::JobStatus::Ok,
            Some(JobStatus::Fault) => uapi::JobStatus::Fault,
            Some(JobStatus::Killed) => uapi::JobStatus::Killed,
            Some(JobStatus::MemoryError) => uapi::JobStatus::MemoryError,
            Some(JobStatus::BusError) | None => uapi::JobStatus::BusError,
        };
        let outcome = Outcome {
            status,
            access: event.access.into(),
            result: event.result.get(),
            fault_address: event.page.get(),
        };
        let count = || self.count(|c| &c.jobs, 1);
        self.jobs.end(event.fence.get(), outcome, count);
    }

    /// The device reports a fault. The caller enqueues the address space when it has passed all on.
    pub(crate) fn fault_event(&self, event: &FaultEvent) {
        // Of a job of who had the context's number before: it has gone, and its faults with it.
        if event.fence.get() >= self.first_fence {
            self.pending.lock().push(event);
        }
    }

    /// The device lost reports: all waves that wait without one must fault again.
    pub(crate) fn overflow_event(&self) {
        self.pending.lock().replay();
    }

    /// Ends the address space: its jobs fail with `status`, the GPU forgets it, its pages come home.
    /// What was open goes on without the GPU. May be called again, by others, too: for whoever returns, the
    /// device has forgotten it.
    pub(crate) fn close(&self, status: uapi::JobStatus) {
        let others = self.closing.xchg(true, Relaxed);
        // Behind the service lock no batch of faults is under way, and none begins.
        let service = self.service.lock();
        let table = self.leave_device();
        // Only now: who is told that a job ended may use its memory again.
        self.jobs.close(status, || self.count(|c| &c.jobs, 1));
        self.closed.store(true, Relaxed);
        if let Some(table) = table {
            table.end(&self.gpu.vram);
        }
        drop(service);
        if !others {
            self.bring_everything_home();
            self.gpu.contexts.release(self.context);
        }
    }

    /// Takes the address space from the device. Its tables are to be given back.
    fn leave_device(&self) -> Option<PageTable> {
        // Together: an invalidation must find the context and its tables, or neither.
        let mut tables = self.mirror.lock();
        let table = tables.table.take()?;
        self.gpu.destroy_context(self.context, &mut tables.batch);
        Some(table)
    }

    /// Before the machine sleeps: as [`Space::close`], but for [`Space::enter_device`].
    pub(crate) fn suspend(&self) {
        let _service = self.service.lock();
        let table = self.leave_device();
        let count = || self.count(|c| &c.jobs, 1);
        self.jobs.end_all(uapi::JobStatus::Killed, count);
        if let Some(table) = table {
            table.end(&self.gpu.vram);
        }
    }
}
