// SPDX-License-Identifier: MIT OR Apache-2.0
//! A driver in a few lines: makes commands, keeps page tables, collects events, runs work.

use farfault_device::gpu::{Gpu, Outcome, Queue, Settings, Work};
use farfault_protocol::{
    U32, U64,
    address::{GpuVa, SystemAddr, VramAddr},
    command::{CommandHeader, Status},
    control::{self, PteRun},
    event::{ErrorEvent, EventHeader, EventKind, FaultEvent, FenceEvent, JobStatus},
    pte::{self, Location, Pte},
    submit::{self, CopyRun, Kernel, Launch},
};
use std::collections::HashMap;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use zerocopy::{FromBytes, IntoBytes};

pub(crate) const KIB: u64 = 1 << 10;
pub(crate) const MIB: u64 = 1 << 20;
pub(crate) const PAGE: u64 = 4 * KIB;
/// VRAM of a usual rig. The upper half is for page tables.
pub(crate) const VRAM: u64 = 64 * MIB;
/// RAM of every rig: the second and third range touch, the first is apart.
pub(crate) const RAM: [(u64, u64); 3] = [(0, 8 * MIB), (16 * MIB, 8 * MIB), (24 * MIB, 4 * MIB)];
/// A page of RAM that the rig itself uses.
const SCRATCH: u64 = 28 * MIB - 64 * KIB;
/// All that a leaf may allow.
pub(crate) const RW: u64 = Pte::WRITABLE | Pte::ATOMIC;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    Fault(FaultEvent),
    Fence(FenceEvent),
    Error(ErrorEvent),
}

impl Event {
    pub(crate) fn parse(bytes: &[u8; 64]) -> Self {
        let (header, _) = EventHeader::read_from_prefix(bytes).unwrap();
        match EventKind::from_raw(header.kind.get()).unwrap() {
            EventKind::Fault => Self::Fault(FaultEvent::read_from_bytes(bytes).unwrap()),
            EventKind::Fence => Self::Fence(FenceEvent::read_from_bytes(bytes).unwrap()),
            EventKind::Error => Self::Error(ErrorEvent::read_from_bytes(bytes).unwrap()),
        }
    }
}

/// A reply of the control queue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Answer {
    pub(crate) status: Status,
    pub(crate) completed: u32,
    pub(crate) value: u64,
    pub(crate) data: Vec<u64>,
}

impl Answer {
    pub(crate) fn parse(bytes: &[u8]) -> Self {
        let (reply, data) = control::Reply::read_from_prefix(bytes).unwrap();
        Self {
            status: Status::from_raw(reply.status.get()).unwrap(),
            completed: reply.completed.get(),
            value: reply.value.get(),
            data: words(data),
        }
    }
}

pub(crate) fn parse_submit_reply(bytes: &[u8]) -> (Status, u32) {
    let reply = submit::Reply::read_from_bytes(bytes).unwrap();
    (
        Status::from_raw(reply.status.get()).unwrap(),
        reply.index.get(),
    )
}

pub(crate) struct Rig {
    pub(crate) gpu: Gpu,
    pub(crate) ram: GuestMemoryMmap,
    /// Events not looked at yet.
    pub(crate) events: Vec<Event>,
    /// Replies of pending requests, by tag.
    pub(crate) replies: HashMap<u64, (Queue, Vec<u8>)>,
    next_tag: u64,
    next_table: u64,
    /// Page tables by (context, level, first address).
    tables: HashMap<(u32, u32, u64), VramAddr>,
}

impl Rig {
    /// A GPU with 64 MiB of VRAM and 64 posted event buffers.
    pub(crate) fn new() -> Self {
        let mut rig = Self::with(Settings::new(VRAM));
        rig.gpu.post_event_buffers(64);
        rig
    }

    /// A GPU of one's own, without event buffers.
    pub(crate) fn with(settings: Settings) -> Self {
        let ranges = RAM.map(|(start, length)| (GuestAddress(start), length as usize));
        Self {
            gpu: Gpu::new(settings).unwrap(),
            ram: GuestMemoryMmap::from_ranges(&ranges).unwrap(),
            events: Vec::new(),
            replies: HashMap::new(),
            next_tag: 0,
            next_table: settings.vram_size / 2,
            tables: HashMap::new(),
        }
    }

    pub(crate) fn tag(&mut self) -> u64 {
        self.next_tag += 1;
        self.next_tag
    }

    /// Sends a control request. `None` if it is pending, under the tag returned.
    pub(crate) fn try_control(&mut self, request: &[u8]) -> (u64, Option<Answer>) {
        let tag = self.tag();
        let outcome = self.gpu.control(request, tag);
        self.collect();
        match outcome {
            Outcome::Done(reply) => (tag, Some(Answer::parse(&reply))),
            Outcome::Pending => (tag, None),
        }
    }

    /// Sends a control request that does not wait.
    pub(crate) fn control(&mut self, request: &[u8]) -> Answer {
        self.try_control(request).1.expect("the request waits")
    }

    /// The same, which succeeds.
    pub(crate) fn control_ok(&mut self, request: &[u8]) -> Answer {
        let answer = self.control(request);
        assert_eq!(answer.status, Status::Ok);
        answer
    }

    /// The answer of a control request that was pending, if it came.
    pub(crate) fn late(&mut self, tag: u64) -> Option<Answer> {
        let (queue, reply) = self.replies.remove(&tag)?;
        assert_eq!(queue, Queue::Control);
        Some(Answer::parse(&reply))
    }

    /// Sends a submit request and does all work until it is answered.
    pub(crate) fn submit(&mut self, request: &[u8]) -> (Status, u32) {
        let tag = self.tag();
        match self.gpu.submit(request, tag, &self.ram) {
            Outcome::Done(reply) => {
                self.collect();
                parse_submit_reply(&reply)
            }
            Outcome::Pending => {
                self.run();
                let (queue, reply) = self.replies.remove(&tag).expect("no reply after all work");
                assert_eq!(queue, Queue::Submit);
                parse_submit_reply(&reply)
            }
        }
    }

    /// Fetches events and completions.
    pub(crate) fn collect(&mut self) {
        while let Some(event) = self.gpu.next_event() {
            self.events.push(Event::parse(&event));
        }
        while let Some(done) = self.gpu.next_completion() {
            let twice = self.replies.insert(done.tag, (done.queue, done.reply));
            assert!(twice.is_none(), "two replies for one request");
        }
    }

    /// Executes one piece of work. Whether there was one.
    pub(crate) fn step(&mut self) -> bool {
        let work = self.gpu.next_work();
        self.collect();
        match work {
            Some(work) => {
                self.finish(work);
                true
            }
            None => false,
        }
    }

    /// Executes a piece of work that was handed out.
    pub(crate) fn finish(&mut self, work: Work) {
        let done = work.execute(&self.ram);
        self.gpu.retire(done);
        self.collect();
    }

    /// Does all work there is, which must have an end.
    pub(crate) fn run(&mut self) {
        for _ in 0..1_000_000 {
            if !self.step() {
                return;
            }
        }
        panic!("work without end");
    }

    /// The events since the last look.
    pub(crate) fn take_events(&mut self) -> Vec<Event> {
        self.collect();
        std::mem::take(&mut self.events)
    }

    pub(crate) fn take_faults(&mut self) -> Vec<FaultEvent> {
        let events = self.take_events();
        let fault = |event| match event {
            Event::Fault(fault) => fault,
            other => panic!("not a fault: {other:?}"),
        };
        events.into_iter().map(fault).collect()
    }

    /// The one event there is, a fence.
    pub(crate) fn take_fence(&mut self) -> FenceEvent {
        match self.take_events().as_slice() {
            [Event::Fence(fence)] => *fence,
            other => panic!("not one fence: {other:?}"),
        }
    }

    /// The result of the one job that ended.
    pub(crate) fn take_result(&mut self, fence: u64) -> u64 {
        let event = self.take_fence();
        assert_eq!(event.fence.get(), fence);
        assert_eq!(event.status.get(), JobStatus::Ok.raw(), "{event:?}");
        event.result.get()
    }

    // ---- page tables

    pub(crate) fn new_table(&mut self) -> VramAddr {
        let table = VramAddr::new(self.next_table);
        self.next_table += PAGE;
        table
    }

    pub(crate) fn create_context(&mut self, context: u32) {
        let root = self.new_table();
        self.tables.retain(|&(owner, ..), _| owner != context);
        self.tables.insert((context, pte::ROOT_LEVEL, 0), root);
        self.control_ok(&create_context(context, root));
    }

    /// The entry of an address at a level. Tables above are made.
    pub(crate) fn entry(&mut self, context: u32, va: u64, level: u32) -> VramAddr {
        let span = |level: u32| 1u64 << (12 + 9 * (level + 1));
        let base = if level == pte::ROOT_LEVEL {
            0
        } else {
            va & !(span(level) - 1)
        };
        let table = match self.tables.get(&(context, level, base)) {
            Some(table) => *table,
            None => {
                let table = self.new_table();
                let above = self.entry(context, va, level + 1);
                self.write_pte(above, Pte::table(table).0);
                self.tables.insert((context, level, base), table);
                table
            }
        };
        VramAddr::new(table.get() + pte::index(GpuVa::new(va), level) * 8)
    }

    pub(crate) fn write_pte(&mut self, entry: VramAddr, value: u64) {
        self.control_ok(&write_ptes(&[pte_run(entry, value, 0, 1)]));
    }

    /// Maps pages of 4 KiB.
    pub(crate) fn map(&mut self, context: u32, va: u64, to: Location, pages: u64, flags: u64) {
        for page in 0..pages {
            let entry = self.entry(context, va + page * PAGE, 0);
            self.write_pte(entry, Pte::leaf(offset(to, page * PAGE), flags).0);
        }
    }

    /// Maps a page of 2 MiB.
    pub(crate) fn map_huge(&mut self, context: u32, va: u64, to: Location, flags: u64) {
        let entry = self.entry(context, va, 1);
        self.write_pte(entry, Pte::leaf(to, flags | Pte::HUGE).0);
    }

    pub(crate) fn unmap(&mut self, context: u32, va: u64, pages: u64) {
        for page in 0..pages {
            let entry = self.entry(context, va + page * PAGE, 0);
            self.write_pte(entry, 0);
        }
    }

    /// The leaf of one page, as the GPU sees it.
    pub(crate) fn leaf(&mut self, context: u32, va: u64) -> Pte {
        Pte(self.control_ok(&read_ptes(context, va, 1)).data[0])
    }

    // ---- memory

    pub(crate) fn ram_word(&self, at: u64) -> u64 {
        self.ram.read_obj(GuestAddress(at)).unwrap()
    }

    pub(crate) fn ram_words(&self, at: u64, count: u64) -> Vec<u64> {
        let mut bytes = vec![0; count as usize * 8];
        self.ram.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        words(&bytes)
    }

    pub(crate) fn set_ram_word(&self, at: u64, value: u64) {
        self.ram.write_obj(value, GuestAddress(at)).unwrap();
    }

    /// A word of VRAM, by way of RAM.
    pub(crate) fn vram_word(&mut self, at: u64) -> u64 {
        let run = CopyRun::download(VramAddr::new(at), SystemAddr::new(SCRATCH), 8);
        assert_eq!(self.copy(&[run]), (Status::Ok, 0));
        self.ram_word(SCRATCH)
    }

    pub(crate) fn set_vram_word(&mut self, at: u64, value: u64) {
        let run = CopyRun::fill(value, VramAddr::new(at), 8);
        assert_eq!(self.copy(&[run]), (Status::Ok, 0));
    }

    pub(crate) fn copy(&mut self, runs: &[CopyRun]) -> (Status, u32) {
        self.submit(&copy(runs))
    }

    // ---- jobs

    pub(crate) fn try_launch(
        &mut self,
        context: u32,
        fence: u64,
        kernel: Kernel,
        arguments: &[u64],
        waves: u32,
    ) -> Status {
        self.submit(&launch(context, fence, kernel, arguments, waves))
            .0
    }

    /// Launches a job, which is accepted, and does not run it.
    pub(crate) fn launch(
        &mut self,
        context: u32,
        fence: u64,
        kernel: Kernel,
        arguments: &[u64],
        waves: u32,
    ) {
        let status = self.try_launch(context, fence, kernel, arguments, waves);
        assert_eq!(status, Status::Ok);
    }
}

fn words(bytes: &[u8]) -> Vec<u64> {
    let words = bytes.chunks_exact(8);
    assert!(words.remainder().is_empty());
    words
        .map(|word| u64::from_le_bytes(word.try_into().unwrap()))
        .collect()
}

pub(crate) fn vram(at: u64) -> Location {
    Location::Vram(VramAddr::new(at))
}

pub(crate) fn system(at: u64) -> Location {
    Location::System(SystemAddr::new(at))
}

pub(crate) fn offset(at: Location, bytes: u64) -> Location {
    match at {
        Location::Vram(a) => vram(a.get() + bytes),
        Location::System(a) => system(a.get() + bytes),
    }
}

fn header(opcode: u16, bytes: usize) -> CommandHeader {
    CommandHeader::new(opcode, bytes as u32)
}

fn command<T: IntoBytes + zerocopy::Immutable>(
    opcode: control::Opcode,
    make: impl FnOnce(CommandHeader) -> T,
) -> Vec<u8> {
    make(header(opcode.raw(), size_of::<T>()))
        .as_bytes()
        .to_vec()
}

pub(crate) fn nop() -> Vec<u8> {
    command(control::Opcode::Nop, |header| header)
}

pub(crate) fn create_context(context: u32, root: VramAddr) -> Vec<u8> {
    command(control::Opcode::CreateContext, |header| {
        control::CreateContext {
            header,
            context: U32::new(context),
            reserved: U32::new(0),
            root,
        }
    })
}

pub(crate) fn destroy_context(context: u32) -> Vec<u8> {
    command(control::Opcode::DestroyContext, |header| {
        control::DestroyContext {
            header,
            context: U32::new(context),
            reserved: U32::new(0),
        }
    })
}

pub(crate) fn pte_run(entry: VramAddr, first: u64, step: u64, count: u32) -> PteRun {
    PteRun {
        entry,
        first: U64::new(first),
        step: U64::new(step),
        count: U32::new(count),
        reserved: U32::new(0),
    }
}

pub(crate) fn write_ptes(runs: &[PteRun]) -> Vec<u8> {
    let length = 8 + size_of_val(runs);
    let mut bytes = header(control::Opcode::WritePtes.raw(), length)
        .as_bytes()
        .to_vec();
    bytes.extend_from_slice(runs.as_bytes());
    bytes
}

pub(crate) fn invalidate(context: u32, start: u64, length: u64) -> Vec<u8> {
    command(control::Opcode::Invalidate, |header| control::Invalidate {
        header,
        context: U32::new(context),
        reserved: U32::new(0),
        start: GpuVa::new(start),
        length: U64::new(length),
    })
}

pub(crate) fn replay(context: u32, through: u64) -> Vec<u8> {
    command(control::Opcode::Replay, |header| control::Replay {
        header,
        context: U32::new(context),
        reserved: U32::new(0),
        through: U64::new(through),
    })
}

pub(crate) fn cancel(context: u32, sequence: u64) -> Vec<u8> {
    command(control::Opcode::Cancel, |header| control::Cancel {
        header,
        context: U32::new(context),
        reserved: U32::new(0),
        sequence: U64::new(sequence),
    })
}

pub(crate) fn read_ptes(context: u32, start: u64, count: u32) -> Vec<u8> {
    command(control::Opcode::ReadPtes, |header| control::ReadPtes {
        header,
        context: U32::new(context),
        count: U32::new(count),
        start: GpuVa::new(start),
    })
}

pub(crate) fn harvest(context: u32, start: u64, count: u32) -> Vec<u8> {
    command(control::Opcode::HarvestAccessed, |header| {
        control::HarvestAccessed {
            header,
            context: U32::new(context),
            count: U32::new(count),
            start: GpuVa::new(start),
        }
    })
}

pub(crate) fn kill_job(context: u32, fence: u64) -> Vec<u8> {
    command(control::Opcode::KillJob, |header| control::KillJob {
        header,
        context: U32::new(context),
        reserved: U32::new(0),
        fence: U64::new(fence),
    })
}

pub(crate) fn set_bus_master_word(word: u64) -> Vec<u8> {
    command(control::Opcode::SetBusMasterWord, |header| {
        control::SetBusMasterWord {
            header,
            word: SystemAddr::new(word),
        }
    })
}

pub(crate) fn copy(runs: &[CopyRun]) -> Vec<u8> {
    let length = 8 + size_of_val(runs);
    let mut bytes = header(submit::Opcode::Copy.raw(), length)
        .as_bytes()
        .to_vec();
    bytes.extend_from_slice(runs.as_bytes());
    bytes
}

pub(crate) fn launch(
    context: u32,
    fence: u64,
    kernel: Kernel,
    arguments: &[u64],
    waves: u32,
) -> Vec<u8> {
    let argument = |index| U64::new(arguments.get(index).copied().unwrap_or(0));
    let launch = Launch {
        header: header(submit::Opcode::Launch.raw(), size_of::<Launch>()),
        context: U32::new(context),
        kernel: U32::new(kernel.raw()),
        fence: U64::new(fence),
        waves: U32::new(waves),
        reserved: U32::new(0),
        arguments: std::array::from_fn(argument),
    };
    launch.as_bytes().to_vec()
}
