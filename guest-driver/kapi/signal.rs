// SPDX-License-Identifier: GPL-2.0
//! Whether the current task is being killed.
//!
//! C header: `include/linux/sched/signal.h`.

use crate::bindings;

/// Whether a fatal signal waits for the current task: long work for it should end.
pub(crate) fn fatal_signal_pending() -> bool {
    // SAFETY: Looks at the current task only.
    unsafe { bindings::farfault_c_fatal_signal_pending() }
}
