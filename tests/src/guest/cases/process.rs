// SPDX-License-Identifier: MIT OR Apache-2.0
//! Processes that end: by exit, exec or SIGKILL, with pages in VRAM, jobs that run, faults and
//! migrations on their way. They end in time, and leave a GPU that works with all of its VRAM.

use crate::guest::{
    VRAM,
    call::{self, Job, NODE},
    cases::mm::start::eventually,
    child::code,
    oracle,
    place::{driver_count, ensure_place, move_all},
    programs,
};
use anyhow::{Context, Result, anyhow, bail, ensure};
use farfault::arena::{Backing, Region};
use farfault::{
    Advice, Gpu, HUGE_PAGE_SIZE, Place,
    process::{Ended, fork},
    uapi::{self, JobStatus},
};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{Signal, kill_process},
};
use signal_hook::consts::SIGUSR1;
use std::{
    fs,
    process::{Command, Stdio},
    sync::{
        Arc, Barrier,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

group! { "process", on Small, seconds 90:
    exit_with_pages_in_vram_gives_it_all_back,
    exit_with_an_endless_job_ends_in_time,
    exec_with_pages_in_vram_gives_it_all_back,
    close_with_an_endless_job_ends_in_time,
    close_with_a_job_of_all_waves_gives_them_back,
    close_with_pages_in_vram_leaves_the_data,
    pages_of_a_new_descriptor_stay_while_those_of_a_closed_one_go_home,
    new_descriptor_knows_nothing_of_what_a_closed_one_had_mapped,
    kill_during_faults_ends_in_time,
    kill_during_migration_ends_in_time,
    kill_during_eviction_ends_in_time,
    kill_during_a_migration_of_what_was_never_touched_ends_in_time,
    reopening_many_times_works,
    opening_many_times_without_a_call_works,
    first_calls_under_signals_all_work_and_use_up_no_context,
    calls_of_a_process_that_handles_signals_are_not_cut_short,
    first_calls_of_many_threads_at_once_all_work,
}

const SEED: u64 = 0xe817;
const END: Duration = Duration::from_secs(20);

/// Starts a program of ours, as a process of its own.
fn start(program: &str) -> Result<std::process::Child> {
    let mut command = Command::new("/proc/self/exe");
    command
        .arg(program)
        .stdin(Stdio::null())
        .stdout(Stdio::piped());
    Ok(command.spawn()?)
}

/// Waits until a program says its first word, which is that it is at work.
fn wait_until_at_work(child: &std::process::Child) -> Result<()> {
    let stdout = child.stdout.as_ref().context("it has no standard output")?;
    let mut descriptors = [PollFd::new(stdout, PollFlags::IN)];
    poll(&mut descriptors, Some(&Timespec::try_from(END)?))?;
    ensure!(
        descriptors[0].revents().contains(PollFlags::IN),
        "it is not at work after {END:?}"
    );
    Ok(())
}

/// Waits for the end of a process, but not for ever.
fn end_of(child: &mut std::process::Child) -> Result<std::process::ExitStatus> {
    let deadline = Instant::now() + END;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        if Instant::now() >= deadline {
            let stack = fs::read_to_string(format!("/proc/{}/stack", child.id()));
            bail!("the process has not ended in {END:?}; it is at {stack:?}");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Most of the VRAM can be had.
fn ensure_gpu_is_well() -> Result<()> {
    let gpu = Gpu::open_first()?;
    let region = Region::map(VRAM as usize * 3 / 4, Backing::Huge)?;
    for block in 0..region.length() / HUGE_PAGE_SIZE {
        region.store(block * HUGE_PAGE_SIZE / 8, block as u64);
    }
    Job::add(region, 1).waves(8).run(&gpu)?;
    ensure_place(&gpu, region, Place::Vram)?;
    ensure!(region.load(HUGE_PAGE_SIZE / 8) == 2);
    Ok(region.unmap()?)
}

fn run_to_end(program: &str) -> Result<()> {
    let mut child = start(program)?;
    let status = end_of(&mut child)?;
    ensure!(status.success(), "{program}: {status}");
    Ok(())
}

fn exit_with_pages_in_vram_gives_it_all_back() -> Result<()> {
    for _ in 0..4 {
        run_to_end(programs::EXIT_WITH_PAGES)?;
        ensure_gpu_is_well()?;
    }
    Ok(())
}

fn exit_with_an_endless_job_ends_in_time() -> Result<()> {
    for _ in 0..4 {
        run_to_end(programs::EXIT_WITH_JOB)?;
        ensure_gpu_is_well()?;
    }
    Ok(())
}

fn exec_with_pages_in_vram_gives_it_all_back() -> Result<()> {
    for _ in 0..4 {
        run_to_end(programs::EXEC_WITH_PAGES)?;
        ensure_gpu_is_well()?;
    }
    Ok(())
}

fn close_with_an_endless_job_ends_in_time() -> Result<()> {
    let ring = Region::map(8 * HUGE_PAGE_SIZE, Backing::Huge)?;
    for _ in 0..4 {
        let gpu = Gpu::open_first()?;
        Job::endless(ring).submit(&gpu)?;
        let begin = Instant::now();
        drop(gpu);
        ensure!(begin.elapsed() < END, "it took {:?}", begin.elapsed());
    }
    Ok(())
}

fn close_with_pages_in_vram_leaves_the_data() -> Result<()> {
    for backing in [Backing::Small, Backing::Huge] {
        let gpu = Gpu::open_first()?;
        let region = Region::map(2 * HUGE_PAGE_SIZE, backing)?;
        oracle::write(region, SEED);
        move_all(&gpu, region, Place::Vram)?;
        Job::add(region, 1).waves(4).run(&gpu)?;
        drop(gpu);
        // One half by the CPU, one half by another descriptor.
        oracle::check_part(region.part(0, HUGE_PAGE_SIZE), SEED, 0, 1)?;
        let gpu = Gpu::open_first()?;
        let other = region.part(HUGE_PAGE_SIZE, HUGE_PAGE_SIZE);
        let first = HUGE_PAGE_SIZE / 8;
        Job::add(other, 1).waves(4).run(&gpu)?;
        drop(gpu);
        oracle::check_part(other, SEED, first, 2)?;
    }
    Ok(())
}

/// Kills a program of ours at several moments of its work.
fn kill_during(program: &str) -> Result<()> {
    for round in 0..8 {
        let mut child = start(program)?;
        // From before it has opened the GPU to long after, and at work for certain in every other round.
        if round % 2 == 1 {
            wait_until_at_work(&child)?;
        }
        let wait = 5 + oracle::word(SEED, round) % (40 * (round as u64 + 1));
        std::thread::sleep(Duration::from_millis(wait));
        ensure!(child.try_wait()?.is_none(), "{program} has ended by itself");
        child.kill()?;
        end_of(&mut child).with_context(|| format!("killed after {wait} ms"))?;
    }
    ensure_gpu_is_well()
}

fn kill_during_faults_ends_in_time() -> Result<()> {
    kill_during(programs::FAULT_FOR_EVER)
}

fn kill_during_migration_ends_in_time() -> Result<()> {
    kill_during(programs::MIGRATE_FOR_EVER)
}

fn kill_during_eviction_ends_in_time() -> Result<()> {
    kill_during(programs::EVICT_FOR_EVER)
}

/// So much that nobody could wait for its end. What does not fit into VRAM any more goes to RAM for the rest.
fn kill_during_a_migration_of_what_was_never_touched_ends_in_time() -> Result<()> {
    const LENGTH: usize = 64 << 30;
    let before = driver_count(0, "pages_to_vram")?;
    let child = fork(|| {
        code((|| {
            let gpu = Gpu::open_first()?;
            let region = Region::reserve(LENGTH)?;
            gpu.migrate(region.pages(), Place::Vram)?;
            Ok(())
        })())
    })?;
    eventually("pages move", || {
        Ok(driver_count(0, "pages_to_vram")? != before)
    })?;
    let begin = Instant::now();
    kill_process(child.pid().context("the child has no pid")?, Signal::KILL)?;
    let ended = child.wait()?;
    let took = begin.elapsed();
    ensure!(
        matches!(ended, Ended::Signaled(_)) && took < END,
        "{ended:?} after {took:?}"
    );
    ensure_gpu_is_well()
}

fn reopening_many_times_works() -> Result<()> {
    let region = Region::map(HUGE_PAGE_SIZE, Backing::Small)?;
    oracle::write(region, SEED);
    for round in 0..50 {
        let gpu = Gpu::open_first()?;
        let part = region.part(round * 8 * 4096, 8 * 4096);
        let end = Job::add(part, 1).end(&gpu)?;
        call::ensure_status(&end, JobStatus::Ok)?;
    }
    oracle::check_part(region.part(0, 50 * 8 * 4096), SEED, 0, 1)
}

/// The device never hears of them.
fn opening_many_times_without_a_call_works() -> Result<()> {
    for round in 0..200 {
        let opened = fs::File::open(NODE);
        drop(opened.with_context(|| format!("round {round}"))?);
    }
    Ok(())
}

/// A signal can interrupt the making of an address space, which then begins anew: the process does not see it.
fn first_calls_under_signals_all_work_and_use_up_no_context() -> Result<()> {
    const CHILDREN: usize = 60;
    let lowest = || -> Result<u32> { Ok(Gpu::open_first()?.info().context) };
    let before = lowest()?;
    let handled = Arc::new(AtomicBool::new(false));
    signal_hook::flag::register(SIGUSR1, handled)?;
    let deadline = Instant::now() + END;
    for round in 0..CHILDREN {
        // The first call of a process can be interrupted so, and no other.
        let child = fork(|| code(Gpu::open_first().map(drop).map_err(Into::into)))?;
        let pid = child.pid().context("the child has no pid")?;
        // Until the child is no more.
        let other = fork(|| {
            while Instant::now() < deadline && kill_process(pid, Signal::USR1).is_ok() {}
            0
        })?;
        let ended = child.wait()?;
        other.wait()?;
        ensure!(ended == Ended::Exited(0), "round {round}: {ended:?}");
    }
    let after = lowest()?;
    ensure!(
        after == before,
        "the next context is {after}, and was {before}"
    );
    Ok(())
}

/// The first call makes the address space known to the device.
fn first_calls_of_many_threads_at_once_all_work() -> Result<()> {
    const THREADS: usize = 4;
    for round in 0..40 {
        let file = call::open_raw(NODE)?;
        let barrier = Barrier::new(THREADS);
        let called = std::thread::scope(|scope| {
            let threads = [(); THREADS].map(|()| {
                scope.spawn(|| {
                    barrier.wait();
                    farfault::arena::call_at(&file, uapi::IOC_PING, 0)
                })
            });
            threads.map(|thread| thread.join())
        });
        for result in called {
            let result = result.map_err(|_| anyhow!("a thread panicked"))?;
            ensure!(result.is_ok(), "round {round}: {result:?}");
        }
    }
    Ok(())
}

fn close_with_a_job_of_all_waves_gives_them_back() -> Result<()> {
    let region = Region::map(HUGE_PAGE_SIZE, Backing::Small)?;
    for round in 0..3 {
        oracle::write(region, round);
        let gpu = Gpu::open_first()?;
        let waves = gpu.info().max_waves;
        let sum = Job::sum(region).waves(waves).run(&gpu)?;
        ensure!(sum == oracle::expected_sum(region, round, 0));
        Job::atomic_add(region.address(), 1, u64::MAX)
            .waves(waves)
            .submit(&gpu)?;
        drop(gpu);
    }
    Ok(())
}

/// Descriptors come and go, and so do their pages: each has its own, and they are not mixed up.
fn pages_of_a_new_descriptor_stay_while_those_of_a_closed_one_go_home() -> Result<()> {
    const TIME: Duration = Duration::from_secs(3);
    const ROUNDS: usize = 8;
    let much = Region::map(4 * HUGE_PAGE_SIZE, Backing::Small)?;
    let little = Region::map(HUGE_PAGE_SIZE / 4, Backing::Small)?;
    for region in [much, little] {
        oracle::write(region, SEED);
    }
    let end = Instant::now() + TIME;
    let stop = AtomicBool::new(false);
    let closes = || -> Result<()> {
        let mut closed = 0;
        while !stop.load(Ordering::Relaxed) || closed < ROUNDS {
            let gpu = Gpu::open_first()?;
            move_all(&gpu, much, Place::Vram)?;
            drop(gpu);
            closed += 1;
        }
        Ok(())
    };
    let mut rounds = 0;
    let mut opens = || -> Result<()> {
        while Instant::now() < end || rounds < ROUNDS {
            let gpu = Gpu::open_first()?;
            move_all(&gpu, little, Place::Vram)?;
            thread::sleep(Duration::from_millis(10));
            ensure_place(&gpu, little, Place::Vram)?;
            rounds += 1;
            drop(gpu);
            // The other may have the number next that this one had.
            thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    };
    thread::scope(|scope| {
        let closer = scope.spawn(closes);
        let opened = opens();
        stop.store(true, Ordering::Relaxed);
        closer.join().map_err(|_| anyhow!("a thread panicked"))??;
        opened
    })?;
    [much, little]
        .into_iter()
        .try_for_each(|region| oracle::check(region, SEED, 0))
}

/// The context has the number of the one before, by which the TLB knows its entries.
fn new_descriptor_knows_nothing_of_what_a_closed_one_had_mapped() -> Result<()> {
    for backing in [Backing::Small, Backing::Huge] {
        for place in [Place::Ram, Place::Vram] {
            let region = Region::map(HUGE_PAGE_SIZE, backing)?;
            let mut others = Vec::new();
            for seed in SEED..SEED + 4 {
                oracle::write(region, seed);
                let gpu = Gpu::open_first()?;
                gpu.advise(region.pages(), Advice::MapOnly)?;
                move_all(&gpu, region, place)?;
                for _ in 0..2 {
                    let sum = Job::sum(region).run(&gpu)?;
                    ensure!(
                        sum == oracle::expected_sum(region, seed, 0),
                        "{backing:?} in {place:?}: the GPU's sum"
                    );
                }
                drop(gpu);
                // Who asks next has the pages, with other words.
                region.discard()?;
                let other = Region::map(HUGE_PAGE_SIZE, backing)?;
                oracle::write(other, !seed);
                others.push(other);
            }
            for region in others.into_iter().chain([region]) {
                region.unmap()?;
            }
        }
    }
    Ok(())
}

/// A timer, a profiler: the signals that a process handles are no reason to give up what it asked for.
fn calls_of_a_process_that_handles_signals_are_not_cut_short() -> Result<()> {
    const TIME: Duration = Duration::from_secs(3);
    const ROUNDS: usize = 2;
    let handled = Arc::new(AtomicBool::new(false));
    signal_hook::flag::register(SIGUSR1, Arc::clone(&handled))?;
    let end = Instant::now() + TIME;
    let pid = rustix::process::getpid();
    let other = fork(|| {
        while kill_process(pid, Signal::USR1).is_ok() {
            thread::sleep(Duration::from_micros(200));
        }
        0
    })?;
    let gpu = Gpu::open_first()?;
    let mut regions = Vec::new();
    for backing in [Backing::Small, Backing::Huge] {
        let region = Region::map(2 * HUGE_PAGE_SIZE, backing)?;
        oracle::write(region, SEED);
        regions.push(region);
    }
    eventually("signals come", || Ok(handled.load(Ordering::Relaxed)))?;
    let mut rounds = 0;
    while Instant::now() < end || rounds < ROUNDS {
        handled.store(false, Ordering::Relaxed);
        for &region in &regions {
            move_all(&gpu, region, Place::Vram)?;
            move_all(&gpu, region, Place::Ram)?;
            gpu.make_exclusive(region.part(0, HUGE_PAGE_SIZE / 2).pages())?;
            oracle::check(region, SEED, 0)?;
        }
        let came = handled.load(Ordering::Relaxed);
        ensure!(came, "round {rounds}: no signal came");
        rounds += 1;
    }
    drop(other);
    Ok(())
}
