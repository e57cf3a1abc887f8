// SPDX-License-Identifier: MIT OR Apache-2.0
//! Two GPUs, one process: what is in one's VRAM is never taken for the other's.

use crate::guest::{
    call::Job,
    oracle,
    place::{migrate, move_all},
};
use anyhow::{Result, ensure};
use farfault::arena::{Backing, Region};
use farfault::{Gpu, HUGE_PAGE_SIZE, Place};

group! { two_gpus, gpus 2, seconds 60:
    serials_tell_the_gpus_apart,
    pages_used_by_both_in_turn_keep_their_data,
    pages_in_one_vram_are_not_in_the_other,
}

const SEED: u64 = 0x2692;

fn open_both() -> Result<[Gpu; 2]> {
    Ok([Gpu::open("/dev/farfault0")?, Gpu::open("/dev/farfault1")?])
}

fn serials_tell_the_gpus_apart() -> Result<()> {
    let [one, other] = open_both()?;
    ensure!(one.info().serial != other.info().serial);
    Ok(())
}

fn pages_used_by_both_in_turn_keep_their_data() -> Result<()> {
    let gpus = open_both()?;
    for backing in [Backing::Small, Backing::Huge] {
        let region = Region::map(2 * HUGE_PAGE_SIZE, backing)?;
        oracle::write(region, SEED);
        for round in 1..=6u64 {
            let gpu = &gpus[round as usize % 2];
            Job::add(region, 1).waves(4).run(gpu)?;
            let sum = Job::sum(region).waves(4).run(gpu)?;
            let should = oracle::expected_sum(region, SEED, round);
            ensure!(sum == should, "{backing:?}, round {round}");
        }
        oracle::check(region, SEED, 6)?;
    }
    Ok(())
}

fn pages_in_one_vram_are_not_in_the_other() -> Result<()> {
    let [one, other] = open_both()?;
    for backing in [Backing::Small, Backing::Huge] {
        let region = Region::map(HUGE_PAGE_SIZE, backing)?;
        oracle::write(region, SEED);
        move_all(&one, region, Place::Vram)?;
        for page in other.query(region.pages())? {
            ensure!(page.cpu.place != Place::Vram, "{backing:?}: {page:?}");
            ensure!(page.gpu.place == Place::None, "{backing:?}: {page:?}");
        }
        // Whether a page moves from one VRAM to the other at once is the driver's business.
        migrate(&other, region, Place::Vram)?;
        let sum = Job::sum(region).waves(2).run(&other)?;
        ensure!(sum == oracle::expected_sum(region, SEED, 0), "{backing:?}");
        oracle::check(region, SEED, 0)?;
    }
    Ok(())
}
