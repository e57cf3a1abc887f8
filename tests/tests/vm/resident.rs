// SPDX-License-Identifier: MIT OR Apache-2.0
//! A GPU stops or dies while processes have pages in its VRAM, and then its driver is unbound or unloaded, or the
//! machine goes to sleep. All of it ends; who has data in that VRAM alone loses it, and nobody else anything.
//!
//! QEMU may hold the whole VM up while it waits for a GPU that stands still. So the GPU goes on once the driver
//! has said what a case waits for.

use super::{
    HostCase,
    death::{LOSS, MOMENT, fine_at, victim},
    inside::{command, go_on, guest, shell, start},
    lifecycle::MODULE,
    machines::{After, Machines},
    sleep::rehearsal,
};
use anyhow::{Context, Result, ensure};
use farfault_tests::guest::{
    DYING_LIMIT, Machine,
    holding::{GONE, HOLD_MAPPED, HOLD_RESIDENT, HOME, PING_GAVE},
    programs::{CLOSED, DONE, HOLD_OPEN, READY},
    stages::Stage,
};
use std::{
    thread,
    time::{Duration, Instant},
};
use xtask::vm::{GuestProcess, Vm};

const COMMAND: Duration = Duration::from_secs(60);
/// What the driver says of pages that it cannot bring home when it is unbound.
const PAGES_LOST: &str = "pages are lost with the device";
const FINE: &str = "0.";
const EIO: &str = "5.";
const ENODEV: &str = "19.";

pub(crate) const CASES: &[HostCase] = &[
    HostCase {
        name: "lifecycle::device_stopped_for_a_moment_during_unbind_and_sleep_brings_pages_home",
        machine: Machine::TwoGpus,
        after: After::Keep,
        run: stopped_for_a_moment,
    },
    HostCase {
        name: "lifecycle::machine_with_a_stopped_device_stays_awake_and_then_sleeps_without_it",
        machine: Machine::TwoGpus,
        after: After::Keep,
        run: sleeps_without,
    },
    HostCase {
        name: "lifecycle::rmmod_with_pages_of_a_stopped_device_waits_for_their_users",
        machine: Machine::TwoGpus,
        after: After::Keep,
        run: rmmod_waits,
    },
    HostCase {
        name: "lifecycle::unbind_of_a_killed_or_stopped_device_loses_only_what_its_vram_had",
        machine: Machine::Dying,
        // The module stays loaded for the sake of lost pages.
        after: After::GiveUp,
        run: unbind_loses_pages,
    },
];

/// Those who have memory on one GPU, and one who has some on another.
struct Holders {
    resident: GuestProcess,
    mapped: GuestProcess,
    bystander: GuestProcess,
}

impl Holders {
    fn start(vm: &Vm, machines: &Machines, gpu: usize, fate: &str) -> Result<Self> {
        let gpu = gpu.to_string();
        Ok(Self {
            bystander: start(vm, machines, HOLD_OPEN, READY)?,
            resident: ready(vm, machines, &[HOLD_RESIDENT, &gpu, fate])?,
            mapped: ready(vm, machines, &[HOLD_MAPPED, &gpu])?,
        })
    }

    /// They look at their memory, and end well. PING gave this to who has a descriptor of the GPU.
    fn end(self, machines: &Machines, ping: &str) -> Result<()> {
        let output = go_on(self.mapped, machines, COMMAND)?;
        let gave = format!("{PING_GAVE}{ping}");
        ensure!(output.stdout_text().contains(&gave), "{output:?}");
        self.resident.write_stdin(b"go\n")?;
        self.resident.wait_for(CLOSED, machines.limit(COMMAND))?;
        let output = go_on(self.resident, machines, COMMAND)?;
        ensure!(output.stdout_text().contains(DONE));
        let output = go_on(self.bystander, machines, COMMAND)?;
        ensure!(output.stdout_text().contains(DONE));
        Ok(())
    }
}

/// Starts a program with arguments, and waits until the host may act.
fn ready(vm: &Vm, machines: &Machines, arguments: &[&str]) -> Result<GuestProcess> {
    let process = vm.spawn(&command(machines, arguments))?;
    process.wait_for(READY, machines.limit(COMMAND))?;
    Ok(process)
}

/// A line of shell that goes on while the host does something else.
fn begin(vm: &Vm, machines: &Machines, line: &str) -> Result<GuestProcess> {
    let process = vm.spawn(&["sh", "-ec", line])?;
    thread::sleep(machines.limit(MOMENT));
    Ok(process)
}

/// Waits until the driver has said something since the console was so long.
fn wait_for_driver(vm: &Vm, machines: &Machines, from: usize, what: &str) -> Result<()> {
    let deadline = Instant::now() + machines.limit(COMMAND);
    loop {
        let said = vm.console()?;
        if said.get(from..).is_some_and(|said| said.contains(what)) {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "the driver never said: {what}");
        thread::sleep(Duration::from_millis(50));
    }
}

/// What the driver has said since the console was so long, each on a line, is this and nothing else.
fn ensure_said(vm: &Vm, from: usize, expected: &[&str]) -> Result<()> {
    let said = vm.console()?;
    let said = said.get(from..).context("the console shrank")?;
    let of_driver =
        |line: &&str| line.contains("farfault") && !line.contains("farfault-guest-tests:");
    let lines: Vec<_> = said.lines().filter(of_driver).collect();
    let all = lines.len() == expected.len()
        && lines
            .iter()
            .zip(expected)
            .all(|(line, what)| line.contains(what));
    ensure!(all, "not {expected:?}:\n{}", lines.join("\n"));
    Ok(())
}

/// The driver anew, with this parameter.
fn reload(vm: &mut Vm, machines: &Machines, parameter: &str) -> Result<()> {
    let line = format!("rmmod farfault; insmod {MODULE} {parameter}; test -c /dev/farfault1");
    shell(vm, machines, &line, COMMAND)?.expect_success()?;
    Ok(())
}

/// It gives up soon.
fn reload_hasty(vm: &mut Vm, machines: &Machines) -> Result<()> {
    let limit = machines.limit(Duration::from_secs(u64::from(DYING_LIMIT)));
    reload(vm, machines, &format!("time_limit={}", limit.as_secs()))
}

const DRIVER: &str = "/sys/bus/virtio/drivers/farfault";
/// As far as devices have a part in it.
const LEVEL: &str = "devices";

/// The device of a GPU, by its number among those that are bound: both are numbered in the order of the slots.
fn device(vm: &mut Vm, machines: &Machines, gpu: usize) -> Result<String> {
    let line = format!("cd {DRIVER}; ls -d virtio* | sed -n {}p", gpu + 1);
    let output = shell(vm, machines, &line, COMMAND)?.expect_success()?;
    Ok(output.stdout_text().trim().to_owned())
}

fn stopped_for_a_moment(vm: &mut Vm, machines: &Machines) -> Result<()> {
    let unbind = format!("echo {} > {DRIVER}/unbind", device(vm, machines, 1)?);
    for (line, ping) in [(unbind, ENODEV), (rehearsal(LEVEL), FINE)] {
        let console = vm.console()?.len();
        let holders = Holders::start(vm, machines, 1, HOME)?;
        vm.stop_device(1)?;
        let acting = begin(vm, machines, &line)?;
        ensure!(!acting.has_ended(), "it does not wait for the GPU");
        if ping == ENODEV {
            let open = shell(vm, machines, "exec 3<>/dev/farfault1", COMMAND)?;
            let refused = !open.success() && open.stderr_text().contains("No such device");
            ensure!(refused, "open while it is being unbound: {open:?}");
            ensure!(!acting.has_ended(), "open waited for the GPU");
        }
        vm.continue_device(1)?;
        acting.wait(machines.limit(COMMAND))?.expect_success()?;
        holders.end(machines, ping).with_context(|| line.clone())?;
        ensure!(
            !vm.console()?
                .get(console..)
                .is_some_and(|said| said.contains(LOSS))
        );
        reload(vm, machines, "")?;
    }
    Ok(())
}

fn sleeps_without(vm: &mut Vm, machines: &Machines) -> Result<()> {
    reload_hasty(vm, machines)?;
    let holders = Holders::start(vm, machines, 1, GONE)?;
    let console = vm.console()?.len();
    vm.stop_device(1)?;
    let sleeper = begin(vm, machines, &rehearsal(LEVEL))?;
    wait_for_driver(vm, machines, console, LOSS)?;
    vm.continue_device(1)?;
    let output = sleeper.wait(machines.limit(COMMAND))?;
    ensure!(
        !output.success(),
        "the machine slept, and pages were not home"
    );
    // What is lost already keeps nobody awake.
    shell(vm, machines, &rehearsal(LEVEL), COMMAND)?.expect_success()?;
    holders.end(machines, EIO)?;
    reload(vm, machines, "")?;
    works(vm, machines)
}

fn rmmod_waits(vm: &mut Vm, machines: &Machines) -> Result<()> {
    reload_hasty(vm, machines)?;
    let limit = machines.limit(COMMAND);
    let resident = ready(vm, machines, &[HOLD_RESIDENT, "1", GONE])?;
    let console = vm.console()?.len();
    vm.stop_device(1)?;
    // Its pages would come home with this, if there were somebody to bring them.
    resident.write_stdin(b"go\n")?;
    resident.wait_for(CLOSED, limit)?;
    let rmmod = begin(vm, machines, "rmmod farfault")?;
    wait_for_driver(vm, machines, console, PAGES_LOST)?;
    vm.continue_device(1)?;
    thread::sleep(machines.limit(MOMENT));
    ensure!(!rmmod.has_ended(), "mm would call code that is gone");
    go_on(resident, machines, COMMAND)?;
    rmmod.wait(limit)?.expect_success()?;
    ensure_said(vm, console, &[LOSS, PAGES_LOST])?;
    let load = format!("insmod {MODULE}; test -c /dev/farfault1");
    shell(vm, machines, &load, COMMAND)?.expect_success()?;
    works(vm, machines)
}

fn unbind_loses_pages(vm: &mut Vm, machines: &Machines) -> Result<()> {
    for killed in [true, false] {
        let gpu = victim(vm)?;
        let holders = Holders::start(vm, machines, gpu, GONE)?;
        let device = device(vm, machines, gpu)?;
        let console = vm.console()?.len();
        if killed {
            vm.kill_device(gpu)?;
        } else {
            vm.stop_device(gpu)?;
        }
        let unbind = begin(vm, machines, &format!("echo {device} > {DRIVER}/unbind"))?;
        wait_for_driver(vm, machines, console, PAGES_LOST)?;
        if !killed {
            vm.continue_device(gpu)?;
        }
        unbind.wait(machines.limit(COMMAND))?.expect_success()?;
        ensure_said(vm, console, &[LOSS, PAGES_LOST])?;
        if !killed {
            // The driver that is bound anew has nothing to do with the pages of the one before.
            let line = format!("echo {device} > {DRIVER}/bind; test -c /dev/farfault{gpu}");
            shell(vm, machines, &line, COMMAND)?.expect_success()?;
            fine_at(vm, machines, gpu, Stage::Idle)?;
        }
        holders
            .end(machines, ENODEV)
            .with_context(|| format!("killed: {killed}"))?;
    }
    Ok(())
}

fn works(vm: &mut Vm, machines: &Machines) -> Result<()> {
    let case = "two_gpus::pages_used_by_both_in_turn_keep_their_data";
    guest(vm, machines, &[case], COMMAND).map(drop)
}
