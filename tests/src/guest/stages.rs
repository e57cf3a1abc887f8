// SPDX-License-Identifier: MIT OR Apache-2.0
//! A process that is in the middle of something when its GPU stops or dies, for cases of the host.
//!
//! It says how far it is, and goes on when it gets a line: [`READY`], then [`ACTING`] just before it does what
//! the stage is about, then [`FINE`] or [`LOST`] when it has looked at its memory in RAM. Last it touches its
//! memory in VRAM.

use super::{
    VRAM,
    call::{self, Job},
    cases::mm::numa::on_cpu,
    oracle,
    place::move_all,
    programs::{DONE, READY, SEED, say, wait_for_a_line, written},
};
use anyhow::{Context, Result, ensure};
use farfault::arena::{Backing, Protection, Region};
use farfault::{
    Advice, Gpu, HUGE_PAGE_SIZE, PAGE_SIZE, Place,
    process::{Ended, fork},
    uapi::{self, JobStatus},
};
use rustix::io::Errno;
use std::{
    thread::available_parallelism,
    time::{Duration, Instant},
};

/// `at-stage STAGE NUMBER`, with the number of a GPU.
pub const AT_STAGE: &str = "at-stage";
/// What it does next waits for the device.
pub const ACTING: &str = "acting";
/// The GPU answers, and all data is right.
pub const FINE: &str = "fine";
/// The GPU is lost, and the data in RAM is right.
pub const LOST: &str = "lost";

/// What a process may be doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Nothing.
    Idle,
    /// A job faults on page after page.
    Faults,
    /// Pages go to VRAM.
    MigrationUp,
    /// Pages come home.
    MigrationHome,
    /// The CPU touches a page in VRAM.
    CpuFault,
    /// The CPU takes rights from pages that the GPU has mapped.
    Invalidation,
    /// Pages go to VRAM, and others have to make room.
    Eviction,
    /// Another descriptor is opened and closed.
    OpenClose,
}

impl Stage {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::Idle,
        Self::Faults,
        Self::MigrationUp,
        Self::MigrationHome,
        Self::CpuFault,
        Self::Invalidation,
        Self::Eviction,
        Self::OpenClose,
    ];

    /// As the command line has it.
    #[must_use]
    pub fn name(self) -> String {
        format!("{self:?}")
    }
}

/// What a process has when its GPU goes.
struct Memory {
    /// In RAM, mapped and written by the GPU.
    kept: Region,
    /// In RAM.
    fresh: Region,
    /// In VRAM, written by the GPU: small pages that it has not mapped now, and a huge one that it has.
    resident: [Region; 2],
}

impl Memory {
    fn new(gpu: &Gpu) -> Result<Self> {
        let kept = written(16 * PAGE_SIZE, Backing::Small)?;
        gpu.advise(kept.pages(), Advice::MapOnly)?;
        Job::add(kept, 1).run(gpu)?;
        let in_vram = |backing| -> Result<_> {
            let region = written(HUGE_PAGE_SIZE, backing)?;
            move_all(gpu, region, Place::Vram)?;
            Job::add(region, 1).run(gpu)?;
            Ok(region)
        };
        let resident = [in_vram(Backing::Small)?, in_vram(Backing::Huge)?];
        // What the GPU has not mapped goes home by a copy alone; else the device would be lost before the copy begins.
        for protection in [Protection::Read, Protection::ReadWrite] {
            resident[0].protect(protection)?;
        }
        Ok(Self {
            kept,
            fresh: written(HUGE_PAGE_SIZE, Backing::Small)?,
            resident,
        })
    }
}

pub(super) fn at_stage(arguments: &[String]) -> Result<()> {
    let [stage, number] = arguments else {
        anyhow::bail!("name a stage and a GPU's number");
    };
    let stage = Stage::ALL.into_iter().find(|known| known.name() == *stage);
    let stage = stage.context("there is no such stage")?;
    let node = format!("/dev/farfault{number}");
    let gpu = Gpu::open(&node)?;
    let memory = Memory::new(&gpu)?;
    say(READY);
    wait_for_a_line()?;
    say(ACTING);
    let added = act(stage, &gpu, &node, &memory)?;
    let lost = gpu.ping().is_err();
    oracle::check(memory.kept, SEED, 1)?;
    if !lost || stage != Stage::Faults {
        oracle::check(memory.fresh, SEED, if lost { 0 } else { added })?;
    }
    say(if lost { LOST } else { FINE });
    wait_for_a_line()?;
    for region in memory.resident {
        let child = fork(|| u8::from(oracle::check(region, SEED, 1).is_err()))?;
        let ended = child.wait()?;
        let expected = if lost {
            Ended::Signaled(SIGBUS)
        } else {
            Ended::Exited(0)
        };
        ensure!(ended == expected, "a child that touches VRAM: {ended:?}");
    }
    // This one too: the host is told by which signal it ends.
    oracle::check(memory.resident[0], SEED, 1)
}

/// Has most of the VRAM of the first GPU. One of its threads waits for a page of the second, which keeps the lock of
/// its mappings, and another one waits for that lock.
pub const WAIT_FOR_SECOND: &str = "wait-for-second";

pub(super) fn wait_for_second(_: &[String]) -> Result<()> {
    let [first, second] = ["/dev/farfault0", "/dev/farfault1"].map(Gpu::open);
    let (first, second) = (first?, second?);
    let large = written(VRAM as usize / 8 * 5, Backing::Small)?;
    move_all(&first, large, Place::Vram)?;
    let page = written(PAGE_SIZE, Backing::Small)?;
    move_all(&second, page, Place::Vram)?;
    let spare = Region::map(PAGE_SIZE, Backing::Small)?;
    say(READY);
    wait_for_a_line()?;
    say(ACTING);
    std::thread::scope(|scope| {
        scope.spawn(|| std::hint::black_box(page.load(0)));
        std::thread::sleep(Duration::from_millis(100));
        spare.unmap()
    })?;
    oracle::check(page, SEED, 0)?;
    oracle::check(large, SEED, 0)?;
    say(FINE);
    Ok(())
}

/// Takes RAM that others have just given back, and sees that nobody writes to it.
pub const HOLD_RAM: &str = "hold-ram";

pub(super) fn hold_ram(_: &[String]) -> Result<()> {
    let mut regions = Vec::new();
    // Each CPU has lists of its own of what was given back on it.
    for cpu in 0..available_parallelism()?.get() {
        on_cpu(cpu)?;
        regions.push(written(VRAM as usize / 2, Backing::Small)?);
    }
    say(READY);
    wait_for_a_line()?;
    for region in regions {
        oracle::check(region, SEED, 0)?;
    }
    say(DONE);
    Ok(())
}

/// `count-in-ram NUMBER`: has a job of the GPU of this number that adds to a word in RAM for ever. When it gets a
/// line, that job is to be lost with the GPU: it says [`LOST`], and the word is the CPU's alone. With another line it
/// looks whether that is so.
pub const COUNT_IN_RAM: &str = "count-in-ram";

pub(super) fn count_in_ram(arguments: &[String]) -> Result<()> {
    /// What the device's threads may have had in their hands when they stopped: each 512 additions.
    const IN_HAND: u64 = 16 * 512;
    let [number] = arguments else {
        anyhow::bail!("name a GPU's number");
    };
    let gpu = Gpu::open(format!("/dev/farfault{number}"))?;
    let page = Region::map(PAGE_SIZE, Backing::Small)?;
    page.store(0, 0);
    gpu.advise(page.pages(), Advice::MapOnly)?;
    let job = Job::atomic_add(page.address(), 1, u64::MAX).submit(&gpu)?;
    let begin = Instant::now();
    while page.load(0) == 0 {
        ensure!(begin.elapsed() < JOB_LIMIT, "the job adds nothing");
    }
    say(READY);
    wait_for_a_line()?;
    let end = call::wait(&gpu, job, JOB_LIMIT);
    let lost = end.is_ok_and(|end| end.status == JobStatus::DeviceLost.raw());
    ensure!(lost || end == Err(Errno::IO), "WAIT gave {end:x?}");
    page.store(0, 0);
    say(LOST);
    wait_for_a_line()?;
    let added = page.load(0);
    ensure!(
        added <= IN_HAND,
        "the job has gone on, and added {added} to what is not the GPU's any more"
    );
    say(DONE);
    Ok(())
}

const SIGBUS: i32 = 7;
/// Longer than the driver waits for a device.
const JOB_LIMIT: Duration = Duration::from_secs(60);

/// Does what the stage is about, whether that succeeds or not. Returns what the GPU has added to the fresh
/// memory if it did.
fn act(stage: Stage, gpu: &Gpu, node: &str, memory: &Memory) -> Result<u64> {
    match stage {
        Stage::Idle => {}
        Stage::Faults => return fault(gpu, memory.fresh),
        Stage::MigrationUp => migrate(gpu, memory.fresh, Place::Vram)?,
        Stage::MigrationHome => migrate(gpu, memory.resident[0], Place::Ram)?,
        Stage::CpuFault => {
            std::hint::black_box(memory.resident[0].load(0));
        }
        Stage::Invalidation => memory.kept.protect(Protection::Read)?,
        Stage::Eviction => {
            let large = Region::map(VRAM as usize, Backing::Small)?;
            migrate(gpu, large, Place::Vram)?;
        }
        Stage::OpenClose => drop(Gpu::open(node)),
    }
    Ok(0)
}

/// Moves pages, or is told that the device is lost.
fn migrate(gpu: &Gpu, region: Region, to: Place) -> Result<()> {
    let migrate = uapi::Migrate {
        address: region.address(),
        length: region.length() as u64,
        destination: to.raw(),
        ..uapi::Migrate::default()
    };
    let moved = call::call(gpu, migrate).map(drop);
    ensure!(
        matches!(moved, Ok(()) | Err(Errno::IO)),
        "MIGRATE to {to:?}: {moved:?}"
    );
    Ok(())
}

/// Jobs fault on pages that come home each time, until something fails.
fn fault(gpu: &Gpu, region: Region) -> Result<u64> {
    const ROUNDS: u64 = 50;
    for _ in 0..ROUNDS {
        let Ok(fence) = Job::add(region, 1).waves(8).submit(gpu) else {
            return Ok(0);
        };
        let end = call::wait(gpu, fence, JOB_LIMIT);
        let well = end.is_ok_and(|end| end.status == JobStatus::Ok.raw());
        if !well || gpu.migrate(region.pages(), Place::Ram).is_err() {
            return Ok(0);
        }
    }
    Ok(ROUNDS)
}
