// SPDX-License-Identifier: MIT OR Apache-2.0
//! `mlock`, `mlockall` and `MAP_LOCKED`: a lock keeps pages in memory, and VRAM is memory. It faults in
//! what the CPU does not have, so pages in VRAM come home; after that they may go to VRAM again.

use super::start::{SEED, STARTS, each_start, ensure_agreement, exercise, exercise_all};
use crate::guest::{
    call::Job,
    oracle,
    place::{ensure_place, move_all},
};
use anyhow::{Context, Result, ensure};
use farfault::arena::{Backing, Region};
use farfault::{Gpu, HUGE_PAGE_SIZE, Place};
use rustix::mm::{MlockAllFlags, mlockall, munlockall};
use std::fs;

group! { "mm::mlock", gpus 1, seconds 60:
    pages_locked_come_home_and_keep_the_data,
    pages_locked_in_ram_go_to_vram_and_back,
    unlocked_after_a_stay_in_vram_is_unlocked,
    mlockall_of_what_is_there_and_what_comes_keeps_the_data,
    map_locked_memory_is_used_by_the_gpu,
}

/// What the kernel counts as locked for this process, in bytes.
fn locked() -> Result<usize> {
    let status = fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmLck:"));
    let kilobytes = line.and_then(|line| line.split_whitespace().next());
    Ok(kilobytes.context("VmLck")?.parse::<usize>()? << 10)
}

fn pages_locked_come_home_and_keep_the_data() -> Result<()> {
    each_start(|gpu, region| {
        region.lock()?;
        ensure!(locked()? == region.length());
        ensure_place(gpu, region, Place::Ram)?;
        exercise_all(gpu, region)?;
        region.unlock()?;
        ensure!(locked()? == 0);
        exercise(gpu, region, 0, 2)
    })
}

fn pages_locked_in_ram_go_to_vram_and_back() -> Result<()> {
    for start in STARTS {
        let gpu = Gpu::open_first()?;
        let region = Region::map(HUGE_PAGE_SIZE, start.backing)?;
        oracle::write(region, SEED);
        region.lock()?;
        start
            .place(&gpu, region)
            .with_context(|| format!("{start:?}"))?;
        exercise_all(&gpu, region).with_context(|| format!("{start:?}"))?;
        // Home by the CPU's touch, and there again.
        move_all(&gpu, region, Place::Vram)?;
        exercise(&gpu, region, 0, 2)?;
        region.unmap()?;
    }
    Ok(())
}

fn unlocked_after_a_stay_in_vram_is_unlocked() -> Result<()> {
    for backing in [Backing::Small, Backing::Huge] {
        let gpu = Gpu::open_first()?;
        let region = Region::map(HUGE_PAGE_SIZE, backing)?;
        oracle::write(region, SEED);
        region.lock()?;
        move_all(&gpu, region, Place::Vram)?;
        region.unlock()?;
        ensure!(locked()? == 0, "{backing:?}");
        ensure_place(&gpu, region, Place::Vram)?;
        exercise_all(&gpu, region)?;
        region.unmap()?;
    }
    Ok(())
}

fn mlockall_of_what_is_there_and_what_comes_keeps_the_data() -> Result<()> {
    each_start(|gpu, region| {
        mlockall(MlockAllFlags::CURRENT | MlockAllFlags::FUTURE)?;
        let result = (|| {
            ensure_place(gpu, region, Place::Ram)?;
            exercise_all(gpu, region)?;
            let new = Region::map(HUGE_PAGE_SIZE, Backing::Small)?;
            ensure_place(gpu, new, Place::Ram)?;
            oracle::write(new, SEED);
            move_all(gpu, new, Place::Vram)?;
            exercise_all(gpu, new)?;
            Ok(new.unmap()?)
        })();
        munlockall()?;
        ensure!(locked()? == 0);
        result.and_then(|()| exercise(gpu, region, 0, 2))
    })
}

fn map_locked_memory_is_used_by_the_gpu() -> Result<()> {
    let gpu = Gpu::open_first()?;
    let region = Region::map_locked(HUGE_PAGE_SIZE)?;
    ensure_place(&gpu, region, Place::Ram)?;
    oracle::write(region, SEED);
    // By default the GPU's fault moves it.
    Job::add(region, 0).waves(2).run(&gpu)?;
    ensure_place(&gpu, region, Place::Vram)?;
    exercise_all(&gpu, region)?;
    ensure_agreement(&gpu, region)?;
    region.unmap()?;
    ensure!(locked()? == 0);
    Ok(())
}
