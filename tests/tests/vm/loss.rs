// SPDX-License-Identifier: MIT OR Apache-2.0
//! The device's process dies: the driver notices within its time limits, and whoever waits is told.
//!
//! QEMU does not survive everything that a guest can do to a device without a process, so nothing
//! is asked of the VM afterwards.

use super::{
    HostCase,
    inside::{go_on, start},
    machines::{After, Machines},
};
use anyhow::{Result, ensure};
use farfault_tests::guest::{
    Machine,
    programs::{DONE, LOSE_DEVICE, READY},
};
use std::time::Duration;
use xtask::vm::Vm;

pub(crate) const CASES: &[HostCase] = &[HostCase {
    name: "loss::device_killed_ends_jobs_and_calls_with_an_error",
    machine: Machine::Small,
    after: After::GiveUp,
    run: device_killed_ends_jobs_and_calls_with_an_error,
}];

fn device_killed_ends_jobs_and_calls_with_an_error(vm: &mut Vm, machines: &Machines) -> Result<()> {
    let process = start(vm, machines, LOSE_DEVICE, READY)?;
    vm.kill_device(0)?;
    let output = go_on(process, machines, Duration::from_secs(90))?;
    ensure!(output.stdout_text().contains(DONE));
    Ok(())
}
