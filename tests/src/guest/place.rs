// SPDX-License-Identifier: MIT OR Apache-2.0
//! Where pages are: what tests ask for and expect.

use anyhow::{Context, Result, ensure};
use farfault::arena::Region;
use farfault::{Gpu, Moved, PAGE_SIZE, PageState, Place};
use std::fs;

/// The CPU's view of each page.
pub(crate) fn places(gpu: &Gpu, region: Region) -> Result<Vec<Place>> {
    let states = gpu.query(region.pages())?;
    Ok(states.iter().map(|state| state.cpu.place).collect())
}

/// All pages are in one place.
pub(crate) fn ensure_place(gpu: &Gpu, region: Region, place: Place) -> Result<()> {
    let places = places(gpu, region)?;
    let wrong = places.iter().position(|is| *is != place);
    ensure!(
        wrong.is_none(),
        "page {wrong:?} of {} at {:#x} is in {:?}, and should be in {place:?}",
        places.len(),
        region.address(),
        wrong.and_then(|page| places.get(page))
    );
    Ok(())
}

/// The CPU has all pages in huge ones.
pub(crate) fn ensure_huge(gpu: &Gpu, region: Region) -> Result<()> {
    let states = gpu.query(region.pages())?;
    let small = states.iter().position(|page| !page.cpu.huge);
    ensure!(
        small.is_none(),
        "page {small:?} of {} at {:#x} is a small one: {:?}",
        states.len(),
        region.address(),
        small.and_then(|page| states.get(page))
    );
    Ok(())
}

/// How many pages are in a place.
pub(crate) fn count(gpu: &Gpu, region: Region, place: Place) -> Result<usize> {
    Ok(places(gpu, region)?
        .iter()
        .filter(|is| **is == place)
        .count())
}

/// One page's state.
pub(crate) fn state(gpu: &Gpu, region: Region, page: usize) -> Result<PageState> {
    let states = gpu.query(region.part(page * PAGE_SIZE, PAGE_SIZE).pages())?;
    states.first().copied().context("QUERY gave no page")
}

/// Moves pages; the counts of the driver add up.
pub(crate) fn migrate(gpu: &Gpu, region: Region, to: Place) -> Result<Moved> {
    let moved = gpu.migrate(region.pages(), to)?;
    let pages = region.pages().count() as u64;
    ensure!(
        moved.moved + moved.there + moved.stayed == pages,
        "MIGRATE of {pages} pages to {to:?} counted {moved:?}"
    );
    Ok(moved)
}

/// Moves pages, all of which are then where they should be.
pub(crate) fn move_all(gpu: &Gpu, region: Region, to: Place) -> Result<Moved> {
    let moved = migrate(gpu, region, to)?;
    ensure!(moved.stayed == 0, "pages stayed: {moved:?}");
    ensure_place(gpu, region, to)?;
    Ok(moved)
}

/// `AnonPages` of the whole machine, in KiB: memory of processes, in RAM and in VRAM.
pub(crate) fn anonymous() -> Result<u64> {
    meminfo("AnonPages")
}

/// A line of `/proc/meminfo`, in KiB.
pub(crate) fn meminfo(name: &str) -> Result<u64> {
    let text = fs::read_to_string("/proc/meminfo")?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    let word = line.and_then(|line| line.split_whitespace().next());
    let word = word.with_context(|| format!("meminfo has no {name}"))?;
    Ok(word.parse()?)
}

/// What the driver's debugfs counts of a GPU, by its number.
pub(crate) fn driver_count(gpu: u32, name: &str) -> Result<u64> {
    let text = fs::read_to_string(format!("/sys/kernel/debug/farfault{gpu}/stats"))?;
    let value = text
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    let value = value.with_context(|| format!("no {name} in\n{text}"))?;
    Ok(value.parse()?)
}
