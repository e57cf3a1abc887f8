// SPDX-License-Identifier: MIT OR Apache-2.0
//! `cargo xtask test`: the host's tests, then the VM's, and one line that counts them all.

use std::{
    io::{self, BufRead, BufReader, IsTerminal},
    process::{Command, ExitCode, Stdio},
};

use anyhow::{Context, bail};
use xtask::{
    Options, Paths, Prepared, SKIPPED_CASE, TestOptions,
    build::Extra,
    process::{bound, spawn},
};

/// The tests that boot VMs; `cargo test` of the workspace leaves them out.
const VM_TESTS: [&str; 4] = ["--package", "farfault-tests", "--test", "vm"];

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Only tests whose name contains this
    filter: Option<String>,
    /// Only tests that need no VM
    #[arg(long, conflicts_with_all = ["vm_only", "suite"])]
    host_only: bool,
    /// Only tests that boot a VM
    #[arg(long)]
    vm_only: bool,
    #[command(flatten)]
    tests: TestOptions,
    /// Further arguments for the test programs (see `-- --help`)
    #[arg(last = true)]
    more: Vec<String>,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Counts {
    passed: u64,
    failed: u64,
    skipped: u64,
}

pub(crate) fn run(options: &Options, arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let mut counts = Counts::default();
    // Suites are of VM tests alone.
    if !arguments.vm_only && arguments.tests.suite.is_none() {
        let mut command = cargo_test(&Paths::new(options)?);
        command.arg("--workspace");
        counts.add(run_tests(with_filter(command, arguments))?);
    }
    if !arguments.host_only {
        let prepared = Prepared::with(options, Extra::Disks)?;
        let mut command = cargo_test(&prepared.paths);
        command
            .args(VM_TESTS)
            .envs(options.to_env())
            .envs(arguments.tests.to_env());
        counts.add(run_tests(with_filter(command, arguments))?);
    }
    if counts == Counts::default() {
        bail!(
            "no test that was asked for has this in its name: {}",
            arguments.filter.as_deref().unwrap_or("(no filter)")
        );
    }
    println!(
        "{} passed, {} failed, {} skipped",
        counts.passed, counts.failed, counts.skipped
    );
    Ok(if counts.failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn cargo_test(paths: &Paths) -> Command {
    let mut command = bound(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command
        .args(["test", "--no-fail-fast"])
        .current_dir(&paths.repository);
    if io::stdout().is_terminal() {
        command.args(["--color", "always"]);
    }
    command
}

fn with_filter(mut command: Command, arguments: &Arguments) -> Command {
    command
        .arg("--")
        .args(&arguments.more)
        .args(&arguments.filter);
    if io::stdout().is_terminal() {
        command.args(["--color", "always"]);
    }
    command
}

/// Runs test programs, shows what they print, and counts.
fn run_tests(mut command: Command) -> anyhow::Result<Counts> {
    command.stdout(Stdio::piped());
    let mut child = spawn(command).context("starting cargo test")?;
    let stdout = child.stdout.take().context("cargo test has no output")?;
    let mut counts = Counts::default();
    let mut in_vm = 0;
    for line in BufReader::new(stdout).split(b'\n') {
        let line = line.context("reading from cargo test")?;
        let line = String::from_utf8_lossy(&line);
        println!("{line}");
        counts.add(Counts::in_line(&line));
        in_vm += u64::from(line.starts_with(SKIPPED_CASE));
    }
    let status = child.wait().context("waiting for cargo test")?;
    // libtest knows no test that finds out while it runs that it cannot be done: to it they passed.
    counts.passed = counts.passed.saturating_sub(in_vm);
    counts.skipped += in_vm;
    // A test program that crashed, or did not compile, has no line of its own.
    if !status.success() && counts.failed == 0 {
        counts.failed = 1;
    }
    Ok(counts)
}

impl Counts {
    fn add(&mut self, more: Self) {
        self.passed += more.passed;
        self.failed += more.failed;
        self.skipped += more.skipped;
    }

    /// What one line of a test program's output adds: `test result: ok. 3 passed; 0 failed; 1 ignored; …`.
    fn in_line(line: &str) -> Self {
        let Some(rest) = line.trim_start().strip_prefix("test result: ") else {
            return Self::default();
        };
        // The first word is the verdict, in colours perhaps, with a full stop.
        let rest = rest.split_once(". ").map_or("", |(_, rest)| rest);
        let count = |name: &str| {
            let part = rest
                .split(';')
                .find_map(|part| part.trim().strip_suffix(name)?.trim().parse().ok());
            part.unwrap_or(0)
        };
        Self {
            passed: count("passed"),
            failed: count("failed"),
            skipped: count("ignored"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_in_a_result_line_are_its_numbers() {
        let line = "test result: FAILED. 12 passed; 3 failed; 4 ignored; 0 measured; 5 filtered out; finished in 0.20s";
        assert_eq!(
            Counts::in_line(line),
            Counts {
                passed: 12,
                failed: 3,
                skipped: 4
            }
        );
    }

    #[test]
    fn counts_in_a_result_line_with_colours_are_its_numbers() {
        let line = "test result: \u{1b}[32mok\u{1b}(B\u{1b}[m. 7 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out";
        assert_eq!(
            Counts::in_line(line),
            Counts {
                passed: 7,
                failed: 0,
                skipped: 0
            }
        );
    }

    #[test]
    fn counts_in_any_other_line_are_none() {
        assert_eq!(
            Counts::in_line("test walk_of_a_loop_faults ... ok"),
            Counts::default()
        );
        assert_eq!(Counts::in_line("running 7 tests"), Counts::default());
    }

    #[test]
    fn run_tests_that_were_skipped_in_the_vm_are_not_counted_as_passed() {
        let mut command = bound("sh");
        let script = format!(
            "echo 'test result: ok. 5 passed; 0 failed; 1 ignored'; echo '{SKIPPED_CASE}a::b: none'"
        );
        command.args(["-c", &script]);
        assert_eq!(
            run_tests(command).unwrap(),
            Counts {
                passed: 4,
                failed: 0,
                skipped: 2
            }
        );
    }

    #[test]
    fn run_tests_of_a_program_that_crashes_counts_a_failure() {
        let mut command = bound("sh");
        command.args([
            "-c",
            "echo 'test result: ok. 2 passed; 0 failed; 0 ignored'; exit 101",
        ]);
        assert_eq!(
            run_tests(command).unwrap(),
            Counts {
                passed: 2,
                failed: 1,
                skipped: 0
            }
        );
    }
}
