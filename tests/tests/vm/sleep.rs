// SPDX-License-Identifier: MIT OR Apache-2.0
//! The guest sleeps and wakes, or the whole VM is paused, while processes have pages in VRAM.

use super::{
    HostCase,
    inside::{command, ensure_nothing_left, go_on, shell, start},
    machines::{After, Machines},
};
use anyhow::{Context, Result, ensure};
use farfault_tests::guest::{
    Machine,
    ending::SLEEP_WITH_JOBS,
    holding::HOLD_STARTS,
    programs::{DONE, EVICT_FOR_EVER, FAULT_FOR_EVER, HOLD_OPEN, MIGRATE_FOR_EVER, READY},
};
use serde_json::json;
use std::{thread, time::Duration};
use xtask::vm::{GuestProcess, Vm};

const COMMAND: Duration = Duration::from_secs(60);

macro_rules! cases {
    ($($after:ident $name:ident,)*) => {
        pub(crate) const CASES: &[HostCase] = &[$(HostCase {
            name: concat!("lifecycle::", stringify!($name)),
            machine: Machine::Small,
            after: After::$after,
            run: $name,
        },)*];
    };
}

cases! {
    Keep suspend_at_each_pm_test_level_keeps_pages_of_vram,
    Keep suspend_ends_jobs_that_run_and_keeps_those_that_have_ended,
    Keep suspend_at_pm_test_levels_under_load_leaves_right_data,
    Keep pause_of_the_vm_keeps_contexts_jobs_and_pages,
    // A PC of QEMU that has slept cannot be powered off.
    GiveUp suspend_to_ram_keeps_pages_of_vram,
}

/// As `Documentation/power/basic-pm-debugging` has them, each going further than the one before.
const LEVELS: [&str; 5] = ["freezer", "devices", "platform", "processors", "core"];

/// The line of shell with which the machine goes to sleep as far as `level` says, and wakes by itself. It fails
/// where the machine stays awake.
pub(crate) fn rehearsal(level: &str) -> String {
    format!(
        "echo 1 > /sys/module/suspend/parameters/pm_test_delay; \
         echo {level} > /sys/power/pm_test; slept=yes; echo mem > /sys/power/state || slept=no; \
         echo none > /sys/power/pm_test; test $slept = yes"
    )
}

fn rehearse(vm: &mut Vm, machines: &Machines, level: &str) -> Result<()> {
    shell(vm, machines, &rehearsal(level), COMMAND)?.expect_success()?;
    Ok(())
}

/// Processes with memory of every kind: huge pages in VRAM, and all starts.
const HOLDERS: [&str; 2] = [HOLD_OPEN, HOLD_STARTS];

fn hold(vm: &Vm, machines: &Machines) -> Result<Vec<GuestProcess>> {
    let holders = HOLDERS.into_iter();
    holders
        .map(|program| start(vm, machines, program, READY))
        .collect()
}

fn ensure_held(machines: &Machines, holders: Vec<GuestProcess>) -> Result<()> {
    for process in holders {
        let output = go_on(process, machines, COMMAND)?;
        ensure!(output.stdout_text().contains(DONE), "{output:?}");
    }
    Ok(())
}

/// Starts programs that go on for ever, and gives them time to be at work.
fn load(vm: &Vm, machines: &Machines, programs: &[&str]) -> Result<Vec<GuestProcess>> {
    let processes = programs
        .iter()
        .map(|program| vm.spawn(&command(machines, &[program])));
    let processes = processes.collect::<xtask::Result<_>>()?;
    thread::sleep(machines.limit(Duration::from_millis(500)));
    Ok(processes)
}

/// They go on until they are told to end, if it is not that a job of theirs has ended as it had to.
fn ensure_load_went_on(machines: &Machines, processes: Vec<GuestProcess>) -> Result<()> {
    for process in processes {
        process.signal(SIGTERM)?;
        let output = process.wait(machines.limit(COMMAND))?;
        let said = output.stderr_text();
        ensure!(!said.contains("should be"), "wrong data: {said}");
        let ended = output.signal == Some(SIGTERM) || said.contains("Killed");
        ensure!(ended, "{output:?}");
    }
    Ok(())
}

fn suspend_at_each_pm_test_level_keeps_pages_of_vram(
    vm: &mut Vm,
    machines: &Machines,
) -> Result<()> {
    for level in LEVELS {
        let holders = hold(vm, machines)?;
        rehearse(vm, machines, level).context(level)?;
        ensure_held(machines, holders).context(level)?;
    }
    Ok(())
}

fn suspend_ends_jobs_that_run_and_keeps_those_that_have_ended(
    vm: &mut Vm,
    machines: &Machines,
) -> Result<()> {
    let process = start(vm, machines, SLEEP_WITH_JOBS, READY)?;
    rehearse(vm, machines, "devices")?;
    ensure_held(machines, vec![process])
}

/// Faults, migrations and evictions all the time, and somebody who needs his data. As far as devices have a part in
/// it, and as far as it goes.
fn suspend_at_pm_test_levels_under_load_leaves_right_data(
    vm: &mut Vm,
    machines: &Machines,
) -> Result<()> {
    for level in ["devices", "core"] {
        let holder = start(vm, machines, HOLD_STARTS, READY)?;
        let load = load(
            vm,
            machines,
            &[FAULT_FOR_EVER, MIGRATE_FOR_EVER, EVICT_FOR_EVER],
        )?;
        rehearse(vm, machines, level).context(level)?;
        ensure_load_went_on(machines, load).context(level)?;
        ensure_held(machines, vec![holder]).context(level)?;
    }
    Ok(())
}

fn suspend_to_ram_keeps_pages_of_vram(vm: &mut Vm, machines: &Machines) -> Result<()> {
    let holders = hold(vm, machines)?;
    let load = load(vm, machines, &[MIGRATE_FOR_EVER])?;
    let line = "echo deep > /sys/power/mem_sleep; echo mem > /sys/power/state";
    let sleeper = vm.spawn(&["sh", "-ec", line])?;
    let limit = machines.limit(COMMAND);
    vm.qmp().wait_for_event("SUSPEND", limit, |_| true)?;
    vm.qmp().execute("system_wakeup", &json!({}))?;
    sleeper.wait(limit)?.expect_success()?;
    ensure_load_went_on(machines, load)?;
    ensure_held(machines, holders)?;
    ensure_nothing_left(vm, Machine::Small.gpus())
}

/// QEMU's `stop` and `cont`, as a snapshot has them.
fn pause_of_the_vm_keeps_contexts_jobs_and_pages(vm: &mut Vm, machines: &Machines) -> Result<()> {
    let process = start(vm, machines, HOLD_OPEN, READY)?;
    let load = vm.spawn(&command(machines, &[FAULT_FOR_EVER]))?;
    for _ in 0..10 {
        thread::sleep(machines.limit(Duration::from_millis(100)));
        vm.qmp().execute("stop", &json!({}))?;
        thread::sleep(Duration::from_millis(100));
        vm.qmp().execute("cont", &json!({}))?;
    }
    thread::sleep(machines.limit(Duration::from_millis(100)));
    load.signal(SIGTERM)?;
    let output = load.wait(machines.limit(COMMAND))?;
    ensure!(output.signal == Some(SIGTERM), "{output:?}");
    let output = go_on(process, machines, COMMAND)?;
    ensure!(output.stdout_text().contains(DONE));
    Ok(())
}

const SIGTERM: i32 = 15;
