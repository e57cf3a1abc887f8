// SPDX-License-Identifier: MIT OR Apache-2.0
//! Mappings that are taken apart, moved or protected while their pages are in VRAM, or a job uses
//! them.

use crate::guest::{
    call::{self, Job},
    oracle,
    place::{ensure_place, move_all},
};
use anyhow::{Result, ensure};
use farfault::arena::{Backing, Protection, Region};
use farfault::{Access, Gpu, HUGE_PAGE_SIZE, PAGE_SIZE, Place, uapi::JobStatus};
use std::time::{Duration, Instant};

group! { "unmap", on Small, seconds 60:
    part_of_a_huge_page_in_vram_unmapped_leaves_the_rest,
    region_unmapped_gives_its_vram_back,
    pages_in_vram_discarded_are_zero,
    huge_page_in_vram_moved_by_mremap_keeps_its_data,
    part_of_a_huge_page_in_vram_moved_by_mremap_keeps_all_data,
    small_pages_in_vram_moved_by_mremap_keep_their_data,
    part_of_a_huge_page_in_vram_made_read_only_fails_writers_there,
    pages_in_vram_made_inaccessible_and_back_keep_their_data,
    region_unmapped_during_a_job_ends_it_with_a_fault,
    region_moved_during_a_job_ends_it_with_a_fault,
    new_mapping_at_old_addresses_has_its_own_data,
}

const SEED: u64 = 0x0323;
/// The middle of a huge page: one quarter of it.
const MIDDLE: usize = HUGE_PAGE_SIZE / 4;

/// A region with a seed's words, in VRAM, where the GPU has used it.
fn in_vram(gpu: &Gpu, length: usize, backing: Backing<'_>) -> Result<Region> {
    let region = Region::map(length, backing)?;
    oracle::write(region, SEED);
    move_all(gpu, region, Place::Vram)?;
    let sum = Job::sum(region).waves(4).run(gpu)?;
    ensure!(sum == oracle::expected_sum(region, SEED, 0));
    Ok(region)
}

/// The GPU, then the CPU find a part of what was written.
fn ensure_data(gpu: &Gpu, region: Region, offset: usize, added: u64) -> Result<()> {
    let (first, words) = (offset / 8, region.words());
    let should =
        oracle::sum(SEED, first..first + words).wrapping_add(added.wrapping_mul(words as u64));
    ensure!(
        Job::sum(region).waves(2).run(gpu)? == should,
        "the GPU's sum at offset {offset:#x}"
    );
    oracle::check_part(region, SEED, first, added)
}

fn part_of_a_huge_page_in_vram_unmapped_leaves_the_rest() -> Result<()> {
    let gpu = Gpu::open_first()?;
    let region = in_vram(&gpu, HUGE_PAGE_SIZE, Backing::Huge)?;
    let hole = region.part(MIDDLE, MIDDLE);
    hole.unmap()?;
    Job::sum(hole).fails_at(&gpu, hole.address(), Access::Read)?;
    ensure_place(&gpu, region.part(0, MIDDLE), Place::Vram)?;
    ensure_data(&gpu, region.part(0, MIDDLE), 0, 0)?;
    ensure_data(&gpu, region.part(2 * MIDDLE, 2 * MIDDLE), 2 * MIDDLE, 0)
}

fn region_unmapped_gives_its_vram_back() -> Result<()> {
    let gpu = Gpu::open_first()?;
    // Twice as much as there is, one after the other: nothing has to be evicted.
    for round in 0..16 {
        let backing = if round % 2 == 0 {
            Backing::Huge
        } else {
            Backing::Small
        };
        in_vram(&gpu, 2 * HUGE_PAGE_SIZE, backing)?.unmap()?;
    }
    let stats = gpu.stats()?;
    ensure!(
        stats.pages_evicted == 0 && stats.pages_to_ram == 0,
        "{stats:?}"
    );
    Ok(())
}

fn pages_in_vram_discarded_are_zero() -> Result<()> {
    let gpu = Gpu::open_first()?;
    for backing in [Backing::Small, Backing::Huge] {
        let region = in_vram(&gpu, HUGE_PAGE_SIZE, backing)?;
        region.part(MIDDLE, MIDDLE).discard()?;
        ensure!(
            Job::sum(region.part(MIDDLE, MIDDLE)).run(&gpu)? == 0,
            "{backing:?}"
        );
        ensure!(region.load(MIDDLE / 8) == 0, "{backing:?}");
        ensure_data(&gpu, region.part(0, MIDDLE), 0, 0)?;
        ensure_data(&gpu, region.part(2 * MIDDLE, 2 * MIDDLE), 2 * MIDDLE, 0)?;
    }
    Ok(())
}

fn moved_by_mremap(length: usize, backing: Backing<'_>, part: (usize, usize)) -> Result<()> {
    let gpu = Gpu::open_first()?;
    for gpu_looks_first in [true, false] {
        let region = in_vram(&gpu, length, backing)?;
        let (offset, part_length) = part;
        let old = region.part(offset, part_length);
        let new = old.remap()?;
        if gpu_looks_first {
            Job::add(new, 1).waves(2).run(&gpu)?;
            ensure_data(&gpu, new, offset, 1)?;
        } else {
            oracle::check_part(new, SEED, offset / 8, 0)?;
            ensure_data(&gpu, new, offset, 0)?;
        }
        Job::sum(old).fails_at(&gpu, old.address(), Access::Read)?;
        if offset != 0 {
            ensure_data(&gpu, region.part(0, offset), 0, 0)?;
        }
        let end = offset + part_length;
        if end != length {
            ensure_data(&gpu, region.part(end, length - end), end, 0)?;
        }
    }
    Ok(())
}

fn huge_page_in_vram_moved_by_mremap_keeps_its_data() -> Result<()> {
    moved_by_mremap(2 * HUGE_PAGE_SIZE, Backing::Huge, (0, 2 * HUGE_PAGE_SIZE))
}

fn part_of_a_huge_page_in_vram_moved_by_mremap_keeps_all_data() -> Result<()> {
    moved_by_mremap(HUGE_PAGE_SIZE, Backing::Huge, (MIDDLE, MIDDLE))
}

fn small_pages_in_vram_moved_by_mremap_keep_their_data() -> Result<()> {
    moved_by_mremap(
        64 * PAGE_SIZE,
        Backing::Small,
        (8 * PAGE_SIZE, 16 * PAGE_SIZE),
    )
}

fn part_of_a_huge_page_in_vram_made_read_only_fails_writers_there() -> Result<()> {
    let gpu = Gpu::open_first()?;
    let region = in_vram(&gpu, HUGE_PAGE_SIZE, Backing::Huge)?;
    let part = region.part(MIDDLE, MIDDLE);
    part.protect(Protection::Read)?;
    let sum = Job::sum(region).run(&gpu)?;
    ensure!(sum == oracle::expected_sum(region, SEED, 0));
    Job::add(part, 1).fails_at(&gpu, part.address(), Access::Write)?;
    Job::add(region.part(0, MIDDLE), 1).run(&gpu)?;
    part.protect(Protection::ReadWrite)?;
    Job::add(part, 2).run(&gpu)?;
    ensure_data(&gpu, region.part(0, MIDDLE), 0, 1)?;
    ensure_data(&gpu, part, MIDDLE, 2)?;
    ensure_data(&gpu, region.part(2 * MIDDLE, 2 * MIDDLE), 2 * MIDDLE, 0)
}

fn pages_in_vram_made_inaccessible_and_back_keep_their_data() -> Result<()> {
    let gpu = Gpu::open_first()?;
    for backing in [Backing::Small, Backing::Huge] {
        let region = in_vram(&gpu, HUGE_PAGE_SIZE, backing)?;
        region.protect(Protection::None)?;
        Job::sum(region).fails_at(&gpu, region.address(), Access::Read)?;
        region.protect(Protection::Read)?;
        Job::add(region, 1).fails_at(&gpu, region.address(), Access::Write)?;
        region.protect(Protection::ReadWrite)?;
        ensure_data(&gpu, region, 0, 0)?;
    }
    Ok(())
}

/// `take_away` while an endless job goes round in a region: it ends with a fault in that region.
fn job_loses_memory(take_away: fn(Region) -> Result<()>) -> Result<()> {
    let gpu = Gpu::open_first()?;
    for (backing, place) in [
        (Backing::Small, Place::Vram),
        (Backing::Huge, Place::Vram),
        (Backing::Small, Place::Ram),
    ] {
        let region = Region::map(HUGE_PAGE_SIZE, backing)?;
        if place == Place::Ram {
            gpu.advise(region.pages(), farfault::Advice::MapOnly)?;
        }
        let fence = Job::endless(region).submit(&gpu)?;
        let deadline = Instant::now() + Duration::from_secs(20);
        while gpu.stats()?.gpu_faults == 0 {
            ensure!(Instant::now() < deadline, "the job has not begun");
        }
        take_away(region)?;
        let end = call::wait(&gpu, fence, call::JOB_TIME)?;
        call::ensure_status(&end, JobStatus::Fault)?;
        let range = region.address()..region.address() + region.length() as u64;
        ensure!(
            range.contains(&end.fault_address),
            "{end:x?}, region {range:x?}"
        );
        ensure!(end.access == Access::Read.raw(), "{end:x?}");
    }
    Ok(())
}

fn region_unmapped_during_a_job_ends_it_with_a_fault() -> Result<()> {
    job_loses_memory(|region| Ok(region.unmap()?))
}

fn region_moved_during_a_job_ends_it_with_a_fault() -> Result<()> {
    job_loses_memory(|region| Ok(region.remap().map(drop)?))
}

fn new_mapping_at_old_addresses_has_its_own_data() -> Result<()> {
    let gpu = Gpu::open_first()?;
    for backing in [Backing::Small, Backing::Huge] {
        let region = in_vram(&gpu, HUGE_PAGE_SIZE, backing)?;
        region.unmap()?;
        region.map_again()?;
        ensure!(Job::sum(region).waves(2).run(&gpu)? == 0, "{backing:?}");
        oracle::write(region, SEED + 1);
        let sum = Job::sum(region).waves(2).run(&gpu)?;
        ensure!(
            sum == oracle::expected_sum(region, SEED + 1, 0),
            "{backing:?}"
        );
    }
    Ok(())
}
