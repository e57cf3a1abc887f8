// SPDX-License-Identifier: MIT OR Apache-2.0
//! Swap, on a disk and on zram: pages that the GPU has mapped are swapped out under it, and come back by
//! its fault. What it wrote is never lost, even where no CPU ever wrote: the kernel drops a page that
//! looks clean and is in swap already. Pages in VRAM are not swapped. What happens while jobs run is in
//! [`super::swap_jobs`].

use super::{
    files::{Mounted, is_huge},
    start::{
        At, SEED, Start, ensure_agreement, ensure_sum, ensure_words, eventually, exercise,
        exercise_all, exercise_empty,
    },
    storage::{EACH_SWAP, Swap, drop_caches, swap_out, swapped, swapped_out},
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
    Access, Advice, Gpu, HUGE_PAGE_SIZE, Place,
    process::{Ended, fork},
    stage,
};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use std::fs::File;

group! { "mm::swap", on Disk, seconds 120:
    mirrored_pages_swapped_out_come_back_by_the_gpus_fault,
    gpu_writes_to_pages_that_came_back_clean_survive_swap,
    gpu_writes_to_pages_that_came_back_clean_and_were_taken_survive_swap,
    gpu_writes_to_shared_memory_that_was_only_read_survive_swap,
    gpu_writes_to_a_huge_page_of_a_file_survive_swap,
    pages_in_vram_are_not_swapped_and_are_once_home,
    half_in_vram_and_half_swapped_keeps_the_data,
    swapped_pages_asked_to_vram_keep_the_data,
    swapped_pages_that_the_gpu_touches_can_go_to_vram,
    atomics_of_the_gpu_on_pages_that_were_swapped_count,
    fork_of_swapped_pages_leaves_each_its_data,
    swapped_pages_discarded_moved_and_unmapped_are_so_for_the_gpu,
    swapoff_brings_mirrored_pages_back,
}

pub(super) const MIRRORED: [Start; 2] = [
    Start {
        backing: Backing::Small,
        at: At::Ram,
    },
    Start {
        backing: Backing::Huge,
        at: At::Ram,
    },
];

/// Runs a case on a GPU and 2 MiB of each of these starts, with each kind of swap.
pub(super) fn each_swap(
    starts: &[Start],
    case: impl Fn(&Gpu, Region, &Swap) -> Result<()>,
) -> Result<()> {
    for on in EACH_SWAP {
        for start in starts {
            let swap = Swap::on(on)?;
            let gpu = Gpu::open_first()?;
            let region = start.region(&gpu, HUGE_PAGE_SIZE)?;
            case(&gpu, region, &swap).with_context(|| format!("{start:?}, swap on {on:?}"))?;
            region.unmap()?;
        }
    }
    Ok(())
}

/// Neither CPU nor GPU has anything of it mapped.
fn ensure_unmapped(gpu: &Gpu, region: Region) -> Result<()> {
    let states = gpu.query(region.pages())?;
    let wrong = states
        .iter()
        .position(|page| page.cpu.place != Place::None || page.gpu.place != Place::None);
    ensure!(
        wrong.is_none(),
        "page {wrong:?} was swapped out, and is {:?}",
        wrong.and_then(|page| states.get(page))
    );
    ensure_agreement(gpu, region)
}

fn mirrored_pages_swapped_out_come_back_by_the_gpus_fault() -> Result<()> {
    each_swap(&MIRRORED, |gpu, region, _| {
        swap_out(region)?;
        ensure_unmapped(gpu, region)?;
        ensure_sum(gpu, region, 0, 0)?;
        ensure_place(gpu, region, Place::Ram)?;
        exercise_all(gpu, region)?;
        // Now its first touch is a write.
        swap_out(region)?;
        Job::add(region, 1).waves(2).run(gpu)?;
        ensure_place(gpu, region, Place::Ram)?;
        exercise(gpu, region, 0, 3)
    })
}

/// Who touches pages that were swapped out, before the GPU writes to them.
#[derive(Clone, Copy, Debug)]
enum Back {
    CpuRead,
    ReadAhead,
    GpuRead,
    GpuWrite,
}

fn gpu_writes_to_pages_that_came_back_clean_survive_swap() -> Result<()> {
    each_swap(&MIRRORED, |gpu, region, _| {
        let mut added = 0;
        for back in [
            Back::CpuRead,
            Back::ReadAhead,
            Back::GpuRead,
            Back::GpuWrite,
        ] {
            swap_out(region)?;
            match back {
                Back::CpuRead => oracle::check(region, SEED, added)?,
                Back::ReadAhead => {
                    region.advise(stage::Advice::WillNeed)?;
                    oracle::check(region, SEED, added)?;
                }
                Back::GpuRead => ensure_sum(gpu, region, 0, added)?,
                Back::GpuWrite => {}
            }
            // Only the GPU knows of this.
            Job::add(region, 1).waves(2).run(gpu)?;
            added += 1;
            swap_out(region)?;
            oracle::check(region, SEED, added).with_context(|| format!("{back:?}"))?;
            ensure_sum(gpu, region, 0, added).with_context(|| format!("{back:?}"))?;
        }
        Ok(())
    })
}

/// Taken from the CPU, they are written without a fault; a CPU that then only reads has no reason to think that
/// they were.
fn gpu_writes_to_pages_that_came_back_clean_and_were_taken_survive_swap() -> Result<()> {
    each_swap(&MIRRORED, |gpu, region, _| {
        swap_out(region)?;
        oracle::check(region, SEED, 0)?;
        gpu.make_exclusive(region.pages())?;
        let faults = gpu.stats()?.gpu_faults;
        Job::add(region, 1).waves(2).run(gpu)?;
        ensure!(gpu.stats()?.gpu_faults == faults, "it was not taken");
        oracle::check(region, SEED, 1)?;
        swap_out(region)?;
        exercise(gpu, region, 0, 1)
    })
}

fn gpu_writes_to_shared_memory_that_was_only_read_survive_swap() -> Result<()> {
    for on in EACH_SWAP {
        let _swap = Swap::on(on)?;
        let gpu = Gpu::open_first()?;
        // Who reads it first: for both it is zeros, writable and clean.
        for gpu_reads in [false, true] {
            let file = File::from(memfd_create("farfault-test", MemfdFlags::CLOEXEC)?);
            ftruncate(&file, HUGE_PAGE_SIZE as u64)?;
            let region = Region::map(HUGE_PAGE_SIZE, Backing::File(&file))?;
            if gpu_reads {
                ensure!(Job::sum(region).waves(2).run(&gpu)? == 0);
            } else {
                ensure_words(region, 0)?;
            }
            Job::fill(region, 7).waves(2).run(&gpu)?;
            swap_out_shared(&gpu, region)?;
            let context = || format!("swap on {on:?}, first read by the GPU: {gpu_reads}");
            ensure_words(region, 7).with_context(context)?;
            ensure!(
                Job::sum(region).waves(2).run(&gpu)? == 7 * region.words() as u64,
                "{}",
                context()
            );
            region.unmap()?;
        }
    }
    Ok(())
}

/// The same of shared memory: its page tables do not say what is swapped.
fn swap_out_shared(gpu: &Gpu, region: Region) -> Result<()> {
    eventually("shared memory is swapped", || {
        region.advise(stage::Advice::PageOut)?;
        drop_caches()?;
        Ok(count(gpu, region, Place::None)? == region.pages().count())
    })
}

fn gpu_writes_to_a_huge_page_of_a_file_survive_swap() -> Result<()> {
    for on in EACH_SWAP {
        let _swap = Swap::on(on)?;
        let mounted = Mounted::new("tmpfs", "huge=always,size=64M")?;
        let file = mounted.file(HUGE_PAGE_SIZE)?;
        let gpu = Gpu::open_first()?;
        let region = Region::map(HUGE_PAGE_SIZE, Backing::File(&file))?;
        oracle::write(region, SEED);
        Job::add(region, 0).waves(2).run(&gpu)?;
        ensure!(is_huge(&gpu, region)?, "the file is not in huge pages");
        let before = swapped_out()?;
        swap_out_shared(&gpu, region)?;
        let out = swapped_out()? - before;
        ensure!(out >= region.pages().count() as u64, "{out} pages swapped");
        exercise(&gpu, region, 0, 0).with_context(|| format!("swap on {on:?}"))?;
        swap_out_shared(&gpu, region)?;
        oracle::check(region, SEED, 2)?;
        region.unmap()?;
    }
    Ok(())
}

fn pages_in_vram_are_not_swapped_and_are_once_home() -> Result<()> {
    let starts = [Backing::Small, Backing::Huge].map(|backing| Start {
        backing,
        at: At::Vram,
    });
    each_swap(&starts, |gpu, region, _| {
        for _ in 0..3 {
            region.advise(stage::Advice::PageOut)?;
        }
        ensure!(swapped(region)? == 0);
        ensure_place(gpu, region, Place::Vram)?;
        ensure_sum(gpu, region, 0, 0)?;
        // By a CPU's touch.
        oracle::check(region, SEED, 0)?;
        swap_out(region)?;
        ensure_unmapped(gpu, region)?;
        exercise_all(gpu, region)?;
        // On request, with what the GPU wrote in VRAM.
        move_all(gpu, region, Place::Vram)?;
        Job::add(region, 1).waves(2).run(gpu)?;
        move_all(gpu, region, Place::Ram)?;
        swap_out(region)?;
        exercise(gpu, region, 0, 3)
    })
}

fn half_in_vram_and_half_swapped_keeps_the_data() -> Result<()> {
    let starts = [Backing::Small, Backing::Huge].map(|backing| Start {
        backing,
        at: At::Half,
    });
    each_swap(&starts, |gpu, region, _| {
        let half = region.length() / 2;
        let (in_vram, in_ram) = (region.part(0, half), region.part(half, half));
        swap_out(in_ram)?;
        region.advise(stage::Advice::PageOut)?;
        ensure!(swapped(in_vram)? == 0);
        ensure_place(gpu, in_vram, Place::Vram)?;
        ensure_agreement(gpu, region)?;
        Job::add(region, 1).waves(2).run(gpu)?;
        ensure_place(gpu, in_vram, Place::Vram)?;
        swap_out(in_ram)?;
        exercise(gpu, region, 0, 1)
    })
}

fn swapped_pages_asked_to_vram_keep_the_data() -> Result<()> {
    each_swap(&MIRRORED, |gpu, region, _| {
        swap_out(region)?;
        migrate(gpu, region, Place::Vram)?;
        ensure_agreement(gpu, region)?;
        ensure_sum(gpu, region, 0, 0)?;
        Job::add(region, 1).waves(2).run(gpu)?;
        // What was read back can move, and takes its content along, not that of the swap.
        move_all(gpu, region, Place::Vram)?;
        exercise(gpu, region, 0, 1)
    })
}

fn swapped_pages_that_the_gpu_touches_can_go_to_vram() -> Result<()> {
    each_swap(&MIRRORED, |gpu, region, _| {
        gpu.advise(region.pages(), Advice::Default)?;
        swap_out(region)?;
        // It reads them back to RAM first, where they may stay until they are asked for.
        Job::add(region, 1).waves(2).run(gpu)?;
        ensure!(swapped(region)? == 0);
        ensure_sum(gpu, region, 0, 1)?;
        move_all(gpu, region, Place::Vram)?;
        exercise(gpu, region, 0, 1)
    })
}

fn atomics_of_the_gpu_on_pages_that_were_swapped_count() -> Result<()> {
    each_swap(&MIRRORED, |gpu, region, _| {
        let words_of_a_page = farfault::PAGE_SIZE / 8;
        for round in 1..4u64 {
            for page in [0, 1, 511] {
                let part = region.part(page * farfault::PAGE_SIZE, farfault::PAGE_SIZE);
                Job::atomic_add(part.address(), 1, 10).run(gpu)?;
            }
            // A page that the GPU has for itself is nobody's to swap, until a CPU has touched it.
            region.advise(stage::Advice::PageOut)?;
            for page in [0, 1, 511] {
                let should = oracle::word(SEED, page * words_of_a_page).wrapping_add(10 * round);
                ensure!(
                    region.load(page * words_of_a_page) == should,
                    "page {page}, round {round}"
                );
            }
            swap_out(region)?;
        }
        for page in [0, 1, 511] {
            region.store(
                page * words_of_a_page,
                oracle::word(SEED, page * words_of_a_page),
            );
        }
        exercise_all(gpu, region)
    })
}

fn fork_of_swapped_pages_leaves_each_its_data() -> Result<()> {
    each_swap(&MIRRORED, |gpu, region, _| {
        swap_out(region)?;
        let child = fork(|| {
            code((|| {
                let gpu = Gpu::open_first()?;
                ensure_sum(&gpu, region, 0, 0)?;
                Job::add(region, 1).waves(2).run(&gpu)?;
                oracle::check(region, SEED, 1)?;
                swap_out(region)?;
                oracle::check(region, SEED, 1)
            })())
        })?;
        Job::add(region, 100).waves(2).run(gpu)?;
        ensure!(child.wait()? == Ended::Exited(0));
        swap_out(region)?;
        exercise(gpu, region, 0, 100)
    })
}

fn swapped_pages_discarded_moved_and_unmapped_are_so_for_the_gpu() -> Result<()> {
    each_swap(&MIRRORED, |gpu, region, _| {
        let quarter = region.length() / 4;
        let part = |number: usize| region.part(number * quarter, quarter);
        swap_out(region)?;
        part(0).discard()?;
        part(1).unmap()?;
        let moved = part(2).remap()?;
        exercise_empty(gpu, part(0))?;
        for gone in [part(1), part(2)] {
            Job::sum(gone).fails_at(gpu, gone.address(), Access::Read)?;
        }
        exercise(gpu, moved, 2 * quarter / 8, 0)?;
        exercise(gpu, part(3), 3 * quarter / 8, 0)?;
        moved.unmap()?;
        part(1).map_again()?;
        exercise_empty(gpu, part(1))
    })
}

fn swapoff_brings_mirrored_pages_back() -> Result<()> {
    each_swap(&MIRRORED, |gpu, region, swap| {
        let half = region.length() / 2;
        // Half of it is back already, and mapped by the GPU, which has written it since.
        swap_out(region)?;
        oracle::check(region.part(0, half), SEED, 0)?;
        Job::add(region.part(0, half), 1).waves(2).run(gpu)?;
        swap.off()?;
        ensure!(swapped(region)? == 0);
        ensure_place(gpu, region, Place::Ram)?;
        Job::add(region.part(half, half), 1).waves(2).run(gpu)?;
        exercise(gpu, region, 0, 1)
    })
}
