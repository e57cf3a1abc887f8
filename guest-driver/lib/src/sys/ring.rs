// SPDX-License-Identifier: MIT OR Apache-2.0
//! An `io_uring` with fixed buffers of a [`Region`]: the kernel pins these pages for as long as the ring
//! has them. For tests of the driver, with the feature `arena`.

use super::arena::Region;
use io_uring::{IoUring, opcode, types::Fd};
use std::{
    io,
    os::fd::{AsFd, AsRawFd},
};

/// A ring that has one region pinned. The kernel lets go of it when this is dropped.
pub struct PinnedBuffer {
    ring: IoUring,
    region: Region,
}

fn ring_of_one() -> io::Result<IoUring> {
    IoUring::new(1)
}

impl PinnedBuffer {
    /// Whether the kernel has rings, and lets us have one.
    pub fn is_supported() -> bool {
        ring_of_one().is_ok()
    }

    /// Pins a region.
    pub fn new(region: Region) -> io::Result<Self> {
        let ring = ring_of_one()?;
        let buffer = libc::iovec {
            iov_base: region.pointer(),
            iov_len: region.length(),
        };
        // SAFETY: The arena's memory is known by address only, so the kernel may read and write it at
        // any time. If it is unmapped, the ring keeps its pages.
        unsafe { ring.submitter().register_buffers(&[buffer]) }?;
        Ok(Self { ring, region })
    }

    /// The kernel writes the region to the begin of a file; how many bytes.
    pub fn write_to(&mut self, file: impl AsFd) -> io::Result<usize> {
        let (at, length) = (self.region.pointer().cast_const().cast(), self.length());
        let file = Fd(file.as_fd().as_raw_fd());
        self.run(&opcode::WriteFixed::new(file, at, length, 0).build())
    }

    /// The kernel fills the region from the begin of a file; how many bytes.
    pub fn read_from(&mut self, file: impl AsFd) -> io::Result<usize> {
        let (at, length) = (self.region.pointer().cast(), self.length());
        let file = Fd(file.as_fd().as_raw_fd());
        self.run(&opcode::ReadFixed::new(file, at, length, 0).build())
    }

    fn length(&self) -> u32 {
        // A ring takes no buffer that is larger.
        u32::try_from(self.region.length()).unwrap_or(u32::MAX)
    }

    fn run(&mut self, entry: &io_uring::squeue::Entry) -> io::Result<usize> {
        // SAFETY: The entry's file is open until the answer has come, which is waited for, and its
        // memory is the registered buffer.
        unsafe { self.ring.submission().push(entry) }.map_err(io::Error::other)?;
        self.ring.submit_and_wait(1)?;
        let answer = self.ring.completion().next();
        let result = answer.map_or(-libc::EIO, |answer| answer.result());
        usize::try_from(result).map_err(|_| io::Error::from_raw_os_error(-result))
    }
}
