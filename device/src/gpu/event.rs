// SPDX-License-Identifier: MIT OR Apache-2.0
//! Events, and the buffers that the driver posted for them (manual, chapter 6).
//!
//! Who gets a free buffer: fences that wait for one, then the notes that faults were lost, memory
//! failed or a queue is broken, then faults. A fault without a buffer is not kept here; its wave is, and faults again.
//! Between two notes that faults were lost there is a fault, or the notes could take each buffer
//! that the driver posts. So a driver with a single buffer still learns everything.

use super::context::Contexts;
use farfault_protocol::{
    U16, U32, U64,
    address::VramAddr,
    config::queue,
    event::{EVENT_SIZE, ErrorCode, ErrorEvent, EventHeader, EventKind, FaultEvent, FenceEvent},
};
use serde::Serialize;
use std::collections::VecDeque;
use zerocopy::IntoBytes;

/// The bytes of an event.
pub type EventBytes = [u8; EVENT_SIZE];

/// Events written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct EventStats {
    /// Faults.
    pub faults: u64,
    /// Ends of jobs.
    pub fences: u64,
    /// Errors.
    pub errors: u64,
}

/// A job's end that waits for a buffer, or has one.
#[derive(Clone, Copy, Debug)]
struct Queued {
    /// The context that the event is about, if it is about one.
    context: Option<u32>,
    bytes: EventBytes,
}

/// Buffers and what goes into them.
#[derive(Debug)]
pub(crate) struct Events {
    /// Posted buffers that no event has taken.
    credits: u32,
    /// Buffers that were taken by events and then lost. The next ones that are posted take their place.
    lost_buffers: u32,
    /// Events that have taken a buffer, for the shell to fetch.
    outbox: VecDeque<Queued>,
    /// Ends of jobs for which there was no buffer. No more than jobs.
    fences: VecDeque<FenceEvent>,
    /// Faults that found no buffer since the last note about it.
    lost_faults: u64,
    /// Whether a fault found a buffer since then.
    fault_since_note: bool,
    /// Queues, by index, with a broken chain that was not reported yet.
    bad_queues: [bool; queue::COUNT as usize],
    /// Pages of VRAM that have lost their contents, and were not reported yet.
    poisoned: VecDeque<VramAddr>,
    next_sequence: u64,
    pub(crate) stats: EventStats,
}

impl Default for Events {
    fn default() -> Self {
        Self {
            credits: 0,
            lost_buffers: 0,
            outbox: VecDeque::new(),
            fences: VecDeque::new(),
            lost_faults: 0,
            fault_since_note: true,
            bad_queues: Default::default(),
            poisoned: VecDeque::new(),
            next_sequence: 1,
            stats: EventStats::default(),
        }
    }
}

impl Events {
    /// Adds buffers.
    pub(crate) fn post(&mut self, count: u32, contexts: &mut Contexts) {
        let replaced = count.min(self.lost_buffers);
        self.lost_buffers -= replaced;
        self.credits = self.credits.saturating_add(count - replaced);
        self.write_waiting(contexts);
    }

    /// Takes a buffer away that cannot be written to.
    pub(crate) fn lose_buffer(&mut self) {
        if !self.take_credit() {
            self.lost_buffers = self.lost_buffers.saturating_add(1);
        }
    }

    /// The event that [`Self::pop`] takes.
    pub(crate) fn first(&self) -> Option<&EventBytes> {
        self.outbox.front().map(|event| &event.bytes)
    }

    /// The next event that has a buffer.
    pub(crate) fn pop(&mut self) -> Option<EventBytes> {
        self.outbox.pop_front().map(|event| event.bytes)
    }

    /// Reports a fault, if there is a buffer: returns its sequence number, which is filled in.
    pub(crate) fn fault(&mut self, mut event: FaultEvent) -> Option<u64> {
        if !self.take_credit() {
            self.lost_faults += 1;
            return None;
        }
        let sequence = self.next_sequence;
        self.next_sequence += 1;
        event.sequence = U64::new(sequence);
        self.push(Some(event.header.context.get()), event.as_bytes());
        self.stats.faults += 1;
        self.fault_since_note = true;
        Some(sequence)
    }

    /// Reports the end of a job, now or when there is a buffer. The name of the fence is free from
    /// then on.
    pub(crate) fn fence(&mut self, event: FenceEvent, contexts: &mut Contexts) {
        self.fences.push_back(event);
        self.write_waiting(contexts);
    }

    /// Reports a chain that could not be answered, now or when there is a buffer.
    pub(crate) fn bad_descriptor(&mut self, queue: u16, contexts: &mut Contexts) {
        if let Some(bad) = self.bad_queues.get_mut(usize::from(queue)) {
            *bad = true;
        }
        self.write_waiting(contexts);
    }

    /// Reports a page of VRAM that has lost its contents, now or when there is a buffer.
    pub(crate) fn poisoned(&mut self, page: VramAddr, contexts: &mut Contexts) {
        self.poisoned.push_back(page);
        self.write_waiting(contexts);
    }

    /// Forgets everything but what was counted.
    pub(crate) fn reset(&mut self) {
        *self = Self {
            stats: self.stats,
            ..Self::default()
        };
    }

    /// Drops what is about a context. Buffers that were taken are free again.
    pub(crate) fn forget_context(&mut self, context: u32, contexts: &mut Contexts) {
        let before = self.outbox.len();
        self.outbox.retain(|event| event.context != Some(context));
        let freed = before - self.outbox.len();
        self.fences
            .retain(|event| event.header.context.get() != context);
        self.post(u32::try_from(freed).unwrap_or(u32::MAX), contexts);
    }

    /// Jobs that have ended and whose event has no buffer.
    pub(crate) fn waiting_fences(&self) -> usize {
        self.fences.len()
    }

    /// Posted buffers that no event has taken.
    pub(crate) fn free_buffers(&self) -> u32 {
        self.credits
    }

    fn write_waiting(&mut self, contexts: &mut Contexts) {
        while !self.fences.is_empty() && self.take_credit() {
            if let Some(event) = self.fences.pop_front() {
                let context = event.header.context.get();
                contexts.release_fence(context, event.fence.get());
                self.push(Some(context), event.as_bytes());
                self.stats.fences += 1;
            }
        }
        if self.lost_faults > 0 && self.fault_since_note && self.take_credit() {
            self.fault_since_note = false;
            let lost = std::mem::take(&mut self.lost_faults);
            self.error(ErrorCode::FaultOverflow, lost);
        }
        while !self.poisoned.is_empty() && self.take_credit() {
            if let Some(page) = self.poisoned.pop_front() {
                self.error(ErrorCode::MemoryPoisoned, page.get());
            }
        }
        for index in 0..queue::COUNT {
            let bad = self.bad_queues.get(usize::from(index)).copied();
            if bad == Some(true) && self.take_credit() {
                if let Some(bad) = self.bad_queues.get_mut(usize::from(index)) {
                    *bad = false;
                }
                self.error(ErrorCode::BadDescriptor, u64::from(index));
            }
        }
    }

    fn error(&mut self, code: ErrorCode, detail: u64) {
        let event = ErrorEvent {
            header: header(EventKind::Error, 0),
            code: U32::new(code.raw()),
            reserved: U32::new(0),
            detail: U64::new(detail),
            reserved2: [0; 40],
        };
        self.push(None, event.as_bytes());
        self.stats.errors += 1;
    }

    fn take_credit(&mut self) -> bool {
        match self.credits.checked_sub(1) {
            Some(rest) => {
                self.credits = rest;
                true
            }
            None => false,
        }
    }

    fn push(&mut self, context: Option<u32>, event: &[u8]) {
        // Every event has this size, which the protocol asserts.
        let mut bytes = [0; EVENT_SIZE];
        for (to, from) in bytes.iter_mut().zip(event) {
            *to = *from;
        }
        self.outbox.push_back(Queued { context, bytes });
    }
}

/// The header of an event.
pub(crate) fn header(kind: EventKind, context: u32) -> EventHeader {
    EventHeader {
        kind: U16::new(kind.raw()),
        reserved: U16::new(0),
        context: U32::new(context),
    }
}
