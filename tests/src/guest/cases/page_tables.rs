// SPDX-License-Identifier: MIT OR Apache-2.0
//! VRAM for the GPU's page tables: one address space does not take all of it, and many find some where there is none.

use crate::guest::{
    VRAM,
    call::Job,
    oracle,
    place::{driver_count, migrate},
};
use anyhow::{Context, Result, ensure};
use farfault::arena::{Backing, Region};
use farfault::{Advice, Gpu, HUGE_PAGE_SIZE, Kernel, PAGE_SIZE, Place};

group! { "page_tables", on Small, seconds 120:
    tables_of_sparse_memory_stay_few_and_go_with_the_descriptor,
    contexts_whose_tables_are_many_get_them_in_a_full_vram,
}

const SEED: u64 = 0x7ab1e;
/// What VRAM is managed in: tables have such a block for themselves, and take another one when it is full.
const PAGES: u64 = (HUGE_PAGE_SIZE / PAGE_SIZE) as u64;

/// Pages of VRAM in use that hold no data.
fn tables() -> Result<u64> {
    let count = |name| driver_count(0, name);
    Ok(count("vram_pages_used")? - count("vram_pages_in_folios")?)
}

/// Memory of which the first page of each 2 MiB is used: each of them takes a table.
fn sparse(blocks: usize) -> Result<Region> {
    Ok(Region::map(blocks * HUGE_PAGE_SIZE, Backing::Small)?)
}

fn first_page(region: Region, block: usize) -> Region {
    region.part(block * HUGE_PAGE_SIZE, PAGE_SIZE)
}

fn tables_of_sparse_memory_stay_few_and_go_with_the_descriptor() -> Result<()> {
    const BLOCKS: usize = 200;
    let before = tables()?;
    let gpu = Gpu::open_first()?;
    let region = sparse(BLOCKS)?;
    gpu.advise(region.pages(), Advice::MapOnly)?;
    let mut most = 0;
    for block in 0..BLOCKS {
        let page = first_page(region, block);
        oracle::write(page, SEED);
        Job::add(page, 1).run(&gpu)?;
        most = most.max(tables()? - before);
    }
    ensure!(most > 32, "{most} tables: it did not take one each");
    ensure!(most < BLOCKS as u64 / 2, "{most} tables for {BLOCKS} pages");
    for block in 0..BLOCKS {
        oracle::check(first_page(region, block), SEED, 1).with_context(|| format!("{block}"))?;
    }
    region.unmap()?;
    drop(gpu);
    let after = tables()?;
    ensure!(after == before, "{before} tables before, {after} after");
    Ok(())
}

fn contexts_whose_tables_are_many_get_them_in_a_full_vram() -> Result<()> {
    const CONTEXTS: usize = 12;
    // As many as one may have at a time; all of them take more than the 2 MiB where the first tables are.
    const BLOCKS: usize = 58;
    let owner = Gpu::open_first()?;
    let full = Region::map(VRAM as usize, Backing::Small)?;
    oracle::write(full, SEED);
    migrate(&owner, full, Place::Vram)?;
    let data = driver_count(0, "vram_pages_in_folios")?;
    ensure!(
        data + PAGES == driver_count(0, "vram_pages")?,
        "VRAM is not full: {data} pages of data"
    );
    let evicted = owner.stats()?.pages_evicted;
    // A way from page to page, and the last word of it.
    let region = sparse(BLOCKS)?;
    for block in 1..BLOCKS {
        first_page(region, block - 1).store(0, first_page(region, block).address());
    }
    let last = oracle::word(SEED, 0);
    first_page(region, BLOCKS - 1).store(0, last);
    let way = Job::new(
        Kernel::PointerChase,
        [region.address(), BLOCKS as u64, 0, 0],
    );
    let mut gpus = Vec::new();
    for context in 0..CONTEXTS {
        let gpu = Gpu::open_first()?;
        gpu.advise(region.pages(), Advice::MapOnly)?;
        let found = way
            .run(&gpu)
            .with_context(|| format!("context {context}"))?;
        ensure!(found == last, "context {context} came to {found:#x}");
        gpus.push(gpu);
    }
    let tables = tables()?;
    ensure!(tables > PAGES, "{tables} tables find room in 2 MiB");
    ensure!(owner.stats()?.pages_evicted > evicted, "nothing made room");
    oracle::check(full, SEED, 0)
}
