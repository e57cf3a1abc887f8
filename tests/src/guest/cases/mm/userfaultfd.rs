// SPDX-License-Identifier: MIT OR Apache-2.0
//! userfaultfd over memory that the GPU uses: its faults wait for the handler, like a CPU's, and nothing
//! that the GPU or the driver does goes past the handler.

use super::{
    start::{
        At, SEED, STARTS, Start, each_start, ensure_sum, ensure_words, eventually, exercise_all,
    },
    userfault::{Fault, MISSING, Userfault, WRITE_PROTECT},
};
use crate::guest::{
    call::{self, JOB_TIME, Job, ensure_status},
    child::code,
    oracle,
    place::{driver_count, ensure_place, migrate, move_all},
};
use anyhow::{Context, Result, ensure};
use farfault::arena::{Backing, Region};
use farfault::{
    Advice, Gpu, HUGE_PAGE_SIZE, PAGE_SIZE, Place,
    process::{Ended, fork},
    uapi::{Exclusive, JobStatus, Wait},
};
use rustix::{
    io::Errno,
    process::{PidfdFlags, PidfdGetfdFlags, Signal, pidfd_getfd, pidfd_open, pidfd_send_signal},
};
use std::{
    os::fd::AsRawFd,
    thread,
    time::{Duration, Instant},
};

group! { "mm::userfaultfd", gpus 1, seconds 120:
    missing_pages_read_by_the_gpu_are_what_the_handler_gives,
    missing_pages_written_by_the_gpu_are_what_the_handler_gives,
    missing_pages_are_not_made_by_a_migration,
    missing_pages_are_not_the_gpus_alone_until_the_handler_gives_them,
    range_partly_in_vram_waits_only_for_what_is_missing,
    write_protected_pages_are_read_and_wait_for_the_handler_to_be_written,
    write_protected_pages_that_were_only_read_wait_for_the_handler_to_be_written,
    write_protected_in_vram_by_range_lets_the_rest_be_written,
    write_protected_pages_that_move_stay_protected,
    job_on_a_page_nobody_serves_is_killed_and_others_go_on,
    jobs_in_the_same_2_mib_fault_beside_a_page_nobody_serves,
    process_on_a_page_nobody_serves_is_killed,
    unregistered_while_a_job_waits_lets_it_go_on,
    pages_in_vram_moved_by_the_handler_keep_their_data,
}

const PAGES: usize = 16;
const WORDS: usize = PAGE_SIZE / 8;
const LOOK: Duration = Duration::from_millis(20);

fn page(region: Region, number: usize) -> Region {
    region.part(number * PAGE_SIZE, PAGE_SIZE)
}

/// Runs a job with this as its handler, until the job has ended. How many faults there were.
fn run_with(
    gpu: &Gpu,
    job: Job,
    userfault: &Userfault,
    mut serve: impl FnMut(Fault) -> Result<()>,
) -> Result<(Wait, usize)> {
    let fence = job.submit(gpu)?;
    let deadline = Instant::now() + JOB_TIME;
    let mut faults = 0;
    loop {
        match call::wait(gpu, fence, Duration::ZERO) {
            Err(Errno::TIMEDOUT) => {}
            end => return Ok((end?, faults)),
        }
        ensure!(Instant::now() < deadline, "{job:x?} does not end");
        if let Some(fault) = userfault.next(LOOK)? {
            faults += 1;
            serve(fault)?;
        }
    }
}

/// Likewise, to its good end, with the pages of `source` for those of `region` that are missing.
fn run_with_pages(
    gpu: &Gpu,
    job: Job,
    userfault: &Userfault,
    region: Region,
    source: Region,
) -> Result<(u64, Vec<usize>)> {
    let mut served = Vec::new();
    let (end, _) = run_with(gpu, job, userfault, |fault| {
        ensure!(!fault.write_protect, "{fault:x?}");
        let number = (fault.address - region.address()) as usize / PAGE_SIZE;
        served.push(number);
        Ok(userfault.copy(fault.address, page(source, number))?)
    })?;
    ensure_status(&end, JobStatus::Ok)?;
    served.sort_unstable();
    served.dedup();
    Ok((end.result, served))
}

/// The handler is told of a write to a protected page of this.
fn ensure_told(userfault: &Userfault, part: Region) -> Result<()> {
    let mut told = None;
    eventually("the handler is told of a write", || {
        told = userfault.next(LOOK)?;
        Ok(told.is_some())
    })?;
    let fault = told.context("a fault")?;
    let inside = part.address()..part.address() + part.length() as u64;
    ensure!(
        fault.write_protect && inside.contains(&fault.address),
        "{fault:x?}"
    );
    Ok(())
}

/// A job that writes to protected memory waits for the handler, who does nothing, until it is killed.
fn ensure_gpu_waits(gpu: &Gpu, userfault: &Userfault, part: Region) -> Result<()> {
    let fence = Job::add(part, 7).waves(2).submit(gpu)?;
    ensure_told(userfault, part)?;
    let waits = call::wait(gpu, fence, LOOK);
    ensure!(
        waits.is_err_and(|error| error == Errno::TIMEDOUT),
        "the job goes on: {waits:x?}"
    );
    call::kill(gpu, fence)?;
    ensure_status(&call::wait(gpu, fence, JOB_TIME)?, JobStatus::Killed)
}

/// A thread that writes to protected memory waits for the handler; then it has written.
fn ensure_cpu_waits(userfault: &Userfault, part: Region) -> Result<()> {
    let before = part.load(0);
    thread::scope(|scope| {
        let writer = scope.spawn(|| part.store(0, before.wrapping_add(7)));
        // Whatever is wrong, it gets on.
        let told = ensure_told(userfault, part);
        let still = part.load(0);
        userfault.write_protect(part, false)?;
        ensure!(writer.join().is_ok());
        told?;
        ensure!(still == before, "the CPU wrote to a protected page");
        Ok(())
    })?;
    ensure!(part.load(0) == before.wrapping_add(7));
    part.store(0, before);
    Ok(())
}

/// Memory that is missing, and what the handler has for it.
fn missing(advice: Advice, gpu: &Gpu) -> Result<(Userfault, Region, Region)> {
    let userfault = Userfault::new()?;
    let source = Region::map(PAGES * PAGE_SIZE, Backing::Small)?;
    oracle::write(source, SEED);
    let region = Region::map(PAGES * PAGE_SIZE, Backing::Small)?;
    userfault.register(region, MISSING)?;
    gpu.advise(region.pages(), advice)?;
    Ok((userfault, region, source))
}

const ADVICE: [Advice; 4] = [
    Advice::Default,
    Advice::PreferGpu,
    Advice::PreferCpu,
    Advice::MapOnly,
];

fn missing_pages_read_by_the_gpu_are_what_the_handler_gives() -> Result<()> {
    for advice in ADVICE {
        let gpu = Gpu::open_first()?;
        let (userfault, region, source) = missing(advice, &gpu)?;
        let job = Job::sum(region).waves(2);
        let (sum, served) = run_with_pages(&gpu, job, &userfault, region, source)?;
        ensure!(sum == oracle::expected_sum(region, SEED, 0), "{advice:?}");
        ensure!(
            served.len() == PAGES,
            "{advice:?}: only {served:?} were asked for"
        );
        exercise_all(&gpu, region).with_context(|| format!("{advice:?}"))?;
    }
    Ok(())
}

fn missing_pages_written_by_the_gpu_are_what_the_handler_gives() -> Result<()> {
    for advice in ADVICE {
        let gpu = Gpu::open_first()?;
        let (userfault, region, source) = missing(advice, &gpu)?;
        // It reads and writes; then one that only writes, to a part of a page; then atomics.
        let pages = region.part(0, 14 * PAGE_SIZE);
        let job = Job::add(pages, 1).waves(2);
        let (_, served) = run_with_pages(&gpu, job, &userfault, region, source)?;
        ensure!(
            served.len() == 14,
            "{advice:?}: only {served:?} were asked for"
        );
        oracle::check(pages, SEED, 1)?;
        let at = page(region, 14).address();
        let job = Job::new(farfault::Kernel::Fill, [at, 8, 77, 0]);
        run_with_pages(&gpu, job, &userfault, region, source)?;
        ensure!(page(region, 14).load(0) == 77);
        ensure!(
            page(region, 14).load(1) == oracle::word(SEED, 14 * WORDS + 1),
            "{advice:?}"
        );
        let job = Job::atomic_add(page(region, 15).address(), 1, 1);
        run_with_pages(&gpu, job, &userfault, region, source)?;
        let should = oracle::word(SEED, 15 * WORDS).wrapping_add(1);
        ensure!(page(region, 15).load(0) == should, "{advice:?}");
    }
    Ok(())
}

fn missing_pages_are_not_made_by_a_migration() -> Result<()> {
    for backing in [Backing::Small, Backing::Huge] {
        let gpu = Gpu::open_first()?;
        let userfault = Userfault::new()?;
        let region = Region::map(HUGE_PAGE_SIZE, backing)?;
        userfault.register(region, MISSING)?;
        let moved = migrate(&gpu, region, Place::Vram)?;
        ensure!(moved.moved == 0, "{backing:?}: {moved:?}");
        ensure_place(&gpu, region, Place::None)?;
        ensure!(userfault.next(Duration::ZERO)?.is_none());
        let source = Region::map(PAGE_SIZE, Backing::Small)?;
        source.store(0, 3);
        let (end, faults) = run_with(&gpu, Job::sum(page(region, 100)), &userfault, |fault| {
            Ok(userfault.copy(fault.address, source)?)
        })?;
        ensure!(
            faults != 0 && end.result == 3,
            "{backing:?}: {faults} faults, {end:?}"
        );
    }
    Ok(())
}

fn missing_pages_are_not_the_gpus_alone_until_the_handler_gives_them() -> Result<()> {
    let gpu = Gpu::open_first()?;
    let (userfault, region, source) = missing(Advice::MapOnly, &gpu)?;
    let exclusive = Exclusive {
        address: region.address(),
        length: region.length() as u64,
    };
    // It waits for the handler, for a while.
    let refused = call::call(&gpu, exclusive);
    ensure!(refused.is_err_and(|error| error == Errno::BUSY));
    ensure_place(&gpu, region, Place::None)?;
    userfault.copy(region.address(), source)?;
    call::call(&gpu, exclusive)?;
    Job::atomic_add(region.address(), 1, 5).run(&gpu)?;
    ensure!(region.load(0) == oracle::word(SEED, 0).wrapping_add(5));
    Ok(())
}

fn range_partly_in_vram_waits_only_for_what_is_missing() -> Result<()> {
    for (backing, length) in [
        (Backing::Small, PAGES * PAGE_SIZE),
        (Backing::Huge, HUGE_PAGE_SIZE),
    ] {
        let gpu = Gpu::open_first()?;
        let userfault = Userfault::new()?;
        let source = Region::map(length, Backing::Small)?;
        oracle::write(source, SEED);
        let region = Region::map(length, backing)?;
        oracle::write(region, SEED);
        move_all(&gpu, region, Place::Vram)?;
        let pages = region.pages().count();
        let hole = region.part(length / 2, 4 * PAGE_SIZE);
        hole.discard()?;
        userfault.register(region, MISSING)?;
        let job = Job::add(region, 1).waves(2);
        let (_, served) = run_with_pages(&gpu, job, &userfault, region, source)?;
        let should: Vec<usize> = (pages / 2..pages / 2 + 4).collect();
        ensure!(served == should, "{backing:?}: asked for {served:?}");
        super::start::exercise(&gpu, region, 0, 1).with_context(|| format!("{backing:?}"))?;
        region.unmap()?;
    }
    Ok(())
}

fn write_protected_pages_are_read_and_wait_for_the_handler_to_be_written() -> Result<()> {
    each_start(|gpu, region| {
        let userfault = Userfault::new()?;
        userfault.register(region, WRITE_PROTECT)?;
        userfault.write_protect(region, true)?;
        ensure_sum(gpu, region, 0, 0)?;
        ensure!(
            userfault.next(Duration::ZERO)?.is_none(),
            "a read was reported"
        );
        let part = region.part(0, 4 * PAGE_SIZE);
        let (end, faults) = run_with(gpu, Job::add(part, 1), &userfault, |fault| {
            ensure!(fault.write_protect, "{fault:x?}");
            let number = (fault.address - region.address()) as usize / PAGE_SIZE;
            // It has not been written yet.
            oracle::check_part(page(region, number), SEED, number * WORDS, 0)?;
            Ok(userfault.write_protect(page(region, number), false)?)
        })?;
        ensure_status(&end, JobStatus::Ok)?;
        ensure!(
            faults != 0,
            "the GPU wrote to protected pages, and nobody was told"
        );
        oracle::check(part, SEED, 1)?;
        userfault.write_protect(region, false)?;
        Job::add(part, u64::MAX).run(gpu)?;
        userfault.unregister(region)?;
        exercise_all(gpu, region)
    })
}

/// All of them are the zero page, small or huge, which mm counts as memory that was never touched.
fn write_protected_pages_that_were_only_read_wait_for_the_handler_to_be_written() -> Result<()> {
    for backing in [Backing::Small, Backing::Huge] {
        let gpu = Gpu::open_first()?;
        let userfault = Userfault::new()?;
        let region = Region::map(HUGE_PAGE_SIZE, backing)?;
        userfault.register(region, WRITE_PROTECT)?;
        ensure_words(region, 0)?;
        userfault.write_protect(region, true)?;
        migrate(&gpu, region, Place::Vram)?;
        let first = page(region, 0);
        let (end, faults) = run_with(&gpu, Job::fill(first, 7), &userfault, |fault| {
            ensure!(
                fault.write_protect && fault.address == first.address(),
                "{fault:x?}"
            );
            Ok(userfault.write_protect(region, false)?)
        })?;
        ensure_status(&end, JobStatus::Ok)?;
        ensure!(faults == 1, "{backing:?}: {faults} faults");
        ensure_words(first, 7)?;
    }
    Ok(())
}

fn write_protected_in_vram_by_range_lets_the_rest_be_written() -> Result<()> {
    for start in STARTS {
        let gpu = Gpu::open_first()?;
        let region = start.region(&gpu, HUGE_PAGE_SIZE)?;
        let userfault = Userfault::new()?;
        userfault.register(region, WRITE_PROTECT)?;
        let (from, length) = (HUGE_PAGE_SIZE / 4, HUGE_PAGE_SIZE / 2);
        let part = region.part(from, length);
        userfault.write_protect(part, true)?;
        Job::add(region.part(0, from), 1).waves(2).run(&gpu)?;
        ensure_gpu_waits(&gpu, &userfault, part).with_context(|| format!("{start:?}"))?;
        oracle::check_part(part, SEED, from / 8, 0).with_context(|| format!("{start:?}"))?;
        oracle::check(region.part(0, from), SEED, 1).with_context(|| format!("{start:?}"))?;
        userfault.write_protect(part, false)?;
        super::start::exercise(&gpu, part, from / 8, 0).with_context(|| format!("{start:?}"))?;
        region.unmap()?;
    }
    Ok(())
}

/// From RAM to VRAM and back: the protection goes along, for the GPU and for the CPU.
fn write_protected_pages_that_move_stay_protected() -> Result<()> {
    for (backing, to) in [
        (Backing::Small, Place::Vram),
        (Backing::Huge, Place::Vram),
        (Backing::Small, Place::Ram),
        (Backing::Huge, Place::Ram),
    ] {
        let at = match to {
            Place::Vram => At::Ram,
            _ => At::Vram,
        };
        let gpu = Gpu::open_first()?;
        let region = Start { backing, at }.region(&gpu, HUGE_PAGE_SIZE)?;
        let userfault = Userfault::new()?;
        userfault.register(region, WRITE_PROTECT)?;
        userfault.write_protect(region, true)?;
        let context = || format!("{backing:?} to {to:?}");
        move_all(&gpu, region, to).with_context(context)?;
        ensure_sum(&gpu, region, 0, 0).with_context(context)?;
        ensure_place(&gpu, region, to).with_context(context)?;
        ensure!(userfault.next(Duration::ZERO)?.is_none());
        let first = page(region, 0);
        ensure_gpu_waits(&gpu, &userfault, first).with_context(context)?;
        // Who still waits there waits no more, and what was said of it is read.
        userfault.write_protect(first, false)?;
        while userfault.next(LOOK)?.is_some() {}
        ensure_cpu_waits(&userfault, page(region, 300)).with_context(context)?;
        oracle::check(region, SEED, 0).with_context(context)?;
        userfault.write_protect(region, false)?;
        exercise_all(&gpu, region).with_context(context)?;
        region.unmap()?;
    }
    Ok(())
}

fn job_on_a_page_nobody_serves_is_killed_and_others_go_on() -> Result<()> {
    let gpu = Gpu::open_first()?;
    let (userfault, region, source) = missing(Advice::Default, &gpu)?;
    let stuck = Job::sum(page(region, 3)).submit(&gpu)?;
    eventually("the handler is asked", || {
        Ok(userfault.next(LOOK)?.is_some())
    })?;
    // Memory beside it, in the same 2 MiB and elsewhere.
    userfault.copy(page(region, 5).address(), page(source, 5))?;
    ensure_sum(&gpu, page(region, 5), 5 * WORDS, 0)?;
    let other = Region::map(HUGE_PAGE_SIZE, Backing::Huge)?;
    oracle::write(other, SEED);
    exercise_all(&gpu, other)?;
    migrate(&gpu, other, Place::Ram)?;
    let waits = call::wait(&gpu, stuck, Duration::ZERO);
    ensure!(waits.is_err_and(|error| error == Errno::TIMEDOUT));
    call::kill(&gpu, stuck)?;
    ensure_status(&call::wait(&gpu, stuck, JOB_TIME)?, JobStatus::Killed)
}

/// Their faults and the one that waits are in one batch, each time that all fault again.
fn jobs_in_the_same_2_mib_fault_beside_a_page_nobody_serves() -> Result<()> {
    const HOLE: usize = 3;
    for advice in ADVICE {
        let gpu = Gpu::open_first()?;
        let region = Region::map(HUGE_PAGE_SIZE, Backing::Small)?;
        oracle::write(region, SEED);
        gpu.advise(region.pages(), advice)?;
        let userfault = Userfault::new()?;
        page(region, HOLE).discard()?;
        userfault.register(page(region, HOLE), MISSING)?;
        let stuck = Job::sum(page(region, HOLE)).waves(2).submit(&gpu)?;
        eventually("the handler is asked", || {
            Ok(userfault.next(LOOK)?.is_some())
        })?;
        let first = HOLE + 1;
        let rest = region.part(first * PAGE_SIZE, HUGE_PAGE_SIZE - first * PAGE_SIZE);
        Job::add(rest, 1)
            .waves(4)
            .run(&gpu)
            .with_context(|| format!("{advice:?}"))?;
        let waits = call::wait(&gpu, stuck, Duration::ZERO);
        ensure!(waits.is_err_and(|error| error == Errno::TIMEDOUT));
        call::kill(&gpu, stuck)?;
        ensure_status(&call::wait(&gpu, stuck, JOB_TIME)?, JobStatus::Killed)?;
        oracle::check_part(rest, SEED, first * WORDS, 1).with_context(|| format!("{advice:?}"))?;
        drop(userfault);
        region.unmap()?;
    }
    Ok(())
}

fn process_on_a_page_nobody_serves_is_killed() -> Result<()> {
    let (from_child, to_parent) = rustix::pipe::pipe()?;
    let child = fork(|| {
        code((|| {
            let gpu = Gpu::open_first()?;
            let (userfault, region, _) = missing(Advice::Default, &gpu)?;
            let stuck = Job::sum(region).submit(&gpu)?;
            eventually("the handler is asked", || {
                Ok(userfault.next(LOOK)?.is_some())
            })?;
            let number = userfault.file().as_raw_fd() as u32;
            rustix::io::write(&to_parent, &number.to_ne_bytes())?;
            call::wait(&gpu, stuck, JOB_TIME)?;
            Ok(())
        })())
    })?;
    let mut number = [0; 4];
    rustix::io::read(&from_child, &mut number)?;
    let pid = child.pid().context("a child")?;
    let process = pidfd_open(pid, PidfdFlags::empty())?;
    // Somebody else holds the descriptor, so the child's end does not close it.
    let held = pidfd_getfd(
        &process,
        u32::from_ne_bytes(number) as i32,
        PidfdGetfdFlags::empty(),
    )?;
    let before = Instant::now();
    pidfd_send_signal(&process, Signal::KILL)?;
    ensure!(matches!(child.wait()?, Ended::Signaled(_)));
    ensure!(
        before.elapsed() < Duration::from_secs(10),
        "its end took {:?}",
        before.elapsed()
    );
    // Its address space on the GPU is gone, too, while the descriptor is still there.
    eventually("its memory is free", || {
        Ok(driver_count(0, "contexts")? == 0)
    })?;
    drop(held);
    Ok(())
}

fn unregistered_while_a_job_waits_lets_it_go_on() -> Result<()> {
    for close in [false, true] {
        let gpu = Gpu::open_first()?;
        let (userfault, region, _) = missing(Advice::Default, &gpu)?;
        let fence = Job::add(region, 4).submit(&gpu)?;
        eventually("the handler is asked", || {
            Ok(userfault.next(LOOK)?.is_some())
        })?;
        if close {
            drop(userfault);
        } else {
            userfault.unregister(region)?;
        }
        ensure_status(&call::wait(&gpu, fence, JOB_TIME)?, JobStatus::Ok)?;
        ensure_words(region, 4)?;
    }
    Ok(())
}

fn pages_in_vram_moved_by_the_handler_keep_their_data() -> Result<()> {
    each_start(|gpu, region| {
        let userfault = Userfault::new()?;
        let target = Region::map(region.length(), Backing::Small)?;
        userfault.register(target, MISSING)?;
        match userfault.take(target, region) {
            Ok(()) => {
                eprintln!("UFFDIO_MOVE moved all");
                userfault.unregister(target)?;
                ensure!(
                    Job::sum(region).waves(2).run(gpu)? == 0,
                    "it is at both places"
                );
                exercise_all(gpu, target)?;
            }
            Err(error) => {
                // What the kernel does not move stays, whole.
                eprintln!("UFFDIO_MOVE: {error}");
                userfault.unregister(target)?;
                let words = region.words();
                for index in 0..words {
                    let word = region.load(index) | target.load(index);
                    ensure!(word == oracle::word(SEED, index), "word {index} is lost");
                }
            }
        }
        Ok(target.unmap()?)
    })
}
