// SPDX-License-Identifier: MIT OR Apache-2.0
//! Atomics on memory that the GPU can have for itself, next to memory that it cannot, or beside somebody else who
//! takes pages, too.

use super::exclusive::ensure_all_exclusive;
use crate::guest::{
    call::{self, JOB_TIME, Job, ensure_status},
    oracle,
    place::{migrate, move_all, state},
};
use anyhow::{Context, Result, ensure};
use farfault::arena::{Backing, Region};
use farfault::{Advice, Gpu, HUGE_PAGE_SIZE, PAGE_SIZE, Place, stage, uapi::JobStatus};

group! { "exclusive", on Small, seconds 90:
    page_next_to_shared_memory_is_the_gpus_alone_and_follows_when_it_moves,
    page_that_another_descriptor_takes_is_taken_from_the_first,
    pages_taken_stay_so_while_others_move_to_and_fro,
}

const SEED: u64 = 0xe8c2;
const WORDS_PER_PAGE: usize = PAGE_SIZE / 8;

fn page(region: Region, index: usize) -> Region {
    region.part(index * PAGE_SIZE, PAGE_SIZE)
}

/// The faults of two jobs, one on each kind of memory, come in one batch: what has to be done for the one must
/// not be done to the other.
fn page_next_to_shared_memory_is_the_gpus_alone_and_follows_when_it_moves() -> Result<()> {
    const ROUNDS: u64 = 20;
    const OWN: usize = 1;
    let gpu = Gpu::open_first()?;
    let region = Region::map(HUGE_PAGE_SIZE, Backing::Small)?;
    gpu.advise(region.pages(), Advice::MapOnly)?;
    let shared = page(region, 0);
    Region::map(PAGE_SIZE, Backing::Shared)?.remap_onto(shared)?;
    oracle::write(region, SEED);
    let own = page(region, OWN);
    let word = oracle::word(SEED, OWN * WORDS_PER_PAGE);
    let busy = Region::map(2 * HUGE_PAGE_SIZE, Backing::Small)?;
    gpu.advise(busy.pages(), Advice::MapOnly)?;
    for round in 0..ROUNDS {
        // Both fault, while other faults are served.
        shared.advise(stage::Advice::DontNeed)?;
        ensure!(own.load(0) == word.wrapping_add(2 * round), "round {round}");
        busy.advise(stage::Advice::DontNeed)?;
        let jobs = [
            Job::sum(busy).waves(64),
            Job::atomic_add(shared.address(), 1, 1),
            Job::atomic_add(own.address(), 1, 1),
        ];
        let fences = jobs.map(|job| job.submit(&gpu));
        for fence in fences {
            ensure_status(&call::wait(&gpu, fence?, JOB_TIME)?, JobStatus::Ok)?;
        }
        let is = state(&gpu, region, OWN)?;
        let alone = is.gpu.atomic && is.gpu.place == Place::Ram && !is.cpu.write;
        ensure!(alone, "round {round}: {is:?}");
        // Where it goes, the GPU follows.
        ensure!(migrate(&gpu, own, Place::Vram)?.stayed == 0);
        let is = state(&gpu, region, OWN)?;
        ensure!(is.gpu.place != Place::Ram, "round {round}: {is:?}");
        Job::add(own, 1).run(&gpu)?;
        ensure!(migrate(&gpu, own, Place::Ram)?.stayed == 0);
    }
    for index in 1..WORDS_PER_PAGE {
        let should = oracle::word(SEED, OWN * WORDS_PER_PAGE + index).wrapping_add(ROUNDS);
        ensure!(own.load(index) == should, "word {index}");
    }
    Ok(())
}

fn page_that_another_descriptor_takes_is_taken_from_the_first() -> Result<()> {
    const PAGES: usize = 4;
    let (one, other) = (Gpu::open_first()?, Gpu::open_first()?);
    let region = Region::map(PAGES * PAGE_SIZE, Backing::Small)?;
    oracle::write(region, SEED);
    for gpu in [&one, &other] {
        gpu.advise(region.pages(), Advice::MapOnly)?;
    }
    let sides = [(&one, &other), (&other, &one)];
    for (round, (has, takes)) in sides.into_iter().cycle().take(6).enumerate() {
        Job::add(region, 1).run(has)?;
        takes.make_exclusive(region.pages())?;
        for index in 0..PAGES {
            let (before, now) = (state(has, region, index)?, state(takes, region, index)?);
            let context = || format!("round {round}, page {index}: {before:?}, {now:?}");
            ensure!(before.gpu.place == Place::None, "{}", context());
            ensure!(now.gpu.atomic && !now.cpu.write, "{}", context());
        }
        Job::add(region, 1).run(takes).context("who took it")?;
    }
    oracle::check(region, SEED, 12)
}

/// The range of a migration has pages that the GPU has for itself, or begins and ends beside them. (Of a huge page, the
/// kernel would split what they share.)
fn pages_taken_stay_so_while_others_move_to_and_fro() -> Result<()> {
    const FROM: usize = 64 * PAGE_SIZE;
    const UP_TO: usize = 128 * PAGE_SIZE;
    let gpu = Gpu::open_first()?;
    let region = Region::map(HUGE_PAGE_SIZE, Backing::Small)?;
    gpu.advise(region.pages(), Advice::MapOnly)?;
    oracle::write(region, SEED);
    let taken = region.part(FROM, UP_TO - FROM);
    let sides = [
        region.part(0, FROM),
        region.part(UP_TO, HUGE_PAGE_SIZE - UP_TO),
    ];
    gpu.make_exclusive(taken.pages())?;
    for round in 1..=3 {
        let context = |what| move || format!("{what}, round {round}");
        for side in sides {
            move_all(&gpu, side, Place::Vram)?;
            ensure_all_exclusive(&gpu, taken).with_context(context("to VRAM beside it"))?;
        }
        Job::add(region, 1).waves(4).run(&gpu)?;
        let home = migrate(&gpu, region, Place::Ram)?;
        let others = region.pages().count() - taken.pages().count();
        ensure!(home.moved == others as u64, "round {round}: {home:?}");
        ensure_all_exclusive(&gpu, taken).with_context(context("home around it"))?;
        let still = migrate(&gpu, taken, Place::Ram)?;
        ensure!(still.moved == 0, "round {round}: {still:?}");
        ensure_all_exclusive(&gpu, taken).with_context(context("home itself"))?;
    }
    oracle::check(region, SEED, 3)
}
