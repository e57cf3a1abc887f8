// SPDX-License-Identifier: MIT OR Apache-2.0
//! Pins: somebody in the kernel holds pages and needs them where they are. Pages in VRAM come home for
//! that. Pinned pages stay, a migration reports each of them, and the GPU maps them where they are.

use super::start::{SEED, STARTS, each_start, ensure_sum, exercise, exercise_all};
use crate::guest::{
    call::Job,
    child::code,
    oracle,
    place::{count, ensure_place, migrate, move_all},
};
use anyhow::{Context, Result, ensure};
use farfault::arena::{Backing, Region, call_at};
use farfault::ring::PinnedBuffer;
use farfault::{
    Gpu, HUGE_PAGE_SIZE, PAGE_SIZE, Place,
    process::{Ended, fork},
};
use rustix::{
    fs::{MemfdFlags, ftruncate, memfd_create},
    pipe::{fcntl_setpipe_size, pipe},
};
use std::{
    fs::{File, OpenOptions},
    io::Read,
    os::unix::fs::FileExt,
};

group! { "mm::pins", gpus 1, seconds 60:
    pages_in_vram_come_home_to_be_pinned_by_io_uring,
    pinned_pages_stay_and_migration_reports_each,
    gpu_and_io_uring_share_pinned_pages,
    pinned_pages_are_the_parents_after_fork,
    pages_unpinned_move_again,
    pages_in_a_pipe_stay_and_show_what_the_gpu_writes,
    gup_test_pins_pages_in_vram_at_home,
    gup_test_longterm_pins_stay_and_show_what_the_gpu_writes,
}

/// Whether the kernel has io_uring; if not, the case is skipped.
pub(super) fn io_uring() -> bool {
    let supported = PinnedBuffer::is_supported();
    if !supported {
        crate::guest::skip("the kernel has no io_uring");
    }
    supported
}

fn file(length: usize) -> Result<File> {
    let file = File::from(memfd_create("farfault-test", MemfdFlags::CLOEXEC)?);
    ftruncate(&file, length as u64)?;
    Ok(file)
}

fn pages_in_vram_come_home_to_be_pinned_by_io_uring() -> Result<()> {
    if !io_uring() {
        return Ok(());
    }
    each_start(|gpu, region| {
        let _pinned = PinnedBuffer::new(region)?;
        ensure_place(gpu, region, Place::Ram)?;
        exercise_all(gpu, region)?;
        // The GPU has used them, and they stay.
        ensure_place(gpu, region, Place::Ram)
    })
}

fn pinned_pages_stay_and_migration_reports_each() -> Result<()> {
    if !io_uring() {
        return Ok(());
    }
    for backing in [Backing::Small, Backing::Huge] {
        let gpu = Gpu::open_first()?;
        let region = Region::map(HUGE_PAGE_SIZE, backing)?;
        oracle::write(region, SEED);
        let part = region.part(100 * PAGE_SIZE, 10 * PAGE_SIZE);
        let pinned = PinnedBuffer::new(part)?;
        let moved = migrate(&gpu, region, Place::Vram)?;
        let in_vram = count(&gpu, region, Place::Vram)?;
        match backing {
            // The huge page is one, for the kernel too: as long as part of it is pinned, all of it is.
            Backing::Huge => ensure!(moved.stayed == 512 && in_vram == 0, "{moved:?}"),
            _ => {
                ensure!(moved.stayed == 10 && moved.moved == 502, "{moved:?}");
                ensure_place(&gpu, part, Place::Ram)?;
                ensure!(in_vram == 502);
            }
        }
        exercise_all(&gpu, region).with_context(|| format!("{backing:?}"))?;
        ensure_place(&gpu, part, Place::Ram)?;
        drop(pinned);
        region.unmap()?;
    }
    Ok(())
}

fn gpu_and_io_uring_share_pinned_pages() -> Result<()> {
    if !io_uring() {
        return Ok(());
    }
    each_start(|gpu, region| {
        let file = file(region.length())?;
        let mut pinned = PinnedBuffer::new(region)?;
        for round in 0..3u64 {
            Job::add(region, 1).waves(2).run(gpu)?;
            migrate(gpu, region, Place::Vram)?;
            ensure!(pinned.write_to(&file)? == region.length());
            let mut bytes = vec![0; region.length()];
            file.read_exact_at(&mut bytes, 0)?;
            for (index, word) in bytes.chunks_exact(8).enumerate() {
                let should = oracle::word(SEED, index).wrapping_add(round + 1);
                ensure!(
                    word == should.to_le_bytes(),
                    "word {index} in round {round}"
                );
            }
            Job::fill(region, 3).waves(2).run(gpu)?;
            ensure!(pinned.read_from(&file)? == region.length());
            ensure_sum(gpu, region, 0, round + 1)?;
            oracle::check(region, SEED, round + 1)?;
        }
        Ok(())
    })
}

fn pinned_pages_are_the_parents_after_fork() -> Result<()> {
    if !io_uring() {
        return Ok(());
    }
    each_start(|gpu, region| {
        let file = file(region.length())?;
        let mut pinned = PinnedBuffer::new(region)?;
        Job::add(region, 1).waves(2).run(gpu)?;
        let (from_parent, to_child) = pipe()?;
        let child = fork(|| {
            code((|| {
                File::from(from_parent).read_exact(&mut [0])?;
                oracle::check(region, SEED, 1)
            })())
        })?;
        Job::add(region, 1).waves(2).run(gpu)?;
        pinned.write_to(&file)?;
        rustix::io::write(&to_child, &[1])?;
        ensure!(child.wait()? == Ended::Exited(0));
        let mut word = [0; 8];
        file.read_exact_at(&mut word, 0)?;
        let should = oracle::word(SEED, 0).wrapping_add(2);
        ensure!(
            word == should.to_le_bytes(),
            "the ring has other pages than the process"
        );
        exercise(gpu, region, 0, 2)
    })
}

fn pages_unpinned_move_again() -> Result<()> {
    if !io_uring() {
        return Ok(());
    }
    each_start(|gpu, region| {
        drop(PinnedBuffer::new(region)?);
        // The kernel lets go of a ring a moment after its descriptor is closed.
        super::start::eventually("the pages may move", || {
            Ok(migrate(gpu, region, Place::Vram)?.stayed == 0)
        })?;
        exercise_all(gpu, region)
    })
}

fn pages_in_a_pipe_stay_and_show_what_the_gpu_writes() -> Result<()> {
    for start in STARTS {
        let gpu = Gpu::open_first()?;
        let region = start.region(&gpu, HUGE_PAGE_SIZE)?;
        // Over the border between the halves.
        let part = region.part(250 * PAGE_SIZE, 12 * PAGE_SIZE);
        let (read, write) = pipe()?;
        fcntl_setpipe_size(&write, 16 * PAGE_SIZE)?;
        ensure!(part.splice_to(&write)? == part.length(), "{start:?}");
        ensure_place(&gpu, part, Place::Ram)?;
        let moved = migrate(&gpu, part, Place::Vram)?;
        ensure!(moved.stayed == 12, "{start:?}: {moved:?}");
        Job::add(part, 1).run(&gpu)?;
        let mut bytes = vec![0; part.length()];
        File::from(read).read_exact(&mut bytes)?;
        for (index, word) in bytes.chunks_exact(8).enumerate() {
            let should = oracle::word(SEED, 250 * PAGE_SIZE / 8 + index).wrapping_add(1);
            ensure!(
                word == should.to_le_bytes(),
                "{start:?}: word {index} in the pipe"
            );
        }
        drop(write);
        move_all(&gpu, part, Place::Vram).with_context(|| format!("{start:?}"))?;
        exercise(&gpu, part, 250 * PAGE_SIZE / 8, 1)?;
        region.unmap()?;
    }
    Ok(())
}

/// The kernel's own module for tests of pins, by the calls of `mm/gup_test.h`.
pub(super) struct GupTest {
    file: File,
    argument: Region,
}

impl GupTest {
    /// Nothing, and the reason printed, where the kernel does not have it.
    pub(super) fn open() -> Result<Option<Self>> {
        let path = "/sys/kernel/debug/gup_test";
        let Ok(file) = OpenOptions::new().read(true).write(true).open(path) else {
            crate::guest::skip("the kernel has no gup_test (CONFIG_GUP_TEST)");
            return Ok(None);
        };
        let argument = Region::map(PAGE_SIZE, Backing::Small)?;
        Ok(Some(Self { file, argument }))
    }

    fn call(&self, direction: u32, number: u32, size: u32, words: &[u64]) -> Result<()> {
        for index in 0..16 {
            self.argument
                .store(index, words.get(index).copied().unwrap_or(0));
        }
        let number = direction << 30 | size << 16 | u32::from(b'g') << 8 | number;
        Ok(call_at(&self.file, number, self.argument.address())?)
    }

    /// `FOLL_PIN` or `FOLL_GET` of all pages, and back at once.
    fn hold(&self, region: Region, pin: bool) -> Result<()> {
        const WRITE: u64 = 1;
        let (length, pages) = (region.length() as u64, region.pages().count() as u64);
        // Two counts of time, address, bytes; pages for each call and flags in one word.
        let words = [0, 0, region.address(), length, pages | WRITE << 32];
        self.call(3, if pin { 5 } else { 4 }, 80, &words)
    }

    /// `FOLL_LONGTERM`, until [`GupTest::release`].
    pub(super) fn pin_longterm(&self, region: Region) -> Result<()> {
        const WRITE: u64 = 1;
        let words = [region.address(), region.length() as u64, WRITE];
        self.call(1, 7, 24, &words)
    }

    pub(super) fn release(&self) -> Result<()> {
        self.call(0, 8, 0, &[])
    }

    /// What is in the pinned pages.
    fn read(&self, into: Region) -> Result<()> {
        self.call(1, 9, 8, &[into.address()])
    }
}

fn gup_test_pins_pages_in_vram_at_home() -> Result<()> {
    let Some(gup) = GupTest::open()? else {
        return Ok(());
    };
    each_start(|gpu, region| {
        for pin in [true, false] {
            move_all(gpu, region, Place::Vram)?;
            gup.hold(region, pin)?;
            ensure_place(gpu, region, Place::Ram)?;
        }
        exercise_all(gpu, region)
    })
}

fn gup_test_longterm_pins_stay_and_show_what_the_gpu_writes() -> Result<()> {
    let Some(gup) = GupTest::open()? else {
        return Ok(());
    };
    let copy = Region::map(HUGE_PAGE_SIZE, Backing::Small)?;
    each_start(|gpu, region| {
        gup.pin_longterm(region)?;
        ensure_place(gpu, region, Place::Ram)?;
        let moved = migrate(gpu, region, Place::Vram)?;
        ensure!(moved.stayed == 512, "{moved:?}");
        Job::add(region, 1).waves(2).run(gpu)?;
        gup.read(copy)?;
        oracle::check(copy, SEED, 1)?;
        gup.release()?;
        move_all(gpu, region, Place::Vram)?;
        exercise(gpu, region, 0, 1)
    })
}
