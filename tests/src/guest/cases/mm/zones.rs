// SPDX-License-Identifier: MIT OR Apache-2.0
//! `ZONE_MOVABLE`: the kernel lets only such pages in there that it can move again. A pin
//! for long takes pages out of there, also those that the GPU has or had; nothing in VRAM is ever pinned, and
//! no pin keeps the GPU from going.

use super::{
    frames::{count_movable, frames},
    numa::on_cpu,
    pins::{GupTest, io_uring},
    start::{SEED, STARTS, each_start, ensure_sum, eventually, exercise, exercise_all},
};
use crate::guest::{
    call::Job,
    oracle,
    place::{count, ensure_place, migrate, move_all},
};
use anyhow::{Context, Result, ensure};
use farfault::arena::Region;
use farfault::ring::PinnedBuffer;
use farfault::{Gpu, HUGE_PAGE_SIZE, PAGE_SIZE, Place};
use std::{fs, path::Path};

group! { "mm::zones", on Numa, seconds 120:
    longterm_pin_takes_pages_that_the_gpu_had_out_of_the_movable_zone,
    gup_test_longterm_pin_takes_pages_that_the_gpu_had_out_of_the_movable_zone,
    pins_do_not_keep_the_gpu_from_being_unbound,
}

/// Pins a region's pages for long, which takes them out of memory where they may not be then, and looks at
/// what that means for the GPU.
pub(super) fn pin_out_of(
    gpu: &Gpu,
    region: Region,
    inside: impl Fn(Region) -> Result<usize>,
) -> Result<()> {
    let before = frames(region)?;
    let pinned = PinnedBuffer::new(region)?;
    ensure_place(gpu, region, Place::Ram)?;
    ensure!(
        inside(region)? == 0,
        "pages are pinned where they may not be"
    );
    ensure!(frames(region)? != before);
    ensure_sum(gpu, region, 0, 0)?;
    let moved = migrate(gpu, region, Place::Vram)?;
    ensure!(
        moved.stayed as usize == region.pages().count() && count(gpu, region, Place::Vram)? == 0,
        "pinned pages went to VRAM: {moved:?}"
    );
    exercise_all(gpu, region)?;
    drop(pinned);
    eventually("the pages may move", || {
        Ok(migrate(gpu, region, Place::Vram)?.stayed == 0)
    })?;
    exercise(gpu, region, 0, 2)
}

/// As [`each_start`], with what is in RAM in the movable zone.
fn each_movable_start(check: impl Fn(&Gpu, Region) -> Result<()>) -> Result<()> {
    // The first node's movable memory has what the machine was booted with.
    on_cpu(1)?;
    each_start(|gpu, region| {
        let in_ram = count(gpu, region, Place::Ram)?;
        let movable = count_movable(region)?;
        // What is private memory is taken from there first.
        ensure!(movable == in_ram, "{movable} of {in_ram} pages are movable");
        check(gpu, region)
    })
}

fn longterm_pin_takes_pages_that_the_gpu_had_out_of_the_movable_zone() -> Result<()> {
    if !io_uring() {
        return Ok(());
    }
    each_movable_start(|gpu, region| pin_out_of(gpu, region, count_movable))
}

fn gup_test_longterm_pin_takes_pages_that_the_gpu_had_out_of_the_movable_zone() -> Result<()> {
    let Some(gup) = GupTest::open()? else {
        return Ok(());
    };
    each_movable_start(|gpu, region| {
        gup.pin_longterm(region)?;
        ensure_place(gpu, region, Place::Ram)?;
        ensure!(count_movable(region)? == 0);
        exercise_all(gpu, region)?;
        gup.release()?;
        move_all(gpu, region, Place::Vram)?;
        exercise(gpu, region, 0, 2)
    })
}

/// The GPU without its driver, until this is dropped.
struct Unbound {
    gpu: String,
}

const DRIVER: &str = "/sys/bus/virtio/drivers/farfault";

impl Unbound {
    fn new() -> Result<Self> {
        let entries = fs::read_dir(DRIVER)?.filter_map(Result::ok);
        let mut names = entries.filter_map(|entry| entry.file_name().into_string().ok());
        let gpu = names
            .find(|name| name.starts_with("virtio"))
            .context("no GPU is bound")?;
        fs::write(Path::new(DRIVER).join("unbind"), &gpu)?;
        Ok(Self { gpu })
    }
}

impl Drop for Unbound {
    fn drop(&mut self) {
        let _ = fs::write(Path::new(DRIVER).join("bind"), &self.gpu);
    }
}

fn pins_do_not_keep_the_gpu_from_being_unbound() -> Result<()> {
    if !io_uring() {
        return Ok(());
    }
    for start in STARTS {
        let gpu = Gpu::open_first()?;
        let region = start.region(&gpu, HUGE_PAGE_SIZE)?;
        let other = start.region(&gpu, HUGE_PAGE_SIZE)?;
        // Pages that it had, and that it has mapped; and one that a pipe holds.
        let pinned = PinnedBuffer::new(region)?;
        Job::add(region, 1).waves(2).run(&gpu)?;
        let (_read, write) = rustix::pipe::pipe()?;
        let part = other.part(0, PAGE_SIZE);
        ensure!(part.splice_to(&write)? == PAGE_SIZE);
        let unbound = Unbound::new()?;
        ensure!(gpu.ping().is_err(), "{start:?}: the GPU answers");
        oracle::check(region, SEED, 1)?;
        oracle::check(other, SEED, 0)?;
        drop(unbound);
        drop(gpu);
        let gpu = Gpu::open_first()?;
        exercise(&gpu, region, 0, 1).with_context(|| format!("{start:?}"))?;
        exercise_all(&gpu, other).with_context(|| format!("{start:?}"))?;
        drop(pinned);
        region.unmap()?;
        other.unmap()?;
    }
    Ok(())
}
