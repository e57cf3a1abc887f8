// SPDX-License-Identifier: MIT OR Apache-2.0
//! The turns: what is loaded, switched and run for each figure. The only file here that speaks to the VM.

use std::{
    collections::BTreeMap,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use anyhow::Context;
use farfault_init::{DRIVER_PATH, MOCK_PATH};
use xtask::{
    build::SUITE_PROGRAM,
    progress::{Progress, note},
    vm::Vm,
};

use super::{
    figures::{Round, Source},
    memcpy, suite,
};

const PROGRAM: &str = "farfault-bench";
/// Loading, unloading.
const MODULE_LIMIT: Duration = Duration::from_secs(60);
/// One run of one program; the suite ends its benchmark by itself after 120 s.
const RUN_LIMIT: Duration = Duration::from_secs(300);

/// The mock device fails a migration of which one page of 65,536 stays behind, which happens on a busy machine.
const MOCK_TRIES: u32 = 3;

/// How often one size is measured with and without copies in one round.
const COPIES_TURNS: u32 = 2;

const MIB: usize = 1 << 20;

/// One thing that is measured in each round.
type Turn = fn(&mut Vm, &[u32], &mut Round) -> anyhow::Result<()>;

const TURNS: [(&str, Turn); 5] = [
    ("the suite's benchmark on test_hmm", suite_on_mock),
    ("the suite's benchmark on Farfault", suite_on_farfault),
    ("commands and faults", faults),
    ("migrations with and without copies", migrations),
    ("the host's memcpy", host_memcpy),
];

pub(super) fn measure(vm: &mut Vm, rounds: u32, sizes: &[u32]) -> anyhow::Result<Vec<Round>> {
    let mut measured = Vec::new();
    for number in 1..=rounds {
        let mut round = Round::default();
        let mut turns = TURNS;
        if number % 2 == 0 {
            turns.reverse();
        }
        for (what, turn) in turns {
            let progress = Progress::start(format!("round {number} of {rounds}: {what}"));
            turn(vm, sizes, &mut round).with_context(|| format!("measuring {what}"))?;
            vm.check()?;
            progress.done();
        }
        measured.push(round);
    }
    Ok(measured)
}

fn suite_on_mock(vm: &mut Vm, _: &[u32], round: &mut Round) -> anyhow::Result<()> {
    with_module(vm, &[MOCK_PATH], |vm| {
        for left in (0..MOCK_TRIES).rev() {
            match suite(vm, round, Source::TestHmm) {
                Err(error) if left > 0 => {
                    let error = error.to_string();
                    let why = error.lines().last().unwrap_or_default().trim();
                    note(&format!("once more, for it failed: {why}"));
                }
                ended => return ended,
            }
        }
        Ok(())
    })
}

fn suite_on_farfault(vm: &mut Vm, _: &[u32], round: &mut Round) -> anyhow::Result<()> {
    with_module(vm, &[DRIVER_PATH, "dmirror=1"], |vm| {
        suite(vm, round, Source::Farfault)
    })
}

fn faults(vm: &mut Vm, _: &[u32], round: &mut Round) -> anyhow::Result<()> {
    with_module(vm, &[DRIVER_PATH], |vm| {
        samples(vm, &[PROGRAM, "faults"], round, Source::Farfault)
    })
}

/// Each size in turns of its own, so that what is compared is near in time.
fn migrations(vm: &mut Vm, sizes: &[u32], round: &mut Round) -> anyhow::Result<()> {
    with_module(vm, &[DRIVER_PATH], |vm| {
        for size in sizes {
            let size = size.to_string();
            for _ in 0..COPIES_TURNS {
                let argv = [PROGRAM, "migrations", &size];
                samples(vm, &argv, round, Source::Farfault)?;
                vm.device(0)?.command(&["copies", "off"])?;
                let argv = [PROGRAM, "migrations", "--copies-off", &size];
                samples(vm, &argv, round, Source::CopiesOff)?;
                vm.device(0)?.command(&["copies", "on"])?;
            }
        }
        Ok(())
    })
}

fn host_memcpy(_: &mut Vm, sizes: &[u32], round: &mut Round) -> anyhow::Result<()> {
    for size in sizes {
        let samples = memcpy::samples(*size as usize * MIB);
        round.take(Source::HostMemcpy, format!("memcpy_{size}mb"), samples);
    }
    Ok(())
}

/// Loads a module with its parameters, does something, and unloads it.
pub(super) fn with_module<T>(
    vm: &mut Vm,
    module: &[&str],
    act: impl FnOnce(&mut Vm) -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    let mut insmod = vec!["insmod"];
    insmod.extend(module);
    vm.run(&insmod, MODULE_LIMIT)?.expect_success()?;
    let result = act(vm)?;
    let path = module.first().copied().unwrap_or_default();
    let name = Path::new(path).file_stem().unwrap_or_default();
    // A program that the suite has killed may be on its way out yet, and its file with it.
    let started = Instant::now();
    loop {
        let output = vm.run(&["rmmod", &name.to_string_lossy()], MODULE_LIMIT)?;
        if output.success() || started.elapsed() > MODULE_LIMIT {
            output.expect_success()?;
            return Ok(result);
        }
        thread::sleep(Duration::from_secs(1));
    }
}

fn suite(vm: &mut Vm, round: &mut Round, source: Source) -> anyhow::Result<()> {
    let argv = [SUITE_PROGRAM, "-r", suite::BENCHMARK];
    let output = vm.run(&argv, RUN_LIMIT)?.expect_success()?.stdout_text();
    let times = suite::parse(&output).with_context(|| format!("in its output:\n{output}"))?;
    for (name, time) in times {
        round.take(source, name, vec![time]);
    }
    Ok(())
}

/// Runs our program and takes its samples.
fn samples(vm: &mut Vm, argv: &[&str], round: &mut Round, source: Source) -> anyhow::Result<()> {
    let output = vm.run(argv, RUN_LIMIT)?.expect_success()?.stdout;
    let samples: BTreeMap<String, Vec<u64>> =
        serde_json::from_slice(&output).with_context(|| format!("the output of {PROGRAM}"))?;
    for (name, samples) in samples {
        let samples = samples.into_iter().map(Duration::from_nanos).collect();
        round.take(source, name, samples);
    }
    Ok(())
}
