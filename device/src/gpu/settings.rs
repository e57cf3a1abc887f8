// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a GPU is made with, and every bound of it in one place (manual, chapter 2).

use farfault_protocol::address::HUGE_PAGE_SIZE;

/// Most requests that wait on one queue; more are answered with `Busy`. No virtqueue of QEMU's
/// generic device is longer.
pub(crate) const MAX_WAITING_REQUESTS: usize = 1024;
/// With as many bytes of requests that wait on one queue, the next is not asked for: so many, and the
/// one that exceeds it, is what a guest can make the device hold.
pub(crate) const MAX_WAITING_BYTES: usize = 1 << 20;
/// Most bytes that one [`Work`](super::Work) moves, and so what an invalidation may have to wait
/// for, per worker.
pub(crate) const WORK_BYTES: u64 = 256 << 10;
/// Most atomics on a word, or steps of a pointer chase, of one [`Work`](super::Work).
pub(crate) const WORK_STEPS: u64 = 512;
/// Most waves that one call of [`Gpu::next_work`](super::Gpu::next_work) parks or ends.
pub(crate) const MAX_PARKED_PER_CALL: u32 = 64;
/// After so many works, waves whose fault found no buffer try again even if there is other work, as
/// there may always be.
pub(crate) const WORKS_BETWEEN_RETRIES: u32 = 64;

/// Most pages of VRAM that are poisoned at a time.
pub(crate) const MAX_POISONED: usize = 1024;

/// The limits that the configuration space announces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Contexts have the numbers 0 to this, exclusive.
    pub max_contexts: u32,
    /// Jobs at a time, until their fence event has a buffer.
    pub max_jobs: u32,
    /// Waves at a time, of all jobs.
    pub max_waves: u32,
    /// Bytes of a request.
    pub max_request: u32,
    /// Bytes of one run of a copy list.
    pub max_copy_run: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_contexts: 64,
            max_jobs: 1024,
            max_waves: 4096,
            max_request: 256 << 10,
            max_copy_run: 4 << 20,
        }
    }
}

/// What a GPU is made with.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Bytes of VRAM: a multiple of 2 MiB, not zero.
    pub vram_size: u64,
    /// Tells this GPU from the others of one machine.
    pub serial: u64,
    /// What the guest may ask for at once.
    pub limits: Limits,
    /// Off: every access walks the page tables. What a program sees is the same.
    pub tlb: bool,
}

impl Settings {
    /// The usual settings, with this much VRAM.
    pub fn new(vram_size: u64) -> Self {
        Self {
            vram_size,
            serial: 0,
            limits: Limits::default(),
            tlb: true,
        }
    }
}

/// Why a page is not poisoned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PoisonError {
    /// It is none of VRAM.
    #[error("there is no VRAM at this address")]
    NotVram,
    /// A reset is under way, which would make it whole at once.
    #[error("the GPU is being reset; try again")]
    Resetting,
    /// There are enough.
    #[error("{MAX_POISONED} pages are poisoned already; a reset of the GPU makes them whole")]
    TooMany,
}

/// Why there is no GPU.
#[derive(Debug, thiserror::Error)]
pub enum NewError {
    /// The size of VRAM is not one that page tables can map.
    #[error(
        "VRAM of {0} bytes: it must be a multiple of {HUGE_PAGE_SIZE} (2 MiB), not zero, below 2^52"
    )]
    VramSize(u64),
    /// The host gave no address space.
    #[error("cannot reserve {size} bytes of address space for VRAM; try a smaller one: {source}")]
    Reserve {
        /// Bytes asked for.
        size: u64,
        /// What the host said.
        source: vm_memory::mmap::MmapRegionError,
    },
}
