// SPDX-License-Identifier: MIT OR Apache-2.0
//! `farfault-bench`: what faults, commands and migrations cost, measured in the guest, once.
//!
//! It prints samples as they were taken, as JSON: an object with a list of nanoseconds for each name.
//! It knows nothing of rounds, medians, references or aims; `cargo xtask bench` runs it in turns with
//! other things, and makes the table of all of them.

mod measure;
mod options;

use options::{Command, What};
use std::{collections::BTreeMap, process::ExitCode, time::Duration};

/// Why it failed, for the last line.
type Failure = Box<dyn std::error::Error>;

fn main() -> ExitCode {
    let (device, what) = match options::parse(lexopt::Parser::from_env()) {
        Ok(Command::Run { device, what }) => (device, what),
        Ok(Command::Help) => {
            print!("{}", options::HELP);
            return ExitCode::SUCCESS;
        }
        Err(error) => {
            eprintln!("farfault-bench: {error}\n\n{}", options::HELP);
            return ExitCode::from(2);
        }
    };
    let gpu = match device {
        Some(path) => farfault::Gpu::open(path),
        None => farfault::Gpu::open_first(),
    };
    let samples = gpu.map_err(Failure::from).and_then(|gpu| match what {
        What::Faults => measure::faults(&gpu),
        What::Migrations { mebibytes, data } => measure::migrations(&gpu, &mebibytes, data),
    });
    match samples {
        Ok(samples) => {
            println!("{}", serde_json::json!(samples.0));
            ExitCode::SUCCESS
        }
        Err(why) => {
            eprintln!("farfault-bench: {why}");
            ExitCode::FAILURE
        }
    }
}

/// All samples of a name, in nanoseconds.
#[derive(Debug, Default)]
struct Samples(BTreeMap<String, Vec<u64>>);

impl Samples {
    fn take(&mut self, name: &str, time: Duration) {
        let nanoseconds = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        self.0.entry(name.to_owned()).or_default().push(nanoseconds);
    }
}
