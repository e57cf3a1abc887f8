// SPDX-License-Identifier: GPL-2.0
//! A workqueue of one's own, which `kernel::workqueue` lacks. Items are made and run as there.
//!
//! C header: `include/linux/workqueue.h`.

use crate::bindings;
use core::{ops::Deref, ptr::NonNull};
use kernel::{prelude::*, workqueue::Queue};

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
