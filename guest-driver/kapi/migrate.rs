// SPDX-License-Identifier: GPL-2.0
//! `migrate_vma_*()` and `migrate_device_range()`: pages move between system and device memory.
//!
//! [`Collected`] has the sources isolated, locked and unmapped, and takes a destination for each
//! that shall move; [`Migrated`] is after `migrate_vma_pages()` and knows what really moved. Both
//! put everything right when they are dropped, in whatever state they are: what has no destination
//! or could not move stays where it was. The caller copies between the two steps.
//!
//! A huge page that was collected as one takes one destination of its size. The core would take small
//! ones, too, and split it then, but forgets who else maps it (`docs/kernel-findings.md`, 10); what is to
//! move in small pages is split before ([`Huge::Split`]).
//!
//! Must not know what moves or why. Locks: the mmap lock (in the [`Vma`] or [`Fault`]) but for
//! [`Collected::device_range`].
//!
//! C header: `include/linux/migrate.h`.

use super::{
    folio::{DeviceFolio, Pfn, SystemFolio, PMD_ORDER},
    mm::Vma,
    pagemap::{DevicePagemap, Fault, Owner, PagemapOps},
};
use crate::bindings;
use core::{marker::PhantomData, ops::Range, ptr, ptr::NonNull, slice};
use kernel::{
    error::to_result,
    page::{PAGE_SHIFT, PAGE_SIZE},
    prelude::*,
};

const VALID: usize = bindings::MIGRATE_PFN_VALID as usize;
const MIGRATE: usize = bindings::MIGRATE_PFN_MIGRATE as usize;
const COMPOUND: usize = bindings::MIGRATE_PFN_COMPOUND as usize;
const SHIFT: u32 = bindings::MIGRATE_PFN_SHIFT;

const SELECT_SYSTEM: usize = bindings::migrate_vma_direction_MIGRATE_VMA_SELECT_SYSTEM as usize;
const SELECT_DEVICE: usize =
    bindings::migrate_vma_direction_MIGRATE_VMA_SELECT_DEVICE_PRIVATE as usize;
const SELECT_COMPOUND: usize = bindings::migrate_vma_direction_MIGRATE_VMA_SELECT_COMPOUND as usize;

/// The arrays of a migration: of sources and of destinations, with an entry for each page.
///
/// # Invariants
///
/// Both are of the same length.
enum Arrays {
    /// Most CPU faults are about one page, and do without an allocation.
    Page { src: usize, dst: usize },
    Pages {
        src: KVVec<usize>,
        dst: KVVec<usize>,
    },
}

impl Arrays {
    /// Twice as many entries as there are pages: `migrate_vma_collect_pmd()` writes the entries of a range
    /// once more where the page table has gone while it split a folio (`docs/kernel-findings.md`, 11).
    fn new(pages: usize) -> Result<Self> {
        Ok(match pages {
            1 => Self::Page { src: 0, dst: 0 },
            _ => Self::Pages {
                src: KVVec::from_elem(0, 2 * pages, GFP_KERNEL)?,
                dst: KVVec::from_elem(0, 2 * pages, GFP_KERNEL)?,
            },
        })
    }

    fn src(&self) -> &[usize] {
        match self {
            Self::Page { src, .. } => slice::from_ref(src),
            Self::Pages { src, .. } => src,
        }
    }

    fn dst(&self) -> &[usize] {
        match self {
            Self::Page { dst, .. } => slice::from_ref(dst),
            Self::Pages { dst, .. } => dst,
        }
    }

    fn both_mut(&mut self) -> (&mut [usize], &mut [usize]) {
        match self {
            Self::Page { src, dst } => (slice::from_mut(src), slice::from_mut(dst)),
            Self::Pages { src, dst } => (src, dst),
        }
    }

    /// Lets the core find them, until they are moved.
    fn point(&mut self, args: &mut bindings::migrate_vma) {
        let (src, dst) = self.both_mut();
        args.src = src.as_mut_ptr();
        args.dst = dst.as_mut_ptr();
    }
}

/// Where a page comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    /// Nowhere: it was never touched, and is all zero.
    Hole,
    /// A page, the first of `1 << order` consecutive ones.
    Page(Pfn),
}

/// One folio that may move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    /// Its first page, by number in the range.
    pub(crate) index: usize,
    /// 0 or [`PMD_ORDER`].
    pub(crate) order: u32,
    /// Where it is.
    pub(crate) source: Source,
}

/// How huge pages are collected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Huge {
    /// As one.
    Whole,
    /// In small pages: the core splits them first, for all who map them.
    Split,
}

/// How the pages were found, and how to finish.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    SystemToDevice,
    DeviceToSystem,
    /// `migrate_to_ram`: the core cannot split the folio, but splits the entry that maps it, so that
    /// the CPU faults again on a page of it.
    Fault,
    /// No VMA: the core cannot split at all, and there are no holes.
    DeviceRange,
}

/// The state that both steps share; finalizes when it is dropped.
///
/// # Invariants
///
/// - `arrays` have `args.npages` entries at least.
/// - The pages in `src` are locked and referenced for this migration; those in `dst` are locked and
///   referenced, and belong to it.
/// - But for [`Kind::DeviceRange`], `args.vma` is valid and its mmap lock is held, for `'a`.
/// - If `held`, each folio of [`huge_in_vram`] has the spare mappings of `zap.c`.
struct Raw<'a> {
    args: bindings::migrate_vma,
    kind: Kind,
    arrays: Arrays,
    held: bool,
    _lock: PhantomData<Vma<'a>>,
}

impl<'a> Raw<'a> {
    fn new(
        kind: Kind,
        vma: Vma<'a>,
        range: Range<usize>,
        owner: Owner,
        huge: Huge,
        fault_page: *mut bindings::page,
    ) -> Result<Self> {
        let len = range.end.checked_sub(range.start).ok_or(EINVAL)?;
        if len == 0 || (range.start | len) % PAGE_SIZE != 0 {
            return Err(EINVAL);
        }
        let mut arrays = Arrays::new(len >> PAGE_SHIFT)?;
        let select = if kind == Kind::SystemToDevice {
            SELECT_SYSTEM
        } else {
            SELECT_DEVICE
        };
        let compound = match huge {
            Huge::Whole => SELECT_COMPOUND,
            Huge::Split => 0,
        };
        let mut args = bindings::migrate_vma {
            vma: vma.as_ptr(),
            start: range.start,
            end: range.end,
            pgmap_owner: owner.as_ptr(),
            flags: select | compound,
            fault_page,
            ..Default::default()
        };
        arrays.point(&mut args);
        // SAFETY: The arrays are long enough; `vma` is under its mmap lock; a fault page is locked
        // and referenced by the core.
        to_result(unsafe { bindings::migrate_vma_setup(&mut args) })?;
        // INVARIANT: `migrate_vma_setup()` has filled `npages` entries of both arrays.
        let mut raw = Self {
            args,
            kind,
            arrays,
            held: false,
            _lock: PhantomData,
        };
        if raw.args.npages != len >> PAGE_SHIFT {
            // Some are there twice, and all behind them are not where they seem.
            raw.src_mut().iter_mut().for_each(|src| *src &= !MIGRATE);
        }
        raw.hold();
        Ok(raw)
    }

    /// Keeps huge folios of VRAM from those who zap the migration entries that map them now.
    fn hold(&mut self) {
        if self.kind == Kind::SystemToDevice {
            return;
        }
        for src in self.src_mut() {
            let Some(folio) = huge_in_vram(*src) else {
                continue;
            };
            // SAFETY: A folio that this migration has locked.
            unsafe {
                if !bindings::farfault_c_folio_hold(folio) {
                    // Somebody was faster, and nobody has it any more.
                    bindings::farfault_c_folio_unlock(folio);
                    *src = 0;
                }
            }
        }
        // INVARIANT: All of them, just now.
        self.held = true;
    }

    /// The end of [`Raw::hold`] for those which `ends`, by source and destination, if any are held. Nothing
    /// may map them yet.
    fn release(&mut self, ends: impl Fn(usize, usize) -> bool) {
        if !self.held {
            return;
        }
        for (&src, &dst) in self.src().iter().zip(self.dst()) {
            if let Some(folio) = huge_in_vram(src | MIGRATE).filter(|_| ends(src, dst)) {
                // SAFETY: By the type invariant it is held, from now on no more.
                unsafe { bindings::farfault_c_folio_release(folio) };
            }
        }
    }

    fn src(&self) -> &[usize] {
        &self.arrays.src()[..self.args.npages]
    }

    fn dst(&self) -> &[usize] {
        &self.arrays.dst()[..self.args.npages]
    }

    fn src_mut(&mut self) -> &mut [usize] {
        &mut self.arrays.both_mut().0[..self.args.npages]
    }

    fn dst_mut(&mut self) -> &mut [usize] {
        &mut self.arrays.both_mut().1[..self.args.npages]
    }

    /// For the core, with the arrays where they are now.
    fn args(&mut self) -> &mut bindings::migrate_vma {
        self.arrays.point(&mut self.args);
        &mut self.args
    }

    fn address(&self, index: usize) -> usize {
        self.args.start + index * PAGE_SIZE
    }
}

impl Drop for Raw<'_> {
    fn drop(&mut self) {
        let kind = self.kind;
        let args = self.args();
        if kind == Kind::DeviceRange {
            // SAFETY: By the type invariant; this is the only call.
            unsafe { bindings::migrate_device_finalize(args.src, args.dst, args.npages) };
        } else {
            // SAFETY: By the type invariant; this is the only call.
            unsafe { bindings::migrate_vma_finalize(args) };
        }
        // What has moved was held up to here.
        self.release(|src, _| src & MIGRATE != 0);
    }
}

/// Pages that are isolated, locked and unmapped, and wait for destinations.
///
/// Dropped, everything stays where it was and the destinations are freed.
pub(crate) struct Collected<'a> {
    raw: Raw<'a>,
    committed: bool,
}

impl<'a> Collected<'a> {
    /// The system pages of `range`, which must be in `vma`, and its holes if it is anonymous.
    ///
    /// Fails with `EINVAL` where the range is wrong or [`Vma::can_migrate`] says no, and with `ENOMEM`.
    pub(crate) fn system_to_device(
        vma: Vma<'a>,
        range: Range<usize>,
        owner: Owner,
        huge: Huge,
    ) -> Result<Self> {
        let none = ptr::null_mut();
        let mut collected = Self::vma(Kind::SystemToDevice, vma, range, owner, huge, none)?;
        let watched = vma.has_userfaultfd();
        for src in collected.raw.src_mut() {
            leave_if_ksm(src);
            // The core takes the zero page for a hole, and forgets that it may be write-protected.
            if watched && *src & VALID == 0 {
                *src &= !MIGRATE;
            }
        }
        Ok(collected)
    }

    /// The device pages of `owner` in `range`, which must be in `vma`. Fails like
    /// [`Collected::system_to_device`].
    pub(crate) fn device_to_system(
        vma: Vma<'a>,
        range: Range<usize>,
        owner: Owner,
        huge: Huge,
    ) -> Result<Self> {
        let none = ptr::null_mut();
        Self::vma(Kind::DeviceToSystem, vma, range, owner, huge, none)
    }

    /// Like [`Collected::device_to_system`], for `migrate_to_ram`: the page of `fault` is among
    /// them, though the core holds its lock.
    pub(crate) fn fault(fault: &'a Fault<'_>, range: Range<usize>, owner: Owner) -> Result<Self> {
        // Where a single page is wanted of a larger folio, the core is to split it.
        let huge = if range.len() > PAGE_SIZE {
            Huge::Whole
        } else {
            Huge::Split
        };
        Self::vma(Kind::Fault, fault.vma(), range, owner, huge, fault.page())
    }

    fn vma(
        kind: Kind,
        vma: Vma<'a>,
        range: Range<usize>,
        owner: Owner,
        huge: Huge,
        fault_page: *mut bindings::page,
    ) -> Result<Self> {
        Ok(Self {
            raw: Raw::new(kind, vma, range, owner, huge, fault_page)?,
            committed: false,
        })
    }

    /// The pages in use of a range of the pagemap, wherever they are mapped. For what no address
    /// space is known of: prefer [`Collected::device_to_system`], because the core looks up the
    /// mappings here without what keeps them from going away while their process exits.
    ///
    /// A folio is found if all of it is in the range. Fails with `EINVAL` where the range is wrong,
    /// and with `ENOMEM`.
    pub(crate) fn device_range<T: PagemapOps>(
        map: &'a DevicePagemap<T>,
        pages: Range<usize>,
    ) -> Result<Self> {
        let npages = pages.end.checked_sub(pages.start).ok_or(EINVAL)?;
        if npages == 0 || pages.end > map.pages() {
            return Err(EINVAL);
        }
        let mut arrays = Arrays::new(npages)?;
        let mut args = bindings::migrate_vma {
            npages,
            ..Default::default()
        };
        arrays.point(&mut args);
        let first = map.pfn(super::pagemap::DevicePage(pages.start));
        // SAFETY: The array has `npages` entries, and the frames are of a registered pagemap.
        to_result(unsafe { bindings::migrate_device_range(args.src, first.0, npages) })?;
        arrays.both_mut().0.iter_mut().for_each(leave_if_uncharged);
        // INVARIANT: `migrate_device_range()` has filled `src`, and there are no destinations yet.
        let mut raw = Raw {
            args,
            kind: Kind::DeviceRange,
            arrays,
            held: false,
            _lock: PhantomData,
        };
        raw.hold();
        Ok(Self {
            raw,
            committed: false,
        })
    }

    /// The first folio that may move from page `from` on. Holes are found in both directions; those
    /// of [`Collected::device_to_system`] are best left alone.
    pub(crate) fn next_entry(&self, from: usize) -> Option<Entry> {
        let src = self.raw.src().get(from..)?;
        let index = from + src.iter().position(|src| src & MIGRATE != 0)?;
        let src = self.raw.src()[index];
        Some(Entry {
            index,
            order: order_of(src),
            source: if src & VALID != 0 {
                Source::Page(Pfn(src >> SHIFT))
            } else {
                Source::Hole
            },
        })
    }

    /// The address of a page; for [`Collected::device_range`], from the range's start.
    pub(crate) fn address(&self, index: usize) -> usize {
        self.raw.address(index)
    }

    /// A destination in system memory for page `index`, by the process's memory policy. `order` is
    /// 0 or [`PMD_ORDER`]. May sleep and reclaim; large folios are tried hard for only where smaller
    /// ones will not do.
    pub(crate) fn alloc_folio(&self, index: usize, order: u32) -> Option<SystemFolio> {
        if order != 0 && order != PMD_ORDER {
            return None;
        }
        let folio = if self.raw.kind == Kind::DeviceRange {
            // SAFETY: A plain allocation.
            unsafe { bindings::farfault_c_folio_alloc(order, true) }
        } else {
            // SAFETY: The VMA is under its mmap lock by the invariant of `Raw`; any address will do.
            unsafe {
                bindings::farfault_c_vma_alloc_folio(
                    order,
                    self.raw.kind == Kind::Fault,
                    self.raw.args.vma,
                    self.raw.address(index),
                )
            }
        };
        // SAFETY: Allocated just now with this order.
        NonNull::new(folio).map(|folio| unsafe { SystemFolio::from_raw(folio, order) })
    }

    /// Gives page `index` a destination on the device. It comes back where it does not fit: the
    /// page does not move, has a destination, is smaller than the folio, or goes the other way.
    pub(crate) fn set_device(
        &mut self,
        index: usize,
        folio: DeviceFolio,
    ) -> Result<(), DeviceFolio> {
        if self.raw.kind != Kind::SystemToDevice || !self.fits(index, folio.order()) {
            return Err(folio);
        }
        let order = folio.order();
        // SAFETY: Locked and referenced, and passes to the migration.
        unsafe { self.set(index, folio.into_raw(), order) };
        Ok(())
    }

    /// Gives page `index` a destination in system memory; like [`Collected::set_device`].
    pub(crate) fn set_system(
        &mut self,
        index: usize,
        folio: SystemFolio,
    ) -> Result<(), SystemFolio> {
        if self.raw.kind == Kind::SystemToDevice || !self.fits(index, folio.order()) {
            return Err(folio);
        }
        let order = folio.order();
        // SAFETY: Locked and referenced, and passes to the migration.
        unsafe { self.set(index, folio.into_raw(), order) };
        Ok(())
    }

    /// Never gives the destinations back to the system: a device that was told to write to them has
    /// not said that it is done.
    pub(crate) fn leak_destinations(&mut self) {
        for dst in self.raw.dst() {
            if dst & VALID != 0 {
                // SAFETY: By the invariant of `Raw` the destination is valid and referenced.
                unsafe {
                    let page = bindings::farfault_c_pfn_to_page(dst >> SHIFT);
                    bindings::farfault_c_folio_get(bindings::farfault_c_page_folio(page));
                }
            }
        }
    }

    /// Moves what has a destination. The copies must be complete, and seen by the CPUs.
    pub(crate) fn pages(mut self) -> Migrated<'a> {
        self.committed = true;
        // What is to be split, or stays.
        self.raw
            .release(|src, dst| src & MIGRATE != 0 && dst & COMPOUND == 0);
        let kind = self.raw.kind;
        let args = self.raw.args();
        if kind == Kind::DeviceRange {
            // SAFETY: Collected by `migrate_device_range()`; destinations are locked.
            unsafe { bindings::migrate_device_pages(args.src, args.dst, args.npages) };
        } else {
            // SAFETY: Collected by `migrate_vma_setup()`; destinations are locked.
            unsafe { bindings::migrate_vma_pages(args) };
        }
        // What should have moved, and has not.
        self.raw
            .release(|src, dst| src & MIGRATE == 0 && dst & COMPOUND != 0);
        // SAFETY: `self` is forgotten without running its drop, so `raw` has one owner.
        let raw = unsafe { ptr::read(&core::mem::ManuallyDrop::new(self).raw) };
        Migrated { raw }
    }

    /// Whether a folio of `order` may be the destination of page `index`.
    fn fits(&self, index: usize, order: u32) -> bool {
        let src = self.raw.src();
        let (Some(&entry), Some(&dst)) = (src.get(index), self.raw.dst().get(index)) else {
            return false;
        };
        if dst != 0 {
            return false;
        }
        entry & MIGRATE != 0 && (order_of(entry) == order || (order == 0 && self.only_splits()))
    }

    /// Whether a small destination is all right for a huge page: all that becomes of it is that its entry
    /// is split.
    pub(crate) fn only_splits(&self) -> bool {
        self.raw.kind == Kind::Fault
    }

    /// # Safety
    ///
    /// `folio` must be locked, with one reference, and both pass to the migration; page `index`
    /// must have no destination.
    unsafe fn set(&mut self, index: usize, folio: NonNull<bindings::folio>, order: u32) {
        // SAFETY: A valid folio by the function's contract.
        let pfn = unsafe { bindings::farfault_c_folio_pfn(folio.as_ptr()) };
        let compound = if order == 0 { 0 } else { COMPOUND };
        // INVARIANT: Locked and referenced by the function's contract.
        self.raw.dst_mut()[index] = (pfn << SHIFT) | VALID | compound;
    }
}

impl Drop for Collected<'_> {
    fn drop(&mut self) {
        if !self.committed {
            self.raw.release(|src, _| src & MIGRATE != 0);
            self.raw.held = false;
            // What is not marked as migrating is restored when `raw` finalizes.
            self.raw
                .src_mut()
                .iter_mut()
                .for_each(|src| *src &= !MIGRATE);
        }
    }
}

/// Pages that have moved, still locked and unmapped. Dropped, the CPU's page tables get the new
/// ones.
pub(crate) struct Migrated<'a> {
    raw: Raw<'a>,
}

impl Migrated<'_> {
    /// The order of the folio at `index` if it moved.
    pub(crate) fn moved(&self, index: usize) -> Option<u32> {
        let (src, dst) = (self.raw.src().get(index)?, self.raw.dst().get(index)?);
        (src & MIGRATE != 0 && dst & VALID != 0).then(|| order_of(*dst))
    }

    /// What moved: index and order of each folio.
    pub(crate) fn entries(&self) -> impl Iterator<Item = (usize, u32)> + '_ {
        (0..self.raw.args.npages).filter_map(|index| Some((index, self.moved(index)?)))
    }

    /// How many pages moved.
    pub(crate) fn count(&self) -> usize {
        self.entries().map(|(_, order)| 1 << order).sum()
    }
}

/// The folio of a source that is to move and huge.
fn huge_in_vram(src: usize) -> Option<*mut bindings::folio> {
    const HUGE: usize = VALID | MIGRATE | COMPOUND;
    // SAFETY: A page that was collected.
    (src & HUGE == HUGE).then(|| unsafe {
        bindings::farfault_c_page_folio(bindings::farfault_c_pfn_to_page(src >> SHIFT))
    })
}

/// The order that an entry of either array says.
fn order_of(entry: usize) -> u32 {
    if entry & COMPOUND == 0 {
        0
    } else {
        PMD_ORDER
    }
}

/// Lets a folio be that another migration is about to free: one that has moved, or the destination of
/// one that has not. `migrate_device_range()` finds such a folio between `folio_unlock()` and
/// `folio_put()`. It is not charged to a memory cgroup, so what takes its place would not be either,
/// and the core looks for the LRU list of that for ever (`docs/kernel-findings.md`, 5).
fn leave_if_uncharged(src: &mut usize) {
    // SAFETY: `leave_if` passes a folio that is locked and referenced.
    leave_if(src, |folio| unsafe {
        !bindings::farfault_c_folio_is_charged(folio)
    });
}

/// Lets a page be that KSM has merged. The core would move it, but ksmd goes on to compare other pages
/// with it, by an address that memory of a device does not have (`docs/kernel-findings.md`, 6).
fn leave_if_ksm(src: &mut usize) {
    // SAFETY: `leave_if` passes a folio that is locked and referenced.
    leave_if(src, |folio| unsafe {
        bindings::farfault_c_folio_test_ksm(folio)
    });
}

/// Lets a collected folio be for which `is_so`.
fn leave_if(src: &mut usize, is_so: impl FnOnce(*mut bindings::folio) -> bool) {
    if *src & (VALID | MIGRATE) != VALID | MIGRATE {
        return;
    }
    // SAFETY: The folio is locked and referenced for this migration.
    let folio = unsafe {
        let page = bindings::farfault_c_pfn_to_page(*src >> SHIFT);
        bindings::farfault_c_page_folio(page)
    };
    if is_so(folio) {
        *src &= !MIGRATE;
    }
}
