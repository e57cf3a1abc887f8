// SPDX-License-Identifier: MIT OR Apache-2.0
//! From what a wave wants to work with its translations, or to a fault (manual, chapters 5 and 7).
//!
//! It knows nothing of turns, nor of who parks.

use super::{
    flight::Held,
    kernels::Access,
    mmu::{Mmu, Space, Translation},
    settings::{WORK_BYTES, WORK_STEPS},
    vram::Vram,
    work::{Operation, Window},
};
use farfault_protocol::{
    address::{GpuVa, PAGE_SIZE},
    event::{self, FaultCause},
};

/// An access whose addresses were translated.
pub(crate) struct Issue {
    pub(crate) operation: Operation,
    pub(crate) held: [Option<Held>; 2],
    pub(crate) bytes: u64,
}

/// An access whose addresses were not.
pub(crate) struct Denied {
    pub(crate) va: GpuVa,
    pub(crate) access: event::Access,
    pub(crate) cause: FaultCause,
}

/// Translates what a wave wants, or the first part of it.
pub(crate) fn issue(
    mmu: &mut Mmu,
    vram: &Vram,
    space: Space,
    access: Access,
) -> Result<Issue, Denied> {
    use event::Access::{Atomic, Read, Write};
    let mut range = |va, length: u64, access| {
        let mut runs = Vec::new();
        let length = length.min(WORK_BYTES);
        mmu.translate_range(vram, space, va, length, access, &mut runs)
            .map(|(bytes, span)| (runs, bytes, span))
            .map_err(|cause| Denied { va, access, cause })
    };
    let one = |start, span, access| {
        let held = Held {
            start,
            span,
            access,
        };
        [Some(held), None]
    };
    let issue = match access {
        Access::Fill {
            to: start,
            length,
            pattern,
        } => {
            let (to, bytes, span) = range(start, length, Write)?;
            Issue {
                operation: Operation::Fill { to, pattern },
                held: one(start, span, Write),
                bytes,
            }
        }
        Access::Sum {
            from: start,
            length,
        } => {
            let (from, bytes, span) = range(start, length, Read)?;
            Issue {
                operation: Operation::Sum { from },
                held: one(start, span, Read),
                bytes,
            }
        }
        Access::Add {
            to: start,
            length,
            addend,
        } => {
            let (to, bytes, span) = range(start, length, Write)?;
            Issue {
                operation: Operation::Add { to, addend },
                held: one(start, span, Write),
                bytes,
            }
        }
        Access::Copy {
            to: destination,
            from: source,
            length,
        } => {
            let (from, readable, of_source) = range(source, length, Read)?;
            // The runs of `from` may be longer then; a copy ends with its destination.
            let (to, bytes, of_destination) = range(destination, readable, Write)?;
            let [first, _] = one(destination, of_destination, Write);
            let [second, _] = one(source, of_source, Read);
            Issue {
                operation: Operation::Copy { to, from },
                held: [first, second],
                bytes,
            }
        }
        Access::AtomicAdd { at, addend, times } => {
            let Translation { target, span } = leaf(mmu, vram, space, at, Atomic)?;
            Issue {
                operation: Operation::AtomicAdd {
                    at: target.at,
                    addend,
                    times: times.min(WORK_STEPS),
                },
                held: one(at, span, Atomic),
                bytes: 8,
            }
        }
        Access::CompareAndSwap {
            at,
            expected,
            desired,
        } => {
            let Translation { target, span } = leaf(mmu, vram, space, at, Atomic)?;
            Issue {
                operation: Operation::CompareAndSwap {
                    at: target.at,
                    expected,
                    desired,
                },
                held: one(at, span, Atomic),
                bytes: 8,
            }
        }
        Access::Chase { start, steps } => {
            // From the page's begin, as pointers lead backwards too.
            let page = start.align_down(PAGE_SIZE);
            let Translation { target, span } = leaf(mmu, vram, space, page, Read)?;
            Issue {
                operation: Operation::Chase {
                    start,
                    page: Window {
                        start: page,
                        target,
                    },
                    steps: steps.min(WORK_STEPS),
                },
                held: one(start, span, Read),
                bytes: 8,
            }
        }
    };
    Ok(issue)
}

fn leaf(
    mmu: &mut Mmu,
    vram: &Vram,
    space: Space,
    va: GpuVa,
    access: event::Access,
) -> Result<Translation, Denied> {
    mmu.translate(vram, space, va, access)
        .map_err(|cause| Denied { va, access, cause })
}
