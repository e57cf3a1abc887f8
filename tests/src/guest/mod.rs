// SPDX-License-Identifier: MIT OR Apache-2.0
//! What runs in the VM: each case is a run of `farfault-guest-tests` with its name, and passes if
//! that exits with 0. Of an error it says all on standard error.
//!
//! Cases know the device node and nothing of the host. Programs are helpers for cases of the host:
//! they say on standard output how far they are, and wait for a line of standard input to go on.

/// Functions of a module as its cases; machine and `seconds` hold for all of them. The name of a group
/// that belongs to a suite begins with the suite's: `"mm::fork"`.
macro_rules! group {
    // The machine with one GPU is what most want.
    ($group:literal, gpus 1, $($rest:tt)*) => { group! { $group, on Small, $($rest)* } };
    ($group:literal, on $machine:ident, seconds $seconds:literal: $($case:ident,)*) => {
        /// The cases of this group.
        pub(in crate::guest) const CASES: &[crate::guest::Case] = &[$(crate::guest::Case {
            name: concat!($group, "::", stringify!($case)),
            machine: crate::guest::Machine::$machine,
            seconds: $seconds,
            run: $case,
        },)*];
    };
}

mod call;
mod cases;
mod child;
pub mod ending;
pub mod holding;
pub mod leaving;
mod load;
mod machine;
mod mirror;
mod oracle;
mod place;
pub mod programs;
pub mod settings;
pub mod stages;
mod tunables;
pub mod waiting;

pub use machine::{DYING_LIMIT, Machine};

use std::process::ExitCode;

/// The name under which this is installed in the guest.
pub const PROGRAM: &str = "farfault-guest-tests";
/// VRAM of each GPU that the cases are written for.
pub const VRAM: u64 = 32 << 20;

/// A line of standard output that begins so says why a case did nothing; the rest is the reason.
pub const SKIPPED: &str = "skipped: ";

/// Ends a case that the running kernel lacks something for. The harness counts it as skipped.
pub fn skip(reason: &str) {
    println!("{SKIPPED}{reason}");
}

/// A test that needs nothing but a guest with a GPU.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    /// `group::thing_condition_result`, or `suite::group::thing_condition_result`.
    pub name: &'static str,
    /// What it runs on.
    pub machine: Machine,
    /// How long it may take, on a slow machine.
    pub seconds: u64,
    run: fn() -> anyhow::Result<()>,
}

/// A helper for cases of the host.
#[derive(Clone, Copy, Debug)]
pub struct Program {
    /// Its name.
    pub name: &'static str,
    run: fn(&[String]) -> anyhow::Result<()>,
}

/// All cases.
pub fn cases() -> impl Iterator<Item = &'static Case> {
    cases::groups().copied().flatten()
}

/// All programs.
pub fn programs() -> impl Iterator<Item = &'static Program> {
    programs::PROGRAMS
        .iter()
        .chain(holding::PROGRAMS)
        .chain(ending::PROGRAMS)
        .chain(leaving::PROGRAMS)
        .chain(waiting::PROGRAMS)
}

/// `farfault-guest-tests [--seed N] [--minutes N] NAME [ARGUMENT…]` or `farfault-guest-tests --list`.
pub fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments = match settings::take(&arguments) {
        Ok(rest) => rest,
        Err(error) => {
            eprintln!("{PROGRAM}: {error:#}");
            return ExitCode::from(2);
        }
    };
    let Some((name, arguments)) = arguments.split_first() else {
        eprintln!("{PROGRAM}: name a case or a program; --list shows them");
        return ExitCode::from(2);
    };
    if name == "--list" {
        cases().for_each(|case| println!("{}", case.name));
        programs().for_each(|program| println!("{}", program.name));
        return ExitCode::SUCCESS;
    }
    // The kernel's log tells then what ran when it had trouble. Not everybody may write there.
    let _ = std::fs::write("/dev/kmsg", format!("{PROGRAM}: {name}\n"));
    let result = if let Some(case) = cases().find(|case| case.name == name) {
        (case.run)()
    } else if let Some(program) = programs().find(|program| program.name == name) {
        (program.run)(arguments)
    } else {
        eprintln!("{PROGRAM}: there is no case or program `{name}`; --list shows them");
        return ExitCode::from(2);
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{name}: {error:?}");
            if let Some(seed) = settings::used_seed() {
                eprintln!("the seed was {seed}");
            }
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn names_of_cases_and_programs_are_unique() {
        let names = cases().map(|case| case.name);
        let names: Vec<_> = names.chain(programs().map(|p| p.name)).collect();
        let unique: HashSet<_> = names.iter().collect();
        assert_eq!(unique.len(), names.len());
    }
}
