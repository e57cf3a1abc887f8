// SPDX-License-Identifier: MIT OR Apache-2.0
//! Jobs on memory that they may not use: the job fails, alone, and says where and why.

use crate::guest::{
    call::{self, Job},
    oracle,
};
use anyhow::{Result, ensure};
use farfault::arena::{Backing, Protection, Region};
use farfault::{Access, Advice, Gpu, Kernel, PAGE_SIZE, uapi::JobStatus};
use rustix::io::Errno;
use std::time::Duration;

group! { "bad_memory", on Small, seconds 60:
    unmapped_address_fails_with_address_and_access,
    copy_with_one_bad_end_fails_there,
    address_beyond_user_space_fails_with_address_and_access,
    job_into_a_hole_fails_at_its_first_page,
    read_only_memory_can_be_read_and_fails_the_writer,
    inaccessible_memory_fails_the_reader,
    failing_job_leaves_others_alone,
    failing_job_leaves_others_alone_that_fault_next_to_it,
    loads_beside_a_store_that_is_refused_go_on,
    chase_into_nowhere_fails_there,
    chase_beyond_user_space_fails_there,
    words_up_to_the_end_of_user_space_are_submitted_and_none_beyond,
    copy_of_neighbours_is_right_and_of_overlapping_words_refused,
}

const PAGE: u64 = PAGE_SIZE as u64;
/// Behind the last page that a process can have.
const USER_END: u64 = (1 << 47) - PAGE;

/// Jobs that do all kinds of access to a region's first page, and the access.
fn jobs_on(region: Region) -> [(Job, Access); 5] {
    let address = region.address();
    [
        (Job::sum(region), Access::Read),
        (Job::fill(region, 1), Access::Write),
        (Job::atomic_add(address, 1, 1), Access::Atomic),
        (
            Job::new(Kernel::CompareAndSwap, [address, 0, 1, 0]),
            Access::Atomic,
        ),
        (
            Job::new(Kernel::PointerChase, [address, 1, 0, 0]),
            Access::Read,
        ),
    ]
}

fn unmapped_address_fails_with_address_and_access() -> Result<()> {
    let gpu = Gpu::open_first()?;
    let nowhere = Region::nowhere(PAGE_SIZE)?;
    let jobs = jobs_on(nowhere);
    for (job, access) in jobs {
        job.fails_at(&gpu, nowhere.address(), access)?;
    }
    let stats = gpu.stats()?;
    let failed = jobs.len() as u64;
    ensure!(
        stats.gpu_faults_failed >= failed && stats.jobs == failed,
        "{stats:?}"
    );
    // The next one is not harmed.
    let region = Region::map(PAGE_SIZE, Backing::Small)?;
    Job::add(region, 3).run(&gpu)?;
    ensure!(region.load(0) == 3);
    Ok(())
}

fn copy_with_one_bad_end_fails_there() -> Result<()> {
    let gpu = Gpu::open_first()?;
    let (good, bad) = (
        Region::map(PAGE_SIZE, Backing::Small)?,
        Region::nowhere(PAGE_SIZE)?,
    );
    let copy =
        |to: Region, from: Region| Job::new(Kernel::Copy, [to.address(), from.address(), PAGE, 0]);
    copy(good, bad).fails_at(&gpu, bad.address(), Access::Read)?;
    copy(bad, good).fails_at(&gpu, bad.address(), Access::Write)
}

fn address_beyond_user_space_fails_with_address_and_access() -> Result<()> {
    let gpu = Gpu::open_first()?;
    // The null page; the first address that is not the user's; one of the kernel's; one with more
    // bits than page tables have.
    for address in [0, 1 << 47, (1 << 48) - PAGE, 0xffff_8880_0000_0000, 1 << 63] {
        let sum = Job::new(Kernel::Sum, [address, PAGE, 0, 0]);
        match sum.submit(&gpu) {
            // A driver may know at once that this can't work.
            Err(Errno::INVAL) => {}
            Err(errno) => anyhow::bail!("SUBMIT on {address:#x}: {errno:?}"),
            Ok(fence) => {
                let end = call::wait(&gpu, fence, call::JOB_TIME)?;
                call::ensure_status(&end, JobStatus::Fault)?;
                let read = Access::Read.raw();
                ensure!(
                    end.fault_address == address && end.access == read,
                    "{end:x?}"
                );
            }
        }
    }
    Ok(())
}

fn job_into_a_hole_fails_at_its_first_page() -> Result<()> {
    let gpu = Gpu::open_first()?;
    let region = Region::map(64 * PAGE_SIZE, Backing::Small)?;
    oracle::write(region, 1);
    region.part(40 * PAGE_SIZE, PAGE_SIZE).unmap()?;
    let hole = region.address() + 40 * PAGE;
    Job::sum(region).fails_at(&gpu, hole, Access::Read)?;
    Job::add(region, 1).fails_at(&gpu, hole, Access::Write)?;
    // One wave works from the lowest address up.
    oracle::check_part(region.part(0, 40 * PAGE_SIZE), 1, 0, 1)?;
    oracle::check_part(
        region.part(41 * PAGE_SIZE, 23 * PAGE_SIZE),
        1,
        41 * PAGE_SIZE / 8,
        0,
    )
}

fn read_only_memory_can_be_read_and_fails_the_writer() -> Result<()> {
    let gpu = Gpu::open_first()?;
    for backing in [Backing::Small, Backing::Huge, Backing::Shared] {
        let region = Region::map(4 << 20, backing)?;
        oracle::write(region, 2);
        region.protect(Protection::Read)?;
        for _ in 0..2 {
            let sum = Job::sum(region).waves(4).run(&gpu)?;
            ensure!(sum == oracle::expected_sum(region, 2, 0), "{backing:?}");
            let word = region.address();
            Job::add(region, 1).fails_at(&gpu, word, Access::Write)?;
            Job::atomic_add(word, 1, 1).fails_at(&gpu, word, Access::Atomic)?;
        }
        oracle::check(region, 2, 0)?;
    }
    Ok(())
}

fn inaccessible_memory_fails_the_reader() -> Result<()> {
    let gpu = Gpu::open_first()?;
    let region = Region::map(4 * PAGE_SIZE, Backing::Small)?;
    oracle::write(region, 3);
    region.protect(Protection::None)?;
    for (job, access) in jobs_on(region.part(0, PAGE_SIZE)) {
        job.fails_at(&gpu, region.address(), access)?;
    }
    region.protect(Protection::ReadWrite)?;
    Job::add(region, 1).run(&gpu)?;
    oracle::check(region, 3, 1)
}

fn failing_job_leaves_others_alone() -> Result<()> {
    let gpu = Gpu::open_first()?;
    let nowhere = Region::nowhere(PAGE_SIZE)?;
    let ring = Region::map(4 * PAGE_SIZE, Backing::Small)?;
    let endless = Job::endless(ring).submit(&gpu)?;
    let good = Region::map(1 << 20, Backing::Small)?;
    for round in 0..20 {
        let add = Job::add(good, 1).waves(4).submit(&gpu)?;
        let bad = Job::sum(nowhere).submit(&gpu)?;
        let end = call::wait(&gpu, bad, call::JOB_TIME)?;
        call::ensure_status(&end, JobStatus::Fault)?;
        ensure!(end.fence == bad && end.fault_address == nowhere.address());
        let end = call::wait(&gpu, add, call::JOB_TIME)?;
        call::ensure_status(&end, JobStatus::Ok)?;
        ensure!(good.load(round) == round as u64 + 1);
    }
    ensure!(call::wait(&gpu, endless, Duration::ZERO) == Err(Errno::TIMEDOUT));
    call::kill(&gpu, endless)?;
    let end = call::wait(&gpu, endless, call::JOB_TIME)?;
    call::ensure_status(&end, JobStatus::Killed)
}

/// Their faults are served together.
fn failing_job_leaves_others_alone_that_fault_next_to_it() -> Result<()> {
    const JOBS: usize = 48;
    const BAD: usize = 20;
    let gpu = Gpu::open_first()?;
    let region = Region::map(JOBS * PAGE_SIZE, Backing::Small)?;
    let page = |index: usize| region.part(index * PAGE_SIZE, PAGE_SIZE);
    page(BAD).protect(Protection::Read)?;
    for round in 0..10 {
        // All of it is unmapped by that.
        gpu.advise(region.pages(), Advice::MapOnly)?;
        let jobs: Vec<_> = (0..JOBS)
            .map(|index| Job::add(page(index), 1).submit(&gpu))
            .collect::<Result<_, _>>()?;
        for (index, job) in jobs.into_iter().enumerate() {
            let end = call::wait(&gpu, job, call::JOB_TIME)?;
            if index == BAD {
                call::ensure_status(&end, JobStatus::Fault)?;
                ensure!(end.fault_address == page(BAD).address(), "{end:x?}");
            } else {
                call::ensure_status(&end, JobStatus::Ok)?;
                ensure!(page(index).load(0) == round + 1, "page {index}");
            }
        }
    }
    ensure!(page(BAD).load(0) == 0);
    Ok(())
}

fn chase_into_nowhere_fails_there() -> Result<()> {
    let gpu = Gpu::open_first()?;
    let region = Region::map(2 * PAGE_SIZE, Backing::Small)?;
    let nowhere = Region::nowhere(PAGE_SIZE)?;
    let second = region.address() + PAGE;
    region.store(0, second);
    region.store(PAGE_SIZE / 8, nowhere.address() + 16);
    let chase = |steps| Job::new(Kernel::PointerChase, [region.address(), steps, 0, 0]);
    ensure!(chase(2).run(&gpu)? == nowhere.address() + 16);
    chase(3).fails_at(&gpu, nowhere.address(), Access::Read)
}

/// What the GPU reads is an address that no SUBMIT has seen: the first behind user space, of the kernel's, and of
/// more bits than page tables or processors have.
fn chase_beyond_user_space_fails_there() -> Result<()> {
    let gpu = Gpu::open_first()?;
    let region = Region::map(PAGE_SIZE, Backing::Small)?;
    let chase = |steps| Job::new(Kernel::PointerChase, [region.address(), steps, 0, 0]);
    for page in [
        USER_END,
        1 << 47,
        (1 << 48) - PAGE,
        1 << 48,
        1 << 63,
        0xffff_8000_0000_0000,
        0xffff_8880_0000_0000,
        0u64.wrapping_sub(PAGE),
    ] {
        for offset in [0, 16, PAGE - 8] {
            region.store(0, page + offset);
            ensure!(chase(1).run(&gpu)? == page + offset);
            chase(2).fails_at(&gpu, page, Access::Read)?;
        }
    }
    Ok(())
}

fn words_up_to_the_end_of_user_space_are_submitted_and_none_beyond() -> Result<()> {
    let gpu = Gpu::open_first()?;
    let good = Region::map(2 * PAGE_SIZE, Backing::Small)?.address();
    let last = USER_END - PAGE;
    // From an address on, as many bytes as that; of atomics and chases, a word.
    let jobs = |address: u64, length: u64| {
        let word = (length == 8).then_some([
            (Job::atomic_add(address, 1, 1), Access::Atomic),
            (
                Job::new(Kernel::CompareAndSwap, [address, 0, 1, 0]),
                Access::Atomic,
            ),
            (
                Job::new(Kernel::PointerChase, [address, 1, 0, 0]),
                Access::Read,
            ),
        ]);
        let long = [
            (Job::new(Kernel::Sum, [address, length, 0, 0]), Access::Read),
            (
                Job::new(Kernel::Fill, [address, length, 1, 0]),
                Access::Write,
            ),
            (
                Job::new(Kernel::Add, [address, length, 1, 0]),
                Access::Write,
            ),
            (
                Job::new(Kernel::Copy, [address, good, length, 0]),
                Access::Write,
            ),
            (
                Job::new(Kernel::Copy, [good, address, length, 0]),
                Access::Read,
            ),
        ];
        long.into_iter().chain(word.into_iter().flatten())
    };
    for length in [8, PAGE] {
        for (job, access) in jobs(USER_END - length, length) {
            // Nothing is mapped there.
            job.fails_at(&gpu, last, access)?;
        }
        for beyond in [8, length, PAGE, 1 << 47, 1 << 63] {
            for (job, _) in jobs(USER_END - length + beyond, length) {
                let refused = job.submit(&gpu);
                ensure!(refused == Err(Errno::INVAL), "{job:x?}: {refused:?}");
            }
        }
    }
    Ok(())
}

fn copy_of_neighbours_is_right_and_of_overlapping_words_refused() -> Result<()> {
    const LENGTH: u64 = 2 * PAGE;
    let gpu = Gpu::open_first()?;
    let region = Region::map(6 * PAGE_SIZE, Backing::Small)?;
    let part = |from: u64| region.part(from as usize, LENGTH as usize);
    let from = 2 * PAGE;
    let copy = |to| {
        let (to, from) = (region.address() + to, region.address() + from);
        Job::new(Kernel::Copy, [to, from, LENGTH, 0])
    };
    for neighbour in [from - LENGTH, from + LENGTH] {
        oracle::write(region, neighbour);
        copy(neighbour).run(&gpu)?;
        let first = from as usize / 8;
        for held in [from, neighbour] {
            oracle::check_part(part(held), neighbour, first, 0)?;
        }
    }
    for overlapping in [
        from - LENGTH + 8,
        from - 8,
        from,
        from + 8,
        from + LENGTH - 8,
    ] {
        let refused = copy(overlapping).submit(&gpu);
        ensure!(refused == Err(Errno::INVAL), "{overlapping}: {refused:?}");
    }
    Ok(())
}

/// Of the same page, and at the same time: the device has one fault for all of them.
fn loads_beside_a_store_that_is_refused_go_on() -> Result<()> {
    const ROUNDS: u64 = 60;
    let gpu = Gpu::open_first()?;
    let region = Region::map(ROUNDS as usize * PAGE_SIZE, Backing::Small)?;
    oracle::write(region, ROUNDS);
    region.protect(Protection::Read)?;
    for round in 0..ROUNDS {
        // The GPU has never seen it.
        let page = region.part(round as usize * PAGE_SIZE, PAGE_SIZE);
        let first = page.words() * round as usize;
        let stores = [
            (Job::fill(page, 1), Access::Write),
            (Job::atomic_add(page.address(), 1, 1), Access::Atomic),
        ];
        let (store, access) = stores[round as usize % 2];
        let jobs = match round % 4 {
            0 | 1 => [store, Job::sum(page)],
            _ => [Job::sum(page), store],
        };
        let fences = jobs.map(|job| job.submit(&gpu));
        for (job, fence) in jobs.into_iter().zip(fences) {
            let end = call::wait(&gpu, fence?, call::JOB_TIME)?;
            if job.kernel == Kernel::Sum {
                call::ensure_status(&end, JobStatus::Ok)?;
                ensure!(end.result == oracle::sum(ROUNDS, first..first + page.words()));
            } else {
                call::ensure_status(&end, JobStatus::Fault)?;
                ensure!(end.fault_address == page.address() && end.access == access.raw());
            }
        }
    }
    Ok(())
}
