// SPDX-License-Identifier: MIT OR Apache-2.0
//! A program that closes its descriptors while its pages come home by other ways: touched by a thread, copied for a
//! child and freed. The module may go as soon as the last descriptor is closed.

use super::{
    Program,
    child::code,
    oracle,
    place::move_all,
    programs::{DONE, READY, SEED, has_line, say, written},
};
use anyhow::{Result, ensure};
use farfault::arena::{Backing, Region};
use farfault::{
    Gpu, HUGE_PAGE_SIZE, PAGE_SIZE, Place,
    process::{Ended, fork},
};
use std::{cell::RefCell, thread, time::Duration};

/// Goes on until it gets a line, also while there is no GPU.
pub const LEAVE_FOR_EVER: &str = "leave-for-ever";

pub(super) const PROGRAMS: &[Program] = &[Program {
    name: LEAVE_FOR_EVER,
    run: leave_for_ever,
}];

fn leave_for_ever(_: &[String]) -> Result<()> {
    let mut rounds = 0;
    while !has_line()? {
        let Ok(gpu) = Gpu::open_first() else {
            // The module is away.
            thread::sleep(Duration::from_millis(2));
            continue;
        };
        leave(gpu)?;
        rounds += 1;
        if rounds == 1 {
            say(READY);
        }
    }
    ensure!(rounds > 1, "{rounds} rounds say nothing");
    say(DONE);
    Ok(())
}

/// Pages of each size in VRAM when the descriptor is closed, and somebody who takes them at that moment.
fn leave(gpu: Gpu) -> Result<()> {
    let mut regions = Vec::new();
    for backing in [Backing::Huge, Backing::Small] {
        let region = written(HUGE_PAGE_SIZE, backing)?;
        move_all(&gpu, region, Place::Vram)?;
        regions.push(region);
    }
    let gpu = RefCell::new(Some(gpu));
    let all = || {
        regions
            .iter()
            .try_for_each(|&region| oracle::check(region, SEED, 0))
    };
    let child = fork(|| {
        // Its descriptor would keep the file open.
        drop(gpu.take());
        code(all())
    })?;
    let quarter = HUGE_PAGE_SIZE / 4;
    let end = |region: Region| region.part(3 * quarter, quarter);
    thread::scope(|scope| {
        let frees = scope.spawn(|| regions.iter().try_for_each(|&region| end(region).unmap()));
        let touches = scope.spawn(|| {
            for page in 0..2 * quarter / PAGE_SIZE {
                for region in &regions {
                    let part = region.part(page * PAGE_SIZE, PAGE_SIZE);
                    oracle::check_part(part, SEED, page * PAGE_SIZE / 8, 0)?;
                }
            }
            Ok::<_, anyhow::Error>(())
        });
        drop(gpu.take());
        frees
            .join()
            .map_err(|_| anyhow::anyhow!("a thread panicked"))??;
        touches
            .join()
            .map_err(|_| anyhow::anyhow!("a thread panicked"))?
    })?;
    ensure!(child.wait()? == Ended::Exited(0));
    for region in regions {
        oracle::check(region.part(0, 3 * quarter), SEED, 0)?;
        region.unmap()?;
    }
    Ok(())
}
