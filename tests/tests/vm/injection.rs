// SPDX-License-Identifier: MIT OR Apache-2.0
//! Allocations of the kernel fail at random (`failslab`, `fail_page_alloc`; Documentation/fault-injection)
//! for the programs that use the GPU. Calls may fail then, with an error; data is never wrong, nothing
//! hangs, and nothing is left. It takes a kernel with fault injection, which `--kernel debug` is.

use super::{
    HostCase,
    inside::{guest, shell},
    machines::{After, Machines},
};
use anyhow::{Result, ensure};
use farfault_tests::guest::{
    Machine, PROGRAM,
    programs::{EVICT_FOR_EVER, FAULT_FOR_EVER, MIGRATE_FOR_EVER},
};
use std::time::Duration;
use xtask::vm::Vm;

const COMMAND: Duration = Duration::from_secs(60);

pub(crate) const CASES: &[HostCase] = &[
    HostCase {
        name: "injection::slab_allocations_that_fail_give_errors_and_no_wrong_data",
        machine: Machine::Small,
        after: After::Keep,
        run: slab_allocations_that_fail_give_errors_and_no_wrong_data,
    },
    HostCase {
        name: "injection::page_allocations_that_fail_give_errors_and_no_wrong_data",
        machine: Machine::Small,
        after: After::Keep,
        run: page_allocations_that_fail_give_errors_and_no_wrong_data,
    },
];

/// How many allocations may fail. The injector counts it down.
const TIMES: u32 = 1_000_000;

/// A program whose allocations fail now and then.
struct Victim {
    program: &'static str,
    /// How many in a hundred fail, once it has begun.
    percent: u32,
}

/// Rare failures reach deep into an operation, frequent ones its first steps.
const VICTIMS: [Victim; 6] = [
    Victim {
        program: FAULT_FOR_EVER,
        percent: 1,
    },
    Victim {
        program: FAULT_FOR_EVER,
        percent: 20,
    },
    Victim {
        program: MIGRATE_FOR_EVER,
        percent: 1,
    },
    Victim {
        program: MIGRATE_FOR_EVER,
        percent: 20,
    },
    Victim {
        program: EVICT_FOR_EVER,
        percent: 1,
    },
    Victim {
        program: EVICT_FOR_EVER,
        percent: 20,
    },
];

fn slab_allocations_that_fail_give_errors_and_no_wrong_data(
    vm: &mut Vm,
    machines: &Machines,
) -> Result<()> {
    let name = "injection::slab_allocations_that_fail_give_errors_and_no_wrong_data";
    inject(vm, machines, name, "failslab")
}

fn page_allocations_that_fail_give_errors_and_no_wrong_data(
    vm: &mut Vm,
    machines: &Machines,
) -> Result<()> {
    let name = "injection::page_allocations_that_fail_give_errors_and_no_wrong_data";
    inject(vm, machines, name, "fail_page_alloc")
}

/// Runs the victims under one of the kernel's injectors, each for some seconds.
fn inject(vm: &mut Vm, machines: &Machines, case: &str, injector: &str) -> Result<()> {
    let folder = format!("/sys/kernel/debug/{injector}");
    if !shell(vm, machines, &format!("test -d {folder}"), COMMAND)?.success() {
        machines.skip(case, &format!("this kernel has no {injector}"));
        return Ok(());
    }
    // Only what is allocated below the driver's code fails, for whomever: its workers too. Injectors
    // spare allocations that may sleep, as most of the driver's, unless they are told not to.
    let set = format!(
        "cd {folder}; echo N > task-filter; echo {TIMES} > times; echo 0 > verbose; echo 1 > interval; \
         for spared in ignore-gfp-*; do echo N > $spared; done; \
         test ! -e min-order || echo 0 > min-order; \
         start=$(cat /sys/module/farfault/sections/.text); \
         size=$(awk '$1 == \"farfault\" {{ print $2 }}' /proc/modules); \
         echo 16 > stacktrace-depth; echo $start > require-start; \
         printf '0x%x\\n' $((start + size)) > require-end"
    );
    shell(vm, machines, &set, COMMAND)?.expect_success()?;
    for Victim { program, percent } in VICTIMS {
        let line = format!(
            "{PROGRAM} {program} > /tmp/said 2>&1 & victim=$!; sleep 1; \
             echo {percent} > {folder}/probability; sleep 2; echo 0 > {folder}/probability; \
             kill $victim 2>/dev/null; wait $victim; echo ended $?; cat /tmp/said"
        );
        let output = shell(vm, machines, &format!("set +e; {line}"), COMMAND)?.expect_success()?;
        let said = output.stdout_text();
        let ended = |code: u32| said.lines().any(|line| line == format!("ended {code}"));
        // 1: an error was reported; 143: nothing stopped it before the signal did. Another signal means
        // that data was gone.
        ensure!(ended(1) || ended(143), "{program} at {percent} %: {said}");
        ensure!(!said.contains("should be"), "{program}: wrong data: {said}");
    }
    let left = shell(vm, machines, &format!("cat {folder}/times"), COMMAND)?.expect_success()?;
    let left: u32 = left.stdout_text().trim().parse()?;
    ensure!(left < TIMES, "no allocation failed");
    println!("{} allocations failed", TIMES - left);
    let case = "faults::small_pages_of_many_waves_are_right";
    guest(vm, machines, &[case], COMMAND).map(drop)
}
