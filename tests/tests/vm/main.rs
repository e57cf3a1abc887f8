// SPDX-License-Identifier: MIT OR Apache-2.0
//! Tests that boot a VM: `cargo xtask test`, or by hand `cargo test -p farfault-tests --test vm`.
//!
//! The command line is libtest's, so a filter, `--list`, `--exact` and cargo-nextest work. Each case
//! is a test of its own: those of the guest (`farfault_tests::guest`) and those here, in which the
//! host takes part. `FARFAULT_SUITE`, `FARFAULT_SEED` and `FARFAULT_MINUTES` are what `cargo xtask test` has as
//! options. A process of some cases shares VMs among them, a process of one boots its own.
//!
//! | module | what it does |
//! | --- | --- |
//! | `machines` | boots VMs, shares them among cases, checks them after each |
//! | `inside` | what GPU and driver say about themselves |
//! | `programs`, `tables`, `lifecycle`, `mirrors`, `hotplug`, `sleep`, `injection`, `memory_failure` | the cases of the host |
//! | `death`, `loss`, `resident` | the same, of GPUs that die |

mod death;
mod hotplug;
mod injection;
mod inside;
mod lifecycle;
mod loss;
mod machines;
mod memory_failure;
mod mirrors;
mod programs;
mod resident;
mod sleep;
mod tables;

use farfault_tests::guest::Machine;
use libtest_mimic::{Arguments, Failed, Trial};
use machines::{After, Machines};
use rustix::process::getppid;
use std::{process::ExitCode, sync::Arc, thread, time::Duration};
use xtask::vm::Vm;

/// A case in which the host takes part.
struct HostCase {
    name: &'static str,
    machine: Machine,
    after: After,
    run: fn(&mut Vm, &Machines) -> anyhow::Result<()>,
}

fn host_cases() -> impl Iterator<Item = &'static HostCase> {
    let groups = [
        programs::CASES,
        tables::CASES,
        lifecycle::CASES,
        mirrors::CASES,
        injection::CASES,
        memory_failure::CASES,
        hotplug::CASES,
        sleep::CASES,
        death::CASES,
        loss::CASES,
        resident::CASES,
    ];
    groups.into_iter().flatten()
}

fn trials(machines: &Arc<Machines>, shows_output: bool) -> Vec<Trial> {
    let mut trials = Vec::new();
    let mut add = |machine, name: &'static str, after, run: Body| {
        if !machines.are_asked_for(name) {
            return;
        }
        let machines = Arc::clone(machines);
        let test = move || {
            let result = machines.run(machine, after, |vm| run(vm, &machines));
            result.map_err(|error| {
                let repeat = machines.repeat(name);
                Failed::from(format!("{error:?}\nrun it again with: {repeat}"))
            })
        };
        trials.push((machine, Trial::test(name, test)));
    };
    for case in farfault_tests::guest::cases() {
        let run = move |vm: &mut Vm, machines: &Machines| {
            let limit = Duration::from_secs(case.seconds);
            let output = inside::guest(vm, machines, &[case.name], limit)?;
            if let Some(reason) = inside::skipped(&output) {
                machines.skip(case.name, &reason);
            }
            if shows_output {
                // Figures, mostly. A case that fails shows its output in any case.
                eprint!("{}", output.stdout_text());
            }
            Ok(())
        };
        add(case.machine, case.name, After::Keep, Box::new(run));
    }
    for case in host_cases() {
        add(case.machine, case.name, case.after, Box::new(case.run));
    }
    // Cases that share a VM run one after the other.
    trials.sort_by_key(|(machine, _)| *machine);
    trials.into_iter().map(|(_, trial)| trial).collect()
}

type Body = Box<dyn Fn(&mut Vm, &Machines) -> anyhow::Result<()> + Send>;

/// VMs end with this process, and it ends with the one that started it: whoever kills `cargo xtask test` leaves none
/// behind.
fn end_with_parent() {
    let parent = getppid();
    thread::spawn(move || {
        while getppid() == parent {
            thread::sleep(Duration::from_secs(1));
        }
        eprintln!("error: whoever started the tests has ended, so they end, too");
        std::process::exit(2);
    });
}

fn main() -> ExitCode {
    end_with_parent();
    let mut arguments = Arguments::from_args();
    // More than one VM at a time would only make all of them slow.
    arguments.test_threads.get_or_insert(1);
    let machines = match Machines::from_env() {
        Ok(machines) => Arc::new(machines),
        Err(error) => {
            eprintln!("error: {error}");
            return ExitCode::from(2);
        }
    };
    if !arguments.list {
        eprintln!("{}", machines.seed_told());
    }
    let conclusion = libtest_mimic::run(&arguments, trials(&machines, arguments.nocapture));
    match machines.finish(conclusion.num_passed) {
        Ok(()) => conclusion.exit_code(),
        Err(error) => {
            eprintln!("error: {error:?}");
            ExitCode::from(101)
        }
    }
}
