// SPDX-License-Identifier: GPL-2.0
//! The driver's trace events (`events/farfault/` in tracefs), declared in `trace.h`.
//!
//! An event that is not enabled costs a function call. Callable from any context.

use super::mmu_interval::Event;
use crate::bindings;

/// Where pages go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum Direction {
    /// To the device's memory.
    ToDevice = 0,
    /// To system memory.
    ToSystem = 1,
}

/// Why pages move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum Cause {
    /// The GPU touched them.
    GpuFault = 0,
    /// A CPU touched them.
    CpuFault = 1,
    /// A program asked for it.
    Request = 2,
    /// Somebody else needs the room.
    Evict = 3,
    /// The device goes.
    Unbind = 4,
}

/// A fault of the GPU was served: `result` is zero or a negative errno, `pages` were mapped.
pub(crate) fn fault(device: u32, context: u32, address: u64, access: u32, result: i32, pages: u64) {
    // SAFETY: Takes numbers; trace events may fire anywhere.
    unsafe {
        bindings::farfault_c_trace_fault(device, context, address, access, result, pages);
    }
}

/// `moved` of `nr` pages of a range went to where they should.
#[allow(clippy::too_many_arguments, reason = "the fields of the event")]
pub(crate) fn migrate(
    device: u32,
    context: u32,
    start: u64,
    end: u64,
    direction: Direction,
    cause: Cause,
    moved: u64,
    nr: u64,
) {
    // SAFETY: Takes numbers; trace events may fire anywhere.
    unsafe {
        bindings::farfault_c_trace_migrate(
            device,
            context,
            start,
            end,
            direction as u32,
            cause as u32,
            moved,
            nr,
        );
    }
}

/// The MMU notifier took a range from the GPU; `blocked`: it had to wait for the device.
pub(crate) fn invalidate(
    device: u32,
    context: u32,
    start: u64,
    end: u64,
    event: Event,
    blocked: bool,
) {
    // SAFETY: Takes numbers; trace events may fire anywhere.
    unsafe {
        bindings::farfault_c_trace_invalidate(device, context, start, end, event as u32, blocked);
    }
}
