// SPDX-License-Identifier: MIT OR Apache-2.0
//! `cargo xtask bench`: the guest's benchmark, its table on the terminal, its numbers in a file if one is named.

use std::{fs, path::PathBuf, process::ExitCode, time::Duration};

use anyhow::Context;
use xtask::{Options, vm::Attach};

use crate::commands::{VmArguments, exit_code};

const PROGRAM: &str = "farfault-bench";
const VRAM: &str = "256M";
const LIMIT: Duration = Duration::from_secs(1200);
/// Where the guest's program leaves its numbers.
const GUEST_JSON: &str = "/tmp/bench.json";
const COPY_LIMIT: Duration = Duration::from_secs(30);

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    #[command(flatten)]
    vm: VmArguments,
    /// Write the numbers to this file too
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

pub(crate) fn run(options: &Options, arguments: &Arguments) -> anyhow::Result<ExitCode> {
    arguments.vm.run(options, "bench", VRAM, |vm| {
        let mut argv = vec![PROGRAM];
        if arguments.json.is_some() {
            argv.extend(["--json", GUEST_JSON]);
        }
        let output = vm.attach(&argv, Attach::Output(LIMIT))?;
        if let (Some(file), true) = (&arguments.json, output.success()) {
            let numbers = vm.run(&["cat", GUEST_JSON], COPY_LIMIT)?.expect_success()?;
            fs::write(file, &numbers.stdout)
                .with_context(|| format!("writing {}", file.display()))?;
        }
        vm.check()?;
        Ok(exit_code(&output))
    })
}
