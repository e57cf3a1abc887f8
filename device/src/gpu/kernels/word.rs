// SPDX-License-Identifier: MIT OR Apache-2.0
//! Kernels on one word: atomic add, and compare-and-swap (manual, section 5.4).

use super::{Access, Program, Progress, Step};
use farfault_protocol::{address::GpuVa, command::Status};

/// Checks a word's address.
pub(super) fn check(at: u64) -> Result<(), Status> {
    if at % 8 == 0 {
        Ok(())
    } else {
        Err(Status::Misaligned)
    }
}

/// Adds, as often as is left.
#[derive(Debug)]
pub(super) struct AtomicAdd {
    at: GpuVa,
    addend: u64,
    left: u64,
    value: u64,
}

impl AtomicAdd {
    pub(super) fn new(at: u64, addend: u64, times: u64) -> Self {
        Self {
            at: GpuVa::new(at),
            addend,
            left: times,
            value: 0,
        }
    }
}

impl Program for AtomicAdd {
    fn next(&mut self, last: Option<Progress>) -> Step {
        if let Some(last) = last {
            self.left = self.left.saturating_sub(last.amount);
            self.value = last.value;
        }
        match self.left {
            0 => Step::End(self.value),
            times => Step::Access(Access::AtomicAdd {
                at: self.at,
                addend: self.addend,
                times,
            }),
        }
    }
}

/// Replaces, once.
#[derive(Debug)]
pub(super) struct CompareAndSwap {
    at: GpuVa,
    expected: u64,
    desired: u64,
}

impl CompareAndSwap {
    pub(super) fn new(at: u64, expected: u64, desired: u64) -> Self {
        Self {
            at: GpuVa::new(at),
            expected,
            desired,
        }
    }
}

impl Program for CompareAndSwap {
    fn next(&mut self, last: Option<Progress>) -> Step {
        match last {
            Some(last) => Step::End(last.value),
            None => Step::Access(Access::CompareAndSwap {
                at: self.at,
                expected: self.expected,
                desired: self.desired,
            }),
        }
    }
}
