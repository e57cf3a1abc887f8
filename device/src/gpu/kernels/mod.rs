// SPDX-License-Identifier: MIT OR Apache-2.0
//! The built-in kernels: what a wave does (manual, section 5.4).
//!
//! A wave is a [`Program`]: told what came of its last access, it says what the next one is. It
//! knows only virtual addresses; whether an access is done in one go, in pieces, or after a fault is
//! the engine's business.

mod chase;
mod range;
mod word;

use farfault_protocol::{
    address::GpuVa,
    command::Status,
    event,
    submit::{KERNEL_ARGUMENTS, Kernel},
};

/// What a wave does, one access at a time.
pub(crate) trait Program: Send {
    /// The next step. `last` is `None` at first, then what came of the access returned before.
    fn next(&mut self, last: Option<Progress>) -> Step;
}

/// What a wave wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// An access. The engine may do less of it than asked for, but something.
    Access(Access),
    /// Nothing more. The value goes into the job's result.
    End(u64),
}

/// What came of an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Progress {
    /// Bytes, additions or steps that were done.
    pub(crate) amount: u64,
    /// The sum of the words, or the word read last.
    pub(crate) value: u64,
}

/// An access to virtual memory. Ranges are whole words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    Fill {
        to: GpuVa,
        length: u64,
        pattern: u64,
    },
    Copy {
        to: GpuVa,
        from: GpuVa,
        length: u64,
    },
    Sum {
        from: GpuVa,
        length: u64,
    },
    Add {
        to: GpuVa,
        length: u64,
        addend: u64,
    },
    AtomicAdd {
        at: GpuVa,
        addend: u64,
        times: u64,
    },
    CompareAndSwap {
        at: GpuVa,
        expected: u64,
        desired: u64,
    },
    Chase {
        start: GpuVa,
        steps: u64,
    },
}

/// How the values of a job's waves become its result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Combine {
    /// The wrapping sum of all.
    Sum,
    /// The value of the wave with the highest index.
    Last,
}

/// A kernel with its arguments, checked, ready to be cut into waves.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plan {
    kernel: Kernel,
    arguments: [u64; KERNEL_ARGUMENTS],
    waves: u32,
}

impl Plan {
    /// Checks the arguments of a launch.
    pub(crate) fn new(
        kernel: Kernel,
        arguments: [u64; KERNEL_ARGUMENTS],
        waves: u32,
    ) -> Result<Self, Status> {
        let used = match kernel {
            Kernel::Fill | Kernel::Copy | Kernel::Add => 3,
            Kernel::AtomicAdd | Kernel::CompareAndSwap => 3,
            Kernel::Sum | Kernel::PointerChase => 2,
        };
        if arguments.iter().skip(used).any(|&argument| argument != 0) {
            return Err(Status::Malformed);
        }
        let [first, second, third, _] = arguments;
        match kernel {
            Kernel::Fill | Kernel::Sum | Kernel::Add => range::check(first, second)?,
            Kernel::Copy => {
                range::check(first, third)?;
                range::check(second, third)?;
            }
            Kernel::AtomicAdd => word::check(first)?,
            Kernel::CompareAndSwap | Kernel::PointerChase => {
                word::check(first)?;
                if waves != 1 {
                    return Err(Status::BadArgument);
                }
            }
        }
        Ok(Self {
            kernel,
            arguments,
            waves,
        })
    }

    /// The engine that runs it.
    pub(crate) fn engine(&self) -> event::Engine {
        match self.kernel {
            Kernel::Fill | Kernel::Copy => event::Engine::Copy,
            Kernel::Sum
            | Kernel::Add
            | Kernel::AtomicAdd
            | Kernel::CompareAndSwap
            | Kernel::PointerChase => event::Engine::Compute,
        }
    }

    /// How its result comes about.
    pub(crate) fn combine(&self) -> Combine {
        match self.kernel {
            Kernel::AtomicAdd | Kernel::CompareAndSwap | Kernel::PointerChase => Combine::Last,
            Kernel::Fill | Kernel::Copy | Kernel::Sum | Kernel::Add => Combine::Sum,
        }
    }

    /// How many waves there are.
    pub(crate) fn waves(&self) -> u32 {
        self.waves
    }

    /// The kernel's name on the wire.
    pub(crate) fn kernel(&self) -> Kernel {
        self.kernel
    }

    /// The program of one wave.
    pub(crate) fn wave(&self, index: u32) -> Box<dyn Program> {
        let [first, second, third, _] = self.arguments;
        let range = |kind, length| range::Range::new(kind, first, length, index, self.waves);
        match self.kernel {
            Kernel::Fill => Box::new(range(range::Kind::Fill { pattern: third }, second)),
            Kernel::Copy => Box::new(range(range::Kind::Copy { from: second }, third)),
            Kernel::Sum => Box::new(range(range::Kind::Sum, second)),
            Kernel::Add => Box::new(range(range::Kind::Add { addend: third }, second)),
            Kernel::AtomicAdd => Box::new(word::AtomicAdd::new(first, second, third)),
            Kernel::CompareAndSwap => Box::new(word::CompareAndSwap::new(first, second, third)),
            Kernel::PointerChase => Box::new(chase::Chase::new(first, second)),
        }
    }
}
