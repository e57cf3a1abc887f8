// SPDX-License-Identifier: MIT OR Apache-2.0
//! What memory should hold, computed without the GPU: pseudo-random words of a seed, and what was
//! added to them since.

use anyhow::{Result, ensure};
use farfault::arena::Region;

/// The word of a seed with this index (SplitMix64).
pub(crate) const fn word(seed: u64, index: usize) -> u64 {
    let mut z = seed.wrapping_add((index as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// The wrapping sum of words of a seed.
pub(crate) fn sum(seed: u64, indices: std::ops::Range<usize>) -> u64 {
    indices.fold(0, |sum, index| sum.wrapping_add(word(seed, index)))
}

/// The CPU writes a seed's words to a region.
pub(crate) fn write(region: Region, seed: u64) {
    for index in 0..region.words() {
        region.store(index, word(seed, index));
    }
}

/// The CPU reads a region: it holds a seed's words from `first` on, each with `added` to it.
pub(crate) fn check_part(region: Region, seed: u64, first: usize, added: u64) -> Result<()> {
    for index in 0..region.words() {
        let is = region.load(index);
        let should = word(seed, first + index).wrapping_add(added);
        ensure!(
            is == should,
            "word {index} at {:#x} is {is:#x} and should be {should:#x}",
            region.address() + index as u64 * 8
        );
    }
    Ok(())
}

/// As [`check_part`], for all of the words that were written.
pub(crate) fn check(region: Region, seed: u64, added: u64) -> Result<()> {
    check_part(region, seed, 0, added)
}

/// The sum that a GPU should find over what [`check`] accepts.
pub(crate) fn expected_sum(region: Region, seed: u64, added: u64) -> u64 {
    let words = region.words();
    sum(seed, 0..words).wrapping_add(added.wrapping_mul(words as u64))
}

#[cfg(test)]
mod tests {
    use super::*;
    use farfault::arena::Backing;

    #[test]
    fn check_finds_one_wrong_word() {
        let region = Region::map(2 * farfault::PAGE_SIZE, Backing::Small).unwrap();
        write(region, 5);
        assert!(check(region, 5, 0).is_ok());
        let last = region.words() - 1;
        region.store(last, word(5, last) ^ 1);
        assert!(check(region, 5, 0).is_err());
        assert!(check(region, 6, 0).is_err());
    }

    #[test]
    fn expected_sum_is_the_sum_of_the_words() {
        let region = Region::map(farfault::PAGE_SIZE, Backing::Small).unwrap();
        write(region, 9);
        let words = (0..region.words()).map(|index| region.load(index).wrapping_add(3));
        let sum = words.fold(0u64, u64::wrapping_add);
        assert_eq!(expected_sum(region, 9, 3), sum);
    }
}
