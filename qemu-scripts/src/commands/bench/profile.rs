// SPDX-License-Identifier: MIT OR Apache-2.0
//! `--profile`: not how long it takes but where the time goes, in the guest's kernel and in the drivers, while the suite's
//! benchmark runs on each of them.

use std::time::Duration;

use anyhow::Context;
use farfault_init::{DRIVER_PATH, MOCK_PATH};
use xtask::{build::SUITE_PROGRAM, vm::Vm};

use super::{rounds::with_module, suite};

const PROGRAM: &str = "farfault-profile";
/// Sampling makes the benchmark slower.
const LIMIT: Duration = Duration::from_secs(400);

pub(super) fn show(vm: &mut Vm) -> anyhow::Result<()> {
    for (name, module) in [
        ("test_hmm", &[MOCK_PATH][..]),
        ("Farfault", &[DRIVER_PATH, "dmirror=1"]),
    ] {
        let argv = [PROGRAM, SUITE_PROGRAM, "-r", suite::BENCHMARK];
        let output = with_module(vm, module, |vm| Ok(vm.run(&argv, LIMIT)?))?;
        let output = output.stdout_text();
        // What the benchmark itself prints comes before.
        let profile = output
            .lines()
            .skip_while(|line| !line.contains(" samples:"));
        let profile: Vec<&str> = profile.collect();
        (!profile.is_empty())
            .then(|| println!("\n{name}: {}", profile.join("\n")))
            .with_context(|| format!("{PROGRAM} printed no profile:\n{output}"))?;
    }
    Ok(())
}
