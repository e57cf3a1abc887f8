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
use std::{
    sync::{Mutex, OnceLock, PoisonError},
    time::Duration,
};
use xtask::{
    Options, Prepared, SKIPPED_CASE,
    vm::{Config, Driver, Vm},
};

/// What a case runs on. Each GPU has [`farfault_tests::guest::VRAM`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Machine {
    /// One GPU.
    Small,
    /// Two of them.
    TwoGpus,
    /// Three of them, the driver with `dmirror=1`.
    Mirrors,
}

/// What becomes of a VM when the case went well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum After {
    /// Others use it.
    Keep,
    /// It is broken on purpose: nobody can use it, nor shut it down.
    GiveUp,
}

/// The VM of the last case, and what is needed to boot another.
#[derive(Default)]
pub(crate) struct Machines {
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

impl Machine {
    pub(crate) fn with_gpus(gpus: u32) -> Self {
        match gpus {
            1 => Self::Small,
            2 => Self::TwoGpus,
            _ => Self::Mirrors,
        }
    }

    pub(crate) fn gpus(self) -> usize {
        match self {
            Self::Small => 1,
            Self::TwoGpus => 2,
            Self::Mirrors => 3,
        }
    }

    /// The driver's parameters.
    pub(crate) fn parameters(self) -> &'static [&'static str] {
        match self {
            Self::Small | Self::TwoGpus => &[],
            Self::Mirrors => &["dmirror=1"],
        }
    }

    fn config(self) -> Config {
        Config {
            // The console says which cases ran: their programs write that to the kernel's log.
            name: format!("{}-gpu", self.gpus()),
            repeat: Some("cargo xtask test NAME, with the name of the test that failed".to_owned()),
            gpus: self.gpus(),
            vram: farfault_tests::guest::VRAM.to_string(),
            memory: "1G".to_owned(),
            driver: Driver::Load(self.parameters().iter().map(ToString::to_string).collect()),
            ..Config::default()
        }
    }
}

impl Machines {
    /// Tools, kernel, driver and programs, made or found once.
    fn prepared(&self) -> Result<&Prepared> {
        let prepare = || {
            let options = Options::from_env().map_err(|error| error.to_string())?;
            Prepared::new(&options).map_err(|error| error.to_string())
        };
        let prepared = self.prepared.get_or_init(prepare);
        prepared
            .as_ref()
            .map_err(|error| anyhow::anyhow!("{error}"))
    }

    /// A time limit, for the kernel that runs.
    pub(crate) fn limit(&self, limit: Duration) -> Duration {
        let slowness = self
            .prepared()
            .map_or(1, |prepared| prepared.setup.kernel.slowness);
        limit * slowness
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
            None => Vm::boot(self.prepared()?, &machine.config()).context("booting a VM")?,
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
        if after == After::Keep {
            inside::ensure_nothing_left(&mut vm, machine.gpus())?;
            vm.check().context("after the case")?;
            state.running = Some((machine, vm));
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
