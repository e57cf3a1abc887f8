// SPDX-License-Identifier: MIT OR Apache-2.0
//! The event queue (manual, chapter 6). The device writes one event of [`EVENT_SIZE`] bytes to each
//! buffer that the driver posted; the buffers posted are the fault buffer.
//!
//! Fences and errors that find no buffer wait for one. Buffers that are posted go to waiting fences
//! first, then to [`ErrorCode::FaultOverflow`], then to [`ErrorCode::MemoryPoisoned`], then to
//! [`ErrorCode::BadDescriptor`], then to faults.
//! A fault does not wait: without a buffer it is not reported, and its wave tries again when there is
//! one.

use crate::{address::GpuVa, assert_layout, wire_enum, U16, U32, U64};
use zerocopy_derive::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Bytes of every event, and least bytes of a buffer for one.
pub const EVENT_SIZE: usize = 64;

wire_enum! {
    /// Kinds of events.
    pub enum EventKind: u16 {
        /// [`FaultEvent`].
        Fault = 1,
        /// [`FenceEvent`].
        Fence = 2,
        /// [`ErrorEvent`].
        Error = 3,
    }
}

/// What each event begins with.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct EventHeader {
    /// [`EventKind`].
    pub kind: U16,
    /// Zero.
    pub reserved: U16,
    /// Context that it is about; zero for an error that is about none.
    pub context: U32,
}

assert_layout!(EventHeader, size = 8, kind @ 0, reserved @ 2, context @ 4);

wire_enum! {
    /// What a wave wanted to do to memory, from the weakest to the strongest: who may do one may do
    /// those before it.
    pub enum Access: u8 {
        /// A load.
        Read = 1,
        /// A store.
        Write = 2,
        /// An atomic read-modify-write.
        Atomic = 3,
    }
}

wire_enum! {
    /// Why a translation failed.
    pub enum FaultCause: u8 {
        /// An entry on the way is not valid.
        NotPresent = 1,
        /// The leaf does not allow stores.
        ReadOnly = 2,
        /// The leaf does not allow atomics.
        NotAtomic = 3,
        /// An entry has a reserved bit set, or an address beyond VRAM.
        BadEntry = 4,
        /// The address has more than 48 bits.
        BadAddress = 5,
    }
}

wire_enum! {
    /// Who made an access.
    pub enum Engine: u8 {
        /// The compute engine.
        Compute = 0,
        /// The copy engine.
        Copy = 1,
    }
}

/// A replayable fault: the wave is parked until [`crate::control::Replay`],
/// [`crate::control::Cancel`], or the end of its job. Others that miss the same page for the same or a
/// weaker access wait with it and are not reported. When nobody waits any more, the fault is
/// forgotten.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct FaultEvent {
    /// [`EventKind::Fault`].
    pub header: EventHeader,
    /// The page, aligned to 4 KiB.
    pub page: GpuVa,
    /// Grows by one with each fault that the device reports, of all contexts; starts at 1.
    pub sequence: U64,
    /// Fence of the job that faulted first.
    pub fence: U64,
    /// Index of its wave.
    pub wave: U32,
    /// [`Access`].
    pub access: u8,
    /// [`FaultCause`].
    pub cause: u8,
    /// [`Engine`].
    pub engine: u8,
    /// Zero.
    pub reserved: [u8; 25],
}

assert_layout!(
    FaultEvent, size = EVENT_SIZE,
    header @ 0, page @ 8, sequence @ 16, fence @ 24, wave @ 32, access @ 36, cause @ 37,
    engine @ 38, reserved @ 39,
);

wire_enum! {
    /// How a job ended.
    pub enum JobStatus: u32 {
        /// It did all that it asks.
        Ok = 0,
        /// The driver cancelled a fault that it waited for: `page`, `access` and `cause` are the
        /// fault's.
        Fault = 1,
        /// The driver killed it.
        Killed = 2,
        /// A translation led to a system address where no RAM is: `page` tells where.
        BusError = 3,
        /// A translation led to VRAM that has lost its contents: `page` tells where
        /// ([`crate::config::Features::MEMORY_ERRORS`]).
        MemoryError = 4,
    }
}

/// The end of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct FenceEvent {
    /// [`EventKind::Fence`].
    pub header: EventHeader,
    /// The job.
    pub fence: U64,
    /// What the kernel computes ([`crate::submit::Kernel`]); zero if it failed.
    pub result: U64,
    /// Of a job that failed with [`JobStatus::Fault`], [`JobStatus::BusError`] or
    /// [`JobStatus::MemoryError`], the page that it could not reach; zero else.
    pub page: GpuVa,
    /// [`JobStatus`].
    pub status: U32,
    /// [`Access`] of such a job, zero else.
    pub access: u8,
    /// [`FaultCause`] of a job with [`JobStatus::Fault`], zero else.
    pub cause: u8,
    /// Zero.
    pub reserved: [u8; 26],
}

assert_layout!(
    FenceEvent, size = EVENT_SIZE,
    header @ 0, fence @ 8, result @ 16, page @ 24, status @ 32, access @ 36, cause @ 37,
    reserved @ 38,
);

wire_enum! {
    /// What an [`ErrorEvent`] reports.
    pub enum ErrorCode: u32 {
        /// Faults found no buffer since the last event of this code; `detail` is how many. Their
        /// waves try again when there are buffers, or at a replay of their context. `context` is
        /// zero. Between two events of this code there is a fault.
        FaultOverflow = 1,
        /// The driver put a chain on a queue that the device cannot answer (no room for the reply, an
        /// address outside of RAM, …): it was returned with length zero. Or the indices of the ring
        /// make no sense: it stands still until they do. `detail` is the queue. One event can tell of
        /// several.
        BadDescriptor = 2,
        /// A page of VRAM has lost its contents; `detail` is its address. It fails each access until
        /// the device is reset. Written before any reply or fence that tells of such a failure, as
        /// long as there are buffers ([`crate::config::Features::MEMORY_ERRORS`]).
        MemoryPoisoned = 3,
    }
}

/// Something that the driver must know and that no reply can tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ErrorEvent {
    /// [`EventKind::Error`].
    pub header: EventHeader,
    /// [`ErrorCode`].
    pub code: U32,
    /// Zero.
    pub reserved: U32,
    /// By `code`.
    pub detail: U64,
    /// Zero.
    pub reserved2: [u8; 40],
}

assert_layout!(
    ErrorEvent, size = EVENT_SIZE,
    header @ 0, code @ 8, reserved @ 12, detail @ 16, reserved2 @ 24,
);
