// SPDX-License-Identifier: MIT OR Apache-2.0
//! Suite `mm`: what the kernel's memory management does to pages in VRAM and to pages that the GPU has
//! mapped. A file for each of its parts.

mod access;
mod cgroup;
mod cma;
mod compaction;
mod direct;
mod failed_ram;
mod family;
mod files;
mod fork;
mod fork_order;
mod fork_shared;
mod frames;
mod khugepaged;
mod ksm;
mod madvise;
mod memcg;
mod mlock;
mod mprotect;
mod mremap;
mod munmap;
pub(in crate::guest) mod numa;
mod pins;
mod proc;
mod reclaim;
pub(in crate::guest) mod start;
pub(super) mod storage;
mod swap;
mod userfault;
mod userfaultfd;
mod userfaultfd_files;
mod userfaultfd_parts;
mod writeback;
mod zones;

use crate::guest::Case;

/// All groups of the suite.
pub(super) const GROUPS: &[&[Case]] = &[
    fork::CASES,
    fork_order::CASES,
    fork_shared::CASES,
    mprotect::CASES,
    mremap::CASES,
    munmap::CASES,
    madvise::CASES,
    mlock::CASES,
    failed_ram::CASES,
    ksm::CASES,
    khugepaged::CASES,
    compaction::CASES,
    userfaultfd::CASES,
    userfaultfd_files::CASES,
    userfaultfd_parts::CASES,
    proc::CASES,
    memcg::CASES,
    access::CASES,
    pins::CASES,
    files::CASES,
    swap::CASES,
    writeback::CASES,
    numa::CASES,
    zones::CASES,
    cma::CASES,
    direct::CASES,
    reclaim::CASES,
];
