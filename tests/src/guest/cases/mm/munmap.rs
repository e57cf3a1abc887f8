// SPDX-License-Identifier: MIT OR Apache-2.0
//! `munmap`, whole and of parts, at rest and while jobs work there; see also group `unmap`.

use super::start::{
    SEED, STARTS, each_start, ensure_sum, ensure_words, exercise, exercise_all, exercise_empty,
};
use crate::guest::{
    call::{self, JOB_TIME, Job, ensure_status},
    oracle,
    place::move_all,
};
use anyhow::{Context, Result, ensure};
use farfault::arena::{Backing, Region};
use farfault::{Access, Advice, Gpu, HUGE_PAGE_SIZE, PAGE_SIZE, Place, uapi::JobStatus};
use rustix::{
    fs::{MemfdFlags, ftruncate, memfd_create},
    io::Errno,
};
use std::{fs::File, os::unix::fs::FileExt, time::Duration};

group! { "mm::munmap", gpus 1, seconds 60:
    whole_region_unmapped_is_gone_and_mapped_again_is_empty,
    begin_middle_and_end_unmapped_leave_the_rest,
    every_other_page_unmapped_leaves_the_others,
    region_replaced_in_one_step_shows_the_gpu_the_new_memory,
    several_tables_of_memory_replaced_in_one_step_show_the_gpu_the_new_memory,
    sparse_pages_of_several_tables_taken_in_one_step_show_the_gpu_the_new_memory,
    many_single_pages_unmapped_in_one_step_are_all_gone,
    pages_of_tables_that_were_given_up_are_gone_when_they_are_unmapped,
    unmapped_during_a_job_that_writes_is_not_written_any_more,
    replaced_during_a_job_the_job_goes_on_in_the_new_memory,
}

const QUARTER: usize = HUGE_PAGE_SIZE / 4;

fn whole_region_unmapped_is_gone_and_mapped_again_is_empty() -> Result<()> {
    each_start(|gpu, region| {
        region.unmap()?;
        Job::sum(region).fails_at(gpu, region.address(), Access::Read)?;
        Job::fill(region, 9).fails_at(gpu, region.address(), Access::Write)?;
        region.map_again()?;
        exercise_empty(gpu, region)
    })
}

fn begin_middle_and_end_unmapped_leave_the_rest() -> Result<()> {
    for hole in 0..4 {
        each_start(|gpu, region| {
            let gone = region.part(hole * QUARTER, QUARTER);
            gone.unmap()?;
            for quarter in (0..4).filter(|&quarter| quarter != hole) {
                let part = region.part(quarter * QUARTER, QUARTER);
                exercise(gpu, part, quarter * QUARTER / 8, 0)?;
            }
            Job::sum(gone).fails_at(gpu, gone.address(), Access::Read)?;
            gone.map_again()?;
            exercise_empty(gpu, gone)
        })
        .with_context(|| format!("quarter {hole}"))?;
    }
    Ok(())
}

fn every_other_page_unmapped_leaves_the_others() -> Result<()> {
    each_start(|gpu, region| {
        let page = |number: usize| region.part(number * PAGE_SIZE, PAGE_SIZE);
        // On both sides of the border between the halves.
        for number in (240..272).step_by(2) {
            page(number).unmap()?;
        }
        for number in 240..272 {
            if number % 2 == 0 {
                Job::sum(page(number)).fails_at(gpu, page(number).address(), Access::Read)?;
            } else {
                exercise(gpu, page(number), number * PAGE_SIZE / 8, 0)?;
            }
        }
        exercise(gpu, region.part(0, 240 * PAGE_SIZE), 0, 0)
    })
}

fn region_replaced_in_one_step_shows_the_gpu_the_new_memory() -> Result<()> {
    each_start(|gpu, region| {
        region.replace()?;
        exercise_empty(gpu, region)?;
        oracle::write(region, SEED);
        exercise_all(gpu, region)
    })
}

/// Each 2 MiB have a page table of their own.
fn several_tables_of_memory_replaced_in_one_step_show_the_gpu_the_new_memory() -> Result<()> {
    for start in STARTS {
        let gpu = Gpu::open_first()?;
        let region = start.region(&gpu, 3 * HUGE_PAGE_SIZE)?;
        region.replace()?;
        exercise_empty(&gpu, region).with_context(|| format!("{start:?}"))?;
        region.unmap()?;
    }
    Ok(())
}

/// As above, of memory in which the GPU has only a page here and there: what it may keep lies in several pieces.
fn sparse_pages_of_several_tables_taken_in_one_step_show_the_gpu_the_new_memory() -> Result<()> {
    const BLOCKS: usize = 5;
    let take: [fn(Region) -> rustix::io::Result<()>; 2] = [Region::replace, Region::discard];
    for (place, take) in [Place::Vram, Place::Ram]
        .into_iter()
        .flat_map(|place| take.map(|take| (place, take)))
    {
        let gpu = Gpu::open_first()?;
        let region = Region::map(BLOCKS * HUGE_PAGE_SIZE, Backing::Small)?;
        gpu.advise(region.pages(), Advice::MapOnly)?;
        // One block has none.
        let pages: Vec<_> = [0, 1, 2, 4]
            .map(|block| region.part(block * HUGE_PAGE_SIZE + (5 + block) * PAGE_SIZE, PAGE_SIZE))
            .into();
        for page in &pages {
            oracle::write(*page, SEED);
            move_all(&gpu, *page, place)?;
        }
        for page in &pages {
            exercise_by_gpu(&gpu, *page)?;
        }
        take(region)?;
        for page in &pages {
            let sum = Job::sum(*page).run(&gpu)?;
            ensure!(sum == 0, "{place:?}: the GPU reads what was there before");
            Job::fill(*page, 5).run(&gpu)?;
            ensure_words(*page, 5).with_context(|| format!("{place:?}"))?;
        }
        region.unmap()?;
    }
    Ok(())
}

/// More pieces than the driver has room for in one request.
fn many_single_pages_unmapped_in_one_step_are_all_gone() -> Result<()> {
    const BLOCKS: usize = 3;
    let gpu = Gpu::open_first()?;
    let region = Region::map(BLOCKS * HUGE_PAGE_SIZE, Backing::Small)?;
    gpu.advise(region.pages(), Advice::MapOnly)?;
    oracle::write(region, SEED);
    let page = |number: usize| region.part(number * PAGE_SIZE, PAGE_SIZE);
    let pages = region.pages().count();
    // The GPU maps what is around a page, but not over holes.
    for hole in (1..pages).step_by(2) {
        page(hole).unmap()?;
    }
    for number in (0..pages).step_by(2) {
        ensure_sum(&gpu, page(number), number * PAGE_SIZE / 8, 0)?;
    }
    // Known to the TLB when they are unmapped: the first ones, and some of all.
    let looked_at = (0..8).chain((8..pages).step_by(pages / 16));
    let looked_at: Vec<_> = looked_at.filter(|number| number % 2 == 0).collect();
    for &number in &looked_at {
        ensure_sum(&gpu, page(number), number * PAGE_SIZE / 8, 0)?;
    }
    region.unmap()?;
    for &number in &looked_at {
        Job::sum(page(number))
            .fails_at(&gpu, page(number).address(), Access::Read)
            .with_context(|| format!("page {number}"))?;
    }
    Ok(())
}

/// The driver gives up all of a context's tables when they have become many, and maps anew what is used. What the TLB
/// knew of them is gone, too.
fn pages_of_tables_that_were_given_up_are_gone_when_they_are_unmapped() -> Result<()> {
    // Each has a table of its own, and one context may have 64 in all.
    const BLOCKS: usize = 150;
    let gpu = Gpu::open_first()?;
    let region = Region::map(BLOCKS * HUGE_PAGE_SIZE, Backing::Small)?;
    gpu.advise(region.pages(), Advice::MapOnly)?;
    let page = |block: usize| region.part(block * HUGE_PAGE_SIZE, PAGE_SIZE);
    for block in 0..BLOCKS {
        oracle::write(page(block), SEED);
        // It writes, so that there are as many rights as there can be.
        Job::add(page(block), 0).run(&gpu)?;
        // The next page may have been the one too many.
        if let Some(before) = block.checked_sub(1) {
            page(before).unmap()?;
            Job::sum(page(before))
                .fails_at(&gpu, page(before).address(), Access::Read)
                .with_context(|| format!("block {before}"))?;
        }
    }
    Ok(())
}

/// The GPU reads and writes it, and nobody else does after that.
fn exercise_by_gpu(gpu: &Gpu, page: Region) -> Result<()> {
    Job::add(page, 1).run(gpu)?;
    ensure_sum(gpu, page, 0, 1)
}

/// A word in a page of a file, which outlives its mapping; and a job that adds to it for ever.
fn writer(gpu: &Gpu) -> Result<(File, Region, u64)> {
    let file = File::from(memfd_create("farfault-test", MemfdFlags::CLOEXEC)?);
    ftruncate(&file, PAGE_SIZE as u64)?;
    let region = Region::map(PAGE_SIZE, Backing::File(&file))?;
    let fence = Job::atomic_add(region.address(), 1, u64::MAX).submit(gpu)?;
    super::start::eventually("the job writes", || Ok(word(&file)? != 0))?;
    Ok((file, region, fence))
}

fn word(file: &File) -> Result<u64> {
    let mut bytes = [0; 8];
    file.read_exact_at(&mut bytes, 0)?;
    Ok(u64::from_le_bytes(bytes))
}

fn unmapped_during_a_job_that_writes_is_not_written_any_more() -> Result<()> {
    let gpu = Gpu::open_first()?;
    let (file, region, fence) = writer(&gpu)?;
    region.unmap()?;
    let after = word(&file)?;
    let end = call::wait(&gpu, fence, JOB_TIME)?;
    ensure_status(&end, JobStatus::Fault)?;
    ensure!(end.fault_address == region.address(), "{end:x?}");
    ensure!(word(&file)? == after, "it was written after munmap");
    Ok(())
}

fn replaced_during_a_job_the_job_goes_on_in_the_new_memory() -> Result<()> {
    let gpu = Gpu::open_first()?;
    let (file, region, fence) = writer(&gpu)?;
    region.replace()?;
    let after = word(&file)?;
    super::start::eventually("the job writes to the new memory", || {
        Ok(region.load(0) != 0)
    })?;
    ensure!(word(&file)? == after, "the old page was written");
    let running = call::wait(&gpu, fence, Duration::ZERO);
    ensure!(running.is_err_and(|error| error == Errno::TIMEDOUT));
    call::kill(&gpu, fence)?;
    ensure_status(&call::wait(&gpu, fence, JOB_TIME)?, JobStatus::Killed)?;
    Ok(region.unmap()?)
}
