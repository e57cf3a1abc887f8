// SPDX-License-Identifier: MIT OR Apache-2.0
//! Jobs on memory that the GPU has never seen: it faults, and the data is right.

use crate::guest::{
    call::{self, Job},
    oracle,
};
use anyhow::{Context, Result, ensure};
use farfault::arena::{Backing, Region};
use farfault::{Advice, Chain, Gpu, HUGE_PAGE_SIZE, Kernel, Launch, PAGE_SIZE, Place, stage};
use std::{
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    time::{Duration, Instant},
};

group! { "faults", on Small, seconds 90:
    malloced_memory_summed_is_what_the_cpu_sums,
    malloced_memory_filled_has_the_pattern_and_nothing_around_it,
    malloced_memory_added_to_grows_by_the_addend,
    malloced_memory_copied_is_equal,
    stack_and_static_memory_can_be_used,
    small_pages_of_many_waves_are_right,
    more_faults_at_once_than_a_batch_has_are_all_served,
    never_touched_memory_reads_as_zero,
    never_touched_memory_can_be_filled,
    atomic_adds_of_many_waves_lose_none,
    compare_and_swap_swaps_only_what_it_expects,
    pointer_chase_across_pages_finds_its_way,
    pages_of_several_jobs_get_all_their_writes,
    pages_of_two_descriptors_have_one_content,
    pages_that_the_cpu_writes_at_once_lose_nothing,
    loads_mark_pages_as_accessed_and_stores_as_dirty,
}

const SEED: u64 = 0xfa01;

fn random_words(count: usize) -> Vec<u64> {
    (0..count).map(|index| oracle::word(SEED, index)).collect()
}

fn malloced_memory_summed_is_what_the_cpu_sums() -> Result<()> {
    let gpu = Gpu::open_first()?;
    for count in [1, 511, 513, 100_003] {
        let sum = gpu.sum(&random_words(count))?;
        ensure!(sum == oracle::sum(SEED, 0..count), "of {count} words");
    }
    Ok(())
}

fn malloced_memory_filled_has_the_pattern_and_nothing_around_it() -> Result<()> {
    let gpu = Gpu::open_first()?;
    let mut memory = random_words(50_000);
    let (from, to) = (777, 43_211);
    gpu.fill(&mut memory[from..to], 0xfeed)?;
    for (index, word) in memory.iter().enumerate() {
        let filled = (from..to).contains(&index);
        let should = if filled {
            0xfeed
        } else {
            oracle::word(SEED, index)
        };
        ensure!(*word == should, "word {index} is {word:#x}");
    }
    Ok(())
}

fn malloced_memory_added_to_grows_by_the_addend() -> Result<()> {
    let gpu = Gpu::open_first()?;
    let mut memory = random_words(50_000);
    for _ in 0..3 {
        gpu.add(&mut memory[5..], u64::MAX - 9)?;
    }
    for (index, word) in memory.iter().enumerate() {
        let added = if index < 5 { 0 } else { 30u64.wrapping_neg() };
        let should = oracle::word(SEED, index).wrapping_add(added);
        ensure!(*word == should, "word {index} is {word:#x}");
    }
    Ok(())
}

fn malloced_memory_copied_is_equal() -> Result<()> {
    let gpu = Gpu::open_first()?;
    let source = random_words(70_001);
    let mut destination = vec![1; source.len()];
    gpu.copy(&mut destination, &source)?;
    ensure!(destination == source);
    ensure!(source == random_words(source.len()));
    Ok(())
}

fn stack_and_static_memory_can_be_used() -> Result<()> {
    static CONSTANT: [u64; 1024] = [3; 1024];
    static COUNTER: AtomicU64 = AtomicU64::new(5);
    let gpu = Gpu::open_first()?;
    let mut local = [7u64; 1024];
    gpu.add(&mut local, 1)?;
    ensure!(local == [8; 1024]);
    ensure!(gpu.sum(&CONSTANT)? == 3 * 1024);
    ensure!(gpu.atomic_add(&COUNTER, 6)? == 5);
    ensure!(COUNTER.load(Ordering::SeqCst) == 11);
    Ok(())
}

fn small_pages_of_many_waves_are_right() -> Result<()> {
    let gpu = Gpu::open_first()?;
    let region = Region::map(4 << 20, Backing::Small)?;
    oracle::write(region, SEED);
    let max_waves = gpu.info().max_waves;
    for (round, waves) in [64, 7, max_waves].into_iter().enumerate() {
        Job::add(region, 10).waves(waves).run(&gpu)?;
        let sum = Job::sum(region).waves(waves).run(&gpu)?;
        let added = 10 * (round as u64 + 1);
        let should = oracle::expected_sum(region, SEED, added);
        ensure!(sum == should, "{waves} waves");
    }
    oracle::check(region, SEED, 30)
}

fn never_touched_memory_reads_as_zero() -> Result<()> {
    let gpu = Gpu::open_first()?;
    for backing in [Backing::Small, Backing::Huge, Backing::Shared] {
        let region = Region::map(4 << 20, backing)?;
        // Other owners' data must not shine through: this VRAM was used before.
        ensure!(Job::sum(region).waves(8).run(&gpu)? == 0, "{backing:?}");
        ensure!(region.load(region.words() / 2) == 0, "{backing:?}");
        Job::fill(region, u64::MAX).run(&gpu)?;
        region.unmap()?;
    }
    Ok(())
}

fn never_touched_memory_can_be_filled() -> Result<()> {
    let gpu = Gpu::open_first()?;
    for backing in [Backing::Small, Backing::Huge, Backing::Shared] {
        let region = Region::map(4 << 20, backing)?;
        let inside = region.part(PAGE_SIZE, region.length() - 2 * PAGE_SIZE);
        Job::fill(inside, 6).waves(8).run(&gpu)?;
        let first = PAGE_SIZE / 8;
        let last = region.words() - first;
        for index in 0..region.words() {
            let should = if (first..last).contains(&index) { 6 } else { 0 };
            let is = region.load(index);
            ensure!(is == should, "{backing:?}: word {index} is {is:#x}");
        }
    }
    Ok(())
}

fn atomic_adds_of_many_waves_lose_none() -> Result<()> {
    let gpu = Gpu::open_first()?;
    let word = AtomicU64::new(100);
    let before_last = gpu.run(Launch::atomic_add(&word, 3, 500).waves(64))?;
    let total = 100 + 3 * 500 * 64;
    ensure!(word.load(Ordering::SeqCst) == total);
    ensure!(before_last < total && (before_last - 100) % 3 == 0);
    ensure!(gpu.run(Launch::atomic_add(&word, 3, 500))? == total + 3 * 499);
    Ok(())
}

fn compare_and_swap_swaps_only_what_it_expects() -> Result<()> {
    let gpu = Gpu::open_first()?;
    let word = AtomicU64::new(4);
    ensure!(gpu.compare_and_swap(&word, 5, 9)? == 4);
    ensure!(word.load(Ordering::SeqCst) == 4);
    ensure!(gpu.compare_and_swap(&word, 4, 9)? == 4);
    ensure!(gpu.compare_and_swap(&word, 4, 1)? == 9);
    ensure!(word.load(Ordering::SeqCst) == 9);
    Ok(())
}

fn pointer_chase_across_pages_finds_its_way() -> Result<()> {
    const LINKS: usize = 300;
    let gpu = Gpu::open_first()?;
    let mut memory = vec![0u64; LINKS * PAGE_SIZE / 8];
    // 7 and 300 have no common factor: this visits each page once.
    let order: Vec<_> = (0..LINKS)
        .map(|link| link * 7 % LINKS * PAGE_SIZE / 8)
        .collect();
    let base = memory.as_ptr().addr();
    let chain = Chain::new(&mut memory, &order)?;
    for steps in [1, 5, LINKS, 2 * LINKS + 3] {
        let at = gpu.pointer_chase(&chain, steps as u64)?;
        let should = base + order[steps % LINKS] * 8;
        ensure!(at == should as u64, "{steps} steps");
    }
    Ok(())
}

fn pages_of_several_jobs_get_all_their_writes() -> Result<()> {
    const JOBS: u64 = 8;
    const PAGES: usize = 16;
    let gpu = Gpu::open_first()?;
    let region = Region::map(PAGES * PAGE_SIZE, Backing::Small)?;
    // Each job has an eighth of each page, and the first word of each page is everybody's.
    let part_bytes = PAGE_SIZE as u64 / JOBS;
    let mut fences = Vec::new();
    for page in 0..PAGES as u64 {
        for job in 0..JOBS {
            let page_address = region.address() + page * PAGE_SIZE as u64;
            let part = page_address + job * part_bytes + 8;
            let add = Job::new(Kernel::Add, [part, part_bytes - 8, job + 1, 0]);
            fences.push(add.submit(&gpu)?);
            if fences.len() >= 32 {
                collect(&gpu, &mut fences)?;
            }
            fences.push(Job::atomic_add(page_address, 1, 10).submit(&gpu)?);
        }
    }
    collect(&gpu, &mut fences)?;
    for index in 0..region.words() {
        let in_page = (index * 8 % PAGE_SIZE) as u64;
        let should = match in_page {
            0 => JOBS * 10,
            _ if in_page % part_bytes == 0 => 0,
            _ => in_page / part_bytes + 1,
        };
        let is = region.load(index);
        ensure!(is == should, "word {index} is {is} and should be {should}");
    }
    Ok(())
}

fn collect(gpu: &Gpu, fences: &mut Vec<u64>) -> Result<()> {
    for fence in fences.drain(..) {
        let end = call::wait(gpu, fence, call::JOB_TIME)?;
        call::ensure_status(&end, farfault::uapi::JobStatus::Ok)?;
    }
    Ok(())
}

fn pages_of_two_descriptors_have_one_content() -> Result<()> {
    let gpus = [Gpu::open_first()?, Gpu::open_first()?];
    for backing in [Backing::Small, Backing::Huge] {
        let region = Region::map(2 * HUGE_PAGE_SIZE, backing)?;
        oracle::write(region, SEED);
        for round in 0..6u64 {
            let gpu = &gpus[round as usize % 2];
            Job::add(region, 1).waves(4).run(gpu)?;
            let sum = Job::sum(region)
                .waves(4)
                .run(&gpus[(round as usize + 1) % 2])?;
            let should = oracle::expected_sum(region, SEED, round + 1);
            ensure!(sum == should, "{backing:?}, round {round}");
        }
        oracle::check(region, SEED, 6)?;
    }
    Ok(())
}

/// 1,000 GPU faults, with CPU threads that write the same pages all the while: in each page a word
/// to which both sides add atomically, words of the GPU alone and words of each CPU thread alone.
fn pages_that_the_cpu_writes_at_once_lose_nothing() -> Result<()> {
    const PAGES: usize = 32;
    const FAULTS: u64 = 1_000;
    const CPU_THREADS: usize = 2;
    const GPU_BYTES: u64 = 256;
    const WORDS: usize = PAGE_SIZE / 8;
    let gpu = Gpu::open_first()?;
    let region = Region::map(PAGES * PAGE_SIZE, Backing::Small)?;
    let deadline = Instant::now() + Duration::from_secs(60);
    let stop = AtomicBool::new(false);

    let (rounds, by_cpu) = std::thread::scope(|scope| -> Result<(u64, Vec<u64>)> {
        let writers: Vec<_> = (0..CPU_THREADS)
            .map(|thread| {
                let stop = &stop;
                scope.spawn(move || {
                    let mut rounds = 0;
                    while !stop.load(Ordering::Relaxed) {
                        for page in 0..PAGES {
                            region.atomic_add(page * WORDS, 1);
                            let own = page * WORDS + WORDS - 1 - thread;
                            region.store(own, region.load(own) + 1);
                        }
                        rounds += 1;
                        // With less than two CPUs to itself the GPU would never get a page.
                        std::thread::sleep(Duration::from_micros(200));
                    }
                    rounds
                })
            })
            .collect();
        let mut rounds = 0;
        let run = (|| {
            while gpu.stats()?.gpu_faults < FAULTS {
                ensure!(Instant::now() < deadline, "{:?} by then", gpu.stats()?);
                // A page that could not move just then is used where it is, and nobody faults on it
                // any more: an advice makes the GPU ask again.
                gpu.advise(region.pages(), Advice::Default)?;
                let mut fences = Vec::new();
                for page in 0..PAGES as u64 {
                    let address = region.address() + page * PAGE_SIZE as u64;
                    fences.push(Job::atomic_add(address, 1, 1).submit(&gpu)?);
                    let own = [address + 64, GPU_BYTES, 1, 0];
                    fences.push(Job::new(Kernel::Add, own).submit(&gpu)?);
                }
                collect(&gpu, &mut fences)?;
                rounds += 1;
            }
            Ok(())
        })();
        stop.store(true, Ordering::Relaxed);
        let by_cpu = writers
            .into_iter()
            .map(|writer| {
                writer
                    .join()
                    .map_err(|_| anyhow::anyhow!("a thread panicked"))
            })
            .collect::<Result<_>>()?;
        run.map(|()| (rounds, by_cpu))
    })?;

    ensure!(rounds > 0 && by_cpu.iter().all(|rounds| *rounds > 0));
    for index in 0..region.words() {
        let word = index % WORDS;
        let gpu_words = 8..8 + GPU_BYTES as usize / 8;
        let should = match word {
            0 => rounds + by_cpu.iter().sum::<u64>(),
            _ if gpu_words.contains(&word) => rounds,
            _ if word >= WORDS - CPU_THREADS => by_cpu[WORDS - 1 - word],
            _ => 0,
        };
        let is = region.load(index);
        ensure!(is == should, "word {index} is {is} and should be {should}");
    }
    Ok(())
}

/// While one batch is served, more faults come than the next one has room for.
fn more_faults_at_once_than_a_batch_has_are_all_served() -> Result<()> {
    const BYTES: usize = 8 << 20;
    let gpu = Gpu::open_first()?;
    // As many at once as the GPU has room for.
    let waves = gpu.info().max_waves / 3;
    let regions = [Backing::Small; 3].map(|backing| Region::map(BYTES, backing));
    let [first, second, third] = regions;
    let regions = [first?, second?, third?];
    for round in 0..3 {
        for region in regions {
            // Mapped page by page, each by a fault of its own.
            region.advise(stage::Advice::DontNeed)?;
            gpu.advise(region.pages(), Advice::MapOnly)?;
        }
        let jobs = regions.map(|region| Job::add(region, 7).waves(waves).submit(&gpu));
        for fence in jobs {
            let end = call::wait(&gpu, fence?, call::JOB_TIME)?;
            call::ensure_status(&end, farfault::uapi::JobStatus::Ok)
                .with_context(|| format!("round {round}"))?;
        }
        for region in regions {
            let wrong = (0..region.words()).find(|&index| region.load(index) != 7);
            ensure!(wrong.is_none(), "round {round}: word {wrong:?}");
        }
    }
    Ok(())
}

/// In small entries only the page that was stored to, in huge ones all of it.
fn loads_mark_pages_as_accessed_and_stores_as_dirty() -> Result<()> {
    const WRITTEN: usize = 3;
    for backing in [Backing::Small, Backing::Huge] {
        for place in [Place::Ram, Place::Vram] {
            let gpu = Gpu::open_first()?;
            let region = Region::map(HUGE_PAGE_SIZE, backing)?;
            oracle::write(region, SEED);
            gpu.advise(region.pages(), Advice::MapOnly)?;
            gpu.migrate(region.pages(), place)?;
            Job::sum(region).run(&gpu)?;
            let states = gpu.query(region.pages())?;
            let wrong = states
                .iter()
                .find(|page| page.gpu.place != place || !page.gpu.accessed || page.gpu.dirty);
            ensure!(wrong.is_none(), "after loads: {wrong:?}");
            // The TLB knows the pages by now.
            Job::add(region.part(WRITTEN * PAGE_SIZE, PAGE_SIZE), 0).run(&gpu)?;
            for (number, page) in gpu.query(region.pages())?.into_iter().enumerate() {
                let should = page.gpu.huge || number == WRITTEN;
                ensure!(
                    page.gpu.dirty == should,
                    "{backing:?}, page {number} after a store to {WRITTEN}: {page:?}"
                );
            }
            region.unmap()?;
        }
    }
    Ok(())
}
