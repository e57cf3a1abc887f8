// SPDX-License-Identifier: MIT OR Apache-2.0
//! A front end in the same process and thread, without a socket: for tests that do to the device what
//! a guest and its QEMU may do, thousands of times in a second.
//!
//! It calls what `vhost-user-backend` calls when messages come, and does the workers' work when it is
//! told to. What that crate checks in messages themselves is not here.

use super::{Device, MemoryRule, backend::Backend, vring::Vring};
use crate::gpu::Gpu;
use farfault_protocol::config::queue;
use std::{io, sync::Arc};
use vhost_user_backend::{VhostUserBackend, VringT};
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;

/// Where a ring is, in the guest's RAM.
#[derive(Clone, Copy, Debug)]
pub struct RingPlace {
    /// Number of descriptors.
    pub size: u16,
    /// Address of the descriptor table.
    pub descriptors: u64,
    /// Address of the ring of available chains.
    pub available: u64,
    /// Address of the ring of used chains.
    pub used: u64,
    /// Index of the first chain.
    pub base: u16,
}

/// A device and its front end.
pub struct Local {
    device: Arc<Device>,
    backend: Backend,
    memory: GuestMemoryAtomic<GuestMemoryMmap>,
    vrings: Vec<Vring>,
}

impl Local {
    /// A device with this GPU and no workers, for a guest without RAM.
    pub fn new(gpu: Gpu) -> Result<Self, virtio_queue::Error> {
        let device = Arc::new(Device::new(gpu));
        device.welcome();
        let backend = Backend::new(Arc::clone(&device), MemoryRule::Sealed);
        let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
        let most = u16::try_from(backend.max_queue_size()).unwrap_or(u16::MAX);
        let vrings = (0..queue::COUNT).map(|_| Vring::new(memory.clone(), most));
        Ok(Self {
            vrings: vrings.collect::<Result<_, _>>()?,
            device,
            backend,
            memory,
        })
    }

    /// Gives the guest other RAM: `SET_MEM_TABLE`.
    pub fn set_memory(&self, memory: GuestMemoryMmap) -> io::Result<()> {
        match self.memory.lock() {
            Ok(guard) => guard.replace(memory),
            Err(_) => return Err(io::Error::other("the memory's lock is poisoned")),
        }
        // Not by the back end, which wants files.
        self.device.set_memory(self.memory.memory().into_inner())
    }

    /// Sets up and starts a ring. Refused if an address is one that no ring may have.
    pub fn start(&self, queue: u16, place: RingPlace) -> Result<(), virtio_queue::Error> {
        let Some(vring) = self.vrings.get(usize::from(queue)) else {
            return Err(virtio_queue::Error::QueueNotReady);
        };
        vring.set_queue_size(place.size);
        vring.set_queue_info(place.descriptors, place.available, place.used)?;
        vring.set_queue_next_used(vring.queue_used_idx()?);
        vring.set_queue_next_avail(place.base);
        vring.set_queue_event_idx(true);
        vring.set_queue_ready(true);
        vring.set_enabled(true);
        Ok(())
    }

    /// Stops a ring: `GET_VRING_BASE`.
    pub fn stop(&self, queue: u16) -> io::Result<()> {
        if let Some(vring) = self.vrings.get(usize::from(queue)) {
            vring.set_queue_ready(false);
        }
        self.backend.stop_vring(u32::from(queue))
    }

    /// What the device does after a kick.
    pub fn kick(&self, queue: u16) -> io::Result<()> {
        match self.vrings.get(usize::from(queue)..=usize::from(queue)) {
            Some(vring) => self
                .backend
                .handle_event(0, EventSet::IN, vring, queue.into()),
            None => Ok(()),
        }
    }

    /// Does one thing that a worker would do; whether there was one.
    pub fn work(&self) -> bool {
        self.device.work_once()
    }

    /// The front end goes away, and another comes.
    pub fn disconnect(&self) -> io::Result<()> {
        for vring in &self.vrings {
            vring.set_queue_ready(false);
            vring.set_enabled(false);
        }
        self.device.detach()?;
        self.device.welcome();
        Ok(())
    }

    /// Reads the configuration space: `GET_CONFIG`.
    pub fn read_config(&self, offset: u32, size: u32) -> Vec<u8> {
        self.backend.get_config(offset, size)
    }

    /// Writes to it: `SET_CONFIG`.
    pub fn write_config(&self, offset: u32, bytes: &[u8]) -> io::Result<()> {
        self.backend.set_config(offset, bytes)
    }

    /// Looks at the GPU.
    pub fn look<R>(&self, at: impl FnOnce(&Gpu) -> R) -> R {
        self.device.look(at)
    }
}
