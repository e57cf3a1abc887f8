// SPDX-License-Identifier: MIT OR Apache-2.0
//! Files in memory that the GPU has mapped: tmpfs, memfd, shared anonymous memory and hugetlbfs, shared
//! and private. What the GPU wrote is in the file, whatever happens to the mapping.

use super::start::{SEED, ensure_words, eventually};
use crate::guest::{
    call::{self, JOB_TIME, Job, ensure_status},
    child::code,
    oracle, settings,
    tunables::huge_page_pool,
};
use anyhow::{Context, Result, ensure};
use farfault::arena::{Backing, Region};
use farfault::{
    Access, Gpu, HUGE_PAGE_SIZE, PAGE_SIZE,
    process::{Ended, fork},
    stage::Advice,
    uapi::JobStatus,
};
use rustix::{
    fs::{FallocateFlags, MemfdFlags, fallocate, fsync, ftruncate, memfd_create},
    io::Errno,
    mount::{MountFlags, UnmountFlags, mount, unmount},
};
use std::{
    fs::{self, File, OpenOptions},
    os::unix::fs::FileExt,
    path::PathBuf,
    time::{Duration, Instant},
};

group! { "mm::files", gpus 1, seconds 60:
    shared_file_written_by_the_gpu_keeps_it_without_the_mapping,
    shared_file_written_by_the_gpu_is_clean_and_written_again,
    private_file_written_by_the_gpu_keeps_its_own_pages,
    shared_file_written_by_the_gpu_is_seen_by_a_child_and_the_other_way_round,
    shared_anonymous_memory_written_by_the_gpu_is_seen_by_a_child,
    file_truncated_fails_the_gpu_beyond_its_end,
    file_truncated_during_a_job_ends_it,
    hole_punched_shows_zeros_and_new_pages,
    hole_punched_during_a_job_loses_nothing_outside,
    hugetlbfs_file_written_by_the_gpu_keeps_it_without_the_mapping,
    hugetlbfs_file_truncated_during_a_job_ends_it,
    hugetlb_memory_discarded_while_the_gpu_faults_on_it_is_there_again,
}

const LENGTH: usize = 64 * PAGE_SIZE;

/// A folder on a file system of its own, which goes when this is dropped.
pub(super) struct Mounted(PathBuf);

impl Mounted {
    pub(super) fn new(kind: &str, options: &str) -> Result<Self> {
        let folder = PathBuf::from(format!("/tmp/farfault-{kind}-{}", std::process::id()));
        fs::create_dir_all(&folder)?;
        let options = std::ffi::CString::new(options)?;
        mount(kind, &folder, kind, MountFlags::empty(), options.as_c_str())
            .with_context(|| format!("mounting {kind}"))?;
        Ok(Self(folder))
    }

    pub(super) fn file(&self, length: usize) -> Result<File> {
        let path = self.0.join("file");
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(path)?;
        ftruncate(&file, length as u64)?;
        Ok(file)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // Lazily: a mapping may be left of a case that failed.
        let _ = unmount(&self.0, UnmountFlags::DETACH);
        let _ = fs::remove_dir(&self.0);
    }
}

/// How a file is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Memfd,
    Tmpfs,
    /// A huge page, since `MADV_COLLAPSE`.
    Collapsed,
    /// A huge page from the first touch on.
    TmpfsHuge,
}

impl Kind {
    const ALL: [Self; 4] = [Self::Memfd, Self::Tmpfs, Self::Collapsed, Self::TmpfsHuge];

    fn is_huge(self) -> bool {
        matches!(self, Self::Collapsed | Self::TmpfsHuge)
    }

    /// A file, with what it lives on. A huge one is longer.
    fn file(self, length: usize) -> Result<(File, Option<Mounted>)> {
        let options = match self {
            Self::Tmpfs => "huge=never,size=64M",
            Self::TmpfsHuge => "huge=always,size=64M",
            Self::Memfd | Self::Collapsed => {
                let file = File::from(memfd_create("farfault-test", MemfdFlags::CLOEXEC)?);
                ftruncate(&file, self.length(length) as u64)?;
                return Ok((file, None));
            }
        };
        let mounted = Mounted::new("tmpfs", options)?;
        Ok((mounted.file(self.length(length))?, Some(mounted)))
    }

    fn length(self, length: usize) -> usize {
        if self.is_huge() {
            length.next_multiple_of(HUGE_PAGE_SIZE)
        } else {
            length
        }
    }
}

/// Whether CPU and GPU have all of a region mapped as huge pages.
pub(super) fn is_huge(gpu: &Gpu, region: Region) -> Result<bool> {
    let states = gpu.query(region.pages())?;
    Ok(states.iter().all(|page| page.cpu.huge && page.gpu.huge))
}

/// Runs a case on a file of each kind, of so many bytes at least, that the GPU has mapped and written to.
fn each_file(length: usize, case: impl Fn(&Gpu, &File, Region) -> Result<()>) -> Result<()> {
    for kind in Kind::ALL {
        let (file, mounted) = kind.file(length)?;
        let gpu = Gpu::open_first()?;
        let region = Region::map(kind.length(length), Backing::File(&file))?;
        oracle::write(region, SEED);
        if kind == Kind::Collapsed {
            eventually("the file is collapsed", || {
                Ok(region.advise(Advice::Collapse).is_ok())
            })?;
        }
        Job::add(region, 0).waves(2).run(&gpu)?;
        ensure!(
            !kind.is_huge() || is_huge(&gpu, region)?,
            "{kind:?}: not in huge pages"
        );
        case(&gpu, &file, region).with_context(|| format!("{kind:?}"))?;
        region.unmap()?;
        drop(file);
        drop(mounted);
    }
    Ok(())
}

fn read(file: &File, length: usize) -> Result<Vec<u64>> {
    let mut bytes = vec![0; length];
    file.read_exact_at(&mut bytes, 0)?;
    let words = bytes.chunks_exact(8);
    Ok(words
        .map(|word| u64::from_le_bytes(word.try_into().unwrap_or_default()))
        .collect())
}

/// `read` gives words of the seed with `added`.
fn ensure_file(file: &File, length: usize, added: u64) -> Result<()> {
    let words = read(file, length)?;
    let wrong = (0..words.len()).find(|&i| words[i] != oracle::word(SEED, i).wrapping_add(added));
    ensure!(wrong.is_none(), "word {wrong:?} of the file");
    Ok(())
}

fn shared_file_written_by_the_gpu_keeps_it_without_the_mapping() -> Result<()> {
    each_file(2 << 20, |gpu, file, region| {
        Job::add(region, 1).waves(2).run(gpu)?;
        ensure_file(file, region.length(), 1)?;
        Job::add(region, 1).waves(2).run(gpu)?;
        region.unmap()?;
        ensure_file(file, region.length(), 2)?;
        fs::write("/proc/sys/vm/drop_caches", "3")?;
        let again = Region::map(region.length(), Backing::File(file))?;
        let sum = Job::sum(again).waves(2).run(gpu)?;
        ensure!(sum == oracle::expected_sum(again, SEED, 2));
        // The GPU's writes by one mapping are seen by the CPU in another, and in the file.
        let other = Region::map(region.length(), Backing::File(file))?;
        Job::add(again, 1).waves(2).run(gpu)?;
        oracle::check(other, SEED, 3)?;
        again.unmap()?;
        oracle::check(other, SEED, 3)?;
        Ok(other.unmap()?)
    })
}

fn shared_file_written_by_the_gpu_is_clean_and_written_again() -> Result<()> {
    each_file(LENGTH, |gpu, file, region| {
        for added in 1..4 {
            Job::add(region, 1).waves(2).run(gpu)?;
            region.sync()?;
            fsync(file)?;
            region.advise(Advice::Cold)?;
            region.advise(Advice::PageOut)?;
            ensure_file(file, region.length(), added)?;
            oracle::check(region, SEED, added)?;
        }
        Ok(())
    })
}

fn private_file_written_by_the_gpu_keeps_its_own_pages() -> Result<()> {
    each_file(LENGTH, |gpu, file, shared| {
        let private = Region::map(shared.length(), Backing::FilePrivate(file))?;
        let sum = Job::sum(private).waves(2).run(gpu)?;
        ensure!(sum == oracle::expected_sum(private, SEED, 0));
        Job::add(private, 1).waves(2).run(gpu)?;
        Job::add(shared, 5).waves(2).run(gpu)?;
        oracle::check(private, SEED, 1)?;
        ensure_file(file, shared.length(), 5)?;
        // Its own pages may go to VRAM; thrown away, they are the file's again.
        gpu.migrate(private.pages(), farfault::Place::Vram)?;
        Job::add(private, 1).waves(2).run(gpu)?;
        oracle::check(private, SEED, 2)?;
        gpu.migrate(private.pages(), farfault::Place::Vram)?;
        private.advise(Advice::DontNeed)?;
        let sum = Job::sum(private).waves(2).run(gpu)?;
        ensure!(sum == oracle::expected_sum(private, SEED, 5));
        oracle::check(private, SEED, 5)?;
        Ok(private.unmap()?)
    })
}

fn shared_file_written_by_the_gpu_is_seen_by_a_child_and_the_other_way_round() -> Result<()> {
    each_file(LENGTH, |gpu, file, region| {
        let private = Region::map(region.length(), Backing::FilePrivate(file))?;
        Job::add(private, 7).waves(2).run(gpu)?;
        Job::add(region, 1).waves(2).run(gpu)?;
        let child = fork(|| {
            code((|| {
                let gpu = Gpu::open_first()?;
                oracle::check(region, SEED, 1)?;
                Job::add(region, 1).waves(2).run(&gpu)?;
                Job::add(private, 1).waves(2).run(&gpu)?;
                oracle::check(private, SEED, 8)
            })())
        })?;
        ensure!(child.wait()? == Ended::Exited(0));
        let sum = Job::sum(region).waves(2).run(gpu)?;
        ensure!(sum == oracle::expected_sum(region, SEED, 2));
        oracle::check(private, SEED, 7)?;
        ensure_file(file, region.length(), 2)?;
        Ok(private.unmap()?)
    })
}

fn shared_anonymous_memory_written_by_the_gpu_is_seen_by_a_child() -> Result<()> {
    let gpu = Gpu::open_first()?;
    let region = Region::map(2 << 20, Backing::Shared)?;
    oracle::write(region, SEED);
    Job::add(region, 1).waves(2).run(&gpu)?;
    let child = fork(|| {
        code((|| {
            oracle::check(region, SEED, 1)?;
            let gpu = Gpu::open_first()?;
            Job::add(region, 1).waves(2).run(&gpu)?;
            Ok(region.unmap()?)
        })())
    })?;
    ensure!(child.wait()? == Ended::Exited(0));
    oracle::check(region, SEED, 2)?;
    Job::add(region, 1).waves(2).run(&gpu)?;
    region.advise(Advice::Remove)?;
    ensure!(Job::sum(region).waves(2).run(&gpu)? == 0);
    Job::fill(region, 6).waves(2).run(&gpu)?;
    ensure_words(region, 6)
}

fn file_truncated_fails_the_gpu_beyond_its_end() -> Result<()> {
    each_file(2 << 20, |gpu, file, region| {
        let (kept, end) = (
            region.part(0, LENGTH),
            region.part(LENGTH, (2 << 20) - LENGTH),
        );
        ftruncate(file, LENGTH as u64)?;
        Job::sum(end).fails_at(gpu, end.address(), Access::Read)?;
        Job::fill(end, 1).fails_at(gpu, end.address(), Access::Write)?;
        Job::add(kept, 1).waves(2).run(gpu)?;
        ftruncate(file, region.length() as u64)?;
        ensure!(
            Job::sum(end).waves(2).run(gpu)? == 0,
            "old data behind the new end"
        );
        Job::fill(end, 2).waves(2).run(gpu)?;
        ensure_words(end, 2)?;
        oracle::check(kept, SEED, 1)?;
        let words = read(file, region.length())?;
        ensure!(words[LENGTH / 8..].iter().all(|&word| word == 2));
        Ok(())
    })
}

fn file_truncated_during_a_job_ends_it() -> Result<()> {
    each_file(LENGTH, |gpu, file, region| {
        let fence = Job::atomic_add(region.address(), 1, u64::MAX).submit(gpu)?;
        let begins = region.load(0);
        eventually("the job writes", || Ok(region.load(0) != begins))?;
        ftruncate(file, 0)?;
        let end = call::wait(gpu, fence, JOB_TIME)?;
        ensure_status(&end, JobStatus::Fault)?;
        ensure!(end.fault_address == region.address(), "{end:x?}");
        ftruncate(file, region.length() as u64)?;
        ensure_words(region, 0)
    })
}

fn hole_punched_shows_zeros_and_new_pages() -> Result<()> {
    each_file(2 << 20, |gpu, file, region| {
        let (from, length) = (LENGTH, 2 * LENGTH);
        let hole = region.part(from, length);
        fallocate(
            file,
            FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
            from as u64,
            length as u64,
        )?;
        ensure!(
            Job::sum(hole).waves(2).run(gpu)? == 0,
            "old data in the hole"
        );
        Job::fill(hole, 3).waves(2).run(gpu)?;
        ensure_words(hole, 3)?;
        let words = read(file, region.length())?;
        ensure!(
            words[from / 8..(from + length) / 8]
                .iter()
                .all(|&word| word == 3)
        );
        oracle::check(region.part(0, from), SEED, 0)?;
        let end = from + length;
        oracle::check_part(region.part(end, (2 << 20) - end), SEED, end / 8, 0)
    })
}

fn hole_punched_during_a_job_loses_nothing_outside() -> Result<()> {
    each_file(LENGTH, |gpu, file, region| {
        // It counts in one page, and holes are punched there and beside it all the time.
        let fence = Job::atomic_add(region.address(), 1, u64::MAX).submit(gpu)?;
        let rest = region.part(PAGE_SIZE, region.length() - PAGE_SIZE);
        for round in 1..=20u64 {
            Job::fill(rest, round).waves(2).run(gpu)?;
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            fallocate(file, flags, 0, PAGE_SIZE as u64)?;
            let count = region.load(0);
            ensure_words(rest, round)?;
            eventually("the job counts in the new page", || {
                Ok(region.load(0) > count)
            })?;
        }
        let running = call::wait(gpu, fence, Duration::ZERO);
        ensure!(running.is_err_and(|error| error == Errno::TIMEDOUT));
        call::kill(gpu, fence)?;
        ensure_status(&call::wait(gpu, fence, JOB_TIME)?, JobStatus::Killed)
    })
}

fn hugetlbfs_file_written_by_the_gpu_keeps_it_without_the_mapping() -> Result<()> {
    let _pool = huge_page_pool(4)?;
    let mounted = Mounted::new("hugetlbfs", "pagesize=2M")?;
    let file = mounted.file(2 * HUGE_PAGE_SIZE)?;
    let gpu = Gpu::open_first()?;
    let region = Region::map(2 * HUGE_PAGE_SIZE, Backing::File(&file))?;
    oracle::write(region, SEED);
    Job::add(region, 1).waves(2).run(&gpu)?;
    oracle::check(region, SEED, 1)?;
    region.unmap()?;
    ensure_file(&file, region.length(), 1)?;
    let shared = Region::map(2 * HUGE_PAGE_SIZE, Backing::File(&file))?;
    let private = Region::map(HUGE_PAGE_SIZE, Backing::FilePrivate(&file))?;
    Job::add(private, 1).waves(2).run(&gpu)?;
    oracle::check(private, SEED, 2)?;
    oracle::check(shared, SEED, 1)?;
    fallocate(
        &file,
        FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
        0,
        HUGE_PAGE_SIZE as u64,
    )?;
    ensure!(
        Job::sum(shared.part(0, HUGE_PAGE_SIZE))
            .waves(2)
            .run(&gpu)?
            == 0
    );
    private.unmap()?;
    Job::fill(shared.part(0, HUGE_PAGE_SIZE), 8)
        .waves(2)
        .run(&gpu)?;
    ensure_words(shared.part(0, HUGE_PAGE_SIZE), 8)?;
    drop(gpu);
    Ok(shared.unmap()?)
}

fn hugetlbfs_file_truncated_during_a_job_ends_it() -> Result<()> {
    let _pool = huge_page_pool(2)?;
    let mounted = Mounted::new("hugetlbfs", "pagesize=2M")?;
    let file = mounted.file(HUGE_PAGE_SIZE)?;
    let gpu = Gpu::open_first()?;
    let region = Region::map(HUGE_PAGE_SIZE, Backing::File(&file))?;
    let fence = Job::atomic_add(region.address(), 1, u64::MAX).submit(&gpu)?;
    eventually("the job writes", || Ok(region.load(0) != 0))?;
    ftruncate(&file, 0)?;
    let end = call::wait(&gpu, fence, JOB_TIME)?;
    ensure_status(&end, JobStatus::Fault)?;
    Ok(region.unmap()?)
}

/// Who discards waits for who faults, and the other way round.
fn hugetlb_memory_discarded_while_the_gpu_faults_on_it_is_there_again() -> Result<()> {
    let _pool = huge_page_pool(2)?;
    let gpu = Gpu::open_first()?;
    let region = Region::map(HUGE_PAGE_SIZE, Backing::HugeTlb)?;
    let fence = Job::atomic_add(region.address(), 1, u64::MAX).submit(&gpu)?;
    let end = Instant::now() + settings::duration(Duration::from_secs(1));
    while Instant::now() < end {
        for _ in 0..20 {
            region.discard()?;
        }
        let count = region.load(0);
        eventually("the job counts", || Ok(region.load(0) != count))?;
    }
    call::kill(&gpu, fence)?;
    ensure_status(&call::wait(&gpu, fence, JOB_TIME)?, JobStatus::Killed)?;
    Ok(region.unmap()?)
}
