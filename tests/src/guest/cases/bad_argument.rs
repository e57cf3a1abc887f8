// SPDX-License-Identifier: MIT OR Apache-2.0
//! Every field of every argument, wrong in turn: the error is the one that the header names, nothing
//! is changed, and the descriptor goes on working.

use crate::guest::{
    call::{Job, call},
    oracle,
    place::ensure_place,
};
use anyhow::{Result, ensure};
use farfault::arena::{Backing, Region};
use farfault::{
    Advice, Gpu, Kernel, PAGE_SIZE, Place,
    uapi::{self, Advise, Exclusive, Kill, Migrate, Query, Submit, Wait},
};
use rustix::io::Errno;

group! { "bad_argument", on Small, seconds 40:
    submit_with_each_field_wrong_is_einval,
    wait_and_kill_with_each_field_wrong_fail,
    migrate_with_each_field_wrong_fails,
    advise_with_each_field_wrong_fails,
    query_with_each_field_wrong_fails,
    exclusive_with_each_field_wrong_fails,
}

const PAGE: u64 = PAGE_SIZE as u64;
/// Behind the last page that a process can have.
const USER_END: u64 = (1 << 47) - PAGE;

/// A name for messages, what to change in a right argument, and the error.
type Wrong<T> = (&'static str, fn(&mut T), Errno);

struct Bench {
    gpu: Gpu,
    region: Region,
}

impl Bench {
    fn new() -> Result<Self> {
        let gpu = Gpu::open_first()?;
        let region = Region::map(8 * PAGE_SIZE, Backing::Small)?;
        oracle::write(region, 1);
        Ok(Self { gpu, region })
    }

    /// The right argument is accepted, each wrong one is not, and the right one is again.
    fn refuses<T: farfault::arena::Call>(&self, right: T, wrong: &[Wrong<T>]) -> Result<()> {
        call(&self.gpu, right)?;
        for (what, change, errno) in wrong {
            let mut argument = right;
            change(&mut argument);
            let result = call(&self.gpu, argument).map(drop);
            ensure!(
                result == Err(*errno),
                "{what}: {result:?}, and should be {errno:?}"
            );
        }
        call(&self.gpu, right)?;
        Ok(())
    }

    /// Nothing that was refused has done anything.
    fn is_unharmed(&self) -> Result<()> {
        self.gpu.ping()?;
        let sum = Job::sum(self.region).run(&self.gpu)?;
        ensure!(sum == oracle::expected_sum(self.region, 1, 0));
        oracle::check(self.region, 1, 0)
    }
}

fn submit_with_each_field_wrong_is_einval() -> Result<()> {
    let bench = Bench::new()?;
    let (address, length) = (bench.region.address(), bench.region.length() as u64);
    let einval = Errno::INVAL;
    // No right one is among them: each that is accepted would be one more job to collect.
    let refuse = |what: &str, submit: Submit| {
        let result = call(&bench.gpu, submit).map(drop);
        ensure!(result == Err(einval), "{what}: {result:?}; {submit:x?}");
        Ok(())
    };
    let most = bench.gpu.info().max_waves;
    for (kernel, used) in [
        (Kernel::Fill, 3),
        (Kernel::Copy, 3),
        (Kernel::Sum, 2),
        (Kernel::Add, 3),
        (Kernel::AtomicAdd, 3),
        (Kernel::CompareAndSwap, 3),
        (Kernel::PointerChase, 2),
    ] {
        // Where the addresses and the length are among the arguments.
        let (addresses, length_at): (&[usize], _) = match kernel {
            Kernel::Fill | Kernel::Sum | Kernel::Add => (&[0], Some(1)),
            Kernel::Copy => (&[0, 1], Some(2)),
            _ => (&[0], None),
        };
        let arguments = match kernel {
            Kernel::Sum => [address, length, 0, 0],
            Kernel::Copy => [address, address + length / 2, length / 2, 0],
            Kernel::PointerChase => [address, 1, 0, 0],
            Kernel::AtomicAdd => [address, 0, 1, 0],
            _ => [address, if length_at.is_some() { length } else { 0 }, 0, 0],
        };
        let right = Submit {
            kernel: kernel.raw(),
            waves: 1,
            arguments,
            fence: 0,
        };
        let waves = |waves| Submit { waves, ..right };
        refuse("no waves", waves(0))?;
        refuse("too many waves", waves(most + 1))?;
        refuse("far too many waves", waves(u32::MAX))?;
        if matches!(kernel, Kernel::CompareAndSwap | Kernel::PointerChase) {
            refuse("more than its one wave", waves(2))?;
        }
        let with = |index: usize, value| {
            let mut submit = right;
            submit.arguments[index] = value;
            submit
        };
        for index in used..4 {
            refuse("an unused argument", with(index, 1))?;
            refuse("an unused argument", with(index, 1 << 63))?;
        }
        for index in addresses {
            for unaligned in [1, 2, 4, 7] {
                refuse("an unaligned address", with(*index, address + unaligned))?;
            }
            if length_at.is_some() {
                refuse("a range that overflows", with(*index, u64::MAX - 7))?;
            }
        }
        if let Some(index) = length_at {
            for unaligned in [1, 4, length - 1] {
                refuse("an unaligned length", with(index, unaligned))?;
            }
            refuse("a range that overflows", with(index, u64::MAX - 7))?;
        }
        // A job works on one word at least.
        match kernel {
            Kernel::AtomicAdd => refuse("no repetition", with(2, 0))?,
            Kernel::PointerChase => refuse("no step", with(1, 0))?,
            Kernel::CompareAndSwap => {}
            Kernel::Copy => {
                refuse("no length", with(2, 0))?;
                refuse("a copy onto itself", with(1, address))?;
                refuse(
                    "a copy of overlapping ranges",
                    with(1, address + length / 2 - 8),
                )?;
            }
            Kernel::Fill | Kernel::Sum | Kernel::Add => refuse("no length", with(1, 0))?,
        }
        for kernel in [0, 8, 9, 1 << 16, u32::MAX] {
            refuse("no such kernel", Submit { kernel, ..right })?;
        }
    }
    bench.is_unharmed()?;
    ensure!(bench.gpu.stats()?.jobs == 1, "a refused job has run");
    Ok(())
}

fn wait_and_kill_with_each_field_wrong_fail() -> Result<()> {
    let bench = Bench::new()?;
    let gpu = &bench.gpu;
    let fence = Job::sum(bench.region).submit(gpu)?;
    for unknown in [fence + 1, u64::MAX, 1 << 32] {
        let wait = Wait {
            fence: unknown,
            timeout_ns: -1,
            ..Wait::default()
        };
        ensure!(call(gpu, wait) == Err(Errno::NOENT), "WAIT for {unknown}");
        let kill = call(gpu, Kill { fence: unknown }).map(drop);
        ensure!(kill == Err(Errno::NOENT), "KILL of {unknown}");
    }
    // What is only written to may hold anything; times may be as long as there are numbers.
    for timeout_ns in [i64::MAX, -1, i64::MIN] {
        let fence = Job::sum(bench.region).submit(gpu)?;
        let end = call(
            gpu,
            Wait {
                fence,
                timeout_ns,
                result: u64::MAX,
                fault_address: u64::MAX,
                status: u32::MAX,
                access: u32::MAX,
            },
        )?;
        let clean = (end.status, end.access, end.fault_address) == (0, 0, 0);
        ensure!(clean && end.fence == fence, "{end:x?}");
        ensure!(
            end.result == oracle::expected_sum(bench.region, 1, 0),
            "{end:x?}"
        );
    }
    crate::guest::call::wait(gpu, fence, crate::guest::call::JOB_TIME)?;
    bench.is_unharmed()
}

fn migrate_with_each_field_wrong_fails() -> Result<()> {
    let bench = Bench::new()?;
    let right = Migrate {
        address: bench.region.address(),
        length: bench.region.length() as u64,
        destination: Place::Ram.raw(),
        // What is only written to may hold anything.
        moved: u64::MAX,
        there: u64::MAX,
        stayed: u64::MAX,
        reserved: 0,
    };
    let wrong: &[Wrong<Migrate>] = &[
        ("address by a byte", |m| m.address += 1, Errno::INVAL),
        (
            "address by half a page",
            |m| m.address += PAGE / 2,
            Errno::INVAL,
        ),
        ("no length", |m| m.length = 0, Errno::INVAL),
        ("length by a byte", |m| m.length += 1, Errno::INVAL),
        ("length of a byte", |m| m.length = 1, Errno::INVAL),
        (
            "overflow",
            |m| m.length = 0u64.wrapping_sub(PAGE),
            Errno::INVAL,
        ),
        (
            "overflow to zero",
            |m| m.length = 0u64.wrapping_sub(m.address),
            Errno::INVAL,
        ),
        (
            "address at the very end",
            |m| m.address = 0u64.wrapping_sub(PAGE),
            Errno::INVAL,
        ),
        (
            "address of the kernel's",
            |m| m.address = 0xffff_8880_0000_0000,
            Errno::INVAL,
        ),
        (
            "address behind user space",
            |m| m.address = USER_END + PAGE,
            Errno::INVAL,
        ),
        (
            "length beyond user space",
            |m| m.length = USER_END - m.address + 2 * PAGE,
            Errno::INVAL,
        ),
        ("to nowhere", |m| m.destination = 0, Errno::INVAL),
        ("to no such place", |m| m.destination = 3, Errno::INVAL),
        (
            "to no such place",
            |m| m.destination = u32::MAX,
            Errno::INVAL,
        ),
        ("reserved", |m| m.reserved = 1, Errno::INVAL),
        ("reserved", |m| m.reserved = 1 << 31, Errno::INVAL),
        ("not mapped", |m| m.address = PAGE, Errno::FAULT),
        ("not mapped at its end", |m| m.length += PAGE, Errno::FAULT),
        (
            "not mapped at its begin",
            |m| m.address -= PAGE,
            Errno::FAULT,
        ),
        (
            "all of user space",
            |m| (m.address, m.length) = (0, USER_END),
            Errno::FAULT,
        ),
    ];
    bench.refuses(right, wrong)?;
    let to_vram = Migrate {
        destination: Place::Vram.raw(),
        ..right
    };
    // The last right call has moved it all to VRAM, the wrong ones to nowhere.
    bench.refuses(to_vram, wrong)?;
    ensure_place(&bench.gpu, bench.region, Place::Vram)?;
    bench.is_unharmed()
}

fn advise_with_each_field_wrong_fails() -> Result<()> {
    let bench = Bench::new()?;
    let right = Advise {
        address: bench.region.address(),
        length: bench.region.length() as u64,
        advice: Advice::MapOnly.raw(),
        reserved: 0,
    };
    bench.refuses(
        right,
        &[
            ("address by a byte", |a| a.address += 1, Errno::INVAL),
            (
                "address by half a page",
                |a| a.address += PAGE / 2,
                Errno::INVAL,
            ),
            ("no length", |a| a.length = 0, Errno::INVAL),
            ("length by a byte", |a| a.length += 1, Errno::INVAL),
            (
                "overflow",
                |a| a.length = 0u64.wrapping_sub(PAGE),
                Errno::INVAL,
            ),
            (
                "overflow to zero",
                |a| a.length = 0u64.wrapping_sub(a.address),
                Errno::INVAL,
            ),
            (
                "address at the very end",
                |a| a.address = 0u64.wrapping_sub(PAGE),
                Errno::INVAL,
            ),
            (
                "address of the kernel's",
                |a| a.address = 0xffff_8880_0000_0000,
                Errno::INVAL,
            ),
            (
                "address behind user space",
                |a| a.address = USER_END + PAGE,
                Errno::INVAL,
            ),
            (
                "length beyond user space",
                |a| a.length = USER_END - a.address + 2 * PAGE,
                Errno::INVAL,
            ),
            ("no such advice", |a| a.advice = 4, Errno::INVAL),
            ("no such advice", |a| a.advice = u32::MAX, Errno::INVAL),
            ("reserved", |a| a.reserved = 1, Errno::INVAL),
            ("reserved", |a| a.reserved = 1 << 31, Errno::INVAL),
        ],
    )?;
    let states = bench.gpu.query(bench.region.pages())?;
    ensure!(
        states.iter().all(|page| page.advice == Advice::MapOnly),
        "{states:?}"
    );
    bench.is_unharmed()
}

fn query_with_each_field_wrong_fails() -> Result<()> {
    let bench = Bench::new()?;
    let answers = Region::map(PAGE_SIZE, Backing::Small)?;
    let right = Query {
        address: bench.region.address(),
        length: bench.region.length() as u64,
        pages: answers.address(),
    };
    bench.refuses(
        right,
        &[
            ("address by a byte", |q| q.address += 1, Errno::INVAL),
            (
                "address by half a page",
                |q| q.address += PAGE / 2,
                Errno::INVAL,
            ),
            ("no length", |q| q.length = 0, Errno::INVAL),
            ("length by a byte", |q| q.length += 1, Errno::INVAL),
            (
                "overflow",
                |q| q.length = 0u64.wrapping_sub(PAGE),
                Errno::INVAL,
            ),
            (
                "overflow to zero",
                |q| q.length = 0u64.wrapping_sub(q.address),
                Errno::INVAL,
            ),
            (
                "address at the very end",
                |q| q.address = 0u64.wrapping_sub(PAGE),
                Errno::INVAL,
            ),
            (
                "address of the kernel's",
                |q| q.address = 0xffff_8880_0000_0000,
                Errno::INVAL,
            ),
            (
                "address behind user space",
                |q| q.address = USER_END + PAGE,
                Errno::INVAL,
            ),
            (
                "length beyond user space",
                |q| q.length = USER_END - q.address + 2 * PAGE,
                Errno::INVAL,
            ),
            ("not mapped", |q| q.address = PAGE, Errno::FAULT),
            ("not mapped at its end", |q| q.length += PAGE, Errno::FAULT),
            (
                "all of user space",
                |q| (q.address, q.length) = (0, USER_END),
                Errno::FAULT,
            ),
            ("no pointer", |q| q.pages = 0, Errno::FAULT),
            ("pointer to nothing", |q| q.pages = PAGE, Errno::FAULT),
            (
                "pointer into the kernel",
                |q| q.pages = 0xffff_8880_0000_0000,
                Errno::FAULT,
            ),
            (
                "pointer at the very end",
                |q| q.pages = u64::MAX,
                Errno::FAULT,
            ),
            (
                "pointer to too little",
                |q| q.pages += PAGE - 24,
                Errno::FAULT,
            ),
        ],
    )?;
    // Nothing is written behind the answers.
    let words = bench.region.pages().count() * size_of::<uapi::Page>() / 8;
    for index in words..answers.words() - 3 {
        ensure!(answers.load(index) == 0, "word {index} was written");
    }
    answers.protect(farfault::arena::Protection::Read)?;
    let read_only = call(&bench.gpu, right).map(drop);
    ensure!(
        read_only == Err(Errno::FAULT),
        "read-only answers: {read_only:?}"
    );
    bench.is_unharmed()
}

fn exclusive_with_each_field_wrong_fails() -> Result<()> {
    let bench = Bench::new()?;
    let right = Exclusive {
        address: bench.region.address(),
        length: bench.region.length() as u64,
    };
    bench.refuses(
        right,
        &[
            ("address by a byte", |e| e.address += 1, Errno::INVAL),
            (
                "address by half a page",
                |e| e.address += PAGE / 2,
                Errno::INVAL,
            ),
            ("no length", |e| e.length = 0, Errno::INVAL),
            ("length by a byte", |e| e.length += 1, Errno::INVAL),
            (
                "overflow",
                |e| e.length = 0u64.wrapping_sub(PAGE),
                Errno::INVAL,
            ),
            (
                "overflow to zero",
                |e| e.length = 0u64.wrapping_sub(e.address),
                Errno::INVAL,
            ),
            (
                "address at the very end",
                |e| e.address = 0u64.wrapping_sub(PAGE),
                Errno::INVAL,
            ),
            (
                "address of the kernel's",
                |e| e.address = 0xffff_8880_0000_0000,
                Errno::INVAL,
            ),
            (
                "address behind user space",
                |e| e.address = USER_END + PAGE,
                Errno::INVAL,
            ),
            (
                "length beyond user space",
                |e| e.length = USER_END - e.address + 2 * PAGE,
                Errno::INVAL,
            ),
            ("not mapped", |e| e.address = PAGE, Errno::FAULT),
            ("not mapped at its end", |e| e.length += PAGE, Errno::FAULT),
            (
                "not mapped at its begin",
                |e| e.address -= PAGE,
                Errno::FAULT,
            ),
            (
                "all of user space",
                |e| (e.address, e.length) = (0, USER_END),
                Errno::FAULT,
            ),
        ],
    )?;
    bench.is_unharmed()
}
