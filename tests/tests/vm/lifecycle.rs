// SPDX-License-Identifier: MIT OR Apache-2.0
//! The driver comes and goes while processes have pages in VRAM and descriptors open. Each case
//! leaves it loaded and bound.

use super::{
    HostCase,
    inside::{command, ensure_lost_gpu_and_right_data, go_on, guest, shell, start},
    machines::{After, Machines},
};
use anyhow::{Context, Result, ensure};
use farfault_tests::guest::{
    Machine, VRAM,
    leaving::LEAVE_FOR_EVER,
    programs::{
        DONE, EVICT_FOR_EVER, FAULT_FOR_EVER, HOLD_CLOSED, HOLD_OPEN, KILL_FOR_EVER, LOSE_DRIVER,
        MIGRATE_FOR_EVER, READY,
    },
};
use std::time::Duration;
use xtask::vm::Vm;

const COMMAND: Duration = Duration::from_secs(60);
/// For programs that take the GPU from each other.
const LOADED: Duration = Duration::from_secs(240);
pub(crate) const MODULE: &str = "/lib/modules/farfault.ko";

pub(crate) const CASES: &[HostCase] = &[
    HostCase {
        name: "lifecycle::rmmod_with_an_open_descriptor_fails_and_harms_nothing",
        machine: Machine::Small,
        after: After::Keep,
        run: rmmod_with_an_open_descriptor_fails_and_harms_nothing,
    },
    HostCase {
        name: "lifecycle::rmmod_after_the_last_close_leaves_all_data",
        machine: Machine::Small,
        after: After::Keep,
        run: rmmod_after_the_last_close_leaves_all_data,
    },
    HostCase {
        name: "lifecycle::rmmod_while_pages_come_home_in_every_way_leaves_all_data",
        machine: Machine::Small,
        after: After::Keep,
        run: rmmod_while_pages_come_home_in_every_way_leaves_all_data,
    },
    HostCase {
        name: "lifecycle::unbind_with_an_open_descriptor_revokes_it_and_brings_pages_home",
        machine: Machine::Small,
        after: After::Keep,
        run: unbind_with_an_open_descriptor_revokes_it_and_brings_pages_home,
    },
    HostCase {
        name: "lifecycle::unbind_under_load_ends_in_time",
        machine: Machine::Small,
        after: After::Keep,
        run: unbind_under_load_ends_in_time,
    },
    HostCase {
        name: "lifecycle::unbind_and_bind_50_times_works",
        machine: Machine::Small,
        after: After::Keep,
        run: unbind_and_bind_50_times_works,
    },
    HostCase {
        name: "lifecycle::memory_range_and_statistics_come_and_go_with_the_driver",
        machine: Machine::Small,
        after: After::Keep,
        run: memory_range_and_statistics_come_and_go_with_the_driver,
    },
    HostCase {
        name: "lifecycle::stores_to_vram_that_nobody_had_before_are_kept",
        machine: Machine::Small,
        after: After::Keep,
        run: stores_to_vram_that_nobody_had_before_are_kept,
    },
    HostCase {
        name: "lifecycle::module_loaded_and_unloaded_50_times_works",
        machine: Machine::Small,
        after: After::Keep,
        run: module_loaded_and_unloaded_50_times_works,
    },
    HostCase {
        name: "lifecycle::block_that_has_only_just_come_is_not_sent_away",
        machine: Machine::Small,
        after: After::Keep,
        run: block_that_has_only_just_come_is_not_sent_away,
    },
];

fn works(vm: &mut Vm, machines: &Machines) -> Result<()> {
    let case = "faults::small_pages_of_many_waves_are_right";
    guest(vm, machines, &[case], COMMAND).map(drop)
}

fn succeeds(vm: &mut Vm, machines: &Machines, line: &str, limit: Duration) -> Result<String> {
    let output = shell(vm, machines, line, limit)?.expect_success()?;
    Ok(output.stdout_text())
}

/// Unbinds the GPU; the name by which it is bound again.
fn unbind(vm: &mut Vm, machines: &Machines) -> Result<String> {
    let line = "cd /sys/bus/virtio/drivers/farfault; gpu=$(echo virtio*); \
                echo $gpu > unbind; echo $gpu";
    Ok(succeeds(vm, machines, line, COMMAND)?.trim().to_owned())
}

fn bind(vm: &mut Vm, machines: &Machines, gpu: &str) -> Result<()> {
    let line = format!("echo {gpu} > /sys/bus/virtio/drivers/farfault/bind; ls /dev/farfault*");
    succeeds(vm, machines, &line, COMMAND).map(drop)
}

fn rmmod_with_an_open_descriptor_fails_and_harms_nothing(
    vm: &mut Vm,
    machines: &Machines,
) -> Result<()> {
    let process = start(vm, machines, HOLD_OPEN, READY)?;
    let rmmod = shell(vm, machines, "rmmod farfault", COMMAND)?;
    ensure!(
        !rmmod.success(),
        "the module went away under an open descriptor"
    );
    let output = go_on(process, machines, COMMAND)?;
    ensure!(output.stdout_text().contains(DONE));
    works(vm, machines)
}

fn rmmod_after_the_last_close_leaves_all_data(vm: &mut Vm, machines: &Machines) -> Result<()> {
    let process = start(vm, machines, HOLD_CLOSED, READY)?;
    succeeds(
        vm,
        machines,
        "rmmod farfault; test ! -e /dev/farfault0",
        COMMAND,
    )?;
    let output = go_on(process, machines, COMMAND)?;
    ensure!(output.stdout_text().contains(DONE));
    let load = format!("insmod {MODULE}; test -c /dev/farfault0");
    succeeds(vm, machines, &load, COMMAND)?;
    works(vm, machines)
}

/// The module goes at the first moment at which nobody has it open.
fn rmmod_while_pages_come_home_in_every_way_leaves_all_data(
    vm: &mut Vm,
    machines: &Machines,
) -> Result<()> {
    let process = start(vm, machines, LEAVE_FOR_EVER, READY)?;
    let line = format!(
        "for round in $(seq 5); do \
           while ! rmmod farfault 2>/dev/null; do :; done; \
           test ! -e /dev/farfault0; \
           insmod {MODULE}; test -c /dev/farfault0; \
           sleep 0.2; \
         done"
    );
    succeeds(vm, machines, &line, COMMAND)?;
    let output = go_on(process, machines, COMMAND)?;
    ensure!(output.stdout_text().contains(DONE));
    works(vm, machines)
}

fn unbind_with_an_open_descriptor_revokes_it_and_brings_pages_home(
    vm: &mut Vm,
    machines: &Machines,
) -> Result<()> {
    let process = start(vm, machines, LOSE_DRIVER, READY)?;
    let gpu = unbind(vm, machines)?;
    process.wait_for(DONE, machines.limit(COMMAND))?;
    bind(vm, machines, &gpu)?;
    go_on(process, machines, COMMAND)?;
    works(vm, machines)
}

fn unbind_under_load_ends_in_time(vm: &mut Vm, machines: &Machines) -> Result<()> {
    for _ in 0..2 {
        let load = [
            FAULT_FOR_EVER,
            MIGRATE_FOR_EVER,
            EVICT_FOR_EVER,
            KILL_FOR_EVER,
        ];
        let processes = load
            .map(|program| vm.spawn(&command(machines, &[program])))
            .into_iter()
            .collect::<xtask::Result<Vec<_>>>()?;
        for process in &processes {
            process.wait_for(READY, machines.limit(LOADED))?;
        }
        let gpu = unbind(vm, machines)?;
        for process in processes {
            let output = process.wait(machines.limit(LOADED))?;
            ensure_lost_gpu_and_right_data(&output)?;
        }
        bind(vm, machines, &gpu)?;
    }
    works(vm, machines)
}

/// mm knows the pages anew.
fn stores_to_vram_that_nobody_had_before_are_kept(vm: &mut Vm, machines: &Machines) -> Result<()> {
    let gpu = unbind(vm, machines)?;
    bind(vm, machines, &gpu)?;
    let case = "mm::madvise::free_then_written_by_the_gpu_in_vram_is_kept_in_ram";
    guest(vm, machines, &[case], COMMAND).map(drop)
}

/// The GPU's physical addresses, debugfs and nodes, each so often.
fn ensure_shows(vm: &mut Vm, machines: &Machines, times: usize) -> Result<()> {
    let line = "grep -c ' : farfault$' /proc/iomem || :; \
                ls -d /sys/kernel/debug/farfault* 2>/dev/null | wc -l; \
                ls /dev/farfault* 2>/dev/null | wc -l";
    let shows = succeeds(vm, machines, line, COMMAND)?;
    let expected = times.to_string();
    ensure!(
        shows.lines().count() == 3 && shows.lines().all(|count| count.trim() == expected),
        "not {times} in iomem, debugfs, dev:\n{shows}"
    );
    Ok(())
}

/// Nothing has been counted since the driver was bound.
fn ensure_counts_nothing(vm: &mut Vm, machines: &Machines) -> Result<()> {
    let stats = succeeds(
        vm,
        machines,
        "cat /sys/kernel/debug/farfault0/stats",
        COMMAND,
    )?;
    let pages = VRAM / 4096;
    for line in stats.lines() {
        let (name, value) = line.split_once(' ').context("a line without a value")?;
        let expected = match name {
            "vram_pages" => pages,
            "vram_blocks" => pages / 512,
            _ => 0,
        };
        ensure!(value.parse() == Ok(expected), "{name} is {value}:\n{stats}");
    }
    Ok(())
}

fn memory_range_and_statistics_come_and_go_with_the_driver(
    vm: &mut Vm,
    machines: &Machines,
) -> Result<()> {
    for _ in 0..2 {
        works(vm, machines)?;
        ensure_shows(vm, machines, 1)?;
        let gpu = unbind(vm, machines)?;
        ensure_shows(vm, machines, 0)?;
        bind(vm, machines, &gpu)?;
        ensure_shows(vm, machines, 1)?;
        ensure_counts_nothing(vm, machines)?;
        works(vm, machines)?;
        succeeds(vm, machines, "rmmod farfault", COMMAND)?;
        ensure_shows(vm, machines, 0)?;
        succeeds(vm, machines, &format!("insmod {MODULE}"), COMMAND)?;
        ensure_shows(vm, machines, 1)?;
        ensure_counts_nothing(vm, machines)?;
    }
    works(vm, machines)
}

fn unbind_and_bind_50_times_works(vm: &mut Vm, machines: &Machines) -> Result<()> {
    let line = format!(
        "cd /sys/bus/virtio/drivers/farfault; gpu=$(echo virtio*); \
         for round in $(seq 50); do \
           echo $gpu > unbind; test ! -e /dev/farfault0; \
           echo $gpu > bind; test -c /dev/farfault0; \
           test $((round % 10)) != 0 || {} smoke::ping_is_answered; \
         done",
        farfault_tests::guest::PROGRAM
    );
    succeeds(vm, machines, &line, Duration::from_secs(240))?;
    works(vm, machines)
}

fn module_loaded_and_unloaded_50_times_works(vm: &mut Vm, machines: &Machines) -> Result<()> {
    let line = format!(
        "for round in $(seq 50); do \
           rmmod farfault; test ! -e /dev/farfault0; \
           insmod {MODULE}; test -c /dev/farfault0; \
           test $((round % 10)) != 0 || {} smoke::ping_is_answered; \
         done",
        farfault_tests::guest::PROGRAM
    );
    succeeds(vm, machines, &line, Duration::from_secs(240))?;
    works(vm, machines)
}

/// Loads the driver anew, has more pages asked to VRAM than there is, and counts those that went again for
/// it.
fn evicted(vm: &mut Vm, machines: &Machines, case: &str, parameter: &str) -> Result<u64> {
    let load = format!("rmmod farfault; insmod {MODULE} {parameter}; test -c /dev/farfault0");
    succeeds(vm, machines, &load, COMMAND)?;
    guest(vm, machines, &[case], Duration::from_secs(240))?;
    let line = "sed -n 's/^pages_evicted //p' /sys/kernel/debug/farfault*/stats";
    Ok(succeeds(vm, machines, line, COMMAND)?.trim().parse()?)
}

fn block_that_has_only_just_come_is_not_sent_away(vm: &mut Vm, machines: &Machines) -> Result<()> {
    for case in [
        "eviction::request_for_more_than_vram_moves_what_fits",
        "eviction::requests_for_a_few_pages_each_of_more_than_vram_move_what_fits",
        "home::huge_pages_of_more_than_vram_stay_whole",
    ] {
        let minute = evicted(vm, machines, case, "least_stay=60000")?;
        ensure!(minute == 0, "{case}: {minute} pages went within a minute");
        // What found no room is used in RAM.
        works(vm, machines)?;
        let usual = evicted(vm, machines, case, "")?;
        ensure!(usual > 0, "{case}: without a limit that long nothing went");
    }
    Ok(())
}
