// SPDX-License-Identifier: MIT OR Apache-2.0
//! The driver's half of a split virtqueue with `EVENT_IDX`, small and able to lie.

use crate::guest::{DEADLINE, GUEST_BASE};
use std::{
    os::fd::AsRawFd,
    sync::atomic::{Ordering, fence},
    time::{Duration, Instant},
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::{
    epoll::{ControlOperation, Epoll, EpollEvent, EventSet},
    eventfd::{EFD_NONBLOCK, EventFd},
};

pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;
pub(crate) const INDIRECT: u16 = 4;

/// Room of a ring's three parts.
const PART: u64 = 0x4000;

/// A descriptor, as the device reads it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Descriptor {
    pub(crate) address: u64,
    pub(crate) length: u32,
    pub(crate) flags: u16,
    pub(crate) next: u16,
}

impl Descriptor {
    pub(crate) fn bytes(self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.address.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.length.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.flags.to_le_bytes());
        bytes[14..].copy_from_slice(&self.next.to_le_bytes());
        bytes
    }
}

pub(crate) struct Ring {
    memory: GuestMemoryMmap,
    base: u64,
    pub(crate) size: u16,
    free: Vec<u16>,
    avail: u16,
    used: u16,
    pub(crate) kick: EventFd,
    pub(crate) call: EventFd,
    interrupts: Epoll,
}

impl Ring {
    pub(crate) fn new(memory: &GuestMemoryMmap, index: u64, size: u16) -> Self {
        let ring = Self {
            memory: memory.clone(),
            base: GUEST_BASE + index * 3 * PART,
            size,
            free: (0..size).rev().collect(),
            avail: 0,
            used: 0,
            kick: EventFd::new(EFD_NONBLOCK).expect("an eventfd"),
            call: EventFd::new(EFD_NONBLOCK).expect("an eventfd"),
            interrupts: Epoll::new().expect("an epoll"),
        };
        ring.interrupts
            .ctl(
                ControlOperation::Add,
                ring.call.as_raw_fd(),
                EpollEvent::new(EventSet::IN, 0),
            )
            .expect("the eventfd can be waited for");
        ring.memory
            .write_slice(&vec![0; 3 * PART as usize], GuestAddress(ring.base))
            .expect("the ring is in RAM");
        ring
    }

    pub(crate) fn descriptors(&self) -> u64 {
        self.base
    }

    pub(crate) fn available(&self) -> u64 {
        self.base + PART
    }

    pub(crate) fn used(&self) -> u64 {
        self.base + 2 * PART
    }

    /// A descriptor that no chain uses.
    pub(crate) fn allocate(&mut self) -> u16 {
        self.free.pop().expect("a free descriptor")
    }

    pub(crate) fn release(&mut self, index: u16) {
        self.free.push(index);
    }

    pub(crate) fn write_descriptor(&self, index: u16, descriptor: Descriptor) {
        let address = self.descriptors() + 16 * u64::from(index);
        self.memory
            .write_slice(&descriptor.bytes(), GuestAddress(address))
            .expect("in RAM");
    }

    /// Makes the chain that begins at `head` available, and kicks if the device wants that.
    pub(crate) fn offer(&mut self, head: u16) {
        let slot = self.available() + 4 + 2 * u64::from(self.avail % self.size);
        self.store(slot, head);
        let old = self.avail;
        self.avail = old.wrapping_add(1);
        self.store(self.available() + 2, self.avail);
        fence(Ordering::SeqCst);
        let event = self.load(self.used() + 4 + 8 * u64::from(self.size));
        if self.avail.wrapping_sub(event).wrapping_sub(1) < self.avail.wrapping_sub(old) {
            self.kick();
        }
    }

    pub(crate) fn kick(&self) {
        self.kick.write(1).expect("a kick");
    }

    /// Claims that the available index is `index`.
    pub(crate) fn set_available_index(&mut self, index: u16) {
        self.store(self.available() + 2, index);
    }

    pub(crate) fn available_index(&self) -> u16 {
        self.avail
    }

    /// The next chain that the device gave back, if there is one now: head and length.
    pub(crate) fn try_used(&mut self) -> Option<(u16, u32)> {
        if self.load(self.used() + 2) == self.used {
            return None;
        }
        fence(Ordering::Acquire);
        let slot = self.used() + 4 + 8 * u64::from(self.used % self.size);
        let head: u32 = self.memory.read_obj(GuestAddress(slot)).expect("in RAM");
        let length: u32 = self
            .memory
            .read_obj(GuestAddress(slot + 4))
            .expect("in RAM");
        self.used = self.used.wrapping_add(1);
        Some((u16::try_from(head).expect("an index"), length))
    }

    /// Waits for the interrupt of the next chain that the device gives back.
    pub(crate) fn wait_used(&mut self) -> (u16, u32) {
        self.wait_used_for(DEADLINE)
            .unwrap_or_else(|| panic!("no answer within {DEADLINE:?}"))
    }

    /// As [`Self::wait_used`], but it may come to nothing.
    pub(crate) fn wait_used_for(&mut self, limit: Duration) -> Option<(u16, u32)> {
        let deadline = Instant::now() + limit;
        loop {
            // Ask for an interrupt for the very next one, then look again, as drivers do.
            self.store(self.available() + 4 + 2 * u64::from(self.size), self.used);
            fence(Ordering::SeqCst);
            if let Some(used) = self.try_used() {
                return Some(used);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            let milliseconds = i32::try_from(left.as_millis())
                .expect("a short time")
                .max(1);
            self.interrupts
                .wait(milliseconds, &mut [EpollEvent::default()])
                .expect("interrupts can be waited for");
            let _ = self.call.read();
        }
    }

    /// Waits for an interrupt, whether it is for something or not; whether one came.
    pub(crate) fn hears_interrupt(&self) -> bool {
        let milliseconds = i32::try_from(DEADLINE.as_millis()).expect("a short time");
        self.interrupts
            .wait(milliseconds, &mut [EpollEvent::default()])
            .expect("interrupts can be waited for");
        self.call.read().is_ok()
    }

    fn store(&self, address: u64, value: u16) {
        self.memory
            .store(value.to_le(), GuestAddress(address), Ordering::Release)
            .expect("the ring is in RAM");
    }

    fn load(&self, address: u64) -> u16 {
        let value: u16 = self
            .memory
            .load(GuestAddress(address), Ordering::Acquire)
            .expect("the ring is in RAM");
        u16::from_le(value)
    }
}
