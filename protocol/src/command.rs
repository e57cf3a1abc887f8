// SPDX-License-Identifier: MIT OR Apache-2.0
//! Framing of requests, and the status of their replies (manual, chapter 3).
//!
//! A request is one descriptor chain: commands to read, then room for the reply. A chain that cannot
//! be answered (section 3.6 lists them; among them one without room for the shortest reply) is not
//! executed and comes back with length zero at once, perhaps before chains ahead of it. One whose
//! room is too small only for the data of its commands comes back so after they were executed. Both
//! are told by an [`crate::event::ErrorCode::BadDescriptor`]. A request beyond `max_request` is
//! answered with [`Status::LimitExceeded`], perhaps also before requests ahead of it.

use crate::{assert_layout, wire_enum, U16, U32};
use zerocopy_derive::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Most descriptors of one chain, indirect ones included.
pub const MAX_DESCRIPTORS: usize = 1024;

/// What each command begins with.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct CommandHeader {
    /// [`crate::control::Opcode`] or [`crate::submit::Opcode`], by the queue.
    pub opcode: U16,
    /// Zero.
    pub reserved: U16,
    /// Bytes of the whole command, with this header; a multiple of 8.
    pub length: U32,
}

assert_layout!(CommandHeader, size = 8, opcode @ 0, reserved @ 2, length @ 4);

impl CommandHeader {
    /// A header of a command of `length` bytes in all.
    pub const fn new(opcode: u16, length: u32) -> Self {
        Self {
            opcode: U16::new(opcode),
            reserved: U16::new(0),
            length: U32::new(length),
        }
    }
}

wire_enum! {
    /// How a request ended.
    pub enum Status: u32 {
        /// It did all that it asks.
        Ok = 0,
        /// The opcode is none of this queue.
        UnknownCommand = 1,
        /// A length is wrong, a list is empty, or a reserved field or an unused argument is not
        /// zero.
        Malformed = 2,
        /// The context does not exist, or its number is beyond the limit.
        BadContext = 3,
        /// A context with this number exists.
        ContextExists = 4,
        /// An address, or a range from there on, is outside of VRAM, of RAM or of the virtual
        /// addresses.
        BadAddress = 5,
        /// An address or length is not aligned as the command demands.
        Misaligned = 6,
        /// A number is above a limit of the configuration space or of the command.
        LimitExceeded = 7,
        /// A launch: as many jobs or waves exist as the device has room for. Try again after a
        /// fence.
        Busy = 8,
        /// A field has a value that the command does not know, or is zero where that makes no
        /// sense (a count, a length of a range, a number of waves).
        BadArgument = 9,
        /// The job does not exist (any more).
        NoSuchJob = 10,
        /// A copy: an end of a run is in VRAM that has lost its contents. The contents of all
        /// destinations are undefined ([`crate::config::Features::MEMORY_ERRORS`]).
        Poisoned = 11,
    }
}
