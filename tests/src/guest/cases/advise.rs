// SPDX-License-Identifier: MIT OR Apache-2.0
//! Advice: what each kind does when the GPU faults, and what QUERY says of it.

use crate::guest::{
    call::Job,
    oracle,
    place::{count, ensure_place, move_all, state},
};
use anyhow::{Context, Result, ensure};
use farfault::arena::{Backing, Protection, Region};
use farfault::{Advice, Gpu, HUGE_PAGE_SIZE, PAGE_SIZE, Place};
use rustix::io::Errno;

group! { "advise", on Small, seconds 60:
    default_moves_the_page_that_faulted,
    default_moves_pages_that_fault_next_to_some_in_vram,
    default_moves_each_page_that_one_wave_reads,
    prefer_gpu_moves_all_of_the_range_in_the_same_2_mib,
    prefer_gpu_that_begins_earlier_moves_the_2_mib_that_faulted_alone,
    prefer_gpu_said_page_by_page_moves_all_of_it,
    prefer_gpu_with_holes_and_several_mappings_moves_each,
    prefer_cpu_brings_the_page_to_ram_and_maps_it_there,
    prefer_cpu_keeps_pages_of_many_waves_in_ram,
    map_only_maps_the_page_where_it_is,
    new_advice_counts_for_what_the_gpu_has_mapped,
    neighbours_in_one_batch_go_each_by_their_own_advice,
    pages_next_to_others_are_left_for_their_own_advice,
    advice_alone_moves_nothing,
    advice_of_parts_is_shown_page_by_page,
    advice_survives_munmap_and_ends_with_the_descriptor,
    too_many_ranges_are_enospc_and_do_no_harm,
    default_takes_no_range,
}

const SEED: u64 = 0xad;
const PAGES: usize = 64;

fn written(length: usize, backing: Backing<'_>) -> Result<Region> {
    let region = Region::map(length, backing)?;
    oracle::write(region, SEED);
    Ok(region)
}

fn page(region: Region, index: usize) -> Region {
    region.part(index * PAGE_SIZE, PAGE_SIZE)
}

fn default_moves_the_page_that_faulted() -> Result<()> {
    let gpu = Gpu::open_first()?;
    let region = written(PAGES * PAGE_SIZE, Backing::Small)?;
    gpu.advise(region.pages(), Advice::PreferCpu)?;
    gpu.advise(region.pages(), Advice::Default)?;
    Job::add(page(region, 9), 0).run(&gpu)?;
    ensure!(count(&gpu, region, Place::Vram)? == 1);
    ensure_place(&gpu, page(region, 9), Place::Vram)
}

/// The GPU has none of them mapped, and each wave faults on its own.
fn default_moves_pages_that_fault_next_to_some_in_vram() -> Result<()> {
    let gpu = Gpu::open_first()?;
    let pages = HUGE_PAGE_SIZE / PAGE_SIZE;
    let region = written(HUGE_PAGE_SIZE, Backing::Small)?;
    for index in (0..pages).step_by(8) {
        move_all(&gpu, page(region, index), Place::Vram)?;
    }
    gpu.advise(region.pages(), Advice::Default)?;
    Job::add(region, 1).waves(pages as u32).run(&gpu)?;
    ensure_place(&gpu, region, Place::Vram)?;
    oracle::check(region, SEED, 1)
}

fn default_moves_each_page_that_one_wave_reads() -> Result<()> {
    let gpu = Gpu::open_first()?;
    let region = written(PAGES * PAGE_SIZE, Backing::Small)?;
    ensure!(Job::sum(region).run(&gpu)? == oracle::expected_sum(region, SEED, 0));
    ensure_place(&gpu, region, Place::Vram)
}

fn prefer_gpu_moves_all_of_the_range_in_the_same_2_mib() -> Result<()> {
    let gpu = Gpu::open_first()?;
    let region = written(2 * HUGE_PAGE_SIZE, Backing::Small)?;
    // From the middle of the first 2 MiB to the middle of the second.
    let advised = region.part(HUGE_PAGE_SIZE / 2, HUGE_PAGE_SIZE);
    gpu.advise(advised.pages(), Advice::PreferGpu)?;
    Job::add(page(advised, 0), 0).run(&gpu)?;
    ensure_place(&gpu, advised.part(0, HUGE_PAGE_SIZE / 2), Place::Vram)?;
    ensure!(count(&gpu, region, Place::Vram)? == 256);
    let faults = gpu.stats()?.gpu_faults;
    Job::add(advised.part(0, HUGE_PAGE_SIZE / 2), 0)
        .waves(4)
        .run(&gpu)?;
    ensure!(
        gpu.stats()?.gpu_faults == faults,
        "what was moved was not mapped"
    );
    oracle::check(region, SEED, 0)
}

fn prefer_gpu_that_begins_earlier_moves_the_2_mib_that_faulted_alone() -> Result<()> {
    let gpu = Gpu::open_first()?;
    let region = written(3 * HUGE_PAGE_SIZE, Backing::Small)?;
    let second = region.part(HUGE_PAGE_SIZE, HUGE_PAGE_SIZE);
    gpu.advise(region.pages(), Advice::PreferGpu)?;
    Job::add(page(second, 7), 0).run(&gpu)?;
    ensure_place(&gpu, second, Place::Vram)?;
    ensure!(count(&gpu, region, Place::Vram)? == HUGE_PAGE_SIZE / PAGE_SIZE);
    oracle::check(region, SEED, 0)
}

/// Neighbours are one range, whichever is first.
fn prefer_gpu_said_page_by_page_moves_all_of_it() -> Result<()> {
    let gpu = Gpu::open_first()?;
    let (up, down) = (
        written(4 * HUGE_PAGE_SIZE, Backing::Small)?,
        written(4 * HUGE_PAGE_SIZE, Backing::Small)?,
    );
    let pages = up.pages().count();
    for index in 0..pages {
        gpu.advise(page(up, index).pages(), Advice::PreferGpu)?;
        gpu.advise(page(down, pages - 1 - index).pages(), Advice::PreferGpu)?;
    }
    for region in [up, down] {
        Job::add(page(region, 9), 0).run(&gpu)?;
        ensure_place(&gpu, region.part(0, HUGE_PAGE_SIZE), Place::Vram)?;
        oracle::check(region, SEED, 0)?;
    }
    Ok(())
}

fn prefer_gpu_with_holes_and_several_mappings_moves_each() -> Result<()> {
    let gpu = Gpu::open_first()?;
    let region = written(HUGE_PAGE_SIZE, Backing::Small)?;
    gpu.advise(region.pages(), Advice::PreferGpu)?;
    // Nothing, 64 pages, nothing, 64 pages that are only read, 64 pages.
    let part = |at: usize, pages: usize| region.part(at * PAGE_SIZE, pages * PAGE_SIZE);
    let [first, read_only, last] = [64, 256, 320].map(|at| part(at, 64));
    for hole in [part(0, 64), part(128, 128), part(384, 128)] {
        hole.unmap()?;
    }
    read_only.protect(Protection::Read)?;
    Job::add(page(last, 5), 0).run(&gpu)?;
    for part in [first, read_only, last] {
        ensure_place(&gpu, part, Place::Vram)?;
    }
    read_only.protect(Protection::ReadWrite)?;
    for part in [first, read_only, last] {
        let begin = (part.address() - region.address()) as usize / 8;
        let sum = Job::sum(part).waves(4).run(&gpu)?;
        ensure!(sum == oracle::sum(SEED, begin..begin + part.words()));
        oracle::check_part(part, SEED, begin, 0)?;
    }
    Ok(())
}

fn prefer_cpu_brings_the_page_to_ram_and_maps_it_there() -> Result<()> {
    let gpu = Gpu::open_first()?;
    for backing in [Backing::Small, Backing::Huge] {
        let region = written(HUGE_PAGE_SIZE, backing)?;
        move_all(&gpu, region, Place::Vram)?;
        gpu.advise(region.pages(), Advice::PreferCpu)?;
        Job::add(region, 1).waves(4).run(&gpu)?;
        ensure_place(&gpu, region, Place::Ram)?;
        let touched = state(&gpu, region, 3)?;
        ensure!(
            touched.gpu.place == Place::Ram && touched.gpu.write,
            "{touched:?}"
        );
        oracle::check(region, SEED, 1)?;
    }
    Ok(())
}

fn prefer_cpu_keeps_pages_of_many_waves_in_ram() -> Result<()> {
    let gpu = Gpu::open_first()?;
    for place in [Place::Ram, Place::Vram] {
        let region = written(HUGE_PAGE_SIZE, Backing::Small)?;
        move_all(&gpu, region, place)?;
        gpu.advise(region.pages(), Advice::PreferCpu)?;
        let moved = gpu.stats()?.pages_to_vram;
        Job::add(region, 1).waves(512).run(&gpu)?;
        ensure!(gpu.stats()?.pages_to_vram == moved, "from {place:?}");
        ensure_place(&gpu, region, Place::Ram)?;
        oracle::check(region, SEED, 1)?;
    }
    Ok(())
}

fn map_only_maps_the_page_where_it_is() -> Result<()> {
    let gpu = Gpu::open_first()?;
    for backing in [Backing::Small, Backing::Huge] {
        for place in [Place::Ram, Place::Vram] {
            let region = written(HUGE_PAGE_SIZE, backing)?;
            move_all(&gpu, region, place)?;
            gpu.advise(region.pages(), Advice::MapOnly)?;
            Job::add(region, 1).waves(4).run(&gpu)?;
            ensure_place(&gpu, region, place)?;
            let touched = state(&gpu, region, 3)?;
            ensure!(touched.gpu.place == place, "{touched:?}");
            oracle::check(region, SEED, 1)?;
        }
    }
    Ok(())
}

/// Whatever was said before, and wherever the GPU has the pages by that.
fn new_advice_counts_for_what_the_gpu_has_mapped() -> Result<()> {
    const ALL: [Advice; 4] = [
        Advice::Default,
        Advice::PreferGpu,
        Advice::PreferCpu,
        Advice::MapOnly,
    ];
    let gpu = Gpu::open_first()?;
    for backing in [Backing::Small, Backing::Huge] {
        for (before, after) in ALL
            .iter()
            .flat_map(|before| ALL.map(|after| (*before, after)))
        {
            let region = written(HUGE_PAGE_SIZE, backing)?;
            for advice in [before, after] {
                gpu.advise(region.pages(), advice)?;
                Job::add(region, 1).waves(4).run(&gpu)?;
            }
            let place = |advice| match advice {
                Advice::Default | Advice::PreferGpu => Some(Place::Vram),
                Advice::PreferCpu => Some(Place::Ram),
                Advice::MapOnly => None,
            };
            // By itself it moves nothing.
            let place = place(after).or(place(before)).unwrap_or(Place::Ram);
            ensure_place(&gpu, region, place)
                .with_context(|| format!("{before:?}, then {after:?}, {backing:?}"))?;
            oracle::check(region, SEED, 2)?;
            region.unmap()?;
        }
    }
    Ok(())
}

/// Neighbours are mapped along with the page that faults, but not those that another place is better for.
fn pages_next_to_others_are_left_for_their_own_advice() -> Result<()> {
    let gpu = Gpu::open_first()?;
    for advice in [Advice::PreferCpu, Advice::MapOnly] {
        let region = written(HUGE_PAGE_SIZE, Backing::Small)?;
        let first = region.part(0, 4 * PAGE_SIZE);
        gpu.advise(region.pages(), Advice::Default)?;
        gpu.advise(first.pages(), advice)?;
        Job::add(page(region, 0), 0).run(&gpu)?;
        Job::sum(page(region, 5)).run(&gpu)?;
        ensure_place(&gpu, first, Place::Ram)?;
        ensure_place(&gpu, page(region, 5), Place::Vram)?;
        oracle::check(region, SEED, 0)?;
        region.unmap()?;
    }
    Ok(())
}

fn advice_alone_moves_nothing() -> Result<()> {
    let gpu = Gpu::open_first()?;
    for place in [Place::Ram, Place::Vram] {
        let region = written(PAGES * PAGE_SIZE, Backing::Small)?;
        move_all(&gpu, region, place)?;
        for advice in Advice::ALL {
            gpu.advise(region.pages(), *advice)?;
            ensure_place(&gpu, region, place)?;
        }
    }
    Ok(())
}

fn advice_of_parts_is_shown_page_by_page() -> Result<()> {
    let gpu = Gpu::open_first()?;
    let region = Region::map(PAGES * PAGE_SIZE, Backing::Small)?;
    // The oracle: a plain list, to which the same pieces of advice are given.
    let mut should = [Advice::Default; PAGES];
    for round in 0..200 {
        let random = oracle::word(SEED, round) as usize;
        let (first, length) = (random % PAGES, (random >> 8) % PAGES);
        let length = length.clamp(1, PAGES - first);
        let advice = Advice::ALL[(random >> 16) % Advice::ALL.len()];
        let part = region.part(first * PAGE_SIZE, length * PAGE_SIZE);
        gpu.advise(part.pages(), advice)?;
        should[first..first + length].fill(advice);
        let states = gpu.query(region.pages())?;
        let is: Vec<_> = states.iter().map(|page| page.advice).collect();
        ensure!(
            is == should,
            "round {round}: {is:?} and should be {should:?}"
        );
    }
    Ok(())
}

fn advice_survives_munmap_and_ends_with_the_descriptor() -> Result<()> {
    let region = Region::map(4 * PAGE_SIZE, Backing::Small)?;
    let gpu = Gpu::open_first()?;
    let other = Gpu::open_first()?;
    gpu.advise(region.pages(), Advice::MapOnly)?;
    region.unmap()?;
    region.map_again()?;
    ensure!(state(&gpu, region, 1)?.advice == Advice::MapOnly);
    ensure!(state(&other, region, 1)?.advice == Advice::Default);
    drop(gpu);
    let gpu = Gpu::open_first()?;
    ensure!(state(&gpu, region, 1)?.advice == Advice::Default);
    Ok(())
}

fn too_many_ranges_are_enospc_and_do_no_harm() -> Result<()> {
    const TRIES: usize = 1 << 16;
    let gpu = Gpu::open_first()?;
    let region = Region::map(2 * TRIES * PAGE_SIZE, Backing::Small)?;
    let refused = (0..TRIES).find_map(|index| {
        let every_other = page(region, 2 * index);
        let error = gpu.advise(every_other.pages(), Advice::MapOnly).err()?;
        Some((index, error))
    });
    let Some((index, error)) = refused else {
        anyhow::bail!("{TRIES} ranges were accepted");
    };
    let farfault::Error::Call { cause, .. } = &error else {
        anyhow::bail!("{error}");
    };
    ensure!(Errno::from_io_error(cause) == Some(Errno::NOSPC), "{error}");
    ensure!(index > 16, "only {index} ranges");
    ensure!(state(&gpu, region, 2 * index)?.advice == Advice::Default);
    ensure!(state(&gpu, region, 2 * index - 2)?.advice == Advice::MapOnly);
    // One range again: there is room.
    gpu.advise(region.pages(), Advice::PreferCpu)?;
    gpu.advise(page(region, 1).pages(), Advice::MapOnly)?;
    ensure!(state(&gpu, region, 2)?.advice == Advice::PreferCpu);
    Ok(())
}

fn default_takes_no_range() -> Result<()> {
    const CALLS: usize = 4096;
    let gpu = Gpu::open_first()?;
    let region = Region::map(2 * CALLS * PAGE_SIZE, Backing::Small)?;
    for index in 0..CALLS {
        let every_other = page(region, 2 * index).pages();
        // Of its own for a moment only.
        gpu.advise(every_other, Advice::MapOnly)?;
        gpu.advise(every_other, Advice::Default)?;
    }
    Ok(())
}

/// The GPU faults on both sides of the border at the same time.
fn neighbours_in_one_batch_go_each_by_their_own_advice() -> Result<()> {
    for (advice, place) in [
        (Advice::MapOnly, Place::Ram),
        (Advice::PreferCpu, Place::Ram),
        (Advice::PreferGpu, Place::Vram),
    ] {
        let gpu = Gpu::open_first()?;
        let region = Region::map(HUGE_PAGE_SIZE, Backing::Small)?;
        oracle::write(region, SEED);
        let half = HUGE_PAGE_SIZE / 2;
        let (first, second) = (region.part(0, half), region.part(half, half));
        gpu.advise(second.pages(), advice)?;
        Job::add(region, 1).waves(512).run(&gpu)?;
        ensure_place(&gpu, first, Place::Vram).with_context(|| format!("beside {advice:?}"))?;
        ensure_place(&gpu, second, place).with_context(|| format!("{advice:?}"))?;
        oracle::check(region, SEED, 1)?;
        region.unmap()?;
    }
    Ok(())
}
