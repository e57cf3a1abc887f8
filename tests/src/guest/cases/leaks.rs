// SPDX-License-Identifier: MIT OR Apache-2.0
//! Many processes do everything that there is to do with a GPU, and end: the kernel has as much memory after
//! the last of them as after the first. The harness looks at VRAM and contexts after each case; this group looks at
//! what a reference that nobody drops keeps: pages of RAM, address spaces, the driver's own objects.

use crate::guest::{
    call::{self, JOB_TIME, Job, ensure_status},
    child::code,
    oracle,
    place::{anonymous, meminfo, migrate, move_all},
};
use anyhow::{Context, Result, bail, ensure};
use farfault::arena::{Backing, Protection, Region};
use farfault::{
    Access, Advice, Gpu, HUGE_PAGE_SIZE, PAGE_SIZE, Place,
    process::{Ended, fork},
    stage,
    uapi::JobStatus,
};
use rustix::io::Errno;
use std::{collections::BTreeMap, fs, time::Duration};

group! { "leaks", gpus 1, seconds 240:
    rounds_of_jobs_and_small_pages_leave_no_memory,
    rounds_of_huge_pages_and_forks_leave_no_memory,
}

const SEED: u64 = 0x1eaf;
const SMALL: usize = 128 * PAGE_SIZE;
/// Of the kernel's own memory that moves without a reason of ours, in KiB.
const SLACK: u64 = 3 << 10;
/// A round that leaves one page or one object behind is seen, and what comes and goes is not.
const LEFT_PER_ROUND: f64 = 0.8;
/// What was lost has grown in each of so many series of rounds.
const SERIES: usize = 3;
/// Kinds of objects that a reference of a driver keeps, by the begins of their names. Others come and go with files,
/// and with whoever looks at this.
const KINDS: [&str; 8] = [
    "kmalloc",
    "mm_struct",
    "task_struct",
    "anon_vma",
    "vm_area",
    "files_",
    "filp",
    "pid",
];

/// What the kernel has in use.
#[derive(Debug)]
struct Books {
    /// In pages: free memory, with what each CPU has put by for itself, which `MemFree` leaves out.
    free: u64,
    /// In KiB, each: memory of processes, the kernel's objects, its larger pieces.
    anonymous: u64,
    objects: u64,
    vmalloc: u64,
    /// How many objects of each kind.
    kinds: BTreeMap<String, u64>,
}

impl Books {
    fn read() -> Result<Self> {
        // What can go, goes: caches of files and names, and objects that are put by.
        fs::write("/proc/sys/vm/drop_caches", "3")?;
        for cache in fs::read_dir("/sys/kernel/slab").context("the kernel's caches")? {
            // Some cannot be asked.
            let _ = fs::write(cache?.path().join("shrink"), "1");
        }
        let text = fs::read_to_string("/proc/slabinfo")?;
        let kinds = text.lines().filter_map(|line| {
            let mut words = line.split_whitespace();
            Some((words.next()?.to_owned(), words.next()?.parse().ok()?))
        });
        let kinds: BTreeMap<String, u64> = kinds
            .filter(|(kind, _): &(String, u64)| KINDS.iter().any(|begin| kind.starts_with(begin)))
            .collect();
        for begin in KINDS {
            let any = kinds.keys().any(|kind| kind.starts_with(begin));
            ensure!(any, "the kernel counts no objects of {begin}");
        }
        Ok(Self {
            kinds,
            free: free_pages()?,
            anonymous: anonymous()?,
            objects: meminfo("SUnreclaim")?,
            vmalloc: meminfo("VmallocUsed")?,
        })
    }

    /// What has grown from `before` on by more than `rounds` rounds that leave nothing can explain.
    fn grown_since(&self, before: &Self, rounds: u32) -> Vec<String> {
        let of_memory = [
            ("of processes", before.anonymous, self.anonymous),
            ("objects", before.objects, self.objects),
            ("vmalloc", before.vmalloc, self.vmalloc),
        ];
        let memory = of_memory
            .into_iter()
            .filter(|(_, before, now)| *now > *before + SLACK)
            .map(|(what, before, now)| format!("{what}: {} KiB", now - before));
        let most = (f64::from(rounds) * LEFT_PER_ROUND) as u64;
        let lost = before.free.saturating_sub(self.free);
        let free = (lost > most).then(|| format!("free memory, less: {lost} pages"));
        let kinds = self.kinds.iter().filter_map(|(kind, count)| {
            let more = count.saturating_sub(before.kinds.get(kind).copied().unwrap_or(0));
            (more > most).then(|| format!("{kind}: {more} objects"))
        });
        memory.chain(free).chain(kinds).collect()
    }
}

/// Pages that nobody has, be they in their zone's lists or in those of a CPU.
fn free_pages() -> Result<u64> {
    let text = fs::read_to_string("/proc/zoneinfo")?;
    let counts = text.lines().filter_map(|line| {
        let line = line.trim_start();
        let count = line
            .strip_prefix("pages free")
            .or_else(|| line.strip_prefix("count:"))?;
        Some(count.trim().parse::<u64>())
    });
    Ok(counts.sum::<Result<_, _>>()?)
}

/// Whether freed memory is kept from use for a while, so that the books say nothing.
fn frees_late() -> Result<bool> {
    let symbols = fs::read_to_string("/proc/kallsyms")?;
    Ok(symbols
        .lines()
        .any(|line| line.ends_with(" kasan_quarantine_put")))
}

fn leave_nothing(rounds: u32, round: fn(u32) -> Result<()>) -> Result<()> {
    if frees_late()? {
        crate::guest::skip("KASAN keeps freed memory for a while");
        return Ok(());
    }
    let child = |number| -> Result<()> {
        let child = fork(move || code(round(number)))?;
        ensure!(child.wait()? == Ended::Exited(0), "round {number}");
        Ok(())
    };
    // What is made once is there after these.
    (0..rounds / 4).try_for_each(child)?;
    // What grows once, and not again, has been put by and not lost.
    let mut grown = Vec::new();
    for _ in 0..SERIES {
        let before = Books::read()?;
        (0..rounds).try_for_each(child)?;
        // Workers and grace periods take their time.
        for _ in 0..8 {
            grown = Books::read()?.grown_since(&before, rounds);
            if grown.is_empty() {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(250));
        }
        eprintln!("{rounds} rounds have left something: {}", grown.join(", "));
    }
    bail!("each {rounds} rounds leave something: {}", grown.join(", "))
}

fn rounds_of_jobs_and_small_pages_leave_no_memory() -> Result<()> {
    leave_nothing(80, |_| {
        let gpu = Gpu::open_first()?;
        let region = Region::map(SMALL, Backing::Small)?;
        oracle::write(region, SEED);
        Job::add(region, 1).waves(4).run(&gpu)?;
        migrate(&gpu, region, Place::Ram)?;
        move_all(&gpu, region, Place::Vram)?;
        // Home by the CPU, page by page.
        oracle::check(region, SEED, 1)?;
        // Atomics in RAM.
        gpu.advise(region.pages(), Advice::MapOnly)?;
        Job::atomic_add(region.address(), 1, 1).run(&gpu)?;
        gpu.make_exclusive(region.pages())?;
        region.atomic_add(0, u64::MAX);
        gpu.advise(region.pages(), Advice::PreferGpu)?;
        Job::sum(region).run(&gpu)?;
        // What fails.
        let page = region.part(0, PAGE_SIZE);
        page.protect(Protection::Read)?;
        Job::fill(page, 1).fails_at(&gpu, page.address(), Access::Write)?;
        ensure!(gpu.make_exclusive(page.pages()).is_err());
        let nothing = Job::fill(Region::nowhere(PAGE_SIZE)?, 1);
        ensure_status(&nothing.end(&gpu)?, JobStatus::Fault)?;
        let unknown = call::wait(&gpu, u64::MAX, JOB_TIME).map(drop);
        ensure!(unknown == Err(Errno::NOENT));
        // A job that is killed, one that nobody waits for, and one that never ends.
        let links = Region::map(SMALL, Backing::Small)?;
        let fence = Job::endless(links).submit(&gpu)?;
        call::kill(&gpu, fence)?;
        ensure_status(&call::wait(&gpu, fence, JOB_TIME)?, JobStatus::Killed)?;
        Job::sum(region).submit(&gpu)?;
        Job::endless(links).submit(&gpu)?;
        Ok(())
    })
}

fn rounds_of_huge_pages_and_forks_leave_no_memory() -> Result<()> {
    leave_nothing(60, |number| {
        let gpu = Gpu::open_first()?;
        let region = Region::map(2 * HUGE_PAGE_SIZE, Backing::Huge)?;
        oracle::write(region, SEED);
        Job::add(region, 1).waves(4).run(&gpu)?;
        let part = region.part(HUGE_PAGE_SIZE, HUGE_PAGE_SIZE / 2);
        let child = fork(|| {
            code((|| {
                oracle::check_part(part, SEED, HUGE_PAGE_SIZE / 8, 1)?;
                part.store(0, 0);
                Ok(())
            })())
        })?;
        migrate(&gpu, region.part(0, HUGE_PAGE_SIZE), Place::Ram)?;
        ensure!(child.wait()? == Ended::Exited(0));
        Job::add(region, 1).waves(4).run(&gpu)?;
        part.discard()?;
        migrate(&gpu, region, Place::Vram)?;
        let untouched = Region::map(HUGE_PAGE_SIZE, Backing::Huge)?;
        migrate(&gpu, untouched, Place::Vram)?;
        untouched
            .part(PAGE_SIZE, PAGE_SIZE)
            .advise(stage::Advice::DontNeed)?;
        match number % 3 {
            // By the CPU, on request, and with the process.
            0 => oracle::check_part(region.part(0, HUGE_PAGE_SIZE), SEED, 0, 2)?,
            1 => migrate(&gpu, region, Place::Ram).map(drop)?,
            _ => {}
        }
        Ok(())
    })
}
