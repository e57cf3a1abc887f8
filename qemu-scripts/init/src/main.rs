// SPDX-License-Identifier: MIT OR Apache-2.0
//! The guest's first process.
//!
//! As process 1 it mounts the file systems, starts one child (the agent, or a shell on the console), reaps what is
//! orphaned, and powers off when that child ends. The agent is a process of its own because process 1 must wait for
//! everybody's children, which would take the exit codes away from whoever started them.
//!
//! Errors are never fatal here, so that a half-working guest can still be looked at: they go to the console and, with the
//! agent's first message, to the host.

mod agent;
mod command;
mod prepare;
mod shell;

use std::{env, fs, process};

use farfault_init::MODE_KEY;
use rustix::{
    process::{Pid, WaitOptions, wait},
    system::{RebootCommand, reboot},
};

/// Tells the agent what went wrong before it ran.
const PROBLEMS_VARIABLE: &str = "FARFAULT_INIT_PROBLEMS";

fn main() {
    if env::args().nth(1).as_deref() == Some("agent") {
        let problems = env::var(PROBLEMS_VARIABLE).unwrap_or_default();
        let problems = problems.lines().map(str::to_owned).collect();
        if let Err(error) = agent::serve(problems) {
            eprintln!("farfault-init: the agent: {error}");
            process::exit(1);
        }
        return;
    }
    let mut problems = prepare::all();
    let shell = wants_shell(&mut problems);
    for problem in &problems {
        eprintln!("farfault-init: {problem}");
    }
    let mut child = if shell {
        shell::command()
    } else {
        agent_command(&problems)
    };
    match child.spawn() {
        Ok(child) => reap_until_ends(Pid::from_child(&child)),
        Err(error) => eprintln!("farfault-init: cannot start {child:?}: {error}"),
    }
    power_off();
}

fn agent_command(problems: &[String]) -> process::Command {
    let mut command = process::Command::new("/proc/self/exe");
    command
        .arg("agent")
        .env(PROBLEMS_VARIABLE, problems.join("\n"));
    command
}

fn wants_shell(problems: &mut Vec<String>) -> bool {
    match fs::read_to_string("/proc/cmdline") {
        Ok(line) => {
            let mode = line
                .split_whitespace()
                .find_map(|word| word.strip_prefix(MODE_KEY)?.strip_prefix('='));
            mode == Some("shell")
        }
        Err(error) => {
            problems.push(format!("/proc/cmdline: {error}"));
            false
        }
    }
}

fn reap_until_ends(child: Pid) {
    loop {
        match wait(WaitOptions::empty()) {
            Ok(Some((pid, _))) if pid == child => return,
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => {
                eprintln!("farfault-init: waiting for children: {error}");
                return;
            }
        }
    }
}

fn power_off() {
    rustix::fs::sync();
    if let Err(error) = reboot(RebootCommand::PowerOff) {
        eprintln!("farfault-init: cannot power off: {error}");
    }
    // Process 1 must not return while the machine still runs: the kernel would panic. It does so on purpose here, which ends
    // a VM that can't be powered off.
}
