// SPDX-License-Identifier: MIT OR Apache-2.0
//! Calls of the nodes of `dmirror=1` on ranges that begin, end or go through the middle of 2 MiB, where a page table
//! of the GPU ends.

use crate::guest::{
    call::Job,
    mirror::{Action, HUGE, LOCAL, Mirror, WRITE},
    oracle,
    place::{driver_count, ensure_place, move_all},
};
use anyhow::{Context, Result, ensure};
use farfault::arena::{Backing, Protection, Region};
use farfault::{Gpu, HUGE_PAGE_SIZE, PAGE_SIZE, Place};
use rustix::io::Errno;

group! { "dmirror", on Mirrors, seconds 90:
    check_of_several_huge_pages_finds_the_one_exclusive_page,
    snapshot_of_a_part_is_that_part_of_the_whole,
    read_across_more_tables_than_a_context_may_have_is_right,
    release_brings_pages_of_all_descriptors_home_and_evicts_none,
}

const SEED: u64 = 0xd314;
const PAGES: usize = HUGE_PAGE_SIZE / PAGE_SIZE;

fn check_of_several_huge_pages_finds_the_one_exclusive_page() -> Result<()> {
    const BLOCKS: usize = 3;
    let mirror = Mirror::open(0)?;
    let region = Region::map(BLOCKS * HUGE_PAGE_SIZE, Backing::Small)?;
    let buffer = Region::map(region.length(), Backing::Small)?;
    let pages = |from: usize, to: usize| region.part(from * PAGE_SIZE, (to - from) * PAGE_SIZE);
    let check = |range| mirror.call(Action::CheckExclusive, range, buffer).map(drop);
    for page in [0, PAGES + 3, BLOCKS * PAGES - 1] {
        let one = pages(page, page + 1);
        oracle::write(one, SEED);
        mirror.call(Action::Exclusive, one, buffer)?;
        let around = [(0, page), (page + 1, BLOCKS * PAGES)];
        for (from, to) in around.into_iter().filter(|(from, to)| from < to) {
            let beside = check(pages(from, to));
            ensure!(beside.is_ok(), "beside page {page}: {beside:?}");
        }
        for range in [region, one] {
            let has = check(range);
            ensure!(has == Err(Errno::PERM), "page {page}: {has:?}");
        }
        oracle::check(one, SEED, 0)?;
        ensure!(check(region).is_ok(), "page {page} was touched");
    }
    Ok(())
}

/// A huge page in VRAM, and small pages in RAM beside it of which every other one may only be read.
fn snapshot_of_a_part_is_that_part_of_the_whole() -> Result<()> {
    const SMALL: usize = 8;
    let mirror = Mirror::open(1)?;
    let region = Region::map(3 * HUGE_PAGE_SIZE, Backing::Huge)?;
    let (huge, rest) = (
        region.part(HUGE_PAGE_SIZE, HUGE_PAGE_SIZE),
        [0, 2].map(|block| region.part(block * HUGE_PAGE_SIZE, HUGE_PAGE_SIZE)),
    );
    let buffer = Region::map(HUGE_PAGE_SIZE, Backing::Small)?;
    oracle::write(huge, SEED);
    mirror.call(Action::ToDevice, huge, buffer)?;
    // The last pages before it, and the first behind it.
    let beside = [(rest[0], PAGES - SMALL), (rest[1], 0)];
    for (block, first) in beside {
        block.pages().allow_huge(false)?;
        for page in (first..first + SMALL).map(|page| block.part(page * PAGE_SIZE, PAGE_SIZE)) {
            page.store(0, 1);
            if page.address() / PAGE_SIZE as u64 % 2 == 0 {
                page.protect(Protection::Read)?;
            }
        }
    }
    let whole = mirror.snapshot(region)?;
    let of_huge = whole.get(PAGES..2 * PAGES).context("a short answer")?;
    ensure!(of_huge.iter().all(|page| *page == LOCAL | WRITE | HUGE));
    ensure!(whole[PAGES - 2..PAGES] != whole[PAGES - 1..=PAGES]);
    for (from, to) in [
        (PAGES - SMALL, PAGES + 1),
        (PAGES - 1, 2 * PAGES + 1),
        (PAGES + 9, PAGES + 10),
        (PAGES + 100, 2 * PAGES + 5),
        (2 * PAGES - 1, 2 * PAGES + SMALL + 2),
        (2 * PAGES + 3, 2 * PAGES + 6),
    ] {
        let part = mirror.snapshot(region.part(from * PAGE_SIZE, (to - from) * PAGE_SIZE))?;
        ensure!(part == whole[from..to], "{from} to {to}: {part:x?}");
    }
    oracle::check(huge, SEED, 0)
}

/// The driver gives up all of a context's tables when they have become many.
fn read_across_more_tables_than_a_context_may_have_is_right() -> Result<()> {
    // Each has a table of its own, and one context may have 64 in all.
    const BLOCKS: usize = 100;
    let mirror = Mirror::open(0)?;
    let region = Region::map(BLOCKS * HUGE_PAGE_SIZE, Backing::Small)?;
    let pair = |block: usize| region.part(block * HUGE_PAGE_SIZE - PAGE_SIZE, 2 * PAGE_SIZE);
    let buffer = Region::map(2 * HUGE_PAGE_SIZE, Backing::Small)?;
    let into = buffer.part(0, 2 * PAGE_SIZE);
    (1..BLOCKS).for_each(|block| oracle::write(pair(block), SEED + block as u64));
    for round in 0..2 {
        for block in 1..BLOCKS {
            into.discard()?;
            mirror.call(Action::Read, pair(block), into)?;
            oracle::check(into, SEED + block as u64, 0)
                .with_context(|| format!("block {block}, round {round}"))?;
        }
    }
    // Over tables that are there and some that are not.
    for block in [1, BLOCKS / 2, BLOCKS - 2] {
        let range = region.part(block * HUGE_PAGE_SIZE - PAGE_SIZE, buffer.length());
        let done = mirror.call(Action::Read, range, buffer)?;
        ensure!(done.pages == 2 * PAGES as u64, "{done:?}");
        oracle::check(into, SEED + block as u64, 0)?;
        let next = buffer.part(HUGE_PAGE_SIZE, 2 * PAGE_SIZE);
        oracle::check(next, SEED + block as u64 + 1, 0)?;
    }
    Ok(())
}

fn release_brings_pages_of_all_descriptors_home_and_evicts_none() -> Result<()> {
    let gpu = Gpu::open("/dev/farfault0")?;
    let mirror = Mirror::open(0)?;
    let evicted = driver_count(0, "pages_evicted")?;
    for backing in [Backing::Small, Backing::Huge] {
        let region = Region::map(HUGE_PAGE_SIZE, backing)?;
        oracle::write(region, SEED);
        move_all(&gpu, region, Place::Vram)?;
        Job::add(region, 1).run(&gpu)?;
        let before = gpu.stats()?;
        mirror.call(Action::Release, region, region)?;
        let after = gpu.stats()?;
        ensure_place(&gpu, region, Place::Ram)?;
        ensure!(
            after.pages_to_ram == before.pages_to_ram + PAGES as u64 && after.pages_evicted == 0,
            "{backing:?}: {before:?}, {after:?}"
        );
        oracle::check(region, SEED, 1)?;
    }
    ensure!(driver_count(0, "pages_evicted")? == evicted);
    Ok(())
}
