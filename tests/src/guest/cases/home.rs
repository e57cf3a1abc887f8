// SPDX-License-Identifier: MIT OR Apache-2.0
//! Pages that come home because a descriptor is closed, or because others want their room, and pages that
//! are asked for in odd ranges: all of them come, and huge ones whole.

use crate::guest::{
    VRAM,
    call::Job,
    oracle,
    place::{ensure_huge, ensure_place, migrate, move_all},
};
use anyhow::{Context, Result, ensure};
use farfault::arena::{Backing, Protection, Region};
use farfault::{Gpu, HUGE_PAGE_SIZE, PAGE_SIZE, Place};

group! { "home", on Small, seconds 120:
    close_brings_all_home_and_leaves_others_pages,
    huge_pages_evicted_come_home_whole,
    huge_pages_of_more_than_vram_stay_whole,
    range_from_middle_to_middle_leaves_huge_pages_between_whole,
    inaccessible_pages_come_home_on_request,
}

const SEED: u64 = 0x40e3;
const HALF: usize = HUGE_PAGE_SIZE / 2;

fn huge(pages: usize) -> Result<Region> {
    let region = Region::map(pages * HUGE_PAGE_SIZE, Backing::Huge)?;
    oracle::write(region, SEED);
    Ok(region)
}

fn close_brings_all_home_and_leaves_others_pages() -> Result<()> {
    let (gpu, other) = (Gpu::open_first()?, Gpu::open_first()?);
    let small = Region::map(HUGE_PAGE_SIZE + 5 * PAGE_SIZE, Backing::Small)?;
    oracle::write(small, SEED);
    let (whole, moved, others) = (huge(2)?, huge(1)?, huge(1)?);
    for region in [small, whole, moved] {
        move_all(&gpu, region, Place::Vram)?;
        Job::add(region, 1).waves(4).run(&gpu)?;
    }
    move_all(&other, others, Place::Vram)?;
    // Not where it was put.
    let moved = moved.remap()?;
    ensure_place(&other, moved, Place::Vram)?;
    drop(gpu);
    for region in [small, whole, moved] {
        ensure_place(&other, region, Place::Ram)?;
    }
    ensure_huge(&other, whole).context("at home")?;
    ensure_huge(&other, moved).context("at home, after mremap")?;
    ensure_place(&other, others, Place::Vram)?;
    for region in [small, whole, moved] {
        oracle::check(region, SEED, 1)?;
    }
    oracle::check(others, SEED, 0)
}

fn huge_pages_evicted_come_home_whole() -> Result<()> {
    let gpu = Gpu::open_first()?;
    let (first, second) = (huge(12)?, huge(12)?);
    for region in [first, second] {
        move_all(&gpu, region, Place::Vram)?;
    }
    ensure!(gpu.stats()?.pages_evicted > 0, "nothing went");
    for region in [first, second] {
        ensure_huge(&gpu, region)?;
        oracle::check(region, SEED, 0)?;
    }
    Ok(())
}

fn huge_pages_of_more_than_vram_stay_whole() -> Result<()> {
    let gpu = Gpu::open_first()?;
    // In one block of VRAM, there is room for small pages only.
    let small = Region::map(PAGE_SIZE, Backing::Small)?;
    small.store(0, 1);
    move_all(&gpu, small, Place::Vram)?;
    let region = huge(VRAM as usize / HUGE_PAGE_SIZE * 3 / 2)?;
    for place in [Place::Vram, Place::Vram, Place::Ram] {
        migrate(&gpu, region, place)?;
        ensure_huge(&gpu, region).with_context(|| format!("asked to {place:?}"))?;
    }
    oracle::check(region, SEED, 0)
}

fn range_from_middle_to_middle_leaves_huge_pages_between_whole() -> Result<()> {
    let gpu = Gpu::open_first()?;
    let region = huge(5)?;
    let range = region.part(HALF, region.length() - HUGE_PAGE_SIZE);
    let between = region.part(HUGE_PAGE_SIZE, 3 * HUGE_PAGE_SIZE);
    for place in [Place::Vram, Place::Ram] {
        move_all(&gpu, range, place)?;
        ensure_huge(&gpu, between).with_context(|| format!("asked to {place:?}"))?;
        oracle::check_part(region.part(0, HALF), SEED, 0, 0)?;
    }
    oracle::check(region, SEED, 0)
}

fn inaccessible_pages_come_home_on_request() -> Result<()> {
    let gpu = Gpu::open_first()?;
    for backing in [Backing::Small, Backing::Huge] {
        let region = Region::map(HUGE_PAGE_SIZE, backing)?;
        oracle::write(region, SEED);
        move_all(&gpu, region, Place::Vram)?;
        region.protect(Protection::None)?;
        let moved = migrate(&gpu, region, Place::Ram)?;
        ensure!(moved.moved as usize == region.pages().count(), "{moved:?}");
        region.protect(Protection::ReadWrite)?;
        ensure_place(&gpu, region, Place::Ram)?;
        oracle::check(region, SEED, 0)?;
    }
    Ok(())
}
