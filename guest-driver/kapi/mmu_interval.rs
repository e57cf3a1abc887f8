// SPDX-License-Identifier: GPL-2.0
//! `mmu_interval_notifier`: being told before the CPU's page tables change.
//!
//! What C leaves to the caller is in the type here: the "user lock" is a mutex in the notifier
//! around [`IntervalOps::State`] (the shadow page tables). An invalidation takes it, marks the
//! sequence as changed, and only then calls the driver; a reader gets at pages it has looked up
//! only by the lock with the sequence rechecked ([`super::hmm`]). So a shadow entry for a page
//! that is on its way out cannot be written.
//!
//! Locks: the update lock nests inside the mmap lock and inside memory reclaim (an invalidation may
//! run there), so nothing that is done under it may allocate with reclaim or take the mmap lock.
//!
//! The events of [`super::exclusive`] that a notifier's own driver causes do not reach it.
//!
//! Not implemented: two-pass invalidation (`invalidate_start`).
//!
//! C header: `include/linux/mmu_notifier.h`.

use crate::bindings;
use core::{
    marker::PhantomData,
    ops::{Deref, DerefMut, Range},
};
use kernel::{
    container_of,
    error::to_result,
    mm::{Mm, MmWithUser},
    new_mutex,
    prelude::*,
    sync::{lock::mutex::MutexBackend, Mutex},
    types::Opaque,
};

/// What a driver does about changes.
pub(crate) trait IntervalOps: Sized + Send + Sync + 'static {
    /// What the update lock protects.
    type State: Send + Unpin;

    /// On return the device can no longer reach the pages of the range.
    ///
    /// May run in memory reclaim. It may wait for the device, with a time limit, also where
    /// [`Invalidation::blockable`] says no; for nothing else.
    fn invalidate(&self, state: &mut Self::State, invalidation: &Invalidation<'_>);
}

/// Why the page tables change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum Event {
    /// The memory is unmapped or moved.
    Unmap = 0,
    /// Entries are cleared or replaced.
    Clear = 1,
    /// The permissions of the VMA change.
    ProtectionVma = 2,
    /// The permissions of single pages change.
    ProtectionPage = 3,
    /// Soft-dirty accounting.
    SoftDirty = 4,
    /// The address space ends.
    Release = 5,
    /// Pages migrate to or from a device.
    Migrate = 6,
    /// A page is given to a device alone.
    Exclusive = 7,
}

impl Event {
    /// An event that this kernel series does not have is treated as the most drastic one.
    fn from_raw(raw: bindings::mmu_notifier_event) -> Self {
        match raw {
            bindings::mmu_notifier_event_MMU_NOTIFY_CLEAR => Self::Clear,
            bindings::mmu_notifier_event_MMU_NOTIFY_PROTECTION_VMA => Self::ProtectionVma,
            bindings::mmu_notifier_event_MMU_NOTIFY_PROTECTION_PAGE => Self::ProtectionPage,
            bindings::mmu_notifier_event_MMU_NOTIFY_SOFT_DIRTY => Self::SoftDirty,
            bindings::mmu_notifier_event_MMU_NOTIFY_RELEASE => Self::Release,
            bindings::mmu_notifier_event_MMU_NOTIFY_MIGRATE => Self::Migrate,
            bindings::mmu_notifier_event_MMU_NOTIFY_EXCLUSIVE => Self::Exclusive,
            _ => Self::Unmap,
        }
    }
}

/// A change that is about to happen.
pub(crate) struct Invalidation<'a> {
    range: &'a bindings::mmu_notifier_range,
}

impl Invalidation<'_> {
    /// The addresses, which may reach beyond what the notifier watches.
    pub(crate) fn range(&self) -> Range<usize> {
        self.range.start..self.range.end
    }

    /// Why.
    pub(crate) fn event(&self) -> Event {
        Event::from_raw(self.range.event)
    }

    /// Whether waiting is welcome. The OOM reaper's calls are not blockable.
    pub(crate) fn blockable(&self) -> bool {
        // SAFETY: A valid range.
        unsafe { bindings::farfault_c_mmu_notifier_range_blockable(self.range) }
    }
}

/// A registered notifier and the driver's data that belongs to it (it dereferences to the data).
///
/// Dropping it waits for calls that run. So it must not be dropped by one, nor while a lock is held
/// that one takes.
///
/// # Invariants
///
/// `sub` is registered with `OPS` of this type, from when the value exists until it is dropped.
#[pin_data(PinnedDrop)]
pub(crate) struct IntervalNotifier<T: IntervalOps> {
    #[pin]
    data: T,
    #[pin]
    state: Mutex<T::State>,
    #[pin]
    sub: Opaque<bindings::mmu_interval_notifier>,
}

// SAFETY: A notifier may be removed from any thread.
unsafe impl<T: IntervalOps> Send for IntervalNotifier<T> {}
// SAFETY: Shared methods are thread safe, `T` is `Sync`, and the state is behind a mutex.
unsafe impl<T: IntervalOps> Sync for IntervalNotifier<T> {}

impl<T: IntervalOps> IntervalNotifier<T> {
    const OPS: bindings::mmu_interval_notifier_ops = bindings::mmu_interval_notifier_ops {
        invalidate: Some(Self::invalidate_callback),
        invalidate_start: None,
        invalidate_finish: None,
    };

    /// Watches `range` of `mm`; `0..usize::MAX` is all of it.
    ///
    /// The core may take the mmap lock for writing: the caller must not hold it.
    pub(crate) fn new<'a>(
        mm: &'a MmWithUser,
        range: Range<usize>,
        data: impl PinInit<T, Error> + 'a,
        state: T::State,
    ) -> impl PinInit<Self, Error> + 'a
    where
        T: 'a,
        T::State: 'a,
    {
        try_pin_init!(Self {
            data <- data,
            state <- new_mutex!(state),
            // Last: calls may come as soon as the notifier is in.
            sub <- Opaque::try_ffi_init(move |slot: *mut bindings::mmu_interval_notifier| {
                let len = range.end.checked_sub(range.start).ok_or(EINVAL)?;
                // SAFETY: `slot` is pinned until the removal in drop; `mm` has users; all that a
                // call looks at is initialised.
                to_result(unsafe {
                    bindings::mmu_interval_notifier_insert(
                        slot,
                        mm.as_raw(),
                        range.start,
                        len,
                        &Self::OPS,
                    )
                })
            }),
        })
    }

    /// The address space, which the core has `mmgrab`bed for the notifier.
    pub(crate) fn mm(&self) -> &Mm {
        // SAFETY: Set when it was inserted, and never changed.
        unsafe { Mm::from_raw((*self.sub.get()).mm) }
    }

    /// Takes the update lock.
    pub(crate) fn lock(&self) -> Guard<'_, T> {
        Guard(self.state.lock())
    }

    /// Takes the update lock if nobody has it.
    pub(crate) fn try_lock(&self) -> Option<Guard<'_, T>> {
        self.state.try_lock().map(Guard)
    }

    pub(super) fn as_raw(&self) -> *mut bindings::mmu_interval_notifier {
        self.sub.get()
    }

    /// Begins a look at the page tables. Waits while an invalidation runs.
    pub(super) fn read_begin(&self) -> Sequence<'_> {
        Sequence {
            // SAFETY: Registered by the type invariant.
            number: unsafe { bindings::mmu_interval_read_begin(self.sub.get()) },
            _notifier: PhantomData,
        }
    }

    /// Takes the update lock, unless something changed since `sequence` began.
    pub(super) fn lock_unchanged(&self, sequence: Sequence<'_>) -> Option<Guard<'_, T>> {
        let guard = self.lock();
        // SAFETY: Registered by the type invariant; the update lock is held.
        let retry = unsafe {
            bindings::farfault_c_mmu_interval_read_retry(self.sub.get(), sequence.number)
        };
        (!retry).then_some(guard)
    }

    /// # Safety
    ///
    /// Only for the core: `sub` is the field of a live `Self`, `range` is valid for the call.
    unsafe extern "C" fn invalidate_callback(
        sub: *mut bindings::mmu_interval_notifier,
        range: *const bindings::mmu_notifier_range,
        sequence: usize,
    ) -> bool {
        // SAFETY: By the function's contract; the removal in drop waits for this call.
        let this = unsafe { &*container_of!(Opaque::cast_from(sub).cast_mut(), Self, sub) };
        // SAFETY: By the function's contract.
        let range = unsafe { &*range };
        let invalidation = Invalidation { range };
        // What this notifier's driver takes for its device is about to be mapped by it, and would
        // otherwise find itself interrupted by itself for ever.
        if invalidation.event() == Event::Exclusive && range.owner == sub.cast() {
            return true;
        }
        let guard = if invalidation.blockable() {
            Some(this.lock())
        } else {
            this.try_lock()
        };
        let Some(mut guard) = guard else {
            return false;
        };
        // SAFETY: Called by the core for `sub` with this sequence, and the update lock is held.
        unsafe { bindings::farfault_c_mmu_interval_set_seq(sub, sequence) };
        this.data.invalidate(&mut guard, &invalidation);
        true
    }
}

impl<T: IntervalOps> Deref for IntervalNotifier<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.data
    }
}

#[pinned_drop]
impl<T: IntervalOps> PinnedDrop for IntervalNotifier<T> {
    fn drop(self: Pin<&mut Self>) {
        // SAFETY: Registered by the type invariant. Waits for running calls.
        unsafe { bindings::mmu_interval_notifier_remove(self.sub.get()) };
    }
}

/// When a look at the page tables of a notifier's range began.
pub(super) struct Sequence<'a> {
    pub(super) number: usize,
    _notifier: PhantomData<&'a ()>,
}

/// The update lock, held. No invalidation gets past it.
pub(crate) struct Guard<'a, T: IntervalOps>(kernel::sync::lock::Guard<'a, T::State, MutexBackend>);

impl<T: IntervalOps> Deref for Guard<'_, T> {
    type Target = T::State;

    fn deref(&self) -> &T::State {
        &self.0
    }
}

impl<T: IntervalOps> DerefMut for Guard<'_, T> {
    fn deref_mut(&mut self) -> &mut T::State {
        &mut self.0
    }
}
