// SPDX-License-Identifier: MIT OR Apache-2.0
//! The commands of `cargo xtask`, and what those that boot a VM have in common.

pub(crate) mod bench;
pub(crate) mod boot;
pub(crate) mod compare;
pub(crate) mod demo;
pub(crate) mod doctor;
pub(crate) mod fuzz;
pub(crate) mod hmm_tests;
pub(crate) mod test;

use std::process::ExitCode;

use xtask::{
    Options, Prepared,
    build::Extra,
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
    /// Prepares all, then prints the command lines or boots a VM with the driver and hands it over.
    fn run(
        &self,
        options: &Options,
        name: &str,
        vram: &str,
        act: impl FnOnce(&mut Vm) -> anyhow::Result<ExitCode>,
    ) -> anyhow::Result<ExitCode> {
        let config = Config {
            name: name.to_owned(),
            vram: vram.to_owned(),
            ..Config::default()
        };
        self.run_config(options, config, Extra::None, |vm, _| act(vm))
    }

    /// The same with a VM of the command's own, as far as these arguments leave it.
    fn run_config(
        &self,
        options: &Options,
        mut config: Config,
        extra: Extra,
        act: impl FnOnce(&mut Vm, &Prepared) -> anyhow::Result<ExitCode>,
    ) -> anyhow::Result<ExitCode> {
        config.gpus = self.gpus.into();
        config.vram = self.vram.clone().unwrap_or(config.vram);
        config.repeat = Some(format!("cargo xtask {}", config.name));
        let prepared = Prepared::with(options, extra)?;
        if self.print {
            for line in Vm::command_lines(&prepared, &config) {
                println!("{line}");
            }
            return Ok(ExitCode::SUCCESS);
        }
        let mut vm = Vm::boot(&prepared, &config)?;
        let code = act(&mut vm, &prepared)?;
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
