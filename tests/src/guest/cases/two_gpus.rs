// SPDX-License-Identifier: MIT OR Apache-2.0
//! Two GPUs, one process: what is in one's VRAM is never taken for the other's.

use crate::guest::{
    call::Job,
    oracle,
    place::{migrate, move_all},
};
use anyhow::{Result, ensure};
use farfault::arena::{Backing, Region};
use farfault::{Advice, Gpu, HUGE_PAGE_SIZE, PAGE_SIZE, Place, Stats};
use std::{
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    time::{Duration, Instant},
};

group! { "two_gpus", on TwoGpus, seconds 60:
    serials_tell_the_gpus_apart,
    pages_used_by_both_in_turn_keep_their_data,
    pages_in_one_vram_are_not_in_the_other,
    pages_taken_by_one_are_taken_from_the_other,
    page_that_both_and_the_cpu_add_to_serves_all_of_them,
}

const SEED: u64 = 0x2692;

fn open_both() -> Result<[Gpu; 2]> {
    Ok([Gpu::open("/dev/farfault0")?, Gpu::open("/dev/farfault1")?])
}

fn serials_tell_the_gpus_apart() -> Result<()> {
    let [one, other] = open_both()?;
    ensure!(one.info().serial != other.info().serial);
    Ok(())
}

fn pages_used_by_both_in_turn_keep_their_data() -> Result<()> {
    let gpus = open_both()?;
    for backing in [Backing::Small, Backing::Huge] {
        let region = Region::map(2 * HUGE_PAGE_SIZE, backing)?;
        oracle::write(region, SEED);
        for round in 1..=6u64 {
            let gpu = &gpus[round as usize % 2];
            Job::add(region, 1).waves(4).run(gpu)?;
            let sum = Job::sum(region).waves(4).run(gpu)?;
            let should = oracle::expected_sum(region, SEED, round);
            ensure!(sum == should, "{backing:?}, round {round}");
        }
        oracle::check(region, SEED, 6)?;
    }
    Ok(())
}

fn pages_in_one_vram_are_not_in_the_other() -> Result<()> {
    let [one, other] = open_both()?;
    for backing in [Backing::Small, Backing::Huge] {
        let region = Region::map(HUGE_PAGE_SIZE, backing)?;
        oracle::write(region, SEED);
        move_all(&one, region, Place::Vram)?;
        for page in other.query(region.pages())? {
            ensure!(page.cpu.place != Place::Vram, "{backing:?}: {page:?}");
            ensure!(page.gpu.place == Place::None, "{backing:?}: {page:?}");
        }
        // Whether a page moves from one VRAM to the other at once is the driver's business.
        migrate(&other, region, Place::Vram)?;
        let sum = Job::sum(region).waves(2).run(&other)?;
        ensure!(sum == oracle::expected_sum(region, SEED, 0), "{backing:?}");
        oracle::check(region, SEED, 0)?;
    }
    Ok(())
}

fn pages_taken_by_one_are_taken_from_the_other() -> Result<()> {
    let [one, other] = open_both()?;
    for backing in [Backing::Small, Backing::Huge] {
        let region = Region::map(HUGE_PAGE_SIZE, backing)?;
        oracle::write(region, SEED);
        let part = region.part(64 * PAGE_SIZE, 64 * PAGE_SIZE);
        for round in 1..=4 {
            let (taker, loser) = match round % 2 {
                0 => (&one, &other),
                _ => (&other, &one),
            };
            taker.make_exclusive(part.pages())?;
            for state in taker.query(part.pages())? {
                let has = state.gpu.atomic && state.gpu.place == Place::Ram;
                ensure!(has, "{backing:?}, round {round}: {state:?}");
            }
            for state in loser.query(part.pages())? {
                let none = state.gpu.place == Place::None;
                ensure!(none, "{backing:?}, round {round}: {state:?}");
            }
            Job::add(part, 1).run(taker)?;
            taker.ping()?;
        }
        // The other takes to its VRAM what one has for itself, and the reverse.
        one.make_exclusive(part.pages())?;
        migrate(&other, part, Place::Vram)?;
        Job::add(part, 1).run(&other)?;
        one.make_exclusive(part.pages())?;
        Job::add(part, 1).run(&one)?;
        oracle::check_part(part, SEED, 64 * PAGE_SIZE / 8, 6)?;
    }
    Ok(())
}

/// Two GPUs and a CPU take one page from each other, until each has had it many times: nobody is kept
/// from it, and no addition is lost.
fn page_that_both_and_the_cpu_add_to_serves_all_of_them() -> Result<()> {
    const REPEAT: u64 = 500;
    const WAVES: u32 = 2;
    const TURNS: u64 = 12;
    const LIMIT: Duration = Duration::from_secs(45);
    let gpus = open_both()?;
    let region = Region::map(PAGE_SIZE, Backing::Small)?;
    for gpu in &gpus {
        gpu.advise(region.pages(), Advice::MapOnly)?;
    }
    let begin = Instant::now();
    let by_cpu = AtomicU64::new(0);
    let failed = AtomicBool::new(false);
    let turns = || -> Result<[u64; 3]> {
        let [one, other] = gpus.each_ref().map(|gpu| gpu.stats());
        let gpu = |stats: Stats| stats.gpu_faults.min(stats.invalidations);
        Ok([gpu(one?), gpu(other?), by_cpu.load(Ordering::Relaxed)])
    };
    let go_on = || -> Result<bool> {
        let turns = turns()?;
        ensure!(begin.elapsed() < LIMIT, "turns of GPUs and CPU: {turns:?}");
        let all = turns.iter().all(|turns| *turns >= TURNS);
        Ok(!all && !failed.load(Ordering::Relaxed))
    };
    let by_gpu = std::thread::scope(|scope| -> Result<u64> {
        let cpu = scope.spawn(|| -> Result<u64> {
            while go_on()? {
                region.atomic_add(0, 1);
                by_cpu.fetch_add(1, Ordering::Relaxed);
                std::thread::sleep(Duration::from_micros(200));
            }
            Ok(0)
        });
        let (go_on, failed) = (&go_on, &failed);
        let [one, other] = gpus.each_ref().map(|gpu| {
            scope.spawn(move || {
                let mut added = 0;
                let run = (|| {
                    while go_on()? {
                        let add = Job::atomic_add(region.address(), 1, REPEAT).waves(WAVES);
                        add.run(gpu)?;
                        added += REPEAT * u64::from(WAVES);
                    }
                    Ok(())
                })();
                // The others shall not wait for its turns.
                failed.fetch_or(run.is_err(), Ordering::Relaxed);
                run.map(|()| added)
            })
        });
        let mut by_gpu = 0;
        for thread in [cpu, one, other] {
            let added = thread.join();
            by_gpu += added.map_err(|_| anyhow::anyhow!("a thread panicked"))??;
        }
        Ok(by_gpu)
    })?;
    let (is, by_cpu) = (region.load(0), by_cpu.load(Ordering::Relaxed));
    ensure!(
        is == by_cpu + by_gpu,
        "{by_cpu} and {by_gpu} gave {is}, in {:?}",
        begin.elapsed()
    );
    Ok(())
}
