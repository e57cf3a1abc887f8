// SPDX-License-Identifier: MIT OR Apache-2.0
//! A GPU's process stops, for a moment or for longer than the driver waits, or is killed, while a process of the
//! guest is at each of the stages of `farfault_tests::guest::stages`.
//!
//! The process is made to wait for the device first, so that it is where it should be. Beside it another process
//! has pages in the VRAM of another GPU, and must not notice anything.
//!
//! A GPU that was killed is not used again: the next case takes another one of the same VM. Nothing may read the
//! configuration space of a dead one, which ends QEMU; so no driver is bound to it again.

use super::{
    HostCase,
    inside::{command, go_on, guest, shell, start},
    machines::{After, Machines},
};
use anyhow::{Context, Result, ensure};
use farfault_tests::guest::{
    DYING_LIMIT, Machine,
    programs::{DONE, HOLD_OPEN, READY},
    stages::{ACTING, AT_STAGE, COUNT_IN_RAM, FINE, HOLD_RAM, LOST, Stage, WAIT_FOR_SECOND},
    waiting::{ROUNDS, WAIT_IN_CROWDS, WAIT_IN_PAIRS},
};
use std::{
    thread,
    time::{Duration, Instant},
};
use xtask::vm::{GuestProcess, Vm};

const COMMAND: Duration = Duration::from_secs(60);
const SIGBUS: i32 = 7;
const SIGKILL: i32 = 9;
/// Long enough for the process to begin what it was told to do.
pub(crate) const MOMENT: Duration = Duration::from_millis(300);
/// What the driver says of a GPU that does not answer.
pub(crate) const LOSS: &str = "the device is lost";

macro_rules! cases {
    ($($after:ident $name:ident: $end:expr, $stage:expr;)*) => {
        pub(crate) const CASES: &[HostCase] = &[
            $(HostCase {
                name: concat!("lifecycle::", stringify!($name)),
                machine: Machine::Dying,
                after: After::$after,
                run: |vm, machines| lost_at(vm, machines, $end, $stage),
            },)*
            HostCase {
                name: "lifecycle::device_stopped_for_a_moment_at_each_stage_goes_on_as_if_nothing_had_been",
                machine: Machine::Dying,
                after: After::Keep,
                run: stopped_for_a_moment,
            },
            HostCase {
                name: "lifecycle::device_that_is_slow_wakes_all_who_wait_for_it",
                machine: Machine::Dying,
                after: After::Keep,
                run: slow,
            },
            HostCase {
                name: "lifecycle::device_stopped_while_its_queues_fill_up_answers_all_when_it_goes_on",
                machine: Machine::TwoGpus,
                after: After::Keep,
                run: crowded,
            },
            HostCase {
                name: "lifecycle::open_of_a_stopped_device_holds_nobody_up",
                machine: Machine::Dying,
                after: After::Keep,
                run: open_holds_nobody_up,
            },
            HostCase {
                name: "lifecycle::eviction_passes_an_owner_by_that_waits_for_another_device",
                machine: Machine::TwoGpus,
                after: After::Keep,
                run: eviction_passes_by,
            },
            HostCase {
                name: "lifecycle::process_that_waits_for_a_stopped_device_can_be_killed",
                machine: Machine::Dying,
                after: After::Keep,
                run: killed_while_it_waits,
            },
            HostCase {
                name: "lifecycle::device_stopped_during_a_job_in_ram_leaves_the_ram_alone_when_it_goes_on",
                machine: Machine::Dying,
                after: After::Keep,
                run: leaves_ram_alone,
            },
            HostCase {
                name: "lifecycle::module_with_a_killed_device_unloads",
                machine: Machine::Dying,
                after: After::GiveUp,
                run: module_unloads,
            },
        ];
    };
}

cases! {
    Keep device_stopped_while_idle_is_lost: End::Stopped, Stage::Idle;
    Keep device_stopped_during_faults_is_lost: End::Stopped, Stage::Faults;
    Keep device_stopped_during_a_migration_to_vram_is_lost: End::Stopped, Stage::MigrationUp;
    Keep device_stopped_during_a_migration_home_is_lost: End::Stopped, Stage::MigrationHome;
    Keep device_stopped_during_a_cpu_fault_is_lost: End::Stopped, Stage::CpuFault;
    Keep device_stopped_during_an_invalidation_is_lost: End::Stopped, Stage::Invalidation;
    Keep device_stopped_during_an_eviction_is_lost: End::Stopped, Stage::Eviction;
    Keep device_stopped_during_open_and_close_is_lost: End::Stopped, Stage::OpenClose;
    Keep device_killed_while_idle_is_lost: End::Killed, Stage::Idle;
    Keep device_killed_during_faults_is_lost: End::Killed, Stage::Faults;
    Keep device_killed_during_a_migration_to_vram_is_lost: End::Killed, Stage::MigrationUp;
    GiveUp device_killed_during_a_migration_home_is_lost: End::Killed, Stage::MigrationHome;
    Keep device_killed_during_a_cpu_fault_is_lost: End::Killed, Stage::CpuFault;
    Keep device_killed_during_an_invalidation_is_lost: End::Killed, Stage::Invalidation;
    Keep device_killed_during_an_eviction_is_lost: End::Killed, Stage::Eviction;
    Keep device_killed_during_open_and_close_is_lost: End::Killed, Stage::OpenClose;
}

/// What becomes of the device once somebody waits for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// It stays stopped for longer than the driver waits; when all is over it goes on.
    Stopped,
    Killed,
    /// It goes on in time.
    Moment,
}

/// The last GPU that is alive. The first one is somebody else's.
pub(crate) fn victim(vm: &mut Vm) -> Result<usize> {
    for gpu in (1..Machine::Dying.gpus()).rev() {
        if vm.device(gpu)?.is_alive()? {
            return Ok(gpu);
        }
    }
    anyhow::bail!("no GPU is left to die")
}

/// A process at a stage of using a GPU, which waits for the device when this returns.
fn waiting(vm: &mut Vm, machines: &Machines, gpu: usize, stage: Stage) -> Result<GuestProcess> {
    let limit = machines.limit(COMMAND);
    let arguments = [AT_STAGE, &stage.name(), &gpu.to_string()];
    let process = vm.spawn(&command(machines, &arguments))?;
    process.wait_for(READY, limit)?;
    // In the middle of faults, and before anything else.
    if stage == Stage::Faults {
        process.write_stdin(b"go\n")?;
        process.wait_for(ACTING, limit)?;
        thread::sleep(machines.limit(MOMENT) / 2);
        vm.stop_device(gpu)?;
    } else {
        vm.stop_device(gpu)?;
        process.write_stdin(b"go\n")?;
        process.wait_for(ACTING, limit)?;
    }
    thread::sleep(machines.limit(MOMENT));
    Ok(process)
}

fn lost_at(vm: &mut Vm, machines: &Machines, end: End, stage: Stage) -> Result<()> {
    let bystander = start(vm, machines, HOLD_OPEN, READY)?;
    let gpu = victim(vm)?;
    let console = vm.console()?.len();
    let process = waiting(vm, machines, gpu, stage)?;
    if end == End::Killed {
        vm.kill_device(gpu)?;
    }
    let limit = machines.limit(COMMAND);
    // A process that waits for a page in VRAM never gets so far.
    if stage != Stage::CpuFault {
        process.wait_for(LOST, limit)?;
        process.write_stdin(b"go\n")?;
    }
    let output = process.wait(limit)?;
    ensure!(output.signal == Some(SIGBUS), "it ended so: {output:?}");
    if end == End::Stopped {
        // It still does what it was asked to: the RAM for that is nobody else's meanwhile.
        let other = start(vm, machines, HOLD_RAM, READY)?;
        vm.continue_device(gpu)?;
        thread::sleep(machines.limit(MOMENT));
        let output = go_on(other, machines, COMMAND)?;
        ensure!(output.stdout_text().contains(DONE), "{output:?}");
    }
    let said = vm.console()?;
    ensure_one_error(said.get(console..).context("the console shrank")?)?;
    let output = go_on(bystander, machines, COMMAND)?;
    ensure!(output.stdout_text().contains(DONE));
    if end == End::Stopped {
        bind_again(vm, machines, gpu)?;
        fine_at(vm, machines, gpu, Stage::Idle)?;
    }
    Ok(())
}

/// The driver says once that the device is lost, and nothing else that is an error.
fn ensure_one_error(console: &str) -> Result<()> {
    let of_driver =
        |line: &&str| line.contains("farfault") && !line.contains("farfault-guest-tests:");
    let lines: Vec<_> = console.lines().filter(of_driver).collect();
    ensure!(
        lines.len() == 1 && lines.iter().all(|line| line.contains(LOSS)),
        "the driver should say once that {LOSS}:\n{}",
        lines.join("\n")
    );
    Ok(())
}

/// A device that went on can be used by a driver that is bound again.
fn bind_again(vm: &mut Vm, machines: &Machines, gpu: usize) -> Result<()> {
    // Both are numbered in the order of the slots.
    let line = format!(
        "cd /sys/bus/virtio/drivers/farfault; name=$(ls -d virtio* | sed -n {}p); \
         echo $name > unbind; echo $name > bind; test -c /dev/farfault{gpu}",
        gpu + 1
    );
    shell(vm, machines, &line, COMMAND)?.expect_success()?;
    Ok(())
}

/// A process at a stage of using a GPU that stops for a moment goes on.
pub(crate) fn fine_at(vm: &mut Vm, machines: &Machines, gpu: usize, stage: Stage) -> Result<()> {
    let process = waiting(vm, machines, gpu, stage)?;
    vm.continue_device(gpu)?;
    let limit = machines.limit(COMMAND);
    process.wait_for(FINE, limit)?;
    process.write_stdin(b"go\n")?;
    process.wait(limit)?.expect_success()?;
    Ok(())
}

fn stopped_for_a_moment(vm: &mut Vm, machines: &Machines) -> Result<()> {
    let gpu = victim(vm)?;
    let console = vm.console()?.len();
    for stage in Stage::ALL {
        fine_at(vm, machines, gpu, stage)
            .with_context(|| format!("{stage:?}, {:?}", End::Moment))?;
    }
    let said = vm.console()?;
    let said = said.get(console..).context("the console shrank")?;
    ensure!(!said.contains(LOSS), "{said}");
    Ok(())
}

/// It does a little, hardly more than a request, and stands still for a while, and so on: requests take so long that
/// several wait at a time, and some for longer than others.
fn slow(vm: &mut Vm, machines: &Machines) -> Result<()> {
    const WORKS_MICROSECONDS: [u64; 3] = [0, 30, 100];
    const STANDS: Duration = Duration::from_millis(1);
    let gpu = victim(vm)?;
    let console = vm.console()?.len();
    let process = vm.spawn(&command(machines, &[WAIT_IN_PAIRS, &gpu.to_string()]))?;
    process.wait_for(READY, machines.limit(COMMAND))?;
    let end = Instant::now() + machines.limit(COMMAND);
    for works in WORKS_MICROSECONDS.into_iter().cycle() {
        if process.stdout_so_far().contains(ROUNDS) {
            break;
        }
        ensure!(
            Instant::now() < end,
            "the rounds took too long: {}",
            process.stdout_so_far()
        );
        vm.stop_device(gpu)?;
        thread::sleep(STANDS);
        vm.continue_device(gpu)?;
        if works != 0 {
            thread::sleep(Duration::from_micros(works));
        }
    }
    let output = go_on(process, machines, COMMAND)?;
    ensure!(output.stdout_text().contains(DONE), "{output:?}");
    let said = vm.console()?;
    let said = said.get(console..).context("the console shrank")?;
    ensure!(!said.contains(LOSS), "{said}");
    Ok(())
}

/// Whoever finds no room waits for it, as others do for their answers.
fn crowded(vm: &mut Vm, machines: &Machines) -> Result<()> {
    const GPU: usize = 1;
    let limit = machines.limit(COMMAND);
    let console = vm.console()?.len();
    let process = vm.spawn(&command(machines, &[WAIT_IN_CROWDS, &GPU.to_string()]))?;
    process.wait_for(READY, limit)?;
    vm.stop_device(GPU)?;
    process.write_stdin(b"go\n")?;
    process.wait_for(ACTING, limit)?;
    thread::sleep(machines.limit(10 * MOMENT));
    vm.continue_device(GPU)?;
    let output = process.wait(limit)?.expect_success()?;
    ensure!(output.stdout_text().contains(DONE), "{output:?}");
    let said = vm.console()?;
    let said = said.get(console..).context("the console shrank")?;
    ensure!(!said.contains(LOSS), "{said}");
    Ok(())
}

/// It ends when the driver gives the device up, at the latest.
fn killed_while_it_waits(vm: &mut Vm, machines: &Machines) -> Result<()> {
    for stage in [Stage::MigrationUp, Stage::CpuFault, Stage::Invalidation] {
        let gpu = victim(vm)?;
        let process = waiting(vm, machines, gpu, stage)?;
        process.signal(SIGKILL)?;
        let limit = Duration::from_secs(u64::from(3 * DYING_LIMIT));
        let output = process
            .wait(machines.limit(limit))
            .with_context(|| stage.name())?;
        ensure!(output.signal == Some(SIGKILL), "{stage:?}: {output:?}");
        vm.continue_device(gpu)?;
        bind_again(vm, machines, gpu)?;
    }
    Ok(())
}

/// Opens of all misc devices go through one mutex of the kernel.
fn open_holds_nobody_up(vm: &mut Vm, machines: &Machines) -> Result<()> {
    let gpu = victim(vm)?;
    vm.stop_device(gpu)?;
    let open = vm.spawn(&["sh", "-c", &format!("exec 3<>/dev/farfault{gpu}; sleep 1")])?;
    thread::sleep(machines.limit(MOMENT));
    let begin = Instant::now();
    guest(vm, machines, &["smoke::ping_is_answered"], COMMAND)?;
    let took = begin.elapsed();
    vm.continue_device(gpu)?;
    open.wait(machines.limit(COMMAND))?;
    let limit = machines.limit(Duration::from_secs(u64::from(DYING_LIMIT)) / 2);
    ensure!(took < limit, "another GPU was opened after {took:?}");
    Ok(())
}

/// Who needs room on one GPU does not wait as long as the owner of what is there does for the other.
fn eviction_passes_by(vm: &mut Vm, machines: &Machines) -> Result<()> {
    let limit = machines.limit(COMMAND);
    let owner = start(vm, machines, WAIT_FOR_SECOND, READY)?;
    vm.stop_device(1)?;
    owner.write_stdin(b"go\n")?;
    owner.wait_for(ACTING, limit)?;
    thread::sleep(machines.limit(MOMENT));
    // Shorter than the driver waits for the device that stands still.
    let soon = machines.limit(Duration::from_secs(12));
    let arguments = [AT_STAGE, &Stage::Eviction.name(), "0"];
    let process = vm.spawn(&command(machines, &arguments))?;
    process.write_stdin(b"go\n")?;
    let passed = process.wait_for(FINE, soon);
    vm.continue_device(1)?;
    passed?;
    process.write_stdin(b"go\n")?;
    process.wait(limit)?.expect_success()?;
    owner.wait_for(FINE, limit)?;
    owner.wait(limit)?.expect_success()?;
    Ok(())
}

/// Nothing can be told to a device that stands still, but it finds a word when it goes on.
fn leaves_ram_alone(vm: &mut Vm, machines: &Machines) -> Result<()> {
    let gpu = victim(vm)?;
    let limit = machines.limit(COMMAND);
    let process = vm.spawn(&command(machines, &[COUNT_IN_RAM, &gpu.to_string()]))?;
    process.wait_for(READY, limit)?;
    // The program has looked at the word, which is the GPU's again soon.
    thread::sleep(machines.limit(MOMENT));
    vm.stop_device(gpu)?;
    process.write_stdin(b"go\n")?;
    let lost = process.wait_for(LOST, limit);
    vm.continue_device(gpu)?;
    lost?;
    thread::sleep(machines.limit(MOMENT));
    let output = go_on(process, machines, COMMAND)?;
    ensure!(output.stdout_text().contains(DONE), "{output:?}");
    bind_again(vm, machines, gpu)?;
    fine_at(vm, machines, gpu, Stage::Idle)
}

/// With its pages in VRAM, until their process has ended; then for good.
fn module_unloads(vm: &mut Vm, machines: &Machines) -> Result<()> {
    lost_at(vm, machines, End::Killed, Stage::MigrationHome)?;
    let line = "rmmod farfault; test ! -e /dev/farfault0";
    shell(vm, machines, line, COMMAND)?.expect_success()?;
    Ok(())
}
