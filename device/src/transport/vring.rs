// SPDX-License-Identifier: MIT OR Apache-2.0
//! The crate's vring, with a kick that cannot end its queue's thread.
//!
//! `vhost-user-backend` (0.24) learns from epoll that a ring was kicked and then reads the kick's
//! file descriptor; if there is nothing to read, the queue's thread ends. That happens when the front
//! end replaces the descriptor in between, as it does at every reset of the guest's driver. Here an
//! empty kick is no error. Nor does a kick or an interrupt block, whatever file the front end sent for
//! it. And the crate does not tell when the front end starts a ring again that it had stopped; here the
//! device is told.
//!
//! A front end takes the descriptor for interrupts away when it stops a ring, and gives one when the ring
//! goes on: an interrupt that was due in between went nowhere. So whoever is given to hear interrupts
//! hears one at once. A driver looks at its ring then, and finds nothing at worst. All else is the
//! crate's.

use super::Device;
use std::{
    fs::File,
    io,
    sync::{Arc, OnceLock, Weak},
};
use vhost_user_backend::{VringMutex, VringState, VringStateGuard, VringStateMutGuard, VringT};
use virtio_queue::Error;
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};

type Memory = GuestMemoryAtomic<GuestMemoryMmap>;

/// The state of one queue, shared by the threads that need it.
#[derive(Clone)]
pub(super) struct Vring(VringMutex, Arc<OnceLock<Weak<Device>>>);

impl Vring {
    /// Who is told when the ring is started again.
    pub(super) fn belongs_to(&self, device: &Arc<Device>) {
        self.1.get_or_init(|| Arc::downgrade(device));
    }
}

impl<'a> VringStateGuard<'a, Memory> for Vring {
    type G = <VringMutex as VringStateGuard<'a, Memory>>::G;
}

impl<'a> VringStateMutGuard<'a, Memory> for Vring {
    type G = <VringMutex as VringStateMutGuard<'a, Memory>>::G;
}

impl VringT<Memory> for Vring {
    fn new(memory: Memory, max_queue_size: u16) -> Result<Self, Error> {
        VringMutex::new(memory, max_queue_size).map(|vring| Self(vring, Arc::default()))
    }

    fn set_kick(&self, file: Option<File>) {
        self.0.set_kick(file.and_then(non_blocking));
    }

    fn read_kick(&self) -> io::Result<bool> {
        match self.0.read_kick() {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                Ok(VringState::is_enabled(&self.0.get_ref()))
            }
            result => result,
        }
    }

    fn get_ref(&self) -> <Self as VringStateGuard<'_, Memory>>::G {
        self.0.get_ref()
    }

    fn get_mut(&self) -> <Self as VringStateMutGuard<'_, Memory>>::G {
        self.0.get_mut()
    }

    fn add_used(&self, head: u16, length: u32) -> Result<(), Error> {
        self.0.add_used(head, length)
    }

    fn signal_used_queue(&self) -> io::Result<()> {
        self.0.signal_used_queue()
    }

    fn enable_notification(&self) -> Result<bool, Error> {
        self.0.enable_notification()
    }

    fn disable_notification(&self) -> Result<(), Error> {
        self.0.disable_notification()
    }

    fn needs_notification(&self) -> Result<bool, Error> {
        self.0.needs_notification()
    }

    fn set_enabled(&self, enabled: bool) {
        self.0.set_enabled(enabled);
        if let (true, Some(device)) = (enabled, self.1.get().and_then(Weak::upgrade)) {
            device.ring_started();
        }
    }

    fn set_queue_info(&self, descriptors: u64, available: u64, used: u64) -> Result<(), Error> {
        self.0.set_queue_info(descriptors, available, used)
    }

    fn queue_next_avail(&self) -> u16 {
        self.0.queue_next_avail()
    }

    fn set_queue_next_avail(&self, base: u16) {
        self.0.set_queue_next_avail(base);
    }

    fn set_queue_next_used(&self, index: u16) {
        self.0.set_queue_next_used(index);
    }

    fn queue_used_idx(&self) -> Result<u16, Error> {
        self.0.queue_used_idx()
    }

    fn set_queue_size(&self, size: u16) {
        self.0.set_queue_size(size);
    }

    fn set_queue_event_idx(&self, enabled: bool) {
        self.0.set_queue_event_idx(enabled);
    }

    fn set_queue_ready(&self, ready: bool) {
        self.0.set_queue_ready(ready);
    }

    fn set_call(&self, file: Option<File>) {
        self.0.set_call(file.and_then(non_blocking));
        match self.signal_used_queue() {
            // It is full: there is an interrupt in it already.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => log::warn!("cannot interrupt the guest: {error}"),
            Ok(()) => {}
        }
    }

    fn set_err(&self, file: Option<File>) {
        self.0.set_err(file);
    }
}

/// The file, if it can be made such that neither reading nor writing waits.
fn non_blocking(file: File) -> Option<File> {
    match rustix::io::ioctl_fionbio(&file, true) {
        Ok(()) => Some(file),
        Err(error) => {
            log::warn!("a file for kicks or interrupts is none that can be used: {error}");
            None
        }
    }
}
