// SPDX-License-Identifier: MIT OR Apache-2.0
//! VRAM for the GPU's page tables: one address space does not take all of it. That there is some where VRAM is full,
//! see `eviction`.

use crate::guest::{call::Job, oracle, place::driver_count};
use anyhow::{Context, Result, ensure};
use farfault::arena::{Backing, Region};
use farfault::{Advice, Gpu, HUGE_PAGE_SIZE, PAGE_SIZE};

group! { "page_tables", on Small, seconds 120:
    tables_of_sparse_memory_stay_few_and_go_with_the_descriptor,
}

const SEED: u64 = 0x7ab1e;

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
