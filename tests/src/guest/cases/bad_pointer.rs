// SPDX-License-Identifier: MIT OR Apache-2.0
//! Arguments that can't be accessed, calls that do not exist, and system calls that the device does
//! not have.

use crate::guest::{
    call::{self, Job},
    oracle,
};
use anyhow::{Result, ensure};
use farfault::arena::{Backing, Call, Protection, Region, call_at};
use farfault::{
    Advice, Gpu, PAGE_SIZE,
    uapi::{self, JobStatus},
};
use rustix::io::Errno;
use std::{
    fs::OpenOptions,
    io::{Read, Write},
    os::unix::fs::FileExt,
    thread,
    time::Duration,
};

group! { "bad_pointer", on Small, seconds 40:
    argument_that_cannot_be_accessed_is_efault,
    argument_that_cannot_be_written_is_efault,
    job_whose_name_cannot_be_told_does_not_run_on,
    argument_that_ends_in_a_hole_is_efault,
    unknown_calls_are_enotty,
    calls_of_another_size_or_direction_are_enotty,
    file_operations_without_meaning_fail,
    descriptors_opened_for_reading_or_writing_only_do_no_harm,
}

/// Every call that has an argument: its name, number and size, and whether it is written to.
const CALLS: [(&str, u32, usize, bool); 9] = [
    ("INFO", uapi::Info::NUMBER, size_of::<uapi::Info>(), true),
    (
        "SUBMIT",
        uapi::Submit::NUMBER,
        size_of::<uapi::Submit>(),
        true,
    ),
    ("WAIT", uapi::Wait::NUMBER, size_of::<uapi::Wait>(), true),
    ("KILL", uapi::Kill::NUMBER, size_of::<uapi::Kill>(), false),
    (
        "MIGRATE",
        uapi::Migrate::NUMBER,
        size_of::<uapi::Migrate>(),
        true,
    ),
    (
        "ADVISE",
        uapi::Advise::NUMBER,
        size_of::<uapi::Advise>(),
        false,
    ),
    (
        "QUERY",
        uapi::Query::NUMBER,
        size_of::<uapi::Query>(),
        false,
    ),
    ("STATS", uapi::Stats::NUMBER, size_of::<uapi::Stats>(), true),
    (
        "EXCLUSIVE",
        uapi::Exclusive::NUMBER,
        size_of::<uapi::Exclusive>(),
        false,
    ),
];

fn ensure_works(gpu: &Gpu) -> Result<()> {
    let region = Region::map(PAGE_SIZE, Backing::Small)?;
    oracle::write(region, 1);
    Job::add(region, 1).run(gpu)?;
    oracle::check(region, 1, 1)
}

fn argument_that_cannot_be_accessed_is_efault() -> Result<()> {
    let gpu = Gpu::open_first()?;
    let inaccessible = Region::map(PAGE_SIZE, Backing::Small)?;
    inaccessible.protect(Protection::None)?;
    let addresses = [
        0,
        8,
        Region::nowhere(PAGE_SIZE)?.address(),
        inaccessible.address(),
        (1 << 47) - 8,
        1 << 47,
        0xffff_8880_0000_0000,
        u64::MAX - 7,
    ];
    for (name, number, ..) in CALLS {
        for address in addresses {
            let result = call_at(&gpu, number, address);
            ensure!(
                result == Err(Errno::FAULT),
                "{name} at {address:#x}: {result:?}"
            );
        }
    }
    ensure_works(&gpu)
}

fn argument_that_cannot_be_written_is_efault() -> Result<()> {
    let gpu = Gpu::open_first()?;
    let read_only = Region::map(PAGE_SIZE, Backing::Small)?;
    let arguments = Region::map(PAGE_SIZE, Backing::Small)?;
    read_only.protect(Protection::Read)?;
    // INFO and STATS only write.
    for number in [uapi::Info::NUMBER, uapi::Stats::NUMBER] {
        let result = call_at(&gpu, number, read_only.address());
        ensure!(result == Err(Errno::FAULT), "{number:#x}: {result:?}");
    }
    // A job whose name can't be told: it counts as one that is not collected, no more.
    read_only.protect(Protection::ReadWrite)?;
    read_only.store(0, u64::from(farfault::Kernel::Sum.raw()) | 1 << 32);
    read_only.store(1, arguments.address());
    read_only.store(2, 8);
    read_only.protect(Protection::Read)?;
    for _ in 0..2 * gpu.info().max_jobs {
        let result = call_at(&gpu, uapi::Submit::NUMBER, read_only.address());
        ensure!(result == Err(Errno::FAULT), "SUBMIT: {result:?}");
        match call::wait(&gpu, 0, call::JOB_TIME) {
            Ok(_) | Err(Errno::NOENT) => {}
            Err(errno) => anyhow::bail!("WAIT for any: {errno:?}"),
        }
    }
    ensure_works(&gpu)
}

/// It writes for ever, and nobody could end it.
fn job_whose_name_cannot_be_told_does_not_run_on() -> Result<()> {
    let gpu = Gpu::open_first()?;
    let word = Region::map(PAGE_SIZE, Backing::Small)?;
    gpu.advise(word.pages(), Advice::MapOnly)?;
    let arguments = Region::map(PAGE_SIZE, Backing::Small)?;
    arguments.store(0, u64::from(farfault::Kernel::AtomicAdd.raw()) | 1 << 32);
    for (index, argument) in [word.address(), 1, u64::MAX].into_iter().enumerate() {
        arguments.store(1 + index, argument);
    }
    arguments.protect(Protection::Read)?;
    let result = call_at(&gpu, uapi::Submit::NUMBER, arguments.address());
    ensure!(result == Err(Errno::FAULT), "SUBMIT: {result:?}");
    // It is one of those that are collected as any.
    let end = call::wait(&gpu, 0, call::JOB_TIME)?;
    call::ensure_status(&end, JobStatus::Killed)?;
    let after = word.load(0);
    thread::sleep(Duration::from_millis(20));
    ensure!(word.load(0) == after, "it goes on writing");
    ensure_works(&gpu)
}

fn argument_that_ends_in_a_hole_is_efault() -> Result<()> {
    let gpu = Gpu::open_first()?;
    let region = Region::map(2 * PAGE_SIZE, Backing::Small)?;
    region.part(PAGE_SIZE, PAGE_SIZE).unmap()?;
    let end = region.address() + PAGE_SIZE as u64;
    for (name, number, size, _) in CALLS {
        // The last byte, and all but the first one, is not there.
        for inside in [size as u64 - 1, 1] {
            let result = call_at(&gpu, number, end - inside);
            ensure!(
                result == Err(Errno::FAULT),
                "{name}, {inside} bytes: {result:?}"
            );
        }
    }
    ensure_works(&gpu)
}

fn unknown_calls_are_enotty() -> Result<()> {
    let gpu = Gpu::open_first()?;
    let argument = Region::map(PAGE_SIZE, Backing::Small)?.address();
    let known: Vec<u32> = CALLS.iter().map(|call| call.1).collect();
    for number in 0..=0xff {
        for base in [uapi::IOC_PING & !0xff, uapi::Wait::NUMBER & !0xff] {
            let call = base | number;
            if known.contains(&call) || call == uapi::IOC_PING {
                continue;
            }
            let result = call_at(&gpu, call, argument);
            ensure!(result == Err(Errno::NOTTY), "{call:#x}: {result:?}");
        }
    }
    // Calls of other devices: nothing of ours but the number.
    for foreign in [b'E', b'G', b'f', 0xfe] {
        let call = uapi::Info::NUMBER & !0xff00 | u32::from(foreign) << 8;
        let result = call_at(&gpu, call, argument);
        ensure!(result == Err(Errno::NOTTY), "{call:#x}: {result:?}");
    }
    for call in [0u32, 0xffff_ffff, 0x8000_0000] {
        let result = call_at(&gpu, call, argument);
        ensure!(result == Err(Errno::NOTTY), "{call:#x}: {result:?}");
    }
    ensure_works(&gpu)
}

fn calls_of_another_size_or_direction_are_enotty() -> Result<()> {
    let gpu = Gpu::open_first()?;
    let argument = Region::map(4 * PAGE_SIZE, Backing::Small)?.address();
    for (name, number, size, _) in CALLS {
        let sizes = [0, 1, size - 8, size - 1, size + 1, size + 8, 0x3fff];
        let with_size = |size: usize| number & !(0x3fff << 16) | (size as u32) << 16;
        let with_direction = |direction: u32| number & !(3 << 30) | direction << 30;
        let calls = sizes.map(with_size).into_iter();
        for call in calls.chain((0..4).map(with_direction)) {
            if call == number {
                continue;
            }
            let result = call_at(&gpu, call, argument);
            ensure!(
                result == Err(Errno::NOTTY),
                "{name} as {call:#x}: {result:?}"
            );
        }
    }
    ensure_works(&gpu)
}

fn file_operations_without_meaning_fail() -> Result<()> {
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/farfault0")?;
    ensure!(file.read(&mut [0; 8]).is_err(), "it can be read");
    ensure!(file.write(&[0; 8]).is_err(), "it can be written");
    ensure!(
        file.read_at(&mut [0; 8], 0).is_err(),
        "it can be read at an offset"
    );
    ensure!(file.set_len(1).is_err(), "it can be truncated");
    ensure!(
        Region::map(PAGE_SIZE, Backing::File(&file)).is_err(),
        "it can be mapped"
    );
    ensure_works(&Gpu::open_first()?)
}

fn descriptors_opened_for_reading_or_writing_only_do_no_harm() -> Result<()> {
    for (read, write) in [(true, false), (false, true)] {
        let file = OpenOptions::new()
            .read(read)
            .write(write)
            .open("/dev/farfault0")?;
        // Whether they can be used is not said; that they don't break anything is.
        let _ = call_at(&file, uapi::IOC_PING, 0);
    }
    ensure_works(&Gpu::open_first()?)
}
