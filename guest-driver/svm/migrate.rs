// SPDX-License-Identifier: GPL-2.0
//! Pages to VRAM and home, for one address space.
//!
//! Each migration is of one region at most, and costs the device one command: mm collects and
//! unmaps the pages, one list of copies goes to the copy engine, and mm switches over to what was
//! copied. What cannot move (pinned, locked, shared in a way that mm refuses) stays where it is, and
//! so does everything if the copy fails: the destinations are thrown away.
//!
//! After a migration nothing is mapped on the GPU; a fault does that, or `Space::map_ahead`.

use super::{page_table::PageSet, residence::Pagemap, Space, REGION_BYTES};
use crate::{
    gpu::Gpu,
    kapi::{
        folio::{PMD_ORDER, PMD_PAGES, PMD_SIZE},
        migrate::{Collected, Entry, Migrated, Scratch, Source},
        mm::MmapLock,
        signal::fatal_signal_pending,
        trace::{self, Cause, Direction},
    },
    queue::CopyList,
    uapi,
    vram::{Reservation, VramPage},
};
use core::ops::Range;
use farfault_protocol::{
    address::{SystemAddr, VramAddr},
    submit::CopyRun,
};
use kernel::{
    mm::MmWithUser,
    page::{PAGE_SHIFT, PAGE_SIZE},
    prelude::*,
    sync::atomic::Relaxed,
    time::{Instant, Monotonic},
};

/// What came home.
#[derive(Clone, Copy, Default)]
pub(crate) struct Home {
    pub(crate) pages: usize,
    /// Huge ones count once.
    pub(crate) folios: usize,
}

/// What a request of the user did, in pages.
#[derive(Default)]
pub(crate) struct Moved {
    pub(crate) moved: usize,
    pub(crate) there: usize,
    pub(crate) stayed: usize,
}

impl Space {
    /// Moves the pages of a range on request. `EFAULT`: part of it is not mapped; what is before that
    /// part was moved.
    pub(crate) fn migrate(&self, range: Range<usize>, to: uapi::Place) -> Result<Moved> {
        let mm = self.mm()?;
        let mut total = Moved::default();
        let mut at = range.start;
        while at < range.end {
            let end = {
                let lock = MmapLock::read(&mm);
                let vma = lock.vma_lookup(at).ok_or(EFAULT)?;
                let region_end = (at & !(REGION_BYTES - 1)) + REGION_BYTES;
                range.end.min(region_end).min(vma.end())
            };
            let mut service = self.service()?;
            let moved = match to {
                uapi::Place::Vram => {
                    let m = self.to_vram(&mut service.migration, &mm, at..end, Cause::Request)?;
                    self.map_ahead(&mut service, &mm, at..end);
                    m.len()
                }
                _ => {
                    self.to_ram(&mut service.migration, &mm, at..end, Cause::Request)?
                        .pages
                }
            };
            let in_vram = self.count_in_vram(&mut service, &mm, at..end)?;
            drop(service);
            let pages = (end - at) >> PAGE_SHIFT;
            let elsewhere = match to {
                uapi::Place::Vram => pages - in_vram,
                _ => in_vram,
            };
            total.stayed += elsewhere;
            total.moved += moved.min(pages - elsewhere);
            total.there += (pages - elsewhere).saturating_sub(moved);
            at = end;
            self.gpu.usable()?;
            if fatal_signal_pending() {
                return Err(EINTR);
            }
        }
        Ok(total)
    }

    /// Moves what can be moved of a range to VRAM, and maps for the GPU what moved and what was mapped
    /// before. `EINVAL`: part of it is not mapped, not readable, or of a kind that cannot migrate; what
    /// is before that part was moved.
    pub(crate) fn migrate_parts_to_vram(&self, range: Range<usize>) -> Result {
        let mm = self.mm()?;
        let mut at = range.start;
        while at < range.end {
            let part = at..part_end(&mm, at, range.end)?;
            let mut service = self.service()?;
            let mut kept = self.mapped_pages(part.clone())?;
            let moved = self.to_vram(&mut service.migration, &mm, part.clone(), Cause::Request)?;
            kept.extend(&moved);
            self.map_if_there(&mut service, &mm, part.start, &kept);
            drop(service);
            at = part.end;
            self.gpu.usable()?;
            if fatal_signal_pending() {
                return Err(EINTR);
            }
        }
        Ok(())
    }

    /// Brings what can come of a range home. Returns how many folios came. Errors as for
    /// [`Space::migrate_parts_to_vram`], and `ENOMEM`.
    pub(crate) fn migrate_parts_to_ram(&self, range: Range<usize>) -> Result<usize> {
        let mm = self.mm()?;
        let mut folios = 0;
        let mut at = range.start;
        while at < range.end {
            let end = part_end(&mm, at, range.end)?;
            let mut service = self.service()?;
            let home = self.to_ram(&mut service.migration, &mm, at..end, Cause::Request)?;
            drop(service);
            folios += home.folios;
            at = end;
            self.gpu.usable()?;
            if fatal_signal_pending() {
                return Err(EINTR);
            }
        }
        Ok(folios)
    }

    /// Moves what can be moved of a range of at most [`BLOCK_PAGES`] pages to VRAM. Returns the pages
    /// that moved, by their index in the range.
    pub(super) fn to_vram(
        &self,
        scratch: &mut Scratch,
        mm: &MmWithUser,
        range: Range<usize>,
        cause: Cause,
    ) -> Result<PageSet> {
        let started = Instant::<Monotonic>::now();
        let map = self.gpu.pagemap()?;
        // Before the mmap lock is taken: it may bring pages of other processes home.
        let mut room = self
            .gpu
            .make_room(self.context, range.len() >> PAGE_SHIFT)?;
        let lock = MmapLock::read(mm);
        let mut moved = PageSet::EMPTY;
        let mut at = range.start;
        while let Some(vma) = lock.find_vma(at).filter(|vma| vma.start() < range.end) {
            let part = at.max(vma.start())..range.end.min(vma.end());
            at = part.end;
            let asked = matches!(cause, Cause::Request);
            // Of a private mapping of a file, the pages that were written can move.
            let movable = vma.is_anonymous() || (asked && !vma.is_shared());
            if movable && vma.is_readable() && vma.can_migrate() {
                let first = (part.start - range.start) >> PAGE_SHIFT;
                let collected = Collected::system_to_device(&vma, part, map.owner(), scratch)?;
                let migrated = self.upload(&map, collected, &mut room)?;
                for (index, order) in migrated.entries() {
                    (index..index + (1 << order)).for_each(|i| moved.insert(first + i));
                }
            }
            if at >= range.end {
                break;
            }
        }
        drop(lock);
        self.count(|c| &c.pages_to_vram, moved.len() as u64);
        self.finish(range, Direction::ToDevice, cause, moved.len(), started);
        Ok(moved)
    }

    /// Copies what was collected to VRAM, as far as there is room, and lets it move.
    fn upload<'a>(
        &self,
        map: &Pagemap,
        mut collected: Collected<'a>,
        room: &mut Reservation<'_>,
    ) -> Result<Migrated<'a>> {
        let mut copies = CopyList::new(PMD_PAGES, self.gpu.limits.max_copy_run)?;
        let mut index = 0;
        while let Some(entry) = collected.next_entry(index) {
            index = entry.index + (1 << entry.order);
            self.give_room(map, &mut collected, entry, room, &mut copies)?;
        }
        self.gpu.copy(copies)?;
        Ok(collected.pages())
    }

    /// Brings the pages of a range, inside one region, home. Returns how many.
    pub(super) fn to_ram(
        &self,
        scratch: &mut Scratch,
        mm: &MmWithUser,
        range: Range<usize>,
        cause: Cause,
    ) -> Result<Home> {
        self.some_to_ram(scratch, mm, range, cause, |_| true)
    }

    /// Brings those pages of a range home that `wanted` names.
    pub(super) fn some_to_ram(
        &self,
        scratch: &mut Scratch,
        mm: &MmWithUser,
        range: Range<usize>,
        cause: Cause,
        wanted: impl Fn(VramPage) -> bool,
    ) -> Result<Home> {
        let started = Instant::<Monotonic>::now();
        let map = self.gpu.pagemap()?;
        let lock = MmapLock::read(mm);
        let mut home = Home::default();
        let mut at = range.start;
        while at < range.end {
            let Some(vma) = lock.find_vma(at).filter(|vma| vma.start() < range.end) else {
                break;
            };
            let part = at.max(vma.start())..range.end.min(vma.end());
            at = part.end;
            if !vma.can_migrate() {
                continue;
            }
            let mut collected = Collected::device_to_system(&vma, part, map.owner(), scratch)?;
            let fails = || self.takes_failure();
            download(&self.gpu, &map, &mut collected, &wanted, fails)?;
            for (_, order) in collected.pages().entries() {
                home.pages += 1 << order;
                home.folios += 1;
            }
        }
        drop(lock);
        self.count(|c| &c.pages_to_ram, home.pages as u64);
        self.finish(range, Direction::ToSystem, cause, home.pages, started);
        Ok(home)
    }

    /// Gives one collected entry destinations in VRAM, as far as there is room, and lists the copies.
    fn give_room(
        &self,
        map: &Pagemap,
        collected: &mut Collected<'_>,
        entry: Entry,
        room: &mut Reservation<'_>,
        copies: &mut CopyList,
    ) -> Result {
        let vram = &self.gpu.vram;
        let address = collected.address(entry.index);
        let source = match entry.source {
            Source::Page(pfn) => Some(pfn.phys()),
            Source::Hole => None,
        };
        let run = |to: VramAddr, offset: u64, bytes: usize| match source {
            Some(from) => CopyRun::upload(SystemAddr::new(from + offset), to, bytes as u32),
            None => CopyRun::fill(0, to, bytes as u32),
        };
        let fails = self.takes_failure();
        if fails && entry.order == 0 {
            return Ok(());
        }
        if entry.order == PMD_ORDER {
            if let Some(block) = (!fails).then(|| room.block()).flatten() {
                let folio = map.init_folio(block.into(), PMD_ORDER)?;
                vram.put_at(block, PMD_ORDER, address);
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
            vram.put_at(page, 0, address + (i << PAGE_SHIFT));
            if collected.set_device(entry.index + i, folio).is_ok() {
                copies.push(run(page.address(), (i << PAGE_SHIFT) as u64, PAGE_SIZE))?;
            }
        }
        Ok(())
    }

    /// Makes the next allocation for a migration fail, once.
    pub(crate) fn fail_next_allocation(&self, fail: bool) {
        self.fail_next.store(fail, Relaxed);
    }

    /// Whether this allocation is the one that fails.
    pub(crate) fn takes_failure(&self) -> bool {
        self.fail_next.load(Relaxed) && self.fail_next.xchg(false, Relaxed)
    }

    fn finish(
        &self,
        range: Range<usize>,
        direction: Direction,
        cause: Cause,
        moved: usize,
        started: Instant<Monotonic>,
    ) {
        let elapsed = started.elapsed().as_nanos().max(0) as u64;
        self.count(|c| &c.migrate_ns, elapsed);
        trace::migrate(
            self.gpu.index(),
            self.context,
            range.start as u64,
            range.end as u64,
            direction,
            cause,
            moved as u64,
            (range.len() >> PAGE_SHIFT) as u64,
        );
    }
}

/// Where the part of a range from `at` on ends that migrates at once. `EINVAL`: there is nothing that
/// could migrate.
fn part_end(mm: &MmWithUser, at: usize, end: usize) -> Result<usize> {
    let lock = MmapLock::read(mm);
    let vma = lock.vma_lookup(at).filter(|vma| vma.is_readable());
    let vma = vma.filter(|vma| vma.can_migrate()).ok_or(EINVAL)?;
    Ok(end.min(at.saturating_add(REGION_BYTES)).min(vma.end()))
}

/// Gives the collected pages that `wanted` names destinations in RAM and copies them there.
/// `ENOMEM`: there is no memory for any of them, or `fails` said so of one. Any other error is the
/// device's.
pub(super) fn download(
    gpu: &Gpu,
    map: &Pagemap,
    collected: &mut Collected<'_>,
    wanted: impl Fn(VramPage) -> bool,
    fails: impl Fn() -> bool,
) -> Result {
    let mut copies = CopyList::new(PMD_PAGES, gpu.limits.max_copy_run)?;
    let mut short = false;
    let mut index = 0;
    while let Some(entry) = collected.next_entry(index) {
        index = entry.index + (1 << entry.order);
        let Source::Page(pfn) = entry.source else {
            continue;
        };
        let Some(page) = map.lookup(pfn).map(VramPage::from).filter(|&p| wanted(p)) else {
            continue;
        };
        let mut order = entry.order;
        let mut done = 0;
        while done < 1 << entry.order {
            let failed = fails();
            if failed && order == 0 {
                return Err(ENOMEM);
            }
            let folio = (!failed).then(|| collected.alloc_folio(entry.index + done, order));
            let Some(folio) = folio.flatten() else {
                if order == 0 {
                    short = true;
                    break;
                }
                order = 0;
                continue;
            };
            let from = VramPage(page.0 + done as u32).address();
            let to = SystemAddr::new(folio.phys());
            if collected.set_system(entry.index + done, folio).is_err() {
                // mm takes this one as a whole only, and there was no memory for that.
                short = true;
                break;
            }
            copies.push(CopyRun::download(from, to, (PAGE_SIZE << order) as u32))?;
            done += 1 << order;
        }
    }
    if short && copies.is_empty() {
        return Err(ENOMEM);
    }
    let copied = gpu.copy(copies);
    if copied.is_err() {
        // A device that is only slow may write to them yet.
        collected.leak_destinations();
    }
    copied
}
