// SPDX-License-Identifier: GPL-2.0
//! The MMU notifier: what the CPU unmaps, the GPU unmaps first.
//!
//! When the callback returns, the device can no longer reach the old pages: their entries are
//! cleared and an invalidation was answered (hardware manual, section 4.4). It may run inside
//! memory reclaim, so all that it needs is there: the request's memory is allocated with the
//! address space, and clearing entries allocates nothing.
//!
//! No event is ignored, not even those of our own migrations: the first touch of a range by the GPU
//! has nothing mapped, which costs the device nothing; any other has entries that must go. Only what
//! the GPU has taken from the CPU stays where the event cannot concern it.

use super::page_table::PageTable;
use crate::{
    gpu::Gpu,
    kapi::{
        mmu_interval::{Event, IntervalOps, Invalidation},
        trace,
    },
    queue::Batch,
    stats::Counters,
};
use core::ops::Range;
use farfault_protocol::address::GpuVa;
use kernel::{
    prelude::*,
    sync::{atomic::Relaxed, Arc},
};

/// What the update lock protects.
pub(crate) struct Tables {
    /// `None` while the device does not know the address space: at first, asleep, and once it is closed.
    pub(crate) table: Option<PageTable>,
    /// Memory for requests made under the lock.
    pub(crate) batch: Batch,
}

/// The notifier's side of an address space.
pub(crate) struct Mirror {
    gpu: Arc<Gpu>,
    context: u32,
    counters: Arc<Counters>,
}

impl Mirror {
    pub(crate) fn new(gpu: Arc<Gpu>, context: u32, counters: Arc<Counters>) -> Self {
        Self {
            gpu,
            context,
            counters,
        }
    }

    /// Unmaps all of `range`; tells whether anything was mapped.
    pub(super) fn unmap(&self, tables: &mut Tables, range: Range<usize>) -> Result<bool> {
        self.unmap_some(tables, range, false)
    }

    /// Likewise, but pages that were taken from the CPU stay, if `keep_exclusive`.
    fn unmap_some(
        &self,
        tables: &mut Tables,
        mut range: Range<usize>,
        keep_exclusive: bool,
    ) -> Result<bool> {
        let Some(table) = &mut tables.table else {
            return Ok(false);
        };
        let mut any = false;
        loop {
            // A device that is lost has kept the request's memory: there is no room for anything.
            self.gpu.reachable()?;
            tables.batch.clear();
            let unmapped = table.unmap(range.clone(), keep_exclusive, &mut tables.batch)?;
            if unmapped.any {
                any = true;
                self.gpu.control(&mut tables.batch)?;
            }
            match unmapped.resume {
                Some(address) => range.start = address,
                None => return Ok(any),
            }
        }
    }
}

impl IntervalOps for Mirror {
    type State = Tables;

    fn invalidate(&self, tables: &mut Tables, invalidation: &Invalidation<'_>) {
        let limit = 1usize << GpuVa::BITS;
        let range = invalidation.range();
        let range = range.start.min(limit)..range.end.min(limit);
        // A migration to a device moves no page that was taken from the CPU: its entry is no page to mm.
        let keep_exclusive = invalidation.event() == Event::Migrate;
        let unmapped = self.unmap_some(tables, range.clone(), keep_exclusive);
        match unmapped {
            Ok(false) => {}
            Ok(true) => {
                self.counters.invalidations.fetch_add(1, Relaxed);
                self.gpu.counters.invalidations.fetch_add(1, Relaxed);
            }
            // Unbound: nothing is mapped any more.
            Err(error) if error == ENODEV => {}
            // The promise cannot be kept by a device that does not answer.
            Err(error) => self.gpu.lose("an invalidation failed", error),
        }
        trace::invalidate(
            self.gpu.index(),
            self.context,
            range.start as u64,
            range.end as u64,
            invalidation.event(),
            unmapped != Ok(false),
        );
    }
}
