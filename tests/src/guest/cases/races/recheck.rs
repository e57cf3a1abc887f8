// SPDX-License-Identifier: MIT OR Apache-2.0
//! Memory that goes at any moment while the driver is about to map it: what the GPU then has is what the CPU
//! has, and never the page of a moment ago.

use super::field::Random;
use crate::guest::{
    call::{self, JOB_TIME, Job, ensure_status},
    cases::mm::start::spin,
    settings,
};
use anyhow::{Result, ensure};
use farfault::arena::{Backing, Region};
use farfault::{Advice, Gpu, PAGE_SIZE, uapi::JobStatus};
use std::time::{Duration, Instant};

group! { "races::recheck", gpus 1, seconds 120:
    page_discarded_while_it_is_mapped_from_ram_is_not_the_gpus,
    page_discarded_while_it_moves_to_vram_is_not_the_gpus,
}

const SHORT: Duration = Duration::from_millis(1500);
/// A fault is served within this, on a slow kernel too.
const LONGEST_BREAK: usize = 1500;
/// How long a job may take to count in a new page.
const LIMIT: Duration = Duration::from_secs(20);

fn page_discarded_while_it_is_mapped_from_ram_is_not_the_gpus() -> Result<()> {
    discard_while_counting(Advice::MapOnly)
}

fn page_discarded_while_it_moves_to_vram_is_not_the_gpus() -> Result<()> {
    discard_while_counting(Advice::Default)
}

/// A job counts in a page for ever. The page is discarded, and again before the job's fault is served, or
/// while it is. If the GPU had the first page still, nobody would see it count.
fn discard_while_counting(advice: Advice) -> Result<()> {
    let mut random = Random::new(settings::seed());
    let gpu = Gpu::open_first()?;
    let page = Region::map(PAGE_SIZE, Backing::Small)?;
    gpu.advise(page.pages(), advice)?;
    let fence = Job::atomic_add(page.address(), 1, u64::MAX).submit(&gpu)?;
    let end = Instant::now() + settings::duration(SHORT);
    let mut rounds = 0u64;
    while Instant::now() < end {
        for _ in 0..=random.below(3) {
            page.discard()?;
            spin(Duration::from_micros(random.below(LONGEST_BREAK) as u64));
        }
        page.discard()?;
        ensure_counting(page, rounds)?;
        rounds += 1;
    }
    println!("rounds: {rounds}");
    call::kill(&gpu, fence)?;
    ensure_status(&call::wait(&gpu, fence, JOB_TIME)?, JobStatus::Killed)?;
    Ok(page.unmap()?)
}

/// The job counts in the page that the CPU has.
fn ensure_counting(page: Region, round: u64) -> Result<()> {
    let limit = Instant::now() + LIMIT;
    let before = page.load(0);
    while page.load(0) == before {
        ensure!(
            Instant::now() < limit,
            "the job counts elsewhere than in the page that the CPU has, after round {round}"
        );
        std::thread::sleep(Duration::from_micros(50));
    }
    Ok(())
}
