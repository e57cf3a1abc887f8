// SPDX-License-Identifier: MIT OR Apache-2.0
//! A program whose threads wait for the GPU's answers at the same time, one of them for longer than the other.

use super::{
    Program, oracle,
    place::migrate,
    programs::{DONE, READY, SEED, has_line, say, written},
};
use anyhow::{Result, anyhow, bail};
use farfault::arena::Backing;
use farfault::{Gpu, HUGE_PAGE_SIZE, PAGE_SIZE, Place};
use std::{thread, time::Duration};

/// `wait-in-pairs NUMBER`: goes on with the GPU of this number until it gets a line.
pub const WAIT_IN_PAIRS: &str = "wait-in-pairs";

/// It says this when it has done so after each of its pauses; before, it does not look for a line.
pub const ROUNDS: &str = "rounds";

/// How long one waits before it asks, in steps.
const PAUSES: u64 = 16;

pub(super) const PROGRAMS: &[Program] = &[Program {
    name: WAIT_IN_PAIRS,
    run: wait_in_pairs,
}];

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
