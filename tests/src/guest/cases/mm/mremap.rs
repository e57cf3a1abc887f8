// SPDX-License-Identifier: MIT OR Apache-2.0
//! `mremap`: pages go to other addresses, and the GPU finds them there and no longer at the old ones.

use super::start::{SEED, STARTS, each_start, ensure_sum, exercise, exercise_all, exercise_empty};
use crate::guest::{call::Job, oracle};
use anyhow::{Context, Result, ensure};
use farfault::arena::{Backing, Region};
use farfault::{Access, Gpu, HUGE_PAGE_SIZE, PAGE_SIZE};
use rustix::io::Errno;

group! { "mm::mremap", gpus 1, seconds 60:
    growing_gives_the_gpu_new_memory_behind_the_old,
    shrinking_takes_the_end_from_the_gpu,
    moving_leaves_nothing_at_the_old_addresses,
    moving_and_growing_keeps_the_data,
    moving_onto_other_memory_replaces_it,
    moving_onto_itself_is_refused_and_changes_nothing,
    moving_with_dontunmap_leaves_empty_memory_behind,
    part_of_a_huge_page_moved_keeps_all_data,
    moved_there_and_back_is_the_same_memory,
}

const QUARTER: usize = HUGE_PAGE_SIZE / 4;

fn ensure_gone(gpu: &Gpu, region: Region) -> Result<()> {
    Job::sum(region).fails_at(gpu, region.address(), Access::Read)?;
    Job::fill(region, 9).fails_at(gpu, region.address(), Access::Write)
}

fn growing_gives_the_gpu_new_memory_behind_the_old() -> Result<()> {
    each_start(|gpu, region| {
        let grown = region.resize(region.length() + QUARTER)?;
        exercise_empty(gpu, grown.part(region.length(), QUARTER))?;
        exercise_all(gpu, region)?;
        Ok(grown.unmap()?)
    })
}

fn shrinking_takes_the_end_from_the_gpu() -> Result<()> {
    each_start(|gpu, region| {
        let small = region.resize(QUARTER)?;
        ensure_gone(gpu, region.part(QUARTER, PAGE_SIZE))?;
        ensure_gone(gpu, region.part(3 * QUARTER, QUARTER))?;
        exercise_all(gpu, small)
    })
}

fn moving_leaves_nothing_at_the_old_addresses() -> Result<()> {
    each_start(|gpu, region| {
        let moved = region.remap()?;
        ensure_gone(gpu, region)?;
        exercise_all(gpu, moved)?;
        Ok(moved.unmap()?)
    })
}

fn moving_and_growing_keeps_the_data() -> Result<()> {
    each_start(|gpu, region| {
        let moved = region.remap_resized(2 * region.length())?;
        ensure_gone(gpu, region)?;
        exercise_empty(gpu, moved.part(region.length(), region.length()))?;
        exercise_all(gpu, moved.part(0, region.length()))?;
        Ok(moved.unmap()?)
    })
}

fn moving_onto_other_memory_replaces_it() -> Result<()> {
    for (start, other) in STARTS.into_iter().zip(STARTS.into_iter().rev()) {
        let gpu = Gpu::open_first()?;
        let region = start.region(&gpu, HUGE_PAGE_SIZE)?;
        let target = Region::map(HUGE_PAGE_SIZE, other.backing)?;
        oracle::write(target, SEED + 1);
        other.place(&gpu, target)?;
        region.remap_onto(target)?;
        let what = || format!("{start:?} onto {other:?}");
        ensure_gone(&gpu, region).with_context(what)?;
        exercise_all(&gpu, target).with_context(what)?;
        target.unmap()?;
    }
    Ok(())
}

fn moving_onto_itself_is_refused_and_changes_nothing() -> Result<()> {
    each_start(|gpu, region| {
        let same = region.resize(region.length())?;
        ensure!(same.address() == region.address());
        let refused = region.remap_onto(region);
        ensure!(refused == Err(Errno::INVAL), "{refused:?}");
        let overlap = region.part(0, 2 * QUARTER);
        let refused = overlap.remap_onto(region.part(QUARTER, 2 * QUARTER));
        ensure!(refused == Err(Errno::INVAL), "{refused:?}");
        exercise_all(gpu, region)
    })
}

fn moving_with_dontunmap_leaves_empty_memory_behind() -> Result<()> {
    each_start(|gpu, region| {
        let moved = region.remap_keeping()?;
        exercise_empty(gpu, region)?;
        exercise_all(gpu, moved)?;
        super::start::ensure_words(region, 5)?;
        Ok(moved.unmap()?)
    })
}

fn part_of_a_huge_page_moved_keeps_all_data() -> Result<()> {
    each_start(|gpu, region| {
        // Across the border between the halves, and not aligned to anything.
        let (from, length) = (QUARTER + PAGE_SIZE, 2 * QUARTER);
        let old = region.part(from, length);
        let moved = old.remap()?;
        ensure_gone(gpu, old)?;
        exercise(gpu, moved, from / 8, 0)?;
        exercise(gpu, region.part(0, from), 0, 0)?;
        let end = from + length;
        exercise(gpu, region.part(end, region.length() - end), end / 8, 0)?;
        Ok(moved.unmap()?)
    })
}

fn moved_there_and_back_is_the_same_memory() -> Result<()> {
    let gpu = Gpu::open_first()?;
    for start in STARTS {
        let region = start.region(&gpu, HUGE_PAGE_SIZE)?;
        let away = Region::map(HUGE_PAGE_SIZE, Backing::Small)?;
        for added in 0..3 {
            region.remap_onto(away)?;
            Job::add(away, 1).waves(2).run(&gpu)?;
            away.remap_onto(region)?;
            ensure_sum(&gpu, region, 0, added + 1).with_context(|| format!("{start:?}"))?;
        }
        exercise(&gpu, region, 0, 3).with_context(|| format!("{start:?}"))?;
        region.unmap()?;
    }
    Ok(())
}
