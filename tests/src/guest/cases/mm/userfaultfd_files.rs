// SPDX-License-Identifier: MIT OR Apache-2.0
//! userfaultfd over memory of files: a fault there gives the lock of the mappings up in ways of its own.

use super::{
    start::{ensure_words, eventually},
    userfault::{MISSING, Userfault, WRITE_PROTECT},
};
use crate::guest::{
    call::{self, JOB_TIME, Job, ensure_status},
    place::state,
};
use anyhow::{Context, Result, ensure};
use farfault::arena::{Backing, Region};
use farfault::{Gpu, PAGE_SIZE, uapi::JobStatus};
use rustix::{
    fs::{MemfdFlags, memfd_create},
    io::Errno,
};
use std::{fs::File, os::unix::fs::FileExt, time::Duration};

group! { "mm::userfaultfd", gpus 1, seconds 60:
    memory_of_files_that_is_watched_is_written_by_the_gpu,
    memory_of_a_file_that_is_protected_waits_for_the_handler_to_be_written,
}

const LENGTH: usize = 16 * PAGE_SIZE;

fn file() -> Result<File> {
    let file = File::from(memfd_create("watched", MemfdFlags::CLOEXEC)?);
    file.set_len(LENGTH as u64)?;
    Ok(file)
}

fn memory_of_files_that_is_watched_is_written_by_the_gpu() -> Result<()> {
    let gpu = Gpu::open_first()?;
    for mode in [MISSING, WRITE_PROTECT] {
        for private in [false, true] {
            let file = file()?;
            if mode == MISSING {
                // What is in the file is not missing.
                file.write_all_at(&[0; LENGTH], 0)?;
            }
            let region = Region::map(
                LENGTH,
                if private {
                    Backing::FilePrivate(&file)
                } else {
                    Backing::File(&file)
                },
            )?;
            let userfault = Userfault::new()?;
            userfault.register(region, mode)?;
            for added in 1..=2 {
                Job::add(region, 1)
                    .waves(4)
                    .run(&gpu)
                    .with_context(|| format!("mode {mode}, private {private}"))?;
                ensure_words(region, added)?;
            }
            let mut bytes = [0; 8];
            file.read_exact_at(&mut bytes, LENGTH as u64 / 2)?;
            let in_file = if private { 0 } else { 2 };
            ensure!(u64::from_le_bytes(bytes) == in_file, "mode {mode}");
            userfault.unregister(region)?;
            region.unmap()?;
        }
    }
    Ok(())
}

fn memory_of_a_file_that_is_protected_waits_for_the_handler_to_be_written() -> Result<()> {
    let gpu = Gpu::open_first()?;
    let file = file()?;
    let region = Region::map(LENGTH, Backing::File(&file))?;
    Job::fill(region, 5).waves(4).run(&gpu)?;
    let userfault = Userfault::new()?;
    userfault.register(region, WRITE_PROTECT)?;
    userfault.write_protect(region, true)?;
    ensure!(!state(&gpu, region, 1)?.gpu.write, "it may still write");
    let sum = Job::sum(region).run(&gpu)?;
    ensure!(sum == 5 * region.words() as u64);
    let fence = Job::add(region, 1).submit(&gpu)?;
    eventually("the handler is told", || {
        let fault = userfault.next(Duration::from_millis(20))?;
        Ok(fault.is_some_and(|fault| fault.write_protect && fault.address == region.address()))
    })?;
    let waited = call::wait(&gpu, fence, Duration::from_millis(200)).map(drop);
    ensure!(waited == Err(Errno::TIMEDOUT), "{waited:?}");
    ensure_words(region, 5)?;
    userfault.write_protect(region, false)?;
    ensure_status(&call::wait(&gpu, fence, JOB_TIME)?, JobStatus::Ok)?;
    ensure_words(region, 6)
}
