// SPDX-License-Identifier: MIT OR Apache-2.0
//! The device's process dies while nobody asks it for anything: the driver notices within its time limits, and whoever
//! waits for a job is told.

use super::{
    HostCase,
    death::victim,
    inside::{command, go_on},
    machines::{After, Machines},
};
use anyhow::{Context, Result, ensure};
use farfault_tests::guest::{
    Machine,
    ending::DIE_WITH_JOBS,
    programs::{DONE, FOR_EVER, LOSE_DEVICE, READY, WITH_A_LIMIT},
};
use std::time::Duration;
use xtask::vm::Vm;

pub(crate) const CASES: &[HostCase] = &[
    HostCase {
        name: "loss::device_killed_ends_jobs_and_calls_with_an_error",
        machine: Machine::Dying,
        after: After::Keep,
        run: device_killed_ends_jobs_and_calls_with_an_error,
    },
    HostCase {
        name: "loss::device_killed_wakes_who_polls_it_and_touches_no_other",
        machine: Machine::Dying,
        after: After::Keep,
        run: device_killed_wakes_who_polls_it_and_touches_no_other,
    },
];

const LIMIT: Duration = Duration::from_secs(90);

fn device_killed_ends_jobs_and_calls_with_an_error(vm: &mut Vm, machines: &Machines) -> Result<()> {
    for how in [FOR_EVER, WITH_A_LIMIT] {
        let gpu = victim(vm)?;
        let program = [LOSE_DEVICE, &gpu.to_string(), how];
        let process = vm.spawn(&command(machines, &program))?;
        process.wait_for(READY, machines.limit(LIMIT))?;
        vm.kill_device(gpu)?;
        let output = go_on(process, machines, LIMIT).with_context(|| format!("waiting {how}"))?;
        ensure!(output.stdout_text().contains(DONE));
    }
    Ok(())
}

fn device_killed_wakes_who_polls_it_and_touches_no_other(
    vm: &mut Vm,
    machines: &Machines,
) -> Result<()> {
    let gpu = victim(vm)?;
    let process = vm.spawn(&command(machines, &[DIE_WITH_JOBS, &gpu.to_string()]))?;
    process.wait_for(READY, machines.limit(LIMIT))?;
    vm.kill_device(gpu)?;
    let output = go_on(process, machines, LIMIT)?;
    ensure!(output.stdout_text().contains(DONE));
    Ok(())
}
