// SPDX-License-Identifier: MIT OR Apache-2.0
//! Exit and `kill -9` at every point of a migration and of a fault: many children that live for a short
//! time, whose pages are partly their parent's. The survivors' data is right, and nothing is left.

use super::field::Random;
use crate::guest::{
    VRAM,
    call::{self, Job},
    cases::mm::start::eventually,
    child::code,
    oracle,
    place::migrate,
    settings,
};
use anyhow::{Context, Result, ensure};
use farfault::arena::{Backing, Region};
use farfault::{
    Gpu, HUGE_PAGE_SIZE, PAGE_SIZE, Place,
    process::{Ended, fork},
    uapi,
};
use rustix::{
    io::Errno,
    process::{Signal, kill_process},
};
use std::{
    thread,
    time::{Duration, Instant},
};

group! { "races::kill", on Small, seconds 180:
    kill_at_any_point_of_a_migration_leaves_others_right,
    kill_at_any_point_of_a_fault_leaves_others_right,
    exit_at_any_point_with_jobs_under_way_leaves_others_right,
    kill_at_any_point_of_an_eviction_leaves_others_right,
}

const SEED: u64 = 0xdead;
const SHORT: Duration = Duration::from_secs(6);
/// The latest point at which a child is killed.
const LATEST: usize = 40_000;
/// Pages that the survivor looks at while others live.
const FEW: usize = 2;
/// How many live at a time.
const CHILDREN: usize = 2;

/// What a child does until it is killed, on what it shares with its parent and on what is its own. It says where
/// it is.
type Life = fn(&Gpu, Region, Region, &mut Random, &At) -> Result<()>;

/// Where a child is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Point {
    /// It prepares.
    Before,
    /// In a call of the driver, or waiting for a job.
    Driver,
    /// It touches pages that the GPU had.
    Touch,
}

const POINTS: [Point; 3] = [Point::Before, Point::Driver, Point::Touch];

/// What one child says of itself, in memory that its parent sees.
struct At(Region);

impl At {
    fn new() -> Result<Self> {
        Ok(Self(Region::map(PAGE_SIZE, Backing::Shared)?))
    }

    fn is(&self, point: Point) {
        self.0.store(0, point as u64);
    }

    fn get(&self) -> u64 {
        self.0.load(0)
    }
}

fn migrating(gpu: &Gpu, shared: Region, own: Region, random: &mut Random, at: &At) -> Result<()> {
    at.is(Point::Driver);
    let region = if random.coin() { shared } else { own };
    let part = random.part(region);
    let request = uapi::Migrate {
        address: part.address(),
        length: part.length() as u64,
        destination: if random.coin() {
            Place::Vram
        } else {
            Place::Ram
        }
        .raw(),
        ..uapi::Migrate::default()
    };
    super::workers::tolerate(call::call(gpu, request), &[Errno::BUSY])
}

fn faulting(gpu: &Gpu, shared: Region, own: Region, random: &mut Random, at: &At) -> Result<()> {
    let region = if random.coin() { shared } else { own };
    let part = random.part(region);
    at.is(Point::Driver);
    Job::add(part, 1).waves(4).run(gpu)?;
    // The CPU faults, too.
    at.is(Point::Touch);
    for page in 0..part.length() / PAGE_SIZE {
        part.store(page * PAGE_SIZE / 8, 5);
    }
    Ok(())
}

fn leaving(gpu: &Gpu, shared: Region, own: Region, random: &mut Random, at: &At) -> Result<()> {
    at.is(Point::Driver);
    for region in [shared, own] {
        Job::fill(random.part(region), 3).waves(4).submit(gpu)?;
    }
    Job::atomic_add(own.address(), 1, u64::MAX).submit(gpu)?;
    thread::sleep(Duration::from_micros(random.below(LATEST / 4) as u64));
    std::process::exit(0)
}

fn evicting(gpu: &Gpu, _: Region, own: Region, random: &mut Random, at: &At) -> Result<()> {
    let big = Region::map(VRAM as usize * 3 / 4, Backing::Huge)?;
    at.is(Point::Driver);
    loop {
        Job::fill(random.part(big), 3).waves(4).run(gpu)?;
        Job::add(own, 1).run(gpu)?;
    }
}

fn live(life: Life, shared: Region, seed: u64, at: &At) -> Result<()> {
    let gpu = Gpu::open_first()?;
    let mut random = Random::new(seed);
    let backing = if random.coin() {
        Backing::Huge
    } else {
        Backing::Small
    };
    let own = Region::map(HUGE_PAGE_SIZE, backing)?;
    loop {
        life(&gpu, shared, own, &mut random, at)?;
    }
}

/// Children come and go at random moments; the parent's pages, which they share for their writes to
/// part, go on to be moved and used.
fn come_and_go(life: Life, may_exit: bool, points: &[Point]) -> Result<()> {
    let mut random = Random::new(settings::seed());
    let begin = Instant::now();
    let duration = settings::duration(SHORT);
    let (mut ended, mut exited) = (0, 0);
    let mut killed_at = [0; POINTS.len()];
    for backing in [Backing::Huge, Backing::Small].into_iter().cycle() {
        let reached = points.iter().all(|&point| killed_at[point as usize] != 0)
            && (exited != 0 || !may_exit);
        if begin.elapsed() >= duration && reached {
            break;
        }
        let gpu = Gpu::open_first()?;
        let region = Region::map(HUGE_PAGE_SIZE, backing)?;
        oracle::write(region, SEED);
        if random.coin() {
            migrate(&gpu, region, Place::Vram)?;
        }
        let children = (0..CHILDREN).map(|_| {
            let (seed, at) = (random.any(), At::new()?);
            let child = fork(|| code(live(life, region, seed, &at)))?;
            Ok((child, at))
        });
        let children = children.collect::<Result<Vec<_>>>()?;
        for (child, at) in children {
            eventually("a child is under way", || {
                Ok(at.get() != Point::Before as u64)
            })?;
            thread::sleep(Duration::from_micros(random.below(LATEST) as u64));
            if let Some(pid) = child.pid() {
                // It may have left by itself, but nobody has waited for it.
                kill_process(pid, Signal::KILL)?;
            }
            let how = child.wait()?;
            let killed = how == Ended::Signaled(Signal::KILL.as_raw());
            if killed {
                killed_at[at.get() as usize % POINTS.len()] += 1;
            }
            at.0.unmap()?;
            ensure!(killed || may_exit && how == Ended::Exited(0), "{how:?}");
            exited += u32::from(!killed);
            ended += 1;
            // A few pages, for the others move them all the time.
            let offset = random.below(512 - FEW) * PAGE_SIZE;
            let few = region.part(offset, FEW * PAGE_SIZE);
            let should = oracle::sum(SEED, offset / 8..offset / 8 + few.words());
            let sum = Job::sum(few).run(&gpu)?;
            ensure!(sum == should, "{backing:?}: the survivor's sum");
        }
        let added = 1;
        Job::add(region, added).waves(4).run(&gpu)?;
        let should = oracle::expected_sum(region, SEED, added);
        let sum = Job::sum(region).waves(4).run(&gpu)?;
        ensure!(sum == should, "{backing:?}: the survivor's sum");
        oracle::check(region, SEED, added).with_context(|| format!("{backing:?}"))?;
        region.unmap()?;
    }
    println!(
        "{ended} children ended in {:?}: {:?} at {POINTS:?}",
        begin.elapsed(),
        killed_at
    );
    // Nothing is lost to those who are gone: they give up most of VRAM a moment after their end.
    let gpu = Gpu::open_first()?;
    let all = Region::map(VRAM as usize * 3 / 4, Backing::Huge)?;
    ensure!(
        Job::sum(all).waves(8).run(&gpu)? == 0,
        "new memory is not zero"
    );
    Ok(all.unmap()?)
}

fn kill_at_any_point_of_a_migration_leaves_others_right() -> Result<()> {
    come_and_go(migrating, false, &[Point::Driver])
}

fn kill_at_any_point_of_a_fault_leaves_others_right() -> Result<()> {
    come_and_go(faulting, false, &[Point::Driver, Point::Touch])
}

fn exit_at_any_point_with_jobs_under_way_leaves_others_right() -> Result<()> {
    come_and_go(leaving, true, &[Point::Driver])
}

fn kill_at_any_point_of_an_eviction_leaves_others_right() -> Result<()> {
    come_and_go(evicting, false, &[Point::Driver])
}
