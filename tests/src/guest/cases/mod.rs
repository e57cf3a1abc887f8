// SPDX-License-Identifier: MIT OR Apache-2.0
//! The cases, a file for each group.

mod advise;
mod bad_argument;
mod bad_memory;
mod bad_pointer;
mod compat;
mod contexts;
mod counters;
mod dmirror;
mod dmirror_ranges;
mod eviction;
mod exclusive;
mod exclusive_beside;
mod faults;
mod home;
mod huge_pages;
mod jobs;
mod leaks;
mod machines;
mod mappings;
mod migrate;
pub(super) mod mm;
mod owner;
mod page_tables;
mod process;
mod races;
mod smoke;
mod two_gpus;
mod unmap;
mod waits;

use super::Case;

/// All groups.
pub(super) fn groups() -> impl Iterator<Item = &'static &'static [Case]> {
    GROUPS.iter().chain(mm::GROUPS).chain(races::GROUPS)
}

const GROUPS: &[&[Case]] = &[
    smoke::CASES,
    faults::CASES,
    bad_memory::CASES,
    migrate::CASES,
    home::CASES,
    counters::CASES,
    mappings::CASES,
    unmap::CASES,
    advise::CASES,
    eviction::CASES,
    page_tables::CASES,
    exclusive::CASES,
    exclusive_beside::CASES,
    process::CASES,
    owner::CASES,
    jobs::CASES,
    waits::CASES,
    contexts::CASES,
    leaks::CASES,
    bad_argument::CASES,
    bad_pointer::CASES,
    compat::CASES,
    huge_pages::CASES,
    two_gpus::CASES,
    dmirror::CASES,
    dmirror_ranges::CASES,
    machines::disk::CASES,
    machines::numa::CASES,
    machines::eight_gpus::CASES,
];
