// SPDX-License-Identifier: GPL-2.0
//! Pages on their way: isolated and unmapped by mm, with destinations, while the copy engine moves
//! their bytes. Whoever sent them may collect the next ones meanwhile.
//!
//! A flight lands, or it is dropped: then nothing has moved. Either way it waits for the device.

use super::residence::Pagemap;
use crate::{
    gpu::Gpu,
    kapi::{
        folio::{PMD_ORDER, PMD_PAGES},
        migrate::{Collected, Entry, Migrated, Source},
    },
    queue::CopyList,
    vram::{Reservation, VramPage},
};
use farfault_protocol::{
    address::{SystemAddr, VramAddr},
    submit::{CopyAperture, CopyRun},
};
use kernel::{page::PAGE_SIZE, prelude::*};

/// Pages on their way.
pub(super) struct Flight<'a> {
    gpu: &'a Gpu,
    /// `None` once it has landed.
    collected: Option<Collected<'a>>,
    copies: CopyList<'a>,
    /// To RAM.
    home: bool,
    /// A huge page found no room as one.
    left_huge: bool,
}

/// What a collected entry was given in RAM.
enum Given {
    /// All that it needs.
    All,
    /// Not all, for want of memory.
    Short,
    /// Nothing: it is huge, and has to be split first.
    LeftHuge,
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
            flight.left_huge |=
                !give_vram(map, collected, entry, room, fails(), copies, &mut placed)?;
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
                match give_ram(collected, entry, page, failed, &fails, copies)? {
                    Given::All => {}
                    Given::Short => short = true,
                    Given::LeftHuge => flight.left_huge = true,
                }
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
            left_huge: false,
        }
    }

    /// Whether a huge page was left where it is that may go in small ones: once this flight has landed,
    /// collected with [`Huge::Split`].
    ///
    /// [`Huge::Split`]: crate::kapi::migrate::Huge::Split
    pub(super) fn left_huge(&self) -> bool {
        self.left_huge
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

/// Gives one collected entry a destination in VRAM, if there is room, and lists the copy. `false`: it is
/// huge, there is no room for it as one, but for as many small pages.
fn give_vram(
    map: &Pagemap,
    collected: &mut Collected<'_>,
    entry: Entry,
    room: &mut Reservation<'_>,
    fails: bool,
    copies: &mut CopyList<'_>,
    placed: &mut KVec<(VramPage, u32, usize)>,
) -> Result<bool> {
    let address = collected.address(entry.index);
    let source = match entry.source {
        Source::Page(pfn) => Some(pfn.phys()),
        Source::Hole => None,
    };
    let page = match entry.order {
        PMD_ORDER if fails => None,
        PMD_ORDER => room.block(),
        _ if fails => return Ok(true),
        _ => room.page(),
    };
    let Some(page) = page else {
        // Part of a huge page would split it for little.
        return Ok(entry.order == 0 || room.len() < PMD_PAGES);
    };
    let folio = map.init_folio(page.into(), entry.order)?;
    placed.push((page, entry.order, address), GFP_KERNEL)?;
    if collected.set_device(entry.index, folio).is_ok() {
        let (to, bytes) = (page.address(), (PAGE_SIZE << entry.order) as u32);
        copies.push(match source {
            Some(from) => CopyRun::upload(SystemAddr::new(from), to, bytes),
            None => CopyRun::fill(0, to, bytes),
        })?;
    }
    Ok(true)
}

/// Gives one collected entry a destination in RAM, and lists the copy. Pages that have failed stay.
fn give_ram(
    collected: &mut Collected<'_>,
    entry: Entry,
    page: VramPage,
    failed: impl Fn(VramPage) -> bool,
    fails: &impl Fn() -> bool,
    copies: &mut CopyList<'_>,
) -> Result<Given> {
    let nth = |n: u32| VramPage(page.0 + n);
    let is_huge = entry.order != 0;
    let bad = (0..1 << entry.order).any(|n| failed(nth(n)));
    if bad && !is_huge {
        return Ok(Given::All);
    }
    let no_memory = !bad && fails();
    if no_memory && !is_huge {
        return Err(ENOMEM);
    }
    // Around pages that have failed, and where memory is in pieces, it goes in small ones.
    let folio = if bad || no_memory {
        None
    } else {
        collected.alloc_folio(entry.index, entry.order)
    };
    if let Some(folio) = folio {
        let to = SystemAddr::new(folio.phys());
        if collected.set_system(entry.index, folio).is_ok() {
            let bytes = (PAGE_SIZE << entry.order) as u32;
            copies.push(CopyRun::download(page.address(), to, bytes))?;
        }
        return Ok(Given::All);
    }
    if !is_huge {
        return Ok(Given::Short);
    }
    if !collected.only_splits() {
        return Ok(Given::LeftHuge);
    }
    let Some(folio) = collected.alloc_folio(entry.index, 0) else {
        return Ok(Given::Short);
    };
    let to = SystemAddr::new(folio.phys());
    if collected.set_system(entry.index, folio).is_ok() {
        // It is there for the split, and goes nowhere.
        copies.push(if failed(page) {
            zeroes(to)
        } else {
            CopyRun::download(page.address(), to, PAGE_SIZE as u32)
        })?;
    }
    Ok(Given::All)
}

/// Zeroes over one page of RAM.
fn zeroes(to: SystemAddr) -> CopyRun {
    CopyRun {
        destination: to.get().into(),
        destination_aperture: CopyAperture::System.raw(),
        ..CopyRun::fill(0, VramAddr::new(0), PAGE_SIZE as u32)
    }
}
