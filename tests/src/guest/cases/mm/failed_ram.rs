// SPDX-License-Identifier: MIT OR Apache-2.0
//! RAM that fails (`MADV_HWPOISON`) under pages that the GPU had: nobody gets the page any more, a job that touches it
//! fails there, and the memory around it is as before. VRAM that fails is the host's doing, and is tested there.

use super::start::{SEED, each_start, exercise, exercise_all, exercise_empty};
use crate::guest::{
    call::Job,
    child::{Bus, code, ensure_sigbus_for},
    oracle,
    place::migrate,
    tunables::huge_page_pool,
};
use anyhow::{Context, Result, ensure};
use farfault::arena::{Backing, Region};
use farfault::{
    Access, Advice, Gpu, HUGE_PAGE_SIZE, PAGE_SIZE, Place,
    process::{Ended, fork},
    stage,
};
use rustix::process::Signal;

group! { "mm::failed_ram", gpus 1, seconds 60:
    failed_page_fails_the_job_that_touches_it_and_no_other,
    failed_page_of_the_huge_page_pool_fails_the_job_that_touches_it_and_no_other,
}

/// The page is gone, here too. The kernel may kill who says so, which is a child that shares the page.
fn fail(page: Region) -> Result<()> {
    let child = fork(|| {
        let marked = page.advise(stage::Advice::HwPoison);
        code(marked.context("the kernel cannot mark memory as failed (CONFIG_MEMORY_FAILURE)"))
    })?;
    let ended = child.wait()?;
    let killed = Ended::Signaled(Signal::BUS.as_raw());
    ensure!(
        ended == killed || ended == Ended::Exited(0),
        "the child: {ended:?}"
    );
    Ok(())
}

fn ensure_failed(gpu: &Gpu, page: Region) -> Result<()> {
    let at = page.address();
    Job::sum(page).fails_at(gpu, at, Access::Read)?;
    Job::fill(page, 3).fails_at(gpu, at, Access::Write)?;
    Job::atomic_add(at, 1, 1).fails_at(gpu, at, Access::Atomic)?;
    ensure_sigbus_for(Bus::Failed, at, || page.store(0, 1))
}

fn failed_page_fails_the_job_that_touches_it_and_no_other() -> Result<()> {
    each_start(|gpu, region| {
        let offset = 300 * PAGE_SIZE;
        let page = region.part(offset, PAGE_SIZE);
        let before = region.part(0, offset);
        let behind = region.part(offset + PAGE_SIZE, region.length() - offset - PAGE_SIZE);
        let first = (offset + PAGE_SIZE) / 8;
        fail(page)?;
        ensure_failed(gpu, page)?;
        Job::sum(region).fails_at(gpu, page.address(), Access::Read)?;
        exercise(gpu, before, 0, 0)?;
        exercise(gpu, behind, first, 0)?;
        // Whatever places pages passes it by.
        for place in [Place::Vram, Place::Ram] {
            migrate(gpu, region, place)?;
        }
        gpu.advise(region.pages(), Advice::PreferGpu)?;
        exercise(gpu, before, 0, 2)?;
        exercise(gpu, behind, first, 2)?;
        ensure_failed(gpu, page)?;
        // New memory at its address is like any other.
        region.discard()?;
        exercise_empty(gpu, region)
    })
}

fn failed_page_of_the_huge_page_pool_fails_the_job_that_touches_it_and_no_other() -> Result<()> {
    let _pool = huge_page_pool(2)?;
    let gpu = Gpu::open_first()?;
    let region = Region::map(2 * HUGE_PAGE_SIZE, Backing::HugeTlb)?;
    oracle::write(region, SEED);
    Job::add(region, 0).waves(2).run(&gpu)?;
    let sound = region.part(0, HUGE_PAGE_SIZE);
    let page = region.part(HUGE_PAGE_SIZE + 300 * PAGE_SIZE, PAGE_SIZE);
    fail(page)?;
    ensure_failed(&gpu, page)?;
    // The pool's page is one.
    let other = region.part(HUGE_PAGE_SIZE, PAGE_SIZE);
    Job::sum(other).fails_at(&gpu, other.address(), Access::Read)?;
    exercise_all(&gpu, sound)?;
    drop(gpu);
    Ok(region.unmap()?)
}
