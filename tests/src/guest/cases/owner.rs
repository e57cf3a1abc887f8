// SPDX-License-Identifier: MIT OR Apache-2.0
//! A descriptor belongs to the address space that opened it: in the hands of others it does nothing.

use super::mm::start::eventually;
use crate::guest::{
    call::{Job, ensure_every_call_fails, events, every_call},
    child::code,
    oracle,
    place::{driver_count, state},
    programs,
};
use anyhow::{Context, Result, ensure};
use farfault::arena::{Backing, Region};
use farfault::{
    Advice, Gpu, PAGE_SIZE,
    process::{Ended, fork},
};
use rustix::{
    event::PollFlags,
    io::Errno,
    net::{
        AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
        SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
    },
    pipe::pipe,
};
use std::{
    fs::File,
    io::{IoSlice, IoSliceMut, Read, Write},
    mem::MaybeUninit,
    os::fd::{AsFd, OwnedFd},
    process::Command,
    time::Duration,
};

group! { "owner", on Small, seconds 40:
    owner_may_make_every_call,
    child_after_fork_gets_eperm_from_every_call,
    process_that_was_sent_the_descriptor_gets_eperm_from_every_call,
    descriptor_of_a_process_that_ended_gives_eperm,
    descriptor_inherited_through_exec_gives_eperm,
    jobs_of_a_process_that_ended_fail_while_its_descriptor_is_open,
}

fn some_memory() -> Result<Region> {
    let region = Region::map(4 * PAGE_SIZE, Backing::Small)?;
    oracle::write(region, 1);
    Ok(region)
}

fn owner_may_make_every_call() -> Result<()> {
    let gpu = Gpu::open_first()?;
    for (name, result) in every_call(&gpu, some_memory()?) {
        // Its job has been collected by then.
        let should = if name == "KILL" {
            Err(Errno::NOENT)
        } else {
            Ok(())
        };
        ensure!(result == should, "{name} gave {result:?}");
    }
    Ok(())
}

fn child_after_fork_gets_eperm_from_every_call() -> Result<()> {
    let gpu = Gpu::open_first()?;
    let region = some_memory()?;
    let fence = Job::sum(region).submit(&gpu)?;
    let child = fork(|| {
        code((|| {
            ensure_every_call_fails(&gpu, region, Errno::PERM)?;
            let wait = crate::guest::call::wait(&gpu, fence, std::time::Duration::ZERO);
            ensure!(wait == Err(Errno::PERM), "{wait:?}");
            Ok(())
        })())
    })?;
    ensure!(child.wait()? == Ended::Exited(0));
    // The parent's job and memory are as they were.
    let end = crate::guest::call::wait(&gpu, fence, crate::guest::call::JOB_TIME)?;
    ensure!(end.result == oracle::expected_sum(region, 1, 0));
    oracle::check(region, 1, 0)
}

fn send(socket: &OwnedFd, descriptor: &impl AsFd) -> Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut buffer = SendAncillaryBuffer::new(&mut space);
    let descriptors = [descriptor.as_fd()];
    ensure!(buffer.push(SendAncillaryMessage::ScmRights(&descriptors)));
    sendmsg(
        socket,
        &[IoSlice::new(&[1])],
        &mut buffer,
        SendFlags::empty(),
    )?;
    Ok(())
}

fn receive(socket: &OwnedFd) -> Result<OwnedFd> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut buffer = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    let flags = RecvFlags::CMSG_CLOEXEC;
    recvmsg(
        socket,
        &mut [IoSliceMut::new(&mut byte)],
        &mut buffer,
        flags,
    )?;
    let descriptor = buffer.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    });
    descriptor.context("no descriptor came")
}

/// A child opens the GPU and sends it here; `check` runs while it lives, or after its end.
pub(super) fn with_descriptor_of_child(
    after_its_end: bool,
    check: impl FnOnce(&OwnedFd) -> Result<()>,
) -> Result<()> {
    let work = |gpu: &Gpu| Job::add(some_memory()?, 1).run(gpu).map(drop);
    with_descriptor_of_child_that(work, after_its_end, check)
}

/// Likewise; before, the child works with it.
fn with_descriptor_of_child_that(
    works: impl FnOnce(&Gpu) -> Result<()>,
    after_its_end: bool,
    check: impl FnOnce(&OwnedFd) -> Result<()>,
) -> Result<()> {
    let (here, there) = socketpair(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    )?;
    let (from_parent, to_child) = pipe()?;
    let (mut from_parent, mut to_child) = (File::from(from_parent), File::from(to_child));
    let child = fork(|| {
        code((|| {
            let gpu = Gpu::open_first()?;
            works(&gpu)?;
            send(&there, &gpu)?;
            Ok(from_parent.read_exact(&mut [0])?)
        })())
    })?;
    // Without the child's end here, its failure is noticed.
    drop(there);
    let descriptor = receive(&here)?;
    if after_its_end {
        to_child.write_all(&[1])?;
        ensure!(child.wait()? == Ended::Exited(0));
        return check(&descriptor);
    }
    check(&descriptor)?;
    to_child.write_all(&[1])?;
    ensure!(child.wait()? == Ended::Exited(0));
    Ok(())
}

fn check_eperm(descriptor: &OwnedFd) -> Result<()> {
    ensure_every_call_fails(descriptor, some_memory()?, Errno::PERM)
}

fn process_that_was_sent_the_descriptor_gets_eperm_from_every_call() -> Result<()> {
    with_descriptor_of_child(false, check_eperm)
}

fn descriptor_of_a_process_that_ended_gives_eperm() -> Result<()> {
    with_descriptor_of_child(true, check_eperm)
}

fn descriptor_inherited_through_exec_gives_eperm() -> Result<()> {
    let gpu = Gpu::open_first()?;
    Job::add(some_memory()?, 1).run(&gpu)?;
    let status = Command::new("/proc/self/exe")
        .arg(programs::USE_STDIN)
        .stdin(gpu.as_fd().try_clone_to_owned()?)
        .status()?;
    ensure!(status.success(), "{status}");
    // It is as good as before for its owner.
    Job::add(some_memory()?, 1).run(&gpu).map(drop)
}

/// What the jobs work on has gone, and whoever could wait for them; nobody has closed the descriptor.
fn jobs_of_a_process_that_ended_fail_while_its_descriptor_is_open() -> Result<()> {
    const JOBS: u64 = 3;
    let before = driver_count(0, "jobs")?;
    let works = |gpu: &Gpu| -> Result<()> {
        for advice in [Advice::Default, Advice::MapOnly] {
            let ring = some_memory()?;
            gpu.advise(ring.pages(), advice)?;
            Job::endless(ring).submit(gpu)?;
        }
        let word = some_memory()?;
        gpu.advise(word.pages(), Advice::MapOnly)?;
        Job::atomic_add(word.address(), 1, u64::MAX).submit(gpu)?;
        let taken = || Ok(state(gpu, word, 0)?.gpu.atomic);
        eventually("a page is the GPU's for its atomics", taken)
    };
    with_descriptor_of_child_that(works, true, |descriptor| {
        eventually("jobs end", || Ok(driver_count(0, "jobs")? == before + JOBS))?;
        ensure!(events(descriptor, Duration::ZERO)? == PollFlags::IN);
        check_eperm(descriptor)
    })?;
    // The last one has closed it, and left nothing that would be in the way.
    let gpu = Gpu::open_first()?;
    Job::add(some_memory()?, 1).run(&gpu).map(drop)
}
