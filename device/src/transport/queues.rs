// SPDX-License-Identifier: MIT OR Apache-2.0
//! What stands between the rings and the GPU: manual, chapters 3 to 6.
//!
//! Takes requests out of the control and submit rings, event buffers out of the event ring, and
//! writes replies and events back in the order in which the GPU made them. Owned by
//! [`super::Device`], under its lock; it never waits.
//!
//! What cannot be answered is given back with length zero and reported to the GPU, which tells the
//! driver with a `BadDescriptor` event. That includes a reply that is longer than the chain has room
//! for: the commands were executed, but nobody is told how they ended. A driver may not have more
//! chains outstanding than a ring has descriptors; those beyond are given back in the same way.

use super::{
    chain::{BadChain, Chain},
    ring::{Available, Ring},
};
use crate::{
    gpu::{Gpu, Outcome, Queue},
    rate_limit::RateLimit,
};
use farfault_protocol::{config::queue, control, event::EVENT_SIZE, submit};
use serde::Serialize;
use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
};
use vm_memory::GuestMemoryMmap;

/// Number of queues.
pub(super) const QUEUES: usize = queue::COUNT as usize;

/// Counters of the transport.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct TransportStats {
    /// Requests taken from the control queue.
    pub control_requests: u64,
    /// Requests taken from the submit queue.
    pub submit_requests: u64,
    /// Buffers taken from the event queue.
    pub event_buffers: u64,
    /// Events written to them.
    pub events: u64,
    /// Chains given back with length zero.
    pub bad_chains: u64,
    /// Times that a ring itself made no sense.
    pub bad_rings: u64,
    /// Times that a queue was looked at: after a kick, or because more came meanwhile.
    pub rounds: u64,
    /// Interrupts to the driver.
    pub interrupts: u64,
    /// Resets by the driver, and ends of VMs.
    pub resets: u64,
}

/// The GPU with its rings.
pub(super) struct Queues {
    /// The GPU itself.
    pub(super) gpu: Gpu,
    /// The guest's RAM, as the front end told last.
    pub(super) memory: Arc<GuestMemoryMmap>,
    /// Counters.
    pub(super) stats: TransportStats,
    /// Between its connection and its end.
    has_front_end: bool,
    rings: [Option<Ring>; QUEUES],
    /// All rings were stopped, when they were taken so far. Until it is known whose rings run next, no chain
    /// is taken or given back.
    stopped: Option<[Option<u16>; QUEUES]>,
    max_request: usize,
    /// Requests whose reply comes later, by tag.
    pending: HashMap<u64, Pending>,
    /// How many of `pending` each queue has.
    outstanding: [usize; QUEUES],
    next_tag: u64,
    /// Queues whose requests stay in the ring until the GPU has room for more.
    left: [bool; QUEUES],
    /// Chains to be given back to rings that were stopped, when they run again: queue, head, and bytes
    /// written.
    held: Vec<(u16, u16, u32)>,
    /// Posted and empty, oldest first. As many as the GPU has credits.
    event_buffers: VecDeque<(u16, Chain)>,
    bad_chain_log: RateLimit,
    bad_ring_log: RateLimit,
}

/// What it means that a ring runs after all were stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Restart {
    /// A ring that was never used looks the same in both; the next one will tell.
    Undecided,
    /// The VM was paused: its rings are as they were.
    GoesOn,
    /// A driver begins with rings of its own.
    Anew,
}

/// What came of looking for a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Taken {
    One,
    Nothing,
    /// The GPU holds as much as it may. [`Queues::take_up`] tells when to go on.
    Later,
}

struct Pending {
    queue: u16,
    head: u16,
    chain: Chain,
}

impl Queues {
    /// No front end yet.
    pub(super) fn new(gpu: Gpu) -> Self {
        let max_request = gpu.config_space().max_request.get() as usize;
        Self {
            gpu,
            memory: Arc::default(),
            stats: TransportStats::default(),
            has_front_end: false,
            rings: [const { None }; QUEUES],
            stopped: None,
            max_request,
            pending: HashMap::new(),
            outstanding: [0; QUEUES],
            next_tag: 0,
            left: [false; QUEUES],
            held: Vec::new(),
            event_buffers: VecDeque::new(),
            bad_chain_log: RateLimit::default(),
            bad_ring_log: RateLimit::default(),
        }
    }

    /// A front end comes: its rings may be attached.
    pub(super) fn welcome_front_end(&mut self) {
        self.has_front_end = true;
    }

    /// Makes a ring known, which the front end has just enabled. Nothing if it is gone already.
    pub(super) fn attach(&mut self, index: u16, ring: impl FnOnce() -> Ring) {
        if !self.has_front_end {
            return;
        }
        if let Some(slot) = self.rings.get_mut(usize::from(index)) {
            slot.get_or_insert_with(ring);
        }
    }

    /// Whether the front end runs any ring.
    pub(super) fn any_running(&self) -> bool {
        self.rings.iter().flatten().any(Ring::is_running)
    }

    /// How far each ring was taken; nothing of one that was never looked at.
    fn bases(&self) -> [Option<u16>; QUEUES] {
        self.rings
            .each_ref()
            .map(|ring| ring.as_ref().map(Ring::base))
    }

    /// The front end has stopped a ring; if it was the last one, how far all were taken is kept.
    pub(super) fn note_stop(&mut self) {
        if self.stopped.is_none() && !self.any_running() {
            self.stopped = Some(self.bases());
        }
    }

    /// The front end has started a ring: what that means if all were stopped.
    pub(super) fn restart(&mut self) -> Restart {
        let Some(before) = self.stopped else {
            return Restart::GoesOn;
        };
        let mut answer = Restart::GoesOn;
        for (ring, before) in self.rings.iter().zip(before) {
            match ring.as_ref().filter(|ring| ring.is_running()) {
                // One that was never looked at before the stop was where it began.
                Some(ring) if ring.base() != before.unwrap_or(0) => {
                    answer = Restart::Anew;
                    break;
                }
                None if before.is_some() => answer = Restart::Undecided,
                _ => {}
            }
        }
        if answer != Restart::Undecided {
            self.stopped = None;
        }
        answer
    }

    /// After rings were stopped and run again: what was held is given back, and each ring is looked at, as
    /// its kicks may have been lost.
    pub(super) fn go_on(&mut self) {
        for (index, head, written) in std::mem::take(&mut self.held) {
            self.give_back(index, head, written);
        }
        self.left = [true; QUEUES];
    }

    /// Forgets everything that belongs to the driver's rings. The GPU is reset by the caller.
    pub(super) fn forget_requests(&mut self) {
        self.pending.clear();
        self.outstanding = [0; QUEUES];
        self.left = [false; QUEUES];
        self.held.clear();
        self.event_buffers.clear();
    }

    /// Forgets the front end: its rings and its memory.
    pub(super) fn forget_front_end(&mut self) {
        self.forget_requests();
        self.stopped = None;
        self.has_front_end = false;
        self.rings = [const { None }; QUEUES];
        self.memory = Arc::default();
    }

    /// Tells the driver of queue `index` not to kick, as its chains are being taken.
    pub(super) fn begin(&mut self, index: u16) {
        let result = self
            .ring(index)
            .map(|ring| ring.disable_kicks(&self.memory));
        self.check_ring(index, result.unwrap_or(Ok(())));
    }

    /// Asks for kicks of queue `index` again. Where the ring stands if there are chains that had none.
    pub(super) fn end(&mut self, index: u16) -> Option<u16> {
        let result = self.ring(index).map(|ring| ring.enable_kicks(&self.memory));
        match self.check_ring(index, result.unwrap_or(Ok(false))) {
            Some(true) => self.base(index),
            Some(false) | None => None,
        }
    }

    /// How far queue `index` was taken.
    pub(super) fn base(&self, index: u16) -> Option<u16> {
        self.ring(index).map(Ring::base)
    }

    /// Takes one chain from queue `index`.
    pub(super) fn take(&mut self, index: u16) -> Taken {
        if !self.has_room(index) {
            self.left[usize::from(index)] = true;
            return Taken::Later;
        }
        let Some(ring) = self.ring(index).filter(|_| self.stopped.is_none()) else {
            return Taken::Nothing;
        };
        let popped = ring.pop(&self.memory);
        let Some(Some(available)) = self.check_ring(index, popped) else {
            return Taken::Nothing;
        };
        let head = available.head_index();
        if let Err(why) = self.dispatch(index, available) {
            self.give_back_bad(index, head, why);
        }
        self.deliver();
        Taken::One
    }

    /// A queue that was left with [`Taken::Later`], and should be looked at now.
    pub(super) fn take_up(&mut self) -> Option<u16> {
        let index = self.to_take_up()?;
        self.left[usize::from(index)] = false;
        Some(index)
    }

    /// As [`Self::take_up`], but the queue stays marked.
    pub(super) fn to_take_up(&self) -> Option<u16> {
        (0..queue::COUNT).find(|&index| self.left[usize::from(index)] && self.has_room(index))
    }

    fn has_room(&self, index: u16) -> bool {
        match index {
            queue::CONTROL => self.gpu.has_room(Queue::Control),
            queue::SUBMIT => self.gpu.has_room(Queue::Submit),
            _ => true,
        }
    }

    /// Has the GPU know all event buffers that the driver posted, kicked or not, if it has used up
    /// those that it knows: a fault should not be lost because of a kick that is on its way.
    pub(super) fn refill_event_buffers(&mut self) {
        if self.event_buffers.is_empty() {
            // No more than there can be: a driver that adds faster than this takes is no reason to
            // keep the lock.
            let most = self.ring(queue::EVENT).map_or(0, Ring::size);
            let taken = |_: &u16| matches!(self.take(queue::EVENT), Taken::One);
            let _count = (0..most).take_while(taken).count();
        }
    }

    /// Writes the events and replies that the GPU has made. Events first: a reply may promise that
    /// they were written before it.
    pub(super) fn deliver(&mut self) {
        if self.stopped.is_some() {
            // The rings may be those of another driver.
            return;
        }
        self.write_events();
        while let Some(completion) = self.gpu.next_completion() {
            match self.pending.remove(&completion.tag) {
                Some(Pending { queue, head, chain }) => {
                    if let Some(count) = self.outstanding.get_mut(usize::from(queue)) {
                        *count = count.saturating_sub(1);
                    }
                    self.reply(queue, head, &chain, &completion.reply);
                }
                None => log::error!(
                    "the GPU answers request {}, which nobody made",
                    completion.tag
                ),
            }
        }
    }

    /// The rings whose driver waits for an interrupt, to be sent when the lock is released.
    pub(super) fn take_interrupts(&mut self) -> [Option<Ring>; QUEUES] {
        let mut due = [const { None }; QUEUES];
        for (index, slot) in due.iter_mut().enumerate() {
            let Some(ring) = self.rings[index].as_mut() else {
                continue;
            };
            let result = ring.interrupt_is_due(&self.memory);
            if self.check_ring(index as u16, result) == Some(true) {
                self.stats.interrupts += 1;
                slot.clone_from(&self.rings[index]);
            }
        }
        due
    }

    fn ring(&self, index: u16) -> Option<&Ring> {
        self.rings.get(usize::from(index))?.as_ref()
    }

    fn dispatch(&mut self, index: u16, available: Available) -> Result<(), BadChain> {
        let head = available.head_index();
        let (least_writable, outstanding) = match index {
            queue::CONTROL => (
                size_of::<control::Reply>(),
                self.outstanding[usize::from(index)],
            ),
            queue::SUBMIT => (
                size_of::<submit::Reply>(),
                self.outstanding[usize::from(index)],
            ),
            _ => (EVENT_SIZE, self.event_buffers.len()),
        };
        if outstanding >= self.ring(index).map_or(0, |ring| usize::from(ring.size())) {
            return Err(BadChain::TooManyOutstanding);
        }
        let chain = Chain::walk(available, &self.memory, least_writable)?;
        match index {
            queue::CONTROL => self.request(Queue::Control, index, head, chain),
            queue::SUBMIT => self.request(Queue::Submit, index, head, chain),
            _ => {
                self.stats.event_buffers += 1;
                self.event_buffers.push_back((head, chain));
                self.gpu.post_event_buffers(1);
                Ok(())
            }
        }
    }

    fn request(
        &mut self,
        queue: Queue,
        index: u16,
        head: u16,
        chain: Chain,
    ) -> Result<(), BadChain> {
        // One byte more than allowed is enough for the GPU to refuse the whole.
        let request = chain.read(&self.memory, self.max_request.saturating_add(1))?;
        let tag = self.next_tag;
        self.next_tag += 1;
        let outcome = match queue {
            Queue::Control => {
                self.stats.control_requests += 1;
                self.gpu.control(&request, tag)
            }
            Queue::Submit => {
                self.stats.submit_requests += 1;
                self.gpu.submit(&request, tag, &self.memory)
            }
        };
        match outcome {
            Outcome::Done(reply) => {
                self.deliver();
                self.reply(index, head, &chain, &reply);
            }
            Outcome::Pending => {
                self.outstanding[usize::from(index)] += 1;
                self.pending.insert(
                    tag,
                    Pending {
                        queue: index,
                        head,
                        chain,
                    },
                );
            }
        }
        Ok(())
    }

    fn reply(&mut self, index: u16, head: u16, chain: &Chain, reply: &[u8]) {
        match chain.write(&self.memory, reply) {
            Ok(written) => self.give_back(index, head, written),
            Err(why) => self.give_back_bad(index, head, why),
        }
    }

    fn write_events(&mut self) {
        while let Some(event) = self.gpu.first_event() {
            // There is one for each event, unless the guest's memory has changed since they were
            // posted, when they were checked. Then the event waits for the next.
            let Some((head, chain)) = self.event_buffers.pop_front() else {
                break;
            };
            match chain.write(&self.memory, event) {
                Ok(written) => {
                    let _written = self.gpu.next_event();
                    self.stats.events += 1;
                    self.give_back(queue::EVENT, head, written);
                }
                Err(why) => {
                    self.gpu.lose_event_buffer();
                    self.give_back_bad(queue::EVENT, head, why);
                }
            }
        }
    }

    fn give_back_bad(&mut self, index: u16, head: u16, why: BadChain) {
        self.stats.bad_chains += 1;
        self.bad_chain_log
            .warn(|| format!("chain {head} of queue {index} cannot be answered: {why}"));
        self.gpu.report_bad_descriptor(index);
        self.give_back(index, head, 0);
    }

    fn give_back(&mut self, index: u16, head: u16, written: u32) {
        let Some(Some(ring)) = self.rings.get_mut(usize::from(index)) else {
            return;
        };
        if ring.is_running() {
            let result = ring.give_back(&self.memory, head, written);
            self.check_ring(index, result);
        } else {
            self.held.push((index, head, written));
        }
    }

    fn check_ring<T>(&mut self, index: u16, result: Result<T, virtio_queue::Error>) -> Option<T> {
        result
            .inspect_err(|error| {
                self.stats.bad_rings += 1;
                self.bad_ring_log
                    .warn(|| format!("the driver broke queue {index}: {error}"));
                self.gpu.report_bad_descriptor(index);
            })
            .ok()
    }
}
