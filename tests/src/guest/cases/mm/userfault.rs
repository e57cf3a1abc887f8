// SPDX-License-Identifier: MIT OR Apache-2.0
//! A userfaultfd, by the calls of `linux/userfaultfd.h`: what the cases of [`super::userfaultfd`] ask it.

use anyhow::{Context, Result, ensure};
use farfault::PAGE_SIZE;
use farfault::arena::{Backing, Region, call_at, userfaultfd};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io,
};
use std::{fs::File, io::Read, time::Duration};

pub(super) const MISSING: u64 = 1;
pub(super) const WRITE_PROTECT: u64 = 2;

const READ_WRITE: u32 = 3;
const READ: u32 = 2;
const API: u64 = 0xaa;
const EVENT_PAGEFAULT: u8 = 0x12;
const FLAG_WRITE_PROTECT: u64 = 2;

/// A fault that somebody waits for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Fault {
    /// Of the page.
    pub(super) address: u64,
    /// The page is there, and may not be written.
    pub(super) write_protect: bool,
}

#[derive(Debug)]
pub(super) struct Userfault {
    file: File,
    argument: Region,
}

impl Userfault {
    pub(super) fn new() -> Result<Self> {
        let file = File::from(userfaultfd().context("the kernel has no userfaultfd")?);
        let userfault = Self {
            file,
            argument: Region::map(PAGE_SIZE, Backing::Small)?,
        };
        userfault.call(READ_WRITE, 0x3f, &[API, 0, 0])?;
        Ok(userfault)
    }

    pub(super) fn file(&self) -> &File {
        &self.file
    }

    fn call(&self, direction: u32, number: u32, argument: &[u64]) -> io::Result<()> {
        for (index, word) in argument.iter().enumerate() {
            self.argument.store(index, *word);
        }
        let size = size_of_val(argument) as u32;
        let number = direction << 30 | size << 16 | (API as u32) << 8 | number;
        call_at(&self.file, number, self.argument.address())
    }

    pub(super) fn register(&self, region: Region, mode: u64) -> io::Result<()> {
        let (at, length) = (region.address(), region.length() as u64);
        self.call(READ_WRITE, 0x00, &[at, length, mode, 0])
    }

    pub(super) fn unregister(&self, region: Region) -> io::Result<()> {
        self.call(READ, 0x01, &[region.address(), region.length() as u64])
    }

    /// Puts a copy of `from` where nothing is, and wakes those who wait for it. Another one may have
    /// done so.
    pub(super) fn copy(&self, to: u64, from: Region) -> io::Result<()> {
        let length = from.length() as u64;
        let copied = self.call(READ_WRITE, 0x03, &[to, from.address(), length, 0, 0]);
        match copied {
            Err(io::Errno::EXIST) => self.wake(to, length),
            other => other,
        }
    }

    fn wake(&self, at: u64, length: u64) -> io::Result<()> {
        self.call(READ, 0x02, &[at, length])
    }

    pub(super) fn write_protect(&self, region: Region, protect: bool) -> io::Result<()> {
        let (at, length) = (region.address(), region.length() as u64);
        self.call(READ_WRITE, 0x06, &[at, length, u64::from(protect)])
    }

    /// Moves pages of `from` to where nothing is.
    pub(super) fn take(&self, to: Region, from: Region) -> io::Result<()> {
        let length = from.length() as u64;
        let words = [to.address(), from.address(), length, 0, 0];
        self.call(READ_WRITE, 0x05, &words)
    }

    /// The next fault that somebody waits for, if one comes in time.
    pub(super) fn next(&self, limit: Duration) -> Result<Option<Fault>> {
        let limit = Timespec::try_from(limit)?;
        if poll(&mut [PollFd::new(&self.file, PollFlags::IN)], Some(&limit))? == 0 {
            return Ok(None);
        }
        let mut message = [0u8; 32];
        match (&self.file).read(&mut message) {
            // Whoever waited has given up, to come again.
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return Ok(None),
            length => ensure!(length? == message.len(), "a short message"),
        }
        ensure!(
            message[0] == EVENT_PAGEFAULT,
            "a message of kind {:#x}",
            message[0]
        );
        let word =
            |at: usize| -> Result<u64> { Ok(u64::from_ne_bytes(message[at..at + 8].try_into()?)) };
        Ok(Some(Fault {
            address: word(16)? & !(PAGE_SIZE as u64 - 1),
            write_protect: word(8)? & FLAG_WRITE_PROTECT != 0,
        }))
    }
}
