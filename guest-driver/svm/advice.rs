// SPDX-License-Identifier: GPL-2.0
//! What the user said about where the pages of a range should be.
//!
//! Ranges are few, disjoint and sorted; what is in none has the default. Advice belongs to
//! addresses, not to mappings: it survives munmap.

use crate::uapi::Advice;
use core::ops::Range;
use kernel::prelude::*;

/// Ranges with an advice of their own, of one address space.
const MAX_RANGES: usize = 1024;

struct Advised {
    range: Range<usize>,
    advice: Advice,
}

/// The advice of one address space.
pub(crate) struct AdviceMap {
    ranges: KVVec<Advised>,
}

impl AdviceMap {
    pub(crate) const fn new() -> Self {
        Self {
            ranges: KVVec::new(),
        }
    }

    /// The advice for an address.
    pub(crate) fn at(&self, address: usize) -> Advice {
        self.range_at(address).1
    }

    /// The advice for an address, and the range around it that has the same.
    pub(crate) fn range_at(&self, address: usize) -> (Range<usize>, Advice) {
        let next = self.ranges.partition_point(|r| r.range.end <= address);
        match self.ranges.get(next) {
            Some(r) if r.range.start <= address => (r.range.clone(), r.advice),
            after => {
                let before = next.checked_sub(1).and_then(|i| self.ranges.get(i));
                let start = before.map_or(0, |r| r.range.end);
                let end = after.map_or(usize::MAX, |r| r.range.start);
                (start..end, Advice::Default)
            }
        }
    }

    /// Replaces the advice of `range`. `ENOSPC`: too many ranges; nothing changed.
    pub(crate) fn set(&mut self, range: Range<usize>, advice: Advice) -> Result {
        let mut kept = KVVec::with_capacity(self.ranges.len() + 3, GFP_KERNEL)?;
        let mut keep = |range: Range<usize>, advice| -> Result {
            if range.is_empty() || advice == Advice::Default {
                return Ok(());
            }
            // Neighbours of one kind are one range.
            match kept.last_mut() {
                Some(Advised {
                    range: last,
                    advice: same,
                }) if last.end == range.start && *same == advice => {
                    last.end = range.end;
                    Ok(())
                }
                _ => Ok(kept.push(Advised { range, advice }, GFP_KERNEL)?),
            }
        };
        for old in &self.ranges {
            keep(old.range.start..old.range.end.min(range.start), old.advice)?;
            if old.range.end > range.start {
                break;
            }
        }
        keep(range.clone(), advice)?;
        for old in &self.ranges {
            keep(old.range.start.max(range.end)..old.range.end, old.advice)?;
        }
        if kept.len() > MAX_RANGES {
            return Err(ENOSPC);
        }
        self.ranges = kept;
        Ok(())
    }
}
