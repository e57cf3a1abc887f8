// SPDX-License-Identifier: MIT OR Apache-2.0
//! Programs that users meet first: the examples and the demo. They run as they are.

use super::{
    HostCase,
    inside::guest,
    machines::{After, Machines},
};
use anyhow::{Context, Result, ensure};
use farfault_tests::guest;
use farfault_tests::guest::Machine;
use std::time::Duration;
use xtask::vm::Vm;

const EXAMPLE: Duration = Duration::from_secs(60);
const DEMO: Duration = Duration::from_secs(180);

pub(crate) const CASES: &[HostCase] = &[
    HostCase {
        name: "programs::guest_tests_in_the_vm_are_those_of_this_build",
        machine: Machine::Small,
        after: After::Keep,
        run: guest_tests_in_the_vm_are_those_of_this_build,
    },
    HostCase {
        name: "programs::first_example_in_rust_works",
        machine: Machine::Small,
        after: After::Keep,
        run: first_example_in_rust_works,
    },
    HostCase {
        name: "programs::first_example_in_c_works",
        machine: Machine::Small,
        after: After::Keep,
        run: first_example_in_c_works,
    },
    HostCase {
        name: "programs::demo_ends_with_ok",
        machine: Machine::Small,
        after: After::Keep,
        run: demo_ends_with_ok,
    },
];

fn guest_tests_in_the_vm_are_those_of_this_build(vm: &mut Vm, machines: &Machines) -> Result<()> {
    let list = guest(vm, machines, &["--list"], EXAMPLE)?.stdout_text();
    let names = guest::cases().map(|case| case.name);
    let names = names.chain(guest::programs().map(|program| program.name));
    ensure!(
        list.lines().eq(names),
        "the initramfs is of another build:\n{list}"
    );
    Ok(())
}

fn prints(vm: &mut Vm, machines: &Machines, program: &str, text: &str) -> Result<()> {
    let output = vm
        .run(&[program], machines.limit(EXAMPLE))?
        .expect_success()?;
    let printed = output.stdout_text();
    ensure!(printed.contains(text), "`{text}` is not in:\n{printed}");
    Ok(())
}

fn first_example_in_rust_works(vm: &mut Vm, machines: &Machines) -> Result<()> {
    prints(vm, machines, "first", "the last word is 42")
}

fn first_example_in_c_works(vm: &mut Vm, machines: &Machines) -> Result<()> {
    prints(vm, machines, "first_c", "the last word is 42")
}

fn demo_ends_with_ok(vm: &mut Vm, machines: &Machines) -> Result<()> {
    let output = vm
        .run(&["farfault-demo"], machines.limit(DEMO))?
        .expect_success()?;
    let printed = output.stdout_text();
    let last = printed.lines().last().context("it printed nothing")?;
    ensure!(last == "demo: ok", "the last line is `{last}`:\n{printed}");
    ensure!(
        !printed.contains('\u{1b}'),
        "it has colours without a terminal"
    );
    Ok(())
}
