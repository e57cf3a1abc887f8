// SPDX-License-Identifier: MIT OR Apache-2.0
//! KSM: ksmd merges pages of equal content into one that is read-only, also such as the GPU has mapped.

use super::start::{At, SEED, STARTS, ensure_agreement, eventually};
use crate::guest::{call::Job, oracle, place::migrate, tunables::Tunables};
use anyhow::{Context, Result, ensure};
use farfault::arena::{Backing, Region};
use farfault::{Advice as GpuAdvice, Gpu, HUGE_PAGE_SIZE, PAGE_SIZE, Place, stage::Advice};
use std::fs;

group! { "mm::ksm", gpus 1, seconds 120:
    merged_mirrored_pages_are_read_right_and_a_gpu_write_unshares_one,
    pages_in_vram_are_not_merged_and_keep_their_data,
    merged_pages_asked_to_vram_keep_their_data_and_ksmd_goes_on,
    merged_pages_that_the_gpu_faults_on_keep_their_data,
    merged_pages_unmerged_keep_their_data,
}

const KSM: &str = "/sys/kernel/mm/ksm";
const PAGES: usize = 64;
const WORDS: usize = PAGE_SIZE / 8;

/// ksmd at work, until this is dropped.
struct Ksmd {
    _tunables: Tunables,
}

impl Ksmd {
    fn start() -> Result<Self> {
        let settings = [
            ("smart_scan", "0"),
            ("sleep_millisecs", "5"),
            ("pages_to_scan", "4096"),
            ("run", "1"),
        ];
        Ok(Self {
            _tunables: Tunables::set(KSM, &settings)?,
        })
    }

    fn scans() -> Result<u64> {
        Ok(fs::read_to_string(format!("{KSM}/full_scans"))?
            .trim()
            .parse()?)
    }

    /// Lets it look at everything some times.
    fn scan_all() -> Result<()> {
        let before = Self::scans()?;
        eventually("ksmd has looked at all pages", || {
            Ok(Self::scans()? >= before + 4)
        })
    }
}

impl Drop for Ksmd {
    fn drop(&mut self) {
        // All pages are parted again.
        let _ = fs::write(format!("{KSM}/run"), "2");
    }
}

/// Pages of this process that are merged.
fn merged() -> Result<usize> {
    let text = fs::read_to_string("/proc/self/ksm_merging_pages")?;
    Ok(text.trim().parse()?)
}

fn page(region: Region, number: usize) -> Region {
    region.part(number * PAGE_SIZE, PAGE_SIZE)
}

/// Every page gets the same words.
fn write_alike(region: Region) {
    for number in 0..region.pages().count() {
        oracle::write(page(region, number), SEED);
    }
}

/// GPU and CPU find these words in every page, with `added(page)`.
fn ensure_alike(gpu: &Gpu, region: Region, added: impl Fn(usize) -> u64) -> Result<()> {
    let pages = region.pages().count();
    let sums =
        (0..pages).map(|number| oracle::expected_sum(page(region, number), SEED, added(number)));
    let should = sums.fold(0, u64::wrapping_add);
    let sum = Job::sum(region).waves(2).run(gpu)?;
    ensure!(
        sum == should,
        "the GPU's sum is {sum:#x}, and should be {should:#x}"
    );
    for number in 0..pages {
        oracle::check(page(region, number), SEED, added(number))
            .with_context(|| format!("page {number}"))?;
    }
    Ok(())
}

/// A region whose pages are one, where the GPU had them all mapped for writes.
fn merged_region(gpu: &Gpu, backing: Backing<'_>, length: usize) -> Result<Region> {
    let region = Region::map(length, backing)?;
    write_alike(region);
    gpu.advise(region.pages(), GpuAdvice::MapOnly)?;
    Job::add(region, 0).waves(2).run(gpu)?;
    region.advise(Advice::Mergeable)?;
    // All but the one that the others are merged with.
    eventually("ksmd merges the pages", || {
        Ok(merged()? + 1 >= region.pages().count())
    })?;
    Ok(region)
}

fn merged_mirrored_pages_are_read_right_and_a_gpu_write_unshares_one() -> Result<()> {
    for (backing, length) in [
        (Backing::Small, PAGES * PAGE_SIZE),
        (Backing::Huge, HUGE_PAGE_SIZE),
    ] {
        let gpu = Gpu::open_first()?;
        let ksmd = Ksmd::start()?;
        let region = merged_region(&gpu, backing, length)?;
        drop(ksmd_stopped(ksmd)?);
        let writable = gpu.query(region.pages())?.iter().any(|page| page.gpu.write);
        ensure!(!writable, "{backing:?}: the GPU may write to merged pages");
        ensure_alike(&gpu, region, |_| 0)?;
        Job::add(page(region, 5), 1).run(&gpu)?;
        ensure_alike(&gpu, region, |number| u64::from(number == 5))?;
        ensure_agreement(&gpu, region)?;
        // A CPU's write parts another.
        page(region, 9).atomic_add(0, 1);
        page(region, 9).atomic_add(0, u64::MAX);
        Job::add(region, 1).waves(2).run(&gpu)?;
        ensure_alike(&gpu, region, |number| if number == 5 { 2 } else { 1 })?;
        region.unmap()?;
    }
    Ok(())
}

/// Stops ksmd without parting what is merged.
fn ksmd_stopped(ksmd: Ksmd) -> Result<Ksmd> {
    fs::write(format!("{KSM}/run"), "0")?;
    Ok(ksmd)
}

fn pages_in_vram_are_not_merged_and_keep_their_data() -> Result<()> {
    let _ksmd = Ksmd::start()?;
    for start in STARTS.iter().filter(|start| start.at == At::Vram) {
        let gpu = Gpu::open_first()?;
        let region = Region::map(HUGE_PAGE_SIZE, start.backing)?;
        write_alike(region);
        start.place(&gpu, region)?;
        region.advise(Advice::Mergeable)?;
        Ksmd::scan_all()?;
        crate::guest::place::ensure_place(&gpu, region, Place::Vram)?;
        Job::add(region, 1).waves(2).run(&gpu)?;
        ensure_alike(&gpu, region, |_| 1)?;
        region.unmap()?;
    }
    Ok(())
}

fn merged_pages_asked_to_vram_keep_their_data_and_ksmd_goes_on() -> Result<()> {
    let gpu = Gpu::open_first()?;
    let ksmd = Ksmd::start()?;
    let region = merged_region(&gpu, Backing::Small, PAGES * PAGE_SIZE)?;
    let ksmd = ksmd_stopped(ksmd)?;
    migrate(&gpu, region, Place::Vram)?;
    // ksmd compares new pages with those that it knows, wherever these are now.
    fs::write(format!("{KSM}/run"), "1")?;
    let other = Region::map(PAGES * PAGE_SIZE, Backing::Small)?;
    write_alike(other);
    other.advise(Advice::Mergeable)?;
    Ksmd::scan_all()?;
    ensure_alike(&gpu, other, |_| 0)?;
    ensure_alike(&gpu, region, |_| 0)?;
    Job::add(region, 1).waves(2).run(&gpu)?;
    Ksmd::scan_all()?;
    ensure_alike(&gpu, region, |_| 1)?;
    ensure_alike(&gpu, other, |_| 0)?;
    drop(ksmd);
    ensure_alike(&gpu, region, |_| 1)
}

fn merged_pages_that_the_gpu_faults_on_keep_their_data() -> Result<()> {
    let gpu = Gpu::open_first()?;
    let ksmd = Ksmd::start()?;
    let region = merged_region(&gpu, Backing::Small, PAGES * PAGE_SIZE)?;
    // Now a fault moves pages that can move.
    gpu.advise(region.pages(), GpuAdvice::Default)?;
    let sum = Job::sum(region).waves(2).run(&gpu)?;
    ensure!(sum == oracle::expected_sum(page(region, 0), SEED, 0).wrapping_mul(PAGES as u64));
    Ksmd::scan_all()?;
    Job::add(region.part(0, 8 * PAGE_SIZE), 1)
        .waves(2)
        .run(&gpu)?;
    Ksmd::scan_all()?;
    ensure_alike(&gpu, region, |number| u64::from(number < 8))?;
    drop(ksmd);
    ensure_alike(&gpu, region, |number| u64::from(number < 8))
}

fn merged_pages_unmerged_keep_their_data() -> Result<()> {
    let gpu = Gpu::open_first()?;
    let _ksmd = Ksmd::start()?;
    let region = merged_region(&gpu, Backing::Small, PAGES * PAGE_SIZE)?;
    ensure_alike(&gpu, region, |_| 0)?;
    region.advise(Advice::Unmergeable)?;
    eventually("ksmd has let go of the pages", || Ok(merged()? == 0))?;
    Job::fill(page(region, 1), 0).run(&gpu)?;
    ensure!(page(region, 1).load(WORDS - 1) == 0);
    oracle::write(page(region, 1), SEED);
    Job::add(region, 1).waves(2).run(&gpu)?;
    ensure_alike(&gpu, region, |_| 1)
}
