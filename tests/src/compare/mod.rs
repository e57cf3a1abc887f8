// SPDX-License-Identifier: MIT OR Apache-2.0
//! `hmm-compare`: drives `/dev/hmm_dmirror0` and `1` by a script and prints a transcript, each step
//! with its result. The same script on two drivers gives the same transcript, or a difference to look
//! into: `cargo xtask hmm-compare` runs it on the kernel's `test_hmm` and on Farfault's nodes.
//!
//! A transcript depends on the script and on the driver, and on nothing else: addresses are fixed,
//! and there are no times or process numbers in it. A transcript is a script again.
//!
//! | part | what it is |
//! | --- | --- |
//! | `script` | the language |
//! | `cases/` | scripts by hand, by name |
//! | `random` | scripts from a seed |
//! | `process`, `node` | do the steps; the calls of a node among them |
//! | `guard` | keeps away from what test_hmm does not survive |
//! | `address`, `content` | names for addresses and for what pages hold |

mod address;
mod cases;
mod content;
mod guard;
mod node;
mod process;
mod random;
mod script;
mod settings;

use anyhow::{Context, Result, bail};
use process::{Process, SERVE};
use std::{
    io::{BufRead, BufReader, Write, stderr, stdin, stdout},
    os::fd::AsFd,
    process::ExitCode,
};

/// The name under which this is installed in the guest.
pub const PROGRAM: &str = "hmm-compare";

const USAGE: &str = "\
hmm-compare prepare                     sets the kernel up so that transcripts repeat
hmm-compare --list                      the names of the cases
hmm-compare [--faults] case NAME        a case
hmm-compare [--faults] random SEED N    N random steps
hmm-compare [--faults] script           a script, or a transcript, from standard input";

/// Runs what the arguments say.
pub fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let mut arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let faults = arguments.first() == Some(&"--faults");
    if faults {
        arguments.remove(0);
    }
    match run(&arguments, faults) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{PROGRAM}: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &[&str], faults: bool) -> Result<()> {
    match arguments {
        ["prepare"] => settings::prepare(),
        ["--list"] => {
            cases::all().try_for_each(|case| writeln!(stdout(), "{}", case.name))?;
            Ok(())
        }
        ["case", name] => {
            let case = cases::all().find(|case| case.name == *name);
            let case = case.with_context(|| format!("there is no case `{name}`"))?;
            transcribe(&mut start(faults)?, case.script.lines())
        }
        ["script"] => {
            let lines = BufReader::new(stdin()).lines();
            let lines = lines.collect::<std::io::Result<Vec<_>>>()?;
            transcribe(&mut start(faults)?, lines.iter().map(String::as_str))
        }
        ["random", seed, steps] => {
            let mut process = start(faults)?;
            let mut random = random::Random::new(seed.parse()?);
            for _ in 0..steps.parse::<u64>()? {
                let lines = random.step();
                transcribe(&mut process, lines.iter().map(String::as_str))?;
            }
            let lines = random.end();
            transcribe(&mut process, lines.iter().map(String::as_str))
        }
        [SERVE, name] => {
            let mut process = start(faults)?;
            process.inherit(name, stderr().as_fd().try_clone_to_owned()?);
            // The answer to the step that executed this.
            writeln!(stdout(), "ok")?;
            process.serve(stdin().lock(), stdout())
        }
        _ => bail!("that is not how it is used:\n{USAGE}"),
    }
}

fn start(faults: bool) -> Result<Process> {
    settings::one_cpu()?;
    Process::new(faults)
}

/// Each step is shown before it is done: it may be the last one.
fn transcribe<'a>(process: &mut Process, lines: impl Iterator<Item = &'a str>) -> Result<()> {
    let mut out = stdout();
    for line in lines {
        let Some(parsed) = script::parse(line)? else {
            continue;
        };
        let step = line.split(" -> ").next().unwrap_or_default();
        write!(out, "{} -> ", step.trim())?;
        out.flush()?;
        let result = process.step(parsed).with_context(|| line.to_owned())?;
        writeln!(out, "{result}")?;
    }
    Ok(())
}
