// SPDX-License-Identifier: MIT OR Apache-2.0
//! The virtio configuration space (manual, chapter 2): facts about the device, read-only, to be
//! read once.

use crate::{assert_layout, U32, U64};
use zerocopy_derive::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// The virtio device number. No specification or driver in Linux uses it; it is [`MAGIC`] that
/// tells this GPU from another device with the same number.
pub const VIRTIO_ID: u32 = 38;
/// First bytes of the configuration space.
pub const MAGIC: [u8; 8] = *b"FARFAULT";
/// Raised by a change that an existing driver cannot use.
pub const VERSION_MAJOR: u32 = 1;
/// Raised by an addition.
pub const VERSION_MINOR: u32 = 2;

/// The queues, by their virtio index.
pub mod queue {
    /// Requests about contexts, page tables, invalidations and faults ([`crate::control`]).
    pub const CONTROL: u16 = 0;
    /// Copies and jobs ([`crate::submit`]).
    pub const SUBMIT: u16 = 1;
    /// Buffers for the device to write events to ([`crate::event`]).
    pub const EVENT: u16 = 2;
    /// How many queues there are.
    pub const COUNT: u16 = 3;
}

/// What the device can do beyond version 1.0, and which optional parts of it are there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Features(pub u64);

impl Features {
    /// Leaves of 2 MiB (chapter 7).
    pub const HUGE_PAGES: u64 = 1 << 0;
    /// Accessed and dirty bits are kept in the page tables (chapter 7).
    pub const ACCESSED_DIRTY: u64 = 1 << 1;
    /// Atomic accesses, and the page-table bit that allows them (chapter 7).
    pub const ATOMICS: u64 = 1 << 2;
    /// Failed memory is reported: [`crate::event::ErrorCode::MemoryPoisoned`],
    /// [`crate::event::JobStatus::MemoryError`], [`crate::command::Status::Poisoned`]. Since 1.1.
    pub const MEMORY_ERRORS: u64 = 1 << 3;
    /// The driver can keep engines from RAM without an answer of the device:
    /// [`crate::control::SetBusMasterWord`]. Since 1.2.
    pub const BUS_MASTER_WORD: u64 = 1 << 4;

    /// Whether all bits of `mask` are set.
    pub const fn has(self, mask: u64) -> bool {
        self.0 & mask == mask
    }
}

/// The configuration space. Multi-byte fields are little-endian.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ConfigSpace {
    /// [`MAGIC`].
    pub magic: [u8; 8],
    /// [`VERSION_MAJOR`].
    pub version_major: U32,
    /// [`VERSION_MINOR`].
    pub version_minor: U32,
    /// [`Features`].
    pub features: U64,
    /// Bytes of VRAM, a multiple of 2 MiB.
    pub vram_size: U64,
    /// A number that tells this GPU from the others of one machine.
    pub serial: U64,
    /// Contexts have the numbers 0 to this, exclusive.
    pub max_contexts: U32,
    /// Jobs at a time, of all contexts, each until its fence event is written to a buffer.
    pub max_jobs: U32,
    /// Waves at a time, of all jobs; one that has ended counts until its job has.
    pub max_waves: U32,
    /// Bytes of a request on the control or submit queue, reply not counted.
    pub max_request: U32,
    /// Bytes that one copy run may move.
    pub max_copy_run: U32,
    /// Zero.
    pub reserved: [u8; 196],
}

assert_layout!(
    ConfigSpace, size = 256,
    magic @ 0, version_major @ 8, version_minor @ 12, features @ 16, vram_size @ 24, serial @ 32,
    max_contexts @ 40, max_jobs @ 44, max_waves @ 48, max_request @ 52, max_copy_run @ 56,
    reserved @ 60,
);

impl ConfigSpace {
    /// [`Self::features`] as a set.
    pub const fn features(&self) -> Features {
        Features(self.features.get())
    }
}
