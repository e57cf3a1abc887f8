// SPDX-License-Identifier: MIT OR Apache-2.0
//! The life of a job: started, waited for, polled, killed, collected.

use crate::guest::{
    call::{self, JOB_TIME, Job, events},
    cases::mm::start::spin,
    oracle,
};
use anyhow::{Context, Result, anyhow, ensure};
use farfault::arena::{Backing, Call, Region, call_at};
use farfault::{
    Gpu, PAGE_SIZE,
    uapi::{self, JobStatus},
};
use rustix::{event::PollFlags, io::Errno};
use std::{
    collections::HashSet,
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

group! { "jobs", on Small, seconds 60:
    wait_for_an_endless_job_times_out_when_it_should,
    wait_times_out_when_it_should_while_other_jobs_end,
    wait_for_unknown_jobs_is_enoent,
    wait_for_any_gives_each_job_once,
    wait_interrupted_by_a_signal_is_eintr_and_the_job_goes_on,
    wait_goes_on_for_the_rest_of_its_time_when_the_process_was_stopped,
    poll_is_ready_while_a_job_is_not_collected,
    poll_wakes_when_a_job_ends,
    kill_ends_an_endless_job_and_no_other,
    kill_of_an_ended_job_changes_nothing,
    kill_of_unknown_jobs_is_enoent,
    too_many_uncollected_jobs_are_eagain_until_one_is_collected,
    kill_at_any_moment_of_a_short_job_ends_it_once,
    refused_jobs_are_forgotten,
    endless_jobs_do_not_stop_others,
    many_jobs_of_many_threads_all_end_well,
    one_job_waited_for_by_many_threads_is_collected_once,
    fences_are_never_zero_nor_used_twice,
    stats_after_a_wait_have_its_job,
}

pub(super) fn ring() -> Result<Region> {
    Ok(Region::map(4 * PAGE_SIZE, Backing::Small)?)
}

fn some_memory() -> Result<Region> {
    let region = Region::map(4 * PAGE_SIZE, Backing::Small)?;
    oracle::write(region, 1);
    Ok(region)
}

fn killed(gpu: &Gpu, fence: u64) -> Result<()> {
    call::kill(gpu, fence)?;
    let end = call::wait(gpu, fence, JOB_TIME)?;
    call::ensure_status(&end, JobStatus::Killed)
}

fn wait_for_an_endless_job_times_out_when_it_should() -> Result<()> {
    let gpu = Gpu::open_first()?;
    let fence = Job::endless(ring()?).submit(&gpu)?;
    for name in [fence, 0] {
        for milliseconds in [0, 1, 300] {
            let begin = Instant::now();
            let timeout = Duration::from_millis(milliseconds);
            let wait = call::wait(&gpu, name, timeout);
            ensure!(wait == Err(Errno::TIMEDOUT), "{wait:?}");
            let took = begin.elapsed();
            ensure!(took >= timeout, "{took:?} of {timeout:?}");
            ensure!(took < timeout + Duration::from_secs(5), "{took:?}");
        }
    }
    killed(&gpu, fence)
}

fn wait_for_unknown_jobs_is_enoent() -> Result<()> {
    let gpu = Gpu::open_first()?;
    let other = Gpu::open_first()?;
    let fence = Job::sum(some_memory()?).submit(&gpu)?;
    for unknown in [fence + 1, fence + 1000, u64::MAX] {
        let wait = call::wait(&gpu, unknown, JOB_TIME);
        ensure!(wait == Err(Errno::NOENT), "{unknown}: {wait:?}");
    }
    let of_other = call::wait(&other, fence, JOB_TIME);
    ensure!(of_other == Err(Errno::NOENT), "{of_other:?}");
    call::wait(&gpu, fence, JOB_TIME)?;
    for collected in [fence, 0] {
        let wait = call::wait(&gpu, collected, JOB_TIME);
        ensure!(wait == Err(Errno::NOENT), "{collected}: {wait:?}");
    }
    Ok(())
}

fn wait_for_any_gives_each_job_once() -> Result<()> {
    let gpu = Gpu::open_first()?;
    let region = some_memory()?;
    let word = region.address();
    let fences = (0..20)
        .map(|_| Job::atomic_add(word, 1, 1).submit(&gpu))
        .collect::<Result<HashSet<_>, _>>()?;
    let mut collected = HashSet::new();
    for _ in 0..fences.len() {
        let end = call::wait(&gpu, 0, JOB_TIME)?;
        call::ensure_status(&end, JobStatus::Ok)?;
        ensure!(collected.insert(end.fence), "{} twice", end.fence);
    }
    ensure!(collected == fences);
    ensure!(call::wait(&gpu, 0, JOB_TIME) == Err(Errno::NOENT));
    ensure!(region.load(0) == oracle::word(1, 0).wrapping_add(20));
    Ok(())
}

fn wait_interrupted_by_a_signal_is_eintr_and_the_job_goes_on() -> Result<()> {
    const TIMEOUT: Duration = Duration::from_secs(20);
    const SENT_AFTER: Duration = Duration::from_millis(300);
    let signalled = Arc::new(AtomicBool::new(false));
    signal_hook::flag::register(signal_hook::consts::SIGUSR1, Arc::clone(&signalled))?;
    let gpu = Gpu::open_first()?;
    // The structure of the call, whose second word is the time.
    let wait = Region::map(PAGE_SIZE, Backing::Small)?;
    let fence = Job::endless(ring()?).submit(&gpu)?;
    for name in [fence, 0] {
        let script = format!(
            "sleep {}; kill -USR1 {}",
            SENT_AFTER.as_secs_f32(),
            std::process::id()
        );
        let mut sender = Command::new("/bin/sh").args(["-c", &script]).spawn()?;
        let begin = Instant::now();
        wait.store(0, name);
        wait.store(1, TIMEOUT.as_nanos() as u64);
        let waited = call_at(&gpu, uapi::Wait::NUMBER, wait.address());
        let took = begin.elapsed();
        ensure!(waited == Err(Errno::INTR), "{waited:?} after {took:?}");
        sender.wait()?;
        let left = Duration::from_nanos(wait.load(1));
        ensure!(
            left + SENT_AFTER / 2 <= TIMEOUT && left + took >= TIMEOUT,
            "{left:?} is left of {TIMEOUT:?} after {took:?}"
        );
    }
    ensure!(signalled.load(std::sync::atomic::Ordering::SeqCst));
    ensure!(call::wait(&gpu, fence, Duration::ZERO) == Err(Errno::TIMEDOUT));
    killed(&gpu, fence)
}

fn wait_goes_on_for_the_rest_of_its_time_when_the_process_was_stopped() -> Result<()> {
    let gpu = Gpu::open_first()?;
    let fence = Job::endless(ring()?).submit(&gpu)?;
    let timeout = Duration::from_secs(2);
    for name in [fence, 0] {
        let pid = std::process::id();
        // If each began all of the time anew, it would last for more than twice as long.
        let script = format!(
            "for stop in $(seq 5); do sleep 0.5; kill -STOP {pid}; sleep 0.1; kill -CONT {pid}; done"
        );
        let mut stopper = Command::new("/bin/sh").args(["-c", &script]).spawn()?;
        let begin = Instant::now();
        let wait = call::wait(&gpu, name, timeout);
        let took = begin.elapsed();
        ensure!(wait == Err(Errno::TIMEDOUT), "{wait:?} after {took:?}");
        ensure!(took >= timeout && took < 2 * timeout, "{took:?}");
        stopper.wait()?;
    }
    killed(&gpu, fence)
}

fn poll_is_ready_while_a_job_is_not_collected() -> Result<()> {
    let gpu = Gpu::open_first()?;
    let now = Duration::ZERO;
    ensure!(events(&gpu, now)?.is_empty());
    let endless = Job::endless(ring()?).submit(&gpu)?;
    ensure!(
        events(&gpu, now)?.is_empty(),
        "ready while the only job runs"
    );
    let sum = Job::sum(some_memory()?).submit(&gpu)?;
    ensure!(events(&gpu, JOB_TIME)? == PollFlags::IN);
    ensure!(
        events(&gpu, now)? == PollFlags::IN,
        "looking has changed it"
    );
    call::wait(&gpu, sum, now)?;
    ensure!(events(&gpu, now)?.is_empty(), "ready when all is collected");
    killed(&gpu, endless)
}

fn poll_wakes_when_a_job_ends() -> Result<()> {
    let gpu = Gpu::open_first()?;
    let fence = Job::endless(ring()?).submit(&gpu)?;
    std::thread::scope(|scope| -> Result<()> {
        let poller = scope.spawn(|| events(&gpu, JOB_TIME));
        std::thread::sleep(Duration::from_millis(200));
        ensure!(!poller.is_finished(), "it did not wait");
        call::kill(&gpu, fence)?;
        let woken = poller.join().map_err(|_| anyhow::anyhow!("panicked"))??;
        ensure!(woken == PollFlags::IN, "{woken:?}");
        Ok(())
    })?;
    let end = call::wait(&gpu, fence, Duration::ZERO)?;
    call::ensure_status(&end, JobStatus::Killed)
}

fn kill_ends_an_endless_job_and_no_other() -> Result<()> {
    let gpu = Gpu::open_first()?;
    let fences = (0..4)
        .map(|_| Ok(Job::endless(ring()?).submit(&gpu)?))
        .collect::<Result<Vec<_>>>()?;
    for (index, fence) in fences.iter().enumerate() {
        killed(&gpu, *fence)?;
        for running in &fences[index + 1..] {
            let wait = call::wait(&gpu, *running, Duration::ZERO);
            ensure!(wait == Err(Errno::TIMEDOUT), "{wait:?}");
        }
    }
    Ok(())
}

fn kill_of_an_ended_job_changes_nothing() -> Result<()> {
    let gpu = Gpu::open_first()?;
    let region = some_memory()?;
    let fence = Job::sum(region).submit(&gpu)?;
    ensure!(events(&gpu, JOB_TIME)? == PollFlags::IN);
    call::kill(&gpu, fence)?;
    let end = call::wait(&gpu, fence, JOB_TIME)?;
    call::ensure_status(&end, JobStatus::Ok)?;
    ensure!(end.result == oracle::expected_sum(region, 1, 0));
    Ok(())
}

fn kill_of_unknown_jobs_is_enoent() -> Result<()> {
    let gpu = Gpu::open_first()?;
    let fence = Job::sum(some_memory()?).submit(&gpu)?;
    call::wait(&gpu, fence, JOB_TIME)?;
    for unknown in [0, fence, fence + 1, u64::MAX] {
        let kill = call::kill(&gpu, unknown);
        ensure!(kill == Err(Errno::NOENT), "{unknown}: {kill:?}");
    }
    Ok(())
}

fn too_many_uncollected_jobs_are_eagain_until_one_is_collected() -> Result<()> {
    let gpu = Gpu::open_first()?;
    let job = Job::sum(some_memory()?);
    let most = gpu.info().max_jobs as usize;
    let submit_all = |count: usize| -> Result<Vec<u64>> {
        let mut fences = Vec::new();
        let deadline = Instant::now() + JOB_TIME;
        while fences.len() < count {
            match job.submit(&gpu) {
                Ok(fence) => fences.push(fence),
                // The GPU itself may have no room for a while, until jobs have ended.
                Err(Errno::AGAIN) => std::thread::sleep(Duration::from_millis(1)),
                Err(errno) => anyhow::bail!("SUBMIT: {errno:?}"),
            }
            ensure!(Instant::now() < deadline, "only {} of {most}", fences.len());
        }
        Ok(fences)
    };
    let fences = submit_all(most)?;
    ensure!(job.submit(&gpu) == Err(Errno::AGAIN));
    call::wait(&gpu, fences[0], JOB_TIME)?;
    let last = submit_all(1)?;
    ensure!(job.submit(&gpu) == Err(Errno::AGAIN));
    for fence in fences[1..].iter().chain(&last) {
        let end = call::wait(&gpu, *fence, JOB_TIME)?;
        call::ensure_status(&end, JobStatus::Ok)?;
    }
    job.run(&gpu).map(drop)
}

/// The device has no room for so many waves.
fn refused_jobs_are_forgotten() -> Result<()> {
    let gpu = Gpu::open_first()?;
    let region = Region::map(PAGE_SIZE, Backing::Small)?;
    let endless = Job::atomic_add(region.address(), 1, u64::MAX).waves(256);
    let mut fences = Vec::new();
    let refused = loop {
        match endless.submit(&gpu) {
            Ok(fence) => fences.push(fence),
            Err(errno) => break errno,
        }
        ensure!(fences.len() < 64, "the device takes them all");
    };
    ensure!(refused == Errno::AGAIN, "{refused:?}");
    fences
        .into_iter()
        .try_for_each(|fence| killed(&gpu, fence))?;
    let left = call::wait(&gpu, 0, Duration::ZERO);
    ensure!(left == Err(Errno::NOENT), "{left:?}");
    Ok(())
}

fn endless_jobs_do_not_stop_others() -> Result<()> {
    let gpu = Gpu::open_first()?;
    let endless = (0..8)
        .map(|_| Ok(Job::endless(ring()?).submit(&gpu)?))
        .collect::<Result<Vec<_>>>()?;
    let region = some_memory()?;
    for round in 1..=10 {
        Job::add(region, 1).run(&gpu)?;
        oracle::check(region, 1, round)?;
    }
    endless
        .into_iter()
        .try_for_each(|fence| killed(&gpu, fence))
}

fn many_jobs_of_many_threads_all_end_well() -> Result<()> {
    const THREADS: u64 = 6;
    const JOBS: u64 = 40;
    let gpu = Gpu::open_first()?;
    let shared = Region::map(PAGE_SIZE, Backing::Small)?;
    std::thread::scope(|scope| -> Result<()> {
        let threads: Vec<_> = (0..THREADS)
            .map(|_| {
                let gpu = &gpu;
                scope.spawn(move || -> Result<()> {
                    let own = some_memory()?;
                    for round in 1..=JOBS {
                        let count = Job::atomic_add(shared.address(), 1, 2);
                        let count = count.waves(4).submit(gpu)?;
                        Job::add(own, 1).waves(2).run(gpu)?;
                        if round % 8 == 0 {
                            oracle::check(own, 1, round)?;
                        }
                        let end = call::wait(gpu, count, JOB_TIME)?;
                        call::ensure_status(&end, JobStatus::Ok)?;
                    }
                    Ok(())
                })
            })
            .collect();
        for thread in threads {
            thread.join().map_err(|_| anyhow::anyhow!("panicked"))??;
        }
        Ok(())
    })?;
    ensure!(shared.load(0) == THREADS * JOBS * 8, "{}", shared.load(0));
    Ok(())
}

fn one_job_waited_for_by_many_threads_is_collected_once() -> Result<()> {
    let gpu = Gpu::open_first()?;
    let fence = Job::endless(ring()?).submit(&gpu)?;
    let results = std::thread::scope(|scope| {
        let waiters: Vec<_> = (0..4)
            .map(|_| scope.spawn(|| call::wait(&gpu, fence, JOB_TIME)))
            .collect();
        std::thread::sleep(Duration::from_millis(200));
        let killed = call::kill(&gpu, fence);
        let results: Vec<_> = waiters.into_iter().map(|waiter| waiter.join()).collect();
        killed.map(|()| results)
    })?;
    let (mut collected, mut missed) = (0, 0);
    for result in results {
        match result.map_err(|_| anyhow::anyhow!("panicked"))? {
            Ok(end) => {
                call::ensure_status(&end, JobStatus::Killed)?;
                collected += 1;
            }
            Err(Errno::NOENT) => missed += 1,
            Err(errno) => anyhow::bail!("WAIT: {errno:?}"),
        }
    }
    ensure!((collected, missed) == (1, 3));
    Ok(())
}

fn fences_are_never_zero_nor_used_twice() -> Result<()> {
    let gpu = Gpu::open_first()?;
    let job = Job::sum(some_memory()?.part(0, PAGE_SIZE));
    let mut seen = HashSet::from([0]);
    for _ in 0..500 {
        let fence = job.submit(&gpu)?;
        ensure!(seen.insert(fence), "{fence} again");
        call::wait(&gpu, fence, JOB_TIME)?;
    }
    Ok(())
}

fn stats_after_a_wait_have_its_job() -> Result<()> {
    let gpu = Gpu::open_first()?;
    let region = some_memory()?;
    for jobs in 1..=300 {
        Job::sum(region).run(&gpu)?;
        let counted = gpu.stats()?.jobs;
        ensure!(counted == jobs, "{counted} jobs are counted after {jobs}");
    }
    Ok(())
}

/// Each end of a job wakes all who wait: that is no reason to begin anew.
fn wait_times_out_when_it_should_while_other_jobs_end() -> Result<()> {
    const TIMEOUT: Duration = Duration::from_millis(400);
    const MOST: Duration = Duration::from_secs(20);
    let gpu = Gpu::open_first()?;
    let endless = Job::endless(Region::map(PAGE_SIZE, Backing::Small)?).submit(&gpu)?;
    let word = Region::map(PAGE_SIZE, Backing::Small)?;
    let stop = AtomicBool::new(false);
    let (waited, took, ended) = std::thread::scope(|scope| {
        let others = scope.spawn(|| -> Result<u32> {
            let mut ended = 0;
            let begin = Instant::now();
            while !stop.load(Ordering::Relaxed) && begin.elapsed() < MOST {
                Job::sum(word).run(&gpu)?;
                ended += 1;
            }
            Ok(ended)
        });
        let begin = Instant::now();
        let waited = call::wait(&gpu, endless, TIMEOUT).map(drop);
        let took = begin.elapsed();
        stop.store(true, Ordering::Relaxed);
        (waited, took, others.join())
    });
    let ended = ended.map_err(|_| anyhow!("a thread panicked"))??;
    ensure!(waited == Err(Errno::TIMEDOUT), "{waited:?}");
    ensure!(ended > 2, "only {ended} jobs ended meanwhile");
    ensure!(took >= TIMEOUT && took < MOST / 2, "it took {took:?}");
    call::kill(&gpu, endless)?;
    Ok(())
}

/// Before the device has it, while it runs, when it has ended and the driver does not know, and after that.
fn kill_at_any_moment_of_a_short_job_ends_it_once() -> Result<()> {
    const JOBS: u64 = 400;
    let gpu = Gpu::open_first()?;
    let word = Region::map(PAGE_SIZE, Backing::Small)?;
    let (mut ended, mut killed) = (0, 0);
    for round in 0..JOBS {
        let fence = Job::atomic_add(word.address(), 1, 1).submit(&gpu)?;
        spin(Duration::from_micros(5 * (round % 40)));
        call::kill(&gpu, fence).with_context(|| format!("KILL, round {round}"))?;
        let end = call::wait(&gpu, fence, JOB_TIME)?;
        if end.status == JobStatus::Ok.raw() {
            ended += 1;
        } else {
            call::ensure_status(&end, JobStatus::Killed)?;
            killed += 1;
        }
        let again = call::kill(&gpu, fence);
        ensure!(again == Err(Errno::NOENT), "KILL after WAIT: {again:?}");
    }
    println!("{ended} jobs came to their end, {killed} were killed");
    // A job that was killed may have added before.
    let added = word.load(0);
    ensure!(added >= ended && added <= JOBS, "{added} were added");
    Ok(())
}
