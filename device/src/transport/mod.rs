// SPDX-License-Identifier: MIT OR Apache-2.0
//! The GPU as a virtio device behind QEMU's generic vhost-user device: manual, chapters 2 and 3.
//!
//! | part | what it does | what it must not know |
//! | --- | --- | --- |
//! | `chain` | walks and copies one descriptor chain | commands, the GPU |
//! | `vring` | the crate's virtqueue, made safe against a race of kicks | everything else |
//! | `ring` | one virtqueue: take, give back, interrupt | commands, the GPU |
//! | `memory` | which memory tables can be used | rings, requests |
//! | `queues` | carries requests, replies and events between rings and GPU | threads, sockets |
//! | `device` | the lock, the threads, waiting for quiet | descriptors, vhost-user |
//! | `backend` | what the front end may ask | the GPU's inside |
//! | `session` | one front end, from its connection to its end | everything above but `device` |
//! | `local` | a front end without a socket, for tests | sockets, threads |
//!
//! The GPU never calls into this module: it is asked for work, events and completions.

mod backend;
mod chain;
mod device;
pub mod local;
mod memory;
mod queues;
mod ring;
mod session;
mod vring;

pub use device::{Device, Workers};
pub use memory::MemoryRule;
pub use queues::TransportStats;
pub use session::{Ended, Session, SessionError};
