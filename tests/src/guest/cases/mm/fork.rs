// SPDX-License-Identifier: MIT OR Apache-2.0
//! Copy-on-write between parent and child, with pages in VRAM or mapped by the GPU. In what order they
//! end, and what jobs do meanwhile, is in [`super::fork_order`].

use crate::guest::{
    call::Job,
    child::{Gate, code},
    oracle,
    place::move_all,
};
use anyhow::{Result, ensure};
use farfault::arena::{Backing, Region};
use farfault::{
    Advice, Gpu, HUGE_PAGE_SIZE, Place,
    process::{Ended, fork},
};

group! { "mm::fork", on Small, seconds 60:
    child_reads_and_writes_its_copy_of_pages_in_vram,
    gpu_write_after_fork_does_not_reach_the_child,
    cpu_write_after_fork_is_seen_by_the_gpu,
    child_with_a_gpu_of_its_own_has_its_own_data,
    grandchildren_of_shared_pages_keep_their_data,
    child_that_moves_shared_memory_shares_it_with_the_parent,
}

const SEED: u64 = 0xf0c4;

/// Where pages are, and of which size, when the process forks; in RAM, the GPU has them mapped.
const STARTS: [(Backing<'static>, Place); 4] = [
    (Backing::Small, Place::Vram),
    (Backing::Huge, Place::Vram),
    (Backing::Small, Place::Ram),
    (Backing::Huge, Place::Ram),
];

/// A seed's words, which the GPU has written to last, so that it may write to them.
fn used_by_the_gpu(gpu: &Gpu, backing: Backing<'_>, place: Place) -> Result<Region> {
    let region = Region::map(HUGE_PAGE_SIZE, backing)?;
    oracle::write(region, SEED);
    if place == Place::Ram {
        gpu.advise(region.pages(), Advice::MapOnly)?;
    }
    move_all(gpu, region, place)?;
    Job::add(region, 0).waves(2).run(gpu)?;
    Ok(region)
}

fn child_reads_and_writes_its_copy_of_pages_in_vram() -> Result<()> {
    let gpu = Gpu::open_first()?;
    for (backing, place) in STARTS {
        let region = used_by_the_gpu(&gpu, backing, place)?;
        let child = fork(|| {
            code((|| {
                oracle::check(region, SEED, 0)?;
                oracle::write(region, SEED + 1);
                oracle::check(region, SEED + 1, 0)
            })())
        })?;
        ensure!(
            child.wait()? == Ended::Exited(0),
            "{backing:?} in {place:?}"
        );
        let sum = Job::sum(region).waves(2).run(&gpu)?;
        ensure!(
            sum == oracle::expected_sum(region, SEED, 0),
            "{backing:?} in {place:?}"
        );
        oracle::check(region, SEED, 0)?;
    }
    Ok(())
}

/// The child lives while `in_parent` runs, and checks that its own data is as it was.
fn child_keeps_data_while(in_parent: fn(&Gpu, Region) -> Result<()>) -> Result<()> {
    let gpu = Gpu::open_first()?;
    for (backing, place) in STARTS {
        let region = used_by_the_gpu(&gpu, backing, place)?;
        let gate = Gate::new()?;
        let child = fork(|| {
            code((|| {
                gate.wait()?;
                oracle::check(region, SEED, 0)
            })())
        })?;
        let result = in_parent(&gpu, region);
        gate.open()?;
        ensure!(
            child.wait()? == Ended::Exited(0),
            "{backing:?} in {place:?}"
        );
        result.map_err(|error| error.context(format!("{backing:?} in {place:?}")))?;
    }
    Ok(())
}

fn gpu_write_after_fork_does_not_reach_the_child() -> Result<()> {
    child_keeps_data_while(|gpu, region| {
        Job::add(region, 9).waves(2).run(gpu)?;
        oracle::check(region, SEED, 9)
    })
}

fn cpu_write_after_fork_is_seen_by_the_gpu() -> Result<()> {
    child_keeps_data_while(|gpu, region| {
        // The GPU reads the page that is shared, then the CPU writes and gets another.
        let sum = Job::sum(region).waves(2).run(gpu)?;
        ensure!(sum == oracle::expected_sum(region, SEED, 0));
        oracle::write(region, SEED + 2);
        let sum = Job::sum(region).waves(2).run(gpu)?;
        ensure!(sum == oracle::expected_sum(region, SEED + 2, 0));
        Ok(())
    })
}

fn child_with_a_gpu_of_its_own_has_its_own_data() -> Result<()> {
    let gpu = Gpu::open_first()?;
    for (backing, place) in STARTS {
        let region = used_by_the_gpu(&gpu, backing, place)?;
        let child = fork(|| {
            code((|| {
                let gpu = Gpu::open_first()?;
                let sum = Job::sum(region).waves(2).run(&gpu)?;
                ensure!(sum == oracle::expected_sum(region, SEED, 0));
                Job::add(region, 1).waves(2).run(&gpu)?;
                oracle::check(region, SEED, 1)
            })())
        })?;
        Job::add(region, 100).waves(2).run(&gpu)?;
        ensure!(
            child.wait()? == Ended::Exited(0),
            "{backing:?} in {place:?}"
        );
        oracle::check(region, SEED, 100)?;
    }
    Ok(())
}

fn grandchildren_of_shared_pages_keep_their_data() -> Result<()> {
    let gpu = Gpu::open_first()?;
    let region = used_by_the_gpu(&gpu, Backing::Huge, Place::Vram)?;
    let child = fork(|| {
        code((|| {
            // Its own child still has the pages that are shared when it ends.
            let grandchild = fork(|| code(oracle::check(region, SEED, 0)))?;
            oracle::write(region, SEED + 3);
            ensure!(grandchild.wait()? == Ended::Exited(0));
            let gpu = Gpu::open_first()?;
            Job::add(region, 1).waves(2).run(&gpu)?;
            oracle::check(region, SEED + 3, 1)
        })())
    })?;
    ensure!(child.wait()? == Ended::Exited(0));
    Job::add(region, 2).waves(2).run(&gpu)?;
    oracle::check(region, SEED, 2)
}

fn child_that_moves_shared_memory_shares_it_with_the_parent() -> Result<()> {
    let gpu = Gpu::open_first()?;
    let region = Region::map(HUGE_PAGE_SIZE, Backing::Shared)?;
    oracle::write(region, SEED);
    Job::add(region, 1).run(&gpu)?;
    let child = fork(|| {
        code((|| {
            let gpu = Gpu::open_first()?;
            gpu.migrate(region.pages(), Place::Vram)?;
            Job::add(region, 1).run(&gpu).map(drop)
        })())
    })?;
    ensure!(child.wait()? == Ended::Exited(0));
    let sum = Job::sum(region).run(&gpu)?;
    ensure!(sum == oracle::expected_sum(region, SEED, 2));
    oracle::check(region, SEED, 2)
}
