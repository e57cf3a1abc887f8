// SPDX-License-Identifier: MIT OR Apache-2.0
//! Pages of 2 MiB in VRAM that are looked at, touched, unmapped and moved in parts: each part is
//! where it belongs, and has its data.

use crate::guest::{
    VRAM,
    call::{self, JOB_TIME, Job, ensure_status},
    child::{Gate, code},
    oracle,
    place::{count, ensure_place, migrate, move_all, state},
};
use anyhow::{Context, Result, ensure};
use farfault::arena::{Backing, Region};
use farfault::{
    Advice, Gpu, HUGE_PAGE_SIZE, PAGE_SIZE, PageState, Place,
    process::{Ended, fork},
    stage,
    uapi::JobStatus,
};
use std::time::Duration;

group! { "huge_pages", on Small, seconds 60:
    page_looked_at_from_its_middle_is_where_it_is,
    page_used_from_its_middle_by_a_gpu_that_has_nothing_mapped_has_its_data,
    middle_unmapped_leaves_the_rest_to_cpu_and_gpu,
    parts_after_an_unmap_touched_by_the_cpu_come_home_alone,
    part_moved_by_mremap_is_where_the_whole_was,
    part_moved_by_mremap_then_touched_by_the_cpu_has_its_data,
    zero_page_of_2_mib_moves_and_stays_zero,
    page_without_a_free_block_moves_as_small_ones,
    page_of_parent_and_child_without_a_free_block_stays_theirs,
    page_never_touched_without_a_free_block_is_zero,
    page_that_faults_in_two_batches_stays_mapped,
    small_entries_of_before_a_huge_one_do_not_come_back,
}

const SEED: u64 = 0x2b16;
const WORDS_PER_PAGE: usize = PAGE_SIZE / 8;
const PAGES: usize = HUGE_PAGE_SIZE / PAGE_SIZE;
/// Where views of a page begin and end: at neither end, at one, at both.
const PARTS: [(usize, usize); 7] = [
    (1, 511),
    (7, 1),
    (100, 24),
    (255, 2),
    (256, 256),
    (511, 1),
    (0, 512),
];

fn pages(region: Region, first: usize, count: usize) -> Region {
    region.part(first * PAGE_SIZE, count * PAGE_SIZE)
}

/// A huge page of a seed's words in VRAM, and its address there.
fn in_vram(gpu: &Gpu) -> Result<(Region, u64)> {
    let region = Region::map(HUGE_PAGE_SIZE, Backing::Huge)?;
    oracle::write(region, SEED);
    move_all(gpu, region, Place::Vram)?;
    let first = state(gpu, region, 0)?;
    ensure!(first.cpu.huge, "it is in pieces: {first:?}");
    let vram = first.cpu.vram.context("it is not in VRAM")?;
    ensure!(vram % HUGE_PAGE_SIZE as u64 == 0, "{vram:#x}");
    Ok((region, vram))
}

/// By both page tables, the pages from `first` on are where those of a huge page at `vram` are.
fn ensure_part_of(states: &[PageState], first: usize, vram: u64) -> Result<()> {
    for (index, state) in states.iter().enumerate() {
        let should = vram + ((first + index) * PAGE_SIZE) as u64;
        ensure!(
            state.cpu.vram == Some(should),
            "page {} is at {should:#x}: {state:x?}",
            first + index
        );
        ensure!(
            state.gpu.place == Place::None || state.gpu.vram == Some(should),
            "page {} is at {should:#x}: {state:x?}",
            first + index
        );
    }
    Ok(())
}

/// As [`ensure_part_of`], and the GPU has all of them mapped.
fn ensure_mapped_part_of(gpu: &Gpu, part: Region, first: usize, vram: u64) -> Result<()> {
    let states = gpu.query(part.pages())?;
    ensure_part_of(&states, first, vram)?;
    let missing = states.iter().position(|page| page.gpu.place == Place::None);
    ensure!(missing.is_none(), "page {missing:?} is not mapped");
    Ok(())
}

/// `hmm_range_fault()` of 7.2 has the wrong pages where it begins inside a huge page of a device; see
/// `docs/kernel-findings.md`.
fn page_looked_at_from_its_middle_is_where_it_is() -> Result<()> {
    let gpu = Gpu::open_first()?;
    let (region, vram) = in_vram(&gpu)?;
    for (first, count) in PARTS {
        let part = pages(region, first, count);
        let states = gpu.query(part.pages())?;
        ensure!(states.len() == count);
        ensure_part_of(&states, first, vram)?;
        ensure!(states.iter().all(|page| page.cpu.huge), "{states:?}");
    }
    // A look moves nothing.
    ensure_place(&gpu, region, Place::Vram)?;
    oracle::check(region, SEED, 0)
}

/// As above, for the look that a GPU fault takes: whatever is mapped then is the right page.
fn page_used_from_its_middle_by_a_gpu_that_has_nothing_mapped_has_its_data() -> Result<()> {
    let gpu = Gpu::open_first()?;
    let (region, vram) = in_vram(&gpu)?;
    // Another descriptor has an address space of its own on the GPU, with nothing in it.
    let other = Gpu::open_first()?;
    let mut added = vec![0u64; PAGES];
    for advice in [Advice::MapOnly, Advice::Default, Advice::PreferGpu] {
        for (first, count) in PARTS {
            for gpu in [&gpu, &other] {
                let part = pages(region, first, count);
                // It unmaps all of it from this GPU's address space.
                gpu.advise(region.pages(), advice)?;
                ensure!(state(gpu, region, 0)?.gpu.place == Place::None);
                Job::add(part, 1).run(gpu)?;
                added[first..first + count].iter_mut().for_each(|a| *a += 1);
                ensure_mapped_part_of(gpu, part, first, vram)?;
                ensure_part_of(&gpu.query(region.pages())?, 0, vram)?;
                let words = part.words() as u64 / count as u64;
                let should = oracle::sum(
                    SEED,
                    first * WORDS_PER_PAGE..(first + count) * WORDS_PER_PAGE,
                );
                let extra: u64 = added[first..first + count].iter().sum();
                let sum = Job::sum(part).run(gpu)?;
                ensure!(
                    sum == should.wrapping_add(extra * words),
                    "{advice:?}, {count} pages from {first}"
                );
            }
        }
    }
    for (index, added) in added.into_iter().enumerate() {
        oracle::check_part(pages(region, index, 1), SEED, index * WORDS_PER_PAGE, added)?;
    }
    Ok(())
}

fn middle_unmapped_leaves_the_rest_to_cpu_and_gpu() -> Result<()> {
    for gpu_first in [true, false] {
        let gpu = Gpu::open_first()?;
        let (region, vram) = in_vram(&gpu)?;
        let before = gpu.stats()?.pages_to_ram;
        pages(region, 200, 100).unmap()?;
        let rest = [(0, 200), (300, 212)];
        for (first, count) in rest {
            let part = pages(region, first, count);
            // Nothing has moved: the page was split where it is.
            ensure_part_of(&gpu.query(part.pages())?, first, vram)?;
            if gpu_first {
                Job::add(part, 1).waves(2).run(&gpu)?;
                ensure_mapped_part_of(&gpu, part, first, vram)?;
            }
        }
        ensure!(gpu.stats()?.pages_to_ram == before, "it went home for that");
        let added = u64::from(gpu_first);
        for (first, count) in rest {
            oracle::check_part(
                pages(region, first, count),
                SEED,
                first * WORDS_PER_PAGE,
                added,
            )?;
        }
        // The hole can be used anew.
        let hole = pages(region, 200, 100);
        hole.map_again()?;
        ensure!(Job::sum(hole).run(&gpu)? == 0);
        Job::fill(hole, 3).run(&gpu)?;
        Job::add(region, 1).waves(4).run(&gpu)?;
        ensure!(hole.load(0) == 4 && hole.load(hole.words() - 1) == 4);
        let last = pages(region, 300, 212);
        oracle::check_part(last, SEED, 300 * WORDS_PER_PAGE, added + 1)?;
    }
    Ok(())
}

fn parts_after_an_unmap_touched_by_the_cpu_come_home_alone() -> Result<()> {
    let gpu = Gpu::open_first()?;
    let (region, vram) = in_vram(&gpu)?;
    pages(region, 256, 1).unmap()?;
    let before = gpu.stats()?;
    for index in [0, 5, 255, 257, 511] {
        let page = pages(region, index, 1);
        oracle::check_part(page, SEED, index * WORDS_PER_PAGE, 0)?;
        ensure!(state(&gpu, region, index)?.cpu.place == Place::Ram);
    }
    let after = gpu.stats()?;
    let homes = after.pages_to_ram - before.pages_to_ram;
    ensure!(homes == 5, "{homes} pages came home");
    for (first, count) in [(1, 4), (6, 249), (258, 253)] {
        let part = pages(region, first, count);
        ensure_place(&gpu, part, Place::Vram)?;
        ensure_part_of(&gpu.query(part.pages())?, first, vram)?;
    }
    // What is at home goes again, to other places, between what is still there.
    for (first, count) in [(0, 256), (257, 255)] {
        let part = pages(region, first, count);
        move_all(&gpu, part, Place::Vram)?;
        Job::add(part, 2).waves(2).run(&gpu)?;
        oracle::check_part(part, SEED, first * WORDS_PER_PAGE, 2)?;
    }
    Ok(())
}

fn part_moved_by_mremap_is_where_the_whole_was() -> Result<()> {
    let gpu = Gpu::open_first()?;
    for (first, count) in [(0, 128), (64, 200), (300, 212)] {
        let (region, vram) = in_vram(&gpu)?;
        Job::add(region, 1).waves(2).run(&gpu)?;
        let moved = pages(region, first, count).remap()?;
        ensure_part_of(&gpu.query(moved.pages())?, first, vram)?;
        Job::add(moved, 1).waves(2).run(&gpu)?;
        ensure_mapped_part_of(&gpu, moved, first, vram)?;
        let end = first + count;
        for (first, count) in [(0, first), (end, PAGES - end)] {
            if count != 0 {
                let rest = pages(region, first, count);
                ensure_part_of(&gpu.query(rest.pages())?, first, vram)?;
                oracle::check_part(rest, SEED, first * WORDS_PER_PAGE, 1)?;
            }
        }
        oracle::check_part(moved, SEED, first * WORDS_PER_PAGE, 2)?;
    }
    Ok(())
}

fn part_moved_by_mremap_then_touched_by_the_cpu_has_its_data() -> Result<()> {
    let gpu = Gpu::open_first()?;
    let (region, _) = in_vram(&gpu)?;
    // To another place in 2 MiB, with a neighbour of another kind.
    let moved = pages(region, 33, 100).remap()?;
    for index in (0..100).step_by(3) {
        let page = pages(moved, index, 1);
        oracle::check_part(page, SEED, (33 + index) * WORDS_PER_PAGE, 0)?;
        page.store(1, 5);
    }
    let sum = Job::sum(moved).run(&gpu)?;
    let by_cpu = (0..moved.words()).map(|word| moved.load(word));
    ensure!(sum == by_cpu.fold(0, u64::wrapping_add));
    migrate(&gpu, region.part(0, 33 * PAGE_SIZE), Place::Ram)?;
    oracle::check_part(pages(region, 0, 33), SEED, 0, 0)?;
    oracle::check_part(pages(region, 133, 379), SEED, 133 * WORDS_PER_PAGE, 0)
}

fn zero_page_of_2_mib_moves_and_stays_zero() -> Result<()> {
    let gpu = Gpu::open_first()?;
    for round in 0..3 {
        let region = Region::map(2 * HUGE_PAGE_SIZE, Backing::Huge)?;
        // A load brings the zero page that all share.
        ensure!(region.load(0) == 0 && region.load(region.words() - 1) == 0);
        ensure!(state(&gpu, region, 0)?.cpu.huge, "it has no huge zero page");
        match round {
            0 => move_all(&gpu, region, Place::Vram).map(drop)?,
            // A part of it.
            1 => move_all(&gpu, pages(region, 100, 600), Place::Vram).map(drop)?,
            // The GPU's fault moves it.
            _ => Job::fill(pages(region, 700, 1), 0).run(&gpu).map(drop)?,
        }
        ensure!(count(&gpu, region, Place::Vram)? > 0, "round {round}");
        ensure!(
            Job::sum(region).waves(4).run(&gpu)? == 0,
            "round {round}: another owner's data"
        );
        Job::add(region, 9).waves(4).run(&gpu)?;
        for index in 0..region.words() {
            let is = region.load(index);
            ensure!(is == 9, "round {round}: word {index} is {is:#x}");
        }
    }
    // Nobody wrote to the page that all share.
    let other = Region::map(HUGE_PAGE_SIZE, Backing::Huge)?;
    for index in 0..other.words() {
        ensure!(other.load(index) == 0, "the zero page has {index}");
    }
    Ok(())
}

/// Of each block of VRAM but a few, a small page is in use while the region lives: no huge page finds
/// room as a whole, unless something is evicted for it.
fn no_free_block(gpu: &Gpu) -> Result<Region> {
    // All of VRAM in small pages but a rest for tables, of which then every other one goes home.
    let length = VRAM as usize - 3 * HUGE_PAGE_SIZE;
    let region = Region::map(length, Backing::Small)?;
    oracle::write(region, SEED);
    migrate(gpu, region, Place::Vram)?;
    for page in (0..region.pages().count()).step_by(2) {
        ensure!(
            region.load(page * WORDS_PER_PAGE) == oracle::word(SEED, page * WORDS_PER_PAGE),
            "page {page}"
        );
    }
    Ok(region)
}

/// Huge pages of a seed's words.
fn huge_pages(count: usize) -> Result<Region> {
    let huge = Region::map(count * HUGE_PAGE_SIZE, Backing::Huge)?;
    oracle::write(huge, SEED + 1);
    Ok(huge)
}

/// Moves huge pages to VRAM, and ensures that there were some that went in parts.
fn ensure_moved_in_parts(gpu: &Gpu, huge: Region) -> Result<()> {
    let moved = migrate(gpu, huge, Place::Vram)?;
    ensure!(moved.stayed == 0, "{moved:?}");
    let states = gpu.query(huge.pages())?;
    ensure!(
        states.iter().any(|page| !page.cpu.huge),
        "there were free blocks: this test shows nothing"
    );
    Ok(())
}

fn page_without_a_free_block_moves_as_small_ones() -> Result<()> {
    let gpu = Gpu::open_first()?;
    let region = no_free_block(&gpu)?;
    let huge = huge_pages(4)?;
    ensure_moved_in_parts(&gpu, huge)?;
    Job::add(huge, 1).waves(8).run(&gpu)?;
    let sum = Job::sum(huge).waves(8).run(&gpu)?;
    ensure!(sum == oracle::expected_sum(huge, SEED + 1, 1));
    oracle::check(huge, SEED + 1, 1)?;
    oracle::check(region, SEED, 0)
}

/// The child's page table has the same huge pages, and is not the one that the request is about.
fn page_of_parent_and_child_without_a_free_block_stays_theirs() -> Result<()> {
    let gpu = Gpu::open_first()?;
    let region = no_free_block(&gpu)?;
    let huge = huge_pages(4)?;
    let gate = Gate::new()?;
    let child = fork(|| {
        code((|| {
            gate.wait()?;
            oracle::check(huge, SEED + 1, 0)?;
            oracle::write(huge, SEED + 2);
            oracle::check(huge, SEED + 2, 0)
        })())
    })?;
    let moved = ensure_moved_in_parts(&gpu, huge);
    gate.open()?;
    ensure!(child.wait()? == Ended::Exited(0), "the child's data");
    moved?;
    Job::add(huge, 1).waves(8).run(&gpu)?;
    oracle::check(huge, SEED + 1, 1)?;
    oracle::check(region, SEED, 0)
}

/// The pages of VRAM that it gets have had others' words in them.
fn page_never_touched_without_a_free_block_is_zero() -> Result<()> {
    let gpu = Gpu::open_first()?;
    let region = no_free_block(&gpu)?;
    let hole = Region::map(4 * HUGE_PAGE_SIZE, Backing::Huge)?;
    ensure_moved_in_parts(&gpu, hole)?;
    let sum = Job::sum(hole).waves(8).run(&gpu)?;
    ensure!(sum == 0, "the GPU's sum is {sum:#x}");
    Job::add(hole, 5).waves(8).run(&gpu)?;
    let wrong = (0..hole.words()).find(|&word| hole.load(word) != 5);
    ensure!(wrong.is_none(), "word {wrong:?} was not zero");
    oracle::check(region, SEED, 0)
}

/// The second batch finds the page mapped as a whole, and has nothing to add.
fn page_that_faults_in_two_batches_stays_mapped() -> Result<()> {
    let gpu = Gpu::open_first()?;
    // At lower addresses: what faults there is served first in each batch.
    let busy = Region::map(HUGE_PAGE_SIZE, Backing::Small)?;
    let region = Region::map(HUGE_PAGE_SIZE, Backing::Huge)?;
    for each in [busy, region] {
        gpu.advise(each.pages(), Advice::MapOnly)?;
    }
    oracle::write(region, SEED);
    let should = oracle::expected_sum(region, SEED, 0);
    for start in [Place::Ram, Place::Vram] {
        move_all(&gpu, region, start)?;
        for round in 0..10 {
            busy.advise(stage::Advice::DontNeed)?;
            // What the GPU has of it goes.
            gpu.advise(region.pages(), Advice::MapOnly)?;
            let load = Job::sum(busy).waves(64).submit(&gpu)?;
            // Each begins with pages of its own.
            let jobs = [3, 5, 7, 11, 13, 17].map(|waves| {
                std::thread::sleep(Duration::from_micros(500));
                Job::sum(region).waves(waves).submit(&gpu)
            });
            for fence in jobs {
                let end = call::wait(&gpu, fence?, JOB_TIME)?;
                ensure_status(&end, JobStatus::Ok)?;
                ensure!(end.result == should, "{start:?}, round {round}");
            }
            ensure_status(&call::wait(&gpu, load, JOB_TIME)?, JobStatus::Ok)?;
            let states = gpu.query(region.pages())?;
            let lost = states.iter().position(|page| page.gpu.place != start);
            let lost = lost.map(|page| (page, states[page]));
            ensure!(
                lost.is_none(),
                "{start:?}, round {round}: {lost:?} is not mapped"
            );
        }
    }
    Ok(())
}

/// The table of a part that was mapped page by page is set aside when the page is mapped as a whole, and is
/// used again for other memory.
fn small_entries_of_before_a_huge_one_do_not_come_back() -> Result<()> {
    let gpu = Gpu::open_first()?;
    let region = Region::map(HUGE_PAGE_SIZE, Backing::Huge)?;
    oracle::write(region, SEED);
    gpu.advise(region.pages(), Advice::MapOnly)?;
    move_all(&gpu, region, Place::Vram)?;
    gpu.advise(region.pages(), Advice::MapOnly)?;
    let half = region.part(HUGE_PAGE_SIZE / 2, HUGE_PAGE_SIZE / 2);
    move_all(&gpu, half, Place::Vram)?;
    let by_page = state(&gpu, region, PAGES - 1)?.gpu;
    ensure!(
        by_page.place == Place::Vram && !by_page.huge,
        "of a page that was asked for by itself: {by_page:?}"
    );
    Job::sum(region.part(0, PAGE_SIZE)).run(&gpu)?;
    let whole = state(&gpu, region, PAGES - 1)?.gpu;
    ensure!(whole.huge, "after a fault: {whole:?}");
    // Other memory, small pages, of which the GPU needs the first.
    region.unmap()?;
    region.map_again()?;
    region.advise(stage::Advice::NoHugePage)?;
    oracle::write(region, SEED + 1);
    gpu.advise(region.part(0, PAGE_SIZE).pages(), Advice::MapOnly)?;
    Job::sum(region.part(0, PAGE_SIZE)).run(&gpu)?;
    let old = state(&gpu, region, PAGES - 1)?.gpu;
    ensure!(old.place != Place::Vram, "an entry of before: {old:?}");
    let sum = Job::sum(region).run(&gpu)?;
    ensure!(sum == oracle::expected_sum(region, SEED + 1, 0));
    Ok(())
}
