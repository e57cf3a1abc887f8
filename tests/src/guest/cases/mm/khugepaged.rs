// SPDX-License-Identifier: MIT OR Apache-2.0
//! Small pages that become a huge one under the GPU: by `MADV_COLLAPSE`, and by khugepaged, which leaves
//! pages in VRAM alone where there are many.

use super::start::{
    At, SEED, STARTS, Start, ensure_agreement, eventually, exercise, exercise_all, while_adding,
};
use crate::guest::{
    call::Job,
    oracle,
    place::{ensure_place, move_all, state},
    tunables::Tunables,
};
use anyhow::{Context, Result, ensure};
use farfault::arena::{Backing, Region};
use farfault::{Gpu, HUGE_PAGE_SIZE, PAGE_SIZE, Place, stage::Advice};
use std::fs;

group! { "mm::khugepaged", gpus 1, seconds 120:
    collapse_of_mirrored_pages_is_seen_by_the_gpu,
    collapse_over_pages_in_vram_keeps_the_data,
    collapse_during_jobs_that_write_loses_nothing,
    khugepaged_collapses_mirrored_pages_under_the_gpu,
    khugepaged_leaves_pages_in_vram_alone,
    khugepaged_brings_few_pages_in_vram_home_and_collapses_them,
    khugepaged_brings_few_pages_in_vram_home_under_jobs_that_write,
}

const KHUGEPAGED: &str = "/sys/kernel/mm/transparent_hugepage/khugepaged";

fn small(at: At) -> Result<Start> {
    let start = STARTS
        .into_iter()
        .find(|start| start.at == at && matches!(start.backing, Backing::Small));
    start.context("no such start")
}

fn collapse_of_mirrored_pages_is_seen_by_the_gpu() -> Result<()> {
    let gpu = Gpu::open_first()?;
    let region = small(At::Ram)?.region(&gpu, HUGE_PAGE_SIZE)?;
    region.advise(Advice::HugePage)?;
    region.advise(Advice::Collapse)?;
    ensure!(state(&gpu, region, 0)?.cpu.huge, "it is not huge");
    exercise_all(&gpu, region)?;
    ensure!(
        state(&gpu, region, 0)?.gpu.huge,
        "the GPU has not mapped it as a huge page"
    );
    Ok(())
}

fn collapse_over_pages_in_vram_keeps_the_data() -> Result<()> {
    for at in [At::Vram, At::Half] {
        let gpu = Gpu::open_first()?;
        let region = small(at)?.region(&gpu, HUGE_PAGE_SIZE)?;
        region.advise(Advice::HugePage)?;
        // It touches what is not there for the CPU, so pages come home, and may be one after that.
        let collapsed = region.advise(Advice::Collapse);
        eprintln!("{at:?}: {collapsed:?}");
        ensure_agreement(&gpu, region)?;
        exercise_all(&gpu, region).with_context(|| format!("{at:?}: {collapsed:?}"))?;
        // From here on all is in RAM.
        region.advise(Advice::Collapse)?;
        ensure!(state(&gpu, region, 0)?.cpu.huge, "{at:?}: it is not huge");
        exercise(&gpu, region, 0, 2)?;
        region.unmap()?;
    }
    Ok(())
}

fn collapse_during_jobs_that_write_loses_nothing() -> Result<()> {
    for at in [At::Ram, At::Half, At::Vram] {
        let gpu = Gpu::open_first()?;
        let region = small(at)?.region(&gpu, HUGE_PAGE_SIZE)?;
        region.advise(Advice::HugePage)?;
        let mut rounds = 0;
        eventually("pages are collapsed under a job", || {
            rounds += 1;
            // It may find pages in use for a moment.
            let collapse = || Ok(region.advise(Advice::Collapse));
            let collapsed = while_adding(&gpu, region, collapse)?.is_ok();
            Ok(collapsed && rounds >= 6)
        })
        .with_context(|| format!("{at:?}"))?;
        ensure!(state(&gpu, region, 0)?.cpu.huge, "{at:?}: it is not huge");
        exercise(&gpu, region, 0, rounds).with_context(|| format!("{at:?}"))?;
        region.unmap()?;
    }
    Ok(())
}

/// khugepaged in a hurry, until this is dropped.
fn hurry() -> Result<Tunables> {
    let settings = [
        ("alloc_sleep_millisecs", "1"),
        ("scan_sleep_millisecs", "1"),
        ("pages_to_scan", "65536"),
    ];
    Tunables::set(KHUGEPAGED, &settings)
}

/// How often it has looked at everything.
fn scans() -> Result<u64> {
    let path = format!("{KHUGEPAGED}/full_scans");
    Ok(fs::read_to_string(path)?.trim().parse()?)
}

fn khugepaged_collapses_mirrored_pages_under_the_gpu() -> Result<()> {
    let _hurry = hurry()?;
    let gpu = Gpu::open_first()?;
    let region = small(At::Ram)?.region(&gpu, HUGE_PAGE_SIZE)?;
    let other = Region::map(HUGE_PAGE_SIZE, Backing::Small)?;
    let busy = Job::endless(other).submit(&gpu)?;
    region.advise(Advice::HugePage)?;
    eventually("khugepaged collapses the pages", || {
        Ok(state(&gpu, region, 0)?.cpu.huge)
    })?;
    crate::guest::call::kill(&gpu, busy)?;
    crate::guest::call::wait(&gpu, busy, crate::guest::call::JOB_TIME)?;
    exercise_all(&gpu, region)
}

fn khugepaged_leaves_pages_in_vram_alone() -> Result<()> {
    let _hurry = hurry()?;
    let gpu = Gpu::open_first()?;
    let region = small(At::Vram)?.region(&gpu, HUGE_PAGE_SIZE)?;
    region.advise(Advice::HugePage)?;
    let before = scans()?;
    eventually(
        "khugepaged has looked at all",
        || Ok(scans()? >= before + 3),
    )?;
    ensure_place(&gpu, region, Place::Vram)?;
    exercise_all(&gpu, region)?;
    oracle::write(region, SEED);
    eventually("khugepaged collapses what came home", || {
        Ok(state(&gpu, region, 0)?.cpu.huge)
    })?;
    exercise_all(&gpu, region)
}

/// Fewer pages in VRAM than khugepaged would read back from swap (`max_ptes_swap`), which is what they are to
/// it. `meanwhile` gives what it has added to each word.
fn few_in_vram_are_collapsed(mut meanwhile: impl FnMut(&Gpu, Region) -> Result<u64>) -> Result<()> {
    const EVERY: usize = 16;
    let gpu = Gpu::open_first()?;
    let region = small(At::Ram)?.region(&gpu, HUGE_PAGE_SIZE)?;
    let pages = region.pages().count();
    let page = |number: usize| region.part(number * PAGE_SIZE, PAGE_SIZE);
    for number in (0..pages).step_by(EVERY) {
        move_all(&gpu, page(number), Place::Vram)?;
    }
    let _hurry = hurry()?;
    region.advise(Advice::HugePage)?;
    let mut added = 0u64;
    eventually("khugepaged collapses the pages", || {
        added += meanwhile(&gpu, region)?;
        // It wants pages that are in use; those in VRAM are not touched.
        for number in (0..pages).filter(|number| number % EVERY != 0) {
            page(number).load(0);
        }
        Ok(state(&gpu, region, 0)?.cpu.huge)
    })?;
    ensure_place(&gpu, region, Place::Ram)?;
    exercise(&gpu, region, 0, added)?;
    Ok(region.unmap()?)
}

fn khugepaged_brings_few_pages_in_vram_home_and_collapses_them() -> Result<()> {
    few_in_vram_are_collapsed(|_, _| Ok(0))
}

fn khugepaged_brings_few_pages_in_vram_home_under_jobs_that_write() -> Result<()> {
    few_in_vram_are_collapsed(|gpu, region| {
        Job::add(region, 1).waves(2).run(gpu)?;
        Ok(1)
    })
}
