// SPDX-License-Identifier: GPL-2.0
//! `make_device_exclusive()`: pages in system memory that only the device may use for a while.
//!
//! The same steps as in [`super::hmm`]: pages are looked up and taken from the CPU (mmap lock), then
//! [`Snapshot::lock`] takes the update lock, and fails if any of them was given back meanwhile. The
//! core asks for a page's folio lock, or such a recheck, while the device's page table is written;
//! it is the recheck here, so that many pages take one request to the device. A CPU that touches a
//! page gets it back after a call of the notifier.
//!
//! C header: `include/linux/rmap.h`.

use super::{
    hmm::{HmmPfn, Snapshot},
    mm::{same_mm, MmapLock},
    mmu_interval::{IntervalNotifier, IntervalOps},
};
use crate::bindings;
use core::{ops::Range, ptr};
use kernel::{error::from_err_ptr, page::PAGE_SIZE, prelude::*};

/// What became of a range.
pub(crate) struct Exclusive<'a, T: IntervalOps> {
    /// The pages that were taken have an entry, writable; those that were not wanted or not reached
    /// have [`HmmPfn::NONE`].
    pub(crate) snapshot: Snapshot<'a, T>,
    /// Why it stopped before the end of the range, if it did.
    pub(crate) stopped: Option<Error>,
}

/// Whether `EOPNOTSUPP` is what stopped it.
pub(crate) fn is_not_anonymous(error: Error) -> bool {
    error.to_errno() == -(bindings::EOPNOTSUPP as c_int)
}

impl<T: IntervalOps> IntervalNotifier<T> {
    /// Takes the pages of `range` for which `wanted` says yes, by their index, from the CPU. `lock`
    /// is of the notifier's address space. Pages in device memory come home first.
    ///
    /// A page that another device has, or that is not writable now, is faulted in, which counts as a
    /// change of the range: take care that this is not so, or the snapshot will be out of date.
    ///
    /// Fails with `EINVAL` where `range` or `lock` is wrong; `stopped` can be `EFAULT` (not mapped,
    /// or not for stores), `EOPNOTSUPP` (not anonymous), `EINTR`, `ENOMEM`.
    pub(crate) fn make_exclusive<'a>(
        &'a self,
        lock: &MmapLock<'_>,
        range: Range<usize>,
        wanted: impl Fn(usize) -> bool,
        pfns: &'a mut [HmmPfn],
    ) -> Result<Exclusive<'a, T>> {
        let len = range.end.checked_sub(range.start).ok_or(EINVAL)?;
        if len == 0 || (range.start | len) % PAGE_SIZE != 0 || !same_mm(lock.mm(), self.mm()) {
            return Err(EINVAL);
        }
        let pfns = pfns.get_mut(..len / PAGE_SIZE).ok_or(EINVAL)?;
        pfns.fill(HmmPfn::NONE);
        let sequence = self.read_begin();
        let mut stopped = None;
        for (index, pfn) in pfns.iter_mut().enumerate().filter(|(i, _)| wanted(*i)) {
            let mut folio = ptr::null_mut();
            // SAFETY: The address space has users and its mmap lock is held.
            let page = from_err_ptr(unsafe {
                bindings::make_device_exclusive(
                    lock.mm().as_raw(),
                    range.start + index * PAGE_SIZE,
                    self.as_raw().cast(),
                    &mut folio,
                )
            });
            match page {
                // SAFETY: It came with a lock and a reference on its folio, which are given up here.
                Ok(page) => unsafe {
                    *pfn = HmmPfn::writable(bindings::farfault_c_page_to_pfn(page));
                    bindings::farfault_c_folio_unlock(folio);
                    bindings::farfault_c_folio_put(folio);
                },
                Err(error) => {
                    stopped = Some(error);
                    break;
                }
            }
        }
        Ok(Exclusive {
            snapshot: Snapshot::new(self, sequence, pfns),
            stopped,
        })
    }
}
