// SPDX-License-Identifier: MIT OR Apache-2.0
//! Commands of both request queues, as a driver without manners writes them.

use crate::number::{Number, Page, Small};
use arbitrary::Arbitrary;
use farfault_protocol::{
    U32, U64,
    address::{GpuVa, SystemAddr, VramAddr},
    command::CommandHeader,
    control::{
        Cancel, CreateContext, DestroyContext, HarvestAccessed, Invalidate, KillJob, Opcode,
        PteRun, ReadPtes, Replay, SetBusMasterWord,
    },
    submit::{self, CopyRun, Launch},
};
use zerocopy::{Immutable, IntoBytes};

/// A command of the control queue.
#[derive(Arbitrary, Debug)]
pub(crate) enum Control {
    Nop,
    CreateContext(Small, Page),
    DestroyContext(Small),
    WritePtes(Vec<Ptes>),
    Invalidate(Small, Page, Page),
    Replay(Small, Number),
    Cancel(Small, Number),
    ReadPtes(Small, Page, Small),
    HarvestAccessed(Small, Page, Small),
    KillJob(Small, Small),
    /// A header that need not tell the truth, and what follows it.
    Garbage(u16, Number, Vec<u8>),
    SetBusMasterWord(Number),
}

/// A run of entries.
#[derive(Arbitrary, Debug)]
pub(crate) struct Ptes {
    entry: Number,
    address: Page,
    flags: u8,
    step: Number,
    count: Small,
}

/// A command of the submit queue.
#[derive(Arbitrary, Debug)]
pub(crate) enum Submit {
    Nop,
    Copy(Vec<Run>),
    Launch(Job),
    Garbage(u16, Number, Vec<u8>),
}

/// A run of a copy.
#[derive(Arbitrary, Debug)]
pub(crate) struct Run {
    source: Number,
    destination: Number,
    length: Number,
    apertures: (u8, u8),
}

/// A launch.
#[derive(Arbitrary, Debug)]
pub(crate) struct Job {
    context: Small,
    kernel: u8,
    fence: Small,
    waves: Small,
    arguments: [Number; 4],
    /// How many of them are not zero.
    count: u8,
}

fn command<T: IntoBytes + Immutable>(
    opcode: u16,
    make: impl FnOnce(CommandHeader) -> T,
) -> Vec<u8> {
    let header = CommandHeader::new(opcode, size_of::<T>() as u32);
    make(header).as_bytes().to_vec()
}

fn list<T: IntoBytes + Immutable>(opcode: u16, items: impl Iterator<Item = T>) -> Vec<u8> {
    let mut bytes = vec![0; 8];
    for item in items {
        bytes.extend_from_slice(item.as_bytes());
    }
    let header = CommandHeader::new(opcode, bytes.len() as u32);
    bytes[..8].copy_from_slice(header.as_bytes());
    bytes
}

fn garbage(opcode: u16, length: Number, rest: &[u8]) -> Vec<u8> {
    let header = CommandHeader::new(opcode % 16, length.0 as u32);
    [header.as_bytes(), rest].concat()
}

impl Control {
    /// Its bytes.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let zero = U32::new(0);
        let number = |small: Small| U32::new(small.0);
        match *self {
            Self::Nop => command(Opcode::Nop.raw(), |header| header),
            Self::CreateContext(context, root) => {
                command(Opcode::CreateContext.raw(), |header| CreateContext {
                    header,
                    context: number(context),
                    reserved: zero,
                    root: VramAddr::new(root.0),
                })
            }
            Self::DestroyContext(context) => {
                command(Opcode::DestroyContext.raw(), |header| DestroyContext {
                    header,
                    context: number(context),
                    reserved: zero,
                })
            }
            Self::WritePtes(ref runs) => list(Opcode::WritePtes.raw(), runs.iter().map(Ptes::run)),
            Self::Invalidate(context, start, length) => {
                command(Opcode::Invalidate.raw(), |header| Invalidate {
                    header,
                    context: number(context),
                    reserved: zero,
                    start: GpuVa::new(start.0),
                    length: U64::new(length.0),
                })
            }
            Self::Replay(context, through) => command(Opcode::Replay.raw(), |header| Replay {
                header,
                context: number(context),
                reserved: zero,
                through: U64::new(through.0),
            }),
            Self::Cancel(context, sequence) => command(Opcode::Cancel.raw(), |header| Cancel {
                header,
                context: number(context),
                reserved: zero,
                sequence: U64::new(sequence.0),
            }),
            Self::ReadPtes(context, start, count) => {
                command(Opcode::ReadPtes.raw(), |header| ReadPtes {
                    header,
                    context: number(context),
                    count: number(count),
                    start: GpuVa::new(start.0),
                })
            }
            Self::HarvestAccessed(context, start, count) => {
                command(Opcode::HarvestAccessed.raw(), |header| HarvestAccessed {
                    header,
                    context: number(context),
                    count: number(count),
                    start: GpuVa::new(start.0),
                })
            }
            Self::KillJob(context, fence) => command(Opcode::KillJob.raw(), |header| KillJob {
                header,
                context: number(context),
                reserved: zero,
                fence: U64::new(fence.0.into()),
            }),
            Self::Garbage(opcode, length, ref rest) => garbage(opcode, length, rest),
            Self::SetBusMasterWord(word) => {
                command(Opcode::SetBusMasterWord.raw(), |header| SetBusMasterWord {
                    header,
                    word: SystemAddr::new(word.0),
                })
            }
        }
    }
}

impl Ptes {
    fn run(&self) -> PteRun {
        PteRun {
            entry: VramAddr::new(self.entry.0),
            first: U64::new(self.address.0 | u64::from(self.flags)),
            step: U64::new(self.step.0),
            count: U32::new(self.count.0),
            reserved: U32::new(0),
        }
    }
}

impl Submit {
    /// Its bytes.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        match self {
            Self::Nop => command(submit::Opcode::Nop.raw(), |header| header),
            Self::Copy(runs) => list(submit::Opcode::Copy.raw(), runs.iter().map(Run::run)),
            Self::Launch(job) => job.bytes(),
            Self::Garbage(opcode, length, rest) => garbage(*opcode, *length, rest),
        }
    }
}

impl Run {
    fn run(&self) -> CopyRun {
        CopyRun {
            source: U64::new(self.source.0),
            destination: U64::new(self.destination.0),
            length: U32::new(self.length.0 as u32),
            source_aperture: self.apertures.0 % 4,
            destination_aperture: self.apertures.1 % 3,
            reserved: [0; 10],
        }
    }
}

impl Job {
    /// The bytes of its launch.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let argument = |index: usize| {
            let argument = self.arguments.get(index).map_or(0, |number| number.0);
            U64::new(if index < usize::from(self.count % 5) {
                argument
            } else {
                0
            })
        };
        command(submit::Opcode::Launch.raw(), |header| Launch {
            header,
            context: U32::new(self.context.0),
            kernel: U32::new(u32::from(self.kernel % 9)),
            fence: U64::new(self.fence.0.into()),
            waves: U32::new(self.waves.0),
            reserved: U32::new(0),
            arguments: std::array::from_fn(argument),
        })
    }
}
