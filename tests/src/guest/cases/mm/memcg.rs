// SPDX-License-Identifier: MIT OR Apache-2.0
//! Memory cgroups: pages in VRAM are charged like pages in RAM, and migration takes the charge along. What
//! happens at a limit is in `docs/device-memory.md`; both change together.
//!
//! The case's own process is in no group. Its children are, and it sees how they end.

use super::{
    cgroup::Cgroup,
    start::{At, SEED, STARTS, Start, ensure_sum, exercise_all},
};
use crate::guest::{
    call::Job,
    child::code,
    oracle,
    place::{count, ensure_place, migrate, move_all},
};
use anyhow::{Context, Result, ensure};
use farfault::arena::{Backing, Region};
use farfault::{
    Gpu, HUGE_PAGE_SIZE, Place,
    process::{Ended, fork},
    stage,
};
use std::time::Duration;

group! { "mm::memcg", gpus 1, seconds 120:
    pages_in_vram_are_charged_as_in_ram_and_freed_as_there,
    pages_that_the_gpu_touches_first_are_charged,
    migration_home_at_the_limit_needs_no_charge,
    eviction_of_a_group_at_its_limit_keeps_its_data,
    cpu_that_goes_beyond_the_limit_is_killed_alone,
    gpu_that_goes_beyond_the_limit_has_its_process_killed_alone,
    limit_set_below_what_is_in_vram_kills_its_process_alone,
    oom_kill_during_migrations_leaves_nothing,
}

const MIB: u64 = 1 << 20;
const KILL: Ended = Ended::Signaled(9);

fn in_group(
    cgroup: &Cgroup,
    body: impl FnOnce() -> Result<()>,
) -> Result<farfault::process::Child> {
    let child = fork(|| {
        code((|| {
            cgroup.enter()?;
            body()
        })())
    })?;
    Ok(child)
}

fn pages_in_vram_are_charged_as_in_ram_and_freed_as_there() -> Result<()> {
    for backing in [Backing::Small, Backing::Huge] {
        let cgroup = Cgroup::new("charged")?;
        let child = in_group(&cgroup, || {
            let gpu = Gpu::open_first()?;
            let before = cgroup.current()?;
            let region = Region::map(4 * HUGE_PAGE_SIZE, backing)?;
            oracle::write(region, SEED);
            let charged = before + region.length() as u64;
            cgroup.ensure_current(charged, "in RAM")?;
            move_all(&gpu, region, Place::Vram)?;
            cgroup.ensure_current(charged, "in VRAM")?;
            move_all(&gpu, region, Place::Ram)?;
            cgroup.ensure_current(charged, "home on request")?;
            move_all(&gpu, region, Place::Vram)?;
            oracle::check(region, SEED, 0)?;
            cgroup.ensure_current(charged, "home by the CPU's touch")?;
            move_all(&gpu, region, Place::Vram)?;
            region.part(0, 2 * HUGE_PAGE_SIZE).discard()?;
            cgroup.ensure_current(charged - 4 * MIB, "half of it freed in VRAM")?;
            region.unmap()?;
            cgroup.ensure_current(before, "all of it freed")
        })?;
        ensure!(child.wait()? == Ended::Exited(0), "{backing:?}");
        ensure!(cgroup.current()? < Cgroup::SLACK, "charges are left");
    }
    Ok(())
}

fn pages_that_the_gpu_touches_first_are_charged() -> Result<()> {
    for backing in [Backing::Small, Backing::Huge] {
        let cgroup = Cgroup::new("touched")?;
        let child = in_group(&cgroup, || {
            let gpu = Gpu::open_first()?;
            let before = cgroup.current()?;
            let region = Region::map(4 * HUGE_PAGE_SIZE, backing)?;
            Job::fill(region, 1).waves(4).run(&gpu)?;
            ensure_place(&gpu, region, Place::Vram)?;
            cgroup.ensure_current(before + 8 * MIB, "touched by the GPU")?;
            region.unmap()?;
            cgroup.ensure_current(before, "freed")
        })?;
        ensure!(child.wait()? == Ended::Exited(0), "{backing:?}");
    }
    Ok(())
}

fn migration_home_at_the_limit_needs_no_charge() -> Result<()> {
    for start in STARTS.iter().filter(|start| start.at == At::Vram) {
        let cgroup = Cgroup::new("limit")?;
        let child = in_group(&cgroup, || {
            let gpu = Gpu::open_first()?;
            let region = start.region(&gpu, 4 * HUGE_PAGE_SIZE)?;
            // No page more.
            cgroup.set_max(cgroup.current()?)?;
            let quarter = region.part(0, HUGE_PAGE_SIZE);
            oracle::check(quarter, SEED, 0)?;
            ensure_place(&gpu, quarter, Place::Ram)?;
            move_all(&gpu, region, Place::Ram)?;
            for _ in 0..3 {
                move_all(&gpu, region, Place::Vram)?;
                exercise(&gpu, region)?;
            }
            Ok(())
        })?;
        let ended = child.wait()?;
        ensure!(ended == Ended::Exited(0), "{start:?}: {ended:?}");
        ensure!(cgroup.events("oom_kill")? == 0, "{start:?}");
    }
    Ok(())
}

/// Data as it was, whoever looks; it stays so.
fn exercise(gpu: &Gpu, region: Region) -> Result<()> {
    ensure_sum(gpu, region, 0, 0)?;
    oracle::check(region, SEED, 0)
}

fn eviction_of_a_group_at_its_limit_keeps_its_data() -> Result<()> {
    let cgroup = Cgroup::new("evicted")?;
    let (from_parent, to_child) = rustix::pipe::pipe()?;
    let (from_child, to_parent) = rustix::pipe::pipe()?;
    let child = in_group(&cgroup, || {
        let gpu = Gpu::open_first()?;
        let region = Region::map(8 * HUGE_PAGE_SIZE, Backing::Huge)?;
        oracle::write(region, SEED);
        move_all(&gpu, region, Place::Vram)?;
        // Room for what the child itself needs next, and not for a huge page.
        cgroup.set_max(cgroup.current()? + Cgroup::SLACK)?;
        rustix::io::write(&to_parent, &[1])?;
        rustix::io::read(&from_parent, &mut [0])?;
        let left = count(&gpu, region, Place::Vram)?;
        ensure!(left < region.pages().count(), "nothing of it was evicted");
        exercise(&gpu, region)
    })?;
    rustix::io::read(&from_child, &mut [0u8])?;
    // This process wants most of VRAM.
    let gpu = Gpu::open_first()?;
    let region = Region::map(12 * HUGE_PAGE_SIZE, Backing::Huge)?;
    oracle::write(region, SEED);
    for _ in 0..2 {
        migrate(&gpu, region, Place::Vram)?;
        ensure_sum(&gpu, region, 0, 0)?;
    }
    rustix::io::write(&to_child, &[1])?;
    let ended = child.wait()?;
    ensure!(ended == Ended::Exited(0), "{ended:?}");
    ensure!(cgroup.events("oom_kill")? == 0);
    exercise(&gpu, region)
}

/// A process outside of the group, which goes on as if nothing had been.
fn bystander(while_it_runs: impl FnOnce(&Gpu) -> Result<()>) -> Result<()> {
    let start = Start {
        backing: Backing::Small,
        at: At::Half,
    };
    let gpu = Gpu::open_first()?;
    let region = start.region(&gpu, HUGE_PAGE_SIZE)?;
    while_it_runs(&gpu)?;
    exercise_all(&gpu, region)
}

/// It was killed by the kernel for its group's limit, and by nothing else.
fn ensure_killed(cgroup: &Cgroup, ended: Ended) -> Result<()> {
    ensure!(ended == KILL, "it ended with {ended:?}");
    let kills = cgroup.events("oom_kill")?;
    ensure!(kills == 1, "{kills} processes of the group were killed");
    super::start::eventually("its charges are gone", || {
        Ok(cgroup.current()? < Cgroup::SLACK)
    })
}

fn cpu_that_goes_beyond_the_limit_is_killed_alone() -> Result<()> {
    bystander(|_| {
        let cgroup = Cgroup::new("cpu")?;
        let child = in_group(&cgroup, || {
            let gpu = Gpu::open_first()?;
            let region = Region::map(4 * HUGE_PAGE_SIZE, Backing::Huge)?;
            oracle::write(region, SEED);
            move_all(&gpu, region, Place::Vram)?;
            // What is in VRAM counts: there is room for 8 MiB more, not for 16.
            cgroup.set_max(cgroup.current()? + 8 * MIB)?;
            oracle::write(Region::map(2 * HUGE_PAGE_SIZE, Backing::Small)?, 1);
            exercise(&gpu, region)?;
            move_all(&gpu, region, Place::Vram)?;
            oracle::write(Region::map(8 * HUGE_PAGE_SIZE, Backing::Small)?, 2);
            Ok(())
        })?;
        ensure_killed(&cgroup, child.wait()?)
    })
}

fn gpu_that_goes_beyond_the_limit_has_its_process_killed_alone() -> Result<()> {
    for backing in [Backing::Small, Backing::Huge] {
        bystander(|_| {
            let cgroup = Cgroup::new("gpu")?;
            let child = in_group(&cgroup, || {
                let gpu = Gpu::open_first()?;
                cgroup.set_max(cgroup.current()? + 8 * MIB)?;
                let region = Region::map(8 * HUGE_PAGE_SIZE, backing)?;
                let end = Job::fill(region, 1).waves(4).end(&gpu)?;
                eprintln!("the job ended with {end:x?}");
                Ok(())
            })?;
            ensure_killed(&cgroup, child.wait()?)
        })
        .with_context(|| format!("{backing:?}"))?;
    }
    Ok(())
}

fn limit_set_below_what_is_in_vram_kills_its_process_alone() -> Result<()> {
    bystander(|_| {
        let cgroup = Cgroup::new("below")?;
        let (from_child, to_parent) = rustix::pipe::pipe()?;
        let child = in_group(&cgroup, || {
            let gpu = Gpu::open_first()?;
            let region = Region::map(8 * HUGE_PAGE_SIZE, Backing::Huge)?;
            oracle::write(region, SEED);
            move_all(&gpu, region, Place::Vram)?;
            Job::endless(region).submit(&gpu)?;
            rustix::io::write(&to_parent, &[1])?;
            std::thread::sleep(Duration::from_secs(60));
            Ok(())
        })?;
        rustix::io::read(&from_child, &mut [0u8])?;
        cgroup.set_max(4 * MIB)?;
        ensure_killed(&cgroup, child.wait()?)
    })
}

fn oom_kill_during_migrations_leaves_nothing() -> Result<()> {
    bystander(|gpu| {
        for round in 0..4usize {
            let cgroup = Cgroup::new("migrations")?;
            let child = in_group(&cgroup, || {
                let gpu = Gpu::open_first()?;
                let backing = if round % 2 == 0 {
                    Backing::Small
                } else {
                    Backing::Huge
                };
                let region = Region::map(4 * HUGE_PAGE_SIZE, backing)?;
                oracle::write(region, SEED);
                cgroup.set_max(cgroup.current()? + 8 * MIB)?;
                // One thread moves pages to and fro, another one takes memory until it is too much.
                std::thread::scope(|scope| -> Result<()> {
                    scope.spawn(|| {
                        let more = Region::map(16 * HUGE_PAGE_SIZE, Backing::Small);
                        let Ok(more) = more else { return };
                        for page in 0..more.pages().count() {
                            let part = more.part(page * farfault::PAGE_SIZE, farfault::PAGE_SIZE);
                            part.store(0, 1);
                            if page % 64 == 0 {
                                std::thread::sleep(Duration::from_millis(1 + round as u64));
                            }
                        }
                    });
                    loop {
                        migrate(&gpu, region, Place::Vram)?;
                        Job::add(region, 0).waves(4).run(&gpu)?;
                        migrate(&gpu, region, Place::Ram)?;
                        region.advise(stage::Advice::Cold)?;
                    }
                })
            })?;
            ensure_killed(&cgroup, child.wait()?).with_context(|| format!("round {round}"))?;
            gpu.ping()?;
        }
        Ok(())
    })
}
