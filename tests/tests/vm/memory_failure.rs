// SPDX-License-Identifier: MIT OR Apache-2.0
//! Pages of VRAM fail: hardware manual, section 10.6. The host asks the device for it.

use super::{
    HostCase,
    inside::{go_on, guest, shell, start},
    machines::{After, Machines},
};
use anyhow::{Context, Result, ensure};
use farfault_tests::guest::{
    Machine,
    programs::{DONE, LOSE_MEMORY, READY},
};
use std::{thread, time::Duration};
use xtask::vm::Vm;

const COMMAND: Duration = Duration::from_secs(60);
/// For thousands of CPU faults, or a walk through all of VRAM, on a busy host.
const LONG: Duration = Duration::from_secs(300);

pub(crate) const CASES: &[HostCase] = &[HostCase {
    name: "lifecycle::poisoned_page_kills_only_its_users_and_is_not_used_again",
    machine: Machine::Small,
    after: After::Keep,
    run: poisoned_page_kills_only_its_users_and_is_not_used_again,
}];

/// What debugfs says of pages that are used no more.
fn retired(vm: &mut Vm, machines: &Machines) -> Result<usize> {
    let line = "sed -n 's/^vram_pages_retired //p' /sys/kernel/debug/farfault*/stats";
    let output = shell(vm, machines, line, COMMAND)?.expect_success()?;
    Ok(output.stdout_text().trim().parse()?)
}

fn poisoned_page_kills_only_its_users_and_is_not_used_again(
    vm: &mut Vm,
    machines: &Machines,
) -> Result<()> {
    ensure!(retired(vm, machines)? == 0);
    let process = start(vm, machines, LOSE_MEMORY, READY)?;
    let said = process.stdout_so_far();
    let line = said.lines().find(|line| line.starts_with('['));
    let pages: Vec<u64> = serde_json::from_str(line.context("it names no pages")?)?;
    for page in &pages {
        vm.device(0)?.command(&["poison", &page.to_string()])?;
    }
    // As they cannot go home, the machine cannot sleep, and all goes on.
    let sleep = "echo devices > /sys/power/pm_test; ! echo mem > /sys/power/state; \
                 echo none > /sys/power/pm_test";
    shell(vm, machines, sleep, COMMAND)?.expect_success()?;
    let output = go_on(process, machines, LONG)?;
    ensure!(output.stdout_text().contains(DONE));
    // The process has ended, and with it the last who had the pages.
    let deadline = machines.limit(COMMAND);
    let mut waited = Duration::ZERO;
    while retired(vm, machines)? != pages.len() {
        ensure!(
            waited < deadline,
            "{} pages are retired",
            retired(vm, machines)?
        );
        thread::sleep(Duration::from_millis(50));
        waited += Duration::from_millis(50);
    }
    // All the rest of VRAM goes round: a page that had failed would end a job, or a migration.
    guest(
        vm,
        machines,
        &["eviction::small_pages_of_twice_the_vram_make_the_round_trip"],
        LONG,
    )?;
    ensure!(retired(vm, machines)? == pages.len());
    // A reset makes them sound.
    let again = "cd /sys/bus/virtio/drivers/farfault; gpu=$(echo virtio*); \
                 echo $gpu > unbind; echo $gpu > bind";
    shell(vm, machines, again, COMMAND)?.expect_success()?;
    ensure!(retired(vm, machines)? == 0);
    Ok(())
}
