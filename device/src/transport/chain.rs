// SPDX-License-Identifier: MIT OR Apache-2.0
//! One descriptor chain of the driver, copied and checked: manual, chapter 3.
//!
//! A chain is walked once and its readable bytes are copied once; afterwards nothing that the guest
//! writes can change what was checked. Knows nothing of the commands inside.
//!
//! What counts as a bad chain: it ends before its last descriptor (a loop, an index beyond the
//! queue, a table outside of RAM), has more than [`MAX_DESCRIPTORS`], has a readable
//! descriptor behind a writable one, touches an address outside of RAM, or has no room for a reply.
//! A request that is merely too long is no bad chain: it can be answered.

use farfault_protocol::command::MAX_DESCRIPTORS;
use std::ops::Deref;
use virtio_queue::DescriptorChain;
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap, Permissions};

/// Why a chain cannot be answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum BadChain {
    /// It breaks off: a loop, or a link or table that leads nowhere.
    #[error("it is empty, loops or breaks off")]
    Broken,
    /// More than [`MAX_DESCRIPTORS`].
    #[error("it has too many descriptors")]
    TooManyDescriptors,
    /// The device reads first and writes last.
    #[error("a readable descriptor follows a writable one")]
    Order,
    /// An address is not RAM.
    #[error("it leads outside of RAM")]
    OutsideRam,
    /// More chains than the ring has descriptors.
    #[error("the driver has more chains outstanding than the queue has descriptors")]
    TooManyOutstanding,
    /// Too few writable bytes for the reply.
    #[error("it has no room for the reply")]
    NoRoom,
}

/// A chain's shape: what to read and what to write.
#[derive(Debug)]
pub(super) struct Chain {
    readable: Vec<Segment>,
    readable_bytes: u64,
    writable: Vec<Segment>,
    writable_bytes: u64,
}

/// A contiguous piece of guest RAM, checked to be there in one memory table.
#[derive(Clone, Copy, Debug)]
struct Segment {
    address: GuestAddress,
    length: u32,
}

impl Chain {
    /// Walks `chain`. It must have `least_writable` bytes for the device to write.
    pub(super) fn walk<M>(
        chain: DescriptorChain<M>,
        memory: &GuestMemoryMmap,
        least_writable: usize,
    ) -> Result<Self, BadChain>
    where
        M: Deref,
        M::Target: GuestMemory,
    {
        let mut this = Self {
            readable: Vec::new(),
            readable_bytes: 0,
            writable: Vec::new(),
            writable_bytes: 0,
        };
        // The iterator ends silently where a chain breaks off: then the last descriptor that it
        // gave promised another one.
        let mut complete = false;
        for (index, descriptor) in chain.enumerate() {
            if index == MAX_DESCRIPTORS {
                return Err(BadChain::TooManyDescriptors);
            }
            complete = !descriptor.has_next();
            let segment = Segment {
                address: descriptor.addr(),
                length: descriptor.len(),
            };
            if segment.length == 0 {
                continue;
            }
            let bytes = u64::from(segment.length);
            let (access, segments, sum) = if descriptor.is_write_only() {
                (
                    Permissions::Write,
                    &mut this.writable,
                    &mut this.writable_bytes,
                )
            } else if this.writable.is_empty() {
                (
                    Permissions::Read,
                    &mut this.readable,
                    &mut this.readable_bytes,
                )
            } else {
                return Err(BadChain::Order);
            };
            if !memory.check_range(segment.address, segment.length as usize, access) {
                return Err(BadChain::OutsideRam);
            }
            segments.push(segment);
            *sum += bytes;
        }
        if !complete {
            return Err(BadChain::Broken);
        }
        if this.writable_bytes < least_writable as u64 {
            return Err(BadChain::NoRoom);
        }
        Ok(this)
    }

    /// Copies what the driver wrote, `limit` bytes at most.
    pub(super) fn read(&self, memory: &GuestMemoryMmap, limit: usize) -> Result<Vec<u8>, BadChain> {
        let length = usize::try_from(self.readable_bytes)
            .unwrap_or(usize::MAX)
            .min(limit);
        let mut bytes = vec![0; length];
        let mut rest = bytes.as_mut_slice();
        for segment in &self.readable {
            let part = rest.len().min(segment.length as usize);
            let (part, tail) = rest.split_at_mut(part);
            memory
                .read_slice(part, segment.address)
                .map_err(|_| BadChain::OutsideRam)?;
            rest = tail;
        }
        Ok(bytes)
    }

    /// Writes `bytes` to the writable part, all of them or nothing.
    pub(super) fn write(&self, memory: &GuestMemoryMmap, bytes: &[u8]) -> Result<u32, BadChain> {
        let length = u32::try_from(bytes.len()).map_err(|_| BadChain::NoRoom)?;
        if self.writable_bytes < u64::from(length) {
            return Err(BadChain::NoRoom);
        }
        let mut rest = bytes;
        for segment in &self.writable {
            let (part, tail) = rest.split_at(rest.len().min(segment.length as usize));
            memory
                .write_slice(part, segment.address)
                .map_err(|_| BadChain::OutsideRam)?;
            rest = tail;
        }
        Ok(length)
    }
}
