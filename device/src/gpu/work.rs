// SPDX-License-Identifier: MIT OR Apache-2.0
//! A bounded piece of physical memory work, and what came of it.
//!
//! It is what engines hand to the shell's threads, to be executed without the GPU's lock: it
//! carries its translations with it. Until it is retired, invalidations wait for it.

use super::{
    memory::{BusMaster, CopyError, Lack, Memory, NoMemory},
    mmu::Target,
    settings::WORK_STEPS,
    vram::Vram,
};
use farfault_protocol::{
    address::{GpuVa, SystemAddr},
    pte::Location,
};
use std::sync::Arc;
use vm_memory::GuestMemoryMmap;

/// What to do to memory.
#[derive(Debug)]
pub(crate) enum Operation {
    /// A turn for the shell to let others have the lock.
    Nothing,
    Fill {
        to: Vec<Target>,
        pattern: u64,
    },
    Copy {
        to: Vec<Target>,
        from: Vec<Target>,
    },
    Sum {
        from: Vec<Target>,
    },
    Add {
        to: Vec<Target>,
        addend: u64,
    },
    AtomicAdd {
        at: Location,
        addend: u64,
        times: u64,
    },
    CompareAndSwap {
        at: Location,
        expected: u64,
        desired: u64,
    },
    /// Follows pointers while they stay within one translated page.
    Chase {
        start: GpuVa,
        page: Window,
        steps: u64,
    },
    /// Pieces of a copy list.
    List(Vec<Piece>),
}

/// A translated page, or the rest of one.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Window {
    pub(crate) start: GpuVa,
    pub(crate) target: Target,
}

/// A piece of one run of a copy list.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Piece {
    /// Index of the run.
    pub(crate) run: u32,
    pub(crate) from: Source,
    pub(crate) to: Location,
    pub(crate) length: u64,
}

/// Where the bytes of a copy come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    Memory(Location),
    Pattern(u64),
}

/// What came of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// All of it was done: bytes or repetitions, and what the operation computed.
    Done { amount: u64, value: u64 },
    /// No memory that can be used is there, in the first (destination) or second (source) operand.
    NoMemory { operand: Operand, at: NoMemory },
    /// The same of a run of a copy list.
    BadRun(BadRun),
}

/// A run of a copy list that cannot be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BadRun {
    pub(crate) run: u32,
    pub(crate) lack: Lack,
}

/// Which address of an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Operand {
    Destination,
    Source,
}

/// Something to do outside of the GPU's lock; see [`Gpu::next_work`](super::Gpu::next_work).
#[derive(Debug)]
#[must_use = "work that is not executed and retired blocks invalidations for ever"]
pub struct Work {
    pub(crate) id: u64,
    pub(crate) vram: Arc<Vram>,
    pub(crate) bus_master_word: Option<SystemAddr>,
    pub(crate) operation: Operation,
    pub(crate) bytes: u64,
}

/// The end of a [`Work`], for [`Gpu::retire`](super::Gpu::retire).
#[derive(Debug)]
#[must_use = "work that is not retired blocks invalidations for ever"]
pub struct WorkDone {
    pub(crate) id: u64,
    pub(crate) outcome: Outcome,
}

impl Work {
    /// Bytes that it moves, for the shell to decide where to run it.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Does it, in RAM as it is now.
    pub fn execute(self, ram: &GuestMemoryMmap) -> WorkDone {
        let memory = Memory {
            vram: &self.vram,
            ram,
            bus_master: BusMaster::new(self.bus_master_word, ram),
        };
        WorkDone {
            id: self.id,
            outcome: self.operation.execute(memory, self.bytes),
        }
    }
}

impl Operation {
    fn execute(&self, memory: Memory<'_>, bytes: u64) -> Outcome {
        let done = |amount, value| Outcome::Done { amount, value };
        let result = match self {
            Self::Nothing => Ok(done(0, 0)),
            Self::List(pieces) => Ok(execute_list(memory, pieces, bytes)),
            Self::Copy { to, from } => {
                return match memory.copy(to, from) {
                    Ok(()) => done(bytes, 0),
                    Err(CopyError::Source(at)) => no_memory(Operand::Source, at),
                    Err(CopyError::Destination(at)) => no_memory(Operand::Destination, at),
                };
            }
            Self::Fill { to, pattern } => memory.fill(to, *pattern).map(|()| done(bytes, 0)),
            Self::Sum { from } => memory.sum(from).map(|sum| done(bytes, sum)),
            Self::Add { to, addend } => memory.add(to, *addend).map(|()| done(bytes, 0)),
            Self::AtomicAdd { at, addend, times } => memory
                .atomic_add(*at, *addend, *times)
                .map(|before| done(*times, before)),
            Self::CompareAndSwap {
                at,
                expected,
                desired,
            } => memory
                .compare_and_swap(*at, *expected, *desired)
                .map(|before| done(1, before)),
            Self::Chase { start, page, steps } => return chase(memory, *start, *page, *steps),
        };
        // An access with one address has it as its destination.
        result.unwrap_or_else(|at| no_memory(Operand::Destination, at))
    }
}

fn no_memory(operand: Operand, at: NoMemory) -> Outcome {
    Outcome::NoMemory { operand, at }
}

fn execute_list(memory: Memory<'_>, pieces: &[Piece], bytes: u64) -> Outcome {
    for piece in pieces {
        let &Piece { to, length, .. } = piece;
        let done = match piece.from {
            Source::Pattern(pattern) => memory.fill(&[Target { at: to, length }], pattern),
            Source::Memory(from) => memory.copy_run(to, from, length),
        };
        if let Err(NoMemory { lack, .. }) = done {
            return Outcome::BadRun(BadRun {
                run: piece.run,
                lack,
            });
        }
    }
    Outcome::Done {
        amount: bytes,
        value: 0,
    }
}

fn chase(memory: Memory<'_>, start: GpuVa, page: Window, steps: u64) -> Outcome {
    let mut next = start;
    let mut value = 0;
    let mut amount = 0;
    while amount < steps.min(WORK_STEPS) {
        let offset = match next.get().checked_sub(page.start.get()) {
            Some(offset) if offset < page.target.length => offset,
            _ => break,
        };
        value = match memory.load(super::mmu::advance(page.target.at, offset)) {
            Ok(value) => value,
            Err(at) => {
                let offset = next.get().wrapping_sub(start.get());
                return no_memory(Operand::Destination, NoMemory { offset, ..at });
            }
        };
        next = GpuVa::new(value).align_down(8);
        amount += 1;
    }
    Outcome::Done { amount, value }
}
