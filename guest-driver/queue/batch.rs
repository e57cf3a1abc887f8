// SPDX-License-Identifier: GPL-2.0
//! A control request while it is written: commands back to back (hardware manual, chapter 4).
//!
//! The memory is allocated once and used again and again, so that a request can be written where
//! nothing may be allocated.

use super::{header, Request};
use farfault_protocol::{
    address::{GpuVa, SystemAddr, VramAddr},
    command::CommandHeader,
    control::{self, Opcode, PteRun},
    pte::Pte,
    U32, U64,
};
use kernel::prelude::*;
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// Bytes of a request: a run for each entry of a table, tables above it, and what comes with them.
pub(crate) const REQUEST_BYTES: usize = 24 << 10;

/// Bytes of a reply: with the most data that a command returns.
const REPLY_BYTES: usize =
    size_of::<control::Reply>() + control::MAX_READ_PTES as usize * size_of::<u64>();

/// Commands to be sent with [`super::Channel::control`].
pub(crate) struct Batch {
    pub(super) request: Request,
    /// Where the header is of the `WritePtes` that the next run belongs to.
    open: Option<usize>,
}

impl Batch {
    /// For a request that may wait until the ring has room for it.
    pub(crate) fn new() -> Result<Self> {
        let mut batch = Self::first()?;
        batch.request.patient = true;
        Ok(batch)
    }

    /// For requests that always find room in the ring: one for each address space.
    pub(crate) fn first() -> Result<Self> {
        Ok(Self {
            request: Request::new(REQUEST_BYTES, REPLY_BYTES)?,
            open: None,
        })
    }

    /// Begins anew.
    pub(crate) fn clear(&mut self) {
        if let Ok(bytes) = self.request.bytes() {
            bytes.clear();
        }
        self.open = None;
    }

    /// Whether it holds no command.
    pub(crate) fn is_empty(&mut self) -> bool {
        self.request.bytes().map_or(true, |bytes| bytes.is_empty())
    }

    /// Whether `runs` more page-table runs and a few commands fit in.
    pub(crate) fn has_room_for(&mut self, runs: usize) -> bool {
        const SLACK: usize = 256;
        let room = self.request.bytes().map_or(0, |b| REQUEST_BYTES - b.len());
        room >= runs * size_of::<PteRun>() + SLACK
    }

    /// Of a request that was answered: the entries that [`Batch::read_ptes`] asked for.
    pub(crate) fn ptes(&self) -> impl Iterator<Item = Pte> + '_ {
        let data = self.request.reply().get(size_of::<control::Reply>()..);
        data.unwrap_or(&[])
            .chunks_exact(size_of::<u64>())
            .filter_map(|entry| U64::read_from_bytes(entry).ok())
            .map(|entry| Pte(entry.get()))
    }

    fn append<T: IntoBytes + Immutable>(&mut self, part: &T) -> Result {
        let part = part.as_bytes();
        let bytes = self.request.bytes()?;
        if bytes.len() + part.len() > REQUEST_BYTES {
            return Err(ENOSPC);
        }
        // There is room: it allocates nothing.
        bytes.extend_from_slice(part, GFP_NOWAIT)?;
        Ok(())
    }

    fn command<T: IntoBytes + Immutable>(&mut self, command: &T) -> Result {
        self.open = None;
        self.append(command)
    }

    /// An empty command.
    pub(crate) fn nop(&mut self) -> Result {
        self.command(&header::<CommandHeader>(Opcode::Nop.raw()))
    }

    pub(crate) fn create_context(&mut self, context: u32, root: VramAddr) -> Result {
        self.command(&control::CreateContext {
            header: header::<control::CreateContext>(Opcode::CreateContext.raw()),
            context: context.into(),
            reserved: U32::ZERO,
            root,
        })
    }

    pub(crate) fn destroy_context(&mut self, context: u32) -> Result {
        self.command(&control::DestroyContext {
            header: header::<control::DestroyContext>(Opcode::DestroyContext.raw()),
            context: context.into(),
            reserved: U32::ZERO,
        })
    }

    /// `count` entries from `entry` on: `first`, `first + step`, …
    pub(crate) fn write_ptes(
        &mut self,
        entry: VramAddr,
        first: Pte,
        step: u64,
        count: u32,
    ) -> Result {
        let at = match self.open {
            Some(at) => at,
            None => {
                let at = self.request.bytes()?.len();
                self.append(&header::<control::WritePtes>(Opcode::WritePtes.raw()))?;
                self.open = Some(at);
                at
            }
        };
        self.append(&PteRun {
            entry,
            first: U64::new(first.0),
            step: U64::new(step),
            count: count.into(),
            reserved: U32::ZERO,
        })?;
        let bytes = self.request.bytes()?;
        let header = CommandHeader::new(Opcode::WritePtes.raw(), (bytes.len() - at) as u32);
        let slot = bytes.get_mut(at..at + size_of::<CommandHeader>());
        slot.ok_or(EINVAL)?.copy_from_slice(header.as_bytes());
        Ok(())
    }

    pub(crate) fn invalidate(&mut self, context: u32, start: GpuVa, length: u64) -> Result {
        self.command(&control::Invalidate {
            header: header::<control::Invalidate>(Opcode::Invalidate.raw()),
            context: context.into(),
            reserved: U32::ZERO,
            start,
            length: length.into(),
        })
    }

    pub(crate) fn replay(&mut self, context: u32, through: u64) -> Result {
        self.command(&control::Replay {
            header: header::<control::Replay>(Opcode::Replay.raw()),
            context: context.into(),
            reserved: U32::ZERO,
            through: through.into(),
        })
    }

    pub(crate) fn cancel(&mut self, context: u32, sequence: u64) -> Result {
        self.command(&control::Cancel {
            header: header::<control::Cancel>(Opcode::Cancel.raw()),
            context: context.into(),
            reserved: U32::ZERO,
            sequence: sequence.into(),
        })
    }

    pub(crate) fn read_ptes(&mut self, context: u32, start: GpuVa, count: u32) -> Result {
        self.command(&control::ReadPtes {
            header: header::<control::ReadPtes>(Opcode::ReadPtes.raw()),
            context: context.into(),
            count: count.into(),
            start,
        })
    }

    pub(crate) fn harvest_accessed(&mut self, context: u32, start: GpuVa, count: u32) -> Result {
        self.command(&control::HarvestAccessed {
            header: header::<control::HarvestAccessed>(Opcode::HarvestAccessed.raw()),
            context: context.into(),
            count: count.into(),
            start,
        })
    }

    pub(crate) fn kill_job(&mut self, context: u32, fence: u64) -> Result {
        self.command(&control::KillJob {
            header: header::<control::KillJob>(Opcode::KillJob.raw()),
            context: context.into(),
            reserved: U32::ZERO,
            fence: fence.into(),
        })
    }

    pub(crate) fn set_bus_master_word(&mut self, word: SystemAddr) -> Result {
        self.command(&control::SetBusMasterWord {
            header: header::<control::SetBusMasterWord>(Opcode::SetBusMasterWord.raw()),
            word,
        })
    }
}
