// SPDX-License-Identifier: MIT OR Apache-2.0
//! The GPU itself: what the hardware manual (`docs/manual/`) describes, and nothing else.
//!
//! [`Gpu`] is a state machine behind `&mut self`. It knows nothing of virtio, sockets, QEMU, threads
//! or clocks; a test drives it in one thread. The shell around it owns it under one lock, moves
//! requests, replies and events between it and the queues, and lends it threads:
//!
//! ```text
//!  request ──► control / submit ──► contexts · jobs · copy lists
//!                                        │ next_work (under the lock: schedule, translate, park)
//!                                        ▼
//!                                   Work::execute   (any thread, no lock: moves bytes)
//!                                        │ retire (under the lock: wake, end, answer)
//!  reply, event ◄── next_completion, next_event
//! ```
//!
//! | file | what | manual |
//! | --- | --- | --- |
//! | `settings` | what a GPU is made with, all limits | 2 |
//! | `control`, `command` | the control queue: execution, parsing | 4 |
//! | `submit`, `copy` | the submit queue, copy lists | 5 |
//! | `job`, `kernels` | what jobs and waves are and do | 5.4, 9 |
//! | `event` | buffers, fences, errors | 6 |
//! | `mmu` | walk and TLB | 7 |
//! | `fault` | parked waves, replay, cancel | 8 |
//! | `engine`, `issue` | whose turn it is, translation, parking, retiring | 8, 9 |
//! | `flight`, `work` | accesses in flight: the invalidation promise | 4.4 |
//! | `vram`, `memory` | the bytes themselves | 1 |
//! | `inspect`, `stats` | looking in from outside | — |
//!
//! What the guest sees is a status, a fault or an event of the protocol. Nothing that it sends makes
//! this code panic, loop or grow without bound.
//!
//! Not implemented: programs that users write, priorities between contexts, peer memory.
#![warn(
    clippy::indexing_slicing,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic
)]

mod command;
mod context;
mod control;
mod copy;
mod engine;
mod event;
mod fault;
mod flight;
pub mod inspect;
mod issue;
mod job;
mod kernels;
mod memory;
pub mod mmu;
mod settings;
pub mod stats;
mod submit;
pub mod vram;
mod work;

pub use event::EventBytes;
pub use settings::{Limits, NewError, PoisonError, Settings};
pub use stats::Stats;
pub use work::{Work, WorkDone};

use context::{Contexts, ENGINES};
use control::ControlQueue;
use copy::CopyLists;
use engine::Engine;
use event::Events;
use farfault_protocol::{
    U32, U64,
    address::{PAGE_SIZE, SystemAddr, VramAddr},
    config::{ConfigSpace, Features, MAGIC, VERSION_MAJOR, VERSION_MINOR},
    event as wire_event,
};
use flight::Flights;
use job::Job;
use serde::Serialize;
use settings::{MAX_POISONED, MAX_WAITING_BYTES};
use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
};
use vram::Vram;

/// A queue that requests arrive on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
pub enum Queue {
    /// The control queue.
    Control,
    /// The submit queue.
    Submit,
}

/// What became of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The reply.
    Done(Vec<u8>),
    /// The reply will be a [`Completion`].
    Pending,
}

/// The reply to a request that was pending.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Completion {
    /// Where the request came from.
    pub queue: Queue,
    /// The shell's name for it.
    pub tag: u64,
    /// The reply.
    pub reply: Vec<u8>,
}

/// The GPU.
pub struct Gpu {
    settings: Settings,
    vram: Arc<Vram>,
    contexts: Contexts,
    /// Jobs that have not ended, by a number never used again.
    jobs: BTreeMap<u64, Job>,
    next_job: u64,
    /// Waves of these jobs, ended ones included.
    waves: u32,
    engines: [Engine; ENGINES],
    copies: CopyLists,
    /// Whether new copy lists move anything: [`Self::switch_copies`].
    copies_on: bool,
    /// Who is asked for work next.
    turn: engine::Turn,
    /// Works begun since waves last tried a fault again that found no buffer.
    works_since_retry: u32,
    events: Events,
    flights: Flights,
    control: ControlQueue,
    /// Engines access RAM only while this word of it is not zero.
    bus_master_word: Option<SystemAddr>,
    completions: VecDeque<Completion>,
    resetting: bool,
    stats: Stats,
}

impl Gpu {
    /// A GPU as it is after a reset.
    pub fn new(settings: Settings) -> Result<Self, NewError> {
        Ok(Self {
            vram: Arc::new(Vram::new(settings.vram_size)?),
            contexts: Contexts::default(),
            jobs: BTreeMap::new(),
            next_job: 0,
            waves: 0,
            engines: [
                Engine::new(wire_event::Engine::Compute, settings.tlb),
                Engine::new(wire_event::Engine::Copy, settings.tlb),
            ],
            copies: CopyLists::default(),
            copies_on: true,
            turn: engine::Turn::default(),
            works_since_retry: 0,
            events: Events::default(),
            flights: Flights::default(),
            control: ControlQueue::default(),
            bus_master_word: None,
            completions: VecDeque::new(),
            resetting: false,
            stats: Stats::default(),
            settings,
        })
    }

    /// The configuration space.
    pub fn config_space(&self) -> ConfigSpace {
        let limits = &self.settings.limits;
        ConfigSpace {
            magic: MAGIC,
            version_major: U32::new(VERSION_MAJOR),
            version_minor: U32::new(VERSION_MINOR),
            features: U64::new(
                Features::HUGE_PAGES
                    | Features::ACCESSED_DIRTY
                    | Features::ATOMICS
                    | Features::MEMORY_ERRORS
                    | Features::BUS_MASTER_WORD,
            ),
            vram_size: U64::new(self.vram.size()),
            serial: U64::new(self.settings.serial),
            max_contexts: U32::new(limits.max_contexts),
            max_jobs: U32::new(limits.max_jobs),
            max_waves: U32::new(limits.max_waves),
            max_request: U32::new(limits.max_request),
            max_copy_run: U32::new(limits.max_copy_run),
            reserved: [0; 196],
        }
    }

    /// Takes the GPU back to how it began: nothing pending is answered, no event is left, VRAM is
    /// zero. That is done when no work is in flight any more: until then [`Self::is_resetting`].
    pub fn reset(&mut self) {
        self.contexts = Contexts::default();
        self.jobs.clear();
        self.waves = 0;
        for engine in &mut self.engines {
            engine.reset();
        }
        self.copies.clear();
        self.copies_on = true;
        self.events.reset();
        self.control = ControlQueue::default();
        self.bus_master_word = None;
        self.completions.clear();
        self.stats.resets += 1;
        self.resetting = true;
        self.end_reset();
    }

    /// Off: copy lists are checked and answered, but move nothing, until this is switched on again
    /// or the GPU is reset. Those under way go on. For benchmarks only, to measure what all else
    /// costs.
    pub fn switch_copies(&mut self, on: bool) {
        self.copies_on = on;
    }

    /// Makes the page of VRAM around an address lose its contents, as memory does that fails: whoever
    /// accesses it from now on is told, until the GPU is reset. For tests of drivers.
    pub fn poison(&mut self, at: VramAddr) -> Result<(), PoisonError> {
        let page = at.align_down(PAGE_SIZE);
        if !self.vram.contains(page, PAGE_SIZE) {
            return Err(PoisonError::NotVram);
        }
        if self.resetting {
            return Err(PoisonError::Resetting);
        }
        if self.vram.poisoned_pages().len() >= MAX_POISONED {
            return Err(PoisonError::TooMany);
        }
        if self.vram.poison(page) {
            self.events.poisoned(page, &mut self.contexts);
        }
        Ok(())
    }

    /// Whether a reset waits for work in flight. No new work is handed out meanwhile.
    pub fn is_resetting(&self) -> bool {
        self.resetting
    }

    fn end_reset(&mut self) {
        if self.resetting && self.flights.len() == 0 {
            self.vram.clear();
            self.resetting = false;
        }
    }

    /// Whether a request of this queue should come now. If not, that changes when work is retired,
    /// and at a reset. A shell that does not ask makes the GPU hold more memory.
    pub fn has_room(&self, queue: Queue) -> bool {
        let bytes = match queue {
            Queue::Control => self.control.bytes(),
            Queue::Submit => self.copies.bytes(),
        };
        bytes < MAX_WAITING_BYTES
    }

    /// The reply to a request that was pending, if one is ready.
    pub fn next_completion(&mut self) -> Option<Completion> {
        self.completions.pop_front()
    }

    /// Takes note of buffers that the driver put on the event queue.
    pub fn post_event_buffers(&mut self, count: u32) {
        self.events.post(count, &mut self.contexts);
    }

    /// Takes note that a posted buffer cannot be written to. The event for it waits for another.
    pub fn lose_event_buffer(&mut self) {
        self.events.lose_buffer();
    }

    /// What [`Self::next_event`] would return.
    pub fn first_event(&self) -> Option<&EventBytes> {
        self.events.first()
    }

    /// An event to be written to a posted buffer, if there is one. It must be in the queue before
    /// any reply that this GPU returned later.
    pub fn next_event(&mut self) -> Option<EventBytes> {
        self.events.pop()
    }

    /// Reports a chain, on the queue with this index, that could not be answered.
    pub fn report_bad_descriptor(&mut self, queue: u16) {
        self.events.bad_descriptor(queue, &mut self.contexts);
    }

    /// Whether [`Self::next_work`] may return some.
    pub fn has_work(&self) -> bool {
        !self.resetting
            && (self.copies.has_work()
                || self.engines.iter().any(|engine| engine.has_work())
                || (self.events.free_buffers() > 0 && self.contexts.any_unreported()))
    }

    /// Whether copies are part of that work.
    pub fn has_copies(&self) -> bool {
        !self.resetting && self.copies.has_work()
    }

    /// How much work was handed out and not retired.
    pub fn work_in_flight(&self) -> usize {
        self.flights.len()
    }

    /// Whether nothing happens until the driver does something. Waves may be parked.
    pub fn is_idle(&self) -> bool {
        !self.has_work() && self.flights.len() == 0
    }

    /// The counters.
    pub fn stats(&self) -> Stats {
        let [compute, copy] = &self.engines;
        Stats {
            compute_mmu: compute.mmu.stats,
            copy_mmu: copy.mmu.stats,
            events: self.events.stats,
            ..self.stats
        }
    }
}
