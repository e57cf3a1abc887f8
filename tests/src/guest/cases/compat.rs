// SPDX-License-Identifier: MIT OR Apache-2.0
//! Calls of a 32-bit program, whose pointers have 32 bits: they do what those of others do.

use crate::guest::{
    call::{JOB_TIME, Job},
    oracle,
    place::ensure_place,
    skip,
};
use anyhow::{Context, Result, ensure};
use farfault::arena::{Call, Region, call_at_of_32_bits};
use farfault::{
    Gpu, Kernel, PAGE_SIZE, Place,
    uapi::{self, JobStatus},
};
use rustix::io::Errno;
use std::path::Path;

group! { "compat", on Small, seconds 40:
    calls_of_a_32_bit_program_work,
}

/// A kernel that takes calls of 32-bit programs has this. Any other ends who makes one.
const IA32_EMULATION: &str = "/proc/sys/abi/vsyscall32";

fn calls_of_a_32_bit_program_work() -> Result<()> {
    let gpu = Gpu::open_first()?;
    if !Path::new(IA32_EMULATION).exists() {
        skip("the kernel has no IA32 emulation");
        return Ok(());
    }
    let argument = Region::map_low(PAGE_SIZE)?;
    // The words of an argument; those that the call has written are there afterwards.
    let call = |number: u32, words: &[u64]| {
        for (index, word) in words.iter().enumerate() {
            argument.store(index, *word);
        }
        call_at_of_32_bits(&gpu, number, argument.address())
    };
    let region = Region::map_low(4 * PAGE_SIZE)?;
    let (address, length) = (region.address(), region.length() as u64);
    oracle::write(region, 1);

    call(uapi::IOC_PING, &[])?;
    call(uapi::Info::NUMBER, &[0; 4])?;
    let context = u64::from(gpu.info().context);
    ensure!(argument.load(0) == u64::from(uapi::UAPI_VERSION) | context << 32);

    let kernel = u64::from(Kernel::Sum.raw()) | 1 << 32;
    call(uapi::Submit::NUMBER, &[kernel, address, length, 0, 0, 0])?;
    let fence = argument.load(5);
    let limit = JOB_TIME.as_nanos() as u64;
    call(uapi::Wait::NUMBER, &[fence, limit, 0, 0, 0])?;
    let (sum, status) = (argument.load(2), argument.load(4) as u32);
    ensure!(status == JobStatus::Ok.raw() && sum == oracle::expected_sum(region, 1, 0));
    let killed = call(uapi::Kill::NUMBER, &[fence]);
    ensure!(killed == Err(Errno::NOENT), "{killed:?}");

    for place in [Place::Ram, Place::Vram] {
        let words = [address, length, u64::from(place.raw()), 0, 0, 0];
        call(uapi::Migrate::NUMBER, &words).with_context(|| format!("MIGRATE to {place:?}"))?;
        ensure!(argument.load(3) + argument.load(4) == 4 && argument.load(5) == 0);
        ensure_place(&gpu, region, place)?;
        let answers = Region::map_low(PAGE_SIZE)?;
        call(uapi::Query::NUMBER, &[address, length, answers.address()])?;
        let cpu_place = answers.load(0) as u8;
        ensure!(u32::from(cpu_place) == place.raw(), "QUERY: {cpu_place}");
    }
    call(uapi::Exclusive::NUMBER, &[address, length])?;
    call(uapi::Advise::NUMBER, &[address, length, 0])?;
    call(uapi::Stats::NUMBER, &[0; 10])?;
    ensure!(argument.load(9) == 1, "{} jobs", argument.load(9));
    Job::add(region, 1).run(&gpu)?;
    oracle::check(region, 1, 1)?;

    let unknown = call_at_of_32_bits(&gpu, uapi::IOC_PING | 0xff, argument.address());
    ensure!(unknown == Err(Errno::NOTTY), "{unknown:?}");
    let nowhere = call_at_of_32_bits(&gpu, uapi::Info::NUMBER, 0xffff_f000);
    ensure!(nowhere == Err(Errno::FAULT), "{nowhere:?}");
    Ok(())
}
