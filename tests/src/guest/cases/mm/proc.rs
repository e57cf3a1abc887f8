// SPDX-License-Identifier: MIT OR Apache-2.0
//! What `/proc` says of pages in VRAM. `docs/device-memory.md` has it for people; both change together.

use super::start::{At, SEED, STARTS, Start, ensure_agreement, exercise_all};
use crate::guest::{
    call::Job,
    oracle,
    place::{ensure_place, move_all},
};
use anyhow::{Context, Result, ensure};
use farfault::arena::{Backing, Region};
use farfault::{Advice, Gpu, HUGE_PAGE_SIZE, PAGE_SIZE, Place, pagemap};
use std::fs;

group! { "mm::proc", gpus 1, seconds 60:
    pagemap_has_pages_in_vram_as_swapped_with_a_type_of_devices,
    smaps_counts_pages_in_vram_as_resident_and_not_as_swap,
    status_counts_pages_in_vram_as_resident,
    clear_refs_of_referenced_pages_keeps_all_data,
    soft_dirty_of_mirrored_pages_shows_what_the_gpu_wrote,
    soft_dirty_of_small_pages_in_vram_misses_the_gpu,
    soft_dirty_of_huge_pages_in_vram_is_never_cleared,
}

const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
const FILE: u64 = 1 << 61;
const EXCLUSIVE: u64 = 1 << 56;
const SOFT_DIRTY: u64 = 1 << 55;

fn bits(region: Region) -> Result<Vec<u64>> {
    let entries = pagemap::read(region.pages())?;
    Ok(entries.into_iter().map(pagemap::Entry::bits).collect())
}

/// Counts of the mapping that a region is, in KiB.
pub(super) fn smaps(region: Region, name: &str) -> Result<u64> {
    let text = fs::read_to_string("/proc/self/smaps")?;
    let head = format!("{:08x}-", region.address());
    let lines = text.lines().skip_while(|line| !line.starts_with(&head));
    count(lines.skip(1), name)
}

fn count<'a>(mut lines: impl Iterator<Item = &'a str>, name: &str) -> Result<u64> {
    let rest = lines.find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    let word = rest.and_then(|rest| rest.split_whitespace().next());
    Ok(word.context(name.to_owned())?.parse()?)
}

fn in_vram() -> impl Iterator<Item = Start> {
    STARTS.into_iter().filter(|start| start.at == At::Vram)
}

fn pagemap_has_pages_in_vram_as_swapped_with_a_type_of_devices() -> Result<()> {
    for start in in_vram() {
        let gpu = Gpu::open_first()?;
        let region = start.region(&gpu, HUGE_PAGE_SIZE)?;
        let entries = pagemap::read(region.pages())?;
        for (number, entry) in entries.iter().enumerate() {
            let kind = entry.bits() & (PRESENT | SWAPPED | FILE | EXCLUSIVE);
            ensure!(
                kind == SWAPPED,
                "{start:?}, page {number}: {:#x}",
                entry.bits()
            );
            ensure!(
                entry.place() == Some(Place::Vram),
                "{start:?}, page {number}"
            );
        }
        // Frame numbers count as in RAM, up by one from page to page of a huge page.
        let frames: Option<Vec<u64>> = entries.iter().map(|entry| entry.frame()).collect();
        let frames = frames.context("a page without a frame")?;
        if matches!(start.backing, Backing::Huge) {
            ensure!(frames.windows(2).all(|pair| pair[1] == pair[0] + 1));
        }
        // Home again.
        exercise_all(&gpu, region)?;
        let home = bits(region)?.into_iter();
        let there = |bits: u64| bits & (PRESENT | SWAPPED) == PRESENT;
        ensure!(home.clone().all(there), "{start:?}");
        region.unmap()?;
    }
    Ok(())
}

const IN_SMAPS: [&str; 6] = ["Rss", "Pss", "Anonymous", "Swap", "SwapPss", "Locked"];

fn smaps_counts_pages_in_vram_as_resident_and_not_as_swap() -> Result<()> {
    for start in in_vram() {
        let gpu = Gpu::open_first()?;
        let region = Region::map(HUGE_PAGE_SIZE, start.backing)?;
        oracle::write(region, SEED);
        let read = || IN_SMAPS.map(|name| smaps(region, name).ok());
        let before = read();
        let all = Some(HUGE_PAGE_SIZE as u64 >> 10);
        ensure!(
            before == [all, all, all, Some(0), Some(0), Some(0)],
            "{before:?}"
        );
        move_all(&gpu, region, Place::Vram)?;
        let after = read();
        ensure!(
            after == before,
            "{start:?}: {after:?} in VRAM, {before:?} in RAM"
        );
        let huge = smaps(region, "AnonHugePages")?;
        let should = if matches!(start.backing, Backing::Huge) {
            HUGE_PAGE_SIZE >> 10
        } else {
            0
        };
        ensure!(huge == should as u64, "{start:?}: AnonHugePages {huge}");
        region.unmap()?;
    }
    Ok(())
}

fn status_counts_pages_in_vram_as_resident() -> Result<()> {
    let gpu = Gpu::open_first()?;
    let status = |name| count(fs::read_to_string("/proc/self/status")?.lines(), name);
    let region = Region::map(4 * HUGE_PAGE_SIZE, Backing::Small)?;
    oracle::write(region, SEED);
    let (rss, swap) = (status("RssAnon")?, status("VmSwap")?);
    move_all(&gpu, region, Place::Vram)?;
    let moved = (status("RssAnon")?, status("VmSwap")?);
    // The counts of a process are kept by CPU, and are not exact.
    ensure!(
        moved.0.abs_diff(rss) <= 1024 && moved.1 == swap,
        "{moved:?}, and was {rss}, {swap}"
    );
    region.unmap()?;
    let unmapped = status("RssAnon")?;
    ensure!(unmapped + 6144 <= rss, "{unmapped} is left of {rss}");
    Ok(())
}

fn clear_refs(what: &str) -> Result<()> {
    Ok(fs::write("/proc/self/clear_refs", what)?)
}

fn clear_refs_of_referenced_pages_keeps_all_data() -> Result<()> {
    super::start::each_start(|gpu, region| {
        // All, anonymous, of files.
        for what in ["1", "2", "3"] {
            clear_refs(what)?;
            ensure_agreement(gpu, region)?;
        }
        exercise_all(gpu, region)
    })
}

/// Which pages are soft-dirty; the mapping itself is no longer new.
fn soft_dirty(region: Region) -> Result<Vec<usize>> {
    let bits = bits(region)?;
    let dirty = bits
        .iter()
        .enumerate()
        .filter(|(_, bits)| **bits & SOFT_DIRTY != 0);
    Ok(dirty.map(|(page, _)| page).collect())
}

fn page(region: Region, number: usize) -> Region {
    region.part(number * PAGE_SIZE, PAGE_SIZE)
}

/// Whether this kernel has soft-dirty bits; the debug kernel of the tests has none (`docs/kernel-findings.md`, 12).
fn has_soft_dirty() -> Result<bool> {
    let region = Region::map(PAGE_SIZE, Backing::Small)?;
    region.store(0, 1);
    let has = bits(region)?[0] & SOFT_DIRTY != 0;
    if !has {
        crate::guest::skip("the kernel has no soft-dirty bits");
    }
    region.unmap()?;
    Ok(has)
}

fn soft_dirty_of_mirrored_pages_shows_what_the_gpu_wrote() -> Result<()> {
    if !has_soft_dirty()? {
        return Ok(());
    }
    let gpu = Gpu::open_first()?;
    let region = Region::map(16 * PAGE_SIZE, Backing::Small)?;
    oracle::write(region, SEED);
    gpu.advise(region.pages(), Advice::MapOnly)?;
    Job::add(region, 0).run(&gpu)?;
    clear_refs("4")?;
    ensure!(soft_dirty(region)?.is_empty());
    Job::sum(region).run(&gpu)?;
    ensure!(soft_dirty(region)?.is_empty(), "a read counts as a write");
    Job::add(page(region, 3), 1).run(&gpu)?;
    page(region, 7).store(0, 1);
    let dirty = soft_dirty(region)?;
    ensure!(
        dirty == [3, 7],
        "GPU and CPU wrote pages 3 and 7, and {dirty:?} are soft-dirty"
    );
    Ok(())
}

fn soft_dirty_of_small_pages_in_vram_misses_the_gpu() -> Result<()> {
    if !has_soft_dirty()? {
        return Ok(());
    }
    let gpu = Gpu::open_first()?;
    let region = Region::map(16 * PAGE_SIZE, Backing::Small)?;
    oracle::write(region, SEED);
    move_all(&gpu, region, Place::Vram)?;
    clear_refs("4")?;
    ensure!(soft_dirty(region)?.is_empty());
    Job::add(page(region, 3), 1).run(&gpu)?;
    ensure_place(&gpu, region, Place::Vram)?;
    let there = soft_dirty(region)?;
    move_all(&gpu, region, Place::Ram)?;
    let home = soft_dirty(region)?;
    ensure!(there.is_empty(), "in VRAM {there:?}");
    ensure!(home.is_empty(), "at home {home:?}");
    // Though it was written.
    oracle::check_part(page(region, 3), SEED, 3 * PAGE_SIZE / 8, 1)?;
    // It came home writable, so a CPU's write does not fault, and does not show either.
    page(region, 5).store(0, 1);
    let dirty = soft_dirty(region)?;
    ensure!(dirty.is_empty(), "after a CPU's write {dirty:?}");
    Ok(())
}

fn soft_dirty_of_huge_pages_in_vram_is_never_cleared() -> Result<()> {
    if !has_soft_dirty()? {
        return Ok(());
    }
    let gpu = Gpu::open_first()?;
    let region = Region::map(HUGE_PAGE_SIZE, Backing::Huge)?;
    oracle::write(region, SEED);
    move_all(&gpu, region, Place::Vram)?;
    clear_refs("4")?;
    let pages = region.pages().count();
    let dirty = soft_dirty(region)?;
    ensure!(dirty.len() == pages, "{} of {pages} pages", dirty.len());
    exercise_all(&gpu, region)
}
