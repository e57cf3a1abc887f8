// SPDX-License-Identifier: MIT OR Apache-2.0
//! The control queue (manual, chapter 4).
//!
//! A request is one or more commands, back to back. The device executes them in order and stops at
//! the first that fails. The reply is one [`Reply`], followed by the data of the commands that
//! return some. All [`ReadPtes`] and [`HarvestAccessed`] of one request together may name
//! [`MAX_PAGES_PER_REQUEST`] pages.

use crate::{
    address::{GpuVa, SystemAddr, VramAddr},
    assert_layout,
    command::CommandHeader,
    wire_enum, U32, U64,
};
use zerocopy_derive::{FromBytes, Immutable, IntoBytes, KnownLayout};

wire_enum! {
    /// Commands of the control queue.
    pub enum Opcode: u16 {
        /// Does nothing: the header alone.
        Nop = 0,
        /// [`CreateContext`].
        CreateContext = 1,
        /// [`DestroyContext`].
        DestroyContext = 2,
        /// [`WritePtes`] and its [`PteRun`]s.
        WritePtes = 3,
        /// [`Invalidate`].
        Invalidate = 4,
        /// [`Replay`].
        Replay = 5,
        /// [`Cancel`].
        Cancel = 6,
        /// [`ReadPtes`]; returns data.
        ReadPtes = 7,
        /// [`HarvestAccessed`]; returns a value.
        HarvestAccessed = 8,
        /// [`KillJob`].
        KillJob = 9,
        /// [`SetBusMasterWord`].
        SetBusMasterWord = 10,
    }
}

/// Answer to a request.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Reply {
    /// [`crate::command::Status`] of the last command executed.
    pub status: U32,
    /// How many commands succeeded: the index of the one that failed.
    pub completed: U32,
    /// Value of the last command that returned one, zero if none did.
    pub value: U64,
}

assert_layout!(Reply, size = 16, status @ 0, completed @ 4, value @ 8);

/// Makes a context: an address space of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct CreateContext {
    /// [`Opcode::CreateContext`].
    pub header: CommandHeader,
    /// The driver's choice, below `max_contexts`.
    pub context: U32,
    /// Zero.
    pub reserved: U32,
    /// Its level-3 table, aligned to 4 KiB. The device does not clear it.
    pub root: VramAddr,
}

assert_layout!(CreateContext, size = 24, header @ 0, context @ 8, reserved @ 12, root @ 16);

/// Ends a context: its jobs, parked faults and translations are gone when the reply is written, and
/// no access of it is in flight. Neither fence nor fault events of the context are written later.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct DestroyContext {
    /// [`Opcode::DestroyContext`].
    pub header: CommandHeader,
    /// The context.
    pub context: U32,
    /// Zero.
    pub reserved: U32,
}

assert_layout!(DestroyContext, size = 16, header @ 0, context @ 8, reserved @ 12);

/// Writes page-table entries, each with one 64-bit store. [`PteRun`]s follow, at least one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct WritePtes {
    /// [`Opcode::WritePtes`]; its length tells the number of runs.
    pub header: CommandHeader,
}

assert_layout!(WritePtes, size = 8, header @ 0);

/// Consecutive entries: `first`, `first + step`, `first + 2 * step`, …
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct PteRun {
    /// Where the first entry is, aligned to 8 bytes.
    pub entry: VramAddr,
    /// Its new value ([`crate::pte::Pte`]).
    pub first: U64,
    /// What each further entry adds to the one before, wrapping.
    pub step: U64,
    /// Number of entries, 1 to 512. They may not cross into another table.
    pub count: U32,
    /// Zero.
    pub reserved: U32,
}

assert_layout!(PteRun, size = 32, entry @ 0, first @ 8, step @ 16, count @ 24, reserved @ 28);

/// Longest [`PteRun`]: a whole table.
pub const MAX_PTE_RUN: u32 = 512;

/// Drops the translations of a range from every TLB. It completes when no access of an engine uses
/// one of them any more (manual, section 4.4): the invalidation promise.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Invalidate {
    /// [`Opcode::Invalidate`].
    pub header: CommandHeader,
    /// The context.
    pub context: U32,
    /// Zero.
    pub reserved: U32,
    /// Begin of the range, aligned to 4 KiB.
    pub start: GpuVa,
    /// Bytes, a multiple of 4 KiB, not zero; `start + length` may not exceed 2^48.
    pub length: U64,
}

assert_layout!(Invalidate, size = 32, header @ 0, context @ 8, reserved @ 12, start @ 16, length @ 24);

/// Lets waves that are parked on a fault try again: those of the context whose fault has a sequence
/// number up to `through`, and all whose fault was not reported because no buffer was posted. (These
/// also try again by themselves when there are buffers.) A number that nobody waits for is no error.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Replay {
    /// [`Opcode::Replay`].
    pub header: CommandHeader,
    /// The context.
    pub context: U32,
    /// Zero.
    pub reserved: U32,
    /// Last sequence number that the driver has dealt with.
    pub through: U64,
}

assert_layout!(Replay, size = 24, header @ 0, context @ 8, reserved @ 12, through @ 16);

/// Ends the jobs that wait for one fault and want its very access: they fail with
/// [`crate::event::JobStatus::Fault`]. Waves of other jobs that wait for it and want a weaker access
/// try again, for that may be allowed; if not, it is a new fault. A sequence number that nobody waits
/// for is no error.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Cancel {
    /// [`Opcode::Cancel`].
    pub header: CommandHeader,
    /// The context.
    pub context: U32,
    /// Zero.
    pub reserved: U32,
    /// Sequence number of the fault.
    pub sequence: U64,
}

assert_layout!(Cancel, size = 24, header @ 0, context @ 8, reserved @ 12, sequence @ 16);

/// Returns the leaf that maps each page of a range, as [`U64`]s, zero where none does. A huge leaf
/// is returned for each of its pages, with the page's own address. Changes nothing, not even
/// accessed bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ReadPtes {
    /// [`Opcode::ReadPtes`].
    pub header: CommandHeader,
    /// The context.
    pub context: U32,
    /// Pages, 1 to [`MAX_READ_PTES`].
    pub count: U32,
    /// First page.
    pub start: GpuVa,
}

assert_layout!(ReadPtes, size = 24, header @ 0, context @ 8, count @ 12, start @ 16);

/// Most pages of one [`ReadPtes`], and of one [`HarvestAccessed`].
pub const MAX_READ_PTES: u32 = 512;

/// Most pages of all [`ReadPtes`] and [`HarvestAccessed`] of one request together.
pub const MAX_PAGES_PER_REQUEST: u32 = 4096;

/// Counts the leaves of a range whose accessed bit is set, clears these bits, and drops the range
/// from the TLBs (without waiting), so that the next use sets them again. The count is the value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct HarvestAccessed {
    /// [`Opcode::HarvestAccessed`].
    pub header: CommandHeader,
    /// The context.
    pub context: U32,
    /// Pages, 1 to [`MAX_READ_PTES`].
    pub count: U32,
    /// First page.
    pub start: GpuVa,
}

assert_layout!(HarvestAccessed, size = 24, header @ 0, context @ 8, count @ 12, start @ 16);

/// Ends a job: it fails with [`crate::event::JobStatus::Killed`], if it has not ended by itself. Its
/// fence event comes either way, and not necessarily before the reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct KillJob {
    /// [`Opcode::KillJob`].
    pub header: CommandHeader,
    /// The context.
    pub context: U32,
    /// Zero.
    pub reserved: U32,
    /// Fence of the job.
    pub fence: U64,
}

assert_layout!(KillJob, size = 24, header @ 0, context @ 8, reserved @ 12, fence @ 16);

/// Names a word of RAM of 32 bits: engines access RAM only while it is not zero (manual, section 10.4), as a
/// PCI device does only while its Bus Master Enable is set. Needs
/// [`crate::config::Features::BUS_MASTER_WORD`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct SetBusMasterWord {
    /// [`Opcode::SetBusMasterWord`].
    pub header: CommandHeader,
    /// Where it is, aligned to 4 bytes. Zero: there is none, and engines access RAM always.
    pub word: SystemAddr,
}

assert_layout!(SetBusMasterWord, size = 16, header @ 0, word @ 8);
