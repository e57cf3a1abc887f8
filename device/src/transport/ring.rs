// SPDX-License-Identifier: MIT OR Apache-2.0
//! One virtqueue, as the rest of the transport sees it: manual, chapter 3.
//!
//! All of it is called with the lock of [`super::Device`] held, so that a ring that was stopped under
//! that lock is not touched afterwards. The vring's own lock inside only orders this against the
//! vhost-user thread, which changes addresses and file descriptors.
//!
//! The memory is always the caller's: the vring has one of its own, which the front end replaces before
//! anybody has checked it.

use super::vring::Vring;
use crate::rate_limit::RateLimit;
use std::{io, sync::Arc};
use vhost_user_backend::VringT;
use virtio_queue::{DescriptorChain, Error, QueueOwnedT, QueueT};
use vm_memory::GuestMemoryMmap;

/// One queue.
#[derive(Clone)]
pub(super) struct Ring {
    vring: Vring,
    /// Chains given back since the last look at whether the driver wants an interrupt.
    given_back: bool,
}

/// A chain that the driver made available.
pub(super) type Available = DescriptorChain<Arc<GuestMemoryMmap>>;

impl Ring {
    /// The ring behind `vring`.
    pub(super) fn new(vring: Vring) -> Self {
        Self {
            vring,
            given_back: false,
        }
    }

    /// Whether the front end runs the ring.
    pub(super) fn is_running(&self) -> bool {
        let vring = self.vring.get_ref();
        vring.is_enabled() && vring.get_queue().ready()
    }

    /// How many descriptors the ring has: no driver can have more chains outstanding.
    pub(super) fn size(&self) -> u16 {
        self.vring.get_ref().get_queue().size()
    }

    /// How far chains were taken, as the front end is told when it stops the ring, and tells when it
    /// starts it again.
    pub(super) fn base(&self) -> u16 {
        self.vring.queue_next_avail()
    }

    /// The next chain, if there is one and the ring runs.
    ///
    /// An error means that the ring's own indices make no sense or that it is not in RAM: nothing
    /// can be returned to the driver, and only a further kick is a reason to look again.
    pub(super) fn pop(&self, memory: &Arc<GuestMemoryMmap>) -> Result<Option<Available>, Error> {
        if !self.is_running() {
            return Ok(None);
        }
        let mut vring = self.vring.get_mut();
        let next = vring.get_queue_mut().iter(Arc::clone(memory))?.next();
        Ok(next)
    }

    /// Gives chain `head` of a ring that runs back, `written` bytes of it written.
    pub(super) fn give_back(
        &mut self,
        memory: &GuestMemoryMmap,
        head: u16,
        written: u32,
    ) -> Result<(), Error> {
        // The ring would refuse it too, but would log each time.
        if head >= self.size() {
            return Err(Error::InvalidDescriptorIndex);
        }
        let mut vring = self.vring.get_mut();
        vring.get_queue_mut().add_used(memory, head, written)?;
        drop(vring);
        self.given_back = true;
        Ok(())
    }

    /// Whether the driver wants an interrupt for what was given back since the last call.
    pub(super) fn interrupt_is_due(&mut self, memory: &GuestMemoryMmap) -> Result<bool, Error> {
        // A ring that does not run keeps it: its driver is told when it runs again.
        if !self.is_running() || !std::mem::take(&mut self.given_back) {
            return Ok(false);
        }
        let mut vring = self.vring.get_mut();
        vring.get_queue_mut().needs_notification(memory)
    }

    /// Interrupts the driver. Needs no lock.
    pub(super) fn interrupt(&self, log: &RateLimit) {
        match self.vring.signal_used_queue() {
            // It is full: the guest has not taken what it was told before.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => log.warn(|| format!("cannot interrupt the guest: {error}")),
            Ok(()) => {}
        }
    }

    /// Tells the driver that it need not kick.
    pub(super) fn disable_kicks(&self, memory: &GuestMemoryMmap) -> Result<(), Error> {
        if self.is_running() {
            let mut vring = self.vring.get_mut();
            vring.get_queue_mut().disable_notification(memory)
        } else {
            Ok(())
        }
    }

    /// Asks for kicks again; whether chains arrived meanwhile, whose kick may be missing.
    pub(super) fn enable_kicks(&self, memory: &GuestMemoryMmap) -> Result<bool, Error> {
        if self.is_running() {
            let mut vring = self.vring.get_mut();
            vring.get_queue_mut().enable_notification(memory)
        } else {
            Ok(false)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{
        io::Read,
        os::{fd::OwnedFd, unix::net::UnixStream},
    };
    use vm_memory::{GuestAddress, GuestMemoryAtomic};

    const SIZE: u16 = 16;

    fn memory() -> GuestMemoryMmap {
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap()
    }

    fn ring(memory: &GuestMemoryMmap) -> Ring {
        let vring = Vring::new(GuestMemoryAtomic::new(memory.clone()), SIZE).unwrap();
        vring.set_queue_size(SIZE);
        vring.set_queue_info(0x1000, 0x2000, 0x3000).unwrap();
        vring.set_queue_event_idx(true);
        vring.set_queue_ready(true);
        vring.set_enabled(true);
        Ring::new(vring)
    }

    #[test]
    fn interrupt_that_finds_the_ring_stopped_comes_when_it_goes_on() {
        let memory = memory();
        let mut ring = ring(&memory);
        ring.give_back(&memory, 0, 0).unwrap();
        assert!(ring.interrupt_is_due(&memory).unwrap());
        // The front end stops the ring before the interrupt is sent.
        ring.vring.set_queue_ready(false);
        ring.vring.set_call(None);
        ring.interrupt(&RateLimit::default());
        let (mut driver, call) = UnixStream::pair().unwrap();
        ring.vring.set_call(Some(OwnedFd::from(call).into()));
        ring.vring.set_queue_ready(true);
        driver.set_nonblocking(true).unwrap();
        driver.read_exact(&mut [0; 8]).expect("an interrupt");
    }

    #[test]
    fn ring_that_is_stopped_before_it_asks_for_an_interrupt_asks_later() {
        let memory = memory();
        let mut ring = ring(&memory);
        ring.give_back(&memory, 0, 0).unwrap();
        ring.vring.set_enabled(false);
        assert!(!ring.interrupt_is_due(&memory).unwrap());
        ring.vring.set_enabled(true);
        assert!(ring.interrupt_is_due(&memory).unwrap());
        assert!(!ring.interrupt_is_due(&memory).unwrap());
    }
}
