// SPDX-License-Identifier: MIT OR Apache-2.0
//! The commands of `cargo xtask`, and what those that boot a VM have in common.

pub(crate) mod bench;
pub(crate) mod boot;
pub(crate) mod demo;
pub(crate) mod doctor;
pub(crate) mod hmm_tests;
pub(crate) mod test;

use std::process::ExitCode;

use xtask::{
    Options, Prepared,
    vm::{Config, Output, Vm},
};

/// The VM of a command.
#[derive(Debug, clap::Args)]
pub(crate) struct VmArguments {
    /// VRAM of each GPU, such as 256M
    #[arg(long, value_name = "SIZE")]
    vram: Option<String>,
    /// How many GPUs
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u8).range(0..=8))]
    gpus: u8,
    /// Print the command lines of device and QEMU, for running them by hand, and boot nothing
    #[arg(long)]
    print: bool,
}

impl VmArguments {
    /// Prepares all, then prints the command lines or boots a VM and hands it over.
    fn run(
        &self,
        options: &Options,
        name: &str,
        vram: &str,
        act: impl FnOnce(&mut Vm) -> anyhow::Result<ExitCode>,
    ) -> anyhow::Result<ExitCode> {
        let config = Config {
            name: name.to_owned(),
            gpus: self.gpus.into(),
            vram: self.vram.clone().unwrap_or_else(|| vram.to_owned()),
            repeat: Some(format!("cargo xtask {name}")),
            ..Config::default()
        };
        let prepared = Prepared::new(options)?;
        if self.print {
            for line in Vm::command_lines(&prepared, &config) {
                println!("{line}");
            }
            return Ok(ExitCode::SUCCESS);
        }
        let mut vm = Vm::boot(&prepared, &config)?;
        let code = act(&mut vm)?;
        vm.shutdown()?;
        Ok(code)
    }
}

/// The exit code of a program of the guest, as ours.
fn exit_code(output: &Output) -> ExitCode {
    match output.code.and_then(|code| u8::try_from(code).ok()) {
        Some(code) => ExitCode::from(code),
        None => ExitCode::FAILURE,
    }
}
