// SPDX-License-Identifier: MIT OR Apache-2.0
//! `mprotect`: what the CPU may not do any more, the GPU may not either, and only the job that does it
//! ends.

use super::{
    start::{At, STARTS, each_start, ensure_sum, exercise, exercise_all},
    userfault::{MISSING, Userfault, WRITE_PROTECT},
};
use crate::guest::{
    call::{self, JOB_TIME, Job, ensure_status},
    place::state,
    tunables::huge_page_pool,
};
use anyhow::{Context, Result, ensure};
use farfault::arena::{Backing, Protection, Region};
use farfault::{Access, Gpu, HUGE_PAGE_SIZE, PAGE_SIZE, Place, uapi::JobStatus};
use rustix::{
    fs::{MemfdFlags, memfd_create},
    io::Errno,
};
use std::{fs::File, time::Duration};

group! { "mm::mprotect", gpus 1, seconds 60:
    read_only_fails_gpu_writes_and_back_allows_them,
    none_fails_gpu_reads_and_back_keeps_the_data,
    part_of_the_pages_made_read_only_leaves_the_rest,
    gpu_write_on_read_only_memory_fails_alone_with_its_address,
    read_only_memory_of_every_kind_fails_gpu_writes,
    inaccessible_memory_of_every_kind_fails_gpu_reads,
    none_during_a_job_that_reads_ends_it,
    read_only_during_a_job_that_writes_ends_it,
    memory_that_begins_read_only_is_written_after_it_may_be,
}

const QUARTER: usize = HUGE_PAGE_SIZE / 4;

fn read_only_fails_gpu_writes_and_back_allows_them() -> Result<()> {
    each_start(|gpu, region| {
        region.protect(Protection::Read)?;
        let writable = gpu.query(region.pages())?.iter().any(|page| page.gpu.write);
        ensure!(!writable, "the GPU may still write");
        Job::add(region, 1).fails_at(gpu, region.address(), Access::Write)?;
        ensure_sum(gpu, region, 0, 0)?;
        Job::fill(region, 1).fails_at(gpu, region.address(), Access::Write)?;
        Job::atomic_add(region.address(), 1, 1).fails_at(gpu, region.address(), Access::Atomic)?;
        region.protect(Protection::ReadWrite)?;
        exercise_all(gpu, region)
    })
}

fn none_fails_gpu_reads_and_back_keeps_the_data() -> Result<()> {
    each_start(|gpu, region| {
        region.protect(Protection::None)?;
        let states = gpu.query(region.pages())?;
        let mapped = states.iter().any(|page| page.gpu.place != Place::None);
        ensure!(!mapped, "the GPU still has pages");
        Job::sum(region).fails_at(gpu, region.address(), Access::Read)?;
        Job::fill(region, 1).fails_at(gpu, region.address(), Access::Write)?;
        region.protect(Protection::Read)?;
        ensure_sum(gpu, region, 0, 0)?;
        Job::add(region, 1).fails_at(gpu, region.address(), Access::Write)?;
        region.protect(Protection::ReadWrite)?;
        exercise_all(gpu, region)
    })
}

fn part_of_the_pages_made_read_only_leaves_the_rest() -> Result<()> {
    each_start(|gpu, region| {
        let part = region.part(QUARTER, 2 * QUARTER);
        part.protect(Protection::Read)?;
        ensure_sum(gpu, region, 0, 0)?;
        Job::add(part, 1).fails_at(gpu, part.address(), Access::Write)?;
        exercise(gpu, region.part(0, QUARTER), 0, 0)?;
        exercise(gpu, region.part(3 * QUARTER, QUARTER), 3 * QUARTER / 8, 0)?;
        part.protect(Protection::ReadWrite)?;
        exercise(gpu, part, QUARTER / 8, 0)
    })
}

fn gpu_write_on_read_only_memory_fails_alone_with_its_address() -> Result<()> {
    each_start(|gpu, region| {
        let other = Region::map(16 * PAGE_SIZE, Backing::Small)?;
        let goes_on = Job::endless(other).submit(gpu)?;
        let page = region.part(77 * PAGE_SIZE, PAGE_SIZE);
        page.protect(Protection::Read)?;
        // It starts before the page, and writes up to there.
        let job = Job::fill(region.part(70 * PAGE_SIZE, 20 * PAGE_SIZE), 3);
        job.fails_at(gpu, page.address(), Access::Write)?;
        let is_running = call::wait(gpu, goes_on, Duration::ZERO);
        ensure!(is_running.is_err_and(|error| error == Errno::TIMEDOUT));
        call::kill(gpu, goes_on)?;
        let end = call::wait(gpu, goes_on, JOB_TIME)?;
        ensure_status(&end, JobStatus::Killed)?;
        super::start::ensure_words(region.part(70 * PAGE_SIZE, 7 * PAGE_SIZE), 3)?;
        ensure_sum(gpu, page, 77 * PAGE_SIZE / 8, 0)?;
        Ok(other.unmap()?)
    })
}

/// `take_away` while a job of this region runs; the job ends with a fault in it.
fn job_ends_with(
    job: impl Fn(Region) -> Job,
    access: &[Access],
    take_away: impl Fn(Region) -> Result<()>,
) -> Result<()> {
    for start in STARTS.iter().filter(|start| start.at != At::Half) {
        let gpu = Gpu::open_first()?;
        let region = start.region(&gpu, HUGE_PAGE_SIZE)?;
        let fence = job(region).submit(&gpu)?;
        let early = call::wait(&gpu, fence, Duration::from_millis(20));
        ensure!(early.is_err_and(|error| error == Errno::TIMEDOUT));
        take_away(region)?;
        let end = call::wait(&gpu, fence, JOB_TIME).with_context(|| format!("{start:?}"))?;
        ensure_status(&end, JobStatus::Fault)?;
        let range = region.pages().range();
        ensure!(range.contains(&(end.fault_address as usize)), "{end:x?}");
        ensure!(access.iter().any(|a| a.raw() == end.access), "{end:x?}");
        region.unmap()?;
    }
    Ok(())
}

fn none_during_a_job_that_reads_ends_it() -> Result<()> {
    job_ends_with(Job::endless, &[Access::Read], |region| {
        Ok(region.protect(Protection::None)?)
    })
}

fn read_only_during_a_job_that_writes_ends_it() -> Result<()> {
    let writer = |region: Region| Job::atomic_add(region.address(), 1, u64::MAX);
    job_ends_with(writer, &[Access::Atomic], |region| {
        region.protect(Protection::Read)?;
        // From here on the page is as it is.
        let before = region.load(0);
        std::thread::sleep(Duration::from_millis(20));
        ensure!(region.load(0) == before, "the GPU still writes");
        Ok(())
    })
}

fn memory_that_begins_read_only_is_written_after_it_may_be() -> Result<()> {
    let gpu = Gpu::open_first()?;
    let region = Region::map(HUGE_PAGE_SIZE, Backing::Huge)?;
    region.protect(Protection::Read)?;
    // Nothing is there yet: what the GPU reads are zeros.
    ensure!(Job::sum(region).waves(2).run(&gpu)? == 0);
    Job::fill(region, 1).fails_at(&gpu, region.address(), Access::Write)?;
    region.protect(Protection::ReadWrite)?;
    Job::fill(region, 1).waves(2).run(&gpu)?;
    ensure!(state(&gpu, region, 0)?.gpu.write);
    super::start::ensure_words(region, 1)
}

/// Memory of other kinds is faulted in by other ways, each of which has to know its rights. Each kind, watched by a
/// userfaultfd or not, written or not, loses its rights; `check` sees its first page then, and has them given back.
fn each_kind(
    protection: Protection,
    check: impl Fn(&Gpu, Region, &dyn Fn() -> Result<()>) -> Result<()>,
) -> Result<()> {
    let gpu = Gpu::open_first()?;
    let file = File::from(memfd_create("protected", MemfdFlags::CLOEXEC)?);
    file.set_len(HUGE_PAGE_SIZE as u64)?;
    let _pool = huge_page_pool(2)?;
    let kinds = [
        Backing::HugeTlb,
        Backing::Shared,
        Backing::File(&file),
        Backing::FilePrivate(&file),
        Backing::Small,
    ];
    for kind in kinds {
        for watched in [None, Some(MISSING), Some(WRITE_PROTECT)] {
            for written in [true, false] {
                if !written && watched == Some(MISSING) {
                    // It would wait for the handler.
                    continue;
                }
                let region = Region::map(HUGE_PAGE_SIZE, kind)?;
                if written {
                    region.store(0, 7);
                }
                let userfault = Userfault::new()?;
                if let Some(mode) = watched {
                    userfault.register(region, mode)?;
                }
                region.protect(protection)?;
                let give_back = || Ok(region.protect(Protection::ReadWrite)?);
                check(&gpu, region.part(0, PAGE_SIZE), &give_back)
                    .with_context(|| format!("{kind:?}, watched {watched:?}, written {written}"))?;
                region.unmap()?;
                file.set_len(0)?;
                file.set_len(HUGE_PAGE_SIZE as u64)?;
            }
        }
    }
    Ok(())
}

fn read_only_memory_of_every_kind_fails_gpu_writes() -> Result<()> {
    each_kind(Protection::Read, |gpu, page, give_back| {
        Job::fill(page, 1).fails_at(gpu, page.address(), Access::Write)?;
        Job::atomic_add(page.address(), 1, 1).fails_at(gpu, page.address(), Access::Atomic)?;
        let word = Job::sum(page).run(gpu)?;
        ensure!(word == page.load(0));
        give_back()?;
        Job::add(page, 1).run(gpu)?;
        ensure!(page.load(0) == word.wrapping_add(1));
        Ok(())
    })
}

fn inaccessible_memory_of_every_kind_fails_gpu_reads() -> Result<()> {
    each_kind(Protection::None, |gpu, page, give_back| {
        Job::sum(page).fails_at(gpu, page.address(), Access::Read)?;
        Job::fill(page, 1).fails_at(gpu, page.address(), Access::Write)?;
        Job::atomic_add(page.address(), 1, 1).fails_at(gpu, page.address(), Access::Atomic)?;
        give_back()?;
        let word = page.load(0);
        ensure!(word == 7 || word == 0, "a refused job has written {word}");
        Job::add(page, 1).run(gpu)?;
        ensure!(page.load(0) == word + 1);
        Ok(())
    })
}
