// SPDX-License-Identifier: MIT OR Apache-2.0
//! GPUs are pulled out of the running VM (QMP `device_del`, PCIe's attention button) and plugged in again, and the
//! whole VM is reset or reboots, whatever the guest's processes do with them. Each case leaves one GPU.

use super::{
    HostCase,
    inside::{ensure_lost_gpu_and_right_data, go_on, guest, shell, start},
    machines::{After, Machines},
};
use anyhow::{Result, ensure};
use farfault_tests::guest::{
    Machine, VRAM,
    programs::{
        DONE, EVICT_FOR_EVER, FAULT_FOR_EVER, HOLD_OPEN, LOSE_DRIVER, LOSE_MIRROR,
        MIGRATE_FOR_EVER, READY,
    },
};
use std::time::Duration;
use xtask::vm::Vm;

const COMMAND: Duration = Duration::from_secs(60);

macro_rules! cases {
    ($($name:ident,)*) => {
        pub(crate) const CASES: &[HostCase] = &[$(HostCase {
            name: concat!("lifecycle::", stringify!($name)),
            machine: Machine::HotPlug,
            after: After::Keep,
            run: $name,
        },)*];
    };
}

cases! {
    hot_unplug_of_an_idle_device_and_plug_again_works,
    number_of_an_unplugged_device_goes_to_the_next_one,
    hot_unplug_with_open_descriptors_revokes_them_and_brings_pages_home,
    hot_unplug_with_open_mirrors_revokes_them_and_brings_pages_home,
    hot_unplug_during_faults_ends_with_enodev_and_right_data,
    hot_unplug_during_migrations_ends_with_enodev_and_right_data,
    hot_unplug_during_evictions_ends_with_enodev_and_right_data,
    vm_reset_with_pages_resident_leaves_a_device_that_works,
    reboot_with_pages_resident_leaves_a_device_that_works,
}

fn works(vm: &mut Vm, machines: &Machines) -> Result<()> {
    let case = "faults::small_pages_of_many_waves_are_right";
    guest(vm, machines, &[case], COMMAND).map(drop)
}

/// Waits until so many nodes are there.
fn wait_for_nodes(vm: &mut Vm, machines: &Machines, count: usize) -> Result<()> {
    let line = format!(
        "for look in $(seq 300); do \
             set -- /dev/farfault?; \
             if test $# = {count} -a -c $1; then exit 0; fi; \
             sleep 0.1; \
         done; ls /dev/farfault*; exit 1"
    );
    shell(vm, machines, &line, COMMAND)?.expect_success()?;
    Ok(())
}

fn plug(vm: &mut Vm, machines: &Machines, count: usize) -> Result<usize> {
    let gpu = vm.plug_gpu(&VRAM.to_string())?;
    wait_for_nodes(vm, machines, count)?;
    Ok(gpu)
}

fn hot_unplug_of_an_idle_device_and_plug_again_works(
    vm: &mut Vm,
    machines: &Machines,
) -> Result<()> {
    vm.unplug_gpu(0)?;
    let gone = "! ls /dev/farfault* /dev/hmm_dmirror* 2>/dev/null";
    shell(vm, machines, gone, COMMAND)?.expect_success()?;
    plug(vm, machines, 1)?;
    works(vm, machines)
}

fn number_of_an_unplugged_device_goes_to_the_next_one(
    vm: &mut Vm,
    machines: &Machines,
) -> Result<()> {
    let nodes = |vm: &mut Vm, expected: &str| -> Result<()> {
        let line = "cd /dev; stat -c '%a %n' farfault* hmm_dmirror?";
        let output = shell(vm, machines, line, COMMAND)?.expect_success()?;
        let is = output.stdout_text();
        let is = is.lines().collect::<Vec<_>>().join(", ");
        ensure!(is == expected, "nodes are {is}, and should be {expected}");
        Ok(())
    };
    let both = "666 farfault0, 666 farfault1, 600 hmm_dmirror0, 600 hmm_dmirror1";
    let other = plug(vm, machines, 2)?;
    nodes(vm, both)?;
    vm.unplug_gpu(0)?;
    nodes(vm, "666 farfault1, 600 hmm_dmirror1")?;
    plug(vm, machines, 2)?;
    nodes(vm, both)?;
    vm.unplug_gpu(other)?;
    nodes(vm, "666 farfault0, 600 hmm_dmirror0")?;
    works(vm, machines)
}

fn hot_unplug_with_open_descriptors_revokes_them_and_brings_pages_home(
    vm: &mut Vm,
    machines: &Machines,
) -> Result<()> {
    let process = start(vm, machines, LOSE_DRIVER, READY)?;
    vm.unplug_gpu(0)?;
    process.wait_for(DONE, machines.limit(COMMAND))?;
    plug(vm, machines, 1)?;
    go_on(process, machines, COMMAND)?;
    works(vm, machines)
}

fn hot_unplug_with_open_mirrors_revokes_them_and_brings_pages_home(
    vm: &mut Vm,
    machines: &Machines,
) -> Result<()> {
    let other = plug(vm, machines, 2)?;
    let process = start(vm, machines, LOSE_MIRROR, READY)?;
    vm.unplug_gpu(other)?;
    let output = go_on(process, machines, COMMAND)?;
    ensure!(output.stdout_text().contains(DONE));
    works(vm, machines)
}

/// The GPU is pulled while a program uses it all the time.
fn under_load(vm: &mut Vm, machines: &Machines, program: &str) -> Result<()> {
    let process = start(vm, machines, program, READY)?;
    vm.unplug_gpu(0)?;
    let output = process.wait(machines.limit(COMMAND))?;
    ensure_lost_gpu_and_right_data(&output)?;
    plug(vm, machines, 1)?;
    works(vm, machines)
}

fn hot_unplug_during_faults_ends_with_enodev_and_right_data(
    vm: &mut Vm,
    machines: &Machines,
) -> Result<()> {
    under_load(vm, machines, FAULT_FOR_EVER)
}

fn hot_unplug_during_migrations_ends_with_enodev_and_right_data(
    vm: &mut Vm,
    machines: &Machines,
) -> Result<()> {
    under_load(vm, machines, MIGRATE_FOR_EVER)
}

fn hot_unplug_during_evictions_ends_with_enodev_and_right_data(
    vm: &mut Vm,
    machines: &Machines,
) -> Result<()> {
    under_load(vm, machines, EVICT_FOR_EVER)
}

fn vm_reset_with_pages_resident_leaves_a_device_that_works(
    vm: &mut Vm,
    machines: &Machines,
) -> Result<()> {
    let _process = start(vm, machines, HOLD_OPEN, READY)?;
    let _faults = start(vm, machines, FAULT_FOR_EVER, READY)?;
    let _evictions = start(vm, machines, EVICT_FOR_EVER, READY)?;
    vm.reset()?;
    works(vm, machines)
}

fn reboot_with_pages_resident_leaves_a_device_that_works(
    vm: &mut Vm,
    machines: &Machines,
) -> Result<()> {
    let _process = start(vm, machines, HOLD_OPEN, READY)?;
    let _load = start(vm, machines, MIGRATE_FOR_EVER, READY)?;
    vm.reboot()?;
    works(vm, machines)
}
