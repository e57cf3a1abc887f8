// SPDX-License-Identifier: MIT OR Apache-2.0
//! The thread of the engine that takes pages apart, between pages that others use: protects, unmaps, moves,
//! empties and replaces them, with and without a job that writes there. Nobody else touches them, so
//! what is there is known exactly.

use super::{
    field::{Field, Random, TORN_PAGES},
    workers::Worker,
};
use crate::guest::{
    call::{self, JOB_TIME, Job, ensure_status},
    oracle,
};
use anyhow::{Context, Result, ensure};
use farfault::arena::{Backing, Protection, Region};
use farfault::{
    Access, Gpu, Kernel, PAGE_SIZE, Place,
    uapi::{self, JobStatus},
};
use rustix::io::Errno;
use std::{
    thread,
    time::{Duration, Instant},
};

/// A job that adds has added by then.
const WRITING: Duration = Duration::from_secs(60);
const LENGTH: usize = TORN_PAGES * PAGE_SIZE;

pub(super) struct Torn<'a> {
    field: &'a Field,
    random: Random,
    gpu: &'a Gpu,
    /// Where jobs copy from.
    source: Region,
    /// Addresses to which pages are moved.
    aside: Region,
}

/// The first word of a region does not change any more, whatever job wrote there.
fn ensure_still(region: Region) -> Result<()> {
    let before = region.load(0);
    thread::sleep(Duration::from_micros(500));
    let after = region.load(0);
    ensure!(
        before == after,
        "a job wrote {after:#x} to {:#x}, where it was {before:#x}, after it was taken away",
        region.address()
    );
    Ok(())
}

fn ensure_zeros(region: Region, from: usize) -> Result<()> {
    let wrong = (from..region.words()).find(|&index| region.load(index) != 0);
    ensure!(
        wrong.is_none(),
        "word {wrong:?} of new memory at {:#x} is {:#x}",
        region.address(),
        region.load(wrong.unwrap_or(0))
    );
    Ok(())
}

impl<'a> Torn<'a> {
    pub(super) fn new(field: &'a Field, gpu: &'a Gpu, random: Random) -> Result<Self> {
        Ok(Self {
            field,
            random,
            gpu,
            source: Region::map(LENGTH, Backing::Small)?,
            aside: Region::nowhere(LENGTH)?,
        })
    }

    /// New content, by the CPU or by a job, here or in VRAM.
    fn write(&mut self, run: Region) -> Result<u64> {
        let seed = self.random.any();
        if self.random.coin() {
            oracle::write(run, seed);
        } else {
            oracle::write(self.source, seed);
            let (to, from) = (run.address(), self.source.address());
            Job::new(Kernel::Copy, [to, from, LENGTH as u64, 0])
                .waves(3)
                .run(self.gpu)?;
        }
        if self.random.coin() {
            let migrate = uapi::Migrate {
                address: run.address(),
                length: LENGTH as u64,
                destination: Place::Vram.raw(),
                ..uapi::Migrate::default()
            };
            super::workers::tolerate(call::call(self.gpu, migrate), &[Errno::BUSY])?;
        }
        self.check(run, seed)?;
        Ok(seed)
    }

    /// By the CPU, by the GPU, or by both.
    fn check(&mut self, run: Region, seed: u64) -> Result<()> {
        self.check_part(run, seed, 0, LENGTH)
    }

    fn check_part(&mut self, run: Region, seed: u64, offset: usize, length: usize) -> Result<()> {
        let (part, first) = (run.part(offset, length), offset / 8);
        let who = self.random.below(3);
        if who != 0 {
            let sum = Job::sum(part).waves(2).run(self.gpu)?;
            let should = oracle::sum(seed, first..first + part.words());
            ensure!(sum == should, "the GPU's sum at {:#x}", part.address());
        }
        if who != 1 {
            oracle::check_part(part, seed, first, 0).context("the CPU")?;
        }
        Ok(())
    }

    fn check_zeros(&mut self, part: Region) -> Result<()> {
        if self.random.coin() {
            let sum = Job::sum(part).waves(2).run(self.gpu)?;
            ensure!(sum == 0, "the GPU's sum over new memory is {sum:#x}");
        }
        ensure_zeros(part, 0)
    }

    fn ensure_gone(&self, part: Region) -> Result<()> {
        for page in 0..part.length() / PAGE_SIZE {
            let page = part.part(page * PAGE_SIZE, PAGE_SIZE);
            Job::sum(page).fails_at(self.gpu, page.address(), Access::Read)?;
        }
        Ok(())
    }

    fn unmapped(&mut self, run: Region) -> Result<()> {
        let seed = self.write(run)?;
        let first = self.random.below(TORN_PAGES);
        let count = 1 + self.random.below(TORN_PAGES - first);
        let (begin, end) = (first * PAGE_SIZE, (first + count) * PAGE_SIZE);
        let hole = run.part(begin, end - begin);
        hole.unmap()?;
        self.ensure_gone(hole)?;
        if begin != 0 {
            self.check_part(run, seed, 0, begin)?;
        }
        if end != LENGTH {
            self.check_part(run, seed, end, LENGTH - end)?;
        }
        hole.map_again()?;
        self.check_zeros(hole)
    }

    fn emptied(&mut self, run: Region) -> Result<()> {
        self.write(run)?;
        if self.random.coin() {
            run.discard()?;
        } else {
            run.replace()?;
        }
        self.check_zeros(run)
    }

    fn protected(&mut self, run: Region) -> Result<()> {
        let seed = self.write(run)?;
        run.protect(Protection::Read)?;
        let write = Job::fill(run, 1).waves(1);
        write.fails_at(self.gpu, run.address(), Access::Write)?;
        self.check(run, seed)?;
        run.protect(Protection::None)?;
        self.ensure_gone(run)?;
        run.protect(Protection::ReadWrite)?;
        self.check(run, seed)?;
        Job::fill(run, 7).waves(2).run(self.gpu)?;
        let wrong = (0..run.words()).find(|&index| run.load(index) != 7);
        ensure!(wrong.is_none(), "word {wrong:?} was not filled");
        Ok(())
    }

    fn moved(&mut self, run: Region) -> Result<()> {
        let seed = self.write(run)?;
        run.remap_onto(self.aside)?;
        if self.random.coin() {
            self.ensure_gone(run)?;
        }
        self.check(self.aside, seed)?;
        self.aside.remap_onto(run)?;
        self.check(run, seed)
    }

    /// A job that adds to the first word, the only one that is not zero, until it may not.
    fn writer(&mut self, run: Region) -> Result<u64> {
        run.discard()?;
        if self.random.coin() {
            // It takes the page in RAM for itself.
            run.store(0, 1);
        }
        let fence = Job::atomic_add(run.address(), 1, u64::MAX).submit(self.gpu)?;
        // What comes next meets it at work, or in the middle of a fault.
        if self.random.coin() {
            self.written(run)?;
        } else {
            thread::sleep(Duration::from_micros(self.random.below(1000) as u64));
        }
        Ok(fence)
    }

    fn written(&self, run: Region) -> Result<()> {
        let deadline = Instant::now() + WRITING;
        while run.load(0) < 2 {
            ensure!(Instant::now() < deadline, "a job that adds does nothing");
            thread::sleep(Duration::from_micros(200));
        }
        Ok(())
    }

    fn under_a_job(&mut self, run: Region) -> Result<()> {
        let fence = self.writer(run)?;
        let mut status = JobStatus::Fault;
        match self.random.below(4) {
            0 => {
                run.remap_onto(self.aside)?;
                ensure_still(self.aside).context("moved")?;
                ensure_zeros(self.aside, 1)?;
            }
            1 => {
                run.protect(Protection::Read)?;
                ensure_still(run).context("read-only")?;
                ensure_zeros(run, 1)?;
            }
            2 => {
                run.unmap()?;
            }
            _ => {
                run.replace()?;
                self.written(run).context("replaced")?;
                call::kill(self.gpu, fence)?;
                status = JobStatus::Killed;
            }
        }
        let end = call::wait(self.gpu, fence, JOB_TIME)?;
        ensure_status(&end, status)?;
        ensure!(status == JobStatus::Killed || end.fault_address == run.address());
        // Whatever it was, it is gone now.
        run.replace()?;
        self.check_zeros(run)?;
        // What was moved there goes, too.
        Ok(self.aside.unmap()?)
    }
}

impl Worker for Torn<'_> {
    fn name(&self) -> &'static str {
        "tearer"
    }

    fn step(&mut self) -> Result<()> {
        let blocks: Vec<_> = self.field.blocks.iter().filter(|b| b.is_torn).collect();
        let block = *self.random.one_of(&blocks);
        let run = self.random.one_of(&block.groups).torn;
        match self.random.below(6) {
            0 => self.unmapped(run).context("unmapped"),
            1 => self.emptied(run).context("emptied"),
            2 => self.protected(run).context("protected"),
            3 => self.moved(run).context("moved"),
            _ => self
                .under_a_job(run)
                .context("taken from a job that writes"),
        }
    }
}
