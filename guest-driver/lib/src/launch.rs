// SPDX-License-Identifier: MIT OR Apache-2.0
//! One job before it runs: a kernel, the memory that it works on, and how many waves share it.
//!
//! # Invariant
//!
//! The arguments of a [`Launch<'a, T>`] make its kernel write only memory that the launch borrows
//! exclusively (or that is atomic) for `'a`, and read only memory that it borrows for `'a`.
//! `sys.rs` relies on that. So the fields are private, and this file has no other constructors.

use crate::{
    Pages,
    error::{CallName, Error, Result},
    pages::PAGE_SIZE,
    uapi::{self, Kernel},
};
use std::{marker::PhantomData, ops::Range, sync::atomic::AtomicU64};

/// Bytes that make one more wave worth its while, where the number of waves was left open.
const BYTES_PER_WAVE: u64 = 16 * PAGE_SIZE as u64;

/// Most waves of a job where their number was left open.
const DEFAULT_MAX_WAVES: u64 = 64;

/// What a job brings back: `u64` or nothing.
pub trait Output: sealed::Output {}

impl Output for () {}
impl Output for u64 {}

mod sealed {
    pub trait Output {
        fn from_result(result: u64) -> Self;
    }

    impl Output for () {
        fn from_result(_: u64) {}
    }

    impl Output for u64 {
        fn from_result(result: u64) -> Self {
            result
        }
    }
}

/// A job to run with [`crate::Gpu::run`] or [`crate::Scope::launch`]. It borrows its memory for
/// `'a`, and brings back a `T`.
#[derive(Debug)]
#[must_use = "a launch does nothing until it is run"]
pub struct Launch<'a, T> {
    kernel: Kernel,
    arguments: [u64; 4],
    /// First and last byte that the arguments themselves name, for checks and messages.
    memory: Range<usize>,
    /// As many as the length is worth, if nothing was said.
    waves: Option<u32>,
    borrow: PhantomData<&'a mut [u64]>,
    output: PhantomData<fn() -> T>,
}

impl<'a> Launch<'a, ()> {
    /// Stores `pattern` to each word of `destination`.
    pub fn fill(destination: &'a mut [u64], pattern: u64) -> Self {
        let memory = exposed_mut(destination);
        let (address, length) = words(&memory);
        Self::new(Kernel::Fill, memory, [address, length, pattern, 0])
    }

    /// Copies `source` to `destination`, which has the same length.
    pub fn copy(destination: &'a mut [u64], source: &'a [u64]) -> Result<Self> {
        if destination.len() != source.len() {
            return Err(Error::Argument {
                call: CallName::of_kernel("SUBMIT", Kernel::Copy),
                problem: format!(
                    "the destination has {} words and the source {}; make them equal",
                    destination.len(),
                    source.len()
                ),
            });
        }
        let (from, _) = words(&exposed(source));
        let memory = exposed_mut(destination);
        let (to, length) = words(&memory);
        Ok(Self::new(Kernel::Copy, memory, [to, from, length, 0]))
    }

    /// Adds `addend` to each word of `destination`, wrapping around.
    pub fn add(destination: &'a mut [u64], addend: u64) -> Self {
        let memory = exposed_mut(destination);
        let (address, length) = words(&memory);
        Self::new(Kernel::Add, memory, [address, length, addend, 0])
    }
}

impl<'a> Launch<'a, u64> {
    /// Brings back the sum of the words of `source`, wrapping around.
    pub fn sum(source: &'a [u64]) -> Self {
        let memory = exposed(source);
        let (address, length) = words(&memory);
        Self::new(Kernel::Sum, memory, [address, length, 0, 0])
    }

    /// Each wave adds `addend` to `destination` `repeat` times, atomically: towards CPUs, too.
    /// Brings back what it was before the last addition. One wave, unless [`Launch::waves`] says
    /// otherwise.
    pub fn atomic_add(destination: &'a AtomicU64, addend: u64, repeat: u64) -> Self {
        let memory = exposed_atomic(destination);
        let (address, _) = words(&memory);
        Self::new(Kernel::AtomicAdd, memory, [address, addend, repeat, 0])
    }

    /// Stores `desired` to `destination` if that is `expected`, atomically: towards CPUs, too.
    /// Brings back what it was before.
    pub fn compare_and_swap(destination: &'a AtomicU64, expected: u64, desired: u64) -> Self {
        let memory = exposed_atomic(destination);
        let (address, _) = words(&memory);
        let arguments = [address, expected, desired, 0];
        Self::new(Kernel::CompareAndSwap, memory, arguments)
    }

    /// Goes `steps` links along `chain` from its first one. Brings back the address read last,
    /// which is that of the link it came to.
    pub fn pointer_chase(chain: &'a Chain<'_>, steps: u64) -> Self {
        let memory = exposed(chain.words);
        let arguments = [chain.start as u64, steps, 0, 0];
        Self::new(Kernel::PointerChase, memory, arguments)
    }
}

impl<T> Launch<'_, T> {
    fn new(kernel: Kernel, memory: Range<usize>, arguments: [u64; 4]) -> Self {
        Self {
            kernel,
            arguments,
            memory,
            waves: None,
            borrow: PhantomData,
            output: PhantomData,
        }
    }

    /// Shares the work among `waves` waves, which fault and run on independently of each other.
    pub fn waves(mut self, waves: u32) -> Self {
        self.waves = Some(waves);
        self
    }

    /// The kernel that will run.
    pub fn kernel(&self) -> Kernel {
        self.kernel
    }

    /// The addresses of the memory that it works on (of a copy: that it writes).
    pub(crate) fn memory(&self) -> Range<usize> {
        self.memory.clone()
    }

    /// The argument of the call, if a GPU of `max_waves` can run this.
    pub(crate) fn request(&self, max_waves: u32) -> Result<uapi::Submit> {
        let refuse = |problem: String| {
            let call = CallName::of_kernel("SUBMIT", self.kernel);
            Err(Error::Argument { call, problem })
        };
        if self.memory.is_empty() {
            return refuse("the memory is empty; a job works on one word at least".to_owned());
        }
        let single = matches!(self.kernel, Kernel::CompareAndSwap | Kernel::PointerChase);
        let waves = match self.waves {
            None if single => 1,
            None => {
                let worth = (self.memory.len() as u64).div_ceil(BYTES_PER_WAVE);
                // At most DEFAULT_MAX_WAVES, which fits.
                (worth.clamp(1, DEFAULT_MAX_WAVES) as u32).min(max_waves.max(1))
            }
            Some(waves) if single && waves != 1 => {
                return refuse(format!("it runs in 1 wave, not in {waves}"));
            }
            Some(waves) if waves == 0 || waves > max_waves => {
                return refuse(format!("{waves} waves; this GPU takes 1 to {max_waves}"));
            }
            Some(waves) => waves,
        };
        Ok(uapi::Submit {
            kernel: self.kernel.raw(),
            waves,
            arguments: self.arguments,
            fence: 0,
        })
    }
}

impl<T: Output> Launch<'_, T> {
    /// What the kernel's result means to the caller.
    pub(crate) fn output(result: u64) -> T {
        T::from_result(result)
    }
}

/// A closed chain of links in memory: each word that belongs to it is the address of the next.
/// It keeps the memory borrowed, so that nobody bends a link while a job follows them.
#[derive(Debug)]
pub struct Chain<'a> {
    words: &'a [u64],
    start: usize,
}

impl<'a> Chain<'a> {
    /// Links the words of `memory` with these indices, in this order, and the last to the first.
    /// Each index stands there once at most.
    pub fn new(memory: &'a mut [u64], order: &[usize]) -> Result<Self> {
        let refuse = |problem: String| {
            let call = CallName::new("Chain::new");
            Err(Error::Argument { call, problem })
        };
        if let Some(index) = order.iter().find(|index| **index >= memory.len()) {
            return refuse(format!(
                "index {index} is beyond the {} words",
                memory.len()
            ));
        }
        let Some(first) = order.first() else {
            return refuse("it has no links; a chain has one at least".to_owned());
        };
        let base = memory.as_ptr().expose_provenance();
        let address = |index: usize| base + index * size_of::<u64>();
        for (index, next) in order.iter().zip(order.iter().cycle().skip(1)) {
            // Both indices are within `memory`: checked above.
            memory[*index] = address(*next) as u64;
        }
        Ok(Self {
            words: memory,
            start: address(*first),
        })
    }

    /// The pages of the memory that holds the links.
    pub fn pages(&self) -> Pages {
        Pages::covering(self.words)
    }

    /// Address of the first link.
    pub fn start(&self) -> usize {
        self.start
    }
}

/// The GPU will use the addresses behind the compiler's back: provenance is exposed for that.
fn exposed(memory: &[u64]) -> Range<usize> {
    let start = memory.as_ptr().expose_provenance();
    start..start + size_of_val(memory)
}

fn exposed_mut(memory: &mut [u64]) -> Range<usize> {
    let start = memory.as_mut_ptr().expose_provenance();
    start..start + size_of_val(memory)
}

fn exposed_atomic(word: &AtomicU64) -> Range<usize> {
    let start = word.as_ptr().expose_provenance();
    start..start + size_of::<AtomicU64>()
}

/// Address and bytes, as the interface has them.
fn words(memory: &Range<usize>) -> (u64, u64) {
    (memory.start as u64, memory.len() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fill_requested_has_address_length_and_pattern() {
        let mut memory = [0u64; 4];
        let address = memory.as_ptr().addr() as u64;
        let request = Launch::fill(&mut memory, 7).request(8).unwrap();
        assert_eq!(request.kernel, Kernel::Fill.raw());
        assert_eq!(request.arguments, [address, 32, 7, 0]);
        assert_eq!((request.waves, request.fence), (1, 0));
    }

    #[test]
    fn copy_requested_has_destination_before_source() {
        let (mut to, from) = ([0u64; 2], [1u64; 2]);
        let (to_address, from_address) = (to.as_ptr().addr() as u64, from.as_ptr().addr() as u64);
        let request = Launch::copy(&mut to, &from).unwrap().request(8).unwrap();
        assert_eq!(request.arguments, [to_address, from_address, 16, 0]);
    }

    #[test]
    fn copy_of_unequal_lengths_is_refused() {
        let error = Launch::copy(&mut [0; 2], &[0; 3]).unwrap_err().to_string();
        assert!(error.contains("2 words and the source 3"), "{error}");
    }

    #[test]
    fn empty_memory_requested_is_refused() {
        let error = Launch::sum(&[]).request(8).unwrap_err().to_string();
        assert!(
            error.starts_with("SUBMIT (sum): the memory is empty"),
            "{error}"
        );
    }

    #[test]
    fn waves_left_open_grow_with_length_to_the_gpus_limit() {
        let memory = vec![0u64; 1 << 20]; // 8 MiB: 128 times BYTES_PER_WAVE
        let waves = |max| Launch::sum(&memory).request(max).unwrap().waves;
        assert_eq!((waves(1), waves(16), waves(1000)), (1, 16, 64));
    }

    #[test]
    fn waves_beyond_limits_are_refused() {
        let memory = [0u64; 1];
        assert!(Launch::sum(&memory).waves(0).request(8).is_err());
        assert!(Launch::sum(&memory).waves(9).request(8).is_err());
        assert_eq!(Launch::sum(&memory).waves(8).request(8).unwrap().waves, 8);
        let word = AtomicU64::new(0);
        assert!(
            Launch::compare_and_swap(&word, 0, 1)
                .waves(2)
                .request(8)
                .is_err()
        );
        assert!(
            Launch::compare_and_swap(&word, 0, 1)
                .waves(1)
                .request(8)
                .is_ok()
        );
        assert_eq!(Launch::atomic_add(&word, 1, 5).request(8).unwrap().waves, 1);
    }

    #[test]
    fn chain_made_links_in_order_and_closes() {
        let mut memory = [0u64; 4];
        let base = memory.as_ptr().addr() as u64;
        let chain = Chain::new(&mut memory, &[2, 0, 3]).unwrap();
        assert_eq!(chain.start() as u64, base + 16);
        assert_eq!(memory, [base + 24, 0, base, base + 16]);
    }

    #[test]
    fn chain_of_bad_order_is_refused() {
        assert!(Chain::new(&mut [0; 2], &[0, 2]).is_err());
        assert!(Chain::new(&mut [0; 2], &[]).is_err());
    }
}
