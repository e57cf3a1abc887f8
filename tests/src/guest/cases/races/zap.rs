// SPDX-License-Identifier: MIT OR Apache-2.0
//! Huge pages that somebody unmaps while they come home from VRAM: another thread that discards them, or a
//! child that has them, too, and ends. Nobody loses what is still his, and mm's books are right after it
//! (`docs/kernel-findings.md`, 5).

use super::field::Random;
use crate::guest::{
    cases::mm::start::spin,
    child::code,
    oracle,
    place::{anonymous, move_all},
    settings,
};
use anyhow::{Context, Result, ensure};
use farfault::arena::{Backing, Region};
use farfault::{
    Gpu, HUGE_PAGE_SIZE, Place,
    process::{Ended, fork},
    stage::Advice,
};
use std::{
    thread,
    time::{Duration, Instant},
};

group! { "races::zap", gpus 1, seconds 120:
    huge_page_discarded_while_it_comes_home_on_request_is_gone,
    huge_page_discarded_while_it_comes_home_for_the_cpu_is_gone,
    child_that_ends_while_its_huge_pages_come_home_on_request_takes_nothing_along,
    child_that_ends_while_its_huge_pages_come_home_for_the_cpu_takes_nothing_along,
}

const SEED: u64 = 0x2a9;
const SHORT: Duration = Duration::from_secs(5);
/// A huge page comes home within this, on a slow host too.
const LONGEST_BREAK: usize = 6000;
/// Of `AnonPages`, in KiB: others have memory, too.
const SLACK: u64 = 16 << 10;

/// What brings the page home.
#[derive(Clone, Copy, Debug)]
enum Home {
    Request,
    Cpu,
}

impl Home {
    /// Whether it found the page, if it says so.
    fn bring(self, gpu: &Gpu, region: Region) -> Result<Option<bool>> {
        match self {
            Self::Request => {
                let moved = gpu.migrate(region.pages(), Place::Ram)?;
                Ok(Some(moved.moved != 0))
            }
            Self::Cpu => {
                std::hint::black_box(region.load(region.words() / 3));
                Ok(None)
            }
        }
    }
}

/// Pauses until what comes home is disturbed: of any length, and in turns with these close to the moment in
/// which the page is collected, which those find out who are told whether they came too early for it.
struct Pauses {
    random: Random,
    near: bool,
    moment: usize,
}

impl Pauses {
    fn new() -> Self {
        Self {
            random: Random::new(settings::seed()),
            near: false,
            moment: LONGEST_BREAK / 4,
        }
    }

    fn next(&mut self) -> Duration {
        self.near = !self.near;
        let microseconds = match self.near {
            true => self.moment + self.random.below(self.moment / 8 + 1),
            false => self.random.below(LONGEST_BREAK),
        };
        Duration::from_micros(microseconds as u64)
    }

    /// How it was with the last one.
    fn was(&mut self, found: Option<bool>) {
        let step = self.moment / 16 + 2;
        match found {
            Some(true) if self.near => self.moment -= step.min(self.moment),
            Some(false) if self.near => self.moment = LONGEST_BREAK.min(self.moment + step),
            _ => {}
        }
    }
}

/// Rounds with a huge page in VRAM each, and a pause. They say whether it was found by who brought it home.
fn rounds(round: impl Fn(&Gpu, Region, Duration) -> Result<Option<bool>>) -> Result<()> {
    let mut pauses = Pauses::new();
    let gpu = Gpu::open_first()?;
    let region = Region::map(HUGE_PAGE_SIZE, Backing::Huge)?;
    oracle::write(region, SEED);
    // So that the sum has something to lose.
    let others = Region::map(64 << 20, Backing::Small)?;
    others.advise(Advice::PopulateWrite)?;
    let before = anonymous()?;
    let end = Instant::now() + settings::duration(SHORT);
    let mut count = 0;
    while count < 20 || Instant::now() < end {
        oracle::write(region, SEED);
        move_all(&gpu, region, Place::Vram)?;
        let pause = pauses.next();
        let found = round(&gpu, region, pause);
        pauses.was(found.with_context(|| format!("round {count}, {pause:?}"))?);
        let now = anonymous()?;
        ensure!(
            now.abs_diff(before) < SLACK,
            "AnonPages was {before} KiB and is {now} KiB after round {count}, {pause:?}"
        );
        region.discard()?;
        count += 1;
    }
    println!("rounds: {count}, collected after {} us", pauses.moment);
    Ok(())
}

fn discarded(home: Home) -> Result<()> {
    rounds(|gpu, region, pause| {
        let found = thread::scope(|scope| {
            let brought = scope.spawn(|| home.bring(gpu, region));
            spin(pause);
            region.discard()?;
            brought.join().map_err(|_| anyhow::anyhow!("it panicked"))?
        })?;
        region.discard()?;
        let left = (0..region.words()).find(|&word| region.load(word) != 0);
        ensure!(left.is_none(), "word {left:?} is there after the end");
        Ok(found)
    })
}

fn huge_page_discarded_while_it_comes_home_on_request_is_gone() -> Result<()> {
    discarded(Home::Request)
}

fn huge_page_discarded_while_it_comes_home_for_the_cpu_is_gone() -> Result<()> {
    discarded(Home::Cpu)
}

fn child_ends(home: Home) -> Result<()> {
    rounds(|gpu, region, pause| {
        let child = fork(|| {
            spin(pause);
            code(Ok(()))
        })?;
        home.bring(gpu, region)?;
        oracle::check(region, SEED, 0)?;
        ensure!(child.wait()? == Ended::Exited(0));
        oracle::check(region, SEED, 0)?;
        Ok(None)
    })
}

fn child_that_ends_while_its_huge_pages_come_home_on_request_takes_nothing_along() -> Result<()> {
    child_ends(Home::Request)
}

fn child_that_ends_while_its_huge_pages_come_home_for_the_cpu_takes_nothing_along() -> Result<()> {
    child_ends(Home::Cpu)
}
