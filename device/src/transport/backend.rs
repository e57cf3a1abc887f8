// SPDX-License-Identifier: MIT OR Apache-2.0
//! The vhost-user back end: what the front end (QEMU) asks, in the words of the `vhost-user-backend`
//! crate. Manual, chapters 2 and 3.
//!
//! Each queue has a thread of its own, so that the control queue never waits behind a submission.
//! Knows neither commands nor the GPU's inside.
//!
//! Not offered: `RING_PACKED`; `CONFIGURE_MEM_SLOTS` (QEMU crashes with it in some combinations);
//! `INFLIGHT_SHMFD` (not in the crate); `BACKEND_REQ` and shared-memory regions (VRAM is not shown to
//! the guest's CPU).

use super::{
    Device,
    memory::{self, MemoryRule},
    queues::QUEUES,
    ring::Ring,
    vring::Vring,
};
use crate::rate_limit::RateLimit;
use farfault_protocol::command::MAX_DESCRIPTORS;
use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost_user_backend::VhostUserBackend;
use virtio_bindings::{
    virtio_config::VIRTIO_F_VERSION_1,
    virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC},
};
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use zerocopy::IntoBytes;

/// Longest ring: no longer than a chain may be, as one chain may take all of it.
const MAX_QUEUE_SIZE: usize = MAX_DESCRIPTORS;
/// `VHOST_USER_F_PROTOCOL_FEATURES`: never seen by the guest.
const PROTOCOL_FEATURES: u64 = 1 << 30;
/// The event, of each queue's thread, that ends it. The crate uses the numbers up to [`QUEUES`].
pub(super) const END_OF_SESSION: u64 = QUEUES as u64 + 1;

/// One front end's view of the device.
pub(super) struct Backend {
    device: Arc<Device>,
    memory_rule: MemoryRule,
    /// A front end spoke, and not just someone who looked whether the socket is alive.
    spoken: AtomicBool,
    config_write_log: RateLimit,
}

impl Backend {
    pub(super) fn new(device: Arc<Device>, memory_rule: MemoryRule) -> Self {
        Self {
            device,
            memory_rule,
            spoken: AtomicBool::new(false),
            config_write_log: RateLimit::default(),
        }
    }

    /// Whether a front end asked anything.
    pub(super) fn has_spoken(&self) -> bool {
        self.spoken.load(Ordering::Relaxed)
    }
}

impl VhostUserBackend for Backend {
    type Bitmap = ();
    type Vring = Vring;

    fn num_queues(&self) -> usize {
        QUEUES
    }

    fn max_queue_size(&self) -> usize {
        MAX_QUEUE_SIZE
    }

    fn features(&self) -> u64 {
        self.spoken.store(true, Ordering::Relaxed);
        (1 << VIRTIO_F_VERSION_1)
            | (1 << VIRTIO_RING_F_INDIRECT_DESC)
            | (1 << VIRTIO_RING_F_EVENT_IDX)
            | PROTOCOL_FEATURES
    }

    fn acked_features(&self, features: u64) {
        log::debug!("the driver accepts features {features:#x}");
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::REPLY_ACK
    }

    /// The rings know it themselves.
    fn set_event_idx(&self, _enabled: bool) {}

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let range = offset as usize..offset.saturating_add(size) as usize;
        self.device
            .config()
            .as_bytes()
            .get(range)
            .unwrap_or_default()
            .to_vec()
    }

    /// The configuration space is read-only. An error would end the connection, and with it the VM's
    /// device: not something that a write of the guest may do.
    fn set_config(&self, offset: u32, data: &[u8]) -> io::Result<()> {
        self.config_write_log.warn(|| {
            format!(
                "the guest writes {} bytes to its configuration space at {offset}: ignored",
                data.len()
            )
        });
        Ok(())
    }

    fn update_memory(&self, memory: GuestMemoryAtomic<GuestMemoryMmap>) -> io::Result<()> {
        let memory = memory.memory().into_inner();
        log::debug!(
            "the guest's memory has {} regions",
            vm_memory::GuestMemoryBackend::num_regions(&*memory)
        );
        memory::check(&memory, self.memory_rule)?;
        self.device.set_memory(memory)
    }

    fn queues_per_thread(&self) -> Vec<u64> {
        (0..QUEUES).map(|index| 1 << index).collect()
    }

    fn stop_vring(&self, index: u32) -> io::Result<()> {
        log::debug!("queue {index} is stopped");
        self.device.ring_stopped()
    }

    fn handle_event(
        &self,
        event: u16,
        _events: EventSet,
        vrings: &[Vring],
        thread: usize,
    ) -> io::Result<()> {
        if u64::from(event) == END_OF_SESSION {
            // An error is the crate's way to end the thread.
            return Err(io::Error::other("the front end is gone"));
        }
        // Each thread has one queue, with the thread's number.
        let (Ok(index), Some(vring)) = (u16::try_from(thread), vrings.first()) else {
            return Ok(());
        };
        vring.belongs_to(&self.device);
        self.device.attach(index, || Ring::new(vring.clone()));
        // A front end may leave rings enabled while they are stopped.
        self.device.leave_halt();
        self.device.serve(index);
        Ok(())
    }
}
