// SPDX-License-Identifier: MIT OR Apache-2.0
//! Programs whose threads wait for the GPU's answers at the same time: two, one of them for longer than the other, and
//! more than its queues have room for.

use super::{
    Program,
    call::Job,
    oracle,
    place::migrate,
    programs::{DONE, READY, SEED, has_line, say, wait_for_a_line, written},
    stages::ACTING,
};
use anyhow::{Context, Result, anyhow, bail};
use farfault::arena::Backing;
use farfault::{Advice, Gpu, HUGE_PAGE_SIZE, PAGE_SIZE, Place};
use std::{sync::RwLock, thread, time::Duration};

/// `wait-in-pairs NUMBER`: goes on with the GPU of this number until it gets a line.
pub const WAIT_IN_PAIRS: &str = "wait-in-pairs";

/// It says this when it has done so after each of its pauses; before, it does not look for a line.
pub const ROUNDS: &str = "rounds";

/// How long one waits before it asks, in steps.
const PAUSES: u64 = 16;

/// `wait-in-crowds NUMBER`: when it gets a line, asks the GPU of this number for more at once than there is room for,
/// and says [`ACTING`] just before.
pub const WAIT_IN_CROWDS: &str = "wait-in-crowds";

/// Jobs and pings. A queue has 512 descriptors, one of which is enough for a request.
const JOBS: usize = 600;
const PINGS: usize = 600;

pub(super) const PROGRAMS: &[Program] = &[
    Program {
        name: WAIT_IN_PAIRS,
        run: wait_in_pairs,
    },
    Program {
        name: WAIT_IN_CROWDS,
        run: wait_in_crowds,
    },
];

fn wait_in_pairs(arguments: &[String]) -> Result<()> {
    let [number] = arguments else {
        bail!("name a GPU's number");
    };
    // The calls of one descriptor come after each other.
    let open = || Gpu::open(format!("/dev/farfault{number}"));
    let (gpu, other) = (open()?, open()?);
    let much = written(HUGE_PAGE_SIZE, Backing::Small)?;
    let little = written(PAGE_SIZE, Backing::Small)?;
    let mut round = 0_u64;
    while round <= PAUSES || !has_line()? {
        let place = if round % 2 == 0 {
            Place::Vram
        } else {
            Place::Ram
        };
        thread::scope(|scope| {
            let long = scope.spawn(|| migrate(&gpu, much, place));
            thread::sleep(Duration::from_micros(500 * (round % PAUSES)));
            // After this nobody asks for anything until the other has its answers.
            let short = migrate(&other, little, place);
            long.join().map_err(|_| anyhow!("a thread panicked"))??;
            short
        })?;
        round += 1;
        if round == 1 {
            say(READY);
        }
        if round == PAUSES + 1 {
            say(ROUNDS);
        }
    }
    for region in [much, little] {
        oracle::check(region, SEED, 0)?;
    }
    say(DONE);
    Ok(())
}

fn wait_in_crowds(arguments: &[String]) -> Result<()> {
    const STACK: usize = 128 << 10;
    let [number] = arguments else {
        bail!("name a GPU's number");
    };
    let gpus = (0..JOBS.div_ceil(200))
        .map(|_| Gpu::open(format!("/dev/farfault{number}")))
        .collect::<farfault::Result<Vec<_>>>()?;
    let region = written(JOBS * PAGE_SIZE, Backing::Small)?;
    for gpu in &gpus {
        gpu.advise(region.pages(), Advice::MapOnly)?;
    }
    let gate = RwLock::new(());
    let ask = &|index: usize| -> Result<()> {
        let gpu = gpus.get(index % gpus.len()).context("no such GPU")?;
        drop(gate.read());
        match index.checked_sub(JOBS) {
            None => {
                let page = region.part(index * PAGE_SIZE, PAGE_SIZE);
                Job::add(page, 1).run(gpu).map(drop)
            }
            Some(_) => Ok(gpu.ping()?),
        }
    };
    say(READY);
    wait_for_a_line()?;
    thread::scope(|scope| {
        let closed = gate.write();
        let spawn = |index| {
            let builder = thread::Builder::new().stack_size(STACK);
            builder.spawn_scoped(scope, move || ask(index))
        };
        let threads = (0..JOBS + PINGS).map(spawn);
        let threads = threads.collect::<Result<Vec<_>, _>>()?;
        say(ACTING);
        drop(closed);
        for thread in threads {
            thread.join().map_err(|_| anyhow!("a thread panicked"))??;
        }
        Ok::<_, anyhow::Error>(())
    })?;
    oracle::check(region, SEED, 1)?;
    say(DONE);
    Ok(())
}
