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
    programs::{DONE, FAULT_FOR_EVER, HOLD_CLOSED, HOLD_OPEN, READY},
};
use serde_json::json;
use std::{thread, time::Duration};
use xtask::vm::Vm;

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
    Keep suspend_during_faults_ends_the_job_and_leaves_right_data,
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

fn suspend_at_each_pm_test_level_keeps_pages_of_vram(
    vm: &mut Vm,
    machines: &Machines,
) -> Result<()> {
    for level in LEVELS {
        let open = start(vm, machines, HOLD_OPEN, READY)?;
        let closed = start(vm, machines, HOLD_CLOSED, READY)?;
        rehearse(vm, machines, level).context(level)?;
        for process in [open, closed] {
            let output = go_on(process, machines, COMMAND).context(level)?;
            ensure!(output.stdout_text().contains(DONE));
        }
    }
    Ok(())
}

fn suspend_to_ram_keeps_pages_of_vram(vm: &mut Vm, machines: &Machines) -> Result<()> {
    let process = start(vm, machines, HOLD_OPEN, READY)?;
    let line = "echo deep > /sys/power/mem_sleep; echo mem > /sys/power/state";
    let sleeper = vm.spawn(&["sh", "-ec", line])?;
    let limit = machines.limit(COMMAND);
    vm.qmp().wait_for_event("SUSPEND", limit, |_| true)?;
    vm.qmp().execute("system_wakeup", &json!({}))?;
    sleeper.wait(limit)?.expect_success()?;
    let output = go_on(process, machines, COMMAND)?;
    ensure!(output.stdout_text().contains(DONE));
    ensure_nothing_left(vm, Machine::Small.gpus())
}

fn suspend_during_faults_ends_the_job_and_leaves_right_data(
    vm: &mut Vm,
    machines: &Machines,
) -> Result<()> {
    let process = vm.spawn(&command(machines, &[FAULT_FOR_EVER]))?;
    // Long enough for it to be at work.
    thread::sleep(machines.limit(Duration::from_millis(300)));
    rehearse(vm, machines, "devices")?;
    // It may have been between two jobs.
    process.signal(SIGTERM)?;
    let output = process.wait(machines.limit(COMMAND))?;
    let said = output.stderr_text();
    ensure!(!said.contains("should be"), "wrong data: {said}");
    let ended = output.signal == Some(SIGTERM) || said.contains("Killed");
    ensure!(ended, "{output:?}");
    Ok(())
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
