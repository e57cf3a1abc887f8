// SPDX-License-Identifier: GPL-2.0
//! Memory of the kernel that a device reads and writes, too: contiguous for the CPU, page by page
//! for the device.
//!
//! Locks: none. Whoever owns it sees to it that the device is done before it is dropped.
//!
//! C header: `include/linux/vmalloc.h`.

use super::folio::Pfn;
use crate::bindings;
use kernel::{
    page::{AsPageIter, PAGE_SIZE},
    prelude::*,
};

/// Whole pages of zeroes, to begin with.
pub(crate) struct Bounce(VVec<u8>);

impl Bounce {
    /// At least `bytes` bytes. `ENOMEM`: so much cannot be had; nothing is logged about that.
    pub(crate) fn new(bytes: usize) -> Result<Self> {
        let bytes = bytes.checked_next_multiple_of(PAGE_SIZE).ok_or(ENOMEM)?;
        let mut memory = VVec::with_capacity(bytes, GFP_KERNEL | __GFP_ZERO | __GFP_NOWARN)?;
        // SAFETY: There is room, and all of it is zero.
        unsafe { memory.inc_len(bytes) };
        Ok(Self(memory))
    }

    /// Its frames in order.
    pub(crate) fn frames(&mut self) -> impl Iterator<Item = Pfn> + '_ {
        self.0
            .page_iter()
            // SAFETY: A valid page.
            .map(|page| Pfn(unsafe { bindings::farfault_c_page_to_pfn(page.as_ptr()) }))
    }

    /// What it holds. The device must not be writing.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// What it holds, to be changed. The device must not be using it.
    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.0
    }
}
