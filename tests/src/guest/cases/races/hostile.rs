// SPDX-License-Identifier: MIT OR Apache-2.0
//! Users who mean no good: calls with any number and any fields, to any descriptor, from many threads, as root
//! and as somebody else who may open the node, while their memory is taken apart. Nothing must come of it but
//! errors; the kernel's log and the driver's counts are looked at after each case.

use super::{
    beside::{Passing, revoke, tear},
    field::Random,
};
use crate::guest::{
    call::{Job, every_call},
    cases::owner::with_descriptor_of_child,
    child::code,
    mirror::Action,
    oracle, settings,
};
use anyhow::{Result, anyhow, ensure};
use farfault::arena::{Backing, Protection, Region, call_at};
use farfault::{
    Gpu, HUGE_PAGE_SIZE, PAGE_SIZE,
    process::{Ended, fork},
    uapi,
};
use rustix::{
    fs::{MemfdFlags, memfd_create},
    io::Errno,
    process::{Gid, Uid},
    thread::{set_thread_gid, set_thread_uid},
};
use std::{
    fs::File,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    thread,
    time::{Duration, Instant},
};

pub(super) mod one_gpu {
    use super::*;

    group! { "races::hostile", on Small, seconds 180:
        random_calls_of_many_threads_as_root_give_errors_only,
        random_calls_of_many_threads_as_an_ordinary_user_give_errors_only,
    }
}

pub(super) mod mirrors {
    use super::*;

    group! { "races::hostile", on Mirrors, seconds 180:
        random_calls_to_nodes_that_are_revoked_meanwhile_give_errors_only,
    }
}

const SHORT: Duration = Duration::from_secs(2);
const THREADS: u64 = 6;
/// Nobody in particular.
const USER: u32 = 65534;
/// Words of the longest argument.
const WORDS: usize = 8;
/// Where SUBMIT writes the fence.
const FENCE: usize = 5;

const NUMBERS: [u32; 10] = [
    uapi::IOC_INFO,
    uapi::IOC_SUBMIT,
    uapi::IOC_WAIT,
    uapi::IOC_KILL,
    uapi::IOC_MIGRATE,
    uapi::IOC_ADVISE,
    uapi::IOC_QUERY,
    uapi::IOC_STATS,
    uapi::IOC_PING,
    uapi::IOC_EXCLUSIVE,
];

/// Whose descriptors are there besides one's own of the first GPU, `/dev/null`'s and a file's.
#[derive(Clone, Copy)]
struct Others<'a> {
    /// Of processes that live, and of those that have ended.
    strangers: [&'a OwnedFd; 2],
    /// The nodes of the second GPU, which is unbound meanwhile, and both of the kernel's test module.
    nodes: bool,
}

/// Memory of all kinds, some of which is not there.
struct Targets {
    regions: Vec<Region>,
    /// Those of them that are taken apart.
    torn: [Region; 2],
}

impl Targets {
    fn new(file: &File) -> Result<Self> {
        let hidden = Region::map(HUGE_PAGE_SIZE, Backing::Small)?;
        hidden.protect(Protection::None)?;
        let constant = Region::map(HUGE_PAGE_SIZE, Backing::Small)?;
        constant.protect(Protection::Read)?;
        let torn = [Backing::Small, Backing::Huge].map(|b| Region::map(HUGE_PAGE_SIZE, b));
        let [small, huge] = torn;
        let torn = [small?, huge?];
        Ok(Self {
            torn,
            regions: vec![
                torn[0],
                torn[1],
                Region::map(HUGE_PAGE_SIZE, Backing::Small)?,
                Region::map(2 * HUGE_PAGE_SIZE, Backing::Huge)?,
                Region::map(HUGE_PAGE_SIZE, Backing::Shared)?,
                Region::map(64 * PAGE_SIZE, Backing::File(file))?,
                Region::map(64 * PAGE_SIZE, Backing::FilePrivate(file))?,
                Region::nowhere(HUGE_PAGE_SIZE)?,
                hidden,
                constant,
            ],
        })
    }

    /// An address that may be one of memory.
    fn address(&self, random: &mut Random) -> u64 {
        let region = random.one_of(&self.regions);
        let address = region.address() + random.below(region.length()) as u64;
        match random.below(8) {
            0 => address,
            1 => address & !7,
            2 => *random.one_of(&[0, 1 << 47, (1 << 47) - 4096, !4095, 1 << 63, 4096]),
            _ => address & !4095,
        }
    }

    /// A length that may end in memory.
    fn length(random: &mut Random) -> u64 {
        match random.below(8) {
            0 => random.any(),
            1 => *random.one_of(&[0, 1, 8, 1 << 47, u64::MAX, !4095]),
            2 => random.below(1 << 22) as u64,
            3 => random.below(1 << 19) as u64 * 8,
            _ => (1 + random.below(1024)) as u64 * 4096,
        }
    }

    fn word(&self, random: &mut Random) -> u64 {
        match random.below(6) {
            0 => random.any(),
            1 | 2 => self.address(random),
            3 => Self::length(random),
            _ => random.below(10) as u64,
        }
    }
}

/// The words of an argument, more often than not nearly right.
fn words(targets: &Targets, random: &mut Random, number: u32, fence: u64) -> [u64; WORDS] {
    let mut words = [0; WORDS];
    if random.below(4) == 0 {
        words
            .iter_mut()
            .for_each(|word| *word = targets.word(random));
        return words;
    }
    let address = targets.address(random);
    let length = Targets::length(random);
    let small = random.below(6) as u64;
    match number {
        uapi::IOC_SUBMIT => {
            let waves = *random.one_of(&[0, 1, 1, 2, 64, 4096, u64::from(u32::MAX)]);
            words[0] = random.below(9) as u64 | waves << 32;
            words[1] = address;
            words[2] = if random.coin() {
                length
            } else {
                targets.address(random)
            };
            words[3] = if random.coin() {
                length & 0xffff_fff8
            } else {
                small
            };
            words[4] = u64::from(random.below(32) == 0);
        }
        uapi::IOC_WAIT => {
            // Half a millisecond, or none; sometimes what has no limit, and then of no job.
            words[0] = if random.coin() { 0 } else { fence };
            words[1] = *random.one_of(&[0, 500_000, 1]);
        }
        uapi::IOC_KILL => words[0] = fence,
        _ if number >> 8 & 0xff == u32::from(b'H') => {
            words[0] = address;
            words[1] = targets.address(random);
            words[2] = if random.coin() { length >> 12 } else { small };
        }
        uapi::IOC_QUERY => {
            words[0] = address;
            words[1] = length;
            words[2] = targets.address(random);
        }
        _ => {
            words[0] = address;
            words[1] = length;
            words[2] = small;
        }
    }
    words
}

/// One thread's calls; how many of them succeeded.
fn call_at_random(
    targets: &Targets,
    descriptors: &[BorrowedFd<'_>],
    passing: &Passing,
    random: &mut Random,
    end: Instant,
) -> Result<[u64; 2]> {
    let argument = Region::map(2 * PAGE_SIZE, Backing::Small)?;
    // Arguments may end where nothing is mapped.
    argument.part(PAGE_SIZE, PAGE_SIZE).unmap()?;
    let numbers: Vec<_> = NUMBERS
        .into_iter()
        .chain(Action::ALL.map(Action::opcode))
        .collect();
    let mut calls = [0; 2];
    let mut fence = 1;
    while Instant::now() < end {
        let known = *random.one_of(&numbers);
        let number = match random.below(8) {
            0 => random.any() as u32,
            // Another number, direction or size.
            1 => known ^ 1 << random.below(32),
            _ => known,
        };
        let at = PAGE_SIZE / 8 - WORDS - random.below(32);
        for (index, word) in words(targets, random, known, fence).into_iter().enumerate() {
            argument.store(at + index, word);
        }
        let address = match random.below(16) {
            0 => targets.address(random),
            1 => argument.address() + PAGE_SIZE as u64 - 8,
            _ => argument.address() + at as u64 * 8,
        };
        // A WAIT without a limit may wait for a job without an end, until somebody kills that.
        let waits = number & 0xffff == uapi::IOC_WAIT & 0xffff;
        if waits
            && (address != argument.address() + at as u64 * 8 || argument.load(at + 1) > 1 << 20)
        {
            continue;
        }
        let result = match random.below(8) {
            0 => call_at(&*passing.get(), number, address),
            _ => call_at(*random.one_of(descriptors), number, address),
        };
        calls[usize::from(result.is_ok())] += 1;
        if result.is_ok() && number == uapi::IOC_SUBMIT {
            fence = argument.load(at + FENCE);
        }
    }
    Ok(calls)
}

fn attack(seed: u64, others: Others<'_>) -> Result<()> {
    let file = File::from(memfd_create("farfault-test", MemfdFlags::CLOEXEC)?);
    rustix::fs::ftruncate(&file, 64 * PAGE_SIZE as u64)?;
    let targets = Targets::new(&file)?;
    let gpus = [Gpu::open_first()?, Gpu::open_first()?];
    let mut more: Vec<OwnedFd> = vec![File::open("/dev/null")?.into(), file.try_clone()?.into()];
    if others.nodes {
        for node in ["farfault1", "hmm_dmirror0", "hmm_dmirror1"] {
            let node = File::options()
                .read(true)
                .write(true)
                .open(format!("/dev/{node}"))?;
            more.push(node.into());
        }
    }
    let mut descriptors: Vec<_> = gpus.iter().map(AsFd::as_fd).collect();
    descriptors.extend(gpus.iter().map(AsFd::as_fd));
    descriptors.extend(more.iter().map(AsFd::as_fd));
    descriptors.extend(others.strangers.map(AsFd::as_fd));
    let passing = Passing::new()?;
    let duration = settings::duration(SHORT);
    let end = Instant::now() + duration;
    let [failed, well, torn] = [(); 3].map(|()| AtomicU64::new(0));
    thread::scope(|scope| -> Result<()> {
        let (targets, descriptors, passing) = (&targets, &descriptors, &passing);
        let (failed, well, torn) = (&failed, &well, &torn);
        let mut threads: Vec<_> = (0..THREADS)
            .map(|number| {
                scope.spawn(move || -> Result<()> {
                    let mut random = Random::new(seed.wrapping_add(number));
                    let calls = call_at_random(targets, descriptors, passing, &mut random, end)?;
                    failed.fetch_add(calls[0], Relaxed);
                    well.fetch_add(calls[1], Relaxed);
                    Ok(())
                })
            })
            .collect();
        threads.push(scope.spawn(move || {
            let mut random = Random::new(seed.wrapping_add(THREADS));
            let done = tear(&targets.torn, passing, &mut random, end)?;
            torn.store(done, Relaxed);
            Ok(())
        }));
        if others.nodes {
            threads.push(scope.spawn(move || revoke(duration / 3)));
        }
        threads
            .into_iter()
            .try_for_each(|thread| thread.join().map_err(|_| anyhow!("a thread panicked"))?)
    })?;
    println!("{well:?} calls succeeded, {failed:?} failed, {torn:?} times memory was taken apart");
    ensure!(
        [&well, &failed, &torn]
            .iter()
            .all(|count| count.load(Relaxed) > 0)
    );
    let argument = Region::map(PAGE_SIZE, Backing::Small)?;
    let ensure_ping = |descriptor: &OwnedFd, errno| -> Result<()> {
        let ping = call_at(descriptor, uapi::IOC_PING, argument.address());
        ensure!(
            ping == Err(errno),
            "PING gave {ping:?}, and should {errno:?}"
        );
        Ok(())
    };
    for stranger in others.strangers {
        ensure_ping(stranger, Errno::PERM)?;
    }
    if others.nodes {
        // Both nodes of the second GPU.
        ensure_ping(&more[2], Errno::NODEV)?;
        ensure_ping(&more[4], Errno::NODEV)?;
    }
    // Its descriptors go with jobs under way. A new one works.
    drop((gpus, passing));
    let gpu = Gpu::open_first()?;
    let region = Region::map(4 * PAGE_SIZE, Backing::Small)?;
    oracle::write(region, seed);
    Job::add(region, 1).waves(2).run(&gpu)?;
    oracle::check(region, seed, 1)?;
    let good = every_call(&gpu, region);
    ensure!(
        good.iter()
            .all(|(name, result)| result.is_ok() || *name == "KILL"),
        "{good:?}"
    );
    Ok(())
}

/// Runs an attack in a process of its own, after `become_somebody`.
fn attack_as(nodes: bool, become_somebody: impl Fn() -> Result<()>) -> Result<()> {
    let seed = settings::seed();
    with_descriptor_of_child(true, |dead| {
        with_descriptor_of_child(false, |living| {
            let others = Others {
                strangers: [living, dead],
                nodes,
            };
            let child = fork(|| {
                code((|| {
                    become_somebody()?;
                    attack(seed, others)
                })())
            })?;
            ensure!(child.wait()? == Ended::Exited(0));
            Ok(())
        })
    })
}

fn random_calls_of_many_threads_as_root_give_errors_only() -> Result<()> {
    attack_as(false, || Ok(()))
}

/// The node is everybody's.
fn random_calls_of_many_threads_as_an_ordinary_user_give_errors_only() -> Result<()> {
    attack_as(false, || {
        set_thread_gid(Gid::from_raw(USER))?;
        Ok(set_thread_uid(Uid::from_raw(USER))?)
    })
}

fn random_calls_to_nodes_that_are_revoked_meanwhile_give_errors_only() -> Result<()> {
    attack_as(true, || Ok(()))
}
