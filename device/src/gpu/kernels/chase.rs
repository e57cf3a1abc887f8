// SPDX-License-Identifier: MIT OR Apache-2.0
//! The pointer chase (manual, section 5.4): each word read is the next address. Its three lowest
//! bits are ignored, as words are aligned.

use super::{Access, Program, Progress, Step};
use farfault_protocol::address::GpuVa;

#[derive(Debug)]
pub(super) struct Chase {
    next: GpuVa,
    left: u64,
    value: u64,
}

impl Chase {
    pub(super) fn new(start: u64, steps: u64) -> Self {
        Self {
            next: GpuVa::new(start),
            left: steps,
            value: 0,
        }
    }
}

impl Program for Chase {
    fn next(&mut self, last: Option<Progress>) -> Step {
        if let Some(last) = last {
            self.left = self.left.saturating_sub(last.amount);
            self.value = last.value;
            self.next = GpuVa::new(last.value).align_down(8);
        }
        match self.left {
            0 => Step::End(self.value),
            steps => Step::Access(Access::Chase {
                start: self.next,
                steps,
            }),
        }
    }
}
