// SPDX-License-Identifier: MIT OR Apache-2.0
//! A node `/dev/hmm_dmirrorN`, by the calls of the kernel's `lib/test_hmm_uapi.h`.

use anyhow::Result;
use farfault::PAGE_SIZE;
use farfault::arena::{Backing, Region, call_at};
use rustix::io::{self, Errno};
use std::{
    fs::{File, OpenOptions},
    os::fd::AsFd,
};

/// The driver may fail to allocate once.
pub(crate) const FAIL_ALLOC: u64 = 1;

/// The page is in this node's VRAM.
pub(crate) const LOCAL: u8 = 0x20;
pub(crate) const WRITE: u8 = 0x02;
/// The CPU's page tables map it as 2 MiB.
pub(crate) const HUGE: u8 = 0x04;

/// What a call can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    Read,
    Write,
    ToDevice,
    ToSystem,
    Snapshot,
    Exclusive,
    CheckExclusive,
    Release,
    Flags,
}

impl Action {
    /// All of them, in the order of their numbers.
    pub(crate) const ALL: [Self; 9] = [
        Self::Read,
        Self::Write,
        Self::ToDevice,
        Self::ToSystem,
        Self::Snapshot,
        Self::Exclusive,
        Self::CheckExclusive,
        Self::Release,
        Self::Flags,
    ];

    /// `_IOWR('H', number, struct hmm_dmirror_cmd)`.
    pub(crate) fn opcode(self) -> u32 {
        const BOTH: u32 = 3;
        let size = (COMMAND_WORDS * size_of::<u64>()) as u32;
        BOTH << 30 | size << 16 | u32::from(b'H') << 8 | self as u32
    }
}

/// Words of `struct hmm_dmirror_cmd`: address, pointer, pages, copied, faults.
const COMMAND_WORDS: usize = 5;

/// What a call did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Done {
    pub(crate) pages: u64,
    pub(crate) faults: u64,
}

/// An open node, with memory for the arguments of its calls.
#[derive(Debug)]
pub(crate) struct Mirror {
    file: File,
    command: Region,
}

impl Mirror {
    pub(crate) fn open(number: u32) -> Result<Self> {
        let path = format!("/dev/hmm_dmirror{number}");
        let file = OpenOptions::new().read(true).write(true).open(path)?;
        let command = Region::map(PAGE_SIZE, Backing::Small)?;
        Ok(Self { file, command })
    }

    /// A call on a range, with memory of ours where it has a pointer.
    pub(crate) fn call(&self, action: Action, range: Region, buffer: Region) -> io::Result<Done> {
        let pages = range.pages().count() as u64;
        self.call_with(action, range.address(), buffer.address(), pages)
    }

    pub(crate) fn call_with(
        &self,
        action: Action,
        address: u64,
        pointer: u64,
        pages: u64,
    ) -> Result<Done, Errno> {
        let words = [address, pointer, pages, u64::MAX, u64::MAX];
        for (index, word) in words.into_iter().enumerate() {
            self.command.store(index, word);
        }
        call_at(&self.file, action.opcode(), self.command.address())?;
        Ok(Done {
            pages: self.command.load(3),
            faults: self.command.load(4),
        })
    }

    /// The protections of the pages of a range.
    pub(crate) fn snapshot(&self, range: Region) -> Result<Vec<u8>> {
        let pages = range.pages().count();
        let answers = Region::map(pages, Backing::Small)?;
        self.call(Action::Snapshot, range, answers)?;
        let bytes = (0..pages).map(|page| answers.load(page / 8).to_le_bytes()[page % 8]);
        let bytes = bytes.collect();
        answers.unmap()?;
        Ok(bytes)
    }

    /// Lets the next allocation of a migration fail, once.
    pub(crate) fn fail_next_allocation(&self, range: Region) -> io::Result<()> {
        self.call_with(Action::Flags, range.address(), 0, FAIL_ALLOC)
            .map(drop)
    }
}

impl AsFd for Mirror {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.file.as_fd()
    }
}
