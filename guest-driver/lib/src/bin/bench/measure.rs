// SPDX-License-Identifier: MIT OR Apache-2.0
//! One round of everything. Each measurement makes its memory anew, so that the GPU has nothing of it,
//! and checks by the driver's counts that what it timed is what happened.

use crate::{
    Failure,
    samples::{FAULT_MAP, PING, Samples},
};
use farfault::{Advice, Buffer, Gpu, HUGE_PAGE_SIZE, Launch, PAGE_SIZE, Pages, Place, Stats};
use std::{
    hint::black_box,
    time::{Duration, Instant},
};

const PINGS: usize = 200;
const SINGLE_FAULTS: usize = 32;
const HUGE_FAULTS: usize = 4;
const BURST: usize = 512;
const CPU_FAULTS: usize = 64;
const MEMCPY: usize = 64 << 20;

const WORDS_PER_PAGE: usize = PAGE_SIZE / size_of::<u64>();

/// What is migrated, in bytes.
const MIGRATED: [usize; 5] = [512 << 10, 2 << 20, 8 << 20, 16 << 20, 64 << 20];

pub(crate) fn round(gpu: &Gpu, samples: &mut Samples) -> Result<(), Failure> {
    ping(gpu, samples)?;
    single_faults(gpu, samples, Advice::MapOnly, FAULT_MAP)?;
    single_faults(gpu, samples, Advice::Default, "gpu_fault_migrate_4k")?;
    huge_faults(gpu, samples)?;
    burst(gpu, samples)?;
    cpu_faults(gpu, samples)?;
    cpu_huge_faults(gpu, samples)?;
    for bytes in MIGRATED {
        migrate(gpu, samples, bytes, false)?;
        if bytes >= HUGE_PAGE_SIZE {
            migrate(gpu, samples, bytes, true)?;
        }
    }
    memcpy(samples);
    Ok(())
}

/// An empty command on the control queue and back.
fn ping(gpu: &Gpu, samples: &mut Samples) -> Result<(), Failure> {
    for _ in 0..PINGS {
        let (time, ()) = timed(|| gpu.ping())?;
        samples.time(PING, time);
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
    let stride = HUGE_PAGE_SIZE / size_of::<u64>();
    buffer.iter_mut().step_by(stride).for_each(|word| *word = 1);
    gpu.advise(buffer.pages(), advice)?;
    for word in buffer.chunks(stride) {
        fault_on(gpu, samples, name, &word[..1])?;
    }
    gpu.advise(buffer.pages(), Advice::Default)?;
    Ok(())
}

/// The same with a huge page that moves to VRAM as a whole.
fn huge_faults(gpu: &Gpu, samples: &mut Samples) -> Result<(), Failure> {
    let buffer = huge_pages(HUGE_FAULTS * HUGE_PAGE_SIZE)?;
    for page in buffer.chunks(HUGE_PAGE_SIZE / size_of::<u64>()) {
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
        samples.time(&format!("{name}_job"), with_fault);
        samples.time("job_without_fault", without);
        samples.time(name, with_fault.saturating_sub(without));
    }
    Ok(())
}

/// Many faults at once, on pages side by side.
fn burst(gpu: &Gpu, samples: &mut Samples) -> Result<(), Failure> {
    let mut buffer = small_pages(BURST * PAGE_SIZE)?;
    buffer.fill(1);
    gpu.advise(buffer.pages(), Advice::MapOnly)?;
    // No more waves than pages: BURST fits.
    let waves = gpu.info().max_waves.min(BURST as u32);
    let before = gpu.stats()?;
    let (time, sum) = timed(|| gpu.run(Launch::sum(&buffer).waves(waves)))?;
    let faults = faults_since(gpu, &before)?;
    gpu.advise(buffer.pages(), Advice::Default)?;
    if sum != buffer.len() as u64 || faults == 0 {
        return Err(format!("burst: {faults} faults and a sum of {sum:#x}").into());
    }
    samples.time("gpu_burst_512_pages", time);
    let per_page = time.as_secs_f64() / BURST as f64;
    samples.time("gpu_burst_per_page", Duration::from_secs_f64(per_page));
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
    let pages = buffer.chunks(HUGE_PAGE_SIZE / size_of::<u64>());
    let mut huge = Vec::new();
    for page in pages {
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
            samples.time(name, time);
        }
    }
    Ok(())
}

/// Memory that the CPU wrote, to VRAM and back, on request.
fn migrate(gpu: &Gpu, samples: &mut Samples, bytes: usize, huge: bool) -> Result<(), Failure> {
    if bytes as u64 > gpu.info().vram_size {
        return Ok(());
    }
    let mut buffer = if huge {
        huge_pages(bytes)?
    } else {
        small_pages(bytes)?
    };
    buffer.fill(1);
    let size = match bytes {
        ..HUGE_PAGE_SIZE => format!("{}k", bytes >> 10),
        _ => format!("{}m", bytes >> 20),
    };
    let pages = if huge { "thp" } else { "4k_pages" };
    for (name, place) in [
        ("migrate_to_vram", Place::Vram),
        ("migrate_to_ram", Place::Ram),
    ] {
        let (time, moved) = timed(|| gpu.migrate(buffer.pages(), place))?;
        let moved = moved.moved * PAGE_SIZE as u64;
        samples.rate(&format!("{name}_{size}_{pages}"), moved, time);
    }
    if let Some(word) = buffer.iter().find(|word| **word != 1) {
        return Err(format!("migration changed the data: {word:#x}").into());
    }
    Ok(())
}

/// What the guest's CPU does alone.
fn memcpy(samples: &mut Samples) {
    let source = vec![1u64; MEMCPY / size_of::<u64>()];
    let mut destination = vec![2u64; source.len()];
    let start = Instant::now();
    black_box(&mut destination).copy_from_slice(black_box(&source));
    samples.rate("cpu_memcpy_64m", MEMCPY as u64, start.elapsed());
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

/// The CPU has all of these pages in one huge one: the kernel had one to give.
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
