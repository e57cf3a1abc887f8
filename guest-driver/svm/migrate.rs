// SPDX-License-Identifier: GPL-2.0
//! Pages to VRAM and home, for one address space.
//!
//! mm collects and unmaps the pages of a batch, one list of copies goes to the copy engine, and mm
//! switches over to what was copied ([`super::flight`]). While one batch is copied, the next one is
//! collected. What cannot move (pinned, locked, shared in a way that mm refuses) stays where it is,
//! and so does everything if the copy fails: the destinations are thrown away.
//!
//! A request of the user is done in runs: one holding of the mmap lock, one look at what moved, few
//! requests to map it.

use super::{flight::Flight, page_table::PageSet, Service, Space, REGION_BYTES};
use crate::{
    kapi::{
        migrate::{Collected, Huge, Migrated},
        mm::{MmapLock, Vma},
        signal::fatal_signal_pending,
        trace::{self, Cause, Direction},
    },
    uapi,
    vram::VramPage,
};
use core::ops::Range;
use kernel::{
    alloc::kvec::PushError,
    mm::MmWithUser,
    page::PAGE_SHIFT,
    prelude::*,
    sync::atomic::Relaxed,
    time::{delay::fsleep, Delta, Instant, Monotonic},
};

/// Most bytes of a batch to VRAM: of a hole that is larger mm finds no more than the first huge page.
const MOST_UP: usize = REGION_BYTES;
/// Most bytes of a batch home.
const MOST_HOME: usize = 2 * REGION_BYTES;
/// Most batches on their way at once.
const MOST_FLIGHTS: usize = 4;
/// Most bytes of a run.
const RUN_BYTES: usize = 16 * REGION_BYTES;
/// Regions that a run may have a part in.
const RUN_REGIONS: usize = RUN_BYTES / REGION_BYTES + 1;
/// A run has no more pages than one part of VRAM of so many.
const VRAM_SHARE: usize = 4;
/// How often a request tries to move what should move, and the pause between: mm may have a page in its
/// own hands for a moment, to compact memory for example.
pub(crate) const PASSES: usize = 3;
pub(crate) const PASS_PAUSE: Delta = Delta::from_millis(1);

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

/// Pages of a run, by region.
pub(super) struct RunPages {
    /// The first region.
    base: usize,
    sets: [PageSet; RUN_REGIONS],
}

impl RunPages {
    /// None of a run that begins at `start`.
    fn none(start: usize) -> Self {
        Self {
            base: start & !(REGION_BYTES - 1),
            sets: [PageSet::EMPTY; RUN_REGIONS],
        }
    }

    /// Adds the pages of a range.
    fn insert(&mut self, range: Range<usize>) {
        let mut at = range.start;
        while at < range.end {
            let region = at & !(REGION_BYTES - 1);
            let end = range.end.min(region + REGION_BYTES);
            if let Some(set) = self
                .sets
                .get_mut(region.wrapping_sub(self.base) / REGION_BYTES)
            {
                set.insert_all((at - region) >> PAGE_SHIFT..(end - region) >> PAGE_SHIFT);
            }
            at = end;
        }
    }

    /// Each region with its pages.
    pub(super) fn regions(&self) -> impl Iterator<Item = (usize, &PageSet)> {
        let sets = self.sets.iter().enumerate();
        sets.map(|(i, set)| (self.base + i * REGION_BYTES, set))
    }

    fn regions_mut(&mut self) -> impl Iterator<Item = (usize, &mut PageSet)> {
        let base = self.base;
        let sets = self.sets.iter_mut().enumerate();
        sets.map(move |(i, set)| (base + i * REGION_BYTES, set))
    }
}

/// What is done about memory that cannot migrate.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Unmovable {
    /// It stays.
    Skip,
    /// `EINVAL`.
    Refuse,
}

impl Space {
    /// Moves the pages of a range on request. `EFAULT`: part of it is not mapped; what is before that
    /// part was moved.
    pub(crate) fn migrate(&self, range: Range<usize>, to: uapi::Place) -> Result<Moved> {
        let mm = self.mm()?;
        let mut total = Moved::default();
        let mut at = range.start;
        while at < range.end {
            let wanted = self.run_end(at, range.end);
            let run = at..mapped_end(&MmapLock::read(&mm), at, wanted).ok_or(EFAULT)?;
            let mut service = self.service()?;
            let pages = run.len() >> PAGE_SHIFT;
            let (mut moved, mut elsewhere) = (0, pages);
            for pass in 0..PASSES {
                if pass != 0 {
                    fsleep(PASS_PAUSE);
                }
                moved += match self.migrate_run(&mut service, &mm, run.clone(), to) {
                    // Pages of VRAM have failed meanwhile: now they are known, and stay.
                    Err(error) if error == EAGAIN => 0,
                    result => result?,
                };
                elsewhere = match to {
                    _ if moved >= pages => 0,
                    uapi::Place::Vram => {
                        pages - self.count_in_vram(&mut service, &mm, run.clone())?
                    }
                    _ => self.count_in_vram(&mut service, &mm, run.clone())?,
                };
                if elsewhere == 0 {
                    break;
                }
            }
            drop(service);
            total.stayed += elsewhere;
            total.moved += moved.min(pages - elsewhere);
            total.there += (pages - elsewhere).saturating_sub(moved);
            at = run.end;
            self.gpu.usable()?;
            if fatal_signal_pending() {
                return Err(EINTR);
            }
        }
        Ok(total)
    }

    /// One pass of [`Space::migrate`] over a run. Returns how many pages moved.
    fn migrate_run(
        &self,
        service: &mut Service,
        mm: &MmWithUser,
        run: Range<usize>,
        to: uapi::Place,
    ) -> Result<usize> {
        if to != uapi::Place::Vram {
            return Ok(self.to_ram(mm, run, Cause::Request)?.pages);
        }
        let mut moved = 0;
        let mut all = RunPages::none(run.start);
        all.insert(run.clone());
        let count = |_: usize, pages: usize| moved += pages;
        self.give_back(service, mm, run.clone());
        self.to_vram(mm, run, Cause::Request, Unmovable::Skip, count)?;
        self.map_run(service, mm, &all, true);
        Ok(moved)
    }

    /// Moves what can be moved of a range to VRAM, and maps for the GPU what moved and what was mapped
    /// before. `EINVAL`: part of it is not mapped, not readable, or of a kind that cannot migrate; what
    /// is before that part was moved. A range that does not begin at a huge page's border is moved in
    /// parts of that size, which splits the huge pages in it.
    pub(crate) fn migrate_parts_to_vram(&self, range: Range<usize>) -> Result {
        let mm = self.mm()?;
        let mut at = range.start;
        while at < range.end {
            let run = at..self.run_end(at, range.end);
            let mut service = self.service()?;
            let mut kept = self.mapped_pages(run.clone())?;
            let landed = |address, pages| kept.insert(address..address + (pages << PAGE_SHIFT));
            let moved = self.to_vram(&mm, run.clone(), Cause::Request, Unmovable::Refuse, landed);
            self.map_run(&mut service, &mm, &kept, false);
            drop(service);
            moved?;
            at = run.end;
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
            let run = at..self.run_end(at, range.end);
            let service = self.service()?;
            let unmovable = Unmovable::Refuse;
            let home = self.run_home(&mm, run.clone(), Cause::Request, unmovable, |_| true)?;
            drop(service);
            folios += home.folios;
            at = run.end;
            self.gpu.usable()?;
            if fatal_signal_pending() {
                return Err(EINTR);
            }
        }
        Ok(folios)
    }

    /// Moves what can be moved of a range, inside one region, to VRAM for a fault. Returns whether
    /// anything moved.
    pub(super) fn fault_to_vram(&self, mm: &MmWithUser, range: Range<usize>) -> Result<bool> {
        let mut any = false;
        let landed = |_, _| any = true;
        self.to_vram(mm, range, Cause::GpuFault, Unmovable::Skip, landed)?;
        Ok(any)
    }

    /// Moves what can be moved of a run to VRAM. Tells `landed` what moved: addresses, and how many
    /// pages from there on.
    fn to_vram(
        &self,
        mm: &MmWithUser,
        range: Range<usize>,
        cause: Cause,
        unmovable: Unmovable,
        mut landed: impl FnMut(usize, usize),
    ) -> Result {
        let map = self.gpu.pagemap()?;
        // Before the mmap lock is taken: it may bring pages of other processes home.
        let pages = range.len() >> PAGE_SHIFT;
        let mut room = self.gpu.make_room(self.context, pages)?;
        let asked = matches!(cause, Cause::Request);
        let lock = MmapLock::read(mm);
        let mut land = |(flight, batch): (Flight<'_>, Batch)| -> Result {
            let migrated = flight.land()?;
            let mut moved = 0;
            for (index, order) in migrated.entries() {
                landed(batch.range.start + (index << PAGE_SHIFT), 1 << order);
                moved += 1 << order;
            }
            drop(migrated);
            self.count(|c| &c.pages_to_vram, moved as u64);
            self.finish(batch, Direction::ToDevice, cause, moved);
            Ok(())
        };
        let mut flights = Flights::new()?;
        let mut at = range.start;
        let send = || -> Result<bool> {
            let Some((vma, part)) = next_part(&lock, at, range.end, unmovable, MOST_UP)? else {
                return Ok(false);
            };
            at = part.end;
            // Of a private mapping of a file, the pages that were written can move. Of a shared one,
            // none can, which mm finds out for those who are to see it try.
            let tries = !vma.is_shared() || unmovable == Unmovable::Refuse;
            let movable = vma.is_anonymous() || (asked && tries);
            if !(movable && vma.is_readable() && vma.can_migrate()) {
                return Ok(true);
            }
            for huge in [Huge::Whole, Huge::Split] {
                let batch = Batch::begin(part.clone());
                let range = batch.range.clone();
                let collected = Collected::system_to_device(vma, range, map.owner(), huge)?;
                let fails = || self.takes_failure();
                let next = Flight::to_vram(&self.gpu, &map, collected, &mut room, fails)?;
                if !flights.send_or_land((next, batch), &mut land)? {
                    break;
                }
            }
            Ok(true)
        };
        let sent = repeat(send);
        // What was sent before an error lands all the same.
        flights.land_all(land).and(sent)
    }

    /// Brings the pages of a range home.
    pub(super) fn to_ram(
        &self,
        mm: &MmWithUser,
        range: Range<usize>,
        cause: Cause,
    ) -> Result<Home> {
        self.some_to_ram(mm, range, cause, |_| true)
    }

    /// Brings those pages of a range home that `wanted` names.
    pub(super) fn some_to_ram(
        &self,
        mm: &MmWithUser,
        range: Range<usize>,
        cause: Cause,
        wanted: impl Fn(VramPage) -> bool,
    ) -> Result<Home> {
        self.run_home(mm, range, cause, Unmovable::Skip, wanted)
    }

    fn run_home(
        &self,
        mm: &MmWithUser,
        range: Range<usize>,
        cause: Cause,
        unmovable: Unmovable,
        wanted: impl Fn(VramPage) -> bool,
    ) -> Result<Home> {
        let map = self.gpu.pagemap()?;
        // The owner of what makes room may keep its lock for as long as its own work takes.
        let lock = match cause {
            Cause::Evict => MmapLock::read_soon(mm).ok_or(EBUSY)?,
            _ => MmapLock::read(mm),
        };
        let mut home = Home::default();
        let mut land = |(flight, batch): (Flight<'_>, Batch)| -> Result {
            let migrated: Migrated<'_> = flight.land()?;
            let mut moved = 0;
            for (_, order) in migrated.entries() {
                moved += 1 << order;
                home.folios += 1;
            }
            drop(migrated);
            home.pages += moved;
            self.count(|c| &c.pages_to_ram, moved as u64);
            self.finish(batch, Direction::ToSystem, cause, moved);
            Ok(())
        };
        let mut flights = Flights::new()?;
        let mut at = range.start;
        let send = || -> Result<bool> {
            let Some((vma, part)) = next_part(&lock, at, range.end, unmovable, MOST_HOME)? else {
                return Ok(false);
            };
            at = part.end;
            if !vma.can_migrate() {
                return Ok(true);
            }
            for huge in [Huge::Whole, Huge::Split] {
                let batch = Batch::begin(part.clone());
                let range = batch.range.clone();
                let collected = Collected::device_to_system(vma, range, map.owner(), huge)?;
                let fails = || self.takes_failure();
                let next = Flight::home(&self.gpu, &map, collected, &wanted, fails)?;
                if !flights.send_or_land((next, batch), &mut land)? {
                    break;
                }
            }
            Ok(true)
        };
        let sent = repeat(send);
        flights.land_all(land).and(sent)?;
        Ok(home)
    }

    /// Where a run from `at` on ends.
    fn run_end(&self, at: usize, end: usize) -> usize {
        let share = (self.gpu.vram.pages() / VRAM_SHARE) << PAGE_SHIFT;
        let most = RUN_BYTES.min(share & !(REGION_BYTES - 1)).max(REGION_BYTES);
        end.min(at.saturating_add(most))
    }

    /// Which pages of a run the GPU has mapped.
    fn mapped_pages(&self, run: Range<usize>) -> Result<RunPages> {
        let tables = self.mirror.lock();
        let table = tables.table.as_ref().ok_or(ENODEV)?;
        let mut pages = RunPages::none(run.start);
        for (region, set) in pages.regions_mut() {
            let inside = run.start.max(region)..run.end.min(region + REGION_BYTES);
            if !inside.is_empty() {
                let first = (inside.start - region) >> PAGE_SHIFT;
                *set = table
                    .mapped(region)
                    .within(first..first + (inside.len() >> PAGE_SHIFT));
            }
        }
        Ok(pages)
    }

    /// Makes the next allocation for a migration fail, once.
    pub(crate) fn fail_next_allocation(&self, fail: bool) {
        self.fail_next.store(fail, Relaxed);
    }

    /// Whether an allocation is to fail.
    pub(crate) fn will_fail(&self) -> bool {
        self.fail_next.load(Relaxed)
    }

    /// Whether this allocation is the one that fails.
    pub(crate) fn takes_failure(&self) -> bool {
        self.fail_next.load(Relaxed) && self.fail_next.xchg(false, Relaxed)
    }

    fn finish(&self, batch: Batch, direction: Direction, cause: Cause, moved: usize) {
        let elapsed = batch.started.elapsed().as_nanos().max(0) as u64;
        self.count(|c| &c.migrate_ns, elapsed);
        trace::migrate(
            self.gpu.index(),
            self.context,
            batch.range.start as u64,
            batch.range.end as u64,
            direction,
            cause,
            moved as u64,
            (batch.range.len() >> PAGE_SHIFT) as u64,
        );
    }
}

/// Addresses that migrate at once, and since when.
struct Batch {
    range: Range<usize>,
    started: Instant<Monotonic>,
}

impl Batch {
    fn begin(range: Range<usize>) -> Self {
        Self {
            range,
            started: Instant::now(),
        }
    }
}

/// Where the first gap in what is mapped from `at` on is, at most `end`.
fn mapped_end(lock: &MmapLock<'_>, at: usize, end: usize) -> Option<usize> {
    let mut mapped = lock.vma_lookup(at)?.end();
    while mapped < end {
        match lock.vma_lookup(mapped) {
            Some(vma) => mapped = vma.end(),
            None => return Some(mapped),
        }
    }
    Some(end)
}

/// Does a step again until it says that there is none left, or fails.
fn repeat(mut step: impl FnMut() -> Result<bool>) -> Result {
    while step()? {}
    Ok(())
}

/// Batches on their way, in order.
struct Flights<'a>(KVec<(Flight<'a>, Batch)>);

impl<'a> Flights<'a> {
    fn new() -> Result<Self> {
        Ok(Self(KVec::with_capacity(MOST_FLIGHTS, GFP_KERNEL)?))
    }

    /// Adds one, and lands the oldest if there are as many as there may be. One that has left a huge page
    /// lands at once: `true`, the pages of its batch are to be collected again, split.
    fn send_or_land(
        &mut self,
        flight: (Flight<'a>, Batch),
        land: &mut impl FnMut((Flight<'a>, Batch)) -> Result,
    ) -> Result<bool> {
        if flight.0.left_huge() {
            return land(flight).map(|()| true);
        }
        let oldest = match self.0.push_within_capacity(flight) {
            Ok(()) if self.0.len() < MOST_FLIGHTS => None,
            Ok(()) => self.0.remove(0).ok(),
            // Not so: there is room for all there may be.
            Err(PushError(flight)) => Some(flight),
        };
        oldest.map_or(Ok(()), land).map(|()| false)
    }

    /// Lands all, even those behind one that does not.
    fn land_all(mut self, mut land: impl FnMut((Flight<'a>, Batch)) -> Result) -> Result {
        let mut result = Ok(());
        for flight in self.0.drain_all() {
            result = result.and(land(flight));
        }
        result
    }
}

/// The next batch from `at` on, inside one mapping.
fn next_part<'a>(
    lock: &'a MmapLock<'_>,
    at: usize,
    end: usize,
    unmovable: Unmovable,
    most: usize,
) -> Result<Option<(Vma<'a>, Range<usize>)>> {
    if at >= end {
        return Ok(None);
    }
    let Some(vma) = lock.find_vma(at).filter(|vma| vma.start() < end) else {
        return match unmovable {
            Unmovable::Skip => Ok(None),
            Unmovable::Refuse => Err(EINVAL),
        };
    };
    let movable = vma.start() <= at && vma.is_readable() && vma.can_migrate();
    if unmovable == Unmovable::Refuse && !movable {
        return Err(EINVAL);
    }
    let start = at.max(vma.start());
    let region = start & !(REGION_BYTES - 1);
    let most = match unmovable {
        _ if start == region => start.saturating_add(most),
        // So that no huge page is parted that need not be.
        Unmovable::Skip => region.saturating_add(REGION_BYTES),
        Unmovable::Refuse => start.saturating_add(REGION_BYTES),
    };
    Ok(Some((vma, start..end.min(vma.end()).min(most))))
}
