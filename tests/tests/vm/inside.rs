// SPDX-License-Identifier: MIT OR Apache-2.0
//! What can be seen of a GPU: from outside by its control socket, from the guest by the driver's
//! debugfs; and how programs are run there.

use super::machines::Machines;
use anyhow::{Context, Result, ensure};
use farfault_tests::guest::{PROGRAM, SKIPPED, programs::DATA_RIGHT};
use serde::{Deserialize, de::DeserializeOwned};
use std::{
    thread,
    time::{Duration, Instant},
};
use xtask::vm::{GuestProcess, Output, Vm};

/// Files are closed, jobs end and pages go back a moment after their process has ended.
const SETTLED: Duration = Duration::from_secs(20);
const COMMAND: Duration = Duration::from_secs(30);

/// A context, as `farfault-device inspect contexts --json` has it.
#[derive(Debug, Deserialize)]
pub(crate) struct GpuContext {
    pub(crate) context: u32,
}

/// Where a mapping leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Aperture {
    Vram,
    System,
}

/// Neighbouring pages that are mapped alike.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Mapping {
    pub(crate) start: u64,
    pub(crate) length: u64,
    pub(crate) aperture: Aperture,
    pub(crate) address: u64,
    pub(crate) writable: bool,
    pub(crate) atomic: bool,
    pub(crate) huge: bool,
}

/// What a context's page tables map.
#[derive(Debug, Deserialize)]
pub(crate) struct PageTables {
    pub(crate) mappings: Vec<Mapping>,
    pub(crate) bad_entries: u64,
    pub(crate) truncated: bool,
}

fn inspect<T: DeserializeOwned>(vm: &mut Vm, gpu: usize, topic: &[&str]) -> Result<T> {
    let arguments = [&["inspect", "--json"], topic].concat();
    let text = vm.device(gpu)?.command(&arguments)?;
    serde_json::from_str(&text).with_context(|| format!("inspect {topic:?} printed {text}"))
}

/// The contexts of a GPU.
pub(crate) fn contexts(vm: &mut Vm, gpu: usize) -> Result<Vec<GpuContext>> {
    inspect(vm, gpu, &["contexts"])
}

/// The page tables of a context.
pub(crate) fn page_tables(vm: &mut Vm, gpu: usize, context: u32) -> Result<PageTables> {
    inspect(vm, gpu, &["page-table", &context.to_string()])
}

/// What the driver counts of its GPUs that must be zero when nobody uses them.
const DRIVER_HOLDS: [&str; 3] = ["contexts", "vram_pages_used", "vram_pages_in_folios"];

/// What a case has left in the driver and its GPUs.
fn left(vm: &mut Vm, gpus: usize) -> Result<Vec<String>> {
    let mut left = Vec::new();
    // A GPU that was bound again may have another number.
    let cat = "cat /sys/kernel/debug/farfault*/stats";
    let text = vm
        .run(&["sh", "-c", cat], COMMAND)?
        .expect_success()?
        .stdout_text();
    for name in DRIVER_HOLDS {
        let lines = text.lines().filter_map(|line| line.split_once(' '));
        let counts: Vec<_> = lines
            .filter(|line| line.0 == name)
            .map(|line| line.1)
            .collect();
        ensure!(counts.len() == gpus, "{gpus} GPUs, and debugfs has\n{text}");
        left.extend(
            counts
                .iter()
                .filter(|count| **count != "0")
                .map(|count| format!("{count} {name} in the driver")),
        );
    }
    for gpu in 0..gpus {
        if !vm.device(gpu)?.is_alive()? {
            continue;
        }
        for topic in ["contexts", "jobs", "faults"] {
            let items: Vec<serde_json::Value> = inspect(vm, gpu, &[topic])?;
            if !items.is_empty() {
                left.push(format!("{} {topic} in GPU {gpu}", items.len()));
            }
        }
    }
    Ok(left)
}

/// Driver and GPUs hold nothing of what has run.
pub(crate) fn ensure_nothing_left(vm: &mut Vm, gpus: usize) -> Result<()> {
    let deadline = Instant::now() + SETTLED;
    loop {
        let left = left(vm, gpus)?;
        if left.is_empty() {
            return Ok(());
        }
        ensure!(
            Instant::now() < deadline,
            "it has leaked: {}",
            left.join(", ")
        );
        thread::sleep(Duration::from_millis(50));
    }
}

/// The command line of a case or program of the guest.
pub(crate) fn command(machines: &Machines, arguments: &[&str]) -> Vec<String> {
    let arguments = arguments.iter().map(|argument| (*argument).to_owned());
    [PROGRAM.to_owned()]
        .into_iter()
        .chain(machines.settings())
        .chain(arguments)
        .collect()
}

/// Runs a case or program of the guest; it must succeed.
pub(crate) fn guest(
    vm: &mut Vm,
    machines: &Machines,
    arguments: &[&str],
    limit: Duration,
) -> Result<Output> {
    let limit = machines.limit(limit) + machines.minutes();
    Ok(vm
        .run(&command(machines, arguments), limit)?
        .expect_success()?)
}

/// Why a case of the guest did nothing, if it says so.
pub(crate) fn skipped(output: &Output) -> Option<String> {
    let text = output.stdout_text();
    let reason = text.lines().find_map(|line| line.strip_prefix(SKIPPED))?;
    Some(reason.to_owned())
}

/// Starts a program of the guest and waits until it says so.
pub(crate) fn start(
    vm: &Vm,
    machines: &Machines,
    program: &str,
    word: &str,
) -> Result<GuestProcess> {
    let process = vm.spawn(&command(machines, &[program]))?;
    process.wait_for(word, machines.limit(COMMAND))?;
    Ok(process)
}

/// Lets a program go on, to its good end.
pub(crate) fn go_on(process: GuestProcess, machines: &Machines, limit: Duration) -> Result<Output> {
    process.write_stdin(b"go\n")?;
    Ok(process.wait(machines.limit(limit))?.expect_success()?)
}

/// A program that works for ever lost its GPU: it ended by itself with an error that says so, and its data is
/// right. A signal would mean that data had gone.
pub(crate) fn ensure_lost_gpu_and_right_data(output: &Output) -> Result<()> {
    let said = output.stderr_text();
    ensure!(output.code == Some(1), "{}: {output:?}", output.command);
    // ENODEV of a call, or the end of a job that ran.
    let lost = ["os error 19", "DeviceLost", "Killed"];
    ensure!(
        lost.iter().any(|error| said.contains(error)),
        "{} ended with another error: {said}",
        output.command
    );
    ensure!(
        output.stdout_text().lines().any(|line| line == DATA_RIGHT),
        "{}: wrong data: {said}",
        output.command
    );
    Ok(())
}

/// Runs a line of shell in the guest.
pub(crate) fn shell(
    vm: &mut Vm,
    machines: &Machines,
    line: &str,
    limit: Duration,
) -> Result<Output> {
    Ok(vm.run(&["sh", "-ec", line], machines.limit(limit))?)
}
