// SPDX-License-Identifier: MIT OR Apache-2.0
//! Pages of VRAM fail: hardware manual, section 10.6. The host asks the device for it.

use super::{
    HostCase,
    inside::{command, ensure_nothing_left, go_on, guest, shell, start},
    machines::{After, Machines},
    sleep::rehearsal,
};
use anyhow::{Context, Result, ensure};
use farfault_tests::guest::{
    Machine, VRAM,
    ending::{KEEP_FAILED, ORPHAN_BEHIND_FAILED},
    holding::HOLD_MAPPED,
    programs::{
        CLOSED, DONE, EVICT_FOR_EVER, FAULT_FOR_EVER, HOLD_OPEN, LOSE_MEMORY, MIGRATE_FOR_EVER,
        READY,
    },
};
use std::{
    thread,
    time::{Duration, Instant},
};
use xtask::vm::{GuestProcess, Vm};

const COMMAND: Duration = Duration::from_secs(60);
/// For thousands of CPU faults, or a walk through all of VRAM, on a busy host.
const LONG: Duration = Duration::from_secs(300);
const PAGE: u64 = 4 << 10;
/// What VRAM is managed in.
const BLOCK: u64 = 2 << 20;
const SIGBUS: i32 = 7;
const SIGTERM: i32 = 15;

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
    Keep poisoned_page_kills_only_its_users_and_is_not_used_again,
    Keep pages_poisoned_under_load_are_not_used_again,
    Keep poisoned_pages_of_a_closed_descriptor_keep_no_others_in_vram,
    Keep pages_behind_a_poisoned_one_that_only_a_child_has_come_home_with_the_close,
    // The module stays loaded for the sake of lost pages.
    GiveUp unbind_with_poisoned_pages_ends_and_loses_no_others,
}

/// What debugfs says of pages.
fn pages(vm: &mut Vm, machines: &Machines, of: &str) -> Result<usize> {
    counted(vm, machines, &format!("vram_pages_{of}"))
}

/// A line of the driver's statistics.
fn counted(vm: &mut Vm, machines: &Machines, name: &str) -> Result<usize> {
    let line = format!("sed -n 's/^{name} //p' /sys/kernel/debug/farfault*/stats");
    let output = shell(vm, machines, &line, COMMAND)?.expect_success()?;
    Ok(output.stdout_text().trim().parse()?)
}

/// Pages that are used no more.
fn retired(vm: &mut Vm, machines: &Machines) -> Result<usize> {
    pages(vm, machines, "retired")
}

/// Waits until so many are used no more: the last who had them have ended.
fn wait_for_retired(vm: &mut Vm, machines: &Machines, pages: usize) -> Result<()> {
    let deadline = Instant::now() + machines.limit(COMMAND);
    loop {
        let retired = retired(vm, machines)?;
        if retired == pages {
            return Ok(());
        }
        ensure!(
            retired < pages && Instant::now() < deadline,
            "{retired} pages are retired, and should be {pages}"
        );
        thread::sleep(Duration::from_millis(50));
    }
}

fn poison(vm: &mut Vm, pages: &[u64]) -> Result<()> {
    for page in pages {
        vm.device(0)?.command(&["poison", &page.to_string()])?;
    }
    Ok(())
}

/// A case that uses all of VRAM, as huge and as small pages: a page that has failed would end a migration.
const ALL_OF_VRAM: &str = "eviction::request_for_more_than_vram_moves_what_fits";

fn ensure_rest_is_sound(vm: &mut Vm, machines: &Machines, retired_pages: usize) -> Result<()> {
    guest(vm, machines, &[ALL_OF_VRAM], LONG)?;
    ensure!(retired(vm, machines)? == retired_pages);
    Ok(())
}

/// A reset makes all pages sound, and none has been used.
fn bind_again(vm: &mut Vm, machines: &Machines) -> Result<()> {
    let again = "cd /sys/bus/virtio/drivers/farfault; gpu=$(echo virtio*); \
                 echo $gpu > unbind; echo $gpu > bind";
    shell(vm, machines, again, COMMAND)?.expect_success()?;
    ensure!(retired(vm, machines)? == 0);
    Ok(())
}

/// A process some of whose pages in VRAM have failed, and which.
fn with_failed(
    vm: &mut Vm,
    machines: &Machines,
    program: &str,
) -> Result<(GuestProcess, Vec<u64>)> {
    let process = start(vm, machines, program, READY)?;
    let said = process.stdout_so_far();
    let line = said.lines().find(|line| line.starts_with('['));
    let pages: Vec<u64> = serde_json::from_str(line.context("it names no pages")?)?;
    poison(vm, &pages)?;
    Ok((process, pages))
}

fn poisoned_page_kills_only_its_users_and_is_not_used_again(
    vm: &mut Vm,
    machines: &Machines,
) -> Result<()> {
    bind_again(vm, machines)?;
    // The processes that have the failed pages touch them before anybody else does.
    let (process, pages) = with_failed(vm, machines, LOSE_MEMORY)?;
    let output = go_on(process, machines, LONG)?;
    ensure!(output.stdout_text().contains(DONE));
    wait_for_retired(vm, machines, pages.len())?;
    bind_again(vm, machines)?;
    // The machine's sleep and the evictions of others do.
    let (process, mut pages) = with_failed(vm, machines, LOSE_MEMORY)?;
    let bystander = start(vm, machines, HOLD_OPEN, READY)?;
    // As they cannot go home, the machine cannot sleep, and all goes on.
    let slept = shell(vm, machines, &rehearsal("devices"), COMMAND)?;
    ensure!(!slept.success(), "the machine slept: {slept:?}");
    // Nor can they make room, and others have to: after what is sound beside them has gone, too.
    for round in 0..2 {
        let before = counted(vm, machines, "pages_evicted")?;
        guest(vm, machines, &[ALL_OF_VRAM], LONG)?;
        let evicted = counted(vm, machines, "pages_evicted")? - before;
        ensure!(evicted > 0, "round {round}: nobody made room");
    }
    for process in [process, bystander] {
        let output = go_on(process, machines, LONG)?;
        ensure!(output.stdout_text().contains(DONE));
    }
    wait_for_retired(vm, machines, pages.len())?;
    // One that has just become free, of the huge page around the second, and one that nobody has ever had.
    let nobodys = [pages[1] + PAGE, VRAM - PAGE];
    poison(vm, &nobodys)?;
    pages.extend(nobodys);
    wait_for_retired(vm, machines, pages.len())?;
    ensure_rest_is_sound(vm, machines, pages.len())?;
    bind_again(vm, machines)
}

/// Their users get SIGBUS or an error of a job, if they do not just go on: a page may be free when it fails.
fn pages_poisoned_under_load_are_not_used_again(vm: &mut Vm, machines: &Machines) -> Result<()> {
    bind_again(vm, machines)?;
    let bystander = vm.spawn(&command(machines, &[HOLD_MAPPED, "0"]))?;
    bystander.wait_for(READY, machines.limit(COMMAND))?;
    let load = [FAULT_FOR_EVER, MIGRATE_FOR_EVER, EVICT_FOR_EVER];
    let load = load.map(|program| vm.spawn(&command(machines, &[program])));
    let load = load.into_iter().collect::<xtask::Result<Vec<_>>>()?;
    thread::sleep(machines.limit(Duration::from_millis(500)));
    // In every block, each time another page of it.
    let pages: Vec<_> = (0..VRAM / BLOCK)
        .map(|block| block * BLOCK + block * 3 * PAGE)
        .collect();
    for page in &pages {
        poison(vm, &[*page])?;
        thread::sleep(Duration::from_millis(20));
    }
    for process in load {
        // Most have ended by themselves.
        process.signal(SIGTERM)?;
        let output = process.wait(machines.limit(LONG))?;
        let said = output.stderr_text();
        ensure!(!said.contains("should be"), "wrong data: {said}");
        let ended =
            [Some(SIGTERM), Some(SIGBUS)].contains(&output.signal) || said.contains("MemoryError");
        ensure!(ended, "{output:?}");
    }
    let output = go_on(bystander, machines, COMMAND)?;
    ensure!(output.stdout_text().contains(DONE));
    wait_for_retired(vm, machines, pages.len())?;
    ensure_rest_is_sound(vm, machines, pages.len())?;
    bind_again(vm, machines)
}

fn poisoned_pages_of_a_closed_descriptor_keep_no_others_in_vram(
    vm: &mut Vm,
    machines: &Machines,
) -> Result<()> {
    bind_again(vm, machines)?;
    let (process, failed) = with_failed(vm, machines, KEEP_FAILED)?;
    process.write_stdin(b"go\n")?;
    process.wait_for(CLOSED, machines.limit(COMMAND))?;
    for of in ["used", "in_folios"] {
        let left = pages(vm, machines, of)?;
        ensure!(left == failed.len(), "{left} pages are {of}");
    }
    let output = go_on(process, machines, LONG)?;
    ensure!(output.stdout_text().contains(DONE));
    wait_for_retired(vm, machines, failed.len())?;
    bind_again(vm, machines)
}

/// To mm it looks as if the huge page were there still that was where it is.
fn pages_behind_a_poisoned_one_that_only_a_child_has_come_home_with_the_close(
    vm: &mut Vm,
    machines: &Machines,
) -> Result<()> {
    bind_again(vm, machines)?;
    let (process, failed) = with_failed(vm, machines, ORPHAN_BEHIND_FAILED)?;
    wait_for_retired(vm, machines, failed.len())?;
    process.write_stdin(b"go\n")?;
    process.wait_for(CLOSED, machines.limit(COMMAND))?;
    let left = pages(vm, machines, "in_folios")?;
    ensure!(left == 0, "{left} pages are in VRAM");
    let output = go_on(process, machines, COMMAND)?;
    ensure!(output.stdout_text().contains(DONE));
    bind_again(vm, machines)
}

fn unbind_with_poisoned_pages_ends_and_loses_no_others(
    vm: &mut Vm,
    machines: &Machines,
) -> Result<()> {
    let (process, _) = with_failed(vm, machines, KEEP_FAILED)?;
    let begin = Instant::now();
    let line = "cd /sys/bus/virtio/drivers/farfault; gpu=$(echo virtio*); \
                echo $gpu > unbind; echo $gpu > bind; test -c /dev/farfault0";
    shell(vm, machines, line, LONG)?.expect_success()?;
    let (took, soon) = (begin.elapsed(), machines.limit(Duration::from_secs(15)));
    ensure!(took < soon, "it waited for what cannot come: {took:?}");
    for of in ["used", "in_folios", "retired"] {
        let pages = pages(vm, machines, of)?;
        ensure!(
            pages == 0,
            "{pages} pages are {of} in a GPU that is bound anew"
        );
    }
    process.write_stdin(b"go\n")?;
    process.wait_for(CLOSED, machines.limit(COMMAND))?;
    let output = go_on(process, machines, LONG)?;
    ensure!(output.stdout_text().contains(DONE));
    guest(vm, machines, &[ALL_OF_VRAM], LONG)?;
    ensure_nothing_left(vm, Machine::Small.gpus())
}
