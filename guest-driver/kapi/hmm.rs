// SPDX-License-Identifier: GPL-2.0
//! `hmm_range_fault()`: which pages a process's addresses mean, faulted in if wanted.
//!
//! Three steps, each the only way to the next: [`IntervalNotifier::range_fault`] looks at the page
//! tables (mmap lock), [`Snapshot::lock`] takes the update lock and fails if they changed since,
//! [`Valid`] has the pages, which stay what they are until it is dropped. The caller bounds the
//! number of its retries.
//!
//! `hmm_range_fault()` of 7.2 reports frames from the start of a device-private PMD entry where it
//! enters the PMD in its middle. All frames of an entry of that order are put right here, which
//! changes nothing where they are right.
//!
//! C header: `include/linux/hmm.h`.

use super::{
    folio::{Pfn, PMD_ORDER, PMD_PAGES},
    mm::{same_mm, MmapLock},
    mmu_interval::{Guard, IntervalNotifier, IntervalOps, Sequence},
    pagemap::Owner,
};
use crate::bindings;
use core::ops::Range;
use kernel::{
    error::to_result,
    page::{PAGE_SHIFT, PAGE_SIZE},
    prelude::*,
};

const VALID: usize = bindings::hmm_pfn_flags_HMM_PFN_VALID;
const WRITE: usize = bindings::hmm_pfn_flags_HMM_PFN_WRITE;
const ERROR: usize = bindings::hmm_pfn_flags_HMM_PFN_ERROR;
const ORDER_SHIFT: usize = bindings::hmm_pfn_flags_HMM_PFN_ORDER_SHIFT;
const FRAME: usize = (1 << ORDER_SHIFT) - 1;

/// What the CPU's page tables say about one page; before, what is wanted of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(transparent)]
pub(crate) struct HmmPfn(usize);

impl HmmPfn {
    /// A page that may be written.
    pub(super) fn writable(frame: usize) -> Self {
        Self(frame | VALID | WRITE)
    }

    /// Nothing is there; nothing is wanted.
    pub(crate) const NONE: Self = Self(0);

    /// What is wanted of a page: fault the page in for loads, or for stores too.
    pub(crate) fn request(fault: bool, write: bool) -> Self {
        match (fault, write) {
            (_, true) => Self(VALID | WRITE),
            (true, false) => Self(VALID),
            (false, false) => Self(0),
        }
    }

    /// There is a page, which may be read.
    pub(crate) fn is_valid(self) -> bool {
        self.0 & VALID != 0
    }

    /// The page may be written.
    pub(crate) fn is_writable(self) -> bool {
        self.0 & (VALID | WRITE) == VALID | WRITE
    }

    /// There never will be a page: no access, poisoned, or another's device memory.
    pub(crate) fn is_error(self) -> bool {
        self.0 & ERROR != 0
    }

    /// The order of what the CPU maps here as a whole, aligned, maybe beyond the snapshot.
    pub(crate) fn order(self) -> u32 {
        ((self.0 >> ORDER_SHIFT) & 0x1f) as u32
    }

    /// The zero page, which all processes share until they write.
    pub(crate) fn is_zero_page(self) -> bool {
        // SAFETY: It only compares.
        self.is_valid() && unsafe { bindings::farfault_c_is_zero_pfn(self.0 & FRAME) }
    }

    /// The page: of the pagemap if its `lookup` knows it, else in system memory.
    pub(crate) fn pfn(self) -> Option<Pfn> {
        self.is_valid().then_some(Pfn(self.0 & FRAME))
    }

    /// The entry with its frame where `address` is within what one PMD entry maps.
    fn aligned_to(self, address: usize) -> Self {
        if !self.is_valid() || self.order() != PMD_ORDER {
            return self;
        }
        let within = PMD_PAGES - 1;
        Self((self.0 & !within) | ((address >> PAGE_SHIFT) & within))
    }
}

impl<T: IntervalOps> IntervalNotifier<T> {
    /// Looks at the pages of `range`, one try; `pfns` has what is wanted of each
    /// ([`HmmPfn::request`]). `lock` is of the notifier's address space; device
    /// pages of `owner` are left where they are, those of others faulted home if a page is wanted.
    ///
    /// Fails with `EBUSY` (it changed meanwhile: try again, with a bound), `EFAULT` or `EPERM` (not
    /// mapped so), `ENOMEM`, `EINVAL` (`range` is empty, not page aligned or longer than `pfns`, or
    /// `lock` is of another address space).
    ///
    /// Page faults are served, so no lock may be held that an invalidation takes.
    pub(crate) fn range_fault<'a>(
        &'a self,
        lock: &MmapLock<'_>,
        range: Range<usize>,
        owner: Owner,
        pfns: &'a mut [HmmPfn],
    ) -> Result<Snapshot<'a, T>> {
        let len = range.end.checked_sub(range.start).ok_or(EINVAL)?;
        if len == 0 || (range.start | len) % PAGE_SIZE != 0 || !same_mm(lock.mm(), self.mm()) {
            return Err(EINVAL);
        }
        let pfns = pfns.get_mut(..len >> PAGE_SHIFT).ok_or(EINVAL)?;
        let sequence = self.read_begin();
        let mut hmm_range = bindings::hmm_range {
            notifier: self.as_raw(),
            notifier_seq: sequence.number,
            start: range.start,
            end: range.end,
            hmm_pfns: pfns.as_mut_ptr().cast(),
            default_flags: 0,
            pfn_flags_mask: VALID | WRITE,
            dev_private_owner: owner.as_ptr(),
        };
        // SAFETY: The notifier is registered, its mmap lock held, and the array as long as the range.
        to_result(unsafe { bindings::hmm_range_fault(&mut hmm_range) })?;
        for (i, pfn) in pfns.iter_mut().enumerate() {
            *pfn = pfn.aligned_to(range.start + i * PAGE_SIZE);
        }
        Ok(Snapshot::new(self, sequence, pfns))
    }
}

/// What the page tables said a moment ago.
pub(crate) struct Snapshot<'a, T: IntervalOps> {
    notifier: &'a IntervalNotifier<T>,
    sequence: Sequence<'a>,
    pfns: &'a [HmmPfn],
}

impl<'a, T: IntervalOps> Snapshot<'a, T> {
    /// `pfns` was filled after `sequence` began.
    pub(super) fn new(
        notifier: &'a IntervalNotifier<T>,
        sequence: Sequence<'a>,
        pfns: &'a [HmmPfn],
    ) -> Self {
        Self {
            notifier,
            sequence,
            pfns,
        }
    }

    /// One entry for each page, which may be out of date.
    pub(crate) fn pfns(&self) -> &[HmmPfn] {
        self.pfns
    }

    /// Takes the update lock. `None`: something changed, look again.
    pub(crate) fn lock(self) -> Option<Valid<'a, T>> {
        Some(Valid {
            guard: self.notifier.lock_unchanged(self.sequence)?,
            pfns: self.pfns,
        })
    }
}

/// What the page tables say, and will say until this is dropped: the update lock is held.
///
/// # Invariants
///
/// No invalidation of the range has passed since `pfns` was filled, and none passes `guard`.
pub(crate) struct Valid<'a, T: IntervalOps> {
    guard: Guard<'a, T>,
    pfns: &'a [HmmPfn],
}

impl<T: IntervalOps> Valid<'_, T> {
    /// One entry for each page.
    pub(crate) fn pfns(&self) -> &[HmmPfn] {
        self.pfns
    }

    /// What the update lock protects.
    pub(crate) fn state(&mut self) -> &mut T::State {
        &mut self.guard
    }

    /// Both.
    pub(crate) fn parts(&mut self) -> (&[HmmPfn], &mut T::State) {
        (self.pfns, &mut self.guard)
    }

    /// Whether KSM has merged the page with others.
    pub(crate) fn is_merged(&self, index: usize) -> bool {
        let entry = self.pfns.get(index).filter(|entry| entry.is_valid());
        let Some(entry) = entry.filter(|entry| !entry.is_error()) else {
            return false;
        };
        // SAFETY: By the type invariant the CPU's page tables still map the page, which keeps its folio.
        unsafe {
            let page = bindings::farfault_c_pfn_to_page(entry.0 & FRAME);
            bindings::farfault_c_folio_test_ksm(bindings::farfault_c_page_folio(page))
        }
    }

    /// Tells the core that the device may write the page. Due for each page that is mapped
    /// writable: the CPU's entry can be writable and clean, and a clean page may be dropped.
    /// Entries that are not writable are left alone.
    pub(crate) fn mark_dirty(&self, index: usize) {
        let Some(entry) = self.pfns.get(index).filter(|entry| entry.is_writable()) else {
            return;
        };
        // SAFETY: By the type invariant the CPU's page tables still map the page, which keeps its
        // folio, and in the page cache if it is there: whoever unmaps it waits for our lock.
        unsafe {
            let page = bindings::farfault_c_pfn_to_page(entry.0 & FRAME);
            bindings::farfault_c_folio_mark_dirty(bindings::farfault_c_page_folio(page));
        }
    }
}
