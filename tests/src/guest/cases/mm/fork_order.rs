// SPDX-License-Identifier: MIT OR Apache-2.0
//! Fork at any time: with a job running, with exits in every order, and the forks of another kind
//! (`vfork`, and a child that becomes another program).

use super::start::{
    At, SEED, START_SMALL_VRAM, STARTS, Start, each_start, ensure_sum, exercise, exercise_all,
    while_adding,
};
use crate::guest::{
    call::{self, JOB_TIME, Job, ensure_status},
    child::code,
    oracle,
};
use anyhow::{Context, Result, bail, ensure};
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

/// A process of a family that shares pages: it does what its pipe says, and tells how that went.
struct Member {
    orders: File,
    added: u64,
}

const CHECK: u8 = 1;
const END: u8 = 2;

fn serve(orders: File, answers: &File, region: Region, own: u64) -> Result<()> {
    let (mut orders, mut answers) = (orders, answers);
    let gpu = Gpu::open_first()?;
    let mut added = own;
    Job::add(region, own).waves(2).run(&gpu)?;
    answers.write_all(&[1])?;
    loop {
        let mut order = [0];
        orders.read_exact(&mut order)?;
        if order[0] == END {
            return Ok(());
        }
        let good = exercise(&gpu, region, 0, added);
        added += 2;
        answers.write_all(&[u8::from(good.is_ok())])?;
        good?;
    }
}

/// Parent, child and grandchild on one memory, each with a GPU; they end in this order.
fn family(start: Start, order: [usize; 3]) -> Result<()> {
    // The case itself only looks on: it must outlive all.
    let mut members = Vec::new();
    let mut ends = Vec::new();
    for number in 0..3 {
        let (read, write) = pipe()?;
        ends.push(Some(File::from(read)));
        members.push(Member {
            orders: File::from(write),
            added: 10 * (number + 1),
        });
    }
    let (answers, answer) = pipe()?;
    let (mut answers, answer) = (File::from(answers), File::from(answer));
    let mut take = |number: usize| {
        ends.get_mut(number)
            .and_then(Option::take)
            .context("an end")
    };
    let (first, second, third) = (take(0)?, take(1)?, take(2)?);
    let owns = [members[0].added, members[1].added, members[2].added];
    let parent = fork(|| {
        code((|| {
            let gpu = Gpu::open_first()?;
            let region = start.region(&gpu, 64 * PAGE_SIZE)?;
            let child = fork(|| {
                code((|| {
                    let grandchild = fork(|| code(serve(third, &answer, region, owns[2])))?;
                    serve(second, &answer, region, owns[1])?;
                    // It may live on: whoever ends is not waited for.
                    std::mem::forget(grandchild);
                    Ok(())
                })())
            })?;
            serve(first, &answer, region, owns[0])?;
            std::mem::forget(child);
            Ok(())
        })())
    })?;
    let mut answer_of = |what: &str| -> Result<()> {
        let mut good = [0];
        answers.read_exact(&mut good)?;
        ensure!(good[0] == 1, "{what}");
        Ok(())
    };
    for _ in 0..3 {
        answer_of("to begin")?;
    }
    let mut alive = vec![0, 1, 2];
    for ends in order {
        for &number in &alive {
            members[number].orders.write_all(&[CHECK])?;
            answer_of(&format!("member {number} of {alive:?} has other data"))?;
        }
        members[ends].orders.write_all(&[END])?;
        alive.retain(|&number| number != ends);
    }
    match parent.wait()? {
        Ended::Exited(0) => Ok(()),
        ended => bail!("the parent ended with {ended:?}"),
    }
}

fn exit_in_every_order_keeps_everybodys_data() -> Result<()> {
    let orders = [
        [0, 1, 2],
        [0, 2, 1],
        [1, 0, 2],
        [1, 2, 0],
        [2, 0, 1],
        [2, 1, 0],
    ];
    for order in orders {
        for at in [At::Vram, At::Ram] {
            let start = Start {
                at,
                ..START_SMALL_VRAM
            };
            family(start, order).with_context(|| format!("{start:?}, {order:?}"))?;
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
