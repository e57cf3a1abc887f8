// SPDX-License-Identifier: MIT OR Apache-2.0
//! The threads of the engine that work on pages which stay where they are mapped: CPUs that add and
//! read, GPU jobs that add, store and read, and one who moves the pages under all of them.

use super::field::{Block, COUNTER, Field, GENERATION, GROUP_PAGES, Group, Random};
use crate::guest::call::{self, JOB_TIME, Job, ensure_status};
use anyhow::{Context, Result, bail, ensure};
use farfault::arena::{Backing, Looked, Region, fork_that_looks};
use farfault::stage::Advice as KernelAdvice;
use farfault::{
    Advice, Gpu, Kernel, PAGE_SIZE, Place,
    uapi::{self, JobStatus},
};
use rustix::io::Errno;
use std::{thread, time::Duration};

/// One of the threads: it does its next thing.
pub(super) trait Worker: Send {
    /// What it is called in the figures.
    fn name(&self) -> &'static str;
    fn step(&mut self) -> Result<()>;
}

/// A call may fail in these ways when others take the memory apart.
pub(super) fn tolerate<T>(result: Result<T, Errno>, errors: &[Errno]) -> Result<()> {
    match result {
        Err(error) if !errors.contains(&error) => Err(error.into()),
        _ => Ok(()),
    }
}

/// A CPU that adds to and reads what the others write. Each has its own word for generations.
pub(super) struct Cpu<'a> {
    pub(super) field: &'a Field,
    pub(super) random: Random,
    pub(super) number: usize,
}

impl Worker for Cpu<'_> {
    fn name(&self) -> &'static str {
        "cpu"
    }

    fn step(&mut self) -> Result<()> {
        let groups = self.field.groups();
        for _ in 0..16 {
            let page = &self.random.one_of(&groups).page;
            let counter = &page.written[COUNTER];
            counter.begin(1);
            page.region.atomic_add(COUNTER, 1);
            counter.end(1);
            let own = GENERATION + self.number;
            let generation = page.written[own].begin(1);
            page.region.store(own, generation);
            page.written[own].end(1);
            page.ensure_copy(page.least(), page.region)
                .with_context(|| format!("CPU {}", self.number))?;
        }
        thread::sleep(Duration::from_micros(500));
        Ok(())
    }
}

/// Jobs of one descriptor, several at a time.
pub(super) struct Jobs<'a> {
    pub(super) field: &'a Field,
    pub(super) random: Random,
    pub(super) gpu: &'a Gpu,
    pub(super) number: usize,
    copies: Region,
}

/// Groups that have jobs at the same time.
const GROUPS_AT_ONCE: usize = 3;

impl<'a> Jobs<'a> {
    pub(super) fn new(
        field: &'a Field,
        gpu: &'a Gpu,
        random: Random,
        number: usize,
    ) -> Result<Self> {
        Ok(Self {
            field,
            random,
            gpu,
            number,
            copies: Region::map(GROUPS_AT_ONCE * PAGE_SIZE, Backing::Small)?,
        })
    }

    fn good_end(&self, fence: u64) -> Result<u64> {
        let end = call::wait(self.gpu, fence, JOB_TIME)?;
        ensure_status(&end, JobStatus::Ok)?;
        Ok(end.result)
    }
}

impl Worker for Jobs<'_> {
    fn name(&self) -> &'static str {
        "gpu"
    }

    fn step(&mut self) -> Result<()> {
        let groups = self.field.groups();
        let first = self.random.below(groups.len());
        let step = 1 + self.random.below(groups.len() / GROUPS_AT_ONCE);
        let own = GENERATION + 2 + self.number;
        let mut under_way = Vec::new();
        for number in 0..GROUPS_AT_ONCE {
            let group = groups[(first + number * step) % groups.len()];
            let page = &group.page;
            let address = page.region.address();
            let copy = self.copies.part(number * PAGE_SIZE, PAGE_SIZE);
            let least = page.least();
            let (waves, repeat) = (
                1 + self.random.below(8) as u64,
                1 + self.random.below(32) as u64,
            );
            page.written[COUNTER].begin(waves * repeat);
            let generation = page.written[own].begin(1);
            let word = address + own as u64 * 8;
            let jobs = [
                Job::atomic_add(address, 1, repeat).waves(waves as u32),
                Job::new(Kernel::Fill, [word, 8, generation, 0]),
                Job::new(Kernel::Copy, [copy.address(), address, PAGE_SIZE as u64, 0]).waves(4),
                Job::sum(group.constant).waves(8),
            ];
            let submitted = jobs.map(|job| job.submit(self.gpu));
            under_way.push((group, copy, least, waves * repeat, submitted));
        }
        for (group, copy, least, added, submitted) in under_way {
            let page = &group.page;
            let [add, store, read, sum] = submitted;
            self.good_end(add?).context("a job that adds")?;
            page.written[COUNTER].end(added);
            self.good_end(store?).context("a job that stores")?;
            page.written[own].end(1);
            self.good_end(read?).context("a job that reads")?;
            page.ensure_copy(least, copy).context("what a job read")?;
            let sum = self.good_end(sum?).context("a job that sums")?;
            ensure!(
                sum == group.sum,
                "the GPU's sum at {:#x}, which never changes",
                group.constant.address()
            );
        }
        Ok(())
    }
}

/// Moves pages to and fro, and has the kernel share, split and merge them.
pub(super) struct Mover<'a> {
    pub(super) field: &'a Field,
    pub(super) random: Random,
    pub(super) gpus: &'a [Gpu],
}

/// What a child writes to its own pages. Nobody else may ever read it.
const POISON: u64 = 0xbad0_bad0_bad0_bad0;

impl Mover<'_> {
    fn migrate(&mut self, gpu: &Gpu, block: &Block) -> Result<()> {
        let part = self.random.part(block.region);
        let to = if self.random.coin() {
            Place::Vram
        } else {
            Place::Ram
        };
        let migrate = uapi::Migrate {
            address: part.address(),
            length: part.length() as u64,
            destination: to.raw(),
            ..uapi::Migrate::default()
        };
        // EFAULT: the torn pages are not mapped just now.
        tolerate(call::call(gpu, migrate), &[Errno::BUSY, Errno::FAULT])
    }

    fn place(&mut self, gpu: &Gpu, block: &Block) -> Result<()> {
        let groups = block.groups.len();
        let first = self.random.below(groups);
        let count = 1 + self.random.below(groups - first);
        let bytes = GROUP_PAGES * PAGE_SIZE;
        let part = block.region.part(first * bytes, count * bytes);
        let advice = *self.random.one_of(&[
            Advice::Default,
            Advice::Default,
            Advice::PreferGpu,
            Advice::PreferCpu,
            Advice::MapOnly,
        ]);
        Ok(gpu.advise(part.pages(), advice)?)
    }

    fn take(&mut self, gpu: &Gpu, block: &Block) -> Result<()> {
        let group = self.random.one_of(&block.groups);
        let pages = self.random.part(group.constant.part(0, 8 * PAGE_SIZE));
        let range = if self.random.coin() {
            pages
        } else {
            group.page.region
        };
        let exclusive = uapi::Exclusive {
            address: range.address(),
            length: range.length() as u64,
        };
        tolerate(call::call(gpu, exclusive), &[Errno::BUSY])
    }

    fn fork(&mut self, block: &Block) -> Result<()> {
        let pages: Vec<_> = block
            .groups
            .iter()
            .map(|group: &Group| group.page.region)
            .collect();
        match fork_that_looks(&pages, Duration::from_millis(2), POISON)? {
            Looked::Still => Ok(()),
            Looked::Changed(page, word) => bail!(
                "word {word} of {:#x} changed in a child",
                pages[page].address()
            ),
        }
    }
}

impl Worker for Mover<'_> {
    fn name(&self) -> &'static str {
        "mover"
    }

    fn step(&mut self) -> Result<()> {
        let field = self.field;
        let block = self.random.one_of(&field.blocks);
        let gpu = self.random.one_of(self.gpus);
        match self.random.below(15) {
            0..8 => self.migrate(gpu, block).context("MIGRATE"),
            8..10 => self.place(gpu, block).context("ADVISE"),
            10..12 => self.take(gpu, block).context("EXCLUSIVE"),
            12 => self.fork(block).context("fork"),
            13 => {
                // A page of it is pinned, unmapped or in VRAM: then it stays as it is.
                let _ = block.region.advise(KernelAdvice::Collapse);
                Ok(())
            }
            _ => {
                let constant = self.random.one_of(&block.groups).constant;
                let advice = *self.random.one_of(&[
                    KernelAdvice::HugePage,
                    KernelAdvice::NoHugePage,
                    KernelAdvice::Cold,
                    KernelAdvice::PopulateWrite,
                ]);
                Ok(self.random.part(constant).advise(advice)?)
            }
        }
    }
}
