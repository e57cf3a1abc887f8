// SPDX-License-Identifier: MIT OR Apache-2.0
//! The engines: whose turn it is, what becomes of an access (manual, chapters 8 and 9).
//!
//! Copy lists, the copy engine and the compute engine take turns; within an engine contexts do,
//! within a context its jobs, within a job its waves. A turn is one [`Work`], which is bounded, so
//! that nobody waits for another's end. Everything here runs under the GPU's lock; memory other than
//! page tables is touched only by [`Work::execute`], without it.

use super::{
    Gpu,
    context::Context,
    event::header,
    fault::{Record, Waiter},
    flight::{Held, Owner},
    issue::{Denied, issue},
    job::{Failure, Job},
    kernels::{Progress, Step},
    mmu::Mmu,
    settings::{MAX_PARKED_PER_CALL, WORKS_BETWEEN_RETRIES},
    work::{BadRun, Operand, Operation, Outcome, Work, WorkDone},
};
use farfault_protocol::{
    U32, U64,
    address::{GpuVa, PAGE_SIZE},
    event::{self, EventKind, FaultEvent},
};
use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
};

/// What runs waves.
#[derive(Debug)]
pub(crate) struct Engine {
    name: event::Engine,
    pub(crate) mmu: Mmu,
    /// Contexts with waves that can go on, in turn.
    contexts: VecDeque<u32>,
}

impl Engine {
    pub(crate) fn new(name: event::Engine, tlb: bool) -> Self {
        Self {
            name,
            mmu: Mmu::new(tlb),
            contexts: VecDeque::new(),
        }
    }

    pub(crate) fn name(&self) -> event::Engine {
        self.name
    }

    pub(crate) fn has_work(&self) -> bool {
        !self.contexts.is_empty()
    }

    /// Forgets a context and its translations.
    pub(crate) fn forget(&mut self, context: u32) {
        self.contexts.retain(|&waiting| waiting != context);
        self.mmu.invalidate_context(context);
    }

    pub(crate) fn reset(&mut self) {
        self.contexts.clear();
        self.mmu.reset();
    }
}

/// Who is asked for work next.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) enum Turn {
    #[default]
    Lists,
    Engine(event::Engine),
}

impl Turn {
    const COUNT: u32 = 3;

    fn next(self) -> Self {
        match self {
            Self::Lists => Self::Engine(event::Engine::Copy),
            Self::Engine(event::Engine::Copy) => Self::Engine(event::Engine::Compute),
            Self::Engine(event::Engine::Compute) => Self::Lists,
        }
    }
}

/// What a wave's turn led to.
enum Stepped {
    /// No wave of the engine can go on.
    Idle,
    /// The wave was parked, or ended.
    Parked,
    /// An access.
    Issued(Work),
}

/// A wave, by its job.
#[derive(Clone, Copy)]
struct WaveId {
    job: u64,
    wave: u32,
}

impl Gpu {
    /// Work to be executed without the lock, by any thread, and then to be [retired](Self::retire).
    /// `None` until something changes. Its time is bounded.
    pub fn next_work(&mut self) -> Option<Work> {
        if self.resetting {
            return None;
        }
        if self.works_since_retry >= WORKS_BETWEEN_RETRIES {
            self.retry_unreported();
        }
        let mut idle = 0;
        let mut parked = 0;
        while idle < Turn::COUNT {
            let turn = self.turn;
            self.turn = turn.next();
            let stepped = match turn {
                Turn::Lists => self.step_lists(),
                Turn::Engine(engine) => self.step_engine(engine),
            };
            match stepped {
                Stepped::Issued(work) => return Some(work),
                Stepped::Idle => {
                    idle += 1;
                    if idle == Turn::COUNT && self.retry_unreported() {
                        idle = 0;
                    }
                }
                Stepped::Parked => {
                    idle = 0;
                    parked += 1;
                    if parked == MAX_PARKED_PER_CALL {
                        // Others shall have the lock: the shell comes back for more.
                        return Some(self.work(Owner::Nobody, Operation::Nothing, 0));
                    }
                }
            }
        }
        None
    }

    /// Takes back work that was executed.
    pub fn retire(&mut self, done: WorkDone) {
        // Each number is begun once and `WorkDone` cannot be copied, so it is there.
        let Some(owner) = self.flights.end(done.id) else {
            return;
        };
        self.stats.work.retired += 1;
        match owner {
            Owner::Nobody => {}
            Owner::List(id) => {
                let failed = match done.outcome {
                    Outcome::BadRun(bad) => Some(bad),
                    Outcome::Done { .. } | Outcome::NoMemory { .. } => None,
                };
                self.retire_list(id, failed);
            }
            Owner::Wave {
                job, wave, held, ..
            } => self.retire_wave(WaveId { job, wave }, held, done.outcome),
        }
        self.control_work_retired(done.id);
        self.end_reset();
    }

    fn retire_list(&mut self, id: u64, failed: Option<BadRun>) {
        if let Some(end) = self.copies.done(id, failed) {
            self.complete_list(end);
        }
    }

    fn retire_wave(&mut self, id: WaveId, held: [Option<Held>; 2], outcome: Outcome) {
        // It is gone if its context was destroyed.
        let Some(job) = self.jobs.get_mut(&id.job) else {
            return;
        };
        job.in_flight = job.in_flight.saturating_sub(1);
        if job.failure.is_some() {
            self.end_failed_job(id.job);
            return;
        }
        match outcome {
            Outcome::Done { amount, value } => {
                let Some(wave) = job.waves.get_mut(id.wave as usize) else {
                    return;
                };
                let step = wave.program.next(Some(Progress { amount, value }));
                self.take_step(id, step);
            }
            Outcome::NoMemory { operand, at } => {
                let [destination, source] = held;
                let held = match operand {
                    Operand::Destination => destination,
                    Operand::Source => source,
                };
                let (va, access) = held.map_or((0, event::Access::Read), |held| {
                    (held.start.get().wrapping_add(at.offset), held.access)
                });
                let page = GpuVa::new(va).align_down(PAGE_SIZE);
                let lack = at.lack;
                self.fail_job(id.job, Failure::NoMemory { page, access, lack });
            }
            // No access of a wave ends so.
            Outcome::BadRun(_) => {}
        }
    }

    fn take_step(&mut self, id: WaveId, step: Step) {
        let Some(job) = self.jobs.get_mut(&id.job) else {
            return;
        };
        match step {
            Step::Access(access) => {
                if let Some(wave) = job.waves.get_mut(id.wave as usize) {
                    wave.wanted = Some(access);
                }
                self.make_ready(id.job, id.wave);
            }
            Step::End(value) => {
                job.end_wave(id.wave, value);
                if job.live == 0 {
                    self.end_job(id.job);
                }
            }
        }
    }

    fn step_lists(&mut self) -> Stepped {
        match self.copies.next() {
            Some((id, pieces, bytes)) => {
                let operation = Operation::List(pieces);
                Stepped::Issued(self.work(Owner::List(id), operation, bytes))
            }
            None => Stepped::Idle,
        }
    }

    fn step_engine(&mut self, engine: event::Engine) -> Stepped {
        let Some(id) = self.pick(engine) else {
            return Stepped::Idle;
        };
        let Some(job) = self.jobs.get_mut(&id.job) else {
            return Stepped::Parked;
        };
        let number = job.context;
        let (Some(wave), Some(context)) = (
            job.waves.get_mut(id.wave as usize),
            self.contexts.get(number),
        ) else {
            return Stepped::Parked;
        };
        let access = match wave.wanted {
            Some(access) => access,
            None => match wave.program.next(None) {
                Step::Access(access) => *wave.wanted.insert(access),
                end @ Step::End(_) => {
                    self.take_step(id, end);
                    return Stepped::Parked;
                }
            },
        };
        let mmu = match self.engines.get_mut(engine.raw() as usize) {
            Some(engine) => &mut engine.mmu,
            None => return Stepped::Parked,
        };
        match issue(mmu, &self.vram, context.space, access) {
            Ok(issue) => {
                job.in_flight += 1;
                self.stats.work.wave_bytes += issue.bytes;
                let owner = Owner::Wave {
                    context: number,
                    job: id.job,
                    wave: id.wave,
                    held: issue.held,
                };
                Stepped::Issued(self.work(owner, issue.operation, issue.bytes))
            }
            Err(denied) => {
                self.park(id, denied);
                Stepped::Parked
            }
        }
    }

    fn work(&mut self, owner: Owner, operation: Operation, bytes: u64) -> Work {
        self.stats.work.issued += 1;
        self.works_since_retry = self.works_since_retry.saturating_add(1);
        Work {
            id: self.flights.begin(owner),
            vram: Arc::clone(&self.vram),
            bus_master_word: self.bus_master_word,
            operation,
            bytes,
        }
    }

    /// The wave whose turn it is.
    fn pick(&mut self, name: event::Engine) -> Option<WaveId> {
        let index = name.raw() as usize;
        let engine = self.engines.get_mut(index)?;
        while let Some(number) = engine.contexts.pop_front() {
            let Some(context) = self.contexts.get_mut(number) else {
                continue;
            };
            let (Some(ready), Some(queued)) =
                (context.ready.get_mut(index), context.queued.get_mut(index))
            else {
                continue;
            };
            let picked = pick_from(ready, &mut self.jobs);
            *queued = !ready.is_empty();
            if *queued {
                engine.contexts.push_back(number);
            }
            if picked.is_some() {
                return picked;
            }
        }
        None
    }

    /// Lets a wave take part in the turns.
    pub(super) fn make_ready(&mut self, id: u64, wave: u32) {
        let Some(job) = self.jobs.get_mut(&id) else {
            return;
        };
        if job.failure.is_some() {
            return;
        }
        job.ready.push_back(wave);
        if job.queued {
            return;
        }
        job.queued = true;
        let index = job.engine.raw() as usize;
        let number = job.context;
        let Some(Context { ready, queued, .. }) = self.contexts.get_mut(number) else {
            return;
        };
        if let (Some(ready), Some(queued), Some(engine)) = (
            ready.get_mut(index),
            queued.get_mut(index),
            self.engines.get_mut(index),
        ) {
            ready.push_back(id);
            if !*queued {
                *queued = true;
                engine.contexts.push_back(number);
            }
        }
    }

    /// Parks a wave on a fault: on one that was reported, on a new one, or unreported.
    fn park(&mut self, id: WaveId, denied: Denied) {
        let Some(job) = self.jobs.get(&id.job) else {
            return;
        };
        let Some(context) = self.contexts.get_mut(job.context) else {
            return;
        };
        let page = denied.va.align_down(PAGE_SIZE);
        let waiter = Waiter {
            job: id.job,
            wave: id.wave,
            access: denied.access,
        };
        if context.faults.merge(page, waiter) {
            self.stats.faults.merged += 1;
            return;
        }
        let event = FaultEvent {
            header: header(EventKind::Fault, job.context),
            page,
            sequence: U64::new(0),
            fence: U64::new(job.fence),
            wave: U32::new(id.wave),
            access: denied.access.raw(),
            cause: denied.cause.raw(),
            engine: job.engine.raw(),
            reserved: [0; 25],
        };
        match self.events.fault(event) {
            Some(sequence) => {
                let record = Record {
                    page,
                    access: denied.access,
                    cause: denied.cause,
                    engine: job.engine,
                    fence: job.fence,
                    waiters: vec![waiter],
                };
                context.faults.report(sequence, record);
                self.stats.faults.reported += 1;
            }
            None => {
                context.faults.park_unreported(waiter);
                self.stats.faults.overflowed += 1;
            }
        }
    }

    /// Lets as many waves whose fault found no buffer try again as there are buffers now. Whether
    /// there were any. Each takes its buffer, or does not need it: this comes to an end.
    fn retry_unreported(&mut self) -> bool {
        self.works_since_retry = 0;
        let mut woken = false;
        for _ in 0..self.events.free_buffers() {
            let Some(waiter) = self.contexts.pop_unreported() else {
                break;
            };
            self.make_ready(waiter.job, waiter.wave);
            woken = true;
        }
        woken
    }

    /// Makes a job fail: its waves stop, and it ends when nothing of it is in flight.
    pub(super) fn fail_job(&mut self, id: u64, failure: Failure) {
        let Some(job) = self.jobs.get_mut(&id) else {
            return;
        };
        job.failure.get_or_insert(failure);
        job.ready.clear();
        if let Some(context) = self.contexts.get_mut(job.context) {
            context.faults.forget_job(id);
        }
        self.end_failed_job(id);
    }

    fn end_failed_job(&mut self, id: u64) {
        if self.jobs.get(&id).is_some_and(|job| job.in_flight == 0) {
            self.end_job(id);
        }
    }

    /// Removes a job and reports its end.
    fn end_job(&mut self, id: u64) {
        let Some(job) = self.jobs.remove(&id) else {
            return;
        };
        self.waves = self.waves.saturating_sub(job.wave_count());
        self.stats.jobs.count(job.status());
        if let Some(context) = self.contexts.get_mut(job.context) {
            context.end_fence(job.fence);
        }
        self.events.fence(job.fence_event(), &mut self.contexts);
    }
}

/// The next wave of jobs in turn. Those that have ended, or failed, are dropped on the way.
fn pick_from(ready: &mut VecDeque<u64>, jobs: &mut BTreeMap<u64, Job>) -> Option<WaveId> {
    while let Some(id) = ready.pop_front() {
        let Some(job) = jobs.get_mut(&id) else {
            continue;
        };
        let wave = job.ready.pop_front();
        job.queued = !job.ready.is_empty();
        if job.queued {
            ready.push_back(id);
        }
        if let Some(wave) = wave {
            return Some(WaveId { job: id, wave });
        }
    }
    None
}
