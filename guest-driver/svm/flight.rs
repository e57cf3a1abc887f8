// SPDX-License-Identifier: GPL-2.0
//! Pages on their way: isolated and unmapped by mm, with destinations, while the copy engine moves
//! their bytes. Whoever sent them may collect the next ones meanwhile.
//!
//! A flight lands, or it is dropped: then nothing has moved. Either way it waits for the device.

use super::residence::Pagemap;
use crate::{
    gpu::Gpu,
    kapi::{
        folio::{PMD_ORDER, PMD_PAGES, PMD_SIZE},
        migrate::{Collected, Entry, Migrated, Source},
    },
    queue::CopyList,
    vram::{Reservation, VramPage},
};
use farfault_protocol::{
    address::{SystemAddr, VramAddr},
    submit::{CopyAperture, CopyRun},
};
use kernel::{
    page::{PAGE_SHIFT, PAGE_SIZE},
    prelude::*,
};

/// Pages on their way.
pub(super) struct Flight<'a> {
    gpu: &'a Gpu,
    /// `None` once it has landed.
    collected: Option<Collected<'a>>,
    copies: CopyList<'a>,
    /// To RAM.
    home: bool,
}

impl<'a> Flight<'a> {
    /// Sends what was collected to VRAM, as far as there is room. An allocation for which `fails` says
    /// so fails.
    pub(super) fn to_vram(
        gpu: &'a Gpu,
        map: &Pagemap,
        collected: Collected<'a>,
        room: &mut Reservation<'_>,
        fails: impl Fn() -> bool,
    ) -> Result<Self> {
        let mut flight = Self::new(gpu, collected, false);
        let collected = flight.collected.as_mut().ok_or(EINVAL)?;
        let mut placed = KVec::new();
        let mut index = 0;
        while let Some(entry) = collected.next_entry(index) {
            index = entry.index + (1 << entry.order);
            let copies = &mut flight.copies;
            give_vram(map, collected, entry, room, fails(), copies, &mut placed)?;
        }
        gpu.vram.put_at(placed.into_iter());
        gpu.start_copy(&mut flight.copies)?;
        Ok(flight)
    }

    /// Sends those of the collected pages home that `wanted` names. `ENOMEM`: there is no RAM for any
    /// of them, or `fails` said so of an allocation. Any other error is the device's.
    pub(super) fn home(
        gpu: &'a Gpu,
        map: &Pagemap,
        collected: Collected<'a>,
        wanted: impl Fn(VramPage) -> bool,
        fails: impl Fn() -> bool,
    ) -> Result<Self> {
        let mut flight = Self::new(gpu, collected, true);
        let collected = flight.collected.as_mut().ok_or(EINVAL)?;
        let mut short = false;
        let mut index = 0;
        while let Some(entry) = collected.next_entry(index) {
            index = entry.index + (1 << entry.order);
            let Source::Page(pfn) = entry.source else {
                continue;
            };
            if let Some(page) = map.lookup(pfn).map(VramPage::from).filter(|&p| wanted(p)) {
                let failed = |page| gpu.vram.has_failed(page);
                let copies = &mut flight.copies;
                short |= !give_ram(collected, entry, page, failed, &fails, copies)?;
            }
        }
        if short && flight.copies.is_empty() {
            return Err(ENOMEM);
        }
        gpu.start_copy(&mut flight.copies)?;
        Ok(flight)
    }

    fn new(gpu: &'a Gpu, collected: Collected<'a>, home: bool) -> Self {
        Self {
            gpu,
            collected: Some(collected),
            copies: gpu.copy_list(),
            home,
        }
    }

    /// Waits for the copies, and lets mm switch over to them.
    pub(super) fn land(mut self) -> Result<Migrated<'a>> {
        // If it fails, the drop sees to the rest.
        self.settle()?;
        Ok(self.collected.take().ok_or(EINVAL)?.pages())
    }

    /// Waits for the copies.
    fn settle(&mut self) -> Result {
        let result = self.gpu.finish_copy(&mut self.copies);
        // Where VRAM has failed, the copies have ended all the same.
        if result.is_err_and(|error| error != EAGAIN) {
            self.strand();
        }
        result
    }

    /// A device that is only slow may write to the destinations yet.
    fn strand(&mut self) {
        if let (true, Some(collected)) = (self.home, &mut self.collected) {
            collected.leak_destinations();
        }
        self.collected = None;
    }
}

impl Drop for Flight<'_> {
    fn drop(&mut self) {
        if self.collected.is_some() {
            // Nothing has moved, whatever it says.
            let _ = self.settle();
        }
    }
}

/// Gives one collected entry destinations in VRAM, as far as there is room, and lists the copies.
fn give_vram(
    map: &Pagemap,
    collected: &mut Collected<'_>,
    entry: Entry,
    room: &mut Reservation<'_>,
    fails: bool,
    copies: &mut CopyList<'_>,
    placed: &mut KVec<(VramPage, u32, usize)>,
) -> Result {
    let address = collected.address(entry.index);
    let source = match entry.source {
        Source::Page(pfn) => Some(pfn.phys()),
        Source::Hole => None,
    };
    let run = |to: VramAddr, offset: u64, bytes: usize| match source {
        Some(from) => CopyRun::upload(SystemAddr::new(from + offset), to, bytes as u32),
        None => CopyRun::fill(0, to, bytes as u32),
    };
    if fails && entry.order == 0 {
        return Ok(());
    }
    if entry.order == PMD_ORDER {
        if let Some(block) = (!fails).then(|| room.block()).flatten() {
            let folio = map.init_folio(block.into(), PMD_ORDER)?;
            placed.push((block, PMD_ORDER, address), GFP_KERNEL)?;
            if collected.set_device(entry.index, folio).is_ok() {
                copies.push(run(block.address(), 0, PMD_SIZE))?;
            }
            return Ok(());
        }
        if room.len() < PMD_PAGES {
            // Part of a huge page would split it for little.
            return Ok(());
        }
    }
    for i in 0..1usize << entry.order {
        let Some(page) = room.page() else { break };
        let folio = map.init_folio(page.into(), 0)?;
        placed.push((page, 0, address + (i << PAGE_SHIFT)), GFP_KERNEL)?;
        if collected.set_device(entry.index + i, folio).is_ok() {
            copies.push(run(page.address(), (i << PAGE_SHIFT) as u64, PAGE_SIZE))?;
        }
    }
    Ok(())
}

/// Gives one collected entry destinations in RAM, and lists the copies. Returns whether there was
/// memory for all of it. Pages that have failed stay.
fn give_ram(
    collected: &mut Collected<'_>,
    entry: Entry,
    page: VramPage,
    failed: impl Fn(VramPage) -> bool,
    fails: &impl Fn() -> bool,
    copies: &mut CopyList<'_>,
) -> Result<bool> {
    let nth = |n: usize| VramPage(page.0 + n as u32);
    let mut order = entry.order;
    if (0..1 << order).any(|n| failed(nth(n))) {
        // Around them, page by page.
        order = 0;
    }
    let mut done = 0;
    while done < 1 << entry.order {
        let bad = order == 0 && failed(nth(done));
        let is_head = done == 0 && entry.order != 0;
        if bad && !(is_head && collected.only_splits()) {
            done += 1;
            continue;
        }
        let no_memory = fails();
        if no_memory && order == 0 {
            return Err(ENOMEM);
        }
        let folio = (!no_memory).then(|| collected.alloc_folio(entry.index + done, order));
        let Some(folio) = folio.flatten() else {
            if order == 0 {
                return Ok(false);
            }
            order = 0;
            continue;
        };
        let from = nth(done).address();
        let to = SystemAddr::new(folio.phys());
        if collected.set_system(entry.index + done, folio).is_err() {
            // mm takes this one as a whole only, and there was no memory for that.
            return Ok(false);
        }
        let copy = if bad {
            // It is there for the split, and goes nowhere.
            zeroes(to)
        } else {
            CopyRun::download(from, to, (PAGE_SIZE << order) as u32)
        };
        copies.push(copy)?;
        done += 1 << order;
    }
    Ok(true)
}

/// Zeroes over one page of RAM.
fn zeroes(to: SystemAddr) -> CopyRun {
    CopyRun {
        destination: to.get().into(),
        destination_aperture: CopyAperture::System.raw(),
        ..CopyRun::fill(0, VramAddr::new(0), PAGE_SIZE as u32)
    }
}
