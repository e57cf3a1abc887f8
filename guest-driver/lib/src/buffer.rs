// SPDX-License-Identifier: MIT OR Apache-2.0
//! Words from the allocator, beginning at a page boundary: a job works on any slice, but where pages
//! are counted, moved or shown, nothing else should live in them.

use crate::pages::{HUGE_PAGE_SIZE, PAGE_SIZE, Pages};
use std::ops::{Deref, DerefMut};

/// Whole pages of zeroed words from `malloc`, not touched yet. From 2 MiB on they begin at a 2 MiB
/// boundary, so that huge pages fit.
#[derive(Debug)]
pub struct Buffer {
    storage: Vec<u64>,
    start: usize,
    length: usize,
}

impl Buffer {
    /// At least `bytes` bytes, rounded up to whole pages.
    pub fn new(bytes: usize) -> Self {
        let bytes = bytes.next_multiple_of(PAGE_SIZE);
        let align = if bytes >= HUGE_PAGE_SIZE {
            HUGE_PAGE_SIZE
        } else {
            PAGE_SIZE
        };
        let storage = vec![0u64; (bytes + align) / size_of::<u64>()];
        let start = storage.as_ptr().align_offset(align);
        Self {
            storage,
            start,
            length: bytes / size_of::<u64>(),
        }
    }

    /// Its pages.
    pub fn pages(&self) -> Pages {
        Pages::covering(self)
    }
}

impl Deref for Buffer {
    type Target = [u64];

    fn deref(&self) -> &[u64] {
        &self.storage[self.start..][..self.length]
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u64] {
        &mut self.storage[self.start..][..self.length]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffer_made_is_aligned_and_whole_pages() {
        for (bytes, pages, align) in [
            (1, 1, PAGE_SIZE),
            (3 * PAGE_SIZE, 3, PAGE_SIZE),
            (HUGE_PAGE_SIZE, 512, HUGE_PAGE_SIZE),
        ] {
            let buffer = Buffer::new(bytes);
            assert_eq!(buffer.pages().count(), pages);
            assert_eq!(buffer.pages().address() % align, 0);
            assert_eq!(buffer.len(), pages * PAGE_SIZE / 8);
        }
    }
}
