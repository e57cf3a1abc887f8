// SPDX-License-Identifier: MIT OR Apache-2.0
//! Reclaim at work on pages that the GPU has, while jobs run and by the limits of groups: invalidations come
//! from inside of it. Nobody waits for ever, and no data is lost.

use super::{
    cgroup::Cgroup,
    start::{At, SEED, Start, ensure_sum, eventually, exercise},
    storage::{EACH_SWAP, Swap, SwapOn, swapped, swapped_out, vmstat},
    swap::{MIRRORED, each_swap},
};
use crate::guest::{
    call::Job,
    child::{Gate, code},
    oracle,
    place::{ensure_place, move_all},
    settings,
};
use anyhow::{Context, Result, ensure};
use farfault::arena::{Backing, Region};
use farfault::{
    Gpu, HUGE_PAGE_SIZE, PAGE_SIZE, Place,
    process::{Child, Ended, fork},
    stage,
};
use std::time::{Duration, Instant};

group! { "mm::reclaim", on Disk, seconds 180:
    pages_swapped_out_under_running_jobs_lose_nothing,
    swapoff_under_running_jobs_loses_nothing,
    reclaim_of_the_group_swaps_mirrored_pages_and_leaves_vram,
    reclaim_of_the_group_leaves_locked_pages_that_the_gpu_had,
    pages_shared_after_fork_reclaimed_keep_each_their_data,
    jobs_at_the_groups_limit_with_a_process_that_wants_more_get_on,
    machine_without_memory_kills_who_wants_it_while_pages_come_home,
}

/// Each of so many parts of a case goes on for so long.
fn time(parts: usize) -> Instant {
    Instant::now() + settings::share(Duration::from_millis(500), parts as u32)
}

/// A child in a group.
fn in_group(cgroup: &Cgroup, body: impl FnOnce() -> Result<()>) -> Result<Child> {
    let in_child = || {
        cgroup.enter()?;
        body()
    };
    Ok(fork(|| code(in_child()))?)
}

fn ensure_well(child: Child) -> Result<()> {
    let ended = child.wait()?;
    ensure!(ended == Ended::Exited(0), "it ended with {ended:?}");
    Ok(())
}

fn pages_swapped_out_under_running_jobs_lose_nothing() -> Result<()> {
    each_swap(&MIRRORED, |gpu, region, _| {
        let parts = EACH_SWAP.len() * MIRRORED.len();
        let (end, before) = (time(parts), swapped_out()?);
        let mut added = 0;
        while added < 2 || Instant::now() < end {
            super::start::while_adding(gpu, region, || Ok(region.advise(stage::Advice::PageOut)?))?;
            added += 1;
            ensure_sum(gpu, region, 0, added)?;
        }
        ensure!(swapped_out()? > before, "nothing was swapped");
        exercise(gpu, region, 0, added)
    })
}

fn swapoff_under_running_jobs_loses_nothing() -> Result<()> {
    each_swap(&MIRRORED, |gpu, region, swap| {
        super::storage::swap_out(region)?;
        super::start::while_adding(gpu, region, || swap.off())?;
        ensure!(swapped(region)? == 0);
        ensure_place(gpu, region, Place::Ram)?;
        exercise(gpu, region, 0, 1)
    })
}

fn reclaim_of_the_group_swaps_mirrored_pages_and_leaves_vram() -> Result<()> {
    let _swap = Swap::on(SwapOn::Disk)?;
    for backing in [Backing::Small, Backing::Huge] {
        let cgroup = Cgroup::new("reclaim")?;
        ensure_well(in_group(&cgroup, || {
            let gpu = Gpu::open_first()?;
            let start = |at| Start { backing, at };
            let in_vram = start(At::Vram).region(&gpu, HUGE_PAGE_SIZE)?;
            let mirrored = start(At::Ram).region(&gpu, HUGE_PAGE_SIZE)?;
            let half = start(At::Half).region(&gpu, HUGE_PAGE_SIZE)?;
            let pages = mirrored.pages().count();
            eventually("mirrored pages are swapped", || {
                cgroup.reclaim(4 << 20)?;
                Ok(swapped(mirrored)? == pages && swapped(half)? == pages / 2)
            })?;
            ensure_place(&gpu, in_vram, Place::Vram)?;
            ensure_place(&gpu, half.part(0, HUGE_PAGE_SIZE / 2), Place::Vram)?;
            for region in [in_vram, mirrored, half] {
                exercise(&gpu, region, 0, 0)?;
            }
            // At home they are as all others.
            move_all(&gpu, in_vram, Place::Ram)?;
            eventually("what came home is swapped", || {
                cgroup.reclaim(4 << 20)?;
                Ok(swapped(in_vram)? == pages)
            })?;
            exercise(&gpu, in_vram, 0, 2)
        })?)
        .with_context(|| format!("{backing:?}"))?;
    }
    Ok(())
}

/// Locked when they were in RAM, or in VRAM, and moved since; the same memory without a lock goes.
fn reclaim_of_the_group_leaves_locked_pages_that_the_gpu_had() -> Result<()> {
    let _swap = Swap::on(SwapOn::Disk)?;
    for backing in [Backing::Small, Backing::Huge] {
        let cgroup = Cgroup::new("locked")?;
        ensure_well(in_group(&cgroup, || {
            let gpu = Gpu::open_first()?;
            let region = |at| Start { backing, at }.region(&gpu, HUGE_PAGE_SIZE);
            let (stayed, came, free) = (region(At::Ram)?, region(At::Vram)?, region(At::Ram)?);
            came.lock()?;
            stayed.lock()?;
            move_all(&gpu, stayed, Place::Vram)?;
            move_all(&gpu, stayed, Place::Ram)?;
            Job::add(stayed, 0).run(&gpu)?;
            eventually("what is not locked is swapped", || {
                cgroup.reclaim(8 << 20)?;
                Ok(swapped(free)? == free.pages().count())
            })?;
            for region in [stayed, came] {
                ensure!(swapped(region)? == 0, "locked pages were swapped");
                ensure_place(&gpu, region, Place::Ram)?;
            }
            // Without its lock it is as all others.
            stayed.unlock()?;
            eventually("what was locked is swapped", || {
                cgroup.reclaim(8 << 20)?;
                Ok(swapped(stayed)? == stayed.pages().count())
            })?;
            ensure!(swapped(came)? == 0, "locked pages were swapped");
            [stayed, came, free]
                .into_iter()
                .try_for_each(|region| exercise(&gpu, region, 0, 0))
        })?)
        .with_context(|| format!("{backing:?}"))?;
    }
    Ok(())
}

fn pages_shared_after_fork_reclaimed_keep_each_their_data() -> Result<()> {
    let _swap = Swap::on(SwapOn::Disk)?;
    for start in MIRRORED {
        let cgroup = Cgroup::new("shared")?;
        ensure_well(in_group(&cgroup, || {
            let gpu = Gpu::open_first()?;
            let region = start.region(&gpu, HUGE_PAGE_SIZE)?;
            let (from_parent, to_child) = rustix::pipe::pipe()?;
            let child = fork(|| {
                code((|| {
                    rustix::io::read(&from_parent, &mut [0u8])?;
                    oracle::check(region, SEED, 0)?;
                    let gpu = Gpu::open_first()?;
                    Job::add(region, 50).waves(2).run(&gpu)?;
                    oracle::check(region, SEED, 50)
                })())
            })?;
            eventually("shared pages are swapped", || {
                cgroup.reclaim(4 << 20)?;
                Ok(swapped(region)? == region.pages().count())
            })?;
            Job::add(region, 1).waves(2).run(&gpu)?;
            rustix::io::write(&to_child, &[1])?;
            ensure!(child.wait()? == Ended::Exited(0));
            exercise(&gpu, region, 0, 1)
        })?)
        .with_context(|| format!("{start:?}"))?;
    }
    Ok(())
}

/// The other one has more memory than the group may have, and goes round in it. All that comes in for one
/// sends something of the other out.
fn jobs_at_the_groups_limit_with_a_process_that_wants_more_get_on() -> Result<()> {
    const LIMIT: usize = 24 << 20;
    let _swap = Swap::on(SwapOn::Disk)?;
    let cgroup = Cgroup::new("pressure")?;
    let before = swapped_out()?;
    let begun = Gate::new()?;
    let worker = in_group(&cgroup, || {
        let gpu = Gpu::open_first()?;
        let places = [At::Vram, At::Ram, At::Half];
        let starts = [Backing::Small, Backing::Huge]
            .into_iter()
            .flat_map(|backing| places.map(|at| Start { backing, at }));
        let regions: Result<Vec<Region>> = starts
            .map(|start| start.region(&gpu, HUGE_PAGE_SIZE))
            .collect();
        begun.open()?;
        let regions = regions?;
        let (end, mut added) = (time(1), 0);
        while added < 3 || Instant::now() < end {
            for &region in &regions {
                Job::add(region, 1).waves(4).run(&gpu)?;
            }
            added += 1;
        }
        for region in regions {
            ensure_sum(&gpu, region, 0, added)?;
            oracle::check(region, SEED, added)?;
        }
        Ok(())
    })?;
    begun.wait()?;
    cgroup.set_max(LIMIT as u64)?;
    let hog = in_group(&cgroup, || {
        let region = Region::map(LIMIT + LIMIT / 4, Backing::Small)?;
        for round in 0.. {
            for page in 0..region.pages().count() {
                region.store(page * PAGE_SIZE / 8, round);
            }
        }
        Ok(())
    })?;
    ensure_well(worker)?;
    drop(hog);
    ensure!(swapped_out()? > before, "nothing was swapped");
    ensure!(
        cgroup.events("max")? > 0,
        "the group was never at its limit"
    );
    ensure!(cgroup.events("oom_kill")? == 0);
    Ok(())
}

/// The kernel takes memory from those first that ask for it by this.
const FIRST: &str = "1000";

/// Takes all the memory that there is.
fn want_everything() -> Result<()> {
    std::fs::write("/proc/self/oom_score_adj", FIRST)?;
    loop {
        let region = Region::map(64 << 20, Backing::Huge)?;
        for page in 0..region.length() / PAGE_SIZE {
            region.store(page * PAGE_SIZE / 8, 1);
        }
    }
}

/// Pages come home to a machine that has no page left, by the CPU's touch and by request.
fn machine_without_memory_kills_who_wants_it_while_pages_come_home() -> Result<()> {
    for backing in [Backing::Small, Backing::Huge] {
        let gpu = Gpu::open_first()?;
        let region = Region::map(8 * HUGE_PAGE_SIZE, backing)?;
        oracle::write(region, SEED);
        let before = vmstat("oom_kill")?;
        // The kernel may kill once more before what the first one had is free.
        let spares = [(); 2].map(|()| {
            fork(|| {
                let offered = std::fs::write("/proc/self/oom_score_adj", FIRST);
                std::thread::sleep(Duration::from_secs(600));
                u8::from(offered.is_err())
            })
        });
        let hog = fork(|| code(want_everything()))?;
        let mut rounds = 0u64;
        while vmstat("oom_kill")? == before {
            move_all(&gpu, region, Place::Vram)?;
            let (home, asked) = (HUGE_PAGE_SIZE * 4, HUGE_PAGE_SIZE * 4);
            for page in 0..home / PAGE_SIZE {
                region.atomic_add(page * PAGE_SIZE / 8, 0);
            }
            move_all(&gpu, region.part(home, asked), Place::Ram)?;
            rounds += 1;
        }
        let ended = hog.wait()?;
        ensure!(
            ended == Ended::Signaled(rustix::process::Signal::KILL.as_raw()),
            "{backing:?}: who wanted everything: {ended:?}"
        );
        drop(spares);
        ensure!(rounds != 0, "{backing:?}: it was killed before pages moved");
        exercise(&gpu, region, 0, 0).with_context(|| format!("{backing:?}"))?;
        region.unmap()?;
    }
    Ok(())
}
