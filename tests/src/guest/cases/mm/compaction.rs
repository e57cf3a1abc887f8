// SPDX-License-Identifier: MIT OR Apache-2.0
//! Compaction while pages are mirrored or in VRAM.

use super::{
    frames::frames,
    start::{SEED, ensure_agreement, exercise, exercise_all, while_adding},
};
use crate::guest::{
    call::Job,
    oracle,
    place::{ensure_place, move_all},
};
use anyhow::{Context, Result, bail};
use farfault::arena::{Backing, Region};
use farfault::{Advice, Gpu, PAGE_SIZE, Place};
use std::fs;

group! { "mm::compaction", gpus 1, seconds 120:
    jobs_that_write_during_compaction_lose_nothing,
    pages_in_vram_stay_where_they_are,
}

const LENGTH: usize = 8 << 20;
/// Pages of RAM that are freed for each that stays: more in all than CPUs keep for themselves.
const BETWEEN: usize = 8;

fn compact() -> Result<()> {
    fs::write("/proc/sys/vm/compact_memory", "1").context("the kernel cannot compact memory")
}

/// A mirrored region with holes between its pages in RAM, for compaction to fill.
fn scattered(gpu: &Gpu) -> Result<Region> {
    let region = Region::map(LENGTH, Backing::Small)?;
    let between = Region::map(BETWEEN * LENGTH, Backing::Small)?;
    let words = PAGE_SIZE / 8;
    for page in 0..region.pages().count() {
        // One after the other, so that they lie so.
        for index in page * words..(page + 1) * words {
            region.store(index, oracle::word(SEED, index));
        }
        for other in page * BETWEEN..(page + 1) * BETWEEN {
            between.store(other * words, 1);
        }
    }
    gpu.advise(region.pages(), Advice::MapOnly)?;
    Job::add(region, 0).waves(4).run(gpu)?;
    between.unmap()?;
    Ok(region)
}

fn jobs_that_write_during_compaction_lose_nothing() -> Result<()> {
    const ATTEMPTS: usize = 6;
    let gpu = Gpu::open_first()?;
    // What others have left of memory may have a place for each page, so that none has to move.
    for _ in 0..ATTEMPTS {
        let region = scattered(&gpu)?;
        let before = frames(region)?;
        for _ in 0..6 {
            while_adding(&gpu, region, compact)?;
        }
        let after = frames(region)?;
        let moved = before.iter().zip(&after).filter(|(a, b)| a != b).count();
        exercise(&gpu, region, 0, 6)?;
        if moved >= 64 {
            return Ok(());
        }
        eprintln!("compaction has moved only {moved} pages");
        region.unmap()?;
    }
    bail!("compaction has moved hardly any pages in {ATTEMPTS} attempts")
}

fn pages_in_vram_stay_where_they_are() -> Result<()> {
    let gpu = Gpu::open_first()?;
    let region = scattered(&gpu)?;
    let half = region.part(0, LENGTH / 2);
    move_all(&gpu, half, Place::Vram)?;
    compact()?;
    ensure_place(&gpu, half, Place::Vram)?;
    ensure_agreement(&gpu, region)?;
    exercise_all(&gpu, region)
}
