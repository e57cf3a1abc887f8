// SPDX-License-Identifier: MIT OR Apache-2.0
//! A small GPU under a driver that does anything, and what must hold whatever it does.

use farfault_device::gpu::{Gpu, Limits, Outcome, Queue, Settings, Work, inspect::Aperture};
use farfault_protocol::{
    address::{HUGE_PAGE_SIZE, PAGE_SIZE, SystemAddr, VramAddr},
    command::{CommandHeader, Status},
    control::{MAX_PAGES_PER_REQUEST, Opcode, Reply},
    event::{EVENT_SIZE, EventHeader, EventKind, FaultEvent, FenceEvent},
    pte::{Location, Pte, ROOT_LEVEL},
    submit,
};
use std::collections::{BTreeSet, HashMap};
use vm_memory::{GuestAddress, GuestMemoryMmap};
use zerocopy::{FromBytes, IntoBytes};

/// Bytes of VRAM.
pub(crate) const VRAM: u64 = 2 * HUGE_PAGE_SIZE;
/// RAM: two ranges that touch, and one apart.
const RAM: [(u64, usize); 3] = [(0x1_0000, 0x8000), (0x1_8000, 0x8000), (0x40_0000, 0x4000)];
/// The end of all RAM.
pub(crate) const RAM_END: u64 = 0x40_4000;
/// Few of everything, so that the limits are met.
const LIMITS: Limits = Limits {
    max_contexts: 4,
    max_jobs: 8,
    max_waves: 24,
    max_request: 16 << 10,
    max_copy_run: 64 << 10,
};
/// The tables that the driver begins with; the root first.
const TABLES: u64 = 0x30_0000;
/// Works until a machine must be idle in which nothing begins any more.
const MOST_WORKS: u32 = 100_000;

/// A GPU as all targets use it.
pub(crate) fn new_gpu() -> Gpu {
    let mut settings = Settings::new(VRAM);
    settings.limits = LIMITS;
    Gpu::new(settings).expect("a small GPU can be made")
}

/// What bounds everything that a GPU keeps for its guest.
pub(crate) fn check_bounds(gpu: &Gpu) {
    let jobs = gpu.jobs();
    let queues = gpu.queues();
    assert!(gpu.contexts().len() <= LIMITS.max_contexts as usize);
    assert!(jobs.len() + queues.waiting_fences <= LIMITS.max_jobs as usize);
    assert!(jobs.iter().map(|job| job.waves).sum::<u32>() <= LIMITS.max_waves);
    assert!(gpu.faults().iter().map(|fault| fault.waves).sum::<usize>() <= 24);
    assert!(queues.control <= 1025 && queues.copies <= 1024);
    for entry in gpu.tlb() {
        let context = |c: &farfault_device::gpu::inspect::Context| c.context == entry.context;
        assert!(gpu.contexts().iter().any(context), "a TLB entry of nobody");
        let end = entry.address.checked_add(entry.length);
        let inside = matches!(entry.aperture, Aperture::System) || end.is_some_and(|e| e <= VRAM);
        assert!(inside, "a TLB entry leads outside of VRAM: {entry:?}");
    }
}

/// What a request does to contexts.
#[derive(Debug, Default)]
struct Lives {
    /// Those that it may make.
    made: Vec<u32>,
    /// The one that it ends, if that is all that it does.
    ended: Option<u32>,
}

/// The GPU and its driver.
pub(crate) struct Machine {
    gpu: Gpu,
    ram: GuestMemoryMmap,
    /// Handed out, not executed.
    held: Vec<Work>,
    next_tag: u64,
    /// Requests without a reply, by tag.
    pending: HashMap<u64, Lives>,
    /// Buffers posted that no event has taken.
    buffers: u64,
    /// Last sequence number of a fault.
    sequence: u64,
    /// For each name of a job, how often it was launched and has not ended.
    live: HashMap<(u32, u64), u64>,
    /// Contexts that were destroyed and not made again.
    silent: BTreeSet<u32>,
}

impl Machine {
    /// With a context 0 that has some mappings.
    pub(crate) fn new() -> Self {
        let ranges = RAM.map(|(start, length)| (GuestAddress(start), length));
        let mut machine = Self {
            gpu: new_gpu(),
            ram: GuestMemoryMmap::from_ranges(&ranges).expect("RAM can be had"),
            held: Vec::new(),
            next_tag: 0,
            pending: HashMap::new(),
            buffers: 0,
            sequence: 0,
            live: HashMap::new(),
            silent: BTreeSet::new(),
        };
        machine.map();
        machine
    }

    /// Pages of all kinds from 0 on, a huge one at 2 MiB, and the tables themselves.
    fn map(&mut self) {
        let table = |level: u32| VramAddr::new(TABLES + u64::from(ROOT_LEVEL - level) * PAGE_SIZE);
        let mut entries = Vec::new();
        for level in 1..=ROOT_LEVEL {
            entries.push((table(level).get(), Pte::table(table(level - 1)).0));
        }
        let all = Pte::WRITABLE | Pte::ATOMIC;
        let huge = Pte::leaf(Location::Vram(VramAddr::new(0)), all | Pte::HUGE);
        entries.push((table(1).get() + 8, huge.0));
        for page in 0..48 {
            let vram = Location::Vram(VramAddr::new(page * PAGE_SIZE));
            let system = Location::System(SystemAddr::new(RAM[0].0 + page * PAGE_SIZE));
            let leaf = match page % 8 {
                0..3 => Pte::leaf(vram, all),
                3 | 4 => Pte::leaf(system, all),
                5 => Pte::leaf(vram, 0),
                6 => Pte::leaf(Location::Vram(table(0)), all),
                _ => Pte(0),
            };
            entries.push((table(0).get() + page * 8, leaf.0));
        }
        let mut request = Vec::new();
        for (entry, value) in entries {
            let header = CommandHeader::new(Opcode::WritePtes.raw(), 40);
            request.extend_from_slice(header.as_bytes());
            for word in [entry, value, 0, 1] {
                request.extend_from_slice(&word.to_le_bytes());
            }
        }
        let header = CommandHeader::new(Opcode::CreateContext.raw(), 24);
        request.extend_from_slice(header.as_bytes());
        for word in [0, table(ROOT_LEVEL).get()] {
            request.extend_from_slice(&u64::to_le_bytes(word));
        }
        match self.gpu.control(&request, u64::MAX) {
            Outcome::Done(reply) => assert_eq!(reply[..4], [0; 4], "the tables are refused"),
            Outcome::Pending => panic!("nothing is in flight"),
        }
    }

    /// Sends a request to the control queue.
    pub(crate) fn control(&mut self, request: &[u8]) {
        let lives = Lives::of(request);
        self.next_tag += 1;
        match self.gpu.control(request, self.next_tag) {
            Outcome::Done(reply) => self.check_control(&reply, lives),
            Outcome::Pending => {
                self.pending.insert(self.next_tag, lives);
            }
        }
        self.collect();
    }

    /// Sends a request to the submit queue.
    pub(crate) fn submit(&mut self, request: &[u8]) {
        self.next_tag += 1;
        match self.gpu.submit(request, self.next_tag, &self.ram) {
            Outcome::Done(reply) => {
                let status = check_submit(&reply);
                if let (Status::Ok, Ok((launch, _))) =
                    (status, submit::Launch::read_from_prefix(request))
                {
                    if launch.header.opcode.get() == submit::Opcode::Launch.raw() {
                        let name = (launch.context.get(), launch.fence.get());
                        *self.live.entry(name).or_default() += 1;
                    }
                }
            }
            Outcome::Pending => {
                self.pending.insert(self.next_tag, Lives::default());
            }
        }
        self.collect();
    }

    /// Posts event buffers.
    pub(crate) fn post(&mut self, count: u32) {
        self.buffers += u64::from(count);
        self.gpu.post_event_buffers(count);
        self.collect();
    }

    /// Reports a broken chain.
    pub(crate) fn report_broken(&mut self, queue: u16) {
        self.gpu.report_bad_descriptor(queue);
        self.collect();
    }

    /// Takes a piece of work and keeps it.
    pub(crate) fn take(&mut self) {
        if self.held.len() < 64 {
            self.held.extend(self.gpu.next_work());
        }
        self.collect();
    }

    /// Executes a piece of work that is kept.
    pub(crate) fn finish(&mut self, which: usize) {
        if self.held.is_empty() {
            return;
        }
        let work = self.held.swap_remove(which % self.held.len());
        self.gpu.retire(work.execute(&self.ram));
        self.collect();
    }

    /// Cancels every fault there is.
    pub(crate) fn cancel_all(&mut self) {
        for fault in self.gpu.faults() {
            let mut request = CommandHeader::new(Opcode::Cancel.raw(), 24)
                .as_bytes()
                .to_vec();
            for word in [u64::from(fault.context), fault.sequence] {
                request.extend_from_slice(&word.to_le_bytes());
            }
            self.control(&request);
        }
    }

    /// Resets the GPU: nothing that was before is answered.
    pub(crate) fn reset(&mut self) {
        self.gpu.reset();
        self.pending.clear();
        self.live.clear();
        self.silent.clear();
        self.buffers = 0;
        self.sequence = 0;
        self.collect();
    }

    /// Ends all contexts, and does all work: everything must come to an end and be answered.
    pub(crate) fn settle(mut self) {
        while !self.held.is_empty() {
            self.finish(0);
        }
        for context in 0..u64::from(LIMITS.max_contexts) {
            let mut request = CommandHeader::new(Opcode::DestroyContext.raw(), 16)
                .as_bytes()
                .to_vec();
            request.extend_from_slice(&context.to_le_bytes());
            self.control(&request);
        }
        let mut works = 0;
        while let Some(work) = self.gpu.next_work() {
            self.gpu.retire(work.execute(&self.ram));
            self.collect();
            works += 1;
            assert!(works < MOST_WORKS, "work without end");
        }
        assert!(!self.gpu.is_resetting() && self.gpu.is_idle());
        assert!(self.pending.is_empty(), "no answer: {:?}", self.pending);
        assert!(self.gpu.jobs().is_empty() && self.gpu.contexts().is_empty());
        assert!(self.gpu.tlb().is_empty() && self.gpu.faults().is_empty());
        assert_eq!(self.gpu.queues().waiting_fences, 0);
    }

    /// Fetches and checks what the GPU made: events first, as the transport does.
    fn collect(&mut self) {
        while let Some(event) = self.gpu.next_event() {
            self.check_event(&event);
        }
        while let Some(done) = self.gpu.next_completion() {
            let lives = self.pending.remove(&done.tag).expect("an answer to nobody");
            match done.queue {
                Queue::Control => self.check_control(&done.reply, lives),
                Queue::Submit => {
                    check_submit(&done.reply);
                }
            }
        }
        check_bounds(&self.gpu);
    }

    fn check_control(&mut self, bytes: &[u8], lives: Lives) {
        let (reply, data) = Reply::read_from_prefix(bytes).expect("a reply has its header");
        let status = Status::from_raw(reply.status.get()).expect("a known status");
        assert!(data.len() <= MAX_PAGES_PER_REQUEST as usize * 8 && data.len() % 8 == 0);
        for context in lives.made {
            self.silent.remove(&context);
        }
        if let (Some(context), Status::Ok) = (lives.ended, status) {
            self.silent.insert(context);
            self.live.retain(|&(of, _), _| of != context);
            assert!(self.gpu.jobs().iter().all(|job| job.context != context));
            assert!(self.gpu.tlb().iter().all(|entry| entry.context != context));
        }
    }

    fn check_event(&mut self, bytes: &[u8; EVENT_SIZE]) {
        self.buffers = self.buffers.checked_sub(1).expect("an event has a buffer");
        let (header, _) = EventHeader::read_from_prefix(bytes).expect("a header");
        let kind = EventKind::from_raw(header.kind.get()).expect("a known kind");
        let context = header.context.get();
        match kind {
            EventKind::Fault => {
                let fault = FaultEvent::read_from_bytes(bytes).expect("a fault");
                self.sequence += 1;
                assert_eq!(fault.sequence.get(), self.sequence, "faults are in order");
                assert_eq!(fault.page, fault.page.align_down(PAGE_SIZE));
                assert!(!self.silent.contains(&context), "a fault of nobody");
            }
            EventKind::Fence => {
                let fence = FenceEvent::read_from_bytes(bytes).expect("a fence");
                let live = self.live.get_mut(&(context, fence.fence.get()));
                let live = live.expect("the end of a job that nobody launched");
                *live = live.checked_sub(1).expect("a job ends once");
            }
            EventKind::Error => {}
        }
    }
}

impl Lives {
    fn of(request: &[u8]) -> Self {
        let mut lives = Self::default();
        let mut rest = request;
        while let Ok((header, _)) = CommandHeader::read_from_prefix(rest) {
            let length = header.length.get() as usize;
            let Some((this, behind)) = rest.split_at_checked(length).filter(|_| length >= 8) else {
                break;
            };
            rest = behind;
            let context = this.get(8..12).and_then(|bytes| bytes.try_into().ok());
            let context = context.map_or(0, u32::from_le_bytes);
            match Opcode::from_raw(header.opcode.get()) {
                Some(Opcode::CreateContext) => lives.made.push(context),
                Some(Opcode::DestroyContext) if length == request.len() => {
                    lives.ended = Some(context);
                }
                _ => {}
            }
        }
        lives
    }
}

fn check_submit(bytes: &[u8]) -> Status {
    let reply = submit::Reply::read_from_bytes(bytes).expect("a reply of 8 bytes");
    Status::from_raw(reply.status.get()).expect("a known status")
}
