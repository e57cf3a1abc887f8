// SPDX-License-Identifier: MIT OR Apache-2.0
//! `cargo xtask bench`: Farfault beside the kernel's mock device, beside its own commands, beside itself without copies, and
//! beside the host's memcpy, in turns, in one VM.
//!
//! Both drivers offer nodes of the same names, so they are loaded in turns. Each round measures everything once, in the
//! reverse order of the round before, so that a machine that changes its speed meanwhile favours nobody.

mod figures;
mod memcpy;
mod profile;
mod rounds;
mod suite;
mod table;

use std::{fs, path::PathBuf, process::ExitCode};

use anyhow::Context;
use xtask::{
    Options,
    build::Extra,
    vm::{Config, Driver},
};

use crate::commands::VmArguments;

const VRAM: &str = "1G";
/// What migrates is 256 MiB, and the mock device keeps its own memory in the guest's RAM.
const MEMORY_MIB: u32 = 3072;
const CPUS: u32 = 2;
const ROUNDS: u32 = 3;
/// What is moved by our own calls, in MiB.
const SIZES: [u32; 3] = [16, 64, 256];
const QUICK_SIZES: [u32; 1] = [16];

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    #[command(flatten)]
    vm: VmArguments,
    /// How often everything is measured in turn
    #[arg(long, value_name = "N", default_value_t = ROUNDS, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
    /// One round, and 16 MB the only size of migrations by our own calls: to see that it works, not to trust
    #[arg(long, conflicts_with = "rounds")]
    quick: bool,
    /// Show where the guest's kernel spends its time in the suite's benchmark, on both drivers, and measure nothing
    #[arg(long, conflicts_with_all = ["rounds", "quick", "json"])]
    profile: bool,
    /// The model of the guest's CPUs; tests and demo use erms=off,fsrm=off,fzrm=off,fsrs=off,fsrc=off under the translator
    #[arg(long, value_name = "MODEL", default_value = "max")]
    cpu: String,
    /// A further argument for the guest's kernel, such as init_on_alloc=0; may be given again
    #[arg(long, value_name = "ARGUMENT")]
    append: Vec<String>,
    /// Write the table's figures to this file too, as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

pub(crate) fn run(options: &Options, arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let (rounds, sizes) = if arguments.quick {
        (1, &QUICK_SIZES[..])
    } else {
        (arguments.rounds, &SIZES[..])
    };
    let config = Config {
        name: "bench".to_owned(),
        vram: VRAM.to_owned(),
        memory_mib: MEMORY_MIB,
        cpus: CPUS,
        cpu: Some(arguments.cpu.clone()),
        kernel_args: arguments.append.clone(),
        driver: Driver::None,
        ..Config::default()
    };
    arguments.vm.run_config(options, config, Extra::Suite, |vm, prepared| {
        if arguments.profile {
            profile::show(vm)?;
            return Ok(ExitCode::SUCCESS);
        }
        let rounds = rounds::measure(vm, rounds, sizes)?;
        let rows = figures::rows(&rounds, sizes)?;
        print!("{}", table::text(&rows));
        println!(
            "\n{}, {CPUS} vCPUs {}{}; {} in turns: figures are medians, and a ratio is the median of the rounds' ratios",
            prepared.accel,
            arguments.cpu,
            arguments.append.iter().map(|argument| format!(", {argument}")).collect::<String>(),
            match rounds.len() {
                1 => "1 round".to_owned(),
                count => format!("{count} rounds"),
            }
        );
        if let Some(file) = &arguments.json {
            let json = format!("{:#}\n", table::json(&rows));
            fs::write(file, json).with_context(|| format!("writing {}", file.display()))?;
        }
        Ok(ExitCode::SUCCESS)
    })
}
