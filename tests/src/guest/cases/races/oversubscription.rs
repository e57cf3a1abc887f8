// SPDX-License-Identifier: MIT OR Apache-2.0
//! Several processes want four times the VRAM that there is: all get on, their data is right, and what
//! had to be moved for it is printed.

use crate::guest::{VRAM, call::Job, child::code, oracle, settings};
use anyhow::{Result, ensure};
use farfault::arena::{Backing, Region};
use farfault::{
    Gpu, HUGE_PAGE_SIZE, PAGE_SIZE,
    process::{Ended, fork},
};
use rustix::pipe::pipe;
use std::{
    fs::File,
    io::{Read, Write},
    time::{Duration, Instant},
};

group! { "races::oversubscription", on Small, seconds 300:
    four_times_vram_of_several_processes_all_get_on,
}

const SEED: u64 = 0x0e52;
const PROCESSES: usize = 4;
const SHORT: Duration = Duration::from_secs(3);

/// What a process moved and used, in pages.
#[derive(Clone, Copy, Debug, Default)]
struct Figures {
    used: u64,
    to_vram: u64,
    to_ram: u64,
    evicted: u64,
}

impl Figures {
    fn words(self) -> [u64; 4] {
        [self.used, self.to_vram, self.to_ram, self.evicted]
    }
}

/// Works on one block after the other, in a random order, until the time is over and each has had its turn.
fn work(number: usize) -> Result<Figures> {
    let gpu = Gpu::open_first()?;
    let backing = if number % 2 == 0 {
        Backing::Huge
    } else {
        Backing::Small
    };
    let region = Region::map(VRAM as usize, backing)?;
    let seed = SEED + number as u64;
    oracle::write(region, seed);
    let mut random = super::field::Random::new(settings::seed().wrapping_add(seed));
    let blocks = region.length() / HUGE_PAGE_SIZE;
    let sums: Vec<_> = (0..blocks)
        .map(|block| {
            let first = block * HUGE_PAGE_SIZE / 8;
            oracle::sum(seed, first..first + HUGE_PAGE_SIZE / 8)
        })
        .collect();
    let mut added = vec![0u64; blocks];
    let (begin, duration) = (Instant::now(), settings::duration(SHORT));
    let mut used = 0;
    while begin.elapsed() < duration || added.contains(&0) {
        // Those that had no turn first, then any.
        let block = match added.iter().position(|added| *added == 0) {
            Some(block) => block,
            None => random.below(blocks),
        };
        let part = region.part(block * HUGE_PAGE_SIZE, HUGE_PAGE_SIZE);
        Job::add(part, 1).waves(8).run(&gpu)?;
        added[block] += 1;
        let sum = Job::sum(part).waves(8).run(&gpu)?;
        let should = sums[block].wrapping_add(added[block].wrapping_mul(part.words() as u64));
        ensure!(sum == should, "block {block} after {} turns", added[block]);
        used += 2 * (HUGE_PAGE_SIZE / PAGE_SIZE) as u64;
    }
    for (block, added) in added.iter().enumerate() {
        let part = region.part(block * HUGE_PAGE_SIZE, HUGE_PAGE_SIZE);
        oracle::check_part(part, seed, block * HUGE_PAGE_SIZE / 8, *added)?;
    }
    let stats = gpu.stats()?;
    Ok(Figures {
        used,
        to_vram: stats.pages_to_vram,
        to_ram: stats.pages_to_ram,
        evicted: stats.pages_evicted,
    })
}

fn four_times_vram_of_several_processes_all_get_on() -> Result<()> {
    let (from_children, to_parent) = pipe()?;
    let mut children = Vec::new();
    for number in 0..PROCESSES {
        let to_parent = &to_parent;
        children.push(fork(move || {
            code((|| {
                let words = work(number)?.words().map(u64::to_le_bytes);
                // Short writes to a pipe are in one piece.
                Ok(File::from(to_parent.try_clone()?).write_all(words.as_flattened())?)
            })())
        })?);
    }
    drop(to_parent);
    for child in children {
        ensure!(child.wait()? == Ended::Exited(0));
    }
    let mut bytes = Vec::new();
    File::from(from_children).read_to_end(&mut bytes)?;
    let mut total = [0u64; 4];
    for (index, word) in bytes.chunks_exact(8).enumerate() {
        total[index % 4] += u64::from_le_bytes(word.try_into()?);
    }
    let [used, to_vram, to_ram, evicted] = total;
    println!(
        "{used} pages used, {to_vram} moved to VRAM, {to_ram} home, {evicted} of them evicted: \
         {:.2} pages moved for each page used",
        (to_vram + to_ram) as f64 / used as f64
    );
    ensure!(evicted > 0, "nothing had to go");
    // Each use moves its pages to VRAM and others away, at most, and half as much again: no thrash.
    ensure!(
        to_vram + to_ram <= used + used / 2,
        "more was moved than all uses together can need"
    );
    Ok(())
}
