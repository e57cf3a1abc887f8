// SPDX-License-Identifier: GPL-2.0
//! A workqueue of one's own, and cancelling and flushing of work items, which
//! `kernel::workqueue` lacks. Items are made and run as there.
//!
//! C header: `include/linux/workqueue.h`.

use crate::bindings;
use core::{ops::Deref, ptr::NonNull};
use kernel::{
    container_of,
    prelude::*,
    sync::Arc,
    workqueue::{HasDelayedWork, HasWork, Queue, Work, WorkItem},
};

/// A workqueue that makes progress when memory is short. Dereferences to [`Queue`].
///
/// Dropping it waits for all that is queued, so no item of it may be the one to drop it; delayed
/// items must be cancelled before.
///
/// # Invariants
///
/// A valid workqueue that this value owns.
pub(crate) struct WorkQueue(NonNull<bindings::workqueue_struct>);

// SAFETY: Workqueues may be used and destroyed by any thread.
unsafe impl Send for WorkQueue {}
// SAFETY: As above.
unsafe impl Sync for WorkQueue {}

impl WorkQueue {
    /// Unbound, of high priority, with a rescuer.
    pub(crate) fn new(name: &CStr) -> Result<Self> {
        let flags = bindings::wq_flags_WQ_UNBOUND
            | bindings::wq_flags_WQ_HIGHPRI
            | bindings::wq_flags_WQ_MEM_RECLAIM;
        // SAFETY: The format takes one string; the name is copied.
        let queue = unsafe {
            bindings::alloc_workqueue_noprof(c"%s".as_char_ptr(), flags, 0, name.as_char_ptr())
        };
        // INVARIANT: Just allocated.
        NonNull::new(queue).map(Self).ok_or(ENOMEM)
    }

    /// Waits for all that was queued before.
    pub(crate) fn flush(&self) {
        // SAFETY: A valid workqueue.
        unsafe { bindings::__flush_workqueue(self.0.as_ptr()) };
    }
}

impl Deref for WorkQueue {
    type Target = Queue;

    fn deref(&self) -> &Queue {
        // SAFETY: Valid as long as `self`.
        unsafe { Queue::from_raw(self.0.as_ptr()) }
    }
}

impl Drop for WorkQueue {
    fn drop(&mut self) {
        // SAFETY: Ours. Runs what is queued, then frees.
        unsafe { bindings::destroy_workqueue(self.0.as_ptr()) };
    }
}

/// The C work item in `item`.
fn raw_work<T, const ID: u64>(item: &Arc<T>) -> *mut bindings::work_struct
where
    T: WorkItem<ID, Pointer = Arc<T>> + HasWork<T, ID>,
{
    // SAFETY: A valid value, and the field of one.
    unsafe { Work::raw_get(T::raw_get_work(Arc::as_ptr(item).cast_mut())) }
}

/// The C delayed work item in `item`.
fn raw_delayed_work<T, const ID: u64>(item: &Arc<T>) -> *mut bindings::delayed_work
where
    T: WorkItem<ID, Pointer = Arc<T>> + HasDelayedWork<T, ID>,
{
    // SAFETY: The work of a `HasDelayedWork` is that of a `delayed_work`.
    unsafe { container_of!(raw_work(item), bindings::delayed_work, work) }
}

/// Takes back the reference that a queue had on `item`.
///
/// # Safety
///
/// The item was queued, and has just been cancelled.
unsafe fn release<T>(item: &Arc<T>) {
    // SAFETY: Queueing has made a reference raw, which by the function's contract nobody will take.
    drop(unsafe { Arc::from_raw(Arc::as_ptr(item)) });
}

/// Sees to it that `item` is neither queued nor running. `true`: it was queued and will not run.
/// Never from the item itself.
pub(crate) fn cancel_sync<T, const ID: u64>(item: &Arc<T>) -> bool
where
    T: WorkItem<ID, Pointer = Arc<T>> + HasWork<T, ID>,
{
    // SAFETY: A valid work item.
    let cancelled = unsafe { bindings::cancel_work_sync(raw_work(item)) };
    if cancelled {
        // SAFETY: Cancelled just now.
        unsafe { release(item) };
    }
    cancelled
}

/// [`cancel_sync`] for an item that may be waiting for its time.
pub(crate) fn cancel_delayed_sync<T, const ID: u64>(item: &Arc<T>) -> bool
where
    T: WorkItem<ID, Pointer = Arc<T>> + HasDelayedWork<T, ID>,
{
    // SAFETY: A valid delayed work item.
    let cancelled = unsafe { bindings::cancel_delayed_work_sync(raw_delayed_work(item)) };
    if cancelled {
        // SAFETY: Cancelled just now.
        unsafe { release(item) };
    }
    cancelled
}

/// Waits until `item` has run as often as it was queued. `false`: it was idle. Never from the item
/// itself.
pub(crate) fn flush_work<T, const ID: u64>(item: &Arc<T>) -> bool
where
    T: WorkItem<ID, Pointer = Arc<T>> + HasWork<T, ID>,
{
    // SAFETY: A valid work item.
    unsafe { bindings::flush_work(raw_work(item)) }
}
