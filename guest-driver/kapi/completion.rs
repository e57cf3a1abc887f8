// SPDX-License-Identifier: GPL-2.0
//! Completions that can be waited for with a time limit, which `kernel::sync::Completion` lacks.
//!
//! C header: `include/linux/completion.h`.

use crate::bindings;
use kernel::{
    prelude::*,
    time::{Delta, Jiffies},
    types::Opaque,
};

/// Something that happens once; any number of tasks wait for it.
#[pin_data]
pub(crate) struct Completion {
    #[pin]
    inner: Opaque<bindings::completion>,
}

// SAFETY: A completion may be used from any task.
unsafe impl Send for Completion {}
// SAFETY: A completion has a lock of its own.
unsafe impl Sync for Completion {}

impl Completion {
    /// A completion that is not done.
    pub(crate) fn new() -> impl PinInit<Self> {
        pin_init!(Self {
            inner <- Opaque::ffi_init(|slot: *mut bindings::completion| {
                // SAFETY: `slot` is a valid place for a completion.
                unsafe { bindings::init_completion(slot) };
            }),
        })
    }

    /// Says that it happened, to all who wait now or later. Callable from any context.
    pub(crate) fn complete_all(&self) {
        // SAFETY: A valid completion.
        unsafe { bindings::complete_all(self.inner.get()) };
    }

    /// Makes it not done again. Nobody may be waiting, or about to complete it.
    pub(crate) fn reinit(&self) {
        // SAFETY: A valid completion. Who waits or completes at once gets a wrong answer, no more.
        unsafe { bindings::farfault_c_reinit_completion(self.inner.get()) };
    }

    /// Waits, whatever signals come. Fails with `ETIMEDOUT`.
    pub(crate) fn wait_timeout(&self, limit: Delta) -> Result {
        // SAFETY: A valid completion.
        let left =
            unsafe { bindings::wait_for_completion_timeout(self.inner.get(), jiffies_ceil(limit)) };
        if left == 0 {
            Err(ETIMEDOUT)
        } else {
            Ok(())
        }
    }
}

/// `limit` in jiffies, rounded up, so that a positive limit never becomes none at all.
fn jiffies_ceil(limit: Delta) -> Jiffies {
    let microseconds = u64::try_from(limit.as_micros_ceil()).unwrap_or(0);
    // `msecs_to_jiffies()` rounds up, and takes what is too long as for ever.
    let milliseconds = u32::try_from(microseconds.div_ceil(1000)).unwrap_or(u32::MAX);
    kernel::time::msecs_to_jiffies(milliseconds)
}
