// SPDX-License-Identifier: MIT OR Apache-2.0
//! The control queue (manual, chapter 4): requests in order, their commands in order.
//!
//! Only two commands wait, an invalidation and the end of a context: each for the accesses in
//! flight at that moment, which are bounded, never for a job. What begins later goes through the
//! tables as they are then, so nothing prolongs the wait.

use super::{
    Completion, Gpu, Outcome, Queue,
    command::{Control, PageRange, parse_control},
    context::FenceState,
    job::{Failure, Job},
    mmu::walk,
    settings::MAX_WAITING_REQUESTS,
};
use farfault_protocol::{
    U32, U64,
    address::{GpuVa, PAGE_SIZE, VramAddr},
    command::Status,
    control::{MAX_PAGES_PER_REQUEST, Opcode, PteRun, Reply},
    pte::{ENTRY_SIZE, Pte},
};
use std::{
    collections::{BTreeSet, VecDeque},
    sync::atomic::Ordering,
};
use zerocopy::IntoBytes;

/// How far a request has come.
#[derive(Debug)]
struct Execution {
    tag: u64,
    /// Bytes of the commands that were executed.
    offset: usize,
    completed: u32,
    value: u64,
    data: Vec<u8>,
    /// Pages that its commands may still name: bounds the reply, and the time that one request keeps
    /// the GPU from its work.
    pages: u32,
}

impl Execution {
    fn new(tag: u64) -> Self {
        Self {
            tag,
            offset: 0,
            completed: 0,
            value: 0,
            data: Vec::new(),
            pages: MAX_PAGES_PER_REQUEST,
        }
    }

    fn reply(&self, status: Status) -> Vec<u8> {
        let reply = Reply {
            status: U32::new(status.raw()),
            completed: U32::new(self.completed),
            value: U64::new(self.value),
        };
        let mut bytes = reply.as_bytes().to_vec();
        bytes.extend_from_slice(&self.data);
        bytes
    }
}

/// A request that waits for work in flight before its next command.
#[derive(Debug)]
struct Waiting {
    request: Vec<u8>,
    execution: Execution,
    works: BTreeSet<u64>,
}

/// Requests that are not answered yet.
#[derive(Debug, Default)]
pub(crate) struct ControlQueue {
    current: Option<Waiting>,
    /// Requests behind it, by tag.
    behind: VecDeque<(u64, Vec<u8>)>,
}

impl ControlQueue {
    /// How many there are.
    pub(crate) fn len(&self) -> usize {
        usize::from(self.current.is_some()) + self.behind.len()
    }

    /// How many bytes they have.
    pub(crate) fn bytes(&self) -> usize {
        let current = self.current.iter().map(|waiting| &waiting.request);
        let all = current.chain(self.behind.iter().map(|(_, request)| request));
        all.map(Vec::len).sum()
    }
}

/// Works in flight that a command waits for.
type Wait = BTreeSet<u64>;

impl Gpu {
    /// Executes a request of the control queue: all the bytes that the driver sent.
    pub fn control(&mut self, request: &[u8], tag: u64) -> Outcome {
        self.stats.control.requests += 1;
        let refusal = if request.len() > self.settings.limits.max_request as usize {
            Some(Status::LimitExceeded)
        } else if self.resetting || self.control.behind.len() >= MAX_WAITING_REQUESTS {
            Some(Status::Busy)
        } else {
            None
        };
        if let Some(status) = refusal {
            self.stats.control.failed += 1;
            return Outcome::Done(Execution::new(tag).reply(status));
        }
        if self.control.current.is_some() {
            self.control.behind.push_back((tag, request.to_vec()));
            return Outcome::Pending;
        }
        let mut execution = Execution::new(tag);
        match self.execute(request, &mut execution) {
            Ok(status) => Outcome::Done(execution.reply(status)),
            Err(works) => {
                self.control.current = Some(Waiting {
                    request: request.to_vec(),
                    execution,
                    works,
                });
                Outcome::Pending
            }
        }
    }

    /// Goes on with what waited for this work only.
    pub(super) fn control_work_retired(&mut self, id: u64) {
        let Some(current) = &mut self.control.current else {
            return;
        };
        current.works.remove(&id);
        if !current.works.is_empty() {
            return;
        }
        while let Some(mut current) = self.control.current.take().or_else(|| self.next_behind()) {
            match self.execute(&current.request, &mut current.execution) {
                Ok(status) => self.completions.push_back(Completion {
                    queue: Queue::Control,
                    tag: current.execution.tag,
                    reply: current.execution.reply(status),
                }),
                Err(works) => {
                    current.works = works;
                    self.control.current = Some(current);
                    return;
                }
            }
        }
    }

    fn next_behind(&mut self) -> Option<Waiting> {
        let (tag, request) = self.control.behind.pop_front()?;
        Some(Waiting {
            request,
            execution: Execution::new(tag),
            works: BTreeSet::new(),
        })
    }

    /// Executes commands until the end, a failure (both give the status) or a wait.
    fn execute(&mut self, request: &[u8], execution: &mut Execution) -> Result<Status, Wait> {
        loop {
            let rest = request.get(execution.offset..).unwrap_or_default();
            // The first time round, an empty request is a malformed command.
            if rest.is_empty() && execution.offset > 0 {
                return Ok(Status::Ok);
            }
            let (opcode, command, rest) = match parse_control(rest) {
                Ok(parsed) => parsed,
                Err(status) => return Ok(self.command_failed(status)),
            };
            let works = match self.execute_one(command, execution) {
                Ok(works) => works,
                Err(status) => return Ok(self.command_failed(status)),
            };
            self.stats.control.count(opcode);
            execution.offset = request.len() - rest.len();
            execution.completed += 1;
            let waits = matches!(opcode, Opcode::Invalidate | Opcode::DestroyContext);
            if waits && !works.is_empty() {
                self.stats.control.waited += 1;
                return Err(works);
            }
        }
    }

    fn command_failed(&mut self, status: Status) -> Status {
        self.stats.control.failed += 1;
        if matches!(status, Status::Malformed | Status::UnknownCommand) {
            self.stats.malformed += 1;
        }
        status
    }

    /// Executes a command. Returns the works that must be retired before the next.
    fn execute_one(
        &mut self,
        command: Control<'_>,
        execution: &mut Execution,
    ) -> Result<Wait, Status> {
        match command {
            Control::Nop => {}
            Control::CreateContext { context, root } => self.create_context(context, root)?,
            Control::DestroyContext { context } => {
                self.destroy_context(context)?;
                return Ok(self.flights.of(context));
            }
            Control::WritePtes(runs) => self.write_ptes(runs)?,
            Control::Invalidate {
                context,
                start,
                length,
            } => {
                self.contexts.get(context).ok_or(Status::BadContext)?;
                self.invalidate(context, start, length);
                return Ok(self.flights.using(context, start, length));
            }
            Control::Replay { context, through } => self.replay(context, through)?,
            Control::Cancel { context, sequence } => self.cancel(context, sequence)?,
            Control::ReadPtes(range) => {
                execution.take_pages(&range)?;
                self.read_ptes(&range, &mut execution.data)?;
            }
            Control::HarvestAccessed(range) => {
                execution.take_pages(&range)?;
                execution.value = self.harvest_accessed(&range)?;
            }
            Control::KillJob { context, fence } => self.kill_job(context, fence)?,
            Control::SetBusMasterWord(word) => self.bus_master_word = word,
        }
        Ok(Wait::new())
    }

    fn create_context(&mut self, number: u32, root: VramAddr) -> Result<(), Status> {
        if number >= self.settings.limits.max_contexts {
            return Err(Status::BadContext);
        }
        if !self.vram.contains(root, PAGE_SIZE) {
            return Err(Status::BadAddress);
        }
        if !self.contexts.create(number, root) {
            return Err(Status::ContextExists);
        }
        Ok(())
    }

    fn destroy_context(&mut self, number: u32) -> Result<(), Status> {
        let context = self.contexts.remove(number).ok_or(Status::BadContext)?;
        for state in context.fences.values() {
            let FenceState::Job(id) = state else {
                continue;
            };
            if let Some(job) = self.jobs.remove(id) {
                self.waves = self.waves.saturating_sub(job.wave_count());
                self.stats.jobs.destroyed += 1;
            }
        }
        for engine in &mut self.engines {
            engine.forget(number);
        }
        self.events.forget_context(number, &mut self.contexts);
        Ok(())
    }

    fn write_ptes(&mut self, runs: &[PteRun]) -> Result<(), Status> {
        let length = |run: &PteRun| u64::from(run.count.get()) * ENTRY_SIZE;
        // All are checked before the first is written: a command that fails did nothing.
        if !runs
            .iter()
            .all(|run| self.vram.contains(run.entry, length(run)))
        {
            return Err(Status::BadAddress);
        }
        for run in runs {
            self.vram.mark_written(run.entry, length(run));
            let mut value = run.first.get();
            for index in 0..u64::from(run.count.get()) {
                let entry = VramAddr::new(run.entry.get() + index * ENTRY_SIZE);
                if let Some(word) = self.vram.word(entry) {
                    word.store(value.to_le(), Ordering::Release);
                }
                value = value.wrapping_add(run.step.get());
            }
            self.stats.control.entries_written += u64::from(run.count.get());
        }
        Ok(())
    }

    fn invalidate(&mut self, context: u32, start: GpuVa, length: u64) {
        for engine in &mut self.engines {
            engine.mmu.invalidate(context, start, length);
        }
    }

    fn replay(&mut self, number: u32, through: u64) -> Result<(), Status> {
        let context = self.contexts.get_mut(number).ok_or(Status::BadContext)?;
        for waiter in context.faults.replay(through) {
            self.stats.faults.replayed += 1;
            self.make_ready(waiter.job, waiter.wave);
        }
        Ok(())
    }

    fn cancel(&mut self, number: u32, sequence: u64) -> Result<(), Status> {
        let context = self.contexts.get_mut(number).ok_or(Status::BadContext)?;
        let Some(record) = context.faults.cancel(sequence) else {
            return Ok(());
        };
        let failure = Failure::Cancelled {
            page: record.page,
            access: record.access,
            cause: record.cause,
        };
        // Those that want less than the fault's access try again: it may well be allowed, and if
        // not they get a fault of their own. All jobs that fail do so before, for a job can have
        // waves of both kinds, and none of a failed job goes on.
        let (cancelled, weaker): (Vec<_>, Vec<_>) = record
            .waiters
            .into_iter()
            .partition(|waiter| waiter.access == record.access);
        for waiter in cancelled {
            self.stats.faults.cancelled += 1;
            self.fail_job(waiter.job, failure);
        }
        for waiter in weaker {
            let lives = |job: &Job| job.failure.is_none();
            if self.jobs.get(&waiter.job).is_some_and(lives) {
                self.stats.faults.replayed += 1;
                self.make_ready(waiter.job, waiter.wave);
            }
        }
        Ok(())
    }

    fn read_ptes(&self, range: &PageRange, data: &mut Vec<u8>) -> Result<(), Status> {
        let context = self.contexts.get(range.context).ok_or(Status::BadContext)?;
        let mut va = range.start;
        while va.get() < range.end() {
            let (entry, pages) = match walk::find(&self.vram, context.space.root, va) {
                Ok(leaf) => (walk::page_entry(&leaf, va), 1),
                Err(miss) => {
                    let missing = miss.end_after(va).min(range.end()) - va.get();
                    (Pte::EMPTY, missing / PAGE_SIZE)
                }
            };
            for _ in 0..pages {
                data.extend_from_slice(&entry.0.to_le_bytes());
            }
            va = GpuVa::new(va.get() + pages * PAGE_SIZE);
        }
        Ok(())
    }

    fn harvest_accessed(&mut self, range: &PageRange) -> Result<u64, Status> {
        let context = self.contexts.get(range.context).ok_or(Status::BadContext)?;
        let mut count = 0;
        let mut va = range.start.get();
        while va < range.end() {
            va = match walk::find(&self.vram, context.space.root, GpuVa::new(va)) {
                Ok(leaf) => {
                    count += u64::from(walk::clear_accessed(&self.vram, &leaf));
                    (va & !(leaf.page_size() - 1)) + leaf.page_size()
                }
                Err(miss) => miss.end_after(GpuVa::new(va)),
            };
        }
        self.invalidate(range.context, range.start, range.length());
        Ok(count)
    }

    fn kill_job(&mut self, number: u32, fence: u64) -> Result<(), Status> {
        let context = self.contexts.get(number).ok_or(Status::BadContext)?;
        match context.fences.get(&fence) {
            Some(FenceState::Job(id)) => {
                let id = *id;
                self.fail_job(id, Failure::Killed);
                Ok(())
            }
            // It has ended by itself, and its event will say how.
            Some(FenceState::Ended) => Ok(()),
            None => Err(Status::NoSuchJob),
        }
    }
}

impl Execution {
    fn take_pages(&mut self, range: &PageRange) -> Result<(), Status> {
        self.pages = self
            .pages
            .checked_sub(range.count)
            .ok_or(Status::LimitExceeded)?;
        Ok(())
    }
}
