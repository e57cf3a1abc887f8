// SPDX-License-Identifier: MIT OR Apache-2.0
//! Programs that have memory of every start on one GPU while the host does something to that GPU: what was in
//! VRAM is then there, or lost, and what was in RAM is right in any case.

use super::{
    Program,
    call::Job,
    cases::mm::start::{At, SEED, STARTS, exercise},
    child::{self, Gate, ensure_sigbus},
    oracle,
    place::move_all,
    programs::{CLOSED, DONE, READY, say, wait_for_a_line},
};
use anyhow::{Context, Result, bail, ensure};
use farfault::arena::{Backing, Protection, Region, call_at};
use farfault::{
    Advice, Gpu, HUGE_PAGE_SIZE, PAGE_SIZE, Place,
    process::{Ended, fork},
    uapi,
};
use rustix::io::Errno;
use std::{cell::RefCell, fs::File};

/// `hold-resident NUMBER FATE`: has memory of every start on the GPU of this number, and a child that shares it
/// and has pages in VRAM of its own. It closes its descriptor when it gets a line, says [`CLOSED`], and looks
/// at its memory when it gets another one.
pub const HOLD_RESIDENT: &str = "hold-resident";
/// A fate: what was in VRAM is there.
pub const HOME: &str = "home";
/// A fate: who touches what was in VRAM gets SIGBUS.
pub const GONE: &str = "gone";

/// `hold-mapped NUMBER`: has memory in RAM that the GPU of this number has mapped. When it gets a line it says
/// [`PING_GAVE`] and an errno, or 0, and looks at its memory.
pub const HOLD_MAPPED: &str = "hold-mapped";
/// What PING gave follows.
pub const PING_GAVE: &str = "ping gave ";

/// Has two descriptors of the first GPU, one of which it has not used yet, memory of every start that a child shares, and pages in RAM that are the GPU's
/// alone. When it gets a line, GPU and CPU go on with all of it.
pub const HOLD_STARTS: &str = "hold-starts";

pub(super) const PROGRAMS: &[Program] = &[
    Program {
        name: HOLD_RESIDENT,
        run: hold_resident,
    },
    Program {
        name: HOLD_MAPPED,
        run: hold_mapped,
    },
    Program {
        name: HOLD_STARTS,
        run: hold_starts,
    },
];

const SIGBUS: i32 = 7;
const BACKINGS: [Backing<'static>; 2] = [Backing::Small, Backing::Huge];

fn open(number: &str) -> Result<Gpu> {
    Ok(Gpu::open(format!("/dev/farfault{number}"))?)
}

/// Words of [`SEED`] of one region, by where they are.
struct Held {
    region: Region,
    /// So many bytes of it, from its begin on, are in VRAM.
    in_vram: usize,
}

impl Held {
    /// One of each start.
    fn all(gpu: &Gpu) -> Result<Vec<Self>> {
        let held = STARTS.into_iter().map(|start| {
            Ok(Self {
                region: start.region(gpu, HUGE_PAGE_SIZE)?,
                in_vram: match start.at {
                    At::Vram => HUGE_PAGE_SIZE,
                    At::Half => HUGE_PAGE_SIZE / 2,
                    At::Ram => 0,
                },
            })
        });
        held.collect()
    }

    fn check_ram(&self) -> Result<()> {
        let length = self.region.length() - self.in_vram;
        let part = self.region.part(self.in_vram, length);
        oracle::check_part(part, SEED, self.in_vram / 8, 0)
    }

    fn check_vram(&self, fate: Fate) -> Result<()> {
        let part = self.region.part(0, self.in_vram);
        match fate {
            Fate::Home => oracle::check(part, SEED, 0),
            Fate::Gone if self.in_vram == 0 => Ok(()),
            Fate::Gone => {
                let last = part.words() - 1;
                ensure_sigbus(part.address(), || part.store(0, 1))?;
                ensure_sigbus(part.address() + last as u64 * 8, || {
                    std::hint::black_box(part.load(last));
                })
            }
        }
    }
}

/// What becomes of pages in VRAM.
#[derive(Clone, Copy, Debug)]
enum Fate {
    Home,
    Gone,
}

fn hold_resident(arguments: &[String]) -> Result<()> {
    let [number, fate] = arguments else {
        bail!("name a GPU's number and a fate");
    };
    let fate = match fate.as_str() {
        HOME => Fate::Home,
        GONE => Fate::Gone,
        _ => bail!("there is no such fate"),
    };
    let gpu = open(number)?;
    let held = Held::all(&gpu)?;
    // Soon only the child has these.
    let mut orphans = Vec::new();
    for backing in BACKINGS {
        let orphan = Region::map(HUGE_PAGE_SIZE, backing)?;
        oracle::write(orphan, SEED);
        move_all(&gpu, orphan, Place::Vram)?;
        orphans.push(orphan);
    }
    let gpu = RefCell::new(Some(gpu));
    let (begun, told) = (Gate::new()?, Gate::new()?);
    let child = fork(|| {
        // Its descriptor would keep the file open.
        drop(gpu.take());
        child::code((|| {
            begun.open()?;
            told.wait()?;
            held.iter().try_for_each(Held::check_ram)?;
            orphans
                .iter()
                .try_for_each(|orphan| oracle::check(*orphan, SEED, 0))
        })())
    })?;
    begun.wait()?;
    for orphan in orphans {
        orphan.unmap()?;
    }
    say(READY);
    wait_for_a_line()?;
    drop(gpu.take());
    say(CLOSED);
    wait_for_a_line()?;
    held.iter().try_for_each(Held::check_ram)?;
    held.iter().try_for_each(|held| held.check_vram(fate))?;
    told.open()?;
    let ended = child.wait()?;
    let expected = match fate {
        Fate::Home => Ended::Exited(0),
        Fate::Gone => Ended::Signaled(SIGBUS),
    };
    ensure!(ended == expected, "the child: {ended:?}");
    say(DONE);
    Ok(())
}

fn hold_mapped(arguments: &[String]) -> Result<()> {
    let [number] = arguments else {
        bail!("name a GPU's number");
    };
    let gpu = open(number)?;
    let mut regions = Vec::new();
    for backing in BACKINGS {
        let region = Region::map(HUGE_PAGE_SIZE, backing)?;
        oracle::write(region, SEED);
        gpu.advise(region.pages(), Advice::MapOnly)?;
        Job::add(region, 1).waves(2).run(&gpu)?;
        regions.push(region);
    }
    say(READY);
    wait_for_a_line()?;
    let ping = call_at(&gpu, uapi::IOC_PING, 0);
    let gave = ping.err().map_or(0, Errno::raw_os_error);
    say(&format!("{PING_GAVE}{gave}."));
    for region in regions {
        oracle::check(region, SEED, 1)?;
        // All that the CPU may do to it goes on, with notifiers that cannot reach the GPU.
        region.part(0, PAGE_SIZE).protect(Protection::Read)?;
        region.part(0, PAGE_SIZE).protect(Protection::ReadWrite)?;
        for index in 0..region.words() {
            region.store(index, oracle::word(SEED, index));
        }
        oracle::check(region, SEED, 0)?;
        region.unmap()?;
    }
    drop(gpu);
    say(DONE);
    Ok(())
}

fn hold_starts(_: &[String]) -> Result<()> {
    let gpu = Gpu::open_first()?;
    // The device does not know of it yet.
    let unused = File::options()
        .read(true)
        .write(true)
        .open("/dev/farfault0")?;
    let held = Held::all(&gpu)?;
    let gpu = RefCell::new(Some(gpu));
    let (begun, told) = (Gate::new()?, Gate::new()?);
    let child = fork(|| {
        drop(gpu.take());
        child::code((|| {
            begun.open()?;
            told.wait()?;
            held.iter()
                .try_for_each(|held| oracle::check(held.region, SEED, 0))
        })())
    })?;
    begun.wait()?;
    let gpu = gpu.take().context("the descriptor is the parent's")?;
    let alone = Region::map(16 * PAGE_SIZE, Backing::Small)?;
    oracle::write(alone, SEED);
    gpu.make_exclusive(alone.pages())?;
    say(READY);
    wait_for_a_line()?;
    for region in held.iter().map(|held| held.region).chain([alone]) {
        exercise(&gpu, region, 0, 0)?;
        move_all(&gpu, region, Place::Vram)?;
        exercise(&gpu, region, 0, 2)?;
    }
    call_at(&unused, uapi::IOC_PING, 0)?;
    // It has what was before all that.
    told.open()?;
    ensure!(child.wait()? == Ended::Exited(0));
    say(DONE);
    Ok(())
}
