// SPDX-License-Identifier: MIT OR Apache-2.0
//! The thread of the engine whose memory comes and goes, in huge pages and in small ones: what is new is
//! zero, parts go and the rest stays, and VRAM that one gives back another gets.

use super::{field::Random, workers::Worker};
use crate::guest::{
    call::{self, Job},
    oracle,
};
use anyhow::{Context, Result, ensure};
use farfault::arena::{Backing, Protection, Region};
use farfault::{Access, Gpu, HUGE_PAGE_SIZE, PAGE_SIZE, Place, uapi};
use rustix::io::Errno;

pub(super) struct Recycler<'a> {
    pub(super) gpu: &'a Gpu,
    pub(super) random: Random,
}

impl Recycler<'_> {
    fn migrate(&mut self, region: Region) -> Result<()> {
        let to = if self.random.coin() {
            Place::Vram
        } else {
            Place::Ram
        };
        let migrate = uapi::Migrate {
            address: region.address(),
            length: region.length() as u64,
            destination: to.raw(),
            ..uapi::Migrate::default()
        };
        super::workers::tolerate(call::call(self.gpu, migrate), &[Errno::BUSY])
    }

    fn ensure_sum(&self, region: Region, seed: u64, first: usize) -> Result<()> {
        if region.length() == 0 {
            return Ok(());
        }
        let words = region.words();
        let should = oracle::sum(seed, first..first + words).wrapping_add(words as u64);
        let sum = Job::sum(region).waves(4).run(self.gpu)?;
        ensure!(
            sum == should,
            "the GPU's sum of {words} words at {:#x} is {sum:#x} and should be {should:#x}",
            region.address()
        );
        Ok(())
    }

    /// First and last page, where an error by one shows.
    fn ensure_gone(&self, hole: Region) -> Result<()> {
        for page in [0, hole.length() / PAGE_SIZE - 1] {
            let page = hole.part(page * PAGE_SIZE, PAGE_SIZE);
            Job::sum(page).fails_at(self.gpu, page.address(), Access::Read)?;
        }
        Ok(())
    }

    fn ensure_zero(&self, region: Region) -> Result<()> {
        let sum = Job::sum(region).waves(4).run(self.gpu)?;
        ensure!(
            sum == 0,
            "the GPU's sum over {} bytes of new memory is {sum:#x}",
            region.length()
        );
        Ok(())
    }
}

impl Worker for Recycler<'_> {
    fn name(&self) -> &'static str {
        "recycler"
    }

    fn step(&mut self) -> Result<()> {
        let backing = if self.random.coin() {
            Backing::Huge
        } else {
            Backing::Small
        };
        let region = Region::map((1 + self.random.below(2)) * HUGE_PAGE_SIZE, backing)?;
        // What the GPU touches first is new memory in VRAM, which others had before.
        if self.random.coin() {
            self.ensure_zero(region)?;
        }
        let seed = self.random.any();
        oracle::write(region, seed);
        Job::add(region, 1).waves(4).run(self.gpu)?;
        let part = self.random.part(region);
        self.migrate(part)?;
        let hole = self.random.part(region);
        let offset = (hole.address() - region.address()) as usize;
        let end = offset + hole.length();
        match self.random.below(3) {
            0 => {
                hole.unmap()?;
                self.ensure_gone(hole).context("unmapped")?;
                hole.map_again()?;
            }
            1 => {
                hole.protect(Protection::None)?;
                self.ensure_gone(hole).context("protected")?;
                hole.protect(Protection::ReadWrite)?;
                self.ensure_sum(hole, seed, offset / 8)
                    .context("protected")?;
                hole.discard()?;
            }
            _ => hole.discard()?,
        }
        self.ensure_zero(hole)?;
        let before = region.part(0, offset);
        let behind = region.part(end, region.length() - end);
        self.ensure_sum(before, seed, 0).context("before a hole")?;
        self.ensure_sum(behind, seed, end / 8)
            .context("behind a hole")?;
        oracle::check_part(before, seed, 0, 1).context("the CPU, before a hole")?;
        oracle::check_part(behind, seed, end / 8, 1).context("the CPU, behind a hole")?;
        Ok(region.unmap()?)
    }
}
