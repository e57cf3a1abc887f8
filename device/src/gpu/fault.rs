// SPDX-License-Identifier: MIT OR Apache-2.0
//! The replayable faults of one context: which waves are parked, and on what (manual, chapter 8).
//!
//! A fault that is reported becomes a [`Record`]; later ones of the same page that need no stronger
//! access wait on it too. A record lives until it is replayed or cancelled, or until nobody waits
//! for it any more, so that there are never more records than waves. It knows nothing of events.

use farfault_protocol::{
    address::GpuVa,
    event::{Access, Engine, FaultCause},
};
use std::collections::{BTreeMap, HashMap, VecDeque};

/// A wave that is parked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Waiter {
    pub(crate) job: u64,
    pub(crate) wave: u32,
    /// What it wants to do.
    pub(crate) access: Access,
}

/// A fault that was reported.
#[derive(Clone, Debug)]
pub(crate) struct Record {
    pub(crate) page: GpuVa,
    pub(crate) access: Access,
    pub(crate) cause: FaultCause,
    pub(crate) engine: Engine,
    /// Of the first waiter's job.
    pub(crate) fence: u64,
    pub(crate) waiters: Vec<Waiter>,
}

/// All parked waves of a context.
#[derive(Debug, Default)]
pub(crate) struct FaultTable {
    /// By sequence number.
    records: BTreeMap<u64, Record>,
    /// Sequence numbers of the records of a page: one for each access at most.
    by_page: HashMap<GpuVa, Vec<u64>>,
    /// Waves whose fault found no buffer.
    unreported: VecDeque<Waiter>,
}

impl FaultTable {
    /// Parks a wave on a record of the same page that is at least as strong. Whether there is one.
    pub(crate) fn merge(&mut self, page: GpuVa, waiter: Waiter) -> bool {
        let Some(sequences) = self.by_page.get(&page) else {
            return false;
        };
        for sequence in sequences {
            if let Some(record) = self.records.get_mut(sequence) {
                if record.access.raw() >= waiter.access.raw() {
                    record.waiters.push(waiter);
                    return true;
                }
            }
        }
        false
    }

    /// Adds a record.
    pub(crate) fn report(&mut self, sequence: u64, record: Record) {
        self.by_page.entry(record.page).or_default().push(sequence);
        self.records.insert(sequence, record);
    }

    /// Parks a wave without a record.
    pub(crate) fn park_unreported(&mut self, waiter: Waiter) {
        self.unreported.push_back(waiter);
    }

    /// Removes the wave that was first parked without a record.
    pub(crate) fn pop_unreported(&mut self) -> Option<Waiter> {
        self.unreported.pop_front()
    }

    /// Removes the records up to a sequence number and returns who waited for them, and all waves
    /// that were not reported.
    pub(crate) fn replay(&mut self, through: u64) -> Vec<Waiter> {
        let mut woken = Vec::from(std::mem::take(&mut self.unreported));
        while let Some(first) = self.records.first_entry() {
            if *first.key() > through {
                break;
            }
            let sequence = *first.key();
            woken.extend(self.cancel(sequence).into_iter().flat_map(|r| r.waiters));
        }
        woken
    }

    /// Removes one record.
    pub(crate) fn cancel(&mut self, sequence: u64) -> Option<Record> {
        let record = self.records.remove(&sequence)?;
        self.forget_page(record.page, sequence);
        Some(record)
    }

    /// Removes the waves of a job.
    pub(crate) fn forget_job(&mut self, job: u64) {
        self.unreported.retain(|waiter| waiter.job != job);
        let mut unwanted = Vec::new();
        for (&sequence, record) in &mut self.records {
            record.waiters.retain(|waiter| waiter.job != job);
            if record.waiters.is_empty() {
                unwanted.push((record.page, sequence));
            }
        }
        for (page, sequence) in unwanted {
            self.records.remove(&sequence);
            self.forget_page(page, sequence);
        }
    }

    /// The records, by sequence number.
    pub(crate) fn records(&self) -> impl Iterator<Item = (u64, &Record)> {
        self.records
            .iter()
            .map(|(&sequence, record)| (sequence, record))
    }

    /// How many waves wait without a record.
    pub(crate) fn unreported(&self) -> usize {
        self.unreported.len()
    }

    /// How many waves wait.
    pub(crate) fn parked(&self) -> usize {
        let reported: usize = self.records.values().map(|r| r.waiters.len()).sum();
        reported + self.unreported.len()
    }

    fn forget_page(&mut self, page: GpuVa, sequence: u64) {
        if let Some(sequences) = self.by_page.get_mut(&page) {
            sequences.retain(|&s| s != sequence);
            if sequences.is_empty() {
                self.by_page.remove(&page);
            }
        }
    }
}
