// SPDX-License-Identifier: MIT OR Apache-2.0
//! `cargo xtask`: the command line over the library. Each command is a file of `commands/`.

mod commands;

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use commands::{bench, boot, compare, demo, doctor, fuzz, hmm_tests, test};
use xtask::{Options, Paths, Prepared, build, setup};

/// Sets up, boots and tests Farfault. A first run fetches what it needs; later ones take what is there.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", max_term_width = 100)]
struct Cli {
    #[command(flatten)]
    options: Options,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Boot a VM and watch memory move between CPU and GPU
    Demo(demo::Arguments),
    /// Run all tests: those of the host, then those in VMs
    Test(test::Arguments),
    /// Boot a VM with the GPU in it and the driver loaded, and give a shell
    Boot(boot::Arguments),
    /// Run the kernel's own selftests for HMM
    HmmTests(hmm_tests::Arguments),
    /// Compare the kernel's mock device and Farfault's nodes, call by call
    HmmCompare(compare::Arguments),
    /// Run the device's fuzz targets under cargo-fuzz
    Fuzz(fuzz::Arguments),
    /// Measure, and print what was measured
    Bench(bench::Arguments),
    /// Say what is missing here, and the command that mends it
    Doctor,
    /// Fetch and build everything, boot nothing
    Setup,
    /// Check the kernel module with clippy
    ClippyModule,
}

fn main() -> ExitCode {
    // Done steps are stamped and children die with this process, so an interruption needs a message and nothing else.
    let handler = ctrlc::set_handler(|| {
        eprintln!("\ninterrupted; what is done is kept, the same command goes on from there");
        std::process::exit(130);
    });
    if let Err(error) = handler {
        eprintln!("Ctrl-C will end this without a word: {error}");
    }
    match run(&Cli::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: &Cli) -> anyhow::Result<ExitCode> {
    let options = &cli.options;
    match &cli.command {
        Command::Demo(arguments) => demo::run(options, arguments),
        Command::Test(arguments) => test::run(options, arguments),
        Command::Boot(arguments) => boot::run(options, arguments),
        Command::HmmTests(arguments) => hmm_tests::run(options, arguments),
        Command::HmmCompare(arguments) => compare::run(options, arguments),
        Command::Fuzz(arguments) => fuzz::run(options, arguments),
        Command::Bench(arguments) => bench::run(options, arguments),
        Command::Doctor => doctor::run(options),
        Command::Setup => {
            Prepared::new(options)?;
            Ok(ExitCode::SUCCESS)
        }
        Command::ClippyModule => {
            let paths = Paths::new(options)?;
            build::clippy_module(&paths, &setup::ensure(options, &paths)?)?;
            Ok(ExitCode::SUCCESS)
        }
    }
}
