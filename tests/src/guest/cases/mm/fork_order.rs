// SPDX-License-Identifier: MIT OR Apache-2.0
//! Fork at any time: with a job running, with exits in every order, and the forks of another kind
//! (`vfork`, and a child that becomes another program). Exits while pages are still shared are in
//! [`super::fork_shared`].

use super::{
    family::{ORDERS, family},
    start::{
        At, SEED, START_SMALL_VRAM, STARTS, Start, each_start, ensure_sum, exercise, exercise_all,
        while_adding,
    },
};
use crate::guest::{
    call::{self, JOB_TIME, Job, ensure_status},
    child::code,
    oracle,
};
use anyhow::{Context, Result, ensure};
use farfault::arena::{Backing, Region};
use farfault::{
    Gpu, HUGE_PAGE_SIZE, PAGE_SIZE,
    process::{Ended, fork},
    uapi::JobStatus,
};
use rustix::pipe::pipe;
use std::{
    fs::File,
    io::{Read, Write},
    os::unix::process::CommandExt,
    process::{Command, Stdio},
    time::Duration,
};

group! { "mm::fork", gpus 1, seconds 60:
    write_entries_of_the_gpu_are_gone_while_pages_are_shared,
    job_that_adds_during_fork_never_writes_the_childs_page,
    job_that_writes_all_pages_during_fork_leaves_the_child_one_moment,
    exit_in_every_order_keeps_everybodys_data,
    many_children_of_one_page_each_have_their_own,
    vfork_and_exec_leave_the_parents_memory_alone,
    exec_in_a_child_with_a_gpu_gives_everything_back,
}

fn write_entries_of_the_gpu_are_gone_while_pages_are_shared() -> Result<()> {
    each_start(|gpu, region| {
        let (from_parent, to_child) = pipe()?;
        let child = fork(|| {
            code((|| {
                File::from(from_parent).read_exact(&mut [0])?;
                oracle::check(region, SEED, 0)
            })())
        })?;
        let writable = gpu.query(region.pages())?.iter().any(|page| page.gpu.write);
        ensure!(!writable, "the GPU may still write to shared pages");
        // It reads them, which makes read entries; these do not become write entries by themselves.
        ensure_sum(gpu, region, 0, 0)?;
        let writable = gpu.query(region.pages())?.iter().any(|page| page.gpu.write);
        ensure!(
            !writable,
            "the GPU may write to shared pages that it has read"
        );
        Job::add(region, 1).waves(2).run(gpu)?;
        File::from(to_child).write_all(&[1])?;
        ensure!(child.wait()? == Ended::Exited(0));
        exercise(gpu, region, 0, 1)
    })
}

fn job_that_adds_during_fork_never_writes_the_childs_page() -> Result<()> {
    for start in STARTS.iter().filter(|start| start.at != At::Half) {
        let gpu = Gpu::open_first()?;
        let region = start.region(&gpu, HUGE_PAGE_SIZE)?;
        region.store(0, 0);
        let fence = Job::atomic_add(region.address(), 1, u64::MAX).submit(&gpu)?;
        for _ in 0..4 {
            std::thread::sleep(Duration::from_millis(3));
            let child = fork(|| {
                let before = region.load(0);
                std::thread::sleep(Duration::from_millis(10));
                u8::from(region.load(0) != before)
            })?;
            ensure!(
                child.wait()? == Ended::Exited(0),
                "{start:?}: the child's page changed"
            );
        }
        super::start::eventually("the job goes on", || {
            let before = region.load(0);
            std::thread::sleep(Duration::from_millis(5));
            Ok(region.load(0) != before)
        })?;
        call::kill(&gpu, fence)?;
        ensure_status(&call::wait(&gpu, fence, JOB_TIME)?, JobStatus::Killed)?;
        region.unmap()?;
    }
    Ok(())
}

fn job_that_writes_all_pages_during_fork_leaves_the_child_one_moment() -> Result<()> {
    each_start(|gpu, region| {
        for round in 0..4u64 {
            let fork_now = || {
                std::thread::sleep(Duration::from_millis(round));
                Ok(fork(|| {
                    code((|| {
                        let word =
                            |index| region.load(index).wrapping_sub(oracle::word(SEED, index));
                        let first: Vec<u64> = (0..region.words()).map(word).collect();
                        let good = |&added: &u64| added == round || added == round + 1;
                        ensure!(first.iter().all(good), "a word nobody wrote");
                        let changed =
                            (0..region.words()).find(|&index| word(index) != first[index]);
                        ensure!(changed.is_none(), "word {changed:?} changed in the child");
                        Ok(())
                    })())
                })?)
            };
            let child = while_adding(gpu, region, fork_now)?;
            ensure!(child.wait()? == Ended::Exited(0), "round {round}");
        }
        exercise(gpu, region, 0, 4)
    })
}

/// The first turn of each makes the pages its own.
fn exit_in_every_order_keeps_everybodys_data() -> Result<()> {
    for order in ORDERS {
        for at in [At::Vram, At::Ram] {
            let start = Start {
                at,
                ..START_SMALL_VRAM
            };
            family(start, 64 * PAGE_SIZE, order, |gpu, region, turn| {
                let own = 10 * (turn.member as u64 + 1);
                match turn.before {
                    0 => Job::add(region, own).waves(2).run(gpu).map(drop),
                    before => exercise(gpu, region, 0, own + 2 * (before - 1)),
                }
            })
            .with_context(|| format!("{start:?}, {order:?}"))?;
        }
    }
    Ok(())
}

fn many_children_of_one_page_each_have_their_own() -> Result<()> {
    each_start(|gpu, region| {
        let children = (1..=4u64).map(|number| {
            fork(|| {
                code((|| {
                    let gpu = Gpu::open_first()?;
                    Job::add(region, number).waves(2).run(&gpu)?;
                    oracle::check(region, SEED, number)
                })())
            })
        });
        let children = children.collect::<Result<Vec<_>, _>>()?;
        for child in children {
            ensure!(child.wait()? == Ended::Exited(0));
        }
        exercise_all(gpu, region)
    })
}

/// This program, which lists its cases and ends.
fn other_program() -> Command {
    let mut command = Command::new("/proc/self/exe");
    command.arg("--list").stdout(Stdio::null());
    command
}

fn vfork_and_exec_leave_the_parents_memory_alone() -> Result<()> {
    each_start(|gpu, region| {
        // The C library starts a program by `vfork`: the child has the parent's memory until `exec`.
        ensure!(other_program().status()?.success());
        exercise_all(gpu, region)?;
        let busy = Region::map(8 * PAGE_SIZE, Backing::Small)?;
        let fence = Job::endless(busy).submit(gpu)?;
        ensure!(other_program().status()?.success());
        call::kill(gpu, fence)?;
        ensure_status(&call::wait(gpu, fence, JOB_TIME)?, JobStatus::Killed)?;
        busy.unmap()?;
        exercise(gpu, region, 0, 2)
    })
}

fn exec_in_a_child_with_a_gpu_gives_everything_back() -> Result<()> {
    each_start(|gpu, region| {
        let child = fork(|| {
            code((|| {
                let gpu = Gpu::open_first()?;
                Job::add(region, 1).waves(2).run(&gpu)?;
                let own = Region::map(HUGE_PAGE_SIZE, Backing::Huge)?;
                Job::endless(own).submit(&gpu)?;
                Err(other_program().exec().into())
            })())
        })?;
        ensure!(child.wait()? == Ended::Exited(0));
        exercise_all(gpu, region)
    })
}
