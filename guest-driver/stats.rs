// SPDX-License-Identifier: GPL-2.0
//! What is counted: for each address space, and for the GPU as a whole since the driver was bound.

use crate::uapi;
use core::fmt::{self, Write};
use kernel::sync::atomic::{Atomic, Relaxed};

/// The counters of one address space or one GPU.
pub(crate) struct Counters {
    pub(crate) gpu_faults: Atomic<u64>,
    pub(crate) gpu_faults_failed: Atomic<u64>,
    pub(crate) cpu_faults: Atomic<u64>,
    pub(crate) pages_to_vram: Atomic<u64>,
    pub(crate) pages_to_ram: Atomic<u64>,
    pub(crate) pages_evicted: Atomic<u64>,
    pub(crate) pages_mapped: Atomic<u64>,
    pub(crate) invalidations: Atomic<u64>,
    pub(crate) migrate_ns: Atomic<u64>,
    pub(crate) jobs: Atomic<u64>,
}

impl Counters {
    pub(crate) const fn new() -> Self {
        Self {
            gpu_faults: Atomic::new(0),
            gpu_faults_failed: Atomic::new(0),
            cpu_faults: Atomic::new(0),
            pages_to_vram: Atomic::new(0),
            pages_to_ram: Atomic::new(0),
            pages_evicted: Atomic::new(0),
            pages_mapped: Atomic::new(0),
            invalidations: Atomic::new(0),
            migrate_ns: Atomic::new(0),
            jobs: Atomic::new(0),
        }
    }

    /// The values now.
    pub(crate) fn read(&self) -> uapi::Stats {
        uapi::Stats {
            gpu_faults: self.gpu_faults.load(Relaxed),
            gpu_faults_failed: self.gpu_faults_failed.load(Relaxed),
            cpu_faults: self.cpu_faults.load(Relaxed),
            pages_to_vram: self.pages_to_vram.load(Relaxed),
            pages_to_ram: self.pages_to_ram.load(Relaxed),
            pages_evicted: self.pages_evicted.load(Relaxed),
            pages_mapped: self.pages_mapped.load(Relaxed),
            invalidations: self.invalidations.load(Relaxed),
            migrate_ns: self.migrate_ns.load(Relaxed),
            jobs: self.jobs.load(Relaxed),
        }
    }
}

/// Writes one `name value` line for each counter.
pub(crate) fn write_lines(stats: &uapi::Stats, f: &mut impl Write) -> fmt::Result {
    let lines = [
        ("gpu_faults", stats.gpu_faults),
        ("gpu_faults_failed", stats.gpu_faults_failed),
        ("cpu_faults", stats.cpu_faults),
        ("pages_to_vram", stats.pages_to_vram),
        ("pages_to_ram", stats.pages_to_ram),
        ("pages_evicted", stats.pages_evicted),
        ("pages_mapped", stats.pages_mapped),
        ("invalidations", stats.invalidations),
        ("migrate_ns", stats.migrate_ns),
        ("jobs", stats.jobs),
    ];
    for (name, value) in lines {
        writeln!(f, "{name} {value}")?;
    }
    Ok(())
}
