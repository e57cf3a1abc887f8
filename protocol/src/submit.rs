// SPDX-License-Identifier: MIT OR Apache-2.0
//! The submit queue (manual, chapter 5). A request is one command.

use crate::{
    address::{SystemAddr, VramAddr},
    assert_layout,
    command::CommandHeader,
    wire_enum, U32, U64,
};
use zerocopy_derive::{FromBytes, Immutable, IntoBytes, KnownLayout};

wire_enum! {
    /// Commands of the submit queue.
    pub enum Opcode: u16 {
        /// Does nothing: the header alone.
        Nop = 0,
        /// [`struct@Copy`] and its [`CopyRun`]s; answered when the copies are done.
        Copy = 1,
        /// [`Launch`]; answered when the job is accepted, completed by a fence event.
        Launch = 2,
    }
}

/// Answer to a request.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Reply {
    /// [`crate::command::Status`].
    pub status: U32,
    /// Of a copy that failed: index of the first run that did. Else zero.
    pub index: U32,
}

assert_layout!(Reply, size = 8, status @ 0, index @ 4);

/// Moves bytes between physical addresses. [`CopyRun`]s follow, at least one. They run in any order
/// and at the same time; where a run's destination overlaps its own source, or an end of another run,
/// the contents are undefined. All runs are checked before the first begins. A failure after that is
/// one of RAM that went away meanwhile: the contents of all destinations are undefined then.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Copy {
    /// [`Opcode::Copy`]; its length tells the number of runs.
    pub header: CommandHeader,
}

assert_layout!(Copy, size = 8, header @ 0);

wire_enum! {
    /// What an end of a [`CopyRun`] is.
    pub enum CopyAperture: u8 {
        /// A [`VramAddr`].
        Vram = 0,
        /// A [`SystemAddr`].
        System = 1,
        /// Of a source only: a 64-bit pattern, repeated over the destination, which is then aligned
        /// to 8 bytes, as is the length.
        Pattern = 2,
    }
}

/// One contiguous piece of a [`struct@Copy`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct CopyRun {
    /// Address or pattern, by `source_aperture`.
    pub source: U64,
    /// Address, by `destination_aperture`.
    pub destination: U64,
    /// Bytes, 1 to `max_copy_run`.
    pub length: U32,
    /// [`CopyAperture`].
    pub source_aperture: u8,
    /// [`CopyAperture`], not `Pattern`.
    pub destination_aperture: u8,
    /// Zero.
    pub reserved: [u8; 10],
}

assert_layout!(
    CopyRun, size = 32,
    source @ 0, destination @ 8, length @ 16, source_aperture @ 20, destination_aperture @ 21,
    reserved @ 22,
);

impl CopyRun {
    const fn new(source: (u64, CopyAperture), to: (u64, CopyAperture), length: u32) -> Self {
        Self {
            source: U64::new(source.0),
            destination: U64::new(to.0),
            length: U32::new(length),
            source_aperture: source.1.raw(),
            destination_aperture: to.1.raw(),
            reserved: [0; 10],
        }
    }

    /// RAM to VRAM.
    pub const fn upload(source: SystemAddr, destination: VramAddr, length: u32) -> Self {
        Self::new(
            (source.get(), CopyAperture::System),
            (destination.get(), CopyAperture::Vram),
            length,
        )
    }

    /// VRAM to RAM.
    pub const fn download(source: VramAddr, destination: SystemAddr, length: u32) -> Self {
        Self::new(
            (source.get(), CopyAperture::Vram),
            (destination.get(), CopyAperture::System),
            length,
        )
    }

    /// A pattern over VRAM.
    pub const fn fill(pattern: u64, destination: VramAddr, length: u32) -> Self {
        Self::new(
            (pattern, CopyAperture::Pattern),
            (destination.get(), CopyAperture::Vram),
            length,
        )
    }
}

wire_enum! {
    /// The built-in kernels, and their arguments in order. Addresses and lengths are multiples of 8
    /// bytes; memory is seen as little-endian 64-bit words. Lengths are shared out among the waves
    /// in whole pages (manual, section 5.4).
    pub enum Kernel: u32 {
        /// (destination, length, pattern): stores the pattern to each word. Copy engine.
        Fill = 1,
        /// (destination, source, length): copies; the ranges may not overlap. Copy engine.
        Copy = 2,
        /// (source, length): the result is the wrapping sum of the words.
        Sum = 3,
        /// (destination, length, addend): adds to each word, wrapping, not atomically.
        Add = 4,
        /// (destination, addend, repeat): each wave adds to the one word `repeat` times,
        /// atomically. The result is the word's value before the last addition of the last wave.
        AtomicAdd = 5,
        /// (destination, expected, desired): one wave; stores `desired` if the word is `expected`,
        /// atomically. The result is the word before.
        CompareAndSwap = 6,
        /// (start, steps): one wave; reads a word, takes it for the next address without regard to
        /// its three lowest bits, and so on. The result is the last word read.
        PointerChase = 7,
    }
}

/// Number of arguments that a [`Launch`] carries; a kernel's unused ones are zero, or it is
/// [`crate::command::Status::Malformed`].
pub const KERNEL_ARGUMENTS: usize = 4;

/// Starts a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Launch {
    /// [`Opcode::Launch`].
    pub header: CommandHeader,
    /// The context whose addresses the job uses.
    pub context: U32,
    /// [`Kernel`].
    pub kernel: U32,
    /// The driver's name for the job, unique in the context until its fence event is written.
    pub fence: U64,
    /// Waves to share the work among, 1 to `max_waves`; 1 for a kernel with one wave.
    pub waves: U32,
    /// Zero.
    pub reserved: U32,
    /// By [`Kernel`].
    pub arguments: [U64; KERNEL_ARGUMENTS],
}

assert_layout!(
    Launch, size = 64,
    header @ 0, context @ 8, kernel @ 12, fence @ 16, waves @ 24, reserved @ 28, arguments @ 32,
);
