// SPDX-License-Identifier: MIT OR Apache-2.0
//! userfaultfd over a part of a range: what is asked for all of it neither goes past the handler nor waits for it
//! without end.

use super::{
    start::SEED,
    userfault::{MISSING, Userfault},
};
use crate::guest::{
    call::{Job, call},
    oracle,
    place::{count, ensure_place},
};
use anyhow::{Context, Result, ensure};
use farfault::arena::{Backing, Region};
use farfault::{Advice, Gpu, PAGE_SIZE, Place, uapi::Exclusive};
use rustix::io::Errno;

group! { "mm::userfaultfd", gpus 1, seconds 60:
    pages_of_a_range_that_is_partly_missing_are_taken_when_the_handler_has_given_the_rest,
}

const PAGES: usize = 16;
const WATCHED: usize = 4;

fn pages_of_a_range_that_is_partly_missing_are_taken_when_the_handler_has_given_the_rest()
-> Result<()> {
    let gpu = Gpu::open_first()?;
    let source = Region::map(WATCHED * PAGE_SIZE, Backing::Small)?;
    // What is watched is at the begin, in the middle, and at the end.
    for first in [0, 6, PAGES - WATCHED] {
        let context = || format!("watched from page {first} on");
        let region = Region::map(PAGES * PAGE_SIZE, Backing::Small)?;
        gpu.advise(region.pages(), Advice::MapOnly)?;
        oracle::write(region, SEED);
        let watched = region.part(first * PAGE_SIZE, WATCHED * PAGE_SIZE);
        for index in 0..source.words() {
            source.store(index, watched.load(index));
        }
        watched.discard()?;
        let userfault = Userfault::new()?;
        userfault.register(watched, MISSING)?;
        let exclusive = Exclusive {
            address: region.address(),
            length: region.length() as u64,
        };
        let refused = call(&gpu, exclusive).map(drop);
        ensure!(refused == Err(Errno::BUSY), "{}: {refused:?}", context());
        ensure_place(&gpu, watched, Place::None).with_context(context)?;
        let there = count(&gpu, region, Place::Ram)?;
        ensure!(there == PAGES - WATCHED, "{}: {there}", context());
        userfault.copy(watched.address(), source)?;
        call(&gpu, exclusive).with_context(context)?;
        for page in 0..PAGES as u64 {
            Job::atomic_add(region.address() + page * PAGE_SIZE as u64, 0, 1).run(&gpu)?;
        }
        oracle::check(region, SEED, 0).with_context(context)?;
    }
    Ok(())
}
