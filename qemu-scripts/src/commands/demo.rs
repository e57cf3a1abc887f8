// SPDX-License-Identifier: MIT OR Apache-2.0
//! `cargo xtask demo`: memory moves between CPU and GPU, and one can see it.

use std::{process::ExitCode, time::Duration};

use xtask::{Options, vm::Attach};

use crate::commands::{VmArguments, exit_code};

const PROGRAM: &str = "farfault-demo";
/// Small, so that the demo can show what happens when more is wanted than there is.
const VRAM: &str = "32M";
const LIMIT: Duration = Duration::from_secs(600);

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    #[command(flatten)]
    vm: VmArguments,
}

pub(crate) fn run(options: &Options, arguments: &Arguments) -> anyhow::Result<ExitCode> {
    arguments.vm.run(options, "demo", VRAM, |vm| {
        let output = vm.attach(&[PROGRAM], Attach::Output(LIMIT))?;
        // The demo's last line is the last line; trouble that it did not see goes before the exit code.
        vm.check()?;
        Ok(exit_code(&output))
    })
}
