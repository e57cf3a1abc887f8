// SPDX-License-Identifier: MIT OR Apache-2.0
//! VMs, shared by the cases that can't hurt each other.
//!
//! One VM runs at a time: the one of the last case. The next case takes it over if it wants the same
//! machine and nothing was wrong; after a failure it is given up, with its logs kept, and the next
//! case boots another. After each case kernel, QEMU and devices are checked, and that nothing of the
//! case is left in driver or GPU.
//!
//! Lock: one mutex, held while a case runs.

use super::inside;
use anyhow::{Context, Result, bail};
use farfault_tests::guest::{DYING_LIMIT, Machine, VRAM};
use std::{
    hash::{BuildHasher, Hasher, RandomState},
    sync::{Mutex, OnceLock, PoisonError},
    time::Duration,
};
use xtask::{
    KernelChoice, Options, Prepared, SKIPPED_CASE, TestOptions, TestSuite,
    build::Extra,
    vm::{Config, Driver, KnownReport, Vm},
};

/// What becomes of a VM when the case went well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum After {
    /// Others use it.
    Keep,
    /// It is broken on purpose: nobody can use it, nor shut it down.
    GiveUp,
}

/// The VM of the last case, and what is needed to boot another.
pub(crate) struct Machines {
    options: Options,
    tests: TestOptions,
    seed: u64,
    prepared: OnceLock<Result<Prepared, String>>,
    state: Mutex<State>,
    /// Cases that did nothing, and why.
    skipped: Mutex<Vec<String>>,
}

#[derive(Default)]
struct State {
    running: Option<(Machine, Vm)>,
    cases_run: usize,
    /// What went wrong with a VM when no case was to blame.
    trouble: Vec<String>,
}

/// For how long the driver waits for a device if it is not told otherwise, in seconds.
const TIME_LIMIT: u32 = 20;

/// The driver's parameters on a machine, of which everything is so much slower.
pub(crate) fn parameters(machine: Machine, slowness: u32) -> Vec<String> {
    match machine {
        Machine::Mirrors | Machine::HotPlug => vec!["dmirror=1".to_owned()],
        Machine::Dying => vec![format!("time_limit={}", DYING_LIMIT * slowness)],
        // One of them stands still, and is not to be given up while the other is at work.
        Machine::TwoGpus => vec![format!("time_limit={}", TIME_LIMIT * slowness)],
        _ => Vec::new(),
    }
}

/// A part of each node is for what can be moved.
const NUMA_ARGUMENT: &str = "movablecore=256M";

/// Pages that can be moved are put there first as long as there is more of it than of other free memory.
const CMA_ARGUMENT: &str = "cma=576M";

/// `docs/kernel-findings.md`, 9: no driver has a part in it.
const KNOWN_WITH_HOT_UNPLUG: &[KnownReport] = &[
    KnownReport {
        title: CIRCULAR,
        frames: &[
            "down_read_nested",
            "pciehp_unconfigure_device",
            "pciehp_disable_slot",
        ],
    },
    KnownReport {
        title: CIRCULAR,
        frames: &[
            "down_read_nested",
            "pciehp_configure_device",
            "pciehp_handle_presence_or_link_change",
        ],
    },
];
const CIRCULAR: &str = "possible circular locking dependency detected";

impl Machines {
    /// None boots yet.
    pub(crate) fn from_env() -> Result<Self, String> {
        let options = Options::from_env().map_err(|error| error.to_string())?;
        let tests = TestOptions::from_env().map_err(|error| error.to_string())?;
        // Numbers that are easy to type.
        let drawn = || RandomState::new().build_hasher().finish() % 1_000_000;
        Ok(Self {
            options,
            seed: tests.seed.unwrap_or_else(drawn),
            tests,
            prepared: OnceLock::new(),
            state: Mutex::default(),
            skipped: Mutex::default(),
        })
    }

    /// Does this run want the case of this name?
    pub(crate) fn are_asked_for(&self, case: &str) -> bool {
        self.tests.suite.unwrap_or(TestSuite::All).has(case)
    }

    pub(crate) fn seed_told(&self) -> String {
        format!("seed of random tests: {}", self.seed)
    }

    /// The command that runs a case again as it ran here.
    pub(crate) fn repeat(&self, case: &str) -> String {
        let mut command = format!("cargo xtask test {case} --vm-only --seed {}", self.seed);
        if let Some(minutes) = self.tests.minutes {
            command += &format!(" --minutes {minutes}");
        }
        match &self.options.kernel {
            KernelChoice::Stock => {}
            KernelChoice::Debug => command += " --kernel debug",
            KernelChoice::Folder(folder) => command += &format!(" --kernel {}", folder.display()),
        }
        command
    }

    /// What programs of the guest are told of this run, before their name.
    pub(crate) fn settings(&self) -> Vec<String> {
        let mut settings = vec!["--seed".to_owned(), self.seed.to_string()];
        if let Some(minutes) = self.tests.minutes {
            settings.extend(["--minutes".to_owned(), minutes.to_string()]);
        }
        settings
    }

    /// How much longer than its limit a case may take that was asked to go on.
    pub(crate) fn minutes(&self) -> Duration {
        Duration::from_secs(self.tests.minutes.unwrap_or(0) * 60)
    }

    fn config(&self, machine: Machine) -> Config {
        let mut config = Config {
            // The console says which cases ran: their programs write that to the kernel's log.
            name: format!("{machine:?}"),
            repeat: Some(self.repeat("NAME") + ", with the name of the test that failed"),
            gpus: machine.gpus(),
            vram: VRAM.to_string(),
            memory_mib: 1024,
            driver: Driver::Load(parameters(machine, self.slowness())),
            ..Config::default()
        };
        match machine {
            Machine::Small
            | Machine::TwoGpus
            | Machine::Mirrors
            | Machine::EightGpus
            | Machine::Dying => {}
            Machine::Disk => {
                config.disks = true;
                config.kernel_args = vec![CMA_ARGUMENT.to_owned()];
            }
            Machine::Numa => {
                config.numa_nodes = 2;
                config.kernel_args = vec![NUMA_ARGUMENT.to_owned()];
            }
            Machine::HotPlug => {
                config.spare_slots = 1;
                config.known_reports = KNOWN_WITH_HOT_UNPLUG;
            }
        }
        config
    }

    /// Tools, kernel, driver and programs, made or found once.
    fn prepared(&self) -> Result<&Prepared> {
        let prepare =
            || Prepared::with(&self.options, Extra::Disks).map_err(|error| error.to_string());
        let prepared = self.prepared.get_or_init(prepare);
        prepared
            .as_ref()
            .map_err(|error| anyhow::anyhow!("{error}"))
    }

    /// How much slower than the stock one the kernel that runs is.
    fn slowness(&self) -> u32 {
        self.prepared()
            .map_or(1, |prepared| prepared.setup.kernel.slowness)
    }

    /// A time limit, for the kernel that runs.
    pub(crate) fn limit(&self, limit: Duration) -> Duration {
        limit * self.slowness()
    }

    /// Runs a case on a machine, with all checks.
    pub(crate) fn run(
        &self,
        machine: Machine,
        after: After,
        body: impl FnOnce(&mut Vm) -> Result<()>,
    ) -> Result<()> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let last = match state.running.take() {
            Some((same, vm)) if same == machine => Some(vm),
            Some((_, other)) => {
                state.shut_down(other);
                None
            }
            None => None,
        };
        let mut vm = match last {
            Some(vm) => vm,
            None => Vm::boot(self.prepared()?, &self.config(machine)).context("booting a VM")?,
        };
        state.cases_run += 1;
        // From here on an error, or a panic, drops the VM: that ends it and keeps its logs.
        let result = body(&mut vm);
        let checked = vm.check().context("after the case");
        match (result, checked) {
            (Ok(()), Ok(())) => {}
            (Err(error), Ok(())) | (Ok(()), Err(error)) => return Err(error),
            (Err(error), Err(check)) => bail!("{error:?}\n{check:?}"),
        }
        match after {
            After::Keep => {
                inside::ensure_nothing_left(&mut vm, machine.gpus())?;
                vm.check().context("after the case")?;
                state.running = Some((machine, vm));
            }
            After::GiveUp => vm.give_up(),
        }
        Ok(())
    }

    /// Notes that a case did nothing.
    pub(crate) fn skip(&self, case: &str, reason: &str) {
        let mut skipped = self.skipped.lock().unwrap_or_else(PoisonError::into_inner);
        skipped.push(format!("{SKIPPED_CASE}{case}: {reason}"));
    }

    /// Says what was skipped, and shuts the last VM down. Fails if that, or anything between cases, went wrong; and if cases are
    /// said to have passed without a VM.
    pub(crate) fn finish(&self, passed: u64) -> Result<()> {
        let skipped = self.skipped.lock().unwrap_or_else(PoisonError::into_inner);
        skipped.iter().for_each(|line| println!("{line}"));
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, vm)) = state.running.take() {
            state.shut_down(vm);
        }
        if passed > state.cases_run as u64 {
            bail!(
                "{passed} cases passed, of which only {} ran",
                state.cases_run
            );
        }
        if !state.trouble.is_empty() {
            bail!(
                "a VM was not well at its end:\n{}",
                state.trouble.join("\n")
            );
        }
        Ok(())
    }
}

impl State {
    fn shut_down(&mut self, vm: Vm) {
        if let Err(error) = vm.shutdown() {
            self.trouble.push(error.to_string());
        }
    }
}
