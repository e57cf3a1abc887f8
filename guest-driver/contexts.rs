// SPDX-License-Identifier: GPL-2.0
//! Which context of the device belongs to which address space.
//!
//! Locking: one mutex, a leaf but for the jobs' when the device is lost. Who only looks takes no
//! reference ([`Contexts::with`]): the last one to an address space must not go in an invalidation
//! or in a fault.

use crate::svm::Space;
use kernel::{
    new_mutex,
    prelude::*,
    sync::{Arc, Mutex},
};

/// A context number.
enum Slot {
    Free,
    /// Being opened or closed.
    Reserved,
    Open(Arc<Space>),
}

/// All contexts of a GPU.
#[pin_data]
pub(crate) struct Contexts {
    count: u32,
    #[pin]
    slots: Mutex<KVec<Slot>>,
}

impl Contexts {
    /// `count` contexts, all free.
    pub(crate) fn new(count: u32) -> impl PinInit<Self, Error> {
        pin_init::pin_init_scope(move || {
            let mut slots = KVec::new();
            for _ in 0..count {
                slots.push(Slot::Free, GFP_KERNEL)?;
            }
            Ok(try_pin_init!(Self {
                count,
                slots <- new_mutex!(slots),
            }? Error))
        })
    }

    /// All numbers there are.
    pub(crate) fn numbers(&self) -> core::ops::Range<u32> {
        0..self.count
    }

    /// A free number. `ENOSPC`: all are in use.
    pub(crate) fn reserve(&self) -> Result<u32> {
        let mut slots = self.slots.lock();
        let free = slots.iter().position(|slot| matches!(slot, Slot::Free));
        let context = free.ok_or(ENOSPC)?;
        slots[context] = Slot::Reserved;
        Ok(context as u32)
    }

    /// Makes the address space of a reserved number known.
    pub(crate) fn publish(&self, context: u32, space: Arc<Space>) {
        if let Some(slot) = self.slots.lock().get_mut(context as usize) {
            *slot = Slot::Open(space);
        }
    }

    /// Makes a number free again.
    pub(crate) fn release(&self, context: u32) {
        let slot = match self.slots.lock().get_mut(context as usize) {
            Some(slot) => core::mem::replace(slot, Slot::Free),
            None => return,
        };
        // Outside of the lock: it may be the last reference.
        drop(slot);
    }

    /// The address space of a number.
    pub(crate) fn get(&self, context: u32) -> Option<Arc<Space>> {
        match self.slots.lock().get(context as usize)? {
            Slot::Open(space) => Some(space.clone()),
            Slot::Free | Slot::Reserved => None,
        }
    }

    /// What `look` says of the address space of a number, if there is one.
    pub(crate) fn with<R>(&self, context: u32, look: impl FnOnce(&Space) -> R) -> Option<R> {
        match self.slots.lock().get(context as usize)? {
            Slot::Open(space) => Some(look(space)),
            Slot::Free | Slot::Reserved => None,
        }
    }
}
