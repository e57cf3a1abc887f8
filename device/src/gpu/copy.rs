// SPDX-License-Identifier: MIT OR Apache-2.0
//! Copy lists between physical addresses, in pieces that take turns (manual, section 5.3).
//!
//! A list was checked as a whole before it comes here. It knows nothing of translation.

use super::{
    mmu::advance,
    settings::WORK_BYTES,
    work::{BadRun, Piece, Source},
};
use std::collections::{BTreeMap, VecDeque};

/// A list under way.
#[derive(Debug)]
struct List {
    tag: u64,
    runs: Vec<Piece>,
    /// Index of the run that comes next, and how much of it is under way.
    next: usize,
    offset: u64,
    in_flight: u32,
    /// The first run that found no memory.
    failed: Option<BadRun>,
}

/// How a list ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ListEnd {
    pub(crate) tag: u64,
    pub(crate) failed: Option<BadRun>,
}

/// All lists under way.
#[derive(Debug, Default)]
pub(crate) struct CopyLists {
    lists: BTreeMap<u64, List>,
    /// Those with work to hand out, in turn.
    turn: VecDeque<u64>,
    next_id: u64,
    /// Bytes that the runs of all lists take.
    bytes: usize,
}

impl CopyLists {
    /// Begins a list.
    pub(crate) fn begin(&mut self, tag: u64, runs: Vec<Piece>) {
        let id = self.next_id;
        self.next_id += 1;
        self.bytes += size_of_val(runs.as_slice());
        let list = List {
            tag,
            runs,
            next: 0,
            offset: 0,
            in_flight: 0,
            failed: None,
        };
        self.lists.insert(id, list);
        self.turn.push_back(id);
    }

    /// Drops all of them. Numbers are not used again, so works in flight are nobody's then.
    pub(crate) fn clear(&mut self) {
        self.lists.clear();
        self.turn.clear();
        self.bytes = 0;
    }

    /// How many there are.
    pub(crate) fn len(&self) -> usize {
        self.lists.len()
    }

    /// How many bytes of memory they take.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Whether one has work to hand out.
    pub(crate) fn has_work(&self) -> bool {
        !self.turn.is_empty()
    }

    /// Pieces to do next, of one list, and their bytes in all.
    pub(crate) fn next(&mut self) -> Option<(u64, Vec<Piece>, u64)> {
        let id = self.turn.pop_front()?;
        let list = self.lists.get_mut(&id)?;
        let mut pieces = Vec::new();
        let mut bytes = 0;
        while bytes < WORK_BYTES {
            let Some(run) = list.runs.get(list.next) else {
                break;
            };
            let rest = run.length - list.offset;
            let room = WORK_BYTES - bytes;
            // Runs are parted at multiples of 8 bytes, for a pattern to go on as it began.
            let length = if rest <= room { rest } else { room - room % 8 };
            if length == 0 {
                break;
            }
            pieces.push(part(run, list.offset, length));
            bytes += length;
            list.offset += length;
            if list.offset == run.length {
                list.next += 1;
                list.offset = 0;
            }
        }
        list.in_flight += 1;
        if list.next < list.runs.len() {
            self.turn.push_back(id);
        }
        Some((id, pieces, bytes))
    }

    /// Takes note that pieces are done. Returns how the list ended, if it did.
    pub(crate) fn done(&mut self, id: u64, failed: Option<BadRun>) -> Option<ListEnd> {
        let list = self.lists.get_mut(&id)?;
        list.in_flight = list.in_flight.saturating_sub(1);
        if let Some(bad) = failed {
            let first = list.failed.filter(|first| first.run <= bad.run);
            list.failed = first.or(Some(bad));
            list.next = list.runs.len();
            self.turn.retain(|&waiting| waiting != id);
        }
        if list.in_flight > 0 || list.next < list.runs.len() {
            return None;
        }
        let list = self.lists.remove(&id)?;
        self.bytes = self.bytes.saturating_sub(size_of_val(list.runs.as_slice()));
        Some(ListEnd {
            tag: list.tag,
            failed: list.failed,
        })
    }
}

fn part(run: &Piece, offset: u64, length: u64) -> Piece {
    Piece {
        run: run.run,
        from: match run.from {
            Source::Memory(at) => Source::Memory(advance(at, offset)),
            pattern @ Source::Pattern(_) => pattern,
        },
        to: advance(run.to, offset),
        length,
    }
}
