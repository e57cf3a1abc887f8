// SPDX-License-Identifier: MIT OR Apache-2.0
//! Pages in RAM that the GPU has for itself: on request, and because its atomics need them. A CPU that
//! touches one has it again, and nobody's addition is lost.

use crate::guest::{
    call::{self, Job},
    child::code,
    oracle,
    place::{anonymous, ensure_place, migrate, move_all, state},
};
use anyhow::{Context, Result, ensure};
use farfault::arena::{Backing, Protection, Region};
use farfault::{
    Access, Advice, Gpu, HUGE_PAGE_SIZE, PAGE_SIZE, PageState, Place,
    process::{Ended, fork},
    stage,
    uapi::{Exclusive, JobStatus},
};
use rustix::{
    fs::{MemfdFlags, memfd_create},
    io::Errno,
    pipe::pipe,
};
use std::{
    fs::File,
    io::{Read, Write},
    os::unix::fs::FileExt,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    time::{Duration, Instant},
};

group! { "exclusive", on Small, seconds 90:
    page_taken_on_request_is_the_gpus_until_the_cpu_touches_it,
    pages_in_vram_requested_come_home,
    never_touched_pages_requested_are_zero,
    request_again_leaves_all_with_the_gpu,
    read_only_memory_requested_fails_and_stays_as_it_is,
    process_whose_request_has_failed_leaves_nothing_when_it_ends,
    range_with_a_hole_requested_fails_at_the_hole,
    shared_memory_requested_is_refused_and_takes_atomics_of_jobs,
    private_file_requested_is_the_gpus_where_it_was_written,
    atomics_of_a_job_take_their_page_in_ram,
    atomics_of_a_job_in_vram_leave_the_page_there,
    plain_stores_of_a_job_leave_the_page_shared,
    additions_of_cpu_and_gpu_to_one_word_are_all_there,
    additions_to_pages_that_move_to_and_fro_are_all_there,
    part_of_a_huge_page_taken_splits_its_mapping_and_keeps_its_data,
    huge_page_taken_as_a_whole_moves_to_vram_and_back,
    fork_gives_pages_back_to_parent_and_child,
    mprotect_takes_pages_from_the_gpu,
    munmap_and_mremap_take_pages_from_the_gpu,
    process_that_exits_leaves_nothing,
}

const SEED: u64 = 0xe8c1;
const WORDS_PER_PAGE: usize = PAGE_SIZE / 8;

/// A region with a seed's words, in RAM; the GPU's atomics there leave it in RAM.
fn in_ram(gpu: &Gpu, length: usize, backing: Backing<'_>) -> Result<Region> {
    let region = Region::map(length, backing)?;
    gpu.advise(region.pages(), Advice::MapOnly)?;
    oracle::write(region, SEED);
    Ok(region)
}

fn page(region: Region, index: usize) -> Region {
    region.part(index * PAGE_SIZE, PAGE_SIZE)
}

/// Whether the GPU has a page in RAM for itself.
fn is_exclusive(state: &PageState) -> bool {
    let gpu = state.gpu.place == Place::Ram && state.gpu.atomic && state.gpu.write;
    gpu && state.cpu.place == Place::Ram && !state.cpu.write
}

/// How many pages of a region the GPU has for itself.
fn exclusive(gpu: &Gpu, region: Region) -> Result<usize> {
    let states = gpu.query(region.pages())?;
    Ok(states.iter().filter(|state| is_exclusive(state)).count())
}

pub(super) fn ensure_all_exclusive(gpu: &Gpu, region: Region) -> Result<()> {
    let states = gpu.query(region.pages())?;
    let other = states.iter().position(|state| !is_exclusive(state));
    ensure!(
        other.is_none(),
        "page {other:?} of {} is {:?}",
        states.len(),
        other.and_then(|page| states.get(page))
    );
    Ok(())
}

fn request(gpu: &Gpu, region: Region) -> Result<(), Errno> {
    let argument = Exclusive {
        address: region.address(),
        length: region.length() as u64,
    };
    call::call(gpu, argument).map(drop)
}

/// Adds to the first word of each page, atomically.
fn add_to_each_page(gpu: &Gpu, region: Region, addend: u64) -> Result<()> {
    for page in 0..region.pages().count() as u64 {
        let word = region.address() + page * PAGE_SIZE as u64;
        Job::atomic_add(word, addend, 1).run(gpu)?;
    }
    Ok(())
}

/// The CPU finds a seed's words, with `added` to the first word of each page.
fn check_each_page(region: Region, seed: u64, added: u64) -> Result<()> {
    for index in 0..region.words() {
        let added = if index % WORDS_PER_PAGE == 0 {
            added
        } else {
            0
        };
        let (is, should) = (
            region.load(index),
            oracle::word(seed, index).wrapping_add(added),
        );
        ensure!(
            is == should,
            "word {index} is {is:#x} and should be {should:#x}"
        );
    }
    Ok(())
}

fn page_taken_on_request_is_the_gpus_until_the_cpu_touches_it() -> Result<()> {
    let gpu = Gpu::open_first()?;
    let region = in_ram(&gpu, 64 * PAGE_SIZE, Backing::Small)?;
    let part = region.part(16 * PAGE_SIZE, 32 * PAGE_SIZE);
    gpu.make_exclusive(part.pages())?;
    ensure_all_exclusive(&gpu, part)?;
    ensure!(exclusive(&gpu, region)? == 32, "its neighbours went, too");
    add_to_each_page(&gpu, part, 5)?;
    ensure_all_exclusive(&gpu, part)?;
    ensure!(
        gpu.stats()?.gpu_faults == 0,
        "the GPU faulted on what it has"
    );

    // A load, a store and an atomic of the CPU, each to a page of its own.
    let word = |page: usize| oracle::word(SEED, (16 + page) * WORDS_PER_PAGE).wrapping_add(5);
    ensure!(part.load(3 * WORDS_PER_PAGE) == word(3));
    part.store(7 * WORDS_PER_PAGE + 1, 77);
    part.atomic_add(9 * WORDS_PER_PAGE, 1);
    let states = gpu.query(part.pages())?;
    for (index, state) in states.iter().enumerate() {
        let touched = [3, 7, 9].contains(&index);
        ensure!(is_exclusive(state) != touched, "page {index}: {state:?}");
        let given_back = state.gpu.place == Place::None && state.cpu.place == Place::Ram;
        ensure!(given_back == touched, "page {index}: {state:?}");
    }
    // And back again.
    Job::atomic_add(page(part, 9).address(), 1, 1).run(&gpu)?;
    ensure!(is_exclusive(&state(&gpu, part, 9)?));
    ensure!(part.load(9 * WORDS_PER_PAGE) == word(9).wrapping_add(2));
    ensure!(part.load(7 * WORDS_PER_PAGE) == word(7));
    ensure!(part.load(7 * WORDS_PER_PAGE + 1) == 77);
    Ok(())
}

fn pages_in_vram_requested_come_home() -> Result<()> {
    let gpu = Gpu::open_first()?;
    for backing in [Backing::Small, Backing::Huge] {
        let region = in_ram(&gpu, 2 * HUGE_PAGE_SIZE, backing)?;
        move_all(&gpu, region, Place::Vram)?;
        Job::add(region, 1).waves(4).run(&gpu)?;
        let part = region.part(HUGE_PAGE_SIZE / 2, HUGE_PAGE_SIZE);
        gpu.make_exclusive(part.pages())?;
        ensure_all_exclusive(&gpu, part)?;
        Job::add(region, 1).waves(4).run(&gpu)?;
        oracle::check(region, SEED, 2)?;
    }
    Ok(())
}

fn never_touched_pages_requested_are_zero() -> Result<()> {
    let gpu = Gpu::open_first()?;
    for backing in [Backing::Small, Backing::Huge] {
        let region = Region::map(HUGE_PAGE_SIZE, backing)?;
        gpu.make_exclusive(region.pages())?;
        ensure_all_exclusive(&gpu, region)?;
        ensure!(Job::sum(region).run(&gpu)? == 0, "{backing:?}");
        add_to_each_page(&gpu, region.part(0, 4 * PAGE_SIZE), 3)?;
        let by_cpu = (0..region.words()).map(|index| region.load(index));
        ensure!(by_cpu.sum::<u64>() == 12, "{backing:?}");
    }
    Ok(())
}

fn request_again_leaves_all_with_the_gpu() -> Result<()> {
    let gpu = Gpu::open_first()?;
    let region = in_ram(&gpu, 16 * PAGE_SIZE, Backing::Small)?;
    gpu.make_exclusive(region.pages())?;
    for round in 1..=8 {
        add_to_each_page(&gpu, region, 1)?;
        gpu.make_exclusive(region.pages())?;
        ensure_all_exclusive(&gpu, region).with_context(|| format!("round {round}"))?;
    }
    check_each_page(region, SEED, 8)?;
    // What the GPU has, it keeps: nothing is unmapped for the rest.
    gpu.make_exclusive(region.part(0, 8 * PAGE_SIZE).pages())?;
    let before = gpu.stats()?;
    gpu.make_exclusive(region.pages())?;
    let after = gpu.stats()?;
    ensure_all_exclusive(&gpu, region)?;
    let mapped = after.pages_mapped - before.pages_mapped;
    ensure!(mapped == 8, "{before:?} {after:?}");
    ensure!(after.invalidations == before.invalidations, "{after:?}");
    Ok(())
}

fn process_whose_request_has_failed_leaves_nothing_when_it_ends() -> Result<()> {
    const MEMORY: usize = 64 << 20;
    let before = anonymous()?;
    let child = fork(|| {
        code((|| {
            let gpu = Gpu::open_first()?;
            Region::map(MEMORY, Backing::Small)?.advise(stage::Advice::PopulateWrite)?;
            let region = in_ram(&gpu, 16 * PAGE_SIZE, Backing::Small)?;
            region.part(0, PAGE_SIZE).protect(Protection::Read)?;
            ensure!(request(&gpu, region) == Err(Errno::FAULT));
            Ok(())
        })())
    })?;
    ensure!(child.wait()? == Ended::Exited(0));
    let after = anonymous()?;
    ensure!(
        after < before + (MEMORY as u64 >> 11),
        "AnonPages was {before} KiB, and is {after} KiB"
    );
    Ok(())
}

fn read_only_memory_requested_fails_and_stays_as_it_is() -> Result<()> {
    let gpu = Gpu::open_first()?;
    let region = in_ram(&gpu, 16 * PAGE_SIZE, Backing::Small)?;
    Job::sum(region).run(&gpu)?;
    region.protect(Protection::Read)?;
    // Whether the GPU has used a page is forgotten by who asks.
    let look = || -> Result<Vec<_>> {
        let states = gpu.query(region.pages())?;
        let seen = states.iter().map(|s| (s.cpu, s.gpu.place, s.gpu.write));
        Ok(seen.collect())
    };
    let before = look()?;
    ensure!(request(&gpu, region) == Err(Errno::FAULT));
    let after = look()?;
    ensure!(before == after, "{before:?} {after:?}");
    let address = region.address();
    Job::atomic_add(address, 1, 1).fails_at(&gpu, address, Access::Atomic)?;
    oracle::check(region, SEED, 0)?;

    // Some pages are read-only: those before them may have been taken, they are as they were.
    region.protect(Protection::ReadWrite)?;
    let read_only = region.part(4 * PAGE_SIZE, 4 * PAGE_SIZE);
    read_only.protect(Protection::Read)?;
    ensure!(request(&gpu, region) == Err(Errno::FAULT));
    ensure!(exclusive(&gpu, read_only)? == 0);
    ensure!(request(&gpu, region.part(0, 4 * PAGE_SIZE)) == Ok(()));
    ensure_all_exclusive(&gpu, region.part(0, 4 * PAGE_SIZE))?;
    oracle::check(region, SEED, 0)
}

fn range_with_a_hole_requested_fails_at_the_hole() -> Result<()> {
    let gpu = Gpu::open_first()?;
    let region = in_ram(&gpu, 2 * HUGE_PAGE_SIZE, Backing::Small)?;
    let hole = region.part(HUGE_PAGE_SIZE + 8 * PAGE_SIZE, PAGE_SIZE);
    hole.unmap()?;
    ensure!(request(&gpu, region) == Err(Errno::FAULT));
    let before = region.part(0, HUGE_PAGE_SIZE + 8 * PAGE_SIZE);
    ensure_all_exclusive(&gpu, before)?;
    let in_hole = request(&gpu, hole);
    ensure!(in_hole == Err(Errno::FAULT), "{in_hole:?}");
    ensure!(request(&gpu, Region::nowhere(PAGE_SIZE)?) == Err(Errno::FAULT));
    oracle::check(before, SEED, 0)?;
    let behind = HUGE_PAGE_SIZE + 9 * PAGE_SIZE;
    let rest = region.part(behind, region.length() - behind);
    ensure!(exclusive(&gpu, rest)? == 0);
    oracle::check_part(rest, SEED, behind / 8, 0)
}

/// Shared memory, of each kind that needs nothing of the machine.
fn shared_memory_requested_is_refused_and_takes_atomics_of_jobs() -> Result<()> {
    let gpu = Gpu::open_first()?;
    let file = File::from(memfd_create("farfault-test", MemfdFlags::CLOEXEC)?);
    file.set_len(8 * PAGE_SIZE as u64)?;
    for backing in [Backing::Shared, Backing::File(&file)] {
        let region = Region::map(8 * PAGE_SIZE, backing)?;
        ensure_shared_atomics(&gpu, region).with_context(|| format!("{backing:?}"))?;
    }
    let mut word = [0; 8];
    file.read_exact_at(&mut word, PAGE_SIZE as u64)?;
    ensure!(u64::from_le_bytes(word) == oracle::word(SEED, WORDS_PER_PAGE).wrapping_add(6));
    Ok(())
}

/// A request is refused before and after jobs did atomics there; those and the CPU's are exact.
pub(super) fn ensure_shared_atomics(gpu: &Gpu, region: Region) -> Result<()> {
    oracle::write(region, SEED);
    let refused = Err(Errno::OPNOTSUPP);
    ensure!(request(gpu, region) == refused);
    oracle::check(region, SEED, 0)?;
    add_to_each_page(gpu, region.part(0, 4 * PAGE_SIZE), 6)?;
    let first = state(gpu, region, 0)?;
    ensure!(
        first.gpu.atomic && first.gpu.place == Place::Ram && first.cpu.write,
        "{first:?}"
    );
    for part in [region, page(region, 0), page(region, 3)] {
        let again = request(gpu, part);
        ensure!(again == refused, "after atomics of a job: {again:?}");
    }
    let error = gpu.make_exclusive(region.pages()).err();
    let error = error.context("the library was not refused")?;
    ensure!(error.is_not_anonymous(), "{error}");
    for index in 0..4 {
        let word = index * WORDS_PER_PAGE;
        ensure!(region.load(word) == oracle::word(SEED, word).wrapping_add(6));
    }
    let last = region.part(7 * PAGE_SIZE, PAGE_SIZE);
    last.store(0, 0);
    let (by_cpu, by_gpu) = add_at_once(gpu, last, || Ok(true))?;
    ensure!(
        last.load(0) == by_cpu + by_gpu,
        "{by_cpu} and {by_gpu} give {}",
        last.load(0)
    );
    Ok(())
}

fn private_file_requested_is_the_gpus_where_it_was_written() -> Result<()> {
    let gpu = Gpu::open_first()?;
    let file = File::from(memfd_create("farfault-test", MemfdFlags::CLOEXEC)?);
    let words = (0..8 * WORDS_PER_PAGE).flat_map(|index| oracle::word(SEED, index).to_le_bytes());
    file.write_all_at(&words.collect::<Vec<_>>(), 0)?;
    let region = Region::map(8 * PAGE_SIZE, Backing::FilePrivate(&file))?;
    region.store(0, region.load(0));
    // What was not written yet gets a page of its own now.
    gpu.make_exclusive(region.pages())?;
    ensure_all_exclusive(&gpu, region)?;
    add_to_each_page(&gpu, region, 2)?;
    check_each_page(region, SEED, 2)?;
    let mut bytes = [0; 8];
    file.read_exact_at(&mut bytes, 0)?;
    ensure!(u64::from_le_bytes(bytes) == oracle::word(SEED, 0));
    Ok(())
}

fn atomics_of_a_job_take_their_page_in_ram() -> Result<()> {
    let gpu = Gpu::open_first()?;
    for advice in [Advice::MapOnly, Advice::PreferCpu] {
        for start in [Place::Ram, Place::Vram] {
            // What is in VRAM stays there, where it may.
            if (advice, start) == (Advice::MapOnly, Place::Vram) {
                continue;
            }
            for backing in [Backing::Small, Backing::Huge] {
                let region = in_ram(&gpu, HUGE_PAGE_SIZE, backing)?;
                move_all(&gpu, region, start)?;
                gpu.advise(region.pages(), advice)?;
                let taken = page(region, 100);
                let before = Job::atomic_add(taken.address(), 7, 3).run(&gpu)?;
                let word = oracle::word(SEED, 100 * WORDS_PER_PAGE);
                ensure!(before == word.wrapping_add(14));
                let what = format!("{advice:?}, from {start:?}, {backing:?}");
                let is = state(&gpu, region, 100)?;
                ensure!(is_exclusive(&is), "{what}: {is:?}");
                ensure!(exclusive(&gpu, region)? == 1, "{what}: more than its page");
                ensure!(taken.load(0) == word.wrapping_add(21), "{what}");
                ensure!(
                    exclusive(&gpu, region)? == 0,
                    "{what}: the CPU has touched it"
                );
            }
        }
    }
    Ok(())
}

fn atomics_of_a_job_in_vram_leave_the_page_there() -> Result<()> {
    let gpu = Gpu::open_first()?;
    for advice in [Advice::Default, Advice::MapOnly] {
        let region = in_ram(&gpu, 8 * PAGE_SIZE, Backing::Small)?;
        gpu.advise(region.pages(), advice)?;
        move_all(&gpu, region, Place::Vram)?;
        add_to_each_page(&gpu, region, 1)?;
        ensure_place(&gpu, region, Place::Vram)?;
        check_each_page(region, SEED, 1)?;
    }
    Ok(())
}

fn plain_stores_of_a_job_leave_the_page_shared() -> Result<()> {
    let gpu = Gpu::open_first()?;
    let region = in_ram(&gpu, 8 * PAGE_SIZE, Backing::Small)?;
    Job::add(region, 1).run(&gpu)?;
    for state in gpu.query(region.pages())? {
        let shared = state.gpu.write && !state.gpu.atomic && state.cpu.write;
        ensure!(shared && state.gpu.place == Place::Ram, "{state:?}");
    }
    let before = gpu.stats()?.invalidations;
    oracle::check(region, SEED, 1)?;
    ensure!(gpu.stats()?.invalidations == before);
    Ok(())
}

/// A CPU thread and jobs add one to the first word of a region, all at once, until both have done so
/// several times and `enough` says so. Returns how often each of the two did.
fn add_at_once(gpu: &Gpu, region: Region, enough: impl Fn() -> Result<bool>) -> Result<(u64, u64)> {
    const WAVES: u32 = 4;
    const REPEAT: u64 = 1000;
    const LIMIT: Duration = Duration::from_secs(20);
    let stop = AtomicBool::new(false);
    let by_cpu = AtomicU64::new(0);
    let by_gpu = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                for _ in 0..16 {
                    region.atomic_add(0, 1);
                    by_cpu.fetch_add(1, Ordering::Relaxed);
                }
                // The page shall be the GPU's now and then.
                std::thread::sleep(Duration::from_micros(100));
            }
        });
        let run = (|| {
            let begin = Instant::now();
            let mut jobs = 0;
            while jobs < 8 || by_cpu.load(Ordering::Relaxed) < 64 || !enough()? {
                let add = Job::atomic_add(region.address(), 1, REPEAT).waves(WAVES);
                add.run(gpu)?;
                jobs += 1;
                let stats = gpu.stats()?;
                ensure!(
                    begin.elapsed() < LIMIT,
                    "{jobs} jobs, {by_cpu:?}, {stats:?}"
                );
            }
            Ok(jobs * REPEAT * u64::from(WAVES))
        })();
        stop.store(true, Ordering::Relaxed);
        run
    })?;
    Ok((by_cpu.into_inner(), by_gpu))
}

fn additions_of_cpu_and_gpu_to_one_word_are_all_there() -> Result<()> {
    let gpu = Gpu::open_first()?;
    for advice in [Advice::MapOnly, Advice::PreferCpu] {
        for backing in [Backing::Small, Backing::Huge] {
            let region = in_ram(&gpu, HUGE_PAGE_SIZE, backing)?;
            gpu.advise(region.pages(), advice)?;
            let word = page(region, 33);
            word.store(0, 0);
            let before = gpu.stats()?;
            // The page has to go to and fro, or nothing was at once.
            let turns = || {
                let now = gpu.stats()?;
                let lost = now.invalidations - before.invalidations;
                Ok(lost >= 8 && now.gpu_faults >= before.gpu_faults + 8)
            };
            let (by_cpu, by_gpu) = add_at_once(&gpu, word, turns)?;
            let is = word.load(0);
            let what = format!("{advice:?}, {backing:?}: {by_cpu} and {by_gpu} gave {is}");
            ensure!(is == by_cpu + by_gpu, "{what}");
            ensure!(gpu.stats()?.pages_to_vram == before.pages_to_vram, "{what}");
        }
    }
    Ok(())
}

/// The page is the CPU's, the GPU's in RAM and the GPU's in VRAM in turns, while both add.
fn additions_to_pages_that_move_to_and_fro_are_all_there() -> Result<()> {
    const PAGES: usize = 8;
    const ROUNDS: u64 = 24;
    let gpu = Gpu::open_first()?;
    let region = Region::map(PAGES * PAGE_SIZE, Backing::Small)?;
    gpu.advise(region.pages(), Advice::MapOnly)?;
    for round in 0..ROUNDS {
        let fences = (0..PAGES as u64).map(|page| {
            let word = region.address() + page * PAGE_SIZE as u64;
            Job::atomic_add(word, 1, 200).waves(2).submit(&gpu)
        });
        let fences = fences.collect::<Result<Vec<_>, _>>()?;
        match round % 3 {
            0 => migrate(&gpu, region, Place::Vram).map(drop)?,
            1 => gpu.make_exclusive(region.pages())?,
            _ => migrate(&gpu, region, Place::Ram).map(drop)?,
        }
        for page in 0..PAGES {
            region.atomic_add(page * WORDS_PER_PAGE, 1);
        }
        for fence in fences {
            let end = call::wait(&gpu, fence, call::JOB_TIME)?;
            call::ensure_status(&end, JobStatus::Ok)?;
        }
    }
    for page in 0..PAGES {
        let (is, should) = (region.load(page * WORDS_PER_PAGE), ROUNDS * 401);
        ensure!(
            is == should,
            "page {page} has {is} and should have {should}"
        );
    }
    Ok(())
}

fn part_of_a_huge_page_taken_splits_its_mapping_and_keeps_its_data() -> Result<()> {
    let gpu = Gpu::open_first()?;
    let region = in_ram(&gpu, HUGE_PAGE_SIZE, Backing::Huge)?;
    Job::add(region, 1).waves(2).run(&gpu)?;
    ensure!(
        state(&gpu, region, 0)?.cpu.huge,
        "no huge page to begin with"
    );
    // Or khugepaged may make one of it again.
    region.advise(stage::Advice::NoHugePage)?;
    let part = region.part(200 * PAGE_SIZE, 3 * PAGE_SIZE);
    gpu.make_exclusive(part.pages())?;
    let states = gpu.query(region.pages())?;
    ensure!(
        states
            .iter()
            .all(|state| !state.cpu.huge && !state.gpu.huge),
        "still one mapping"
    );
    ensure!(exclusive(&gpu, region)? == 3);
    // The GPU works on all of it, and leaves what it has as it is.
    Job::add(region, 1).waves(4).run(&gpu)?;
    ensure_all_exclusive(&gpu, part)?;
    let sum = Job::sum(region).waves(4).run(&gpu)?;
    ensure!(sum == oracle::expected_sum(region, SEED, 2));
    ensure_all_exclusive(&gpu, part)?;
    oracle::check(region, SEED, 2)?;
    ensure!(exclusive(&gpu, region)? == 0);
    Ok(())
}

fn huge_page_taken_as_a_whole_moves_to_vram_and_back() -> Result<()> {
    let gpu = Gpu::open_first()?;
    let region = in_ram(&gpu, 2 * HUGE_PAGE_SIZE, Backing::Huge)?;
    for round in 0..3 {
        gpu.make_exclusive(region.pages())?;
        ensure_all_exclusive(&gpu, region)?;
        Job::add(region, 1).waves(4).run(&gpu)?;
        oracle::check(region, SEED, 2 * round + 1)?;
        move_all(&gpu, region, Place::Vram)?;
        Job::add(region, 1).waves(4).run(&gpu)?;
        move_all(&gpu, region, Place::Ram)?;
        oracle::check(region, SEED, 2 * round + 2)?;
    }
    // Without a touch, too.
    gpu.make_exclusive(region.pages())?;
    move_all(&gpu, region, Place::Vram)?;
    Job::add(region, 1).waves(4).run(&gpu)?;
    oracle::check(region, SEED, 7)
}

fn fork_gives_pages_back_to_parent_and_child() -> Result<()> {
    let gpu = Gpu::open_first()?;
    for backing in [Backing::Small, Backing::Huge] {
        let region = in_ram(&gpu, HUGE_PAGE_SIZE, backing)?;
        let part = region.part(64 * PAGE_SIZE, 64 * PAGE_SIZE);
        gpu.make_exclusive(part.pages())?;
        Job::add(region, 1).waves(2).run(&gpu)?;
        ensure_all_exclusive(&gpu, part)?;
        let (from_parent, to_child) = pipe()?;
        let (mut from_parent, mut to_child) = (File::from(from_parent), File::from(to_child));
        let child = fork(|| {
            code((|| {
                // Half of it is looked at before, half of it after the parent has written.
                let half = region.length() / 2;
                oracle::check(region.part(0, half), SEED, 1)?;
                from_parent.read_exact(&mut [0])?;
                oracle::check(region, SEED, 1)?;
                // A GPU of its own takes the child's copies.
                let gpu = Gpu::open_first()?;
                gpu.make_exclusive(part.pages())?;
                ensure_all_exclusive(&gpu, part)?;
                Job::add(part, 100).run(&gpu)?;
                oracle::check_part(part, SEED, 64 * WORDS_PER_PAGE, 101)
            })())
        })?;
        let result = (|| {
            ensure!(exclusive(&gpu, part)? == 0, "the GPU kept pages over fork");
            gpu.make_exclusive(part.pages())?;
            Job::add(region, 5).waves(2).run(&gpu)?;
            oracle::check(region, SEED, 6)
        })();
        to_child.write_all(&[1])?;
        ensure!(child.wait()? == Ended::Exited(0), "{backing:?}");
        result.with_context(|| format!("{backing:?}"))?;
        oracle::check(region, SEED, 6)?;
    }
    Ok(())
}

fn mprotect_takes_pages_from_the_gpu() -> Result<()> {
    let gpu = Gpu::open_first()?;
    let region = in_ram(&gpu, 16 * PAGE_SIZE, Backing::Small)?;
    for (round, protection) in [Protection::Read, Protection::None].into_iter().enumerate() {
        let round = round as u64;
        gpu.make_exclusive(region.pages())?;
        add_to_each_page(&gpu, region, 1)?;
        region.protect(protection)?;
        ensure!(exclusive(&gpu, region)? == 0, "{protection:?}");
        let address = region.address();
        Job::atomic_add(address, 1, 1).fails_at(&gpu, address, Access::Atomic)?;
        if let Protection::Read = protection {
            check_each_page(region, SEED, round + 1)?;
        }
        region.protect(Protection::ReadWrite)?;
        check_each_page(region, SEED, round + 1)?;
    }
    add_to_each_page(&gpu, region, 1)?;
    check_each_page(region, SEED, 3)
}

fn munmap_and_mremap_take_pages_from_the_gpu() -> Result<()> {
    let gpu = Gpu::open_first()?;
    for backing in [Backing::Small, Backing::Huge] {
        let region = in_ram(&gpu, HUGE_PAGE_SIZE, backing)?;
        gpu.make_exclusive(region.pages())?;
        Job::add(region, 1).waves(2).run(&gpu)?;
        let hole = region.part(64 * PAGE_SIZE, 64 * PAGE_SIZE);
        hole.unmap()?;
        let address = hole.address();
        Job::atomic_add(address, 1, 1).fails_at(&gpu, address, Access::Atomic)?;
        let dropped = region.part(128 * PAGE_SIZE, 64 * PAGE_SIZE);
        dropped.discard()?;
        ensure!(Job::sum(dropped).run(&gpu)? == 0, "{backing:?}");
        let moving = region.part(256 * PAGE_SIZE, 64 * PAGE_SIZE);
        let moved = moving.remap()?;
        Job::sum(moving).fails_at(&gpu, moving.address(), Access::Read)?;
        gpu.make_exclusive(moved.pages())?;
        Job::add(moved, 1).run(&gpu)?;
        oracle::check_part(moved, SEED, 256 * WORDS_PER_PAGE, 2)?;
        for (offset, pages) in [(0, 64), (192, 64), (320, 192)] {
            let rest = region.part(offset * PAGE_SIZE, pages * PAGE_SIZE);
            oracle::check_part(rest, SEED, offset * WORDS_PER_PAGE, 1)?;
        }
    }
    Ok(())
}

fn process_that_exits_leaves_nothing() -> Result<()> {
    let region = Region::map(2 * HUGE_PAGE_SIZE, Backing::Huge)?;
    oracle::write(region, SEED);
    let deadline = Instant::now() + Duration::from_secs(60);
    for round in 0..6 {
        ensure!(Instant::now() < deadline, "{round} rounds by then");
        // Every other time with a job on the pages, and of another child's memory.
        let child = fork(|| {
            code((|| {
                let gpu = Gpu::open_first()?;
                gpu.advise(region.pages(), Advice::MapOnly)?;
                gpu.make_exclusive(region.pages())?;
                if round % 2 == 0 {
                    let add = Job::atomic_add(region.address(), 1, 1 << 40);
                    add.waves(4).submit(&gpu)?;
                }
                // The kernel closes the descriptor.
                std::mem::forget(gpu);
                Ok(())
            })())
        })?;
        ensure!(child.wait()? == Ended::Exited(0));
        oracle::check(region, SEED, 0)?;
    }
    Ok(())
}
