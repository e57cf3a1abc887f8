// SPDX-License-Identifier: GPL-2.0
//! One GPU: its facts, its queues, its VRAM, and the address spaces on it.
//!
//! A GPU is in use from probe on. It leaves that state once: it is *gone* when the driver is unbound
//! (users get `ENODEV`), or *lost* when it stops answering (users get `EIO`); in both all that waits
//! is told. What is open keeps its memory, and nothing else.
//!
//! Locking: `pagemap` is a leaf, held for a look-up only.

use crate::{
    contexts::Contexts,
    kapi::{
        module,
        pagemap::DevicePagemap,
        shared_word::SharedWord,
        trace::Cause,
        virtio::Device,
        virtqueue::{QueueHandler, Queues},
        workqueue::WorkQueue,
    },
    queue::{
        batch, copy,
        event::{Event, Events},
        Batch, Channel, CopyList, CopyMemory,
    },
    stats::Counters,
    svm::{
        page_table::{PageTable, Supplies},
        residence::{Pagemap, Residence},
        Space,
    },
    uapi,
    vram::{Vram, VramPage, BLOCK_PAGES},
};
use farfault_protocol::{
    address::{SystemAddr, VramAddr, HUGE_PAGE_SIZE},
    command::Status,
    config::{self, ConfigSpace, Features},
    control::Reply,
    event::{ErrorCode, ErrorEvent},
    submit::Launch,
};
use kernel::{
    device,
    device::Bound,
    new_poll_condvar, new_spinlock,
    page::PAGE_SHIFT,
    prelude::*,
    sync::{
        aref::ARef,
        atomic::{Atomic, Full, Relaxed},
        poll::PollCondVar,
        Arc, SpinLock,
    },
    time::{delay::fsleep, Delta},
    workqueue::{impl_has_work, new_work, Work, WorkItem},
};

/// Queues of the device.
pub(crate) const QUEUES: usize = config::queue::COUNT as usize;
/// Most contexts that this driver keeps; the device may offer more.
pub(crate) const MOST_CONTEXTS: u32 = 64;
/// One page of this many may hold tables of one address space.
const TABLE_SHARE: usize = 2 * MOST_CONTEXTS as usize;
/// Least tables that an address space may have whatever the size of VRAM.
const LEAST_TABLES: usize = 16;
/// Most regions of 2 MiB that are known of one address space: 64 GiB.
const MOST_REGIONS: usize = 32 << 10;
/// Looks for pages that are on their way home when the driver is unbound, and the pause between. Those that
/// have failed are not waited for.
const UNBIND_LOOKS: usize = 3000;
const UNBIND_PAUSE: Delta = Delta::from_millis(10);

/// Facts from the configuration space, checked.
pub(crate) struct Limits {
    pub(crate) vram_pages: usize,
    pub(crate) serial: u64,
    pub(crate) max_waves: u32,
    pub(crate) max_copy_run: u32,
    max_contexts: u32,
}

impl Limits {
    /// `ENODEV`: not a GPU that this driver knows; says why.
    fn check(device: &device::Device, config: &ConfigSpace) -> Result<Self> {
        if config.magic != config::MAGIC {
            // Some other device with this number: no reason to complain.
            return Err(ENODEV);
        }
        let (major, minor) = (config.version_major.get(), config.version_minor.get());
        if major != config::VERSION_MAJOR {
            dev_err!(
                device,
                "the device speaks protocol {major}.{minor}, this driver {}.x: update the older\n",
                config::VERSION_MAJOR
            );
            return Err(ENODEV);
        }
        let needed = Features::HUGE_PAGES | Features::ACCESSED_DIRTY | Features::ATOMICS;
        let vram = config.vram_size.get();
        let usable = config.features().has(needed)
            && vram != 0
            && vram % HUGE_PAGE_SIZE == 0
            && vram >> PAGE_SHIFT <= u64::from(u32::MAX)
            && config.max_request.get() as usize >= batch::REQUEST_BYTES.max(copy::REQUEST_BYTES)
            && u64::from(config.max_copy_run.get()) >= HUGE_PAGE_SIZE
            && config.max_contexts.get() > 0;
        if !usable {
            dev_err!(
                device,
                "the device's limits are too small for this driver: {config:?}\n"
            );
            return Err(ENODEV);
        }
        Ok(Self {
            vram_pages: (vram >> PAGE_SHIFT) as usize,
            serial: config.serial.get(),
            max_waves: config.max_waves.get(),
            max_copy_run: config.max_copy_run.get(),
            max_contexts: config.max_contexts.get().min(MOST_CONTEXTS),
        })
    }
}

/// What is left of an error where a driver that is being unbound is none.
pub(crate) fn unless_gone(error: Error) -> Result {
    if error == ENODEV {
        return Ok(());
    }
    Err(error)
}

/// A GPU.
#[pin_data]
pub(crate) struct Gpu {
    device: ARef<device::Device>,
    index: u32,
    pub(crate) limits: Limits,
    /// The driver is unbound, or about to be.
    gone: Atomic<bool>,
    /// The device does not answer.
    lost: Atomic<bool>,
    /// Notified of both.
    #[pin]
    unusable: PollCondVar,
    /// Not zero until then, if the device looks at it: its engines access RAM no longer.
    bus_master: Option<SharedWord>,
    pub(crate) counters: Counters,
    /// Names the next job, of any address space: an event that comes late means no other.
    next_fence: Atomic<u64>,
    #[pin]
    control: Channel,
    #[pin]
    submit: Channel,
    #[pin]
    copy_memory: CopyMemory,
    #[pin]
    events: Events,
    #[pin]
    pub(crate) vram: Vram,
    #[pin]
    pub(crate) contexts: Contexts,
    #[pin]
    pagemap: SpinLock<Option<Arc<Pagemap>>>,
    workers: WorkQueue,
    #[pin]
    drain: Work<Gpu>,
}

impl_has_work! {
    impl HasWork<Self> for Gpu { self.drain }
}

impl WorkItem for Gpu {
    type Pointer = Arc<Self>;

    fn run(this: Arc<Self>) {
        this.drain_events();
    }
}

/// What the interrupt of a queue does.
pub(crate) struct Interrupts {
    gpu: Arc<Gpu>,
}

impl QueueHandler for Interrupts {
    fn notify(&self, queue: usize) {
        match queue as u16 {
            config::queue::CONTROL => self.gpu.control.interrupt(),
            config::queue::SUBMIT => self.gpu.submit.interrupt(),
            _ => {
                // If it is queued already, it will see this event too.
                let _ = self.gpu.workers.enqueue(self.gpu.clone());
            }
        }
    }

    fn closed(&self) {
        self.gpu.end();
    }
}

impl Gpu {
    /// The GPU behind a device that is being probed. It does nothing yet.
    pub(crate) fn new(device: &Device<Bound>) -> Result<Arc<Self>> {
        let config: ConfigSpace = device.read_config()?;
        let limits = Limits::check(device.as_ref(), &config)?;
        let vram_pages = limits.vram_pages;
        let contexts = limits.max_contexts;
        let looks = config.features().has(Features::BUS_MASTER_WORD);
        let bus_master = looks.then(|| SharedWord::new(1)).transpose()?;
        Arc::pin_init(
            try_pin_init!(Self {
                index: device.index(),
                device: device.device(),
                limits,
                gone: Atomic::new(false),
                lost: Atomic::new(false),
                unusable <- new_poll_condvar!(),
                bus_master,
                counters: Counters::new(),
                next_fence: Atomic::new(1),
                control <- Channel::new(),
                submit <- Channel::new(),
                copy_memory <- CopyMemory::new(),
                events <- Events::new(),
                vram <- Vram::new(vram_pages),
                contexts <- Contexts::new(contexts),
                pagemap <- new_spinlock!(None),
                workers: WorkQueue::new(c"farfault")?,
                drain <- new_work!("farfault_events"),
            }? Error),
            GFP_KERNEL,
        )
    }

    /// The handler of the queues' interrupts.
    pub(crate) fn interrupts(self: &Arc<Self>) -> Interrupts {
        Interrupts { gpu: self.clone() }
    }

    /// Takes the queues into use and makes VRAM known to mm.
    pub(crate) fn start(self: &Arc<Self>, queues: &Queues<'_, Interrupts, QUEUES>) -> Result {
        let buffers = self.open(queues)?;
        let residence = Ok::<_, Error>(Residence::new(self.clone()));
        let map = DevicePagemap::new(c"farfault", self.limits.vram_pages, residence);
        let map = Arc::pin_init(map, GFP_KERNEL).inspect_err(|e| {
            dev_err!(
                self.device,
                "no physical address range for {} MiB of VRAM: {e:?}. Try a smaller --vram\n",
                self.limits.vram_pages >> (20 - PAGE_SHIFT)
            );
        })?;
        *self.pagemap.lock() = Some(map);
        dev_info!(
            self.device,
            "GPU {} with {} MiB of VRAM, fault buffer of {buffers}\n",
            self.limits.serial,
            self.limits.vram_pages >> (20 - PAGE_SHIFT)
        );
        Ok(())
    }

    /// Takes the queues into use. Returns how many event buffers there are.
    fn open(&self, queues: &Queues<'_, Interrupts, QUEUES>) -> Result<usize> {
        self.control.open(queues, config::queue::CONTROL)?;
        self.submit.open(queues, config::queue::SUBMIT)?;
        let buffers = self.events.open(queues, config::queue::EVENT)?;
        queues.ready();
        self.events.kick();
        Ok(buffers)
    }

    /// Before the machine sleeps, while processes are frozen: jobs end, every page comes home, and the
    /// device has no address space left. `ENOMEM`: not all pages have room in RAM; then the address
    /// spaces are there again. `EIO`: the device was lost over it.
    pub(crate) fn suspend(&self) -> Result {
        if self.reachable().is_err() {
            return Ok(());
        }
        self.each_space(|space| {
            space.suspend();
            Ok(())
        })?;
        self.bring_all_home(None, Cause::Unbind);
        let left = self.pagemap().map_or(0, |map| map.in_use());
        if left == 0 {
            return Ok(());
        }
        if self.reachable().is_err() {
            // The log says so already. Without the device there is nothing to be saved the next time.
            return Err(EIO);
        }
        dev_err!(
            self.device,
            "{left} pages of VRAM cannot go home, for want of RAM or because they have failed: the \
             machine cannot sleep. Free some, or end who has them, and try again\n"
        );
        self.reenter_device()?;
        Err(ENOMEM)
    }

    /// After the machine's sleep: the address spaces are on the device again, with nothing mapped. The
    /// GPU's first use of a page faults.
    pub(crate) fn resume(&self, queues: &Queues<'_, Interrupts, QUEUES>) -> Result {
        if self.reachable().is_err() {
            return Ok(());
        }
        self.open(queues)?;
        self.reenter_device()
    }

    fn reenter_device(&self) -> Result {
        // Who closes one is done with it first, or waits.
        self.each_space(|space| space.enter_device().or_else(unless_gone))
    }

    fn each_space(&self, act: impl Fn(&Space) -> Result) -> Result {
        for context in self.contexts.numbers() {
            if let Some(space) = self.contexts.get(context) {
                act(&space)?;
            }
        }
        Ok(())
    }

    /// Ends all use of the GPU: jobs fail, address spaces close, every page comes home. The device
    /// must still answer, if it is not lost. May be called again.
    pub(crate) fn stop(&self) {
        if self.gone.xchg(true, Full) {
            return;
        }
        self.unusable.notify_all();
        for context in self.contexts.numbers() {
            if let Some(space) = self.contexts.get(context) {
                space.close(uapi::JobStatus::DeviceLost);
            }
        }
        let Some(map) = self.pagemap.lock().clone() else {
            return;
        };
        for look in 0..UNBIND_LOOKS {
            if map.in_use() <= self.vram.failed_pages_in_use() || self.reachable().is_err() {
                break;
            }
            if look != 0 {
                fsleep(UNBIND_PAUSE);
            }
            self.bring_all_home(None, Cause::Unbind);
        }
        let left = map.in_use();
        drop(map);
        if left != 0 {
            dev_err!(
                self.device,
                "{left} pages are lost with the device: who touches them gets SIGBUS, and the \
                 module stays loaded. Restart the machine to be rid of it\n"
            );
            // mm has the pages until their processes exit, and calls us for them.
            if module::try_pin_for_ever() {
                return;
            }
            // It is being unloaded already. This wait has no limit: what it waits for must not find
            // the module gone.
            while self.pagemap().is_ok_and(|map| map.in_use() != 0) {
                fsleep(UNBIND_PAUSE);
            }
        }
        // Outside of the lock: it waits until mm has forgotten the pages.
        let map = self.pagemap.lock().take();
        drop(map);
    }

    /// After the device was reset: whoever still waits is told, and the workers end.
    fn end(&self) {
        self.control.close();
        self.submit.close();
        self.events.close();
        // What passes events on, and then the address spaces that it has woken.
        self.workers.flush();
        self.workers.flush();
    }

    /// A name that no job has had.
    pub(crate) fn new_fence(&self) -> u64 {
        self.next_fence.fetch_add(1, Relaxed)
    }

    /// Number of the GPU, for traces.
    pub(crate) fn index(&self) -> u32 {
        self.index
    }

    /// `ENODEV`: unbound. `EIO`: lost.
    pub(crate) fn usable(&self) -> Result {
        if self.gone.load(Relaxed) {
            return Err(ENODEV);
        }
        self.reachable()
    }

    /// Notified when it is usable no longer.
    pub(crate) fn unusable(&self) -> &PollCondVar {
        &self.unusable
    }

    /// The pages of VRAM as mm has them. `ENODEV`: unbound.
    pub(crate) fn pagemap(&self) -> Result<Arc<Pagemap>> {
        self.pagemap.lock().clone().ok_or(ENODEV)
    }

    /// Declares the device lost, once: nothing is sent to it any more, and all jobs fail.
    pub(crate) fn lose(&self, what: &str, error: Error) {
        if let Some(word) = &self.bus_master {
            // Before anybody can see that it is lost, and takes the GPU for done with his memory.
            word.set(0);
        }
        if self.lost.xchg(true, Full) {
            return;
        }
        dev_err!(
            self.device,
            "{what} ({error:?}): the device is lost. Jobs fail; what only VRAM held is gone\n"
        );
        for context in self.contexts.numbers() {
            self.contexts.with(context, |space| space.lose_jobs());
        }
        self.unusable.notify_all();
    }

    /// `EIO`: lost. Unlike [`Gpu::usable`] for what must be done while the driver is unbound.
    pub(crate) fn reachable(&self) -> Result {
        if self.lost.load(Relaxed) {
            return Err(EIO);
        }
        Ok(())
    }

    /// What a failed exchange with the device means: lost, unless it is the driver that went away or
    /// memory that is short.
    fn exchanged<T>(&self, what: &str, result: Result<T>) -> Result<T> {
        if let Err(error) = result {
            if error == ETIMEDOUT || error == EIO {
                self.lose(what, error);
                return Err(EIO);
            }
        }
        result
    }

    /// Adds a command that tells the device where to look whether it was given up, before it has any work.
    pub(crate) fn name_bus_master_word(&self, batch: &mut Batch) -> Result {
        match &self.bus_master {
            Some(word) => batch.set_bus_master_word(SystemAddr::new(word.phys())),
            None => Ok(()),
        }
    }

    /// Sends a batch of control commands, all of which must succeed. `EIO`: the device is lost.
    pub(crate) fn control(&self, batch: &mut Batch) -> Result<Reply> {
        self.reachable()?;
        let result = self.control.control(batch);
        let result = result.and_then(|(status, reply)| match status {
            Status::Ok => Ok(reply),
            status => {
                dev_err!(
                    self.device,
                    "command {} of a request failed: {status:?}\n",
                    reply.completed.get()
                );
                Err(EIO)
            }
        });
        self.exchanged("a control request failed", result)
    }

    /// Sends one control command that may find `tolerated` instead of success. Returns its value if
    /// it succeeded.
    pub(crate) fn control_tolerating(
        &self,
        batch: &mut Batch,
        tolerated: Status,
    ) -> Result<Option<u64>> {
        self.reachable()?;
        let result = self
            .control
            .control(batch)
            .and_then(|(status, reply)| match status {
                Status::Ok => Ok(Some(reply.value.get())),
                status if status == tolerated => Ok(None),
                _ => Err(EIO),
            });
        self.exchanged("a control request failed", result)
    }

    /// An empty command, to see whether the device answers.
    pub(crate) fn ping(&self) -> Result {
        let mut batch = Batch::new()?;
        batch.clear();
        batch.nop()?;
        self.control(&mut batch).map(|_| ())
    }

    /// An empty list of copies.
    pub(crate) fn copy_list(&self) -> CopyList<'_> {
        CopyList::new(&self.copy_memory, self.limits.max_copy_run)
    }

    /// Begins to move the bytes of a list.
    pub(crate) fn start_copy(&self, list: &mut CopyList<'_>) -> Result {
        self.reachable()?;
        self.exchanged("a copy failed", list.start(&self.submit))
    }

    /// Waits until all that was sent of it is where it belongs.
    pub(crate) fn finish_copy(&self, list: &mut CopyList<'_>) -> Result {
        self.exchanged("a copy failed", list.finish(&self.submit))
    }

    /// Starts a job.
    pub(crate) fn launch(&self, launch: &Launch) -> Result {
        self.reachable()?;
        self.exchanged("a launch failed", self.submit.launch(launch))
    }

    /// Ends a context on the device, by a request in memory that is there.
    pub(crate) fn destroy_context(&self, context: u32, batch: &mut Batch) {
        batch.clear();
        let sent = batch.destroy_context(context);
        let sent = sent.and_then(|()| self.control_tolerating(batch, Status::BadContext));
        // Without queues the device has forgotten everything already.
        if let Err(error) = sent.map(|_| ()).or_else(unless_gone) {
            self.lose("a context could not be ended", error);
        }
    }

    /// Counts for the address space of a context, if there is one, and for the GPU.
    pub(crate) fn count(
        &self,
        context: Option<u32>,
        counter: impl Fn(&Counters) -> &Atomic<u64>,
        n: u64,
    ) {
        counter(&self.counters).fetch_add(n, Relaxed);
        let Some(context) = context else { return };
        self.contexts.with(context, |space| {
            counter(&space.counters).fetch_add(n, Relaxed);
        });
    }

    /// A page for a table, with a block sent home if need be. No mmap lock may be held.
    pub(crate) fn take_table(&self) -> Result<VramPage> {
        if let Some(table) = self.vram.take_table() {
            return Ok(table);
        }
        self.evict_block(Cause::Evict)?;
        self.vram.take_table().ok_or(ENOSPC)
    }

    /// Tables for one mapping, likewise.
    pub(crate) fn supplies(&self) -> Result<Supplies> {
        match Supplies::for_region(&self.vram) {
            Err(e) if e == ENOSPC => {
                self.evict_block(Cause::Evict)?;
                Supplies::for_region(&self.vram)
            }
            supplies => supplies,
        }
    }

    /// How many tables one address space may have.
    pub(crate) fn most_tables(&self) -> usize {
        (self.limits.vram_pages / TABLE_SHARE).max(LEAST_TABLES)
    }

    /// Whether the tables of one address space take more than their share of VRAM, or what is known of its
    /// regions too much of the kernel's memory.
    pub(crate) fn is_crowded(&self, table: &PageTable) -> bool {
        table.tables() > self.most_tables() || table.regions() > MOST_REGIONS
    }

    /// Passes on what the device reported.
    fn drain_events(&self) {
        let mut faulted = 0u64;
        while let Some(event) = self.events.next() {
            match event {
                Event::Fault(fault) => {
                    let context = fault.header.context.get();
                    if let Some(space) = self.contexts.get(context) {
                        space.fault_event(&fault);
                        faulted |= 1 << context;
                    }
                }
                Event::Fence(fence) => {
                    if let Some(space) = self.contexts.get(fence.header.context.get()) {
                        space.fence_event(&fence);
                    }
                }
                Event::Error(error) => faulted |= self.error_event(&error),
                Event::Unknown => dev_err!(self.device, "the device sent an unknown event\n"),
            }
        }
        self.events.kick();
        for context in (0..MOST_CONTEXTS).filter(|context| faulted & (1 << context) != 0) {
            if let Some(space) = self.contexts.get(context) {
                // If it is queued already, it will see these faults too.
                let _ = self.workers.enqueue(space);
            }
        }
    }

    /// Returns which address spaces have something to do about it.
    fn error_event(&self, error: &ErrorEvent) -> u64 {
        match ErrorCode::from_raw(error.code.get()) {
            Some(ErrorCode::FaultOverflow) => {
                let mut overflowed = 0;
                for context in self.contexts.numbers() {
                    if let Some(space) = self.contexts.get(context) {
                        space.overflow_event();
                        overflowed |= 1 << context;
                    }
                }
                overflowed
            }
            Some(ErrorCode::MemoryPoisoned) => {
                let page = VramAddr::new(error.detail.get());
                self.vram.fail(VramPage::containing(page));
                dev_warn!(
                    self.device,
                    "the page of VRAM at {:#x} has failed: its contents are lost\n",
                    page.get()
                );
                0
            }
            Some(ErrorCode::BadDescriptor) | None => {
                dev_err!(
                    self.device,
                    "the device reports error {} ({})\n",
                    error.code.get(),
                    error.detail.get()
                );
                0
            }
        }
    }

    /// Writes what debugfs shows.
    pub(crate) fn write_stats(&self, f: &mut kernel::fmt::Formatter<'_>) -> kernel::fmt::Result {
        crate::stats::write_lines(&self.counters.read(), f)?;
        let contexts = (self.contexts.numbers())
            .filter(|&c| self.contexts.with(c, |_| ()).is_some())
            .count();
        let vram = self.vram.pages();
        writeln!(f, "contexts {contexts}")?;
        writeln!(f, "vram_pages {vram}")?;
        let retired = self.vram.retired_pages();
        let used = vram - self.vram.free_pages() - retired;
        writeln!(f, "vram_pages_used {used}")?;
        writeln!(f, "vram_pages_retired {retired}")?;
        writeln!(f, "vram_blocks {}", vram / BLOCK_PAGES)?;
        let in_use = self.pagemap().map_or(0, |map| map.in_use());
        writeln!(f, "vram_pages_in_folios {in_use}")
    }
}
