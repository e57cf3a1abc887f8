// SPDX-License-Identifier: MIT OR Apache-2.0
//! What is measured. Each measurement makes its memory anew, so that the GPU has nothing of it, and
//! checks by the driver's counts that what it timed is what happened.

use crate::{Failure, Samples, options::Data};
use farfault::{Advice, Buffer, Gpu, HUGE_PAGE_SIZE, Launch, PAGE_SIZE, Pages, Place, Stats};
use std::{
    hint::black_box,
    time::{Duration, Instant},
};

/// Half of them before the faults and half after, so that both see the same machine.
const COMMANDS: usize = 200;
const SINGLE_FAULTS: usize = 64;
const HUGE_FAULTS: usize = 8;
const BURSTS: usize = 8;
/// Pages of a burst, and waves.
const BURST: u32 = 512;
const CPU_FAULTS: usize = 64;
/// Migrations of one size, one way, beside one to warm up.
const MIGRATIONS: usize = 2;

const WORDS_PER_PAGE: usize = PAGE_SIZE / size_of::<u64>();
const WORDS_PER_HUGE_PAGE: usize = HUGE_PAGE_SIZE / size_of::<u64>();

/// An empty command on the control queue and back, faults of the GPU, and faults of the CPU.
pub(crate) fn faults(gpu: &Gpu) -> Result<Samples, Failure> {
    let mut samples = Samples::default();
    empty_commands(gpu, &mut samples)?;
    single_faults(gpu, &mut samples, Advice::MapOnly, "gpu_fault_map")?;
    for _ in 0..BURSTS {
        burst(gpu, &mut samples)?;
    }
    single_faults(gpu, &mut samples, Advice::Default, "gpu_fault_migrate_4k")?;
    huge_faults(gpu, &mut samples)?;
    cpu_faults(gpu, &mut samples)?;
    cpu_huge_faults(gpu, &mut samples)?;
    empty_commands(gpu, &mut samples)?;
    Ok(samples)
}

/// Memory that the CPU wrote, to VRAM and back, on request.
pub(crate) fn migrations(gpu: &Gpu, sizes: &[usize], data: Data) -> Result<Samples, Failure> {
    let mut samples = Samples::default();
    for size in sizes {
        let mut small = small_pages(size << 20)?;
        small.fill(1);
        migrate(gpu, &mut samples, &small, &format!("{size}mb_4k"), data)?;
        drop(small);
        let huge = huge_pages(size << 20)?;
        if !is_huge(gpu, &huge)? {
            return Err(format!("the kernel has no huge pages for {size} MiB").into());
        }
        migrate(gpu, &mut samples, &huge, &format!("{size}mb_thp"), data)?;
    }
    Ok(samples)
}

fn empty_commands(gpu: &Gpu, samples: &mut Samples) -> Result<(), Failure> {
    for _ in 0..COMMANDS / 2 {
        let (time, ()) = timed(|| gpu.ping())?;
        samples.take("empty_command", time);
    }
    Ok(())
}

/// A job of one word on a page that the GPU has not got, and the same job when it has. The
/// difference is the fault: reported, resolved, replayed.
fn single_faults(
    gpu: &Gpu,
    samples: &mut Samples,
    advice: Advice,
    name: &str,
) -> Result<(), Failure> {
    // Far apart, so that no fault resolves another's page.
    let mut buffer = small_pages(SINGLE_FAULTS * HUGE_PAGE_SIZE)?;
    for word in buffer.iter_mut().step_by(WORDS_PER_HUGE_PAGE) {
        *word = 1;
    }
    gpu.advise(buffer.pages(), advice)?;
    for page in buffer.chunks(WORDS_PER_HUGE_PAGE) {
        fault_on(gpu, samples, name, &page[..1])?;
    }
    gpu.advise(buffer.pages(), Advice::Default)?;
    Ok(())
}

/// The same with a huge page that moves to VRAM as a whole.
fn huge_faults(gpu: &Gpu, samples: &mut Samples) -> Result<(), Failure> {
    let buffer = huge_pages(HUGE_FAULTS * HUGE_PAGE_SIZE)?;
    for page in buffer.chunks(WORDS_PER_HUGE_PAGE) {
        if is_huge(gpu, page)? {
            fault_on(gpu, samples, "gpu_fault_migrate_2m", &page[..1])?;
        }
    }
    Ok(())
}

/// Takes no sample where something else came between: an invalidation, and the GPU faults twice.
fn fault_on(gpu: &Gpu, samples: &mut Samples, name: &str, word: &[u64]) -> Result<(), Failure> {
    let job = || gpu.run(Launch::sum(word).waves(1));
    let before = gpu.stats()?;
    let (with_fault, _) = timed(job)?;
    let first = faults_since(gpu, &before)?;
    let (without, _) = timed(job)?;
    let both = faults_since(gpu, &before)?;
    if (first, both) == (1, 1) {
        samples.take("job", without);
        samples.take(name, with_fault.saturating_sub(without));
    }
    Ok(())
}

/// A job of many waves, each on a page of its own that the GPU has not got, and the same job when it
/// has.
fn burst(gpu: &Gpu, samples: &mut Samples) -> Result<(), Failure> {
    let mut buffer = small_pages(BURST as usize * PAGE_SIZE)?;
    buffer.fill(1);
    gpu.advise(buffer.pages(), Advice::MapOnly)?;
    let job = || gpu.run(Launch::sum(&buffer).waves(BURST));
    let before = gpu.stats()?;
    let (with_faults, sum) = timed(job)?;
    let first = faults_since(gpu, &before)?;
    let (without, _) = timed(job)?;
    let both = faults_since(gpu, &before)?;
    gpu.advise(buffer.pages(), Advice::Default)?;
    if sum != buffer.len() as u64 {
        return Err(format!("burst: the sum is {sum:#x}").into());
    }
    if first > 0 && both == first {
        let faults = with_faults.saturating_sub(without);
        samples.take("gpu_fault_burst_512_per_page", faults / BURST);
    }
    Ok(())
}

/// A CPU's touch of a page in VRAM, which brings that page home.
fn cpu_faults(gpu: &Gpu, samples: &mut Samples) -> Result<(), Failure> {
    let mut buffer = small_pages(CPU_FAULTS * PAGE_SIZE)?;
    buffer.fill(1);
    gpu.migrate(buffer.pages(), Place::Vram)?;
    touch_each(gpu, samples, "cpu_fault_4k", buffer.chunks(WORDS_PER_PAGE))
}

/// The same with huge pages, each of which comes home whole.
fn cpu_huge_faults(gpu: &Gpu, samples: &mut Samples) -> Result<(), Failure> {
    let buffer = huge_pages(HUGE_FAULTS * HUGE_PAGE_SIZE)?;
    gpu.migrate(buffer.pages(), Place::Vram)?;
    let mut huge = Vec::new();
    for page in buffer.chunks(WORDS_PER_HUGE_PAGE) {
        if is_huge(gpu, page)? {
            huge.push(page);
        }
    }
    touch_each(gpu, samples, "cpu_fault_2m", huge.into_iter())
}

fn touch_each<'a>(
    gpu: &Gpu,
    samples: &mut Samples,
    name: &str,
    pages: impl Iterator<Item = &'a [u64]>,
) -> Result<(), Failure> {
    for page in pages {
        // Some pages can't move (they are pinned, say): a touch of these is no fault.
        let there = gpu
            .query(&page[..1])?
            .iter()
            .all(|page| page.cpu.place == Place::Vram);
        let start = Instant::now();
        black_box(black_box(page)[0]);
        let time = start.elapsed();
        if there {
            samples.take(name, time);
        }
    }
    Ok(())
}

/// There and back again. The first time warms up: the host has not given VRAM its memory yet.
fn migrate(
    gpu: &Gpu,
    samples: &mut Samples,
    buffer: &Buffer,
    size: &str,
    data: Data,
) -> Result<(), Failure> {
    let pages = buffer.pages();
    for turn in 0..=MIGRATIONS {
        for (way, place) in [("to_vram", Place::Vram), ("to_ram", Place::Ram)] {
            let (time, moved) = timed(|| gpu.migrate(pages, place))?;
            // A page or two may be busy just now; more, and the figure is another's.
            if moved.stayed > pages.count() as u64 / 256 {
                let problem = format!("{way} of {size}: {} pages stayed", moved.stayed);
                return Err(problem.into());
            }
            if turn > 0 {
                samples.take(&format!("migrate_{way}_{size}"), time);
            }
        }
    }
    if data == Data::Lost {
        return Ok(());
    }
    match buffer.iter().find(|word| **word != 1) {
        Some(word) => Err(format!("migration of {size} changed the data: {word:#x}").into()),
        None => Ok(()),
    }
}

fn small_pages(bytes: usize) -> Result<Buffer, Failure> {
    let buffer = Buffer::new(bytes);
    buffer.pages().allow_huge(false)?;
    Ok(buffer)
}

/// Touched, for there are no huge pages before.
fn huge_pages(bytes: usize) -> Result<Buffer, Failure> {
    let mut buffer = Buffer::new(bytes);
    buffer.pages().allow_huge(true)?;
    buffer.fill(1);
    Ok(buffer)
}

/// The CPU has all of these pages in huge ones: the kernel had them to give.
fn is_huge(gpu: &Gpu, memory: &[u64]) -> Result<bool, Failure> {
    Ok(gpu
        .query(Pages::covering(memory))?
        .iter()
        .all(|page| page.cpu.huge))
}

fn faults_since(gpu: &Gpu, before: &Stats) -> Result<u64, Failure> {
    Ok(gpu.stats()?.gpu_faults.saturating_sub(before.gpu_faults))
}

fn timed<T>(call: impl FnOnce() -> farfault::Result<T>) -> Result<(Duration, T), Failure> {
    let start = Instant::now();
    let value = call()?;
    Ok((start.elapsed(), value))
}
