// SPDX-License-Identifier: MIT OR Apache-2.0
//! Many threads and many jobs on the same pages, while these are moved, shared, split, protected,
//! unmapped and emptied, in two processes with two descriptors each. Whatever anybody reads is known to be
//! right or wrong, and at the end no addition is lost.

use super::{
    field::{Field, Random},
    held::{Pinner, Swapper},
    recycle::Recycler,
    torn::Torn,
    workers::{Cpu, Jobs, Mover, Worker},
};
use crate::guest::{
    cases::mm::storage::{Swap, SwapOn, swapped_out},
    child::code,
    settings,
};
use anyhow::{Context, Result, anyhow, ensure};
use farfault::{
    Gpu,
    process::{Ended, fork},
};
use std::{
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

group! { "races::engine", on Disk, seconds 180:
    threads_and_jobs_on_the_same_pages_read_only_what_was_written,
    threads_and_jobs_on_pages_that_are_swapped_and_pinned_read_only_what_was_written,
}

const SHORT: Duration = Duration::from_secs(15);
const PROCESSES: u64 = 2;

/// Who else works on the pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Others {
    None,
    /// [`Swapper`] and [`Pinner`].
    SwapAndPins,
}

fn threads_and_jobs_on_the_same_pages_read_only_what_was_written() -> Result<()> {
    run_all(Others::None)
}

fn threads_and_jobs_on_pages_that_are_swapped_and_pinned_read_only_what_was_written() -> Result<()>
{
    let _swap = Swap::on(SwapOn::Zram)?;
    let before = swapped_out()?;
    run_all(Others::SwapAndPins)?;
    let swapped = swapped_out()? - before;
    println!("pages swapped out: {swapped}");
    ensure!(swapped != 0, "nothing was swapped");
    Ok(())
}

/// All processes.
fn run_all(others: Others) -> Result<()> {
    let (seed, duration) = (settings::seed(), settings::duration(SHORT));
    let children = (0..PROCESSES)
        .map(|number| fork(move || code(run(seed.wrapping_add(number << 48), duration, others))));
    for child in children.collect::<Result<Vec<_>, _>>()? {
        ensure!(child.wait()? == Ended::Exited(0));
    }
    Ok(())
}

/// All threads of a process.
fn run(seed: u64, duration: Duration, others: Others) -> Result<()> {
    let gpus = [Gpu::open_first()?, Gpu::open_first()?];
    let [one, other] = &gpus;
    let field = &Field::new(seed)?;
    let random = |number: u64| Random::new(seed.wrapping_add(number));
    let cpu = |number: usize| Cpu {
        field,
        random: random(number as u64),
        number,
    };
    let mover = Mover {
        field,
        random: random(10),
        gpus: &gpus,
    };
    let recycler = Recycler {
        gpu: other,
        random: random(11),
    };
    let mut workers: Vec<Box<dyn Worker + '_>> = vec![
        Box::new(cpu(0)),
        Box::new(cpu(1)),
        Box::new(Jobs::new(field, one, random(2), 0)?),
        Box::new(Jobs::new(field, other, random(3), 1)?),
        Box::new(Torn::new(field, one, random(4))?),
        Box::new(mover),
        Box::new(recycler),
    ];
    if others == Others::SwapAndPins {
        workers.push(Box::new(Swapper {
            field,
            random: random(12),
        }));
        workers.push(Box::new(Pinner::new(field, random(13))?));
    }
    let begin = Instant::now();
    let failed = AtomicBool::new(false);
    let work = |mut worker: Box<dyn Worker + '_>| -> Result<String> {
        let mut steps = 0u64;
        while begin.elapsed() < duration && !failed.load(Ordering::Relaxed) {
            if let Err(error) = worker.step() {
                failed.store(true, Ordering::Relaxed);
                let elapsed = begin.elapsed();
                let name = worker.name();
                return Err(error.context(format!("{name}, in step {steps}, after {elapsed:?}")));
            }
            steps += 1;
        }
        Ok(format!("{} {steps}", worker.name()))
    };
    let ended: Vec<_> = thread::scope(|scope| {
        let threads = workers
            .into_iter()
            .map(|worker| scope.spawn(|| work(worker)));
        let threads: Vec<_> = threads.collect();
        threads.into_iter().map(|thread| thread.join()).collect()
    });
    let mut steps = Vec::new();
    for ended in ended {
        steps.push(ended.map_err(|_| anyhow!("a thread panicked"))??);
    }
    println!("steps: {}", steps.join(", "));
    field.ensure_final().context("at the end")
}
