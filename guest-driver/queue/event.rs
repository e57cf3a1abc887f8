// SPDX-License-Identifier: GPL-2.0
//! The event queue: buffers for the device to fill, and what it wrote (hardware manual, chapter 6).
//!
//! The buffers are as many as the ring takes; that number is the size of the GPU's fault buffer.
//!
//! Locking: one interrupt-safe spinlock, held for no other.

use crate::kapi::{
    spinlock_irq::{new_spinlock_irq, SpinLockIrq},
    virtqueue::{QueueHandler, Queues, Transfer, Virtqueue},
};
use farfault_protocol::event::{
    ErrorEvent, EventHeader, EventKind, FaultEvent, FenceEvent, EVENT_SIZE,
};
use kernel::prelude::*;
use zerocopy::FromBytes;

/// What the device wrote to one buffer.
pub(crate) enum Event {
    Fault(FaultEvent),
    Fence(FenceEvent),
    Error(ErrorEvent),
    /// Nothing that this driver knows.
    Unknown,
}

impl Event {
    fn parse(bytes: &[u8]) -> Self {
        fn read<T: FromBytes>(bytes: &[u8], event: impl FnOnce(T) -> Event) -> Event {
            T::read_from_bytes(bytes).map_or(Event::Unknown, event)
        }
        let Ok((header, _)) = EventHeader::read_from_prefix(bytes) else {
            return Self::Unknown;
        };
        match EventKind::from_raw(header.kind.get()) {
            Some(EventKind::Fault) => read(bytes, Self::Fault),
            Some(EventKind::Fence) => read(bytes, Self::Fence),
            Some(EventKind::Error) => read(bytes, Self::Error),
            None => Self::Unknown,
        }
    }
}

/// The event queue's ring.
#[pin_data]
pub(crate) struct Events {
    #[pin]
    ring: SpinLockIrq<Option<Virtqueue<()>>>,
}

impl Events {
    /// A queue without a ring: nothing comes.
    pub(crate) fn new() -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            ring <- new_spinlock_irq!(None),
        })
    }

    /// Takes the ring over from the bus, at probe, and fills it with buffers. Returns how many.
    pub(crate) fn open<H: QueueHandler, const N: usize>(
        &self,
        queues: &Queues<'_, H, N>,
        index: u16,
    ) -> Result<usize> {
        let mut queue = queues.queue::<()>(index.into())?;
        let mut posted = 0;
        while queue.free() > 0 {
            let buffer = Transfer::new(0, EVENT_SIZE, (), GFP_KERNEL)?;
            if queue.add(buffer).is_err() {
                break;
            }
            posted += 1;
        }
        *self.ring.lock() = Some(queue);
        if posted == 0 {
            return Err(ENOSPC);
        }
        Ok(posted)
    }

    /// Tells the device about the buffers posted since the last time.
    pub(crate) fn kick(&self) {
        let mut ring = self.ring.lock();
        let notifier = match &mut *ring {
            Some(queue) => queue.kick_prepare().then(|| queue.notifier()),
            None => None,
        };
        drop(ring);
        if let Some(notifier) = notifier {
            // It fails only where the queue is broken, and then nothing comes any more.
            let _ = notifier.notify();
        }
    }

    /// The next event; its buffer is posted again. `None`: there is none now.
    pub(crate) fn next(&self) -> Option<Event> {
        let mut ring = self.ring.lock();
        let Some(queue) = &mut *ring else {
            return None;
        };
        let buffer = queue.take()?;
        let event = Event::parse(buffer.reply());
        // A broken queue refuses it; then the buffer is simply freed.
        let refused = queue.add(buffer).err();
        drop(ring);
        drop(refused);
        Some(event)
    }

    /// After the device was reset: frees the buffers.
    pub(crate) fn close(&self) {
        loop {
            let buffer = match &mut *self.ring.lock() {
                Some(queue) => queue.detach_unused(),
                None => None,
            };
            if buffer.is_none() {
                break;
            }
        }
        let ring = self.ring.lock().take();
        drop(ring);
    }
}
