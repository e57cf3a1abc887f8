// SPDX-License-Identifier: GPL-2.0
//! Folios as owned values, and page frame numbers.
//!
//! A folio here is one that this driver has just allocated as the destination of a migration:
//! locked, with one reference, in no page table. [`crate::kapi::migrate`] takes it over, or it is
//! freed when it is dropped. Must not know what is copied into it.
//!
//! C headers: `include/linux/page_ref.h`, `include/linux/pagemap.h`.

use crate::bindings;
use core::{mem::ManuallyDrop, ptr::NonNull};
use kernel::page::{PAGE_SHIFT, PAGE_SIZE};

/// Order of a folio that one PMD entry maps: the only order but 0 that device memory has.
pub(crate) const PMD_ORDER: u32 = 9;
/// Pages of such a folio.
pub(crate) const PMD_PAGES: usize = 1 << PMD_ORDER;
/// Bytes of such a folio.
pub(crate) const PMD_SIZE: usize = PAGE_SIZE << PMD_ORDER;

/// A page frame number. It proves nothing about the page: only the object that it came from does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Pfn(pub(super) usize);

impl Pfn {
    /// The physical address of the page. Meaningless for device-private pages.
    pub(crate) fn phys(self) -> u64 {
        (self.0 as u64) << PAGE_SHIFT
    }
}

/// A locked folio with one reference, owned by this value.
///
/// # Invariants
///
/// `0` is a folio that is locked by this value, with one reference that belongs to it.
struct Locked(NonNull<bindings::folio>);

impl Locked {
    /// Gives lock and reference to somebody else.
    fn into_raw(self) -> NonNull<bindings::folio> {
        ManuallyDrop::new(self).0
    }
}

// SAFETY: Folio locks and references belong to no thread.
unsafe impl Send for Locked {}
// SAFETY: No method of a shared `Locked` changes the folio.
unsafe impl Sync for Locked {}

impl Drop for Locked {
    fn drop(&mut self) {
        // SAFETY: By the type invariant, lock and reference are ours to give up.
        unsafe {
            bindings::farfault_c_folio_unlock(self.0.as_ptr());
            bindings::farfault_c_folio_put(self.0.as_ptr());
        }
    }
}

/// A fresh folio of system memory, the destination of a migration from the device.
///
/// Its contents are **undefined**, and whatever they are the process will see: fill all of it
/// before the migration is committed.
pub(crate) struct SystemFolio {
    folio: Locked,
    order: u32,
}

impl SystemFolio {
    /// # Safety
    ///
    /// `folio` must be freshly allocated, of order `order`, and owned by the caller, who gives its
    /// only reference away.
    pub(super) unsafe fn from_raw(folio: NonNull<bindings::folio>, order: u32) -> Self {
        // SAFETY: A valid folio by the function's contract. Nobody else can hold its lock for long.
        unsafe { bindings::farfault_c_folio_lock(folio.as_ptr()) };
        // INVARIANT: It was locked just now, and the caller gave the reference.
        Self {
            folio: Locked(folio),
            order,
        }
    }

    /// Its first page.
    pub(super) fn pfn(&self) -> Pfn {
        // SAFETY: A valid folio by the invariant of `Locked`.
        Pfn(unsafe { bindings::farfault_c_folio_pfn(self.folio.0.as_ptr()) })
    }

    /// Where it is in physical memory; contiguous.
    pub(crate) fn phys(&self) -> u64 {
        self.pfn().phys()
    }

    /// 0 or [`PMD_ORDER`].
    pub(crate) fn order(&self) -> u32 {
        self.order
    }

    /// Gives lock and reference to the migration core.
    pub(super) fn into_raw(self) -> NonNull<bindings::folio> {
        self.folio.into_raw()
    }
}

/// A device-private folio just taken into use, the destination of a migration to the device.
///
/// Dropping it gives it back: `folio_free` of its pagemap is called.
pub(crate) struct DeviceFolio {
    folio: Locked,
    order: u32,
}

impl DeviceFolio {
    /// # Safety
    ///
    /// `folio` must be device-private, of order `order`, and locked with one reference, both of
    /// which the caller gives away.
    pub(super) unsafe fn from_raw(folio: NonNull<bindings::folio>, order: u32) -> Self {
        // INVARIANT: By the function's contract.
        Self {
            folio: Locked(folio),
            order,
        }
    }

    /// 0 or [`PMD_ORDER`].
    pub(crate) fn order(&self) -> u32 {
        self.order
    }

    /// Gives lock and reference to the migration core.
    pub(super) fn into_raw(self) -> NonNull<bindings::folio> {
        self.folio.into_raw()
    }
}
