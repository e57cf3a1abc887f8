// SPDX-License-Identifier: MIT OR Apache-2.0
//! Programs with jobs that run and jobs that have ended, when the machine sleeps or the GPU dies; and one with pages in
//! VRAM that fail before it closes its descriptor.

use super::{
    Program,
    call::{self, Job, events},
    child::{self, Gate, ensure_sigbus},
    oracle,
    place::{count, move_all, state},
    programs::{CLOSED, DONE, READY, SEED, say, wait_for_a_line, written},
};
use anyhow::{Context, Result, anyhow, bail, ensure};
use farfault::arena::{Backing, Region, call_at};
use farfault::{
    Advice, Gpu, HUGE_PAGE_SIZE, PAGE_SIZE, Place,
    process::{Ended, fork},
    uapi::{self, JobStatus},
};
use rustix::{event::PollFlags, fd::AsFd, io::Errno};
use std::{
    cell::RefCell,
    io,
    thread::{self, ScopedJoinHandle},
    time::{Duration, Instant},
};

/// Has jobs of both kinds, and pages in VRAM, when the machine goes to sleep after [`READY`], and looks at them when it
/// gets a line.
pub const SLEEP_WITH_JOBS: &str = "sleep-with-jobs";
/// `die-with-jobs NUMBER`: has jobs of both kinds on the GPU of this number, which is dead when it gets a line, and on
/// the first one. It is who finds out.
pub const DIE_WITH_JOBS: &str = "die-with-jobs";
/// Has pages in VRAM, prints the addresses there of some of them as JSON, and expects these to fail after [`READY`]. It
/// closes its descriptor when it gets a line, says [`CLOSED`], and looks at its memory when it gets another one.
pub const KEEP_FAILED: &str = "keep-failed";
/// Had a huge page in VRAM, prints its address there as JSON, and expects that to have failed when it gets a line. It puts
/// small pages behind it, which soon only a child has, and goes on as [`KEEP_FAILED`].
pub const ORPHAN_BEHIND_FAILED: &str = "orphan-behind-failed";

pub(super) const PROGRAMS: &[Program] = &[
    Program {
        name: SLEEP_WITH_JOBS,
        run: sleep_with_jobs,
    },
    Program {
        name: DIE_WITH_JOBS,
        run: die_with_jobs,
    },
    Program {
        name: KEEP_FAILED,
        run: keep_failed,
    },
    Program {
        name: ORPHAN_BEHIND_FAILED,
        run: orphan_behind_failed,
    },
];

/// Longer than the driver waits for the device.
const LIMIT: Duration = Duration::from_secs(60);
/// For calls that wait for nobody.
const SOON: Duration = Duration::from_secs(2);

/// A job that has ended and one that runs for ever, neither of them collected.
struct Jobs {
    ended: u64,
    result: u64,
    endless: u64,
}

impl Jobs {
    fn submit(gpu: &Gpu) -> Result<Self> {
        let region = written(PAGE_SIZE, Backing::Small)?;
        let ended = Job::sum(region).submit(gpu)?;
        ensure!(events(gpu, LIMIT)? == PollFlags::IN);
        // It is mapped before the job begins, which then changes no counter.
        let ring = Region::map(PAGE_SIZE, Backing::Small)?;
        gpu.advise(ring.pages(), Advice::MapOnly)?;
        let endless = Job::endless(ring);
        Job::sum(ring).run(gpu)?;
        Ok(Self {
            ended,
            result: oracle::expected_sum(region, SEED, 0),
            endless: endless.submit(gpu)?,
        })
    }

    /// Both have ended, the endless one with this status, and there is no other.
    fn collect(&self, gpu: &Gpu, status: JobStatus) -> Result<()> {
        let now = Duration::ZERO;
        call::ensure_status(&call::wait(gpu, self.endless, now)?, status)?;
        let end = call::wait(gpu, self.ended, now)?;
        call::ensure_status(&end, JobStatus::Ok)?;
        ensure!(end.result == self.result, "{end:x?}");
        let none = call::wait(gpu, 0, now).map(drop);
        ensure!(none == Err(Errno::NOENT), "{none:?}");
        Ok(())
    }
}

fn sleep_with_jobs(_: &[String]) -> Result<()> {
    let gpu = Gpu::open_first()?;
    let region = written(HUGE_PAGE_SIZE, Backing::Small)?;
    move_all(&gpu, region, Place::Vram)?;
    let jobs = Jobs::submit(&gpu)?;
    let before = gpu.stats()?;
    say(READY);
    wait_for_a_line()?;
    let after = gpu.stats()?;
    ensure!(after.jobs == before.jobs + 1, "{before:?}, {after:?}");
    // It makes no room, no CPU has touched anything, and what is home stays there until it is used.
    let moved = |stats: uapi::Stats| [stats.pages_evicted, stats.cpu_faults, stats.pages_to_vram];
    ensure!(moved(after) == moved(before), "{before:?}, {after:?}");
    ensure!(count(&gpu, region, Place::Ram)? == region.pages().count());
    jobs.collect(&gpu, JobStatus::Killed)?;
    // New ones run as before.
    Job::add(region, 1).run(&gpu)?;
    ensure!(gpu.stats()?.jobs == after.jobs + 1);
    oracle::check(region, SEED, 1)?;
    say(DONE);
    Ok(())
}

fn die_with_jobs(arguments: &[String]) -> Result<()> {
    let [number] = arguments else {
        bail!("name a GPU's number");
    };
    let node = format!("/dev/farfault{number}");
    let (gpu, other) = (Gpu::open(&node)?, Gpu::open("/dev/farfault0")?);
    let region = written(16 * PAGE_SIZE, Backing::Small)?;
    gpu.advise(region.pages(), Advice::MapOnly)?;
    Job::add(region, 1).run(&gpu)?;
    let (jobs, of_other) = (Jobs::submit(&gpu)?, Jobs::submit(&other)?);
    let idle = [Gpu::open(&node)?, Gpu::open(&node)?];
    let idle_other = Gpu::open("/dev/farfault0")?;
    // The device does not know of it yet.
    let unused = call::open_raw(&node)?;
    let (before, before_other) = (gpu.stats()?, other.stats()?);
    say(READY);
    wait_for_a_line()?;
    let begin = Instant::now();
    thread::scope(|scope| {
        let [first, second] = &idle;
        let pollers = [first.as_fd(), second.as_fd(), unused.as_fd()]
            .map(|gpu| scope.spawn(move || events(gpu, LIMIT)));
        let ping = call_at(&gpu, uapi::IOC_PING, 0);
        ensure!(ping == Err(Errno::IO), "PING gave {ping:?}");
        let woken = pollers.map(ScopedJoinHandle::join);
        for woken in woken {
            let woken = woken.map_err(|_| anyhow!("who polls panicked"))??;
            ensure!(woken == PollFlags::ERR, "poll of an idle one: {woken:?}");
        }
        Ok(())
    })?;
    // At the end of its time poll looks once more by itself.
    ensure!(begin.elapsed() < LIMIT, "nobody woke them");

    let begin = Instant::now();
    ensure!(events(&gpu, Duration::ZERO)? == PollFlags::IN | PollFlags::ERR);
    let after = gpu.stats()?;
    ensure!(after.jobs == before.jobs + 1, "{before:?}, {after:?}");
    jobs.collect(&gpu, JobStatus::DeviceLost)?;
    ensure!(events(&gpu, Duration::ZERO)? == PollFlags::ERR);
    for (name, result) in call::every_call(&gpu, region) {
        let expected = match name {
            "INFO" | "STATS" => Ok(()),
            // There is no job.
            "WAIT" | "KILL" => Err(Errno::NOENT),
            _ => Err(Errno::IO),
        };
        ensure!(result == expected, "{name} gave {result:?}");
    }
    let ping = call_at(&unused, uapi::IOC_PING, 0);
    ensure!(ping == Err(Errno::IO), "PING of a new one: {ping:?}");
    let opened = call::open_raw(&node).map(drop);
    let errno = opened.as_ref().err().and_then(io::Error::raw_os_error);
    ensure!(
        errno == Some(Errno::IO.raw_os_error()),
        "open gave {opened:?}"
    );
    ensure!(begin.elapsed() < SOON, "it took {:?}", begin.elapsed());
    ensure!(gpu.stats()?.jobs == after.jobs);
    oracle::check(region, SEED, 1)?;

    // The other GPU has noticed nothing.
    ensure!(other.stats()? == before_other);
    ensure!(events(&idle_other, Duration::ZERO)?.is_empty());
    ensure!(events(&other, Duration::ZERO)? == PollFlags::IN);
    let running = call::wait(&other, of_other.endless, Duration::ZERO).map(drop);
    ensure!(running == Err(Errno::TIMEDOUT), "{running:?}");
    call::kill(&other, of_other.endless)?;
    let end = call::wait(&other, of_other.endless, LIMIT)?;
    call::ensure_status(&end, JobStatus::Killed)?;
    call::ensure_status(&call::wait(&other, of_other.ended, LIMIT)?, JobStatus::Ok)?;
    say(DONE);
    Ok(())
}

fn keep_failed(_: &[String]) -> Result<()> {
    let gpu = Gpu::open_first()?;
    // Those that fail are in the blocks that go home first.
    let mut memory = Vec::new();
    let mut failing = Vec::new();
    for (backing, page) in [
        (Backing::Small, Some(5)),
        (Backing::Huge, Some(7)),
        (Backing::Small, None),
        (Backing::Huge, None),
    ] {
        let region = written(HUGE_PAGE_SIZE, backing)?;
        move_all(&gpu, region, Place::Vram)?;
        if let Some(page) = page {
            let vram = state(&gpu, region, page)?.cpu.vram;
            failing.push(vram.context("QUERY says nothing of a page in VRAM")?);
        }
        memory.push((region, page));
    }
    println!("{}", serde_json::to_string(&failing)?);
    say(READY);
    wait_for_a_line()?;
    drop(gpu);
    say(CLOSED);
    wait_for_a_line()?;
    for (region, page) in memory {
        let Some(page) = page else {
            oracle::check(region, SEED, 0)?;
            continue;
        };
        let bad = region.part(page * PAGE_SIZE, PAGE_SIZE);
        ensure_sigbus(bad.address(), || bad.store(0, 1))?;
        for (from, to) in [(0, page), (page + 1, HUGE_PAGE_SIZE / PAGE_SIZE)] {
            let part = region.part(from * PAGE_SIZE, (to - from) * PAGE_SIZE);
            oracle::check_part(part, SEED, from * PAGE_SIZE / 8, 0)?;
        }
    }
    say(DONE);
    Ok(())
}

fn orphan_behind_failed(_: &[String]) -> Result<()> {
    let gpu = Gpu::open_first()?;
    let vram_of = |region| -> Result<u64> {
        let vram = state(&gpu, region, 0)?.cpu.vram;
        vram.context("QUERY says nothing of a page in VRAM")
    };
    let huge = written(HUGE_PAGE_SIZE, Backing::Huge)?;
    move_all(&gpu, huge, Place::Vram)?;
    let failing = vram_of(huge)?;
    huge.unmap()?;
    println!("[{failing}]");
    say(READY);
    wait_for_a_line()?;
    let orphan = written(64 * PAGE_SIZE, Backing::Small)?;
    move_all(&gpu, orphan, Place::Vram)?;
    let first = vram_of(orphan)?;
    ensure!(first == failing + PAGE_SIZE as u64, "it is at {first:#x}");
    let gpu = RefCell::new(Some(gpu));
    let (begun, told) = (Gate::new()?, Gate::new()?);
    let child = fork(|| {
        // Its descriptor would keep the file open.
        drop(gpu.take());
        child::code((|| {
            begun.open()?;
            told.wait()?;
            oracle::check(orphan, SEED, 0)
        })())
    })?;
    begun.wait()?;
    orphan.unmap()?;
    drop(gpu.take());
    say(CLOSED);
    wait_for_a_line()?;
    told.open()?;
    ensure!(child.wait()? == Ended::Exited(0));
    say(DONE);
    Ok(())
}
