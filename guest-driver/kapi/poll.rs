// SPDX-License-Identifier: GPL-2.0
//! Waiting for a short while without sleeping, where what is waited for comes sooner than the way to
//! sleep and back takes.
//!
//! C headers: `include/linux/sched/clock.h`, `include/linux/sched.h`.

use crate::bindings;
use kernel::{processor::cpu_relax, time::Delta};

/// Asks `done` again and again, for `limit` or until somebody else wants the CPU. Returns whether it
/// said yes.
pub(crate) fn poll(limit: Delta, mut done: impl FnMut() -> bool) -> bool {
    // SAFETY: Reads a clock.
    let now = || unsafe { bindings::farfault_c_local_clock() };
    let end = now() + limit.as_nanos().unsigned_abs();
    loop {
        if done() {
            return true;
        }
        // The clock may jump a little between CPUs, which does no harm.
        // SAFETY: Looks at a flag of the current task.
        if now() >= end || unsafe { bindings::farfault_c_need_resched() } {
            return false;
        }
        cpu_relax();
    }
}
