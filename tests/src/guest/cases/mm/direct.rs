// SPDX-License-Identifier: MIT OR Apache-2.0
//! O_DIRECT, by `read` and `write` and by buffers that an `io_uring` has pinned: the disk gets and gives
//! pages of the process past the page cache. Pages in VRAM come home for it.

use super::{
    pins::io_uring,
    start::{SEED, each_start, ensure_sum, exercise, exercise_all, while_adding},
    storage::Ext4,
    writeback::{ensure_file, seeded, words},
};
use crate::guest::{
    call::Job,
    oracle,
    place::{ensure_place, migrate, move_all},
};
use anyhow::{Result, ensure};
use farfault::{Gpu, HUGE_PAGE_SIZE, Place, arena::Region, ring::PinnedBuffer};

group! { "mm::direct", on Disk, seconds 120:
    o_direct_write_has_what_the_gpu_wrote,
    o_direct_read_is_seen_by_the_gpu,
    o_direct_write_while_the_gpu_writes_has_old_or_new_words,
    fixed_buffers_with_o_direct_write_what_the_gpu_wrote,
    fixed_buffers_with_o_direct_read_what_the_gpu_sees,
}

/// With the ext4 mounted.
fn each(case: impl Fn(&Gpu, Region, &Ext4) -> Result<()>) -> Result<()> {
    let ext4 = Ext4::mount()?;
    each_start(|gpu, region| case(gpu, region, &ext4))
}

fn o_direct_write_has_what_the_gpu_wrote() -> Result<()> {
    each(|gpu, region, ext4| {
        seeded(ext4, region.length())?;
        let direct = ext4.open_direct()?;
        for added in 1..=2 {
            Job::add(region, 1).waves(2).run(gpu)?;
            ensure!(region.write_to(&direct, 0)? == region.length());
            ensure_place(gpu, region, Place::Ram)?;
            ensure_file(&ext4.open()?, region.length(), added)?;
            move_all(gpu, region, Place::Vram)?;
        }
        exercise(gpu, region, 0, 2)
    })
}

fn o_direct_read_is_seen_by_the_gpu() -> Result<()> {
    each(|gpu, region, ext4| {
        seeded(ext4, region.length())?;
        let direct = ext4.open_direct()?;
        for _ in 0..2 {
            Job::fill(region, 3).waves(2).run(gpu)?;
            ensure!(region.read_from(&direct, 0)? == region.length());
            ensure_sum(gpu, region, 0, 0)?;
            oracle::check(region, SEED, 0)?;
            move_all(gpu, region, Place::Vram)?;
        }
        // Into a part of it, over the border between the halves.
        let quarter = region.length() / 4;
        let middle = region.part(quarter, 2 * quarter);
        Job::fill(middle, 4).waves(2).run(gpu)?;
        ensure!(middle.read_from(&direct, quarter as u64)? == middle.length());
        exercise_all(gpu, region)
    })
}

fn o_direct_write_while_the_gpu_writes_has_old_or_new_words() -> Result<()> {
    each(|gpu, region, ext4| {
        let file = seeded(ext4, region.length())?;
        let direct = ext4.open_direct()?;
        for added in 0..3u64 {
            while_adding(gpu, region, || {
                ensure!(region.write_to(&direct, 0)? == region.length());
                migrate(gpu, region, Place::Vram)
            })?;
            let words = words(&file, region.length())?;
            for (index, word) in words.into_iter().enumerate() {
                let times = word.wrapping_sub(oracle::word(SEED, index));
                ensure!(
                    times == added || times == added + 1,
                    "word {index} is that of no time: {word:#x}"
                );
            }
        }
        exercise(gpu, region, 0, 3)
    })
}

fn fixed_buffers_with_o_direct_write_what_the_gpu_wrote() -> Result<()> {
    if !io_uring() {
        return Ok(());
    }
    each(|gpu, region, ext4| {
        seeded(ext4, region.length())?;
        let direct = ext4.open_direct()?;
        let mut pinned = PinnedBuffer::new(region)?;
        ensure_place(gpu, region, Place::Ram)?;
        for added in 1..=3 {
            Job::add(region, 1).waves(2).run(gpu)?;
            // They stay where the disk looks for them.
            let moved = migrate(gpu, region, Place::Vram)?;
            ensure!(moved.stayed as usize == HUGE_PAGE_SIZE / farfault::PAGE_SIZE);
            ensure!(pinned.write_to(&direct)? == region.length());
            ensure_file(&ext4.open()?, region.length(), added)?;
        }
        exercise(gpu, region, 0, 3)
    })
}

fn fixed_buffers_with_o_direct_read_what_the_gpu_sees() -> Result<()> {
    if !io_uring() {
        return Ok(());
    }
    each(|gpu, region, ext4| {
        seeded(ext4, region.length())?;
        let direct = ext4.open_direct()?;
        let mut pinned = PinnedBuffer::new(region)?;
        for _ in 0..3 {
            Job::fill(region, 8).waves(2).run(gpu)?;
            ensure!(pinned.read_from(&direct)? == region.length());
            ensure_sum(gpu, region, 0, 0)?;
            oracle::check(region, SEED, 0)?;
        }
        exercise_all(gpu, region)
    })
}
