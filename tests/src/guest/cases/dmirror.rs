// SPDX-License-Identifier: MIT OR Apache-2.0
//! The nodes of the kernel's HMM test module, with `dmirror=1`: which there are, what their calls do,
//! and one failed allocation.

use crate::guest::{
    call::Job,
    child::{Gate, code},
    mirror::{Action, HUGE, LOCAL, Mirror, WRITE},
    oracle,
};
use anyhow::{Result, ensure};
use farfault::arena::{Backing, Protection, Region};
use farfault::{
    Gpu, HUGE_PAGE_SIZE, PAGE_SIZE, Place,
    process::{Ended, fork},
};
use rustix::io::Errno;
use std::{fs, os::unix::fs::PermissionsExt};

group! { "dmirror", on Mirrors, seconds 60:
    nodes_of_two_gpus_are_there_for_their_owner_only,
    write_and_read_copy_and_count_faults,
    write_after_a_read_of_what_may_only_be_read_is_a_fault,
    caller_that_is_not_the_mirrored_process_gets_the_bytes_itself,
    snapshot_tells_places_and_rights,
    migration_moves_pages_and_copies_what_it_moved,
    exclusive_pages_are_told_until_the_cpu_touches_one,
    exclusive_page_is_told_anywhere_in_a_long_range_and_not_beside_it,
    arguments_that_mean_nothing_are_refused,
    read_from_the_middle_of_a_huge_page_in_vram_is_right,
    two_nodes_have_their_own_memory,
    allocation_of_a_huge_page_that_fails_once_moves_small_ones,
    allocation_of_a_huge_page_of_parent_and_child_that_fails_leaves_both_their_data,
    allocation_of_a_small_page_that_fails_once_leaves_it_where_it_is,
    allocation_that_fails_at_a_touch_of_the_cpu_is_tried_again,
}

const SEED: u64 = 0xd312;
const RAM: u8 = 0;

fn written(length: usize, backing: Backing<'_>) -> Result<Region> {
    let region = Region::map(length, backing)?;
    oracle::write(region, SEED);
    Ok(region)
}

fn ensure_all(mirror: &Mirror, region: Region, protection: u8) -> Result<()> {
    let is = mirror.snapshot(region)?;
    let other = is.iter().position(|is| *is != protection);
    ensure!(
        other.is_none(),
        "page {other:?} of {} is {:x?}, and should be {protection:#x}",
        is.len(),
        other.and_then(|page| is.get(page))
    );
    Ok(())
}

fn nodes_of_two_gpus_are_there_for_their_owner_only() -> Result<()> {
    let mut nodes = Vec::new();
    for entry in fs::read_dir("/dev")? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with("hmm_dmirror") {
            nodes.push((name, entry.metadata()?.permissions().mode() & 0o7777));
        }
    }
    nodes.sort();
    let expected = [0, 1].map(|number| (format!("hmm_dmirror{number}"), 0o600));
    ensure!(nodes == expected, "{nodes:?}");
    Ok(())
}

fn write_and_read_copy_and_count_faults() -> Result<()> {
    let mirror = Mirror::open(0)?;
    for backing in [Backing::Small, Backing::Huge, Backing::Shared] {
        let region = Region::map(256 * PAGE_SIZE, backing)?;
        let buffer = written(region.length(), Backing::Small)?;
        let pages = region.pages().count() as u64;
        let done = mirror.call(Action::Write, region, buffer)?;
        ensure!((done.pages, done.faults) == (pages, 1), "{done:?}");
        oracle::check(region, SEED, 0)?;
        buffer.discard()?;
        // It has them mapped now.
        let done = mirror.call(Action::Read, region, buffer)?;
        ensure!((done.pages, done.faults) == (pages, 0), "{done:?}");
        oracle::check(buffer, SEED, 0)?;
    }
    Ok(())
}

/// A read maps no more than it may: memory that is read-only, pages that a child has, too, and the zero page.
fn write_after_a_read_of_what_may_only_be_read_is_a_fault() -> Result<()> {
    const ADDED: u64 = 3;
    for backing in [Backing::Small, Backing::Huge] {
        let mirror = Mirror::open(0)?;
        let [fixed, shared, empty, other] = [(); 4].map(|()| Region::map(HUGE_PAGE_SIZE, backing));
        let (fixed, shared, empty, other) = (fixed?, shared?, empty?, other?);
        let (news, buffer) = (
            Region::map(HUGE_PAGE_SIZE, Backing::Small)?,
            Region::map(HUGE_PAGE_SIZE, Backing::Small)?,
        );
        for index in 0..news.words() {
            news.store(index, oracle::word(SEED, index).wrapping_add(ADDED));
        }
        oracle::write(fixed, SEED);
        oracle::write(shared, SEED);
        fixed.protect(Protection::Read)?;
        let gate = Gate::new()?;
        let child = fork(|| code(gate.wait().and_then(|()| oracle::check(shared, SEED, 0))))?;
        for (region, expected) in [(fixed, SEED), (shared, SEED)] {
            mirror.call(Action::Read, region, buffer)?;
            oracle::check(buffer, expected, 0)?;
        }
        ensure!(empty.load(0) == 0 && other.load(0) == 0);
        mirror.call(Action::Read, empty, buffer)?;
        ensure!((0..buffer.words()).all(|index| buffer.load(index) == 0));
        let refused = mirror.call(Action::Write, fixed, news);
        ensure!(refused == Err(Errno::PERM), "{backing:?}: {refused:?}");
        oracle::check(fixed, SEED, 0)?;
        for region in [shared, empty] {
            mirror.call(Action::Write, region, news)?;
            oracle::check(region, SEED, ADDED)?;
        }
        ensure!(
            (0..other.words()).all(|index| other.load(index) == 0),
            "{backing:?}: the zero page was written"
        );
        gate.open()?;
        ensure!(child.wait()? == Ended::Exited(0), "{backing:?}");
    }
    Ok(())
}

/// A child has the node from its parent: what is moved is the parent's, and what is told goes to the child.
fn caller_that_is_not_the_mirrored_process_gets_the_bytes_itself() -> Result<()> {
    for action in [Action::ToDevice, Action::Exclusive] {
        let mirror = Mirror::open(0)?;
        let region = written(16 * PAGE_SIZE, Backing::Small)?;
        let buffer = Region::map(region.length(), Backing::Small)?;
        // The GPU could write there.
        mirror.call(Action::Read, region, buffer)?;
        for index in 0..buffer.words() {
            buffer.store(index, 7);
        }
        let child = fork(|| {
            code((|| {
                mirror.call(action, region, buffer)?;
                oracle::check(buffer, SEED, 0)
            })())
        })?;
        ensure!(child.wait()? == Ended::Exited(0), "{action:?}");
        ensure!(
            (0..buffer.words()).all(|index| buffer.load(index) == 7),
            "{action:?}: the parent's memory was written for its child"
        );
        oracle::check(region, SEED, 0)?;
    }
    Ok(())
}

fn snapshot_tells_places_and_rights() -> Result<()> {
    let mirror = Mirror::open(1)?;
    let region = written(16 * PAGE_SIZE, Backing::Small)?;
    let buffer = Region::map(region.length(), Backing::Small)?;
    region.part(0, 4 * PAGE_SIZE).protect(Protection::Read)?;
    region.part(8 * PAGE_SIZE, 4 * PAGE_SIZE).discard()?;
    let in_vram = region.part(12 * PAGE_SIZE, 4 * PAGE_SIZE);
    mirror.call(Action::ToDevice, in_vram, buffer)?;
    let is = mirror.snapshot(region)?;
    let should = [1, RAM | WRITE, 0, LOCAL | WRITE].map(|part| [part; 4]);
    ensure!(is == should.concat(), "{is:x?}");

    let huge = written(HUGE_PAGE_SIZE, Backing::Huge)?;
    ensure_all(&mirror, huge, RAM | WRITE | HUGE)?;
    let buffer = Region::map(huge.length(), Backing::Small)?;
    mirror.call(Action::ToDevice, huge, buffer)?;
    ensure_all(&mirror, huge, LOCAL | WRITE | HUGE)?;
    ensure_all(
        &mirror,
        huge.part(100 * PAGE_SIZE, PAGE_SIZE),
        LOCAL | WRITE | HUGE,
    )
}

fn migration_moves_pages_and_copies_what_it_moved() -> Result<()> {
    let mirror = Mirror::open(0)?;
    for (backing, huge) in [(Backing::Small, 0), (Backing::Huge, HUGE)] {
        let region = written(HUGE_PAGE_SIZE, backing)?;
        let buffer = Region::map(region.length(), Backing::Small)?;
        let done = mirror.call(Action::ToDevice, region, buffer)?;
        ensure!(done.pages == 512, "{backing:?}: {done:?}");
        oracle::check(buffer, SEED, 0)?;
        ensure_all(&mirror, region, LOCAL | WRITE | huge)?;
        // It counts a huge page once.
        let folios = if huge == 0 { 512 } else { 1 };
        let done = mirror.call(Action::ToSystem, region, buffer)?;
        ensure!(done.pages == folios, "{backing:?}: {done:?}");
        ensure_all(&mirror, region, RAM | WRITE | huge)?;
        oracle::check(region, SEED, 0)?;
        // What a call has moved comes home with RELEASE, too.
        mirror.call(Action::ToDevice, region, buffer)?;
        mirror.call(Action::Release, region, buffer)?;
        let here = mirror.snapshot(region)?;
        ensure!(here.iter().all(|page| page & LOCAL == 0), "{here:x?}");
        oracle::check(region, SEED, 0)?;
    }
    Ok(())
}

fn exclusive_pages_are_told_until_the_cpu_touches_one() -> Result<()> {
    let mirror = Mirror::open(0)?;
    let region = written(8 * PAGE_SIZE, Backing::Small)?;
    let buffer = Region::map(region.length(), Backing::Small)?;
    let check = |range| mirror.call(Action::CheckExclusive, range, buffer);
    let done = mirror.call(Action::Exclusive, region, buffer)?;
    ensure!(done.pages == 8, "{done:?}");
    oracle::check(buffer, SEED, 0)?;
    ensure!(check(region) == Err(Errno::PERM));
    for page in 0..8 {
        let page = region.part(page * PAGE_SIZE, PAGE_SIZE);
        ensure!(check(page) == Err(Errno::PERM));
        page.atomic_add(0, 1);
        ensure!(check(page).is_ok());
    }
    ensure!(check(region).is_ok());
    let shared = Region::map(PAGE_SIZE, Backing::Shared)?;
    shared.store(0, 1);
    let refused = mirror.call(Action::Exclusive, shared, buffer);
    ensure!(refused.is_err(), "{refused:?}");
    Ok(())
}

fn exclusive_page_is_told_anywhere_in_a_long_range_and_not_beside_it() -> Result<()> {
    const PAGES: usize = HUGE_PAGE_SIZE / PAGE_SIZE;
    let mirror = Mirror::open(0)?;
    let region = written(4 * HUGE_PAGE_SIZE, Backing::Small)?;
    let buffer = Region::map(region.length(), Backing::Small)?;
    let pages = |from: usize, to: usize| region.part(from * PAGE_SIZE, (to - from) * PAGE_SIZE);
    let check = |from, to| mirror.call(Action::CheckExclusive, pages(from, to), buffer);
    // The range neither begins nor ends where 2 MiB do.
    let (first, end) = (PAGES / 2, 3 * PAGES + PAGES / 2);
    for page in [first, PAGES, 2 * PAGES - 1, 2 * PAGES, end - 1] {
        mirror.call(Action::Exclusive, pages(page, page + 1), buffer)?;
        for (from, to) in [(first, end), (first, page + 1), (page, end)] {
            let told = check(from, to);
            ensure!(told == Err(Errno::PERM), "page {page} in {from}..{to}");
        }
        for (from, to) in [
            (first, page),
            (page + 1, end),
            (0, page),
            (page + 1, 4 * PAGES),
        ] {
            let told = (from < to).then(|| check(from, to));
            ensure!(
                told.is_none_or(|told| told.is_ok()),
                "page {page}, {from}..{to}: {told:?}"
            );
        }
        region.store(page * PAGE_SIZE / 8, 1);
        ensure!(
            check(0, 4 * PAGES).is_ok(),
            "page {page} is the CPU's again"
        );
    }
    Ok(())
}

fn arguments_that_mean_nothing_are_refused() -> Result<()> {
    let mirror = Mirror::open(0)?;
    let region = written(4 * PAGE_SIZE, Backing::Small)?;
    let buffer = Region::map(region.length(), Backing::Small)?;
    let (address, pointer) = (region.address(), buffer.address());
    for action in Action::ALL {
        for (address, pages) in [
            (address + 8, 1),
            (address, 0),
            (0u64.wrapping_sub(PAGE_SIZE as u64), 2),
            (address, 1 << 52),
        ] {
            let result = mirror.call_with(action, address, pointer, pages);
            ensure!(
                result == Err(Errno::INVAL),
                "{action:?} of {pages} pages at {address:#x}: {result:?}"
            );
        }
    }
    let nowhere = Region::nowhere(PAGE_SIZE)?;
    for (action, errno) in [
        (Action::Read, Errno::FAULT),
        (Action::Write, Errno::FAULT),
        (Action::ToDevice, Errno::INVAL),
        (Action::ToSystem, Errno::INVAL),
        (Action::Exclusive, Errno::FAULT),
    ] {
        let result = mirror.call(action, nowhere, buffer);
        ensure!(result == Err(errno), "{action:?} of nothing: {result:?}");
    }
    for action in [Action::Read, Action::Write, Action::Snapshot] {
        let result = mirror.call_with(action, address, nowhere.address(), 4);
        ensure!(
            result == Err(Errno::FAULT),
            "{action:?} to nowhere: {result:?}"
        );
    }
    oracle::check(region, SEED, 0)?;
    mirror.call(Action::Read, region, buffer)?;
    oracle::check(buffer, SEED, 0)
}

/// The node has nothing of it mapped when it reads, page by page, from any page on.
fn read_from_the_middle_of_a_huge_page_in_vram_is_right() -> Result<()> {
    let (mirror, other) = (Mirror::open(0)?, Mirror::open(0)?);
    let region = written(HUGE_PAGE_SIZE, Backing::Huge)?;
    let buffer = Region::map(region.length(), Backing::Small)?;
    mirror.call(Action::ToDevice, region, buffer)?;
    buffer.discard()?;
    // A second file of the process has an empty mirror.
    for (first, pages) in [(511, 1), (256, 8), (33, 64), (1, 511)] {
        let part = region.part(first * PAGE_SIZE, pages * PAGE_SIZE);
        let into = buffer.part(0, part.length());
        let done = other.call(Action::Read, part, into)?;
        ensure!(done.pages == pages as u64, "{done:?}");
        oracle::check_part(into, SEED, first * PAGE_SIZE / 8, 0)?;
    }
    ensure_all(&mirror, region, LOCAL | WRITE | HUGE)?;
    oracle::check(region, SEED, 0)
}

fn two_nodes_have_their_own_memory() -> Result<()> {
    let (one, other) = (Mirror::open(0)?, Mirror::open(1)?);
    let region = written(64 * PAGE_SIZE, Backing::Small)?;
    let buffer = Region::map(region.length(), Backing::Small)?;
    let part = region.part(0, 32 * PAGE_SIZE);
    one.call(Action::ToDevice, part, buffer)?;
    ensure_all(&one, part, LOCAL | WRITE)?;
    let seen = other.snapshot(part)?;
    ensure!(seen.iter().all(|page| page & LOCAL == 0), "{seen:x?}");
    let done = other.call(Action::Read, region, buffer)?;
    ensure!(done.pages == 64, "{done:?}");
    oracle::check(buffer, SEED, 0)?;
    oracle::check(region, SEED, 0)
}

fn allocation_of_a_huge_page_that_fails_once_moves_small_ones() -> Result<()> {
    let mirror = Mirror::open(0)?;
    let gpu = Gpu::open_first()?;
    let region = written(2 * HUGE_PAGE_SIZE, Backing::Huge)?;
    let buffer = Region::map(region.length(), Backing::Small)?;
    mirror.fail_next_allocation(region)?;
    let done = mirror.call(Action::ToDevice, region, buffer)?;
    ensure!(done.pages == 1024, "{done:?}");
    oracle::check(buffer, SEED, 0)?;
    let (first, second) = (
        region.part(0, HUGE_PAGE_SIZE),
        region.part(HUGE_PAGE_SIZE, HUGE_PAGE_SIZE),
    );
    ensure_all(&mirror, first, LOCAL | WRITE)?;
    ensure_all(&mirror, second, LOCAL | WRITE | HUGE)?;
    Job::add(region, 1).waves(4).run(&gpu)?;
    // Small pages come home as such; a huge one that finds no room as a whole, too.
    mirror.fail_next_allocation(region)?;
    let done = mirror.call(Action::ToSystem, second, buffer)?;
    ensure!(done.pages == 512, "{done:?}");
    ensure_all(&mirror, second, RAM | WRITE)?;
    let done = mirror.call(Action::ToSystem, first, buffer)?;
    ensure!(done.pages == 512, "{done:?}");
    oracle::check(region, SEED, 1)?;
    // Nothing is left that fails.
    mirror.call(Action::ToDevice, region, buffer)?;
    let here = mirror.snapshot(region)?;
    ensure!(here.iter().all(|page| page & LOCAL != 0), "{here:x?}");
    oracle::check(region, SEED, 1)
}

/// The child's page table has the same huge page, and is not the one that the call is about.
fn allocation_of_a_huge_page_of_parent_and_child_that_fails_leaves_both_their_data() -> Result<()> {
    let mirror = Mirror::open(0)?;
    // The last time, the CPU touches it.
    for action in [Some(Action::ToDevice), Some(Action::ToSystem), None] {
        let region = written(HUGE_PAGE_SIZE, Backing::Huge)?;
        let buffer = Region::map(region.length(), Backing::Small)?;
        if action != Some(Action::ToDevice) {
            mirror.call(Action::ToDevice, region, buffer)?;
        }
        let gate = Gate::new()?;
        let child = fork(|| {
            code((|| {
                gate.wait()?;
                oracle::check(region, SEED, 0)?;
                oracle::write(region, SEED + 1);
                oracle::check(region, SEED + 1, 0)
            })())
        })?;
        mirror.fail_next_allocation(region)?;
        let done = action.map(|action| mirror.call(action, region, buffer));
        let seen = oracle::check(region, SEED, 0);
        gate.open()?;
        ensure!(
            child.wait()? == Ended::Exited(0),
            "{action:?}: the child's data"
        );
        if let Some(done) = done.transpose()? {
            ensure!(done.pages == 512, "{action:?}: {done:?}");
        }
        seen?;
    }
    Ok(())
}

fn allocation_of_a_small_page_that_fails_once_leaves_it_where_it_is() -> Result<()> {
    let mirror = Mirror::open(0)?;
    let region = written(16 * PAGE_SIZE, Backing::Small)?;
    let buffer = Region::map(region.length(), Backing::Small)?;
    mirror.fail_next_allocation(region)?;
    // The page that did not move is not mapped, and so it says that there is nothing.
    let result = mirror.call(Action::ToDevice, region, buffer);
    ensure!(result == Err(Errno::NOENT), "{result:?}");
    let here = mirror.snapshot(region)?;
    let moved = here.iter().filter(|page| *page & LOCAL != 0).count();
    ensure!(moved == 15, "{here:x?}");
    let done = mirror.call(Action::ToDevice, region, buffer)?;
    ensure!(done.pages == 16, "{done:?}");
    ensure_all(&mirror, region, LOCAL | WRITE)?;
    mirror.fail_next_allocation(region)?;
    let result = mirror.call(Action::ToSystem, region, buffer);
    ensure!(result == Err(Errno::NOMEM), "{result:?}");
    ensure_all(&mirror, region, LOCAL | WRITE)?;
    let done = mirror.call(Action::ToSystem, region, buffer)?;
    ensure!(done.pages == 16, "{done:?}");
    oracle::check(region, SEED, 0)
}

fn allocation_that_fails_at_a_touch_of_the_cpu_is_tried_again() -> Result<()> {
    let mirror = Mirror::open(0)?;
    for backing in [Backing::Small, Backing::Huge] {
        let region = written(HUGE_PAGE_SIZE, backing)?;
        let buffer = Region::map(region.length(), Backing::Small)?;
        mirror.call(Action::ToDevice, region, buffer)?;
        mirror.fail_next_allocation(region)?;
        oracle::check(region, SEED, 0)?;
        let gpu = Gpu::open_first()?;
        Job::add(region, 1).waves(2).run(&gpu)?;
        gpu.migrate(region.pages(), Place::Ram)?;
        oracle::check(region, SEED, 1)?;
    }
    Ok(())
}
