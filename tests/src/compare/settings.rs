// SPDX-License-Identifier: MIT OR Apache-2.0
//! What has to hold for a transcript to repeat: no huge pages that the kernel makes by itself, later,
//! and no other CPU that holds on to a page for a moment.

use anyhow::{Context, Result};
use farfault::stage::{self, Advice, Backing, Protection};
use rustix::thread::{CpuSet, sched_setaffinity};
use std::{fs, time::Duration};

const HUGE: u64 = 2 << 20;
/// Where a huge page is mapped for a moment.
const PLACE: u64 = stage::STAGE.start;
/// Longer than the kernel needs to look at one process that has huge pages.
const FIRST_SCAN: Duration = Duration::from_millis(500);

const SETTINGS: [(&str, &str); 4] = [
    ("/sys/kernel/mm/transparent_hugepage/enabled", "madvise"),
    ("/sys/kernel/mm/transparent_hugepage/shmem_enabled", "never"),
    // In milliseconds; it scans once when a first process has huge pages, then not again.
    (
        "/sys/kernel/mm/transparent_hugepage/khugepaged/scan_sleep_millisecs",
        "4294967295",
    ),
    ("/proc/sys/vm/nr_hugepages", "8"),
];

/// Sets the kernel up, once after its boot.
pub(super) fn prepare() -> Result<()> {
    for (path, value) in SETTINGS {
        fs::write(path, value).with_context(|| format!("writing {value} to {path}"))?;
    }
    let access = Protection {
        read: true,
        write: true,
    };
    stage::map(PLACE, HUGE, access, Backing::Anonymous)?;
    stage::advise(PLACE, HUGE, Advice::HugePage)?;
    stage::store(PLACE, 1);
    std::thread::sleep(FIRST_SCAN);
    stage::unmap(PLACE, HUGE)?;
    Ok(())
}

/// Keeps this process on one CPU.
pub(super) fn one_cpu() -> Result<()> {
    let mut first = CpuSet::new();
    first.set(0);
    sched_setaffinity(None, &first).context("staying on one CPU")
}
