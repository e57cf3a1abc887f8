// SPDX-License-Identifier: MIT OR Apache-2.0
//! Ranges of whole pages: what placement is decided and reported for.

use crate::{
    error::{CallName, Error, Result},
    sys,
};
use std::ops::Range;

/// Bytes of a page. The driver supports machines of this page size only.
pub const PAGE_SIZE: usize = 4096;

/// Bytes of a huge page.
pub const HUGE_PAGE_SIZE: usize = 2 << 20;

/// A range of whole pages of this process's address space. It may hold anything or nothing: it is
/// no reference, and the calls that take it change where memory is, never what it holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pages {
    address: usize,
    length: usize,
}

impl Pages {
    /// The pages that `memory` has a part in: the first and the last may hold other things, too.
    pub fn covering<T>(memory: &[T]) -> Self {
        let Range { start, end } = memory.as_ptr_range();
        let address = start.addr() & !(PAGE_SIZE - 1);
        let end = end.addr().next_multiple_of(PAGE_SIZE);
        let length = if memory.is_empty() { 0 } else { end - address };
        Self { address, length }
    }

    /// The pages that lie in `memory` wholly.
    pub fn inside<T>(memory: &[T]) -> Self {
        let Range { start, end } = memory.as_ptr_range();
        let address = start.addr().next_multiple_of(PAGE_SIZE);
        let end = end.addr() & !(PAGE_SIZE - 1);
        Self {
            address,
            length: end.saturating_sub(address),
        }
    }

    /// The pages from one address to another.
    pub fn new(range: Range<usize>) -> Result<Self> {
        if range.start % PAGE_SIZE != 0 || range.end % PAGE_SIZE != 0 || range.end < range.start {
            return Err(Error::Argument {
                call: CallName::new("Pages::new"),
                problem: format!(
                    "{:#x}..{:#x} is no range of whole pages; align both ends to {PAGE_SIZE}",
                    range.start, range.end
                ),
            });
        }
        Ok(Self {
            address: range.start,
            length: range.end - range.start,
        })
    }

    /// Address of the first byte.
    pub fn address(self) -> usize {
        self.address
    }

    /// Bytes.
    pub fn length(self) -> usize {
        self.length
    }

    /// Number of pages.
    pub fn count(self) -> usize {
        self.length / PAGE_SIZE
    }

    /// From the first byte's address to that behind the last.
    pub fn range(self) -> Range<usize> {
        self.address..self.address + self.length
    }

    /// The range in parts of at most `count` pages.
    pub(crate) fn parts(self, count: usize) -> impl Iterator<Item = Self> {
        let end = self.range().end;
        let step = count * PAGE_SIZE;
        self.range().step_by(step).map(move |address| Self {
            address,
            length: step.min(end - address),
        })
    }

    /// Lets the kernel use huge pages here, or forbids it, for pages that it will allocate
    /// (`MADV_HUGEPAGE`, `MADV_NOHUGEPAGE`).
    pub fn allow_huge(self, allow: bool) -> Result<()> {
        let call = if allow {
            "MADV_HUGEPAGE"
        } else {
            "MADV_NOHUGEPAGE"
        };
        sys::allow_huge_pages(self, allow)
            .map_err(|errno| Error::call(CallName::new(call), Some(self.range()), errno))
    }
}

impl<T> From<&[T]> for Pages {
    fn from(memory: &[T]) -> Self {
        Self::covering(memory)
    }
}

impl<T> From<&mut [T]> for Pages {
    fn from(memory: &mut [T]) -> Self {
        Self::covering(memory)
    }
}

impl<T> From<&Vec<T>> for Pages {
    fn from(memory: &Vec<T>) -> Self {
        Self::covering(memory)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn covering_slice_within_a_page_is_that_page() {
        let memory = vec![0u64; 4 * PAGE_SIZE / 8];
        let skip = memory.as_ptr().align_offset(PAGE_SIZE);
        let pages = Pages::covering(&memory[skip + 1..skip + 3]);
        assert_eq!(pages.address(), memory[skip..].as_ptr().addr());
        assert_eq!(pages.count(), 1);
    }

    #[test]
    fn covering_slice_across_a_boundary_is_both_pages() {
        let memory = vec![0u64; 4 * PAGE_SIZE / 8];
        let skip = memory.as_ptr().align_offset(PAGE_SIZE) + PAGE_SIZE / 8;
        assert_eq!(Pages::covering(&memory[skip - 1..=skip]).count(), 2);
    }

    #[test]
    fn covering_nothing_is_empty() {
        assert_eq!(Pages::covering::<u64>(&[]).count(), 0);
    }

    #[test]
    fn inside_slice_of_part_of_a_page_is_empty() {
        let memory = vec![0u64; 4 * PAGE_SIZE / 8];
        let skip = memory.as_ptr().align_offset(PAGE_SIZE);
        assert_eq!(Pages::inside(&memory[skip + 1..skip + 9]).count(), 0);
        assert_eq!(
            Pages::inside(&memory[skip..skip + PAGE_SIZE / 8]).count(),
            1
        );
    }

    #[test]
    fn parts_of_a_range_cover_it_once() {
        let pages = Pages::new(PAGE_SIZE..6 * PAGE_SIZE).unwrap();
        let parts: Vec<_> = pages
            .parts(2)
            .map(|part| (part.address(), part.count()))
            .collect();
        let expected = [(PAGE_SIZE, 2), (3 * PAGE_SIZE, 2), (5 * PAGE_SIZE, 1)];
        assert_eq!(parts, expected);
    }

    #[test]
    fn new_with_unaligned_or_reversed_range_is_refused() {
        assert!(Pages::new(1..PAGE_SIZE).is_err());
        assert!(Pages::new(0..PAGE_SIZE + 8).is_err());
        #[expect(clippy::reversed_empty_ranges, reason = "that is what is refused")]
        let reversed = Pages::new(PAGE_SIZE * 2..PAGE_SIZE);
        assert!(reversed.is_err());
        assert_eq!(
            Pages::new(PAGE_SIZE..PAGE_SIZE * 3).map(Pages::count).ok(),
            Some(2)
        );
    }

    #[test]
    fn page_size_of_this_machine_is_the_supported_one() {
        assert_eq!(rustix::param::page_size(), PAGE_SIZE);
    }
}
