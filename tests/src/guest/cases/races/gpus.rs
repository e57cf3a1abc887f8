// SPDX-License-Identifier: MIT OR Apache-2.0
//! Two GPUs and more want the same pages at the same time.

use crate::guest::{
    Machine,
    call::{self, JOB_TIME, Job, ensure_status},
    oracle,
    place::{migrate, move_all},
    settings,
};
use anyhow::{Context, Result, anyhow, ensure};
use farfault::arena::{Backing, Region};
use farfault::{
    Advice, Gpu, HUGE_PAGE_SIZE, PAGE_SIZE, PageState, Place,
    uapi::{self, JobStatus},
};
use rustix::io::Errno;
use std::{
    fs,
    path::PathBuf,
    sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
    thread,
    time::{Duration, Instant},
};

const SEED: u64 = 0x6b05;
const SHORT: Duration = Duration::from_secs(2);
/// However slow the machine is, each has had its turns by then.
const LIMIT: Duration = Duration::from_secs(100);
/// So often each must have got what it wants.
const TURNS: u64 = 3;
/// Huge pages that are tried until each GPU has had one as a whole.
const MOST_PAGES: u32 = 10;

fn open(count: usize) -> Result<Vec<Gpu>> {
    (0..count)
        .map(|number| Ok(Gpu::open(format!("/dev/farfault{number}"))?))
        .collect()
}

/// Words that all add to, each on a page of its own, with constant ones between them.
struct Shared {
    region: Region,
    /// Words from one shared word to the next.
    step: usize,
    added: AtomicU64,
}

/// Pages from one shared word to the next, at least.
const LEAST_STEP: usize = 8;
/// At most so many shared words.
const MOST_SHARED: usize = 8;

impl Shared {
    fn new(length: usize, backing: Backing<'_>) -> Result<Self> {
        let region = Region::map(length, backing)?;
        oracle::write(region, SEED);
        let pages = (length / PAGE_SIZE / MOST_SHARED).max(LEAST_STEP);
        let shared = Self {
            region,
            step: pages * PAGE_SIZE / 8,
            added: AtomicU64::new(0),
        };
        shared.words().for_each(|index| region.store(index, 0));
        Ok(shared)
    }

    fn words(&self) -> impl Iterator<Item = usize> {
        (0..self.region.words()).step_by(self.step)
    }

    /// A job on each word at a time: it adds, and reads what is constant behind it.
    fn turn(&self, gpu: &Gpu) -> Result<()> {
        const REPEAT: u64 = 20;
        let at = |index: usize| self.region.address() + index as u64 * 8;
        let jobs: Vec<_> = self
            .words()
            .map(|index| Job::atomic_add(at(index), 1, REPEAT).submit(gpu))
            .collect::<Result<_, _>>()?;
        for fence in jobs {
            ensure_status(&call::wait(gpu, fence, JOB_TIME)?, JobStatus::Ok)?;
        }
        self.added.fetch_add(REPEAT, SeqCst);
        let last = self
            .region
            .part(self.region.length() - PAGE_SIZE, PAGE_SIZE);
        let should = oracle::sum(SEED, self.region.words() - 512..self.region.words());
        ensure!(
            Job::sum(last).run(gpu)? == should,
            "a page that never changes"
        );
        Ok(())
    }

    fn ensure_final(&self) -> Result<()> {
        let added = self.added.load(SeqCst);
        for index in 0..self.region.words() {
            let shared = index % self.step == 0;
            let should = if shared {
                added
            } else {
                oracle::word(SEED, index)
            };
            let is = self.region.load(index);
            ensure!(
                is == should,
                "word {index} is {is:#x} and should be {should:#x}"
            );
        }
        Ok(())
    }
}

/// All GPUs take their turns until each has had enough and the time is over; the turns of each.
fn take_turns(
    gpus: &[Gpu],
    enough: u64,
    duration: Duration,
    turn: impl Fn(usize, &Gpu) -> Result<()> + Sync,
) -> Result<Vec<u64>> {
    let begin = Instant::now();
    let turns: Vec<_> = gpus.iter().map(|_| AtomicU64::new(0)).collect();
    let failed = AtomicBool::new(false);
    let go_on = || -> Result<bool> {
        let all = turns.iter().all(|turns| turns.load(SeqCst) >= enough);
        let over = begin.elapsed() >= duration;
        ensure!(
            all || begin.elapsed() < LIMIT.max(duration),
            "turns of the GPUs: {turns:?}"
        );
        Ok(!(all && over || failed.load(SeqCst)))
    };
    thread::scope(|scope| {
        let (turn, turns, go_on, failed) = (&turn, &turns, &go_on, &failed);
        let threads: Vec<_> = gpus
            .iter()
            .enumerate()
            .map(|(number, gpu)| {
                scope.spawn(move || {
                    let work = || -> Result<()> {
                        while go_on()? {
                            turn(number, gpu)?;
                            turns[number].fetch_add(1, SeqCst);
                        }
                        Ok(())
                    };
                    work()
                        .inspect_err(|_| failed.store(true, SeqCst))
                        .with_context(|| format!("GPU {number}"))
                })
            })
            .collect();
        threads
            .into_iter()
            .try_for_each(|thread| thread.join().map_err(|_| anyhow!("a thread panicked"))?)
    })?;
    let turns: Vec<_> = turns.into_iter().map(AtomicU64::into_inner).collect();
    println!("turns: {turns:?} in {:?}", begin.elapsed());
    Ok(turns)
}

/// Where a range is when they begin to take turns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Begin {
    Ram,
    /// Its halves are in the VRAM of the first GPU, and of the second.
    Halves,
}

/// Each way in which a GPU can have the range: in its VRAM, or in RAM for itself. A range of so many bytes in small
/// pages, and one that is a huge page.
fn wanted_by(gpus: &[Gpu], length: usize) -> Result<()> {
    use Advice::{MapOnly, PreferGpu};
    let small = (Backing::Small, length);
    let huge = (Backing::Huge, HUGE_PAGE_SIZE);
    let ways = [
        (small, PreferGpu, Begin::Ram),
        (small, MapOnly, Begin::Ram),
        (huge, PreferGpu, Begin::Ram),
        (huge, MapOnly, Begin::Ram),
        (small, PreferGpu, Begin::Halves),
        (huge, PreferGpu, Begin::Halves),
    ];
    let duration = settings::share(SHORT, ways.len() as u32);
    for ((backing, length), advice, start) in ways {
        let what = || format!("{backing:?} {advice:?} {start:?}");
        let shared = Shared::new(length, backing)?;
        let half = length / 2;
        if start == Begin::Halves {
            move_all(&gpus[0], shared.region.part(0, half), Place::Vram)?;
            move_all(&gpus[1], shared.region.part(half, half), Place::Vram)?;
        }
        let states = gpus[0].query(shared.region.pages())?;
        let is_huge = states.iter().all(|page| page.cpu.huge);
        let should = matches!(backing, Backing::Huge) && start == Begin::Ram;
        ensure!(is_huge == should, "{}: huge {is_huge}", what());
        for gpu in gpus {
            gpu.advise(shared.region.pages(), advice)?;
        }
        take_turns(gpus, TURNS, duration, |_, gpu| shared.turn(gpu)).with_context(what)?;
        shared.ensure_final().with_context(what)?;
        for (number, gpu) in gpus.iter().enumerate() {
            let stats = gpu.stats()?;
            ensure!(
                stats.gpu_faults >= TURNS,
                "GPU {number} had the range all the time: {stats:?}"
            );
        }
        shared.region.unmap()?;
    }
    Ok(())
}

/// Each GPU asks for one huge page, which only one of them can have in its VRAM, and writes its own part of it. It
/// writes without atomics, which would split a huge page in RAM. How often each has it as a whole is counted.
fn take_huge_page(gpus: &[Gpu], had: &[AtomicU64]) -> Result<()> {
    let region = Region::map(HUGE_PAGE_SIZE, Backing::Huge)?;
    oracle::write(region, SEED);
    let part_of = |number: usize| {
        let length = HUGE_PAGE_SIZE / gpus.len();
        region.part(number * length, length)
    };
    let has_it = |gpu: &Gpu| -> Result<bool> {
        let states = gpu.query(region.pages())?;
        let whole = |page: &PageState| page.cpu.huge && page.cpu.place == Place::Vram;
        Ok(states.iter().all(whole))
    };
    let duration = settings::share(SHORT, MOST_PAGES);
    let turns = take_turns(gpus, TURNS, duration, |number, gpu| {
        // What another one is moving just then stays.
        migrate(gpu, region, Place::Vram)?;
        Job::add(part_of(number), 1).waves(2).run(gpu)?;
        had[number].fetch_add(u64::from(has_it(gpu)?), SeqCst);
        Ok(())
    })?;
    for (number, turns) in turns.into_iter().enumerate() {
        let part = part_of(number);
        let first = number * part.words();
        oracle::check_part(part, SEED, first, turns).with_context(|| format!("GPU {number}"))?;
    }
    Ok(region.unmap()?)
}

const DRIVER: &str = "/sys/bus/virtio/drivers/farfault";

/// The name of a bound GPU's device, by its number among them.
pub(super) fn bound(number: usize) -> Result<String> {
    let mut names: Vec<_> = fs::read_dir(DRIVER)?
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| name.starts_with("virtio"))
        .collect();
    names.sort();
    let name = names.into_iter().nth(number);
    name.context("no such GPU is bound")
}

pub(super) fn tell_driver(file: &str, device: &str) -> Result<()> {
    let path = PathBuf::from(DRIVER).join(file);
    fs::write(&path, device).with_context(|| format!("{device} to {}", path.display()))
}

pub(super) mod two {
    use super::*;

    group! { "races::two_gpus", on TwoGpus, seconds 240:
        range_that_both_want_goes_to_and_fro_and_both_get_on,
        huge_page_that_both_want_goes_to_and_fro_whole,
        ping_pong_of_one_page_is_no_livelock,
        pages_of_the_others_pagemap_are_never_read_as_ones_own,
        one_unbound_while_the_other_runs_harms_nothing,
    }

    fn range_that_both_want_goes_to_and_fro_and_both_get_on() -> Result<()> {
        wanted_by(&open(2)?, 64 * PAGE_SIZE)
    }

    /// Where they meet, mm may split it. So there is another one, until each has had one.
    fn huge_page_that_both_want_goes_to_and_fro_whole() -> Result<()> {
        let gpus = open(2)?;
        let had = [AtomicU64::new(0), AtomicU64::new(0)];
        for _ in 0..MOST_PAGES {
            take_huge_page(&gpus, &had)?;
            println!("had it whole in VRAM: {had:?}");
            if had.iter().all(|had| had.load(SeqCst) > 0) {
                return Ok(());
            }
        }
        anyhow::bail!("a huge page never came as a whole: {had:?}")
    }

    /// The smallest range, for which nothing but taking it from each other is possible.
    fn ping_pong_of_one_page_is_no_livelock() -> Result<()> {
        const ENOUGH: u64 = 20;
        let gpus = open(2)?;
        let shared = Shared::new(PAGE_SIZE * 2, Backing::Small)?;
        take_turns(&gpus, ENOUGH, settings::duration(SHORT), |_, gpu| {
            shared.turn(gpu)
        })?;
        shared.ensure_final()
    }

    /// Two regions, at the same addresses of the one VRAM and of the other's.
    fn pages_of_the_others_pagemap_are_never_read_as_ones_own() -> Result<()> {
        let gpus = open(2)?;
        for backing in [Backing::Small, Backing::Huge] {
            let mut same = 0;
            let regions = [(&gpus[0], SEED), (&gpus[1], SEED + 1)].map(|(gpu, seed)| {
                let region = Region::map(HUGE_PAGE_SIZE, backing)?;
                oracle::write(region, seed);
                move_all(gpu, region, Place::Vram)?;
                Job::add(region, 0).run(gpu)?;
                Ok::<_, anyhow::Error>((region, seed))
            });
            let [one, other] = regions;
            let regions = [one?, other?];
            let vram = |gpu: &Gpu, region: Region| -> Result<Vec<_>> {
                let states = gpu.query(region.pages())?;
                Ok(states.iter().map(|page| page.cpu.vram).collect())
            };
            let places = vram(&gpus[0], regions[0].0)?;
            for place in vram(&gpus[1], regions[1].0)? {
                same += usize::from(place.is_some() && places.contains(&place));
            }
            ensure!(same > 0, "{backing:?}: no address of VRAM is used on both");
            for advice in [Advice::MapOnly, Advice::Default] {
                for ((region, seed), stranger) in regions.iter().zip(gpus.iter().rev()) {
                    stranger.advise(region.pages(), advice)?;
                    let part = region.part(HUGE_PAGE_SIZE / 2, HUGE_PAGE_SIZE / 4);
                    for page in stranger.query(part.pages())? {
                        ensure!(page.cpu.vram.is_none() && page.gpu.vram.is_none());
                    }
                    let first = HUGE_PAGE_SIZE / 2 / 8;
                    let should = oracle::sum(*seed, first..first + part.words());
                    let sum = Job::sum(part).waves(4).run(stranger)?;
                    ensure!(sum == should, "{backing:?}, {advice:?}: another's page");
                    oracle::check(*region, *seed, 0)?;
                }
                for ((region, _), owner) in regions.iter().zip(&gpus) {
                    move_all(owner, *region, Place::Vram)?;
                }
            }
            for (region, seed) in regions {
                oracle::check(region, seed, 0)?;
                region.unmap()?;
            }
        }
        Ok(())
    }

    /// Works until the GPU is gone, or it is told to stop; how many turns went well.
    fn work_until_gone(gpu: &Gpu, shared: &Shared, stop: &AtomicBool) -> Result<(u64, bool)> {
        let mut turns = 0;
        loop {
            if stop.load(SeqCst) {
                return Ok((turns, false));
            }
            // One word at a time, so that what is lost with the GPU can be told.
            let add = Job::atomic_add(shared.region.address() + 8, 1, 1);
            let fence = match add.submit(gpu) {
                Err(Errno::NODEV) => return Ok((turns, true)),
                fence => fence?,
            };
            match call::wait(gpu, fence, JOB_TIME) {
                Err(Errno::NODEV) => return Ok((turns, true)),
                Ok(uapi::Wait { status, .. }) if status == JobStatus::DeviceLost.raw() => {
                    return Ok((turns, true));
                }
                end => ensure_status(&end?, JobStatus::Ok)?,
            }
            turns += 1;
        }
    }

    fn one_unbound_while_the_other_runs_harms_nothing() -> Result<()> {
        for last in [false, true] {
            let gpus = open(2)?;
            let shared = Shared::new(HUGE_PAGE_SIZE, Backing::Huge)?;
            shared.region.store(1, 0);
            for gpu in &gpus {
                gpu.advise(shared.region.pages(), Advice::PreferGpu)?;
            }
            let stop = AtomicBool::new(false);
            let device = bound(usize::from(last))?;
            let ended = thread::scope(|scope| -> Result<Vec<_>> {
                let workers: Vec<_> = gpus
                    .iter()
                    .map(|gpu| scope.spawn(|| work_until_gone(gpu, &shared, &stop)))
                    .collect();
                thread::sleep(Duration::from_millis(300));
                let unbound = tell_driver("unbind", &device);
                // The other one goes on.
                thread::sleep(Duration::from_millis(300));
                stop.store(true, SeqCst);
                unbound?;
                workers
                    .into_iter()
                    .map(|worker| worker.join().map_err(|_| anyhow!("a thread panicked"))?)
                    .collect()
            });
            let bound_again = tell_driver("bind", &device);
            let ended = ended?;
            bound_again?;
            let lost = ended.iter().filter(|(_, lost)| *lost).count() as u64;
            ensure!(lost == 1, "{lost} of the GPUs were lost: {ended:?}");
            let well: u64 = ended.iter().map(|(turns, _)| turns).sum();
            ensure!(ended.iter().all(|(turns, _)| *turns > 0), "{ended:?}");
            // The job that was lost may have added or not.
            let is = shared.region.load(1);
            ensure!((well..=well + lost).contains(&is), "{well} turns gave {is}");
            shared.region.store(1, oracle::word(SEED, 1));
            shared.ensure_final()?;
            drop(gpus);
            // Both are there again.
            for gpu in open(2)? {
                shared.turn(&gpu)?;
            }
            shared.ensure_final()?;
            shared.region.unmap()?;
        }
        Ok(())
    }
}

pub(super) mod eight {
    use super::*;

    group! { "races::eight_gpus", on EightGpus, seconds 300:
        range_that_eight_gpus_want_serves_all_of_them,
    }

    fn range_that_eight_gpus_want_serves_all_of_them() -> Result<()> {
        wanted_by(&open(Machine::EightGpus.gpus())?, 16 * PAGE_SIZE)
    }
}
