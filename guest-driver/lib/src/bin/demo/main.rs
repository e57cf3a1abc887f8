// SPDX-License-Identifier: MIT OR Apache-2.0
//! `farfault-demo`: memory of a real process moves between CPU and GPU, and you watch it.
//!
//! It runs in the guest. Each step does one thing to memory from `malloc`, then shows where every
//! page is (`map`), what it took (`stats`), and that the data is what a computation on the CPU, over
//! memory of its own, says that it should be (`memory`). The map comes from the driver, and the demo
//! fails where `/proc/self/pagemap` does not agree. The last line is `demo: ok` or
//! `demo: FAILED: why`, and the exit code says the same.

mod figures;
mod map;
mod memory;
mod options;
mod story;
mod terminal;

use options::{Command, Options};
use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    process::ExitCode,
};
use story::Story;
use terminal::Terminal;

/// Why the demo failed, for its last line.
type Failure = Box<dyn std::error::Error>;

fn main() -> ExitCode {
    let options = match Options::parse(lexopt::Parser::from_env()) {
        Ok(Command::Run(options)) => options,
        Ok(Command::Help) => {
            print!("{}", options::HELP);
            return ExitCode::SUCCESS;
        }
        Err(error) => {
            eprintln!("farfault-demo: {error}\n\n{}", options::HELP);
            println!("demo: FAILED: {error}");
            return ExitCode::from(2);
        }
    };
    let terminal = Terminal::new(options.color, options.width);
    // A panic must not take the last line away: somebody reads it.
    let result = catch_unwind(AssertUnwindSafe(|| Story::tell(&options, &terminal)))
        .unwrap_or_else(|_| Err("it panicked; see the message above".into()));
    match result {
        Ok(()) => {
            println!("{}", terminal.good("demo: ok"));
            ExitCode::SUCCESS
        }
        Err(why) => {
            let why = why.to_string().replace('\n', " ");
            println!("{}", terminal.bad(&format!("demo: FAILED: {why}")));
            ExitCode::FAILURE
        }
    }
}
