// SPDX-License-Identifier: MIT OR Apache-2.0
//! Helpers: processes that cases kill, and processes that hold still while the host looks at the GPU
//! or takes it away.
//!
//! The latter say a word on standard output, and go on when they get a line. What they say is here,
//! for both sides.

use super::{
    Program, VRAM,
    call::{self, Job},
    child::{self, Gate, ensure_sigbus},
    load,
    mirror::{Action, Mirror},
    oracle,
    place::{migrate, move_all, state},
    stages,
};
use anyhow::{Context, Result, bail, ensure};
use farfault::arena::{Backing, Region};
use farfault::{
    Advice, Gpu, HUGE_PAGE_SIZE, PAGE_SIZE, Place, pagemap,
    process::{Ended, fork},
    uapi::{self, JobStatus},
};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    pipe::pipe,
};
use serde::{Deserialize, Serialize};
use std::{
    cell::RefCell,
    fs::File,
    io::{self, Read, Write},
    os::unix::process::CommandExt,
    process::Command,
    time::{Duration, Instant},
};

/// Moves pages to VRAM and exits.
pub(super) const EXIT_WITH_PAGES: &str = "exit-with-pages";
/// Starts an endless job and exits.
pub(super) const EXIT_WITH_JOB: &str = "exit-with-job";
/// Moves pages to VRAM and executes another program.
pub(super) const EXEC_WITH_PAGES: &str = "exec-with-pages";
/// GPU and CPU take pages from each other. As the three below, it says [`READY`] when it is at work, and
/// ends with the error that the GPU gave it, after [`DATA_RIGHT`].
pub const FAULT_FOR_EVER: &str = "fault-for-ever";
/// Moves pages to VRAM and back.
pub const MIGRATE_FOR_EVER: &str = "migrate-for-ever";
/// Works on more than VRAM holds.
pub const EVICT_FOR_EVER: &str = "evict-for-ever";
/// Starts jobs, and ends them.
pub const KILL_FOR_EVER: &str = "kill-for-ever";
/// Its standard input is somebody else's GPU.
pub(super) const USE_STDIN: &str = "use-stdin";
/// Prepares pages in all states, prints a [`Report`] and holds still until it gets a line.
pub const HOLD_PAGES: &str = "hold-pages";
/// Had pages in VRAM, which came home when it closed its descriptor, and has a child with pages of its own; both
/// check their data when it gets a line.
pub const HOLD_CLOSED: &str = "hold-closed";
/// Has a descriptor and pages in VRAM, and goes on working when it gets a line.
pub const HOLD_OPEN: &str = "hold-open";
/// Has pages in VRAM, prints the addresses there of [`FAILING`] as JSON, and expects these to fail after
/// [`READY`].
pub const LOSE_MEMORY: &str = "lose-memory";
/// Has a descriptor, pages in VRAM and a job, and expects the GPU to be unbound after [`READY`].
/// When it gets a line, the GPU is there again.
pub const LOSE_DRIVER: &str = "lose-driver";
/// `lose-device NUMBER HOW`: has a job on the GPU of this number, whose process is dead when it gets a line. It waits
/// for the job as [`FOR_EVER`] or [`WITH_A_LIMIT`] says.
pub const LOSE_DEVICE: &str = "lose-device";
/// A way to wait.
pub const FOR_EVER: &str = "for-ever";
/// A way to wait: for longer than the driver does for the device.
pub const WITH_A_LIMIT: &str = "with-a-limit";

/// Has both nodes of `dmirror=1` open, with pages in the VRAM of each, and checks its data when it gets
/// a line.
pub const HOLD_MIRRORS: &str = "hold-mirrors";
/// The same, and when it gets a line, one of the GPUs is to be unbound.
pub const LOSE_MIRROR: &str = "lose-mirror";

/// A program says so when the host may act.
pub const READY: &str = "ready";
/// A program says so when what the host did had the effect that it should have.
pub const DONE: &str = "done";
/// A program says so when it has no descriptor any more.
pub const CLOSED: &str = "closed";
/// A program that works for ever says so when the GPU failed it, and its memory holds what it should.
pub const DATA_RIGHT: &str = "data right";

pub(super) const PROGRAMS: &[Program] = &[
    Program {
        name: LOSE_MEMORY,
        run: lose_memory,
    },
    Program {
        name: EXIT_WITH_PAGES,
        run: exit_with_pages,
    },
    Program {
        name: EXIT_WITH_JOB,
        run: exit_with_job,
    },
    Program {
        name: EXEC_WITH_PAGES,
        run: exec_with_pages,
    },
    Program {
        name: FAULT_FOR_EVER,
        run: load::fault_for_ever,
    },
    Program {
        name: MIGRATE_FOR_EVER,
        run: load::migrate_for_ever,
    },
    Program {
        name: EVICT_FOR_EVER,
        run: load::evict_for_ever,
    },
    Program {
        name: KILL_FOR_EVER,
        run: load::kill_for_ever,
    },
    Program {
        name: USE_STDIN,
        run: use_stdin,
    },
    Program {
        name: HOLD_PAGES,
        run: hold_pages,
    },
    Program {
        name: HOLD_CLOSED,
        run: hold_closed,
    },
    Program {
        name: HOLD_OPEN,
        run: hold_open,
    },
    Program {
        name: LOSE_DRIVER,
        run: lose_driver,
    },
    Program {
        name: LOSE_DEVICE,
        run: lose_device,
    },
    Program {
        name: stages::AT_STAGE,
        run: stages::at_stage,
    },
    Program {
        name: stages::HOLD_RAM,
        run: stages::hold_ram,
    },
    Program {
        name: stages::WAIT_FOR_SECOND,
        run: stages::wait_for_second,
    },
    Program {
        name: stages::COUNT_IN_RAM,
        run: stages::count_in_ram,
    },
    Program {
        name: HOLD_MIRRORS,
        run: hold_mirrors,
    },
    Program {
        name: LOSE_MIRROR,
        run: lose_mirror,
    },
];

/// What a process knows about its pages.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Report {
    /// The number of its address space on the GPU.
    pub context: u32,
    /// First and last address that it speaks of, exclusive.
    pub range: std::ops::Range<u64>,
    /// Those of these pages that the driver says the GPU has mapped.
    pub mapped: Vec<MappedPage>,
    /// Those that the driver says are in VRAM: address, and address in VRAM.
    pub in_vram: Vec<(u64, u64)>,
}

/// A page that the GPU has mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MappedPage {
    /// Its address.
    pub address: u64,
    /// Its address in VRAM, if it is there.
    pub vram: Option<u64>,
    /// Its frame in RAM by `/proc/self/pagemap`, if it is there.
    pub frame: Option<u64>,
    /// The GPU may write.
    pub write: bool,
    /// The GPU may do atomics.
    pub atomic: bool,
    /// It is part of a huge entry.
    pub huge: bool,
}

pub(super) const SEED: u64 = 0x4019;
/// The time that the driver gives the device, and some more.
const DRIVER_LIMIT: Duration = Duration::from_secs(60);

pub(super) fn say(word: &str) {
    println!("{word}");
}

pub(super) fn wait_for_a_line() -> Result<()> {
    let mut line = String::new();
    let length = io::stdin().read_line(&mut line)?;
    ensure!(length > 0, "standard input ended before a line came");
    Ok(())
}

/// Whether a line has come that nobody has read.
pub(super) fn has_line() -> Result<bool> {
    let input = io::stdin();
    let mut descriptors = [PollFd::new(&input, PollFlags::IN)];
    Ok(poll(&mut descriptors, Some(&Timespec::default()))? != 0)
}

pub(super) fn written(length: usize, backing: Backing<'_>) -> Result<Region> {
    let region = Region::map(length, backing)?;
    oracle::write(region, SEED);
    Ok(region)
}

/// A descriptor, and a lot of pages in VRAM.
fn with_pages() -> Result<(Gpu, Region)> {
    let gpu = Gpu::open_first()?;
    let region = written(VRAM as usize / 2, Backing::Huge)?;
    move_all(&gpu, region, Place::Vram)?;
    Job::add(region, 1).waves(4).run(&gpu)?;
    Ok((gpu, region))
}

fn exit_with_pages(_: &[String]) -> Result<()> {
    let (_gpu, _) = with_pages()?;
    // The kernel closes the descriptor, while the memory goes away.
    std::process::exit(0)
}

fn exit_with_job(_: &[String]) -> Result<()> {
    let (gpu, region) = with_pages()?;
    Job::endless(region).submit(&gpu)?;
    std::process::exit(0)
}

fn exec_with_pages(_: &[String]) -> Result<()> {
    let (gpu, region) = with_pages()?;
    Job::endless(region).submit(&gpu)?;
    Err(Command::new("/proc/self/exe").arg("--list").exec().into())
}

fn use_stdin(_: &[String]) -> Result<()> {
    let region = written(PAGE_SIZE, Backing::Small)?;
    call::ensure_every_call_fails(io::stdin(), region, Errno::PERM)
}

/// Pages in all the states that there are, next to each other.
fn mixed_pages(gpu: &Gpu) -> Result<Region> {
    const PART: usize = 32 * PAGE_SIZE;
    let region = Region::map(2 * HUGE_PAGE_SIZE, Backing::Huge)?;
    // The first 2 MiB are one huge page in VRAM, used by the GPU. The others are small pages.
    region
        .part(HUGE_PAGE_SIZE, HUGE_PAGE_SIZE)
        .pages()
        .allow_huge(false)?;
    let huge = region.part(0, HUGE_PAGE_SIZE);
    oracle::write(huge, SEED);
    Job::add(huge, 1).run(gpu)?;
    let part = |index: usize| region.part(HUGE_PAGE_SIZE + index * PART, PART);
    // Part 0 is never touched; 1 is touched by the CPU only.
    for index in 1..8 {
        oracle::write(part(index), SEED);
    }
    // 2: on request in VRAM.
    move_all(gpu, part(2), Place::Vram)?;
    // 3: used by the GPU, there.
    Job::add(part(3), 1).run(gpu)?;
    // 4: the same, every other page then touched by the CPU.
    Job::add(part(4), 1).run(gpu)?;
    for page in (0..32).step_by(2) {
        part(4).store(page * PAGE_SIZE / 8, 1);
    }
    // 5: mapped in RAM, to be read.
    gpu.advise(part(5).pages(), Advice::MapOnly)?;
    Job::sum(part(5)).run(gpu)?;
    // 6: mapped in RAM, to be written.
    gpu.advise(part(6).pages(), Advice::PreferCpu)?;
    Job::add(part(6), 1).run(gpu)?;
    // 7: partly in VRAM, and nobody has used it there.
    move_all(gpu, part(7).part(0, PART / 2), Place::Vram)?;
    // 8: made by the GPU.
    Job::fill(part(8), 8).run(gpu)?;
    // 9: the GPU's alone, in RAM.
    oracle::write(part(9), SEED);
    gpu.make_exclusive(part(9).pages())?;
    Ok(region)
}

fn hold_pages(_: &[String]) -> Result<()> {
    let gpu = Gpu::open_first()?;
    let region = mixed_pages(&gpu)?;
    let pages = region.pages();
    let states = gpu.query(pages)?;
    let entries = pagemap::read(pages)?;
    if let Some(problem) = pagemap::disagreement(pages, &states, &entries) {
        anyhow::bail!("driver and pagemap disagree: {problem}");
    }
    // All of the states are there, or this test would prove less than it says.
    let places: std::collections::HashSet<_> = states
        .iter()
        .map(|page| (page.cpu.place, page.gpu.place))
        .collect();
    for expected in [
        (Place::None, Place::None),
        (Place::Ram, Place::None),
        (Place::Ram, Place::Ram),
        (Place::Vram, Place::Vram),
    ] {
        ensure!(
            places.contains(&expected),
            "no page is in {expected:?}: {places:?}"
        );
    }
    let address = |index: usize| region.address() + (index * PAGE_SIZE) as u64;
    let mapped = states.iter().zip(&entries).enumerate();
    let mapped = mapped.filter(|(_, (state, _))| state.gpu.place != Place::None);
    let report = Report {
        context: gpu.info().context,
        range: region.address()..region.address() + region.length() as u64,
        mapped: mapped
            .map(|(index, (state, entry))| MappedPage {
                address: address(index),
                vram: state.gpu.vram,
                frame: entry.frame().filter(|_| state.gpu.place == Place::Ram),
                write: state.gpu.write,
                atomic: state.gpu.atomic,
                huge: state.gpu.huge,
            })
            .collect(),
        in_vram: states
            .iter()
            .enumerate()
            .filter_map(|(index, state)| Some((address(index), state.cpu.vram?)))
            .collect(),
    };
    println!("{}", serde_json::to_string(&report)?);
    say(READY);
    wait_for_a_line()?;
    let after = gpu.query(pages)?;
    let moved = after
        .iter()
        .zip(&states)
        .position(|(now, then)| (now.cpu.place, now.gpu.place) != (then.cpu.place, then.gpu.place));
    ensure!(moved.is_none(), "page {moved:?} has moved meanwhile");
    oracle::check(region.part(0, HUGE_PAGE_SIZE), SEED, 1)
}

fn hold_closed(_: &[String]) -> Result<()> {
    let (gpu, region) = with_pages()?;
    // Pages in VRAM that a child has, and nobody else: the owner of the descriptor has unmapped them.
    let orphan = written(2 * HUGE_PAGE_SIZE, Backing::Huge)?;
    move_all(&gpu, orphan, Place::Vram)?;
    let (from_parent, to_child) = pipe()?;
    let (mut from_parent, mut to_child) = (File::from(from_parent), File::from(to_child));
    let (from_child, to_parent) = pipe()?;
    let (mut from_child, mut to_parent) = (File::from(from_child), File::from(to_parent));
    let gpu = RefCell::new(Some(gpu));
    let child = fork(|| {
        // The descriptor that it inherited is one of those that keep the module.
        drop(gpu.take());
        let told = to_parent.write_all(&[1]);
        let told = told.and_then(|()| from_parent.read_exact(&mut [0]));
        match told
            .map_err(anyhow::Error::from)
            .and_then(|()| oracle::check(orphan, SEED, 0))
        {
            Ok(()) => 0,
            Err(error) => {
                eprintln!("child: {error:?}");
                1
            }
        }
    })?;
    orphan.unmap()?;
    from_child.read_exact(&mut [0])?;
    drop(gpu.take());
    say(READY);
    wait_for_a_line()?;
    oracle::check(region, SEED, 1)?;
    to_child.write_all(&[1])?;
    ensure!(child.wait()? == Ended::Exited(0));
    say(DONE);
    Ok(())
}

fn hold_open(_: &[String]) -> Result<()> {
    let (gpu, region) = with_pages()?;
    say(READY);
    wait_for_a_line()?;
    Job::add(region, 1).waves(4).run(&gpu)?;
    oracle::check(region, SEED, 2)?;
    say(DONE);
    Ok(())
}

fn lose_driver(_: &[String]) -> Result<()> {
    let (gpu, region) = with_pages()?;
    let ring = Region::map(4 * PAGE_SIZE, Backing::Small)?;
    let fence = Job::endless(ring).submit(&gpu)?;
    let small = written(64 * PAGE_SIZE, Backing::Small)?;
    move_all(&gpu, small, Place::Vram)?;
    // No job of its own runs.
    let idle = Gpu::open_first()?;
    idle.ping()?;
    say(READY);
    let wakes = |gpu: &Gpu| -> Result<bool> {
        let mut descriptors = [PollFd::new(gpu, PollFlags::IN)];
        let begin = Instant::now();
        poll(&mut descriptors, Some(&Timespec::try_from(DRIVER_LIMIT)?))?;
        // At the end of its time it looks once more by itself.
        Ok(!descriptors[0].revents().is_empty() && begin.elapsed() < DRIVER_LIMIT)
    };
    // Nothing but the unbinding can wake these three.
    let (polled, waited) = std::thread::scope(|scope| {
        let waiter = scope.spawn(|| call::wait(&gpu, fence, DRIVER_LIMIT));
        let idler = scope.spawn(|| wakes(&idle));
        ([Ok(wakes(&gpu)), idler.join()], waiter.join())
    });
    for polled in polled {
        let polled = polled.map_err(|_| anyhow::anyhow!("who polls panicked"))?;
        ensure!(polled?, "poll did not wake");
    }
    let waited = waited.map_err(|_| anyhow::anyhow!("the waiter panicked"))?;
    let ended = |end: uapi::Wait| {
        let lost = [JobStatus::Killed, JobStatus::DeviceLost].map(JobStatus::raw);
        lost.contains(&end.status)
    };
    ensure!(
        waited == Err(Errno::NODEV) || waited.is_ok_and(ended),
        "WAIT gave {waited:?}"
    );
    // The unbinding goes on for a while after the first have been woken.
    let deadline = Instant::now() + DRIVER_LIMIT;
    while gpu.ping().is_ok() {
        ensure!(Instant::now() < deadline, "PING is still answered");
        std::thread::sleep(Duration::from_millis(5));
    }
    call::ensure_every_call_fails(&gpu, small, Errno::NODEV)?;
    oracle::check(region, SEED, 1)?;
    oracle::check(small, SEED, 0)?;
    say(DONE);
    wait_for_a_line()?;
    let new = Gpu::open_first().context("after the GPU was bound again")?;
    Job::add(region, 1).waves(4).run(&new)?;
    oracle::check(region, SEED, 2)?;
    call::ensure_every_call_fails(&gpu, small, Errno::NODEV)
}

/// How memory is backed whose page with this number fails: a small one, one inside a huge one, and a
/// huge one's first. And what brings the rest home: a request, or the CPU that touches it.
const FAILING: [(Backing<'_>, usize, bool); 5] = [
    (Backing::Small, 5, false),
    (Backing::Huge, 7, false),
    (Backing::Huge, 0, false),
    (Backing::Huge, 7, true),
    (Backing::Huge, 0, true),
];

const SIGBUS: i32 = 7;

fn lose_memory(_: &[String]) -> Result<()> {
    let gpu = Gpu::open_first()?;
    let mut memory = Vec::new();
    let mut failing = Vec::new();
    for (backing, page, asked) in FAILING {
        let region = written(HUGE_PAGE_SIZE, backing)?;
        move_all(&gpu, region, Place::Vram)?;
        let vram = state(&gpu, region, page)?.cpu.vram;
        failing.push(vram.context("QUERY says nothing of a page in VRAM")?);
        memory.push((region, page, asked));
    }
    // And one that a child has, too, so that the GPU may only read it. Both lose it, and it alone.
    let shared = written(4 * PAGE_SIZE, Backing::Small)?;
    move_all(&gpu, shared, Place::Vram)?;
    let vram = state(&gpu, shared, 1)?.cpu.vram;
    failing.push(vram.context("QUERY says nothing of a page in VRAM")?);
    let gate = Gate::new()?;
    let lost = shared.part(PAGE_SIZE, PAGE_SIZE);
    let rest = shared.part(2 * PAGE_SIZE, 2 * PAGE_SIZE);
    let lose_shared = |added_before| -> Result<()> {
        ensure_sigbus(lost.address(), || lost.store(0, 1))?;
        oracle::check(shared.part(0, PAGE_SIZE), SEED, added_before)?;
        oracle::check_part(rest, SEED, 2 * PAGE_SIZE / 8, 0)
    };
    let child = fork(|| {
        child::code((|| {
            gate.wait()?;
            lose_shared(0)?;
            ensure!(lost.load(0) == 0, "nothing is there");
            Ok(())
        })())
    })?;
    println!("{}", serde_json::to_string(&failing)?);
    say(READY);
    wait_for_a_line()?;
    let end = Job::add(shared, 1).end(&gpu)?;
    call::ensure_status(&end, JobStatus::MemoryError)?;
    ensure!(end.fault_address == lost.address());
    gate.open()?;
    let ended = child.wait()?;
    ensure!(ended == Ended::Signaled(SIGBUS), "the child: {ended:?}");
    // The job came as far as that page.
    lose_shared(1)?;
    shared.unmap()?;
    for (region, page, asked) in memory {
        let word = page * PAGE_SIZE / 8;
        let end = Job::sum(region).end(&gpu)?;
        call::ensure_status(&end, JobStatus::MemoryError)?;
        let bad = region.part(page * PAGE_SIZE, PAGE_SIZE);
        ensure!(
            end.fault_address == bad.address() && end.result == 0,
            "{end:x?}"
        );
        if asked {
            let home = migrate(&gpu, region, Place::Ram)?;
            ensure!(home.stayed == 1, "{home:?}");
        }
        // Those who touch it get SIGBUS, to read and to write, and anywhere in it.
        let last = PAGE_SIZE / 8 - 1;
        let address = bad.address() + last as u64 * 8;
        ensure_sigbus(address, || {
            std::hint::black_box(bad.load(last));
        })?;
        ensure_sigbus(bad.address(), || bad.store(0, 1))?;
        // All around it is as it was, for the CPU and then for the GPU.
        let parts = [(0, page), (page + 1, HUGE_PAGE_SIZE / PAGE_SIZE)];
        for (from, to) in parts.into_iter().filter(|(from, to)| from < to) {
            let part = region.part(from * PAGE_SIZE, (to - from) * PAGE_SIZE);
            oracle::check_part(part, SEED, from * PAGE_SIZE / 8, 0)?;
            Job::add(part, 1).run(&gpu)?;
            oracle::check_part(part, SEED, from * PAGE_SIZE / 8, 1)?;
        }
        // Given up and mapped anew, the address has memory again.
        bad.discard()?;
        ensure!(region.load(word) == 0);
        Job::add(bad, 3).run(&gpu)?;
        ensure!(region.load(word) == 3);
    }
    say(DONE);
    Ok(())
}

fn lose_device(arguments: &[String]) -> Result<()> {
    let [number, how] = arguments else {
        bail!("name a GPU's number and how to wait");
    };
    let gpu = Gpu::open(format!("/dev/farfault{number}"))?;
    let region = written(16 * PAGE_SIZE, Backing::Small)?;
    let fence = Job::endless(Region::map(PAGE_SIZE, Backing::Small)?).submit(&gpu)?;
    gpu.advise(region.pages(), Advice::MapOnly)?;
    Job::add(region, 1).run(&gpu)?;
    say(READY);
    wait_for_a_line()?;
    let begin = Instant::now();
    // Nobody else asks the device for anything.
    let running = match how.as_str() {
        FOR_EVER => call::wait_for_ever(&gpu, fence),
        WITH_A_LIMIT => call::wait(&gpu, fence, DRIVER_LIMIT),
        _ => bail!("there is no such way to wait"),
    };
    let lost = running.is_ok_and(|end| end.status == JobStatus::DeviceLost.raw());
    ensure!(
        lost || running == Err(Errno::IO),
        "WAIT for the running job gave {running:?}"
    );
    for (name, result) in call::every_call(&gpu, region) {
        // INFO, ADVISE, STATS and QUERY may need nothing of the device.
        let needs_device = ["SUBMIT", "MIGRATE", "EXCLUSIVE", "PING"].contains(&name);
        ensure!(
            !needs_device || result == Err(Errno::IO),
            "{name} gave {result:?}"
        );
    }
    ensure!(
        begin.elapsed() < DRIVER_LIMIT,
        "it took {:?}",
        begin.elapsed()
    );
    // What is in RAM is as it was.
    oracle::check(region, SEED, 1)?;
    say(DONE);
    Ok(())
}

/// Both nodes, each with pages in its VRAM, and memory for answers.
fn with_mirrors() -> Result<([(Mirror, Region); 2], Region)> {
    let buffer = Region::map(2 * HUGE_PAGE_SIZE, Backing::Small)?;
    let open = |number| -> Result<_> {
        let mirror = Mirror::open(number)?;
        let region = written(2 * HUGE_PAGE_SIZE, Backing::Huge)?;
        mirror.call(Action::ToDevice, region, buffer)?;
        oracle::check(buffer, SEED, 0)?;
        Ok((mirror, region))
    };
    Ok(([open(0)?, open(1)?], buffer))
}

fn hold_mirrors(_: &[String]) -> Result<()> {
    let (mirrors, buffer) = with_mirrors()?;
    say(READY);
    wait_for_a_line()?;
    for (mirror, region) in mirrors {
        mirror.call(Action::Read, region, buffer)?;
        oracle::check(buffer, SEED, 0)?;
        drop(mirror);
        oracle::check(region, SEED, 0)?;
    }
    say(DONE);
    Ok(())
}

fn lose_mirror(_: &[String]) -> Result<()> {
    let (mirrors, buffer) = with_mirrors()?;
    say(READY);
    wait_for_a_line()?;
    let mut lost = 0;
    for (mirror, region) in &mirrors {
        let revoked = mirror.call(Action::Read, *region, buffer) == Err(Errno::NODEV);
        lost += usize::from(revoked);
        for action in Action::ALL {
            let result = mirror.call(action, *region, buffer);
            let should = if revoked {
                result == Err(Errno::NODEV)
            } else {
                result.is_ok() || (action, result) == (Action::CheckExclusive, Err(Errno::PERM))
            };
            ensure!(should, "{action:?}, revoked {revoked}: {result:?}");
        }
        // WRITE wrote what READ had read.
        oracle::check(*region, SEED, 0)?;
    }
    ensure!(lost == 1, "{lost} of the nodes are revoked");
    say(DONE);
    Ok(())
}
