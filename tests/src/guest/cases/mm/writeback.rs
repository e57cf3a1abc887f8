// SPDX-License-Identifier: MIT OR Apache-2.0
//! Files on a disk (ext4) that the GPU has mapped: what it wrote reaches the disk, by `msync`, by `fsync`,
//! and by nothing but the end of the mapping. Writing back takes the GPU's right to write, so that its next
//! write is known. Files in memory are in [`super::files`].

use super::{
    start::{SEED, ensure_agreement, ensure_words, eventually, while_adding},
    storage::{Ext4, drop_caches},
};
use crate::guest::{
    call::{self, JOB_TIME, Job, ensure_status},
    child::{Gate, code},
    oracle,
    place::{count, migrate},
    settings,
};
use anyhow::{Context, Result, ensure};
use farfault::arena::{Backing, Region, call_at};
use farfault::{
    Access, Gpu, PAGE_SIZE, Place,
    process::{Child, Ended, fork},
    stage::Advice,
    uapi::{self, JobStatus},
};
use rustix::{
    fs::{FallocateFlags, fallocate, fsync, ftruncate},
    io::Errno,
};
use std::{
    fs::{self, File},
    os::unix::fs::FileExt,
    time::{Duration, Instant},
};

group! { "mm::writeback", on Disk, seconds 120:
    gpu_writes_to_a_shared_file_are_on_the_disk_after_msync,
    gpu_writes_to_a_shared_file_are_on_the_disk_after_fsync,
    gpu_writes_to_a_shared_file_are_on_the_disk_after_unmounting,
    gpu_writes_to_a_private_file_never_reach_it,
    writeback_takes_the_gpus_right_to_write_and_gives_it_back_by_fault,
    writeback_during_jobs_that_write_loses_nothing,
    clean_pages_reclaimed_are_read_again_by_the_gpu,
    file_truncated_under_a_job_is_a_fault_for_it_and_sigbus_for_a_cpu,
    file_truncated_within_a_page_shows_zeros_behind_its_end,
    hole_punched_under_a_job_shows_zeros_and_nothing_else_is_lost,
    open_by_a_process_whose_mmap_lock_a_frozen_disk_holds_keeps_nobody_else_waiting,
}

const LENGTH: usize = 1 << 20;
const WORDS_OF_A_PAGE: usize = PAGE_SIZE / 8;
const SIGBUS: Ended = Ended::Signaled(7);

/// The file with a seed's words, which are on the disk.
pub(super) fn seeded(ext4: &Ext4, length: usize) -> Result<File> {
    let file = ext4.open()?;
    ftruncate(&file, 0)?;
    let words = (0..length / 8).flat_map(|index| oracle::word(SEED, index).to_le_bytes());
    file.write_all_at(&words.collect::<Vec<_>>(), 0)?;
    fsync(&file)?;
    Ok(file)
}

pub(super) fn words(file: &File, length: usize) -> Result<Vec<u64>> {
    let mut bytes = vec![0; length];
    file.read_exact_at(&mut bytes, 0)?;
    let words = bytes.chunks_exact(8);
    Ok(words
        .map(|word| u64::from_le_bytes(word.try_into().unwrap_or_default()))
        .collect())
}

/// `read` gives a seed's words with `added`.
pub(super) fn ensure_file(file: &File, length: usize, added: u64) -> Result<()> {
    let words = words(file, length)?;
    let should = |index| oracle::word(SEED, index).wrapping_add(added);
    let wrong = (0..words.len()).find(|&index| words[index] != should(index));
    ensure!(
        wrong.is_none(),
        "word {wrong:?} of the file is {:x?} and should be {:x?}",
        wrong.map(|index| words[index]),
        wrong.map(should)
    );
    Ok(())
}

/// What the GPU wrote is in the file when nothing of it is in memory any more.
fn on_the_disk_after(sync: impl Fn(&File, Region) -> Result<()>) -> Result<()> {
    let ext4 = Ext4::mount()?;
    let gpu = Gpu::open_first()?;
    // Whether a CPU has looked at the pages, or written to them, before the GPU did.
    for (reads, writes) in [(false, false), (true, false), (true, true)] {
        let file = seeded(&ext4, LENGTH)?;
        drop_caches()?;
        let region = Region::map(LENGTH, Backing::File(&file))?;
        if reads {
            oracle::check(region, SEED, 0)?;
        }
        if writes {
            oracle::write(region, SEED);
        }
        Job::add(region, 1).waves(2).run(&gpu)?;
        sync(&file, region)?;
        Job::add(region, 1).waves(2).run(&gpu)?;
        sync(&file, region)?;
        region.unmap()?;
        // Pages that count as clean go, and the file is what the disk has.
        drop_caches()?;
        let context = || format!("the CPU reads: {reads}, writes: {writes}");
        ensure_file(&file, LENGTH, 2).with_context(context)?;
        drop(file);
        ext4.mount_again()?;
        ensure_file(&ext4.open()?, LENGTH, 2).with_context(context)?;
    }
    Ok(())
}

fn gpu_writes_to_a_shared_file_are_on_the_disk_after_msync() -> Result<()> {
    on_the_disk_after(|_, region| Ok(region.sync()?))
}

fn gpu_writes_to_a_shared_file_are_on_the_disk_after_fsync() -> Result<()> {
    on_the_disk_after(|file, _| Ok(fsync(file)?))
}

fn gpu_writes_to_a_shared_file_are_on_the_disk_after_unmounting() -> Result<()> {
    on_the_disk_after(|_, _| Ok(()))
}

fn gpu_writes_to_a_private_file_never_reach_it() -> Result<()> {
    let ext4 = Ext4::mount()?;
    let gpu = Gpu::open_first()?;
    let file = seeded(&ext4, LENGTH)?;
    let region = Region::map(LENGTH, Backing::FilePrivate(&file))?;
    // Pages of the file, mapped by the GPU; then its own copies of them; then some of these in VRAM.
    let sum = Job::sum(region).waves(2).run(&gpu)?;
    ensure!(sum == oracle::expected_sum(region, SEED, 0));
    Job::add(region, 1).waves(2).run(&gpu)?;
    fsync(&file)?;
    oracle::check(region, SEED, 1)?;
    ensure_file(&file, LENGTH, 0)?;
    migrate(&gpu, region.part(0, LENGTH / 2), Place::Vram)?;
    ensure!(count(&gpu, region, Place::Vram)? > 0);
    Job::add(region, 1).waves(2).run(&gpu)?;
    region.sync()?;
    oracle::check(region, SEED, 2)?;
    region.unmap()?;
    drop_caches()?;
    ensure_file(&file, LENGTH, 0)?;
    drop(file);
    ext4.mount_again()?;
    ensure_file(&ext4.open()?, LENGTH, 0)
}

/// How many pages the GPU may write to.
fn writable(gpu: &Gpu, region: Region) -> Result<usize> {
    let states = gpu.query(region.pages())?;
    Ok(states.iter().filter(|page| page.gpu.write).count())
}

fn writeback_takes_the_gpus_right_to_write_and_gives_it_back_by_fault() -> Result<()> {
    let ext4 = Ext4::mount()?;
    let gpu = Gpu::open_first()?;
    let file = seeded(&ext4, LENGTH)?;
    let region = Region::map(LENGTH, Backing::File(&file))?;
    let pages = region.pages().count();
    for round in 1..=4 {
        Job::add(region, 1).waves(2).run(&gpu)?;
        ensure!(writable(&gpu, region)? == pages);
        if round % 2 == 0 {
            region.sync()?;
        } else {
            fsync(&file)?;
        }
        ensure!(writable(&gpu, region)? == 0, "after writeback {round}");
        // To read is no reason to have it back.
        let sum = Job::sum(region).waves(2).run(&gpu)?;
        ensure!(sum == oracle::expected_sum(region, SEED, round));
        ensure!(writable(&gpu, region)? == 0, "after reading {round}");
        ensure_agreement(&gpu, region)?;
    }
    Job::add(region, 1).waves(2).run(&gpu)?;
    region.unmap()?;
    drop_caches()?;
    ensure_file(&file, LENGTH, 5)
}

fn writeback_during_jobs_that_write_loses_nothing() -> Result<()> {
    let ext4 = Ext4::mount()?;
    let gpu = Gpu::open_first()?;
    let file = seeded(&ext4, LENGTH)?;
    let region = Region::map(LENGTH, Backing::File(&file))?;
    // It counts in the last page all the time; others add to the rest.
    let counter = region.part(LENGTH - PAGE_SIZE, PAGE_SIZE);
    let rest = region.part(0, LENGTH - PAGE_SIZE);
    let begin = counter.load(0);
    let fence = Job::atomic_add(counter.address(), 1, u64::MAX).submit(&gpu)?;
    let end = Instant::now() + settings::duration(Duration::from_secs(1));
    let mut added = 0;
    while added < 2 || Instant::now() < end {
        while_adding(&gpu, rest, || {
            fsync(&file)?;
            Ok(region.sync()?)
        })?;
        added += 1;
    }
    let running = call::wait(&gpu, fence, Duration::ZERO);
    ensure!(running.is_err_and(|error| error == Errno::TIMEDOUT));
    call::kill(&gpu, fence)?;
    ensure_status(&call::wait(&gpu, fence, JOB_TIME)?, JobStatus::Killed)?;
    let counted = counter.load(0);
    ensure!(counted != begin);
    oracle::check(rest, SEED, added)?;
    region.unmap()?;
    drop_caches()?;
    let last = (LENGTH - PAGE_SIZE) / 8;
    ensure_file(&file, LENGTH - PAGE_SIZE, added)?;
    ensure!(
        words(&file, LENGTH)?[last] == counted,
        "the last of the counts is lost"
    );
    drop(file);
    ext4.mount_again()?;
    let file = ext4.open()?;
    ensure_file(&file, LENGTH - PAGE_SIZE, added)?;
    ensure!(words(&file, LENGTH)?[last] == counted);
    Ok(())
}

fn clean_pages_reclaimed_are_read_again_by_the_gpu() -> Result<()> {
    let ext4 = Ext4::mount()?;
    let gpu = Gpu::open_first()?;
    let file = seeded(&ext4, LENGTH)?;
    let region = Region::map(LENGTH, Backing::File(&file))?;
    for round in 1..=3 {
        Job::add(region, 1).waves(2).run(&gpu)?;
        // Dirty pages stay.
        region.advise(Advice::PageOut)?;
        let sum = Job::sum(region).waves(2).run(&gpu)?;
        ensure!(sum == oracle::expected_sum(region, SEED, round));
        region.sync()?;
        eventually("clean pages go", || {
            region.advise(Advice::PageOut)?;
            drop_caches()?;
            Ok(count(&gpu, region, Place::Ram)? == 0)
        })?;
        let states = gpu.query(region.pages())?;
        ensure!(states.iter().all(|page| page.gpu.place == Place::None));
        let sum = Job::sum(region).waves(2).run(&gpu)?;
        ensure!(sum == oracle::expected_sum(region, SEED, round));
    }
    region.unmap()?;
    ensure_file(&file, LENGTH, 3)
}

fn file_truncated_under_a_job_is_a_fault_for_it_and_sigbus_for_a_cpu() -> Result<()> {
    let ext4 = Ext4::mount()?;
    let gpu = Gpu::open_first()?;
    let file = seeded(&ext4, LENGTH)?;
    let region = Region::map(LENGTH, Backing::File(&file))?;
    let half = LENGTH / 2;
    let (kept, cut) = (region.part(0, half), region.part(half, half));
    let begin = cut.load(0);
    let fence = Job::atomic_add(cut.address(), 1, u64::MAX).submit(&gpu)?;
    eventually("the job writes", || Ok(cut.load(0) != begin))?;
    while_adding(&gpu, kept, || Ok(ftruncate(&file, half as u64)?))?;
    let end = call::wait(&gpu, fence, JOB_TIME)?;
    ensure_status(&end, JobStatus::Fault)?;
    ensure!(end.fault_address == cut.address(), "{end:x?}");
    Job::sum(cut).fails_at(&gpu, cut.address(), Access::Read)?;
    let cpu = fork(|| code(oracle::check(cut.part(0, PAGE_SIZE), SEED, 0)))?;
    let ended = cpu.wait()?;
    ensure!(ended == SIGBUS, "a CPU beyond the end: {ended:?}");
    // Longer again: zeros, and writes go to the disk.
    ftruncate(&file, LENGTH as u64)?;
    ensure!(Job::sum(cut).waves(2).run(&gpu)? == 0);
    Job::fill(cut, 6).waves(2).run(&gpu)?;
    ensure_words(cut, 6)?;
    region.unmap()?;
    drop_caches()?;
    ensure_file(&file, half, 1)?;
    ensure!(
        words(&file, LENGTH)?[half / 8..]
            .iter()
            .all(|&word| word == 6)
    );
    Ok(())
}

fn file_truncated_within_a_page_shows_zeros_behind_its_end() -> Result<()> {
    let ext4 = Ext4::mount()?;
    let gpu = Gpu::open_first()?;
    let file = seeded(&ext4, 2 * PAGE_SIZE)?;
    let region = Region::map(2 * PAGE_SIZE, Backing::File(&file))?;
    Job::add(region, 1).run(&gpu)?;
    let kept = WORDS_OF_A_PAGE / 2;
    ftruncate(&file, kept as u64 * 8)?;
    let first = region.part(0, PAGE_SIZE);
    let should = oracle::sum(SEED, 0..kept).wrapping_add(kept as u64);
    ensure!(Job::sum(first).run(&gpu)? == should);
    ensure!((kept..WORDS_OF_A_PAGE).all(|index| first.load(index) == 0));
    let second = region.part(PAGE_SIZE, PAGE_SIZE);
    Job::fill(second, 1).fails_at(&gpu, second.address(), Access::Write)?;
    // What is written behind the end, in its page, is not in the file.
    Job::fill(first, 9).run(&gpu)?;
    region.sync()?;
    ftruncate(&file, PAGE_SIZE as u64)?;
    let words = words(&file, PAGE_SIZE)?;
    ensure!(words[..kept].iter().all(|&word| word == 9));
    ensure!(words[kept..].iter().all(|&word| word == 0));
    Ok(region.unmap()?)
}

fn hole_punched_under_a_job_shows_zeros_and_nothing_else_is_lost() -> Result<()> {
    const HOLE: usize = 16 * PAGE_SIZE;
    let ext4 = Ext4::mount()?;
    let gpu = Gpu::open_first()?;
    let file = seeded(&ext4, LENGTH)?;
    let region = Region::map(LENGTH, Backing::File(&file))?;
    let (hole, rest) = (region.part(0, HOLE), region.part(HOLE, LENGTH - HOLE));
    let fence = Job::atomic_add(hole.address(), 1, u64::MAX).submit(&gpu)?;
    for round in 1..=10u64 {
        Job::fill(hole.part(PAGE_SIZE, HOLE - PAGE_SIZE), round).run(&gpu)?;
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        while_adding(&gpu, rest, || Ok(fallocate(&file, flags, 0, HOLE as u64)?))?;
        ensure_words(hole.part(PAGE_SIZE, HOLE - PAGE_SIZE), 0)?;
        let count = hole.load(0);
        eventually(
            "the job counts in the new page",
            || Ok(hole.load(0) > count),
        )?;
    }
    call::kill(&gpu, fence)?;
    ensure_status(&call::wait(&gpu, fence, JOB_TIME)?, JobStatus::Killed)?;
    let counted = hole.load(0);
    oracle::check_part(rest, SEED, HOLE / 8, 10)?;
    region.unmap()?;
    drop_caches()?;
    let words = words(&file, LENGTH)?;
    ensure!(words[0] == counted && words[1..HOLE / 8].iter().all(|&word| word == 0));
    let should = |index| oracle::word(SEED, index).wrapping_add(10);
    ensure!((HOLE / 8..words.len()).all(|index| words[index] == should(index)));
    Ok(())
}

fn is_in_state(child: &Child, state: char) -> Result<bool> {
    let pid = child.pid().context("a child that was waited for")?;
    let stat = fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_pid()))?;
    let (_, behind_name) = stat.rsplit_once(") ").context("/proc/PID/stat")?;
    Ok(behind_name.starts_with(state))
}

/// The opener's first call waits. Others who open the node do not, nor does a child that has his descriptor.
fn open_by_a_process_whose_mmap_lock_a_frozen_disk_holds_keeps_nobody_else_waiting() -> Result<()> {
    const REFUSED: u64 = 1;
    let ext4 = Ext4::mount()?;
    let file = seeded(&ext4, PAGE_SIZE)?;
    let region = Region::map(PAGE_SIZE, Backing::File(&file))?;
    let said = Region::map(PAGE_SIZE, Backing::Shared)?;
    let gates = [Gate::new()?, Gate::new()?, Gate::new()?, Gate::new()?];
    let [held_may, heir_may, writer_may, other_may] = &gates;
    let held = fork(|| {
        code((|| {
            let node = call::open_raw(call::NODE)?;
            let ping = || call_at(&node, uapi::IOC_PING, 0);
            let heir = fork(|| {
                code((|| {
                    heir_may.wait()?;
                    let events = call::events(&node, Duration::ZERO)?;
                    ensure!(events.is_empty(), "poll gave {events:?}");
                    let pinged = ping();
                    ensure!(pinged == Err(Errno::PERM), "PING gave {pinged:?}");
                    said.store(0, REFUSED);
                    Ok(())
                })())
            })?;
            held_may.wait()?;
            ping()?;
            let ended = heir.wait()?;
            ensure!(ended == Ended::Exited(0), "the heir: {ended:?}");
            Ok(())
        })())
    })?;
    let held_pid = held.pid().context("a child")?;
    let write = || {
        let written = region.write_process(held_pid, region)?;
        ensure!(written == PAGE_SIZE, "{written} bytes");
        Ok(())
    };
    let writer = fork(|| code(writer_may.wait().and_then(|()| write())))?;
    let open = || Ok(Gpu::open_first().map(drop)?);
    let other = fork(|| code(other_may.wait().and_then(|()| open())))?;
    // Dropped before the children, which could not be killed.
    let frozen = ext4.freeze()?;
    writer_may.open()?;
    eventually("the writer waits", || is_in_state(&writer, 'D'))?;
    held_may.open()?;
    eventually("the opener waits", || is_in_state(&held, 'D'))?;
    other_may.open()?;
    eventually("another one has opened it", || is_in_state(&other, 'Z'))?;
    heir_may.open()?;
    eventually("the heir is refused", || Ok(said.load(0) == REFUSED))?;
    ensure!(is_in_state(&held, 'D')?, "the lock was not held");
    drop(frozen);
    for child in [writer, held, other] {
        let ended = child.wait()?;
        ensure!(ended == Ended::Exited(0), "{ended:?}");
    }
    region.unmap()?;
    Ok(())
}
