// SPDX-License-Identifier: GPL-2.0
//! A word of the kernel that a device reads whenever it likes.
//!
//! Locks: none. Whoever owns it sees to it that the device is done before it is dropped.
//!
//! C header: `include/linux/vmalloc.h`.

use super::folio::Pfn;
use crate::bindings;
use kernel::{
    page::AsPageIter,
    prelude::*,
    sync::atomic::{Atomic, Release},
};

/// A word at the begin of a page of its own.
pub(crate) struct SharedWord {
    word: VBox<Atomic<u32>>,
    frame: Pfn,
}

impl SharedWord {
    /// A word with this value.
    pub(crate) fn new(value: u32) -> Result<Self> {
        let mut word = VBox::new(Atomic::new(value), GFP_KERNEL)?;
        let page = word.page_iter().next().ok_or(EINVAL)?;
        // SAFETY: A valid page.
        let frame = Pfn(unsafe { bindings::farfault_c_page_to_pfn(page.as_ptr()) });
        Ok(Self { word, frame })
    }

    /// Where it is in physical memory.
    pub(crate) fn phys(&self) -> u64 {
        self.frame.phys()
    }

    /// Changes it, after all that was stored before.
    pub(crate) fn set(&self, value: u32) {
        self.word.store(value, Release);
    }
}
