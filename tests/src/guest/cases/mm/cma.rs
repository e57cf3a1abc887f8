// SPDX-License-Identifier: MIT OR Apache-2.0
//! Memory that is set aside for contiguous allocations (CMA). Until one comes, the kernel lends it for pages that
//! can move; a pin for long takes them out, also those that the GPU has or had.

use super::{frames::frames, numa::on_cpu, pins::io_uring, start::each_start, zones::pin_out_of};
use crate::guest::{place::count, skip};
use anyhow::{Context, Result, ensure};
use farfault::arena::{Backing, Region};
use farfault::{PAGE_SIZE, Place, stage::Advice};
use std::{ops::Range, process::Command};

group! { "mm::cma", on Disk, seconds 120:
    longterm_pin_takes_pages_that_the_gpu_had_out_of_cma,
}

/// More than CPUs keep for themselves.
const KEPT: usize = 32 << 20;

/// The frames of the area, which the kernel tells at boot only.
fn area() -> Result<Option<Range<u64>>> {
    let log = Command::new("dmesg").output()?.stdout;
    let log = String::from_utf8_lossy(&log);
    let Some((_, rest)) = log.split_once("cma: Reserved ") else {
        return Ok(None);
    };
    let (mebibytes, rest) = rest.split_once(" MiB at 0x").context(rest.to_owned())?;
    let end = rest.find(|c: char| !c.is_ascii_hexdigit());
    let start = u64::from_str_radix(&rest[..end.unwrap_or(rest.len())], 16)?;
    let length = mebibytes.parse::<u64>()? << 20;
    let frame = |address: u64| address / PAGE_SIZE as u64;
    Ok(Some(frame(start)..frame(start + length)))
}

fn longterm_pin_takes_pages_that_the_gpu_had_out_of_cma() -> Result<()> {
    let Some(area) = area()? else {
        skip("the kernel sets no memory aside for CMA");
        return Ok(());
    };
    if !io_uring() {
        return Ok(());
    }
    let inside = |region: Region| -> Result<usize> {
        let frames = frames(region)?;
        Ok(frames.iter().filter(|frame| area.contains(frame)).count())
    };
    // What CPUs keep of other memory goes first.
    for cpu in [0, 1] {
        on_cpu(cpu)?;
        let kept = Region::map(KEPT, Backing::Small)?;
        kept.advise(Advice::PopulateWrite)?;
    }
    each_start(|gpu, region| {
        let in_ram = count(gpu, region, Place::Ram)?;
        let lent = inside(region)?;
        ensure!(
            2 * lent >= in_ram,
            "only {lent} of {in_ram} pages are in CMA"
        );
        pin_out_of(gpu, region, inside)
    })
}
