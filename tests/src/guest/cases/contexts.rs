// SPDX-License-Identifier: MIT OR Apache-2.0
//! As many descriptors as a GPU has contexts for.

use crate::guest::{call::Job, oracle};
use anyhow::{Context, Result, bail, ensure};
use farfault::arena::{Backing, Region};
use farfault::{Error, Gpu, PAGE_SIZE};
use rustix::io::Errno;
use std::collections::HashSet;

group! { "contexts", on Small, seconds 90:
    all_contexts_at_once_work_and_one_more_is_enospc_until_one_is_closed,
}

/// Of a GPU, with this driver.
const CONTEXTS: usize = 64;

fn ensure_no_context_is_left() -> Result<()> {
    match Gpu::open_first() {
        Err(Error::Call { cause, .. }) if Errno::from_io_error(&cause) == Some(Errno::NOSPC) => {
            Ok(())
        }
        other => bail!("a first call without a context: {other:?}"),
    }
}

fn all_contexts_at_once_work_and_one_more_is_enospc_until_one_is_closed() -> Result<()> {
    let region = Region::map(CONTEXTS * PAGE_SIZE, Backing::Small)?;
    oracle::write(region, 1);
    let page = |index: usize| region.part(index % CONTEXTS * PAGE_SIZE, PAGE_SIZE);
    let mut gpus = Vec::new();
    for number in 0..CONTEXTS {
        let gpu = Gpu::open_first().with_context(|| format!("open {number}"))?;
        gpus.push(gpu);
    }
    let numbers: HashSet<_> = gpus.iter().map(|gpu| gpu.info().context).collect();
    ensure!(numbers.len() == CONTEXTS, "two have the same context");
    let mut rounds = 0;
    // Each works on a page of its own, and then on the one that another has worked on.
    let mut all_work = |gpus: &[Gpu]| -> Result<()> {
        for neighbour in 0..2 {
            let jobs = gpus.iter().enumerate();
            let jobs = jobs.map(|(index, gpu)| Job::add(page(index + neighbour), 1).run(gpu));
            jobs.collect::<Result<Vec<_>>>()?;
            rounds += 1;
            oracle::check(region, 1, rounds)?;
        }
        Ok(())
    };
    all_work(&gpus)?;
    for closed in [0, CONTEXTS / 2, CONTEXTS - 1] {
        ensure_no_context_is_left()?;
        let gpu = gpus.remove(closed);
        let number = gpu.info().context;
        drop(gpu);
        let gpu = Gpu::open_first().context("after one was closed")?;
        ensure!(gpu.info().context == number, "not the one that is free");
        gpus.insert(closed, gpu);
        all_work(&gpus)?;
    }
    ensure_no_context_is_left()
}
