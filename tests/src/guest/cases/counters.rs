// SPDX-License-Identifier: MIT OR Apache-2.0
//! What is counted, to the last page: by STATS for the descriptor, in debugfs for the GPU.

use crate::guest::{
    VRAM,
    call::{self, JOB_TIME, Job, ensure_status},
    oracle,
    place::{driver_count, ensure_place, migrate, move_all, state},
};
use anyhow::{Result, ensure};
use farfault::arena::{Backing, Protection, Region};
use farfault::{
    Access, Advice, Gpu, HUGE_PAGE_SIZE, PAGE_SIZE, Place,
    uapi::{JobStatus, Stats},
};
group! { "counters", on Small, seconds 90:
    huge_page_that_moves_counts_all_its_pages_and_one_fault,
    pages_that_go_home_on_request_or_by_a_close_are_not_evicted,
    jobs_that_fail_count_a_fault_each,
    huge_page_mapped_in_ram_counts_all_its_pages,
    only_what_the_gpu_had_mapped_counts_as_invalidated,
    gpu_with_one_descriptor_counts_what_that_does,
}

const SEED: u64 = 0xc0de;
const PAGES: u64 = (HUGE_PAGE_SIZE / PAGE_SIZE) as u64;

fn written(length: usize, backing: Backing<'_>) -> Result<Region> {
    let region = Region::map(length, backing)?;
    oracle::write(region, SEED);
    Ok(region)
}

/// By name, in the order of debugfs.
fn named(stats: Stats) -> [(&'static str, u64); 10] {
    [
        ("gpu_faults", stats.gpu_faults),
        ("gpu_faults_failed", stats.gpu_faults_failed),
        ("cpu_faults", stats.cpu_faults),
        ("pages_to_vram", stats.pages_to_vram),
        ("pages_to_ram", stats.pages_to_ram),
        ("pages_evicted", stats.pages_evicted),
        ("pages_mapped", stats.pages_mapped),
        ("invalidations", stats.invalidations),
        ("migrate_ns", stats.migrate_ns),
        ("jobs", stats.jobs),
    ]
}

fn huge_page_that_moves_counts_all_its_pages_and_one_fault() -> Result<()> {
    let gpu = Gpu::open_first()?;
    let region = written(2 * HUGE_PAGE_SIZE, Backing::Huge)?;
    move_all(&gpu, region, Place::Vram)?;
    let asked = gpu.stats()?;
    ensure!(asked.pages_to_vram == 2 * PAGES, "{asked:?}");
    ensure!(state(&gpu, region, 0)?.cpu.huge, "it is in pieces");
    region.store(7, 0);
    let touched = gpu.stats()?;
    ensure!(
        (touched.cpu_faults, touched.pages_to_ram) == (1, PAGES),
        "after a touch: {touched:?}"
    );
    move_all(&gpu, region, Place::Ram)?;
    let home = gpu.stats()?;
    ensure!(
        (home.cpu_faults, home.pages_to_ram) == (1, 2 * PAGES),
        "at home: {home:?}"
    );
    // By a fault of the GPU, it goes as a whole.
    Job::sum(region.part(0, PAGE_SIZE)).run(&gpu)?;
    let faulted = gpu.stats()?;
    ensure!(
        (faulted.gpu_faults, faulted.pages_to_vram) == (1, 3 * PAGES),
        "after a job: {faulted:?}"
    );
    Ok(())
}

fn pages_that_go_home_on_request_or_by_a_close_are_not_evicted() -> Result<()> {
    for backing in [Backing::Small, Backing::Huge] {
        let before = (
            driver_count(0, "pages_evicted")?,
            driver_count(0, "pages_to_ram")?,
        );
        let gpu = Gpu::open_first()?;
        let region = written(HUGE_PAGE_SIZE, backing)?;
        for place in [Place::Vram, Place::Ram, Place::Vram] {
            move_all(&gpu, region, place)?;
        }
        ensure!(gpu.stats()?.pages_evicted == 0);
        drop(gpu);
        let after = (
            driver_count(0, "pages_evicted")?,
            driver_count(0, "pages_to_ram")?,
        );
        ensure!(
            after == (before.0, before.1 + 2 * PAGES),
            "{backing:?}: {after:?} after {before:?}"
        );
    }
    Ok(())
}

fn jobs_that_fail_count_a_fault_each() -> Result<()> {
    const ROUNDS: u64 = 10;
    let gpu = Gpu::open_first()?;
    let nowhere = Region::nowhere(PAGE_SIZE)?;
    let (none, read_only) = (
        written(PAGE_SIZE, Backing::Small)?,
        written(PAGE_SIZE, Backing::Small)?,
    );
    none.protect(Protection::None)?;
    read_only.protect(Protection::Read)?;
    let mut jobs = 0;
    for _ in 0..ROUNDS {
        for bad in [nowhere, none, read_only] {
            Job::fill(bad, 1).fails_at(&gpu, bad.address(), Access::Write)?;
            jobs += 1;
            let stats = gpu.stats()?;
            let counted = (stats.gpu_faults, stats.gpu_faults_failed, stats.jobs);
            ensure!(counted == (jobs, jobs, jobs), "{jobs} jobs: {stats:?}");
        }
    }
    // Beside one that does not fail, of memory behind and of memory before it, while the driver is busy: it finds the
    // faults of both at once.
    let good = written(PAGE_SIZE, Backing::Small)?;
    let behind = Region::nowhere(PAGE_SIZE)?;
    for round in 1..=ROUNDS {
        let busy = written(HUGE_PAGE_SIZE, Backing::Small)?;
        gpu.advise(busy.pages(), Advice::PreferGpu)?;
        good.discard()?;
        let bad = if round % 2 == 0 { behind } else { nowhere };
        let submitted = [Job::sum(busy), Job::fill(bad, 1), Job::fill(good, 2)];
        let expected = [JobStatus::Ok, JobStatus::Fault, JobStatus::Ok];
        let fences = submitted.map(|job| job.submit(&gpu));
        for (fence, status) in fences.into_iter().zip(expected) {
            ensure_status(&call::wait(&gpu, fence?, JOB_TIME)?, status)?;
        }
        busy.unmap()?;
        let failed = gpu.stats()?.gpu_faults_failed;
        ensure!(failed == jobs + round, "{failed} of {jobs} + {round}");
    }
    Ok(())
}

fn huge_page_mapped_in_ram_counts_all_its_pages() -> Result<()> {
    let gpu = Gpu::open_first()?;
    let region = written(HUGE_PAGE_SIZE, Backing::Huge)?;
    gpu.advise(region.pages(), Advice::MapOnly)?;
    Job::sum(region.part(9 * PAGE_SIZE, PAGE_SIZE)).run(&gpu)?;
    let mapped = state(&gpu, region, 9)?.gpu;
    ensure!(mapped.place == Place::Ram && mapped.huge, "{mapped:?}");
    let stats = gpu.stats()?;
    ensure!(
        (stats.gpu_faults, stats.pages_mapped) == (1, PAGES),
        "{stats:?}"
    );
    ensure!(stats.pages_to_vram == 0, "{stats:?}");
    Ok(())
}

fn only_what_the_gpu_had_mapped_counts_as_invalidated() -> Result<()> {
    let gpu = Gpu::open_first()?;
    let (used, other) = (
        written(PAGE_SIZE, Backing::Small)?,
        written(HUGE_PAGE_SIZE, Backing::Small)?,
    );
    Job::sum(used).run(&gpu)?;
    ensure_place(&gpu, used, Place::Vram)?;
    let before = gpu.stats()?.invalidations;
    for protection in [Protection::Read, Protection::ReadWrite] {
        other.protect(protection)?;
    }
    other.unmap()?;
    let unused = gpu.stats()?.invalidations;
    ensure!(unused == before, "{unused} after {before}");
    // The second call finds nothing mapped any more.
    for protection in [Protection::Read, Protection::ReadWrite] {
        used.protect(protection)?;
    }
    let after = gpu.stats()?.invalidations;
    ensure!(after == before + 1, "{after} after {before}");
    Ok(())
}

fn gpu_with_one_descriptor_counts_what_that_does() -> Result<()> {
    let names = named(Stats::default()).map(|(name, _)| name);
    let mut before = Vec::new();
    for name in names {
        before.push(driver_count(0, name)?);
    }
    let gpu = Gpu::open_first()?;
    let regions = [
        written(2 * HUGE_PAGE_SIZE, Backing::Huge)?,
        written(HUGE_PAGE_SIZE, Backing::Small)?,
        Region::map(VRAM as usize, Backing::Small)?,
    ];
    let bad = Region::nowhere(PAGE_SIZE)?;
    Job::fill(bad, 1).fails_at(&gpu, bad.address(), Access::Write)?;
    for region in regions {
        Job::add(region.part(0, HUGE_PAGE_SIZE), 1)
            .waves(4)
            .run(&gpu)?;
        migrate(&gpu, region, Place::Vram)?;
        region.store(0, 1);
    }
    for region in regions {
        // Nothing is left that anybody could take from the GPU.
        region.unmap()?;
    }
    for ((name, own), before) in named(gpu.stats()?).into_iter().zip(before) {
        let whole = driver_count(0, name)? - before;
        ensure!(own > 0, "{name}: this test shows nothing");
        ensure!(whole == own, "{name}: {own}, and {whole} of the GPU");
    }
    Ok(())
}
