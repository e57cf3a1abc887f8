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
    fn bring(self, gpu: &Gpu, region: Region) -> Result<()> {
        match self {
            Self::Request => {
                gpu.migrate(region.pages(), Place::Ram)?;
            }
            Self::Cpu => {
                std::hint::black_box(region.load(region.words() / 3));
            }
        }
        Ok(())
    }
}

/// Rounds with a huge page in VRAM each, and a pause of random length.
fn rounds(round: impl Fn(&Gpu, Region, Duration) -> Result<()>) -> Result<()> {
    let mut random = Random::new(settings::seed());
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
        let pause = Duration::from_micros(random.below(LONGEST_BREAK) as u64);
        round(&gpu, region, pause).with_context(|| format!("round {count}, {pause:?}"))?;
        let now = anonymous()?;
        ensure!(
            now.abs_diff(before) < SLACK,
            "AnonPages was {before} KiB and is {now} KiB after round {count}, {pause:?}"
        );
        region.discard()?;
        count += 1;
    }
    println!("rounds: {count}");
    Ok(())
}

fn discarded(home: Home) -> Result<()> {
    rounds(|gpu, region, pause| {
        thread::scope(|scope| {
            let brought = scope.spawn(|| home.bring(gpu, region));
            spin(pause);
            region.discard()?;
            brought.join().map_err(|_| anyhow::anyhow!("it panicked"))?
        })?;
        region.discard()?;
        let left = (0..region.words()).find(|&word| region.load(word) != 0);
        ensure!(left.is_none(), "word {left:?} is there after the end");
        Ok(())
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
        oracle::check(region, SEED, 0)
    })
}

fn child_that_ends_while_its_huge_pages_come_home_on_request_takes_nothing_along() -> Result<()> {
    child_ends(Home::Request)
}

fn child_that_ends_while_its_huge_pages_come_home_for_the_cpu_takes_nothing_along() -> Result<()> {
    child_ends(Home::Cpu)
}
