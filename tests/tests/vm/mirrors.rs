// SPDX-License-Identifier: MIT OR Apache-2.0
//! The nodes `/dev/hmm_dmirrorN` come and go with the driver's parameter, the module and the GPUs.

use super::{
    HostCase,
    inside::{go_on, guest, shell, start},
    machines::{After, Machines},
};
use anyhow::{Result, ensure};
use farfault_tests::guest::{
    Machine,
    programs::{DONE, HOLD_MIRRORS, LOSE_MIRROR, READY},
};
use std::time::Duration;
use xtask::vm::Vm;

const COMMAND: Duration = Duration::from_secs(60);
const MODULE: &str = "/lib/modules/farfault.ko";

pub(crate) const CASES: &[HostCase] = &[
    HostCase {
        name: "mirrors::driver_without_the_parameter_has_no_nodes",
        machine: Machine::Small,
        after: After::Keep,
        run: driver_without_the_parameter_has_no_nodes,
    },
    HostCase {
        name: "mirrors::rmmod_waits_for_open_nodes_and_takes_the_others",
        machine: Machine::Mirrors,
        after: After::Keep,
        run: rmmod_waits_for_open_nodes_and_takes_the_others,
    },
    HostCase {
        name: "mirrors::unbind_of_one_gpu_revokes_its_node_and_no_other",
        machine: Machine::Mirrors,
        after: After::Keep,
        run: unbind_of_one_gpu_revokes_its_node_and_no_other,
    },
];

fn succeeds(vm: &mut Vm, machines: &Machines, line: &str) -> Result<String> {
    let output = shell(vm, machines, line, COMMAND)?.expect_success()?;
    Ok(output.stdout_text())
}

fn nodes(vm: &mut Vm, machines: &Machines) -> Result<Vec<String>> {
    let list = succeeds(
        vm,
        machines,
        "cd /dev; for node in hmm_dmirror*; do ! test -c $node || echo $node; done",
    )?;
    Ok(list.lines().map(str::to_owned).collect())
}

fn ensure_works(vm: &mut Vm, machines: &Machines) -> Result<()> {
    for case in [
        "dmirror::nodes_of_two_gpus_are_there_for_their_owner_only",
        "dmirror::write_and_read_copy_and_count_faults",
    ] {
        guest(vm, machines, &[case], COMMAND)?;
    }
    Ok(())
}

fn driver_without_the_parameter_has_no_nodes(vm: &mut Vm, machines: &Machines) -> Result<()> {
    let nodes = nodes(vm, machines)?;
    ensure!(nodes.is_empty(), "{nodes:?}");
    Ok(())
}

fn rmmod_waits_for_open_nodes_and_takes_the_others(vm: &mut Vm, machines: &Machines) -> Result<()> {
    let process = start(vm, machines, HOLD_MIRRORS, READY)?;
    let rmmod = shell(vm, machines, "rmmod farfault", COMMAND)?;
    ensure!(!rmmod.success(), "the module went away under an open node");
    let output = go_on(process, machines, COMMAND)?;
    ensure!(output.stdout_text().contains(DONE));
    for (parameter, expected) in [("", 0), ("dmirror=0", 0), ("dmirror=1", 2)] {
        succeeds(vm, machines, "rmmod farfault")?;
        let left = nodes(vm, machines)?;
        ensure!(left.is_empty(), "without the module there is {left:?}");
        succeeds(vm, machines, &format!("insmod {MODULE} {parameter}"))?;
        let nodes = nodes(vm, machines)?;
        ensure!(nodes.len() == expected, "`{parameter}` gives {nodes:?}");
    }
    ensure_works(vm, machines)
}

fn unbind_of_one_gpu_revokes_its_node_and_no_other(vm: &mut Vm, machines: &Machines) -> Result<()> {
    let process = start(vm, machines, LOSE_MIRROR, READY)?;
    // GPUs are bound one after the other: the first of them has a node.
    let line = "cd /sys/bus/virtio/drivers/farfault; set -- virtio*; echo $1 > unbind; echo $1";
    let gpu = succeeds(vm, machines, line)?;
    let output = go_on(process, machines, COMMAND)?;
    ensure!(output.stdout_text().contains(DONE));
    let left = nodes(vm, machines)?;
    ensure!(left.len() == 1, "{left:?}");
    let bind = format!(
        "echo {} > /sys/bus/virtio/drivers/farfault/bind",
        gpu.trim()
    );
    succeeds(vm, machines, &bind)?;
    ensure_works(vm, machines)
}
