// SPDX-License-Identifier: MIT OR Apache-2.0
//! Exits while pages are shared: nobody has written to them since the forks, so that parent, child and
//! grandchild have the same pages, in VRAM or mapped by the GPUs of all, until only one is left.

use super::{
    family::{ORDERS, Turn, family},
    proc::smaps,
    start::{At, STARTS, Start, ensure_sum, eventually, exercise},
};
use crate::guest::place::{count, ensure_place, migrate};
use anyhow::{Context, Result, ensure};
use farfault::arena::{Backing, Region};
use farfault::{Advice, Gpu, HUGE_PAGE_SIZE, PAGE_SIZE, Place};

group! { "mm::fork", gpus 1, seconds 300:
    exit_in_every_order_while_pages_are_shared_keeps_everybodys_data,
    exit_in_every_order_while_shared_pages_move_keeps_everybodys_data,
}

/// All who are alive have the same pages: each has its share of them. This also waits for the end of one
/// that was told to end. Of huge pages in VRAM the kernel says other shares.
fn ensure_shared(start: Start, region: Region, turn: Turn) -> Result<()> {
    if let Backing::Huge = start.backing {
        return Ok(());
    }
    let share = (region.length() >> 10) as u64 / u64::from(turn.alive);
    eventually("only those who are alive share the pages", || {
        Ok(smaps(region, "Pss")?.abs_diff(share) <= 1)
    })
}

/// Moves pages that others have, too. One of them may be about to end, and its GPU to bring them home:
/// what is on its way counts as not in VRAM, and is in no place until it has come.
fn move_shared(gpu: &Gpu, region: Region, to: Place) -> Result<()> {
    let moved = migrate(gpu, region, to)?;
    ensure!(moved.stayed == 0, "pages stayed: {moved:?}");
    eventually("pages on their way have come", || {
        Ok(count(gpu, region, Place::None)? == 0)
    })?;
    ensure_place(gpu, region, to)
}

/// Small pages need not be many.
fn length(start: Start) -> usize {
    match start.backing {
        Backing::Huge => HUGE_PAGE_SIZE,
        _ => 16 * PAGE_SIZE,
    }
}

/// The GPU reads all pages, and may write to none.
fn ensure_read(gpu: &Gpu, region: Region) -> Result<()> {
    ensure_sum(gpu, region, 0, 0)?;
    let states = gpu.query(region.pages())?;
    let wrong = states
        .iter()
        .position(|page| page.gpu.place != page.cpu.place || page.gpu.write);
    ensure!(
        wrong.is_none(),
        "page {wrong:?} is shared and only read, and is {:?}",
        wrong.and_then(|page| states.get(page))
    );
    Ok(())
}

fn exit_in_every_order_while_pages_are_shared_keeps_everybodys_data() -> Result<()> {
    for start in STARTS {
        for order in ORDERS {
            family(start, length(start), order, |gpu, region, turn| {
                gpu.advise(region.pages(), Advice::MapOnly)?;
                ensure_shared(start, region, turn)?;
                ensure_read(gpu, region)?;
                for (part, place) in start.parts(region) {
                    ensure_place(gpu, part, place)?;
                }
                // The last one is the first to write, and has the pages for itself.
                if turn.alive == 1 {
                    exercise(gpu, region, 0, 0)?;
                }
                Ok(())
            })
            .with_context(|| format!("{start:?}, {order:?}"))?;
        }
    }
    Ok(())
}

fn exit_in_every_order_while_shared_pages_move_keeps_everybodys_data() -> Result<()> {
    let starts = STARTS.into_iter().filter(|start| start.at == At::Ram);
    for start in starts {
        for order in ORDERS {
            family(start, length(start), order, |gpu, region, turn| {
                gpu.advise(region.pages(), Advice::MapOnly)?;
                // Every other turn ends with pages in VRAM, where the next member finds them.
                for place in [Place::Ram, Place::Vram, Place::Ram, Place::Vram]
                    .into_iter()
                    .skip(turn.before as usize % 2)
                    .take(3)
                {
                    move_shared(gpu, region, place)?;
                    ensure_shared(start, region, turn)?;
                    ensure_read(gpu, region)?;
                }
                if turn.alive == 1 {
                    exercise(gpu, region, 0, 0)?;
                }
                Ok(())
            })
            .with_context(|| format!("{start:?}, {order:?}"))?;
        }
    }
    Ok(())
}
