// SPDX-License-Identifier: MIT OR Apache-2.0
//! Helpers: programs that keep the GPU at work until it fails them, or somebody kills them. They know what their
//! memory should hold, while the GPU works and after it has failed.

use super::{
    VRAM,
    call::{self, Job},
    oracle,
    place::migrate,
    programs::{DATA_RIGHT, READY, SEED, say, written},
};
use anyhow::{Context, Result, ensure};
use farfault::arena::{Backing, Region};
use farfault::{Gpu, HUGE_PAGE_SIZE, PAGE_SIZE, Place};

/// The GPU could not go on. What memory holds is to be right all the same; the error goes on its way.
fn after(error: anyhow::Error, check: impl FnOnce() -> Result<()>) -> Result<()> {
    check().with_context(|| format!("after {error:?}"))?;
    say(DATA_RIGHT);
    Err(error)
}

/// A region to which a job should have added once more, but failed: each word has that, or not yet.
fn check_either(region: Region, added: u64) -> Result<()> {
    for index in 0..region.words() {
        let (is, before) = (region.load(index), oracle::word(SEED, index));
        let had = is.wrapping_sub(before);
        ensure!(
            had == added || had == added + 1,
            "word {index} is {is:#x} and should be {before:#x} with {added} or one more added"
        );
    }
    Ok(())
}

pub(super) fn fault_for_ever(_: &[String]) -> Result<()> {
    let gpu = Gpu::open_first()?;
    let region = written(256 * PAGE_SIZE, Backing::Small)?;
    for added in 0.. {
        if let Err(error) = Job::add(region, 1).waves(8).run(&gpu) {
            return after(error, || check_either(region, added));
        }
        oracle::check(region, SEED, added + 1)?;
        if added == 0 {
            say(READY);
        }
    }
    Ok(())
}

pub(super) fn migrate_for_ever(_: &[String]) -> Result<()> {
    /// The data is looked at after so many rounds.
    const ROUNDS: usize = 16;
    let gpu = Gpu::open_first()?;
    let regions = [
        written(2 * HUGE_PAGE_SIZE, Backing::Huge)?,
        written(2 * HUGE_PAGE_SIZE, Backing::Small)?,
    ];
    let check = || {
        regions
            .into_iter()
            .try_for_each(|region| oracle::check(region, SEED, 0))
    };
    let round = || -> Result<()> {
        for place in [Place::Vram, Place::Ram] {
            for region in regions {
                migrate(&gpu, region, place)?;
            }
        }
        Ok(())
    };
    for done in 0_usize.. {
        if let Err(error) = round() {
            return after(error, check);
        }
        if done == 0 {
            say(READY);
        }
        if done % ROUNDS == 0 {
            check()?;
        }
    }
    Ok(())
}

pub(super) fn evict_for_ever(_: &[String]) -> Result<()> {
    let gpu = Gpu::open_first()?;
    let whole = VRAM as usize;
    let regions = [
        written(whole, Backing::Huge)?,
        written(whole, Backing::Small)?,
    ];
    for added in 0.. {
        for (number, region) in regions.into_iter().enumerate() {
            if let Err(error) = Job::add(region, 1).waves(8).run(&gpu) {
                return after(error, || {
                    check_either(region, added)?;
                    // The first has had its turn when the second one's comes.
                    let other = regions[1 - number];
                    oracle::check(other, SEED, added + number as u64)
                });
            }
            // Its VRAM is full now.
            if (added, number) == (0, 0) {
                say(READY);
            }
        }
    }
    Ok(())
}

pub(super) fn kill_for_ever(_: &[String]) -> Result<()> {
    let gpu = Gpu::open_first()?;
    let ring = Region::map(PAGE_SIZE, Backing::Small)?;
    let beside = written(64 * PAGE_SIZE, Backing::Small)?;
    // Others may take its place in VRAM at any time.
    Job::add(beside, 1).run(&gpu)?;
    let round = || -> Result<()> {
        let fences: Vec<_> = (0..8)
            .map(|_| Job::endless(ring).submit(&gpu))
            .collect::<Result<_, _>>()?;
        for fence in fences {
            call::kill(&gpu, fence)?;
            call::wait(&gpu, fence, call::JOB_TIME)?;
        }
        Ok(())
    };
    for done in 0_usize.. {
        if let Err(error) = round() {
            return after(error, || oracle::check(beside, SEED, 1));
        }
        if done == 0 {
            say(READY);
        }
    }
    Ok(())
}
