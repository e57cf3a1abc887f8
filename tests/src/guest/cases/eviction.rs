// SPDX-License-Identifier: MIT OR Apache-2.0
//! More data than VRAM.

use crate::guest::{
    VRAM,
    call::Job,
    child::{Gate, code},
    oracle,
    place::{count, driver_count, ensure_place, migrate, move_all, state},
};
use anyhow::{Context, Error, Result, ensure};
use farfault::arena::{Backing, Region};
use farfault::{
    Advice, Gpu, HUGE_PAGE_SIZE, Kernel, PAGE_SIZE, Place,
    process::{Ended, fork},
};

group! { "eviction", on Small, seconds 300:
    huge_pages_of_twice_the_vram_make_the_round_trip,
    small_pages_of_twice_the_vram_make_the_round_trip,
    request_for_more_than_vram_moves_what_fits,
    requests_for_a_few_pages_each_of_more_than_vram_move_what_fits,
    tables_of_many_descriptors_find_room_in_full_vram,
    first_call_of_a_descriptor_finds_room_in_full_vram,
    block_in_use_stays_while_others_go,
    pages_that_are_not_where_they_were_put_make_room,
    pages_of_a_process_that_has_ended_are_passed_over,
    several_processes_share_vram_and_keep_their_data,
    two_descriptors_of_one_process_evict_each_other,
}

const SEED: u64 = 0xe51c;

/// 64 MiB through 32 MiB of VRAM and back.
fn round_trip(backing: Backing<'_>) -> Result<()> {
    let gpu = Gpu::open_first()?;
    let region = Region::map(2 * VRAM as usize, backing)?;
    oracle::write(region, SEED);
    for round in 1..=2 {
        Job::add(region, 3).waves(8).run(&gpu)?;
        let sum = Job::sum(region).waves(8).run(&gpu)?;
        ensure!(
            sum == oracle::expected_sum(region, SEED, 3 * round),
            "round {round}"
        );
    }
    let stats = gpu.stats()?;
    let more_than_fits = region.pages().count() as u64 / 2;
    ensure!(stats.pages_evicted >= more_than_fits, "{stats:?}");
    let in_vram = count(&gpu, region, Place::Vram)?;
    ensure!(in_vram > 0, "nothing is in VRAM after the last job");
    oracle::check(region, SEED, 6)
}

fn huge_pages_of_twice_the_vram_make_the_round_trip() -> Result<()> {
    round_trip(Backing::Huge)
}

fn small_pages_of_twice_the_vram_make_the_round_trip() -> Result<()> {
    round_trip(Backing::Small)
}

fn request_for_more_than_vram_moves_what_fits() -> Result<()> {
    let gpu = Gpu::open_first()?;
    for backing in [Backing::Huge, Backing::Small] {
        let region = Region::map(VRAM as usize * 3 / 2, backing)?;
        oracle::write(region, SEED);
        let moved = migrate(&gpu, region, Place::Vram)?;
        ensure!(moved.moved > 0, "{backing:?}: {moved:?}");
        let in_vram = count(&gpu, region, Place::Vram)? as u64;
        ensure!(
            in_vram > 0 && in_vram * 4096 <= VRAM,
            "{backing:?}: {in_vram}"
        );
        let moved = migrate(&gpu, region, Place::Ram)?;
        ensure!(moved.stayed == 0, "{backing:?}: {moved:?}");
        oracle::check(region, SEED, 0)?;
        region.unmap()?;
    }
    Ok(())
}

/// No request takes a whole block of VRAM.
fn requests_for_a_few_pages_each_of_more_than_vram_move_what_fits() -> Result<()> {
    const PART: usize = 64 * PAGE_SIZE;
    let gpu = Gpu::open_first()?;
    let region = Region::map(VRAM as usize * 3 / 2, Backing::Small)?;
    oracle::write(region, SEED);
    for offset in (0..region.length()).step_by(PART) {
        migrate(&gpu, region.part(offset, PART), Place::Vram)?;
    }
    let in_vram = count(&gpu, region, Place::Vram)? as u64;
    ensure!(in_vram * 2 * PAGE_SIZE as u64 > VRAM, "{in_vram}");
    oracle::check(region, SEED, 0)
}

/// A child has them, with the descriptor. There is no process through which they could go home.
fn pages_of_a_process_that_has_ended_are_passed_over() -> Result<()> {
    let (go_on, right) = (Gate::new()?, Gate::new()?);
    let owner = fork(|| {
        code((|| {
            let left = Region::map(HUGE_PAGE_SIZE, Backing::Small)?;
            oracle::write(left, SEED);
            let gpu = Gpu::open_first()?;
            move_all(&gpu, left, Place::Vram)?;
            let heir = || {
                go_on.wait()?;
                oracle::check(left, SEED, 0)?;
                right.open()
            };
            // Dropped, it would be killed.
            std::mem::forget(fork(|| code(heir()))?);
            Ok(())
        })())
    })?;
    let ended = owner.wait()?;
    ensure!(ended == Ended::Exited(0), "{ended:?}");
    let used = driver_count(0, "vram_pages_used")?;
    ensure!(used >= 512, "{used} pages are left");
    let gpu = Gpu::open_first()?;
    let full = full_vram(&gpu)?;
    let next = full_vram(&gpu)?;
    let came = count(&gpu, next, Place::Vram)?;
    ensure!(came > next.pages().count() / 2, "{came} pages found room");
    for region in [full, next] {
        oracle::check(region, SEED, 0)?;
    }
    go_on.open()?;
    right.wait()
}

/// As many pages as there is VRAM, as far as they fit.
fn full_vram(gpu: &Gpu) -> Result<Region> {
    let full = Region::map(VRAM as usize, Backing::Small)?;
    oracle::write(full, SEED);
    migrate(gpu, full, Place::Vram)?;
    Ok(full)
}

const LINKS: usize = 48;

/// A chain of pages each of which needs a table of its own, and the pages.
fn sparse_chain() -> Result<(Region, impl Fn(usize) -> Region)> {
    let sparse = Region::map(LINKS * HUGE_PAGE_SIZE, Backing::Small)?;
    let link = move |number: usize| sparse.part(number % LINKS * HUGE_PAGE_SIZE, PAGE_SIZE);
    for number in 0..LINKS {
        link(number).store(0, link(number + 1).address());
    }
    Ok((sparse, link))
}

/// More tables than there are in one block of VRAM.
fn tables_of_many_descriptors_find_room_in_full_vram() -> Result<()> {
    const DESCRIPTORS: usize = 12;
    let gpu = Gpu::open_first()?;
    let full = full_vram(&gpu)?;
    let (sparse, link) = sparse_chain()?;
    let first = link(0).address();
    let chase = Job::new(Kernel::PointerChase, [first, LINKS as u64, 0, 0]);
    let mut others = Vec::new();
    for number in 0..DESCRIPTORS {
        let other = Gpu::open_first()?;
        other.advise(sparse.pages(), Advice::MapOnly)?;
        let end = chase.run(&other);
        ensure!(end.with_context(|| format!("descriptor {number}"))? == first);
        others.push(other);
    }
    let evicted = gpu.stats()?.pages_evicted;
    ensure!(evicted > 0, "there was room: this test shows nothing");
    for other in &others {
        ensure!(chase.run(other)? == first);
    }
    Job::add(full, 1).waves(8).run(&gpu)?;
    oracle::check(full, SEED, 1)
}

/// It needs a table, and no block of those has room for one more.
fn first_call_of_a_descriptor_finds_room_in_full_vram() -> Result<()> {
    const BLOCK: u64 = (HUGE_PAGE_SIZE / PAGE_SIZE) as u64;
    let tables = || {
        Ok::<_, Error>(
            driver_count(0, "vram_pages_used")? - driver_count(0, "vram_pages_in_folios")?,
        )
    };
    let gpu = Gpu::open_first()?;
    let full = full_vram(&gpu)?;
    let (sparse, link) = sparse_chain()?;
    let mut others = Vec::new();
    while tables()? < BLOCK {
        let other = Gpu::open_first()?;
        other.advise(sparse.pages(), Advice::MapOnly)?;
        for number in 0..LINKS {
            if tables()? < BLOCK {
                Job::sum(link(number)).run(&other)?;
                // It waits until the fault has given back what it did not need.
                state(&other, link(number), 0)?;
            }
        }
        others.push(other);
    }
    migrate(&gpu, full, Place::Vram)?;
    let (tables, used) = (tables()?, driver_count(0, "vram_pages_used")?);
    ensure!(
        tables == BLOCK && used * PAGE_SIZE as u64 == VRAM,
        "there is room, this test shows nothing: {used} pages, {tables} of them tables"
    );
    let before = gpu.stats()?.pages_evicted;
    let last = Gpu::open_first()?;
    last.ping()?;
    let evicted = gpu.stats()?.pages_evicted - before;
    ensure!(evicted > 0, "where is its table?");
    oracle::check(full, SEED, 0)
}

fn block_in_use_stays_while_others_go() -> Result<()> {
    let gpu = Gpu::open_first()?;
    let blocks = VRAM as usize * 2 / HUGE_PAGE_SIZE;
    let hot = Region::map(HUGE_PAGE_SIZE, Backing::Huge)?;
    let cold = Region::map(blocks * HUGE_PAGE_SIZE, Backing::Huge)?;
    oracle::write(hot, SEED);
    oracle::write(cold, SEED);
    let hot_sum = oracle::expected_sum(hot, SEED, 0);
    ensure!(Job::sum(hot).run(&gpu)? == hot_sum);
    for block in 0..blocks {
        ensure_place(&gpu, hot, Place::Vram)
            .map_err(|error| error.context(format!("after {block} cold blocks")))?;
        ensure!(Job::sum(hot).run(&gpu)? == hot_sum);
        Job::sum(cold.part(block * HUGE_PAGE_SIZE, HUGE_PAGE_SIZE)).run(&gpu)?;
    }
    let first = cold.part(0, HUGE_PAGE_SIZE);
    ensure_place(&gpu, first, Place::Ram)?;
    let last = cold.part((blocks - 1) * HUGE_PAGE_SIZE, HUGE_PAGE_SIZE);
    ensure_place(&gpu, last, Place::Vram)
}

/// mremap has moved some, and of others a child has the last copy.
fn pages_that_are_not_where_they_were_put_make_room() -> Result<()> {
    let gpu = Gpu::open_first()?;
    let half = VRAM as usize / 8 * 3;
    let moved = Region::map(half, Backing::Small)?;
    let inherited = Region::map(half, Backing::Small)?;
    for region in [moved, inherited] {
        oracle::write(region, SEED);
        move_all(&gpu, region, Place::Vram)?;
    }
    let moved = moved.remap()?;
    let gate = Gate::new()?;
    let child = fork(|| {
        code((|| {
            gate.wait()?;
            oracle::check(inherited, SEED, 0)
        })())
    })?;
    inherited.unmap()?;
    let other = Region::map(VRAM as usize / 4 * 3, Backing::Small)?;
    oracle::write(other, SEED + 1);
    let result = move_all(&gpu, other, Place::Vram);
    gate.open()?;
    ensure!(child.wait()? == Ended::Exited(0), "the child's data");
    result?;
    let stats = gpu.stats()?;
    let counted = stats.pages_evicted > 0 && stats.pages_to_ram >= stats.pages_evicted;
    ensure!(counted, "{stats:?}");
    oracle::check(moved, SEED, 0)?;
    oracle::check(other, SEED + 1, 0)
}

fn work(seed: u64, backing: Backing<'_>) -> Result<()> {
    let gpu = Gpu::open_first()?;
    let region = Region::map(VRAM as usize / 2, backing)?;
    oracle::write(region, seed);
    for round in 1..=2 {
        Job::add(region, 1).waves(4).run(&gpu)?;
        let sum = Job::sum(region).waves(4).run(&gpu)?;
        ensure!(
            sum == oracle::expected_sum(region, seed, round),
            "round {round}"
        );
    }
    oracle::check(region, seed, 2)
}

fn several_processes_share_vram_and_keep_their_data() -> Result<()> {
    let children = (0..3u64)
        .map(|index| {
            fork(move || {
                let huge = index % 2 == 0;
                let backing = if huge { Backing::Huge } else { Backing::Small };
                match work(SEED + index, backing) {
                    Ok(()) => 0,
                    Err(error) => {
                        eprintln!("process {index}: {error:?}");
                        1
                    }
                }
            })
        })
        .collect::<Result<Vec<_>, _>>()?;
    for child in children {
        ensure!(child.wait()? == Ended::Exited(0));
    }
    Ok(())
}

fn two_descriptors_of_one_process_evict_each_other() -> Result<()> {
    let gpus = [Gpu::open_first()?, Gpu::open_first()?];
    let regions =
        [Backing::Huge, Backing::Small].map(|backing| Region::map(VRAM as usize * 3 / 4, backing));
    for region in &regions {
        oracle::write((*region)?, SEED);
    }
    for round in 0..4u64 {
        for (gpu, region) in gpus.iter().zip(&regions) {
            let region = (*region)?;
            Job::add(region, 1).waves(4).run(gpu)?;
            let sum = Job::sum(region).waves(4).run(gpu)?;
            ensure!(
                sum == oracle::expected_sum(region, SEED, round + 1),
                "round {round}"
            );
        }
    }
    for region in regions {
        oracle::check(region?, SEED, 4)?;
    }
    Ok(())
}
