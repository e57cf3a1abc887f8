// SPDX-License-Identifier: MIT OR Apache-2.0
//! The kernel reads and writes pages in VRAM for somebody: system calls, another process, a debugger. They
//! come home for it, and the data is right.

use super::start::{SEED, STARTS, Start, ensure_sum, exercise, exercise_all};
use crate::guest::{call::Job, child::code, oracle};
use anyhow::{Context, Result, ensure};
use farfault::arena::{Backing, Region, Traced};
use farfault::{
    Gpu, HUGE_PAGE_SIZE, PAGE_SIZE,
    process::{Ended, fork},
    stage::Advice,
};
use rustix::{
    fs::{Mode, OFlags, ftruncate, open, unlink},
    pipe::pipe,
    process::Pid,
};
use std::{
    fs::File,
    io::{Read, Write},
};

group! { "mm::pins", gpus 1, seconds 60:
    process_vm_readv_and_writev_reach_pages_in_vram,
    ptrace_peeks_and_pokes_pages_in_vram,
    read_and_write_with_o_direct_reach_pages_in_vram,
    proc_mem_reaches_pages_in_vram,
}

/// A child with a region of a start at addresses that are known here, while `act` runs. It ends well
/// where it then finds words of the seed with `added`, by GPU and CPU.
fn with_child(start: Start, added: u64, act: impl FnOnce(Pid, Region) -> Result<()>) -> Result<()> {
    let region = Region::nowhere(HUGE_PAGE_SIZE)?;
    let (from_child, to_parent) = pipe()?;
    let (from_parent, to_child) = pipe()?;
    let child = fork(|| {
        code((|| {
            let gpu = Gpu::open_first()?;
            region.map_again()?;
            let huge = matches!(start.backing, Backing::Huge);
            region.advise(if huge {
                Advice::HugePage
            } else {
                Advice::NoHugePage
            })?;
            oracle::write(region, SEED);
            start.place(&gpu, region)?;
            File::from(to_parent).write_all(&[1])?;
            File::from(from_parent).read_exact(&mut [0])?;
            exercise(&gpu, region, 0, added)
        })())
    })?;
    File::from(from_child)
        .read_exact(&mut [0])
        .context("the child did not begin")?;
    act(child.pid().context("a child")?, region)?;
    File::from(to_child).write_all(&[1])?;
    ensure!(child.wait()? == Ended::Exited(0));
    Ok(())
}

fn each_child(added: u64, act: impl Fn(Pid, Region) -> Result<()>) -> Result<()> {
    for start in STARTS {
        with_child(start, added, &act).with_context(|| format!("{start:?}"))?;
    }
    Ok(())
}

fn process_vm_readv_and_writev_reach_pages_in_vram() -> Result<()> {
    let buffer = Region::map(HUGE_PAGE_SIZE, Backing::Small)?;
    each_child(1, |child, region| {
        ensure!(buffer.read_process(child, region)? == region.length());
        oracle::check(buffer, SEED, 0)?;
        for index in 0..buffer.words() {
            buffer.atomic_add(index, 1);
        }
        ensure!(buffer.write_process(child, region)? == region.length());
        Ok(())
    })
}

fn ptrace_peeks_and_pokes_pages_in_vram() -> Result<()> {
    each_child(0, |child, region| {
        let traced = Traced::attach(child)?;
        let last = region.words() - 1;
        for index in [0, 1, last / 2, last / 2 + 1, last] {
            let word = oracle::word(SEED, index);
            ensure!(traced.peek(region, index)? == word, "word {index}");
            traced.poke(region, index, !word)?;
            ensure!(traced.peek(region, index)? == !word, "word {index}");
            traced.poke(region, index, word)?;
        }
        Ok(())
    })
}

/// A file of tmpfs that was opened with `O_DIRECT`. That file system copies all the same.
fn direct_file(length: usize) -> Result<File> {
    let path = format!("/tmp/farfault-direct-{}", std::process::id());
    let flags = OFlags::CREATE | OFlags::RDWR | OFlags::DIRECT | OFlags::CLOEXEC;
    let file = File::from(open(&path, flags, Mode::RUSR | Mode::WUSR)?);
    unlink(&path)?;
    ftruncate(&file, length as u64)?;
    Ok(file)
}

fn read_and_write_with_o_direct_reach_pages_in_vram() -> Result<()> {
    let file = direct_file(HUGE_PAGE_SIZE)?;
    for start in STARTS {
        let gpu = Gpu::open_first()?;
        let region = start.region(&gpu, HUGE_PAGE_SIZE)?;
        ensure!(region.write_to(&file, 0)? == region.length(), "{start:?}");
        ensure_sum(&gpu, region, 0, 0)?;
        Job::fill(region, 9).waves(2).run(&gpu)?;
        start.place(&gpu, region)?;
        ensure!(region.read_from(&file, 0)? == region.length(), "{start:?}");
        exercise_all(&gpu, region).with_context(|| format!("{start:?}"))?;
        region.unmap()?;
    }
    Ok(())
}

fn proc_mem_reaches_pages_in_vram() -> Result<()> {
    use std::os::unix::fs::FileExt;
    each_child(0, |child, region| {
        let path = format!("/proc/{}/mem", child.as_raw_nonzero());
        let memory = File::options().read(true).write(true).open(path)?;
        let mut bytes = vec![0; region.length()];
        memory.read_exact_at(&mut bytes, region.address())?;
        for (index, word) in bytes.chunks_exact(8).enumerate() {
            ensure!(
                word == oracle::word(SEED, index).to_le_bytes(),
                "word {index}"
            );
        }
        // One page is other data for a moment.
        memory.write_all_at(&[7; PAGE_SIZE], region.address())?;
        Ok(memory.write_all_at(&bytes, region.address())?)
    })
}
