// SPDX-License-Identifier: MIT OR Apache-2.0
//! Memory that the GPU works on, and its oracle: what it should hold, computed by the CPU alone in
//! memory that the GPU never sees.

use crate::Failure;
use farfault::{Buffer, Pages};

/// A buffer and what it should hold. What is done to one must be told to the other.
#[derive(Debug)]
pub(crate) struct Memory {
    /// From `malloc`; CPU and GPU use it.
    pub(crate) data: Buffer,
    /// The oracle's.
    pub(crate) expected: Vec<u64>,
}

impl Memory {
    /// The CPU writes a different word to each place.
    pub(crate) fn written_by_cpu(bytes: usize) -> Self {
        let mut data = Buffer::new(bytes);
        let expected: Vec<u64> = (0..data.len() as u64).map(scramble).collect();
        for (index, word) in data.iter_mut().enumerate() {
            *word = scramble(index as u64);
        }
        Self { data, expected }
    }

    pub(crate) fn pages(&self) -> Pages {
        self.data.pages()
    }

    /// What the GPU's sum should be.
    pub(crate) fn expected_sum(&self) -> u64 {
        sum(&self.expected)
    }

    /// The CPU reads every word: pages in VRAM come home.
    pub(crate) fn check(&self) -> Result<(), Failure> {
        compare(&self.data, &self.expected)
    }

    /// Holds the GPU's sum against the oracle's.
    pub(crate) fn check_sum(&self, found: u64) -> Result<(), Failure> {
        let expected = self.expected_sum();
        if found != expected {
            return Err(format!("the GPU's sum is {found:#x} and should be {expected:#x}").into());
        }
        Ok(())
    }
}

/// The first word that is not as it should be, if there is one.
pub(crate) fn compare(found: &[u64], expected: &[u64]) -> Result<(), Failure> {
    if found.len() != expected.len() {
        return Err("memory and oracle have not the same length".into());
    }
    let mut pairs = found.iter().zip(expected);
    match pairs.position(|(found, expected)| found != expected) {
        None => Ok(()),
        Some(index) => Err(format!(
            "word {index} (at {:#x}) is {:#x} and should be {:#x}",
            found.as_ptr().addr() + index * size_of::<u64>(),
            found[index],
            expected[index],
        )
        .into()),
    }
}

pub(crate) fn sum(words: &[u64]) -> u64 {
    words.iter().fold(0, |sum, word| sum.wrapping_add(*word))
}

/// The finalizer of SplitMix64: every word differs, so data in the wrong place shows.
fn scramble(index: u64) -> u64 {
    let mut z = index.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn check_of_untouched_memory_passes() {
        let memory = Memory::written_by_cpu(3 * farfault::PAGE_SIZE);
        assert!(memory.check().is_ok());
        assert!(memory.check_sum(sum(&memory.data)).is_ok());
    }

    #[test]
    fn check_of_one_wrong_word_names_it() {
        let mut memory = Memory::written_by_cpu(farfault::PAGE_SIZE);
        memory.data[17] ^= 1;
        let text = memory.check().unwrap_err().to_string();
        assert!(text.starts_with("word 17 "), "{text}");
        assert!(memory.check_sum(sum(&memory.data)).is_err());
    }

    #[test]
    fn check_of_pages_in_the_wrong_order_fails() {
        let mut memory = Memory::written_by_cpu(2 * farfault::PAGE_SIZE);
        let (first, second) = memory.data.split_at_mut(farfault::PAGE_SIZE / 8);
        first.swap_with_slice(second);
        assert!(memory.check().is_err());
    }

    #[test]
    fn compare_of_unequal_lengths_fails() {
        assert!(compare(&[1], &[1, 2]).is_err());
    }
}
