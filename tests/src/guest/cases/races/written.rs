// SPDX-License-Identifier: MIT OR Apache-2.0
//! The oracle of a word that many write: it is known at any time which values it may have.

use anyhow::{Result, ensure};
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

/// A word that only grows: by additions of many, or as the generation that one writer stores. Writers
/// say before and after how much they add.
#[derive(Debug, Default)]
pub(super) struct Written {
    begun: AtomicU64,
    done: AtomicU64,
}

impl Written {
    /// Somebody is about to add this. The value if nobody else writes.
    pub(super) fn begin(&self, more: u64) -> u64 {
        self.begun.fetch_add(more, SeqCst) + more
    }

    /// It is in memory.
    pub(super) fn end(&self, more: u64) {
        self.done.fetch_add(more, SeqCst);
    }

    /// What a read that begins now may not be below.
    pub(super) fn least(&self) -> u64 {
        self.done.load(SeqCst)
    }

    /// A read that began when the word was at `least` at least, and has ended, gave this.
    pub(super) fn ensure_read(&self, least: u64, is: u64) -> Result<()> {
        let most = self.begun.load(SeqCst);
        ensure!(
            (least..=most).contains(&is),
            "it is {is:#x}, and should be from {least:#x} to {most:#x}"
        );
        Ok(())
    }

    /// Nobody writes any more.
    pub(super) fn ensure_final(&self, is: u64) -> Result<()> {
        let (begun, done) = (self.begun.load(SeqCst), self.least());
        ensure!(begun == done, "of {begun:#x}, {done:#x} were done");
        ensure!(
            is == done,
            "it is {is:#x} at the end, and should be {done:#x}"
        );
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn read_below_what_was_done_or_beyond_what_was_begun_is_wrong() {
        let word = Written::default();
        word.begin(3);
        word.end(3);
        let least = word.least();
        word.begin(2);
        assert!(word.ensure_read(least, 2).is_err());
        assert!(word.ensure_read(least, 3).is_ok());
        assert!(word.ensure_read(least, 5).is_ok());
        assert!(word.ensure_read(least, 6).is_err());
        assert!(word.ensure_final(3).is_err());
        word.end(2);
        assert!(word.ensure_final(5).is_ok());
    }
}
