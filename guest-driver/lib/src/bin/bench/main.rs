// SPDX-License-Identifier: MIT OR Apache-2.0
//! `farfault-bench`: what a fault, a migration and the way to the GPU cost, measured in the guest.
//!
//! Everything is measured in several rounds in turn, so that a machine that changes its speed meanwhile
//! changes it for all; the figures are medians over all rounds. Compare figures of one run only. It
//! prints a table, and with `--json` writes the same for programs: a list of objects with `name`,
//! `unit`, `value` (the median), `min`, `max` and `samples`.

mod measure;
mod options;
mod samples;

use options::{Command, JsonTo, Options};
use samples::Samples;
use std::{
    io::{self, Write},
    process::ExitCode,
};

/// Why it failed, for the last line.
type Failure = Box<dyn std::error::Error>;

fn main() -> ExitCode {
    let options = match Options::parse(lexopt::Parser::from_env()) {
        Ok(Command::Run(options)) => options,
        Ok(Command::Help) => {
            print!("{}", options::HELP);
            return ExitCode::SUCCESS;
        }
        Err(error) => {
            eprintln!("farfault-bench: {error}\n\n{}", options::HELP);
            return ExitCode::from(2);
        }
    };
    match run(&options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("farfault-bench: {why}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<(), Failure> {
    let gpu = match &options.device {
        Some(path) => farfault::Gpu::open(path)?,
        None => farfault::Gpu::open_first()?,
    };
    let mut samples = Samples::default();
    for round in 1..=options.rounds {
        eprintln!("round {round} of {}", options.rounds);
        measure::round(&gpu, &mut samples)?;
    }
    samples.expect(&[samples::PING, samples::FAULT_MAP])?;
    let table = samples.table();
    match &options.json {
        None => print!("{table}"),
        Some(JsonTo::Stdout) => {
            eprint!("{table}");
            println!("{}", samples.json());
        }
        Some(JsonTo::File(path)) => {
            std::fs::write(path, format!("{}\n", samples.json()))
                .map_err(|error| format!("could not write {}: {error}", path.display()))?;
            print!("{table}");
        }
    }
    io::stdout().flush()?;
    Ok(())
}
