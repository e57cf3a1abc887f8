// SPDX-License-Identifier: MIT OR Apache-2.0
//! WAITs that last as long as their job, whatever happens to the process meanwhile; and epoll.

use super::jobs::ring;
use crate::guest::call::{self, JOB_TIME, Job, NODE, events, open_raw};
use anyhow::{Context, Result, anyhow, bail, ensure};
use farfault::arena::{Backing, Call, Region, call_at};
use farfault::{
    Gpu, PAGE_SIZE,
    uapi::{self, JobStatus},
};
use rustix::{
    event::{PollFlags, Timespec, epoll},
    fd::{AsFd, OwnedFd},
    io::Errno,
    process::{Signal, getpid, kill_process},
};
use std::{
    process::{Child, Command},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

group! { "jobs", on Small, seconds 60:
    wait_of_any_length_ends_with_its_job_or_by_a_handled_signal,
    wait_interrupted_at_its_end_has_no_time_left,
    epoll_added_while_a_job_has_ended_wakes_for_the_next,
    epoll_added_before_the_first_call_wakes_for_a_job,
}

/// Sends these signals to this process, some time between them.
fn send(signals: &[&str]) -> Result<Child> {
    let pid = std::process::id();
    let lines = signals
        .iter()
        .map(|signal| format!("sleep 0.2; kill -{signal} {pid}"));
    let script = lines.collect::<Vec<_>>().join("; ");
    Ok(Command::new("/bin/sh").args(["-c", &script]).spawn()?)
}

/// Without a limit, with one whose milliseconds have 33 bits, and with the longest there is.
fn wait_of_any_length_ends_with_its_job_or_by_a_handled_signal() -> Result<()> {
    const MILLISECOND: i64 = 1_000_000;
    const STOPS: [&str; 4] = ["STOP", "CONT", "STOP", "CONT"];
    let handled = Arc::new(AtomicBool::new(false));
    signal_hook::flag::register(signal_hook::consts::SIGUSR1, handled)?;
    let gpu = Gpu::open_first()?;
    // The structure of the call: the job, the time, the result and so on.
    let wait = Region::map(PAGE_SIZE, Backing::Small)?;
    let again = || call_at(&gpu, uapi::Wait::NUMBER, wait.address());
    for timeout in [-1, i64::MIN, (1 << 32) * MILLISECOND, i64::MAX] {
        let fence = Job::endless(ring()?).submit(&gpu)?;
        wait.store(0, fence);
        wait.store(1, timeout as u64);
        let mut sender = send(&[STOPS.as_slice(), &["USR1"]].concat())?;
        let waited = again();
        ensure!(waited == Err(Errno::INTR), "{timeout}: {waited:?}");
        sender.wait()?;
        let left = wait.load(1) as i64;
        if timeout < 0 {
            ensure!(left < 0, "{left} is left of no limit");
        } else {
            let least = timeout - JOB_TIME.as_nanos() as i64;
            ensure!(
                (least..timeout).contains(&left),
                "{left} is left of {timeout}"
            );
        }
        // For the rest of it, as a program would.
        let waited = thread::scope(|scope| {
            let killer = scope.spawn(|| -> Result<()> {
                send(&STOPS)?.wait()?;
                Ok(call::kill(&gpu, fence)?)
            });
            let waited = again();
            killer.join().map_err(|_| anyhow!("a thread panicked"))??;
            Ok::<_, anyhow::Error>(waited)
        })?;
        waited.with_context(|| format!("WAIT for what is left of {timeout}"))?;
        let status = wait.load(4) as u32;
        ensure!(
            wait.load(0) == fence && status == JobStatus::Killed.raw(),
            "{timeout}: the job ended with {status}"
        );
    }
    Ok(())
}

/// Less than none would be no limit.
fn wait_interrupted_at_its_end_has_no_time_left() -> Result<()> {
    const INTERRUPTED: usize = 20;
    const LIMIT: Duration = Duration::from_secs(20);
    let handled = Arc::new(AtomicBool::new(false));
    signal_hook::flag::register(signal_hook::consts::SIGUSR1, handled)?;
    let gpu = Gpu::open_first()?;
    let fence = Job::endless(ring()?).submit(&gpu)?;
    let wait = Region::map(PAGE_SIZE, Backing::Small)?;
    let done = AtomicBool::new(false);
    let sender = || -> Result<()> {
        while !done.load(Ordering::Relaxed) {
            kill_process(getpid(), Signal::USR1)?;
            thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    };
    thread::scope(|scope| {
        let sender = scope.spawn(sender);
        let begin = Instant::now();
        let mut interrupted = 0;
        let mut waits = || -> Result<()> {
            while interrupted < INTERRUPTED {
                ensure!(
                    begin.elapsed() < LIMIT,
                    "{interrupted} WAITs were interrupted"
                );
                wait.store(0, fence);
                wait.store(1, 1);
                match call_at(&gpu, uapi::Wait::NUMBER, wait.address()) {
                    Err(Errno::TIMEDOUT) => continue,
                    Err(Errno::INTR) => interrupted += 1,
                    other => bail!("WAIT gave {other:?}"),
                }
                let left = wait.load(1) as i64;
                ensure!((0..=1).contains(&left), "{left} ns are left of one");
            }
            Ok(())
        };
        let waited = waits();
        done.store(true, Ordering::Relaxed);
        sender.join().map_err(|_| anyhow!("a thread panicked"))??;
        waited
    })?;
    Ok(call::kill(&gpu, fence)?)
}

/// Whether there is an event within a time.
fn is_woken(epoll: impl AsFd, within: Duration) -> Result<bool> {
    let mut events = Vec::with_capacity(1);
    let within = Timespec::try_from(within)?;
    epoll::wait(
        epoll,
        rustix::buffer::spare_capacity(&mut events),
        Some(&within),
    )?;
    Ok(!events.is_empty())
}

fn epoll_of(gpu: impl AsFd, flags: epoll::EventFlags) -> Result<OwnedFd> {
    let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    let data = epoll::EventData::new_u64(0);
    epoll::add(&epoll, gpu, data, epoll::EventFlags::IN | flags)?;
    Ok(epoll)
}

/// It asks for a file's wait queue when the file is added, and never again.
fn epoll_added_while_a_job_has_ended_wakes_for_the_next() -> Result<()> {
    let gpu = Gpu::open_first()?;
    let ring = ring()?;
    for edge in [epoll::EventFlags::empty(), epoll::EventFlags::ET] {
        let ended = Job::fill(ring, 0).submit(&gpu)?;
        ensure!(events(&gpu, JOB_TIME)? == PollFlags::IN);
        let epoll = epoll_of(&gpu, edge)?;
        ensure!(is_woken(&epoll, Duration::ZERO)?, "{edge:?}: has ended");
        call::wait(&gpu, ended, JOB_TIME)?;
        ensure!(!is_woken(&epoll, Duration::ZERO)?, "{edge:?}: collected");
        for round in 0..2 {
            let next = Job::fill(ring, 0).submit(&gpu)?;
            ensure!(is_woken(&epoll, JOB_TIME)?, "{edge:?}, round {round}");
            call::wait(&gpu, next, JOB_TIME)?;
        }
    }
    Ok(())
}

fn epoll_added_before_the_first_call_wakes_for_a_job() -> Result<()> {
    let ring = ring()?;
    for _ in 0..2 {
        let gpu = open_raw(NODE)?;
        let epoll = epoll_of(&gpu, epoll::EventFlags::empty())?;
        ensure!(!is_woken(&epoll, Duration::ZERO)?, "nothing has ended");
        let job = Job::fill(ring, 0).submit(&gpu)?;
        ensure!(is_woken(&epoll, JOB_TIME)?, "it has ended");
        call::wait(&gpu, job, JOB_TIME)?;
        ensure!(!is_woken(&epoll, Duration::ZERO)?, "it was collected");
    }
    Ok(())
}
