// SPDX-License-Identifier: MIT OR Apache-2.0
//! `madvise`: what it promises for memory in RAM holds for memory that the GPU has, too.

use super::start::{
    At, SEED, STARTS, each_start, ensure_agreement, ensure_sum, ensure_words, exercise,
    exercise_all, exercise_empty,
};
use crate::guest::{call::Job, child::code, oracle};
use anyhow::{Context, Result, ensure};
use farfault::arena::{Backing, Region};
use farfault::{
    Access, Advice as PlaceAdvice, Gpu, HUGE_PAGE_SIZE, Kernel, PAGE_SIZE, Place,
    process::{Ended, fork},
    stage::Advice,
};

group! { "mm::madvise", gpus 1, seconds 60:
    dontneed_leaves_zeros_and_new_pages,
    dontneed_of_part_leaves_the_rest,
    dontneed_of_a_thousand_scattered_pages_leaves_the_gpu_none,
    free_leaves_old_data_or_zeros_the_same_for_cpu_and_gpu,
    free_then_only_read_by_the_gpu_goes,
    free_then_written_by_the_gpu_is_kept,
    free_then_written_by_the_gpu_in_vram_is_kept_in_ram,
    free_then_moved_by_one_request_and_written_by_the_gpu_is_kept,
    cold_and_pageout_keep_the_data,
    willneed_keeps_the_data,
    hugepage_and_nohugepage_keep_the_data,
    mergeable_and_unmergeable_keep_the_data,
    wipeonfork_is_zero_in_the_child_and_kept_in_the_parent,
    dontfork_is_missing_in_the_child_and_kept_in_the_parent,
}

const QUARTER: usize = HUGE_PAGE_SIZE / 4;

fn dontneed_leaves_zeros_and_new_pages() -> Result<()> {
    each_start(|gpu, region| {
        region.advise(Advice::DontNeed)?;
        exercise_empty(gpu, region)?;
        oracle::write(region, SEED);
        exercise_all(gpu, region)
    })
}

fn dontneed_of_part_leaves_the_rest() -> Result<()> {
    each_start(|gpu, region| {
        // Over the border between the halves.
        let hole = region.part(QUARTER, 2 * QUARTER);
        hole.advise(Advice::DontNeed)?;
        exercise(gpu, region.part(0, QUARTER), 0, 0)?;
        exercise_empty(gpu, hole)?;
        exercise(gpu, region.part(3 * QUARTER, QUARTER), 3 * QUARTER / 8, 0)
    })
}

/// More entries to be cleared than go into one request to the device.
fn dontneed_of_a_thousand_scattered_pages_leaves_the_gpu_none() -> Result<()> {
    let gpu = Gpu::open_first()?;
    let region = Region::map(4 * HUGE_PAGE_SIZE, Backing::Small)?;
    gpu.advise(region.pages(), PlaceAdvice::MapOnly)?;
    // Every other page is there, and leads to the next.
    let pages = || (0..region.pages().count()).step_by(2);
    let words = PAGE_SIZE / 8;
    for page in pages() {
        let next = region.address() + ((page + 2) * PAGE_SIZE) as u64;
        region.store(page * words, next);
    }
    let count = pages().count() as u64;
    Job::new(Kernel::PointerChase, [region.address(), count - 1, 0, 0]).run(&gpu)?;
    let mapped = |gpu: &Gpu| -> Result<usize> {
        let states = gpu.query(region.pages())?;
        Ok(states
            .iter()
            .filter(|page| page.gpu.place != Place::None)
            .count())
    };
    ensure!(
        mapped(&gpu)? as u64 == count,
        "the GPU has {} pages",
        mapped(&gpu)?
    );
    region.advise(Advice::DontNeed)?;
    ensure!(
        mapped(&gpu)? == 0,
        "the GPU has {} pages left",
        mapped(&gpu)?
    );
    for page in pages() {
        region.store(page * words, 1);
    }
    ensure!(Job::sum(region).waves(4).run(&gpu)? == count);
    Ok(region.unmap()?)
}

fn free_leaves_old_data_or_zeros_the_same_for_cpu_and_gpu() -> Result<()> {
    each_start(|gpu, region| {
        region.advise(Advice::Free)?;
        region.advise(Advice::PageOut)?;
        let words = region.words() / region.pages().count();
        let sum = Job::sum(region).waves(2).run(gpu)?;
        let mut should = 0u64;
        for page in 0..region.pages().count() {
            let part = region.part(page * PAGE_SIZE, PAGE_SIZE);
            let first = page * words;
            if part.load(0) == 0 {
                ensure_words(part, 0)?;
            } else {
                oracle::check_part(part, SEED, first, 0)?;
                should = should.wrapping_add(oracle::sum(SEED, first..first + words));
            }
        }
        ensure!(sum == should, "GPU and CPU read different memory");
        oracle::write(region, SEED);
        exercise_all(gpu, region)
    })
}

/// A read makes nothing dirty. This also shows that the kernel does take such memory when it is asked to,
/// so that the next cases prove something.
fn free_then_only_read_by_the_gpu_goes() -> Result<()> {
    for start in STARTS.into_iter().filter(|start| start.at == At::Ram) {
        let gpu = Gpu::open_first()?;
        let region = start.region(&gpu, 2 * HUGE_PAGE_SIZE)?;
        region.advise(Advice::Free)?;
        Job::sum(region).waves(2).run(&gpu)?;
        region.advise(Advice::PageOut)?;
        let words = PAGE_SIZE / 8;
        let pages = 0..region.pages().count();
        let gone = pages.filter(|page| region.load(page * words) == 0).count();
        // Those freed last may wait in the list of a CPU.
        ensure!(gone > 256, "{start:?}: {gone} pages are gone");
        ensure_agreement(&gpu, region)?;
        region.unmap()?;
    }
    Ok(())
}

fn free_then_written_by_the_gpu_is_kept() -> Result<()> {
    each_start(|gpu, region| {
        region.advise(Advice::Free)?;
        Job::fill(region, 7).waves(2).run(gpu)?;
        region.advise(Advice::PageOut)?;
        ensure_words(region, 7)?;
        let sum = Job::sum(region).waves(2).run(gpu)?;
        ensure!(sum == 7 * region.words() as u64);
        // Again, with what the GPU has written last in RAM or VRAM as it is now.
        region.advise(Advice::Free)?;
        Job::fill(region, 8).waves(2).run(gpu)?;
        region.advise(Advice::Cold)?;
        region.advise(Advice::PageOut)?;
        ensure_words(region, 8)?;
        // And where a read has mapped them before. What it reads is what was there, or nothing.
        region.advise(Advice::Free)?;
        Job::sum(region).waves(2).run(gpu)?;
        Job::fill(region, 9).waves(2).run(gpu)?;
        region.advise(Advice::PageOut)?;
        ensure_words(region, 9)?;
        ensure_agreement(gpu, region)
    })
}

/// In VRAM, only the driver knows of the GPU's stores. In RAM, what nobody has written to since may go.
/// It shows in pages of VRAM that nobody has had since the GPU was bound: others are kept by what their
/// last owner has left in their flags.
fn free_then_written_by_the_gpu_in_vram_is_kept_in_ram() -> Result<()> {
    let gpu = Gpu::open_first()?;
    let mut memory = Vec::new();
    for backing in [Backing::Small, Backing::Huge] {
        // The pages go to VRAM on request, or by the faults of the job, which may read before it writes.
        for (asked, read) in [(true, true), (true, false), (false, true), (false, false)] {
            let region = Region::map(HUGE_PAGE_SIZE, backing)?;
            oracle::write(region, SEED);
            region.advise(Advice::Free)?;
            if asked {
                gpu.migrate(region.pages(), Place::Vram)?;
            }
            if read {
                Job::sum(region).waves(2).run(&gpu)?;
            }
            Job::fill(region, 7).waves(2).run(&gpu)?;
            memory.push((region, backing, asked, read));
        }
    }
    for (region, backing, asked, read) in memory {
        gpu.migrate(region.pages(), Place::Ram)?;
        region.advise(Advice::PageOut)?;
        ensure_words(region, 7)
            .with_context(|| format!("{backing:?}, asked: {asked}, read before: {read}"))?;
    }
    Ok(())
}

/// Over many times 2 MiB, which a new descriptor has mapped by the request alone. As above, it shows in
/// pages of VRAM that nobody has had.
fn free_then_moved_by_one_request_and_written_by_the_gpu_is_kept() -> Result<()> {
    for backing in [Backing::Huge, Backing::Small] {
        let gpu = Gpu::open_first()?;
        let region = Region::map(13 * HUGE_PAGE_SIZE, backing)?;
        oracle::write(region, SEED);
        region.advise(Advice::Free)?;
        gpu.migrate(region.pages(), Place::Vram)?;
        Job::fill(region, 7).waves(2).run(&gpu)?;
        gpu.migrate(region.pages(), Place::Ram)?;
        region.advise(Advice::PageOut)?;
        ensure_words(region, 7).with_context(|| format!("{backing:?}"))?;
        region.unmap()?;
    }
    Ok(())
}

/// Advice that changes no content, to all, to a part and again to all.
fn keeps_the_data(advice: &[Advice]) -> Result<()> {
    each_start(|gpu, region| {
        for (round, &advice) in advice.iter().enumerate() {
            let added = 6 * round as u64;
            region.advise(advice)?;
            exercise(gpu, region, 0, added)?;
            region.part(QUARTER + PAGE_SIZE, QUARTER).advise(advice)?;
            exercise(gpu, region, 0, added + 2)?;
            region.advise(advice)?;
            ensure_sum(gpu, region, 0, added + 4)?;
            exercise(gpu, region, 0, added + 4)?;
        }
        Ok(())
    })
}

fn cold_and_pageout_keep_the_data() -> Result<()> {
    keeps_the_data(&[Advice::Cold, Advice::PageOut])
}

fn willneed_keeps_the_data() -> Result<()> {
    keeps_the_data(&[Advice::WillNeed])
}

fn hugepage_and_nohugepage_keep_the_data() -> Result<()> {
    keeps_the_data(&[Advice::HugePage, Advice::NoHugePage, Advice::HugePage])
}

fn mergeable_and_unmergeable_keep_the_data() -> Result<()> {
    keeps_the_data(&[Advice::Mergeable, Advice::Unmergeable])
}

/// `in_child` gets a GPU of its own; the parent has its data after it, and while the child lives.
fn forked(advice: Advice, in_child: fn(&Gpu, Region) -> Result<()>) -> Result<()> {
    each_start(|gpu, region| {
        region.advise(advice)?;
        ensure_sum(gpu, region, 0, 0)?;
        let child = fork(|| {
            code(
                Gpu::open_first()
                    .map_err(Into::into)
                    .and_then(|gpu| in_child(&gpu, region)),
            )
        })?;
        Job::add(region, 1).waves(2).run(gpu)?;
        ensure!(child.wait()? == Ended::Exited(0));
        exercise(gpu, region, 0, 1)
    })
}

fn wipeonfork_is_zero_in_the_child_and_kept_in_the_parent() -> Result<()> {
    forked(Advice::WipeOnFork, exercise_empty)
}

fn dontfork_is_missing_in_the_child_and_kept_in_the_parent() -> Result<()> {
    forked(Advice::DontFork, |gpu, region| {
        Job::sum(region).fails_at(gpu, region.address(), Access::Read)?;
        region.map_again()?;
        exercise_empty(gpu, region)
    })
}
