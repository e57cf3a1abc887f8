// SPDX-License-Identifier: MIT OR Apache-2.0
//! The submit queue (manual, chapter 5): copy lists, and launches of jobs.

use super::{
    Completion, Gpu, Outcome, Queue,
    command::{BadSubmit, Submit, parse_submit},
    context::FenceState,
    copy::ListEnd,
    job::Job,
    kernels::Plan,
    memory::{BusMaster, Lack, Memory},
    settings::MAX_WAITING_REQUESTS,
    work::{BadRun, Piece, Source},
};
use farfault_protocol::{U32, command::Status, pte::Location, submit::Reply};
use vm_memory::GuestMemoryMmap;
use zerocopy::IntoBytes;

fn reply(status: Status, index: u32) -> Vec<u8> {
    let reply = Reply {
        status: U32::new(status.raw()),
        index: U32::new(index),
    };
    reply.as_bytes().to_vec()
}

impl Gpu {
    /// Executes a request of the submit queue: all the bytes that the driver sent. `ram` tells
    /// which addresses a copy list may name.
    pub fn submit(&mut self, request: &[u8], tag: u64, ram: &GuestMemoryMmap) -> Outcome {
        self.stats.submit.requests += 1;
        match self.try_submit(request, tag, ram) {
            Ok(outcome) => outcome,
            Err(BadSubmit { status, index }) => {
                self.stats.submit.failed += 1;
                if matches!(status, Status::Malformed | Status::UnknownCommand) {
                    self.stats.malformed += 1;
                }
                Outcome::Done(reply(status, index))
            }
        }
    }

    fn try_submit(
        &mut self,
        request: &[u8],
        tag: u64,
        ram: &GuestMemoryMmap,
    ) -> Result<Outcome, BadSubmit> {
        let limits = self.settings.limits;
        if request.len() > limits.max_request as usize {
            return Err(Status::LimitExceeded.into());
        }
        if self.resetting {
            return Err(Status::Busy.into());
        }
        let (opcode, command) = parse_submit(request, &limits)?;
        let outcome = match command {
            Submit::Nop => Outcome::Done(reply(Status::Ok, 0)),
            Submit::Copy(runs) => self.begin_copy(runs, tag, ram)?,
            Submit::Launch {
                context,
                fence,
                plan,
            } => {
                self.launch(context, fence, plan)?;
                Outcome::Done(reply(Status::Ok, 0))
            }
        };
        self.stats.submit.count(opcode);
        Ok(outcome)
    }

    fn begin_copy(
        &mut self,
        runs: Vec<Piece>,
        tag: u64,
        ram: &GuestMemoryMmap,
    ) -> Result<Outcome, BadSubmit> {
        let memory = Memory {
            vram: &self.vram,
            ram,
            bus_master: BusMaster::Always,
        };
        for run in &runs {
            let source_ok = match run.from {
                Source::Memory(from) => memory.contains(from, run.length),
                Source::Pattern(_) => true,
            };
            if !source_ok || !memory.contains(run.to, run.length) {
                return Err(BadSubmit {
                    status: Status::BadAddress,
                    index: run.run,
                });
            }
        }
        if self.copies.len() >= MAX_WAITING_REQUESTS {
            return Err(Status::Busy.into());
        }
        for run in &runs {
            self.count_run(run);
        }
        if !self.copies_on {
            return Ok(Outcome::Done(reply(Status::Ok, 0)));
        }
        self.copies.begin(tag, runs);
        Ok(Outcome::Pending)
    }

    fn count_run(&mut self, run: &Piece) {
        let stats = &mut self.stats.copy;
        stats.runs += 1;
        let bytes = match (run.from, run.to) {
            (Source::Pattern(_), _) => &mut stats.bytes_filled,
            (Source::Memory(Location::System(_)), Location::Vram(_)) => &mut stats.bytes_to_vram,
            (Source::Memory(Location::Vram(_)), Location::System(_)) => &mut stats.bytes_to_system,
            (Source::Memory(_), _) => &mut stats.bytes_within,
        };
        *bytes += run.length;
    }

    /// Answers a copy list whose last piece is done.
    pub(super) fn complete_list(&mut self, end: ListEnd) {
        let reply = match end.failed {
            None => reply(Status::Ok, 0),
            Some(BadRun { run, lack }) => {
                self.stats.submit.failed += 1;
                let status = match lack {
                    Lack::Absent => Status::BadAddress,
                    Lack::Poisoned => Status::Poisoned,
                };
                reply(status, run)
            }
        };
        self.completions.push_back(Completion {
            queue: Queue::Submit,
            tag: end.tag,
            reply,
        });
    }

    fn launch(&mut self, number: u32, fence: u64, plan: Plan) -> Result<(), Status> {
        let context = self.contexts.get_mut(number).ok_or(Status::BadContext)?;
        if context.fences.contains_key(&fence) {
            return Err(Status::BadArgument);
        }
        let limits = &self.settings.limits;
        let jobs = self.jobs.len() + self.events.waiting_fences();
        if jobs >= limits.max_jobs as usize || self.waves + plan.waves() > limits.max_waves {
            return Err(Status::Busy);
        }
        let id = self.next_job;
        self.next_job += 1;
        self.waves += plan.waves();
        context.fences.insert(fence, FenceState::Job(id));
        self.jobs.insert(id, Job::new(number, fence, plan));
        self.stats.jobs.launched += 1;
        for wave in 0..plan.waves() {
            self.make_ready(id, wave);
        }
        Ok(())
    }
}
