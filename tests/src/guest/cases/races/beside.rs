// SPDX-License-Identifier: MIT OR Apache-2.0
//! What goes on beside hostile calls: memory that they name is unmapped, moved, protected, thrown away and copied
//! for a child, a descriptor is closed and another one opened in its place, and a driver is unbound.

use super::{
    field::Random,
    gpus::{bound, tell_driver},
};
use anyhow::Result;
use farfault::arena::{Protection, Region, fork_that_looks};
use farfault::{Gpu, HUGE_PAGE_SIZE, PAGE_SIZE};
use std::{
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

/// A run of pages that is taken apart, one of each group. They are always the same, so that each is a mapping or
/// none.
const RUN_PAGES: usize = 24;
const GROUP_PAGES: usize = 64;

/// A descriptor that is another one every now and then.
pub(super) struct Passing(Mutex<Arc<Gpu>>);

impl Passing {
    pub(super) fn new() -> Result<Self> {
        Ok(Self(Mutex::new(Arc::new(Gpu::open_first()?))))
    }

    /// The one of now. It is closed when nobody uses it any more.
    pub(super) fn get(&self) -> Arc<Gpu> {
        let gpu = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(&gpu)
    }

    fn replace(&self) -> Result<()> {
        let new = Arc::new(Gpu::open_first()?);
        let mut gpu = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let old = std::mem::replace(&mut *gpu, new);
        drop(gpu);
        drop(old);
        Ok(())
    }
}

/// Takes regions apart until the time is over; how often.
pub(super) fn tear(
    regions: &[Region],
    passing: &Passing,
    random: &mut Random,
    end: Instant,
) -> Result<u64> {
    let aside = Region::nowhere(RUN_PAGES * PAGE_SIZE)?;
    let groups = HUGE_PAGE_SIZE / PAGE_SIZE / GROUP_PAGES;
    let mut done = 0;
    while Instant::now() < end {
        let region = *random.one_of(regions);
        let begin = (random.below(groups) * GROUP_PAGES + 1) * PAGE_SIZE;
        let run = region.part(begin, RUN_PAGES * PAGE_SIZE);
        match random.below(6) {
            0 => {
                run.unmap()?;
                run.map_again()?;
            }
            1 => run.discard()?,
            2 => {
                for protection in [Protection::None, Protection::Read, Protection::ReadWrite] {
                    run.protect(protection)?;
                }
            }
            3 => {
                run.remap_onto(aside)?;
                aside.remap_onto(run)?;
            }
            4 => passing.replace()?,
            // The child needs nothing but a copy of the page tables.
            _ => drop(fork_that_looks(&[], Duration::from_millis(1), 0)?),
        }
        done += 1;
    }
    Ok(done)
}

/// Unbinds the second GPU in the middle, and binds it again.
pub(super) fn revoke(pause: Duration) -> Result<()> {
    let device = bound(1)?;
    thread::sleep(pause);
    tell_driver("unbind", &device)?;
    thread::sleep(pause);
    tell_driver("bind", &device)
}
