// SPDX-License-Identifier: MIT OR Apache-2.0
//! Memory that does not move: files, shared memory, the pool of huge pages. The GPU works on it where
//! it is.

use super::exclusive::ensure_shared_atomics;
use crate::guest::{
    call::Job,
    oracle,
    place::{count, ensure_place, migrate, move_all},
    tunables::huge_page_pool,
};
use anyhow::{Context, Result, ensure};
use farfault::arena::{Backing, Protection, Region};
use farfault::{Access, Gpu, HUGE_PAGE_SIZE, Kernel, PAGE_SIZE, Pages, Place};
use rustix::fs::{MemfdFlags, memfd_create};
use std::{
    fs::{self, File},
    os::unix::fs::FileExt,
};

group! { "mappings", on Small, seconds 60:
    shared_anonymous_memory_is_used_where_it_is,
    shared_file_written_by_the_gpu_has_it_in_the_file,
    private_file_written_by_the_gpu_leaves_the_file_alone,
    private_file_moves_what_was_written_and_nothing_else,
    memory_that_stays_is_not_mapped_by_a_request,
    read_only_private_file_is_read_where_it_is,
    one_file_mapped_twice_has_one_content,
    huge_page_of_the_pool_is_used_where_it_is,
    code_of_the_kernels_is_read_where_it_is_and_its_data_is_refused,
}

const SEED: u64 = 0x3a99;
const LENGTH: usize = 1 << 20;

/// A file of a seed's words.
fn file() -> Result<File> {
    let file = File::from(memfd_create("farfault-test", MemfdFlags::CLOEXEC)?);
    let words = (0..LENGTH / 8).flat_map(|index| oracle::word(SEED, index).to_le_bytes());
    file.write_all_at(&words.collect::<Vec<_>>(), 0)?;
    Ok(file)
}

/// `read` of the file gives a seed's words with `added` to each.
fn ensure_file(file: &File, added: u64) -> Result<()> {
    let mut bytes = vec![0; LENGTH];
    file.read_exact_at(&mut bytes, 0)?;
    for (index, bytes) in bytes.chunks_exact(8).enumerate() {
        let should = oracle::word(SEED, index).wrapping_add(added);
        ensure!(*bytes == should.to_le_bytes(), "word {index} of the file");
    }
    Ok(())
}

/// The GPU reads what the CPU wrote, writes, reads that, and nothing ever moves to VRAM.
fn ensure_used_in_place(gpu: &Gpu, region: Region, seed: u64) -> Result<()> {
    for round in 0..3 {
        let sum = Job::sum(region).waves(4).run(gpu)?;
        ensure!(
            sum == oracle::expected_sum(region, seed, round),
            "round {round}"
        );
        Job::add(region, 1).waves(4).run(gpu)?;
        let moved = migrate(gpu, region, Place::Vram)?;
        ensure!(moved.moved == 0 && moved.there == 0, "{moved:?}");
        ensure!(count(gpu, region, Place::Vram)? == 0);
    }
    oracle::check(region, seed, 3)?;
    ensure!(gpu.stats()?.pages_to_vram == 0);
    Ok(())
}

fn shared_anonymous_memory_is_used_where_it_is() -> Result<()> {
    let gpu = Gpu::open_first()?;
    let region = Region::map(LENGTH, Backing::Shared)?;
    oracle::write(region, SEED);
    ensure_used_in_place(&gpu, region, SEED)
}

fn shared_file_written_by_the_gpu_has_it_in_the_file() -> Result<()> {
    let gpu = Gpu::open_first()?;
    let file = file()?;
    let region = Region::map(LENGTH, Backing::File(&file))?;
    ensure_used_in_place(&gpu, region, SEED)?;
    ensure_file(&file, 3)?;
    // And what is written to the file, the GPU sees.
    file.write_all_at(&[0; LENGTH], 0)?;
    ensure!(Job::sum(region).waves(4).run(&gpu)? == 0);
    Ok(())
}

fn private_file_written_by_the_gpu_leaves_the_file_alone() -> Result<()> {
    let gpu = Gpu::open_first()?;
    let file = file()?;
    let region = Region::map(LENGTH, Backing::FilePrivate(&file))?;
    for round in 0..3 {
        let sum = Job::sum(region).waves(4).run(&gpu)?;
        ensure!(
            sum == oracle::expected_sum(region, SEED, round),
            "round {round}"
        );
        Job::add(region, 1).waves(4).run(&gpu)?;
        // Pages of its own, copied on write, may move; the data is the same.
        migrate(&gpu, region, Place::Vram)?;
    }
    oracle::check(region, SEED, 3)?;
    ensure_file(&file, 0)
}

fn private_file_moves_what_was_written_and_nothing_else() -> Result<()> {
    let gpu = Gpu::open_first()?;
    let file = file()?;
    let region = Region::map(LENGTH, Backing::FilePrivate(&file))?;
    let half = LENGTH / 2;
    let pages = (half / PAGE_SIZE) as u64;
    let sum = oracle::expected_sum(region, SEED, 0);
    ensure!(Job::sum(region).waves(4).run(&gpu)? == sum);
    ensure!(count(&gpu, region, Place::Vram)? == 0, "pages of the file");
    oracle::write(region.part(0, half), SEED);
    let moved = migrate(&gpu, region, Place::Vram)?;
    ensure!((moved.moved, moved.stayed) == (pages, pages), "{moved:?}");
    ensure_place(&gpu, region.part(0, half), Place::Vram)?;
    ensure!(Job::sum(region).waves(4).run(&gpu)? == sum);
    oracle::write(region, SEED);
    let moved = move_all(&gpu, region, Place::Vram)?;
    // The CPU's stores have brought the first half home.
    ensure!(moved.moved == 2 * pages, "{moved:?}");
    Job::add(region, 1).waves(4).run(&gpu)?;
    oracle::check(region, SEED, 1)?;
    ensure_file(&file, 0)
}

/// What a request does not move, it leaves as it is.
fn memory_that_stays_is_not_mapped_by_a_request() -> Result<()> {
    let gpu = Gpu::open_first()?;
    let file = file()?;
    for backing in [
        Backing::Shared,
        Backing::File(&file),
        Backing::FilePrivate(&file),
    ] {
        let region = Region::map(LENGTH, backing)?;
        // A load of each page, which leaves those of a private file the file's.
        ensure!(
            (0..region.words())
                .step_by(PAGE_SIZE / 8)
                .all(|word| region.load(word) != 1)
        );
        let moved = migrate(&gpu, region, Place::Vram)?;
        ensure!(moved.stayed as usize == region.pages().count(), "{moved:?}");
        let states = gpu.query(region.pages())?;
        let mapped = states.iter().position(|page| page.gpu.place != Place::None);
        ensure!(mapped.is_none(), "{backing:?}: page {mapped:?} is mapped");
    }
    ensure!(gpu.stats()?.pages_mapped == 0);
    Ok(())
}

fn read_only_private_file_is_read_where_it_is() -> Result<()> {
    let gpu = Gpu::open_first()?;
    let file = file()?;
    let region = Region::map(LENGTH, Backing::FilePrivate(&file))?;
    region.protect(Protection::Read)?;
    let sum = Job::sum(region).waves(4).run(&gpu)?;
    ensure!(sum == oracle::expected_sum(region, SEED, 0));
    let moved = migrate(&gpu, region, Place::Vram)?;
    ensure!(moved.moved == 0, "{moved:?}");
    Job::fill(region, 0).fails_at(&gpu, region.address(), farfault::Access::Write)?;
    oracle::check(region, SEED, 0)
}

fn one_file_mapped_twice_has_one_content() -> Result<()> {
    let gpu = Gpu::open_first()?;
    let file = file()?;
    let one = Region::map(LENGTH, Backing::File(&file))?;
    let other = Region::map(LENGTH, Backing::File(&file))?;
    Job::add(one, 4).waves(4).run(&gpu)?;
    let sum = Job::sum(other).waves(4).run(&gpu)?;
    ensure!(sum == oracle::expected_sum(other, SEED, 4));
    Job::add(other, 4).waves(4).run(&gpu)?;
    oracle::check(one, SEED, 8)
}

fn huge_page_of_the_pool_is_used_where_it_is() -> Result<()> {
    let _pool = huge_page_pool(2)?;
    let gpu = Gpu::open_first()?;
    let region = Region::map(2 * HUGE_PAGE_SIZE, Backing::HugeTlb)?;
    oracle::write(region, SEED);
    ensure_used_in_place(&gpu, region, SEED)?;
    ensure_shared_atomics(&gpu, region)?;
    drop(gpu);
    Ok(region.unmap()?)
}

/// A mapping of this process, by the name that the kernel gives it.
fn mapping(name: &str) -> Result<Pages> {
    let maps = fs::read_to_string("/proc/self/maps")?;
    let line = maps.lines().find(|line| line.ends_with(name));
    let range = line.and_then(|line| line.split_whitespace().next());
    let (start, end) = range
        .and_then(|range| range.split_once('-'))
        .with_context(|| format!("no mapping has the name {name}"))?;
    let address = |text| usize::from_str_radix(text, 16);
    Pages::new(address(start)?..address(end)?).context("a mapping of whole pages")
}

/// `[vdso]` (`VM_DONTEXPAND`) has pages, `[vvar]` (`VM_PFNMAP`) only frames of which mm does not know.
fn code_of_the_kernels_is_read_where_it_is_and_its_data_is_refused() -> Result<()> {
    let gpu = Gpu::open_first()?;
    for (name, has_pages) in [("[vdso]", true), ("[vvar]", false)] {
        let pages = mapping(name)?;
        let (address, length) = (pages.address() as u64, pages.length());
        for place in [Place::Vram, Place::Ram] {
            let moved = gpu.migrate(pages, place)?;
            let (of_ram, of_vram) = (moved.there, moved.stayed);
            let kept = if place == Place::Ram { of_ram } else { of_vram };
            ensure!(
                moved.moved == 0 && kept == pages.count() as u64,
                "{name} to {place:?}: {moved:?}"
            );
        }
        let job = Job::new(Kernel::Sum, [address, length as u64, 0, 0]);
        if has_pages {
            let mut bytes = vec![0; length];
            File::open("/proc/self/mem")?.read_exact_at(&mut bytes, address)?;
            let mut sum = 0_u64;
            for word in bytes.chunks_exact(8) {
                sum = sum.wrapping_add(u64::from_le_bytes(word.try_into()?));
            }
            ensure!(job.run(&gpu)? == sum, "{name}: the GPU's sum");
        } else {
            job.fails_at(&gpu, address, Access::Read)?;
        }
    }
    Ok(())
}
