// SPDX-License-Identifier: MIT OR Apache-2.0
//! Kernels over a range: fill, copy, sum, add (manual, section 5.4).
//!
//! # Shares
//!
//! Of the `n` pages of 4 KiB that the range touches (a copy's destination), wave `i` of `W` works on
//! pages `i * n / W` to `(i + 1) * n / W`, exclusive, rounded down, as far as they are in the range.

use super::{Access, Program, Progress, Step};
use farfault_protocol::{
    address::{GpuVa, PAGE_SIZE},
    command::Status,
};

/// What is done to the range.
#[derive(Clone, Copy, Debug)]
pub(super) enum Kind {
    Fill { pattern: u64 },
    Copy { from: u64 },
    Sum,
    Add { addend: u64 },
}

/// One wave's share.
#[derive(Debug)]
pub(super) struct Range {
    kind: Kind,
    start: u64,
    /// Of the share, in bytes from `start`.
    offset: u64,
    end: u64,
    sum: u64,
}

/// Checks a range: whole words, that do not wrap around.
pub(super) fn check(start: u64, length: u64) -> Result<(), Status> {
    if (start | length) % 8 != 0 {
        return Err(Status::Misaligned);
    }
    match start.checked_add(length) {
        Some(_) => Ok(()),
        None => Err(Status::BadAddress),
    }
}

/// The share of a wave, in bytes from the range's start.
fn share(start: u64, length: u64, wave: u32, waves: u32) -> (u64, u64) {
    let first_page = start / PAGE_SIZE;
    let pages = match length {
        0 => 0,
        _ => (start + (length - 1)) / PAGE_SIZE - first_page + 1,
    };
    let border = |wave: u32| {
        let page = u128::from(wave) * u128::from(pages) / u128::from(waves.max(1));
        let address = (u128::from(first_page) + page) * u128::from(PAGE_SIZE);
        let offset = address.saturating_sub(u128::from(start));
        // No more than `length`, so it fits.
        offset.min(u128::from(length)) as u64
    };
    (border(wave), border(wave + 1))
}

impl Range {
    pub(super) fn new(kind: Kind, start: u64, length: u64, wave: u32, waves: u32) -> Self {
        let (offset, end) = share(start, length, wave, waves);
        Self {
            kind,
            start,
            offset,
            end,
            sum: 0,
        }
    }
}

impl Program for Range {
    fn next(&mut self, last: Option<Progress>) -> Step {
        if let Some(last) = last {
            self.offset += last.amount;
            self.sum = self.sum.wrapping_add(last.value);
        }
        if self.offset >= self.end {
            return Step::End(self.sum);
        }
        let at = GpuVa::new(self.start + self.offset);
        let length = self.end - self.offset;
        Step::Access(match self.kind {
            Kind::Fill { pattern } => Access::Fill {
                to: at,
                length,
                pattern,
            },
            Kind::Copy { from } => Access::Copy {
                to: at,
                from: GpuVa::new(from + self.offset),
                length,
            },
            Kind::Sum => Access::Sum { from: at, length },
            Kind::Add { addend } => Access::Add {
                to: at,
                length,
                addend,
            },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_of_all_waves_cover_the_range_once_and_end_at_pages() {
        let cases = [
            (0, 4096, 1),
            (8, 8, 4),
            (4088, 16, 2),
            (0x1008, 0x7ff0, 3),
            (0, 0, 5),
            (4096, 1 << 40, 4096),
            (u64::MAX - 0xfff, 0xff8, 7),
        ];
        for (start, length, waves) in cases {
            let mut expected = 0;
            for wave in 0..waves {
                let (from, to) = share(start, length, wave, waves);
                assert_eq!(from, expected, "gap before wave {wave} of {waves}");
                assert!(to == from || to == length || (start + to) % PAGE_SIZE == 0);
                expected = to;
            }
            assert_eq!(expected, length);
        }
    }

    #[test]
    fn share_of_five_pages_among_two_waves_is_two_and_three() {
        assert_eq!(share(0x2000, 5 * 4096, 0, 2), (0, 2 * 4096));
        assert_eq!(share(0x2000, 5 * 4096, 1, 2), (2 * 4096, 5 * 4096));
    }

    #[test]
    fn check_range_around_the_end_of_addresses_is_refused() {
        assert_eq!(check(u64::MAX - 7, 8), Err(Status::BadAddress));
        assert_eq!(check(4, 8), Err(Status::Misaligned));
        assert_eq!(check(8, 12), Err(Status::Misaligned));
    }
}
