// SPDX-License-Identifier: MIT OR Apache-2.0
//! Where pages are, and of which size, before mm does something to them; and what must hold after it.
//! Used by all groups of the suite, and by programs that hold such memory.

use crate::guest::{
    call::{self, JOB_TIME, Job, ensure_status},
    oracle,
    place::move_all,
};
use anyhow::{Context, Result, bail, ensure};
use farfault::arena::{Backing, Region};
use farfault::{Advice, Gpu, HUGE_PAGE_SIZE, Place, pagemap, uapi::JobStatus};
use std::time::{Duration, Instant};

/// What regions of a [`Start`] hold.
pub(in crate::guest) const SEED: u64 = 0x3a3a;

/// Where the GPU has a region's pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::guest) enum At {
    Vram,
    /// Mirrored: the GPU has them mapped where they are.
    Ram,
    /// The first half in VRAM, the second in RAM.
    Half,
}

#[derive(Clone, Copy, Debug)]
pub(in crate::guest) struct Start {
    pub(in crate::guest) backing: Backing<'static>,
    pub(in crate::guest) at: At,
}

const fn start(backing: Backing<'static>, at: At) -> Start {
    Start { backing, at }
}

pub(super) const START_SMALL_VRAM: Start = start(Backing::Small, At::Vram);

pub(in crate::guest) const STARTS: [Start; 6] = [
    start(Backing::Small, At::Vram),
    start(Backing::Huge, At::Vram),
    start(Backing::Small, At::Ram),
    start(Backing::Huge, At::Ram),
    start(Backing::Small, At::Half),
    start(Backing::Huge, At::Half),
];

impl Start {
    /// Which parts of a region are where.
    pub(super) fn parts(self, region: Region) -> Vec<(Region, Place)> {
        let half = (region.length() / 2).next_multiple_of(farfault::PAGE_SIZE);
        match self.at {
            At::Vram => vec![(region, Place::Vram)],
            At::Ram => vec![(region, Place::Ram)],
            At::Half => vec![
                (region.part(0, half), Place::Vram),
                (region.part(half, region.length() - half), Place::Ram),
            ],
        }
    }

    /// A region of [`SEED`]'s words. The GPU has written to it last, and leaves pages where they are.
    pub(in crate::guest) fn region(self, gpu: &Gpu, length: usize) -> Result<Region> {
        let region = Region::map(length, self.backing)?;
        oracle::write(region, SEED);
        self.place(gpu, region)?;
        Ok(region)
    }

    /// Puts pages there, and lets the GPU write to them, which changes nothing.
    pub(in crate::guest) fn place(self, gpu: &Gpu, region: Region) -> Result<()> {
        gpu.advise(region.pages(), Advice::MapOnly)?;
        for (part, place) in self.parts(region) {
            move_all(gpu, part, place)?;
        }
        Job::add(region, 0).waves(2).run(gpu)?;
        let states = gpu.query(region.pages())?;
        let mapped = states
            .iter()
            .all(|page| page.gpu.write && page.gpu.place == page.cpu.place);
        ensure!(mapped, "the GPU has not mapped all that it wrote to");
        Ok(())
    }
}

/// Runs a case on a GPU and 2 MiB of each start.
pub(super) fn each_start(case: impl Fn(&Gpu, Region) -> Result<()>) -> Result<()> {
    for start in STARTS {
        let gpu = Gpu::open_first()?;
        let region = start.region(&gpu, HUGE_PAGE_SIZE)?;
        case(&gpu, region).with_context(|| format!("{start:?}"))?;
        region.unmap()?;
    }
    Ok(())
}

/// The GPU's sum over a region that holds words of [`SEED`] from `first` on, with `added` to each.
pub(super) fn ensure_sum(gpu: &Gpu, region: Region, first: usize, added: u64) -> Result<()> {
    let words = region.words();
    let should =
        oracle::sum(SEED, first..first + words).wrapping_add(added.wrapping_mul(words as u64));
    let sum = Job::sum(region).waves(2).run(gpu)?;
    ensure!(
        sum == should,
        "the GPU's sum of {words} words at {:#x} is {sum:#x} and should be {should:#x}",
        region.address()
    );
    Ok(())
}

/// GPU and CPU have one memory: each reads what is there, writes, and sees what the other wrote. The
/// words are [`SEED`]'s from `first` on with `added`; after that, with 2 more.
pub(in crate::guest) fn exercise(
    gpu: &Gpu,
    region: Region,
    first: usize,
    added: u64,
) -> Result<()> {
    ensure_sum(gpu, region, first, added)?;
    Job::add(region, 1).waves(2).run(gpu)?;
    ensure_sum(gpu, region, first, added.wrapping_add(1))?;
    ensure_agreement(gpu, region)?;
    oracle::check_part(region, SEED, first, added.wrapping_add(1)).context("the CPU")?;
    for index in 0..region.words() {
        region.atomic_add(index, 1);
    }
    ensure_sum(gpu, region, first, added.wrapping_add(2))?;
    ensure_agreement(gpu, region)
}

/// As [`exercise`], for a whole region as a start left it.
pub(super) fn exercise_all(gpu: &Gpu, region: Region) -> Result<()> {
    exercise(gpu, region, 0, 0)
}

/// Nothing is there: GPU and CPU read zeros. What the GPU writes is a new page, which the CPU sees.
pub(super) fn exercise_empty(gpu: &Gpu, region: Region) -> Result<()> {
    let sum = Job::sum(region).waves(2).run(gpu)?;
    ensure!(
        sum == 0,
        "the GPU reads {sum:#x}, and there should be zeros"
    );
    Job::fill(region, 5).waves(2).run(gpu)?;
    ensure_words(region, 5)?;
    ensure_agreement(gpu, region)
}

/// Each word, as the CPU reads it.
pub(super) fn ensure_words(region: Region, word: u64) -> Result<()> {
    let wrong = (0..region.words()).find(|&index| region.load(index) != word);
    ensure!(
        wrong.is_none(),
        "word {wrong:?} at {:#x} is {:#x} and should be {word:#x}",
        region.address(),
        region.load(wrong.unwrap_or(0))
    );
    Ok(())
}

/// The kernel's pagemap, the driver and the GPU's page tables say the same.
pub(super) fn ensure_agreement(gpu: &Gpu, region: Region) -> Result<()> {
    let pages = region.pages();
    let mut problem = None;
    // Pages may be on their way between the two readings.
    for _ in 0..10 {
        problem = pagemap::disagreement(pages, &gpu.query(pages)?, &pagemap::read(pages)?);
        if problem.is_none() {
            return Ok(());
        }
    }
    bail!("{}", problem.unwrap_or_default())
}

/// Waits until something holds, with a time limit.
pub(in crate::guest) fn eventually(
    what: &str,
    mut holds: impl FnMut() -> Result<bool>,
) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !holds()? {
        ensure!(Instant::now() < deadline, "it never came that {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// Works for so long: less than a sleep, and for a task that is to be seen at work.
pub(in crate::guest) fn spin(time: Duration) {
    let end = Instant::now() + time;
    while Instant::now() < end {
        std::hint::spin_loop();
    }
}

/// Does something while a job adds 1 to every word of a region; the job ends well. (Two such jobs at
/// once would take each other's sums away: they do not add atomically.)
pub(super) fn while_adding<T>(
    gpu: &Gpu,
    region: Region,
    act: impl FnOnce() -> Result<T>,
) -> Result<T> {
    let fence = Job::add(region, 1).waves(2).submit(gpu)?;
    let result = act();
    ensure_status(&call::wait(gpu, fence, JOB_TIME)?, JobStatus::Ok)?;
    result
}
