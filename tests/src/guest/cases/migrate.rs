// SPDX-License-Identifier: MIT OR Apache-2.0
//! Anonymous memory to VRAM and back, in small pages and huge ones: the data stays, and what the
//! driver says about it is true.

use crate::guest::{
    call::Job,
    oracle,
    place::{count, ensure_place, migrate, move_all, places, state},
};
use anyhow::{Context, Result, ensure};
use farfault::arena::{Backing, Protection, Region};
use farfault::{Advice, Gpu, HUGE_PAGE_SIZE, Moved, PAGE_SIZE, Place};
use std::fs;

group! { "migrate", on Small, seconds 60:
    small_pages_to_vram_and_back_keep_their_data,
    huge_pages_to_vram_and_back_stay_huge_and_keep_their_data,
    gpu_fault_moves_a_small_page_alone_and_a_huge_page_whole,
    pages_that_are_there_are_counted_as_there,
    part_of_small_pages_moves_alone,
    pages_scattered_over_vram_come_home_in_one_request,
    part_of_a_huge_page_moved_leaves_the_rest_right,
    never_touched_pages_are_counted_and_stay_empty,
    cpu_touch_brings_a_page_home,
    cpu_touch_of_a_huge_page_brings_the_data_home,
    pages_moved_to_and_fro_while_a_job_runs_keep_their_data,
    stats_of_moves_count_the_pages,
    inaccessible_memory_never_touched_stays_empty,
    looks_at_pages_elsewhere_make_none_of_what_was_never_touched,
}

const SEED: u64 = 0x316a;

fn small_pages_to_vram_and_back_keep_their_data() -> Result<()> {
    let gpu = Gpu::open_first()?;
    let region = Region::map(3 << 20, Backing::Small)?;
    oracle::write(region, SEED);
    let pages = region.pages().count() as u64;
    let moved = move_all(&gpu, region, Place::Vram)?;
    ensure!(moved.moved == pages, "{moved:?}");
    let sum = Job::sum(region).waves(8).run(&gpu)?;
    ensure!(sum == oracle::expected_sum(region, SEED, 0));
    ensure_place(&gpu, region, Place::Vram)?;
    let moved = move_all(&gpu, region, Place::Ram)?;
    ensure!(moved.moved == pages, "{moved:?}");
    oracle::check(region, SEED, 0)
}

/// Bytes of a region in huge pages, as the kernel counts them.
fn huge_bytes(region: Region) -> Result<usize> {
    let smaps = fs::read_to_string("/proc/self/smaps")?;
    let start = format!("{:x}-", region.address());
    let lines = smaps.lines().skip_while(|line| !line.starts_with(&start));
    let kib = lines
        .skip(1)
        .find_map(|line| line.strip_prefix("AnonHugePages:"));
    let kib = kib.context("smaps does not have the region")?;
    let number: usize = kib.trim().trim_end_matches(" kB").parse()?;
    Ok(number << 10)
}

fn huge_pages_to_vram_and_back_stay_huge_and_keep_their_data() -> Result<()> {
    let gpu = Gpu::open_first()?;
    let region = Region::map(3 * HUGE_PAGE_SIZE, Backing::Huge)?;
    oracle::write(region, SEED);
    ensure!(
        huge_bytes(region)? == region.length(),
        "no huge pages to begin with"
    );
    let all_huge = |cpu: bool| -> Result<bool> {
        let states = gpu.query(region.pages())?;
        Ok(states
            .iter()
            .all(|page| if cpu { page.cpu.huge } else { page.gpu.huge }))
    };
    ensure!(all_huge(true)?, "QUERY does not show the CPU's huge pages");

    let moved = move_all(&gpu, region, Place::Vram)?;
    ensure!(moved.moved as usize == region.pages().count(), "{moved:?}");
    ensure!(all_huge(true)?, "the CPU's entries in VRAM are not huge");
    let sum = Job::sum(region).waves(3).run(&gpu)?;
    ensure!(sum == oracle::expected_sum(region, SEED, 0));
    ensure!(all_huge(false)?, "the GPU's entries are not huge");
    Job::add(region, 5).waves(3).run(&gpu)?;

    move_all(&gpu, region, Place::Ram)?;
    ensure!(
        huge_bytes(region)? == region.length(),
        "they came home in pieces"
    );
    oracle::check(region, SEED, 5)
}

fn gpu_fault_moves_a_small_page_alone_and_a_huge_page_whole() -> Result<()> {
    let gpu = Gpu::open_first()?;
    for (backing, expected) in [(Backing::Small, 1), (Backing::Huge, 512)] {
        let region = Region::map(HUGE_PAGE_SIZE, backing)?;
        oracle::write(region, SEED);
        let page = region.part(100 * PAGE_SIZE, PAGE_SIZE);
        let sum = Job::sum(page).run(&gpu)?;
        let first = 100 * PAGE_SIZE / 8;
        ensure!(sum == oracle::sum(SEED, first..first + page.words()));
        let in_vram = count(&gpu, region, Place::Vram)?;
        ensure!(in_vram == expected, "{backing:?}: {in_vram} pages in VRAM");
        ensure_place(&gpu, page, Place::Vram)?;
        oracle::check(region, SEED, 0)?;
    }
    Ok(())
}

fn pages_that_are_there_are_counted_as_there() -> Result<()> {
    let gpu = Gpu::open_first()?;
    for backing in [Backing::Small, Backing::Huge] {
        let region = Region::map(HUGE_PAGE_SIZE, backing)?;
        oracle::write(region, SEED);
        let there = Moved {
            there: region.pages().count() as u64,
            ..Moved::default()
        };
        for place in [Place::Ram, Place::Vram, Place::Ram] {
            move_all(&gpu, region, place)?;
            let again = move_all(&gpu, region, place)?;
            ensure!(again == there, "{backing:?} to {place:?}: {again:?}");
        }
    }
    Ok(())
}

fn part_of_small_pages_moves_alone() -> Result<()> {
    let gpu = Gpu::open_first()?;
    let region = Region::map(64 * PAGE_SIZE, Backing::Small)?;
    oracle::write(region, SEED);
    let part = region.part(10 * PAGE_SIZE, 20 * PAGE_SIZE);
    move_all(&gpu, part, Place::Vram)?;
    ensure!(count(&gpu, region, Place::Vram)? == 20);
    let moved = migrate(&gpu, region, Place::Vram)?;
    ensure!((moved.moved, moved.there) == (44, 20), "{moved:?}");
    move_all(&gpu, part, Place::Ram)?;
    ensure!(count(&gpu, region, Place::Vram)? == 44);
    oracle::check(region, SEED, 0)
}

fn part_of_a_huge_page_moved_leaves_the_rest_right() -> Result<()> {
    let gpu = Gpu::open_first()?;
    let region = Region::map(2 * HUGE_PAGE_SIZE, Backing::Huge)?;
    oracle::write(region, SEED);
    let part = region.part(HUGE_PAGE_SIZE / 2, HUGE_PAGE_SIZE);
    for (place, added) in [(Place::Vram, 1), (Place::Ram, 2), (Place::Vram, 3)] {
        // From all in RAM, parts of it go; from all in VRAM, parts of it come.
        move_all(&gpu, part, place)?;
        Job::add(region, 1).waves(4).run(&gpu)?;
        let sum = Job::sum(region).waves(4).run(&gpu)?;
        ensure!(
            sum == oracle::expected_sum(region, SEED, added),
            "{place:?}"
        );
    }
    oracle::check(region, SEED, 3)
}

fn never_touched_pages_are_counted_and_stay_empty() -> Result<()> {
    let gpu = Gpu::open_first()?;
    for backing in [Backing::Small, Backing::Huge] {
        let region = Region::map(2 * HUGE_PAGE_SIZE, backing)?;
        region.store(0, 77);
        for place in [Place::Vram, Place::Ram, Place::Vram] {
            migrate(&gpu, region, place)?;
        }
        ensure!(Job::sum(region).waves(4).run(&gpu)? == 77, "{backing:?}");
        for index in 1..region.words() {
            ensure!(region.load(index) == 0, "{backing:?}: word {index}");
        }
    }
    Ok(())
}

fn cpu_touch_brings_a_page_home() -> Result<()> {
    let gpu = Gpu::open_first()?;
    let region = Region::map(64 * PAGE_SIZE, Backing::Small)?;
    oracle::write(region, SEED);
    move_all(&gpu, region, Place::Vram)?;
    Job::add(region, 1).run(&gpu)?;
    let before = gpu.stats()?;
    let word = 17 * PAGE_SIZE / 8;
    ensure!(region.load(word) == oracle::word(SEED, word).wrapping_add(1));
    let touched = state(&gpu, region, 17)?;
    ensure!(touched.cpu.place == Place::Ram, "{touched:?}");
    ensure!(touched.gpu.place != Place::Vram, "{touched:?}");
    // It is nobody else's turn.
    ensure!(
        count(&gpu, region, Place::Vram)? == 63,
        "{:?}",
        places(&gpu, region)?
    );
    let after = gpu.stats()?;
    ensure!(
        after.cpu_faults == before.cpu_faults + 1,
        "{before:?} {after:?}"
    );
    ensure!(
        after.pages_to_ram == before.pages_to_ram + 1,
        "{before:?} {after:?}"
    );
    region.store(word, 9);
    Job::add(region.part(17 * PAGE_SIZE, PAGE_SIZE), 1).run(&gpu)?;
    ensure!(region.load(word) == 10);
    Ok(())
}

fn cpu_touch_of_a_huge_page_brings_the_data_home() -> Result<()> {
    let gpu = Gpu::open_first()?;
    let region = Region::map(2 * HUGE_PAGE_SIZE, Backing::Huge)?;
    oracle::write(region, SEED);
    move_all(&gpu, region, Place::Vram)?;
    Job::add(region, 1).waves(2).run(&gpu)?;
    let word = region.words() / 4;
    ensure!(region.load(word) == oracle::word(SEED, word).wrapping_add(1));
    ensure!(state(&gpu, region, 256)?.cpu.place == Place::Ram);
    let other = region.part(HUGE_PAGE_SIZE, HUGE_PAGE_SIZE);
    ensure_place(&gpu, other, Place::Vram)?;
    oracle::check(region, SEED, 1)
}

fn pages_moved_to_and_fro_while_a_job_runs_keep_their_data() -> Result<()> {
    let gpu = Gpu::open_first()?;
    for backing in [Backing::Small, Backing::Huge] {
        let region = Region::map(2 * HUGE_PAGE_SIZE, backing)?;
        oracle::write(region, SEED);
        let mut added = 0;
        for round in 0..12 {
            let fence = Job::add(region, 1).waves(16).submit(&gpu)?;
            added += 1;
            let place = if round % 2 == 0 {
                Place::Vram
            } else {
                Place::Ram
            };
            migrate(&gpu, region, place)?;
            let end = crate::guest::call::wait(&gpu, fence, crate::guest::call::JOB_TIME)?;
            crate::guest::call::ensure_status(&end, farfault::uapi::JobStatus::Ok)?;
        }
        oracle::check(region, SEED, added)?;
    }
    Ok(())
}

fn stats_of_moves_count_the_pages() -> Result<()> {
    let gpu = Gpu::open_first()?;
    let region = Region::map(1 << 20, Backing::Small)?;
    oracle::write(region, SEED);
    let pages = region.pages().count() as u64;
    move_all(&gpu, region, Place::Vram)?;
    Job::sum(region).waves(4).run(&gpu)?;
    move_all(&gpu, region, Place::Ram)?;
    let stats = gpu.stats()?;
    ensure!(
        stats.pages_to_vram == pages && stats.pages_to_ram == pages,
        "{stats:?}"
    );
    ensure!(
        stats.pages_mapped >= pages && stats.cpu_faults == 0,
        "{stats:?}"
    );
    ensure!(
        stats.pages_evicted == 0 && stats.migrate_ns > 0 && stats.jobs == 1,
        "{stats:?}"
    );
    ensure!(stats.gpu_faults_failed == 0, "{stats:?}");
    Ok(())
}

/// In more pieces than one copy command has room for.
fn pages_scattered_over_vram_come_home_in_one_request() -> Result<()> {
    const PAGES: usize = 1600;
    let gpu = Gpu::open_first()?;
    let region = Region::map(PAGES * PAGE_SIZE, Backing::Small)?;
    for round in 0..3 {
        oracle::write(region, SEED + round);
        // Neighbours go one after the other, but never next to each other.
        for first in 0..2 {
            for page in (first..PAGES).step_by(2) {
                gpu.migrate(
                    region.part(page * PAGE_SIZE, PAGE_SIZE).pages(),
                    Place::Vram,
                )?;
            }
        }
        let vram: Vec<_> = gpu
            .query(region.pages())?
            .iter()
            .map(|page| page.cpu.vram)
            .collect();
        let pieces = vram
            .windows(2)
            .filter(|pair| pair[0].map(|at| at + PAGE_SIZE as u64) != pair[1]);
        let pieces = 1 + pieces.count();
        ensure!(pieces > PAGES / 2, "the pages lie in {pieces} pieces");
        move_all(&gpu, region, Place::Ram)?;
        oracle::check(region, SEED + round, 0)?;
    }
    Ok(())
}

fn inaccessible_memory_never_touched_stays_empty() -> Result<()> {
    let gpu = Gpu::open_first()?;
    for backing in [Backing::Small, Backing::Huge] {
        let region = Region::map(2 * HUGE_PAGE_SIZE, backing)?;
        region.protect(Protection::None)?;
        let moved = migrate(&gpu, region, Place::Vram)?;
        let pages = region.pages().count();
        ensure!(moved.stayed == pages as u64, "{backing:?}: {moved:?}");
        region.protect(Protection::ReadWrite)?;
        ensure_place(&gpu, region, Place::None)?;
        ensure!(region.load(pages) == 0);
    }
    ensure!(gpu.stats()?.pages_to_vram == 0);
    Ok(())
}

/// What the driver has seen of other memory means nothing for the next.
fn looks_at_pages_elsewhere_make_none_of_what_was_never_touched() -> Result<()> {
    const TOUCHED: usize = 100;
    let gpu = Gpu::open_first()?;
    let full = Region::map(4 * HUGE_PAGE_SIZE, Backing::Small)?;
    oracle::write(full, SEED);
    let fault = |gpu: &Gpu, region: Region| {
        let page = region.part(TOUCHED * PAGE_SIZE, PAGE_SIZE);
        Job::sum(page).run(gpu).map(drop)
    };
    type Act<'a> = &'a dyn Fn(&Gpu, Region) -> Result<()>;
    let acts: [(&str, Backing<'_>, Act<'_>, usize); 5] = [
        (
            "asked home",
            Backing::Small,
            &|gpu, region| migrate(gpu, region, Place::Ram).map(drop),
            0,
        ),
        (
            "asked to VRAM, shared",
            Backing::Shared,
            &|gpu, region| migrate(gpu, region, Place::Vram).map(drop),
            0,
        ),
        (
            "looked at",
            Backing::Small,
            &|gpu, region| gpu.query(region.pages()).map(drop).map_err(Into::into),
            0,
        ),
        ("used by the GPU", Backing::Small, &fault, 1),
        (
            "used by the GPU where it is",
            Backing::Small,
            &|gpu, region| {
                gpu.advise(region.pages(), Advice::MapOnly)?;
                fault(gpu, region)
            },
            1,
        ),
    ];
    let mut wrong = Vec::new();
    for (what, backing, act, pages) in acts {
        let empty = Region::map(full.length(), backing)?;
        for place in [Place::Ram, Place::Vram] {
            move_all(&gpu, full, place)?;
        }
        gpu.query(full.pages())?;
        act(&gpu, empty)?;
        let there = empty.pages().count() - count(&gpu, empty, Place::None)?;
        if there != pages {
            wrong.push((what, there));
        }
        empty.unmap()?;
    }
    ensure!(wrong.is_empty(), "so many pages are there: {wrong:?}");
    Ok(())
}
