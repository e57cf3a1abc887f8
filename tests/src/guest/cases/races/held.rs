// SPDX-License-Identifier: MIT OR Apache-2.0
//! The threads of the engine for pages that leave memory and for pages that may not leave their place: one that has
//! the kernel swap them out, and one that pins them for the kernel's own reads.

use super::{
    field::{Field, Group, Random},
    workers::{Worker, tolerate},
};
use anyhow::{Context, Result, ensure};
use farfault::arena::{Backing, Region};
use farfault::ring::PinnedBuffer;
use farfault::{PAGE_SIZE, stage::Advice};
use rustix::{
    fs::{MemfdFlags, ftruncate, memfd_create},
    io::Errno,
    pipe::{fcntl_setpipe_size, pipe},
};
use std::{fs::File, io::Read, thread, time::Duration};

/// Sends pages out to swap.
pub(super) struct Swapper<'a> {
    pub(super) field: &'a Field,
    pub(super) random: Random,
}

impl Worker for Swapper<'_> {
    fn name(&self) -> &'static str {
        "swapper"
    }

    fn step(&mut self) -> Result<()> {
        let block = self.random.one_of(&self.field.blocks);
        let part = self.random.part(block.region);
        // ENOMEM: the torn pages are not mapped just now.
        tolerate(part.advise(Advice::PageOut), &[Errno::NOMEM])?;
        thread::sleep(Duration::from_millis(1));
        Ok(())
    }
}

/// Pins pages, and reads through the pins what others write.
pub(super) struct Pinner<'a> {
    field: &'a Field,
    random: Random,
    /// What was read, and the file by which it was.
    copy: Region,
    file: File,
    /// Whether there are pins for long, which is the kernel's decision.
    has_ring: bool,
}

/// Pages whose content never changes that are pinned at a time.
const CONSTANT_PAGES: usize = 8;
/// Reads through one pin.
const READS: usize = 4;

impl<'a> Pinner<'a> {
    pub(super) fn new(field: &'a Field, random: Random) -> Result<Self> {
        let file = File::from(memfd_create("farfault-pinned", MemfdFlags::CLOEXEC)?);
        ftruncate(&file, PAGE_SIZE as u64)?;
        Ok(Self {
            field,
            random,
            copy: Region::map(CONSTANT_PAGES * PAGE_SIZE, Backing::Small)?,
            file,
            has_ring: PinnedBuffer::is_supported(),
        })
    }

    /// Pinned for long, in the middle of everything: the ring reads what CPU and GPU write at the time.
    fn written(&self, group: &Group) -> Result<()> {
        let page = &group.page;
        let mut pinned = match PinnedBuffer::new(page.region) {
            // The page lies in CMA, where no pin for long may be, and somebody uses it just now, so that it
            // cannot be moved out.
            Err(error) if Errno::from_io_error(&error) == Some(Errno::NOMEM) => return Ok(()),
            pinned => pinned.context("a pin")?,
        };
        let copy = self.copy.part(0, PAGE_SIZE);
        for _ in 0..READS {
            let least = page.least();
            ensure!(pinned.write_to(&self.file)? == PAGE_SIZE);
            ensure!(copy.read_from(&self.file, 0)? == PAGE_SIZE);
            page.ensure_copy(least, copy)
                .context("what was read through a pin")?;
            thread::sleep(Duration::from_micros(500));
        }
        Ok(())
    }

    /// Held in a pipe for a while, and read then.
    fn constant(&mut self, group: &Group) -> Result<()> {
        let pages = group.constant.part(0, CONSTANT_PAGES * PAGE_SIZE);
        let part = self.random.part(pages);
        let (read, write) = pipe()?;
        fcntl_setpipe_size(&write, 2 * CONSTANT_PAGES * PAGE_SIZE)?;
        ensure!(part.splice_to(&write)? == part.length());
        thread::sleep(Duration::from_micros(self.random.below(2000) as u64));
        let mut bytes = vec![0; part.length()];
        File::from(read).read_exact(&mut bytes)?;
        for (index, word) in bytes.chunks_exact(8).enumerate() {
            ensure!(
                word == part.load(index).to_le_bytes(),
                "word {index} of {:#x}, which never changes, is {word:x?} in a pipe",
                part.address()
            );
        }
        Ok(())
    }
}

impl Worker for Pinner<'_> {
    fn name(&self) -> &'static str {
        "pinner"
    }

    fn step(&mut self) -> Result<()> {
        let groups = self.field.groups();
        let group = *self.random.one_of(&groups);
        if self.has_ring && self.random.coin() {
            self.written(group).context("pinned for a ring")
        } else {
            self.constant(group).context("held in a pipe")
        }
    }
}
