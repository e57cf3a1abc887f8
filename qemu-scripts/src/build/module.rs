// SPDX-License-Identifier: MIT OR Apache-2.0
//! The kernel module, built by Kbuild in the toolbox with its output outside of the source tree.

use std::{
    fs,
    path::{Path, PathBuf},
};

use crate::{
    Error, Paths, Result, paths,
    process::run_logged,
    progress::Progress,
    setup::{Setup, kernel::jobs},
};

/// Said for every module that is built without the kernel's own debug data, and of no interest.
const NO_BTF: &str = "Skipping BTF generation";

/// Builds the driver and returns `farfault.ko`.
///
/// # Errors
/// It does not compile.
pub fn module(paths: &Paths, setup: &Setup) -> Result<PathBuf> {
    let output = paths.build().join("module");
    make(paths, setup, &output, &[])?;
    Ok(output.join("farfault.ko"))
}

/// Checks the driver with clippy; warnings are errors.
///
/// # Errors
/// Clippy has something to say.
pub fn clippy_module(paths: &Paths, setup: &Setup) -> Result<()> {
    let output = paths.build().join("module-clippy");
    // Clippy speaks only about what it compiles, so it must compile all.
    paths::remove(&output)?;
    make(
        paths,
        setup,
        &output,
        &["CLIPPY=1", "KRUSTFLAGS=-Dwarnings"],
    )
}

fn make(paths: &Paths, setup: &Setup, output: &Path, more: &[&str]) -> Result<()> {
    let what = "building the driver";
    let step = Progress::start("driver: building farfault.ko");
    paths::create_dir(output)?;
    let mut visible = setup.kernel.folders();
    visible.extend([paths.repository.as_path(), output]);
    let mut make = setup.toolbox.command("make", &paths.repository, &visible);
    make.arg("--silent")
        .arg("-C")
        .arg(&setup.kernel.build)
        .arg(format!(
            "M={}",
            paths.repository.join("guest-driver").display()
        ))
        .arg(format!("MO={}", output.display()))
        .arg(format!("CC={}", setup.kernel.cc))
        .arg(format!("-j{}", jobs()))
        .args(more)
        .arg("modules");
    let log = paths.build().join("module.log");
    paths::remove(&log)?;
    let made = run_logged(make, what, &log);
    // What the compiler says belongs to the person who wrote the code, all of it.
    let said = fs::read(&log).map_err(Error::io(log.display().to_string()))?;
    let said = String::from_utf8_lossy(&said);
    let worth_reading: Vec<&str> = said
        .lines()
        .filter(|line| !line.starts_with(NO_BTF))
        .collect();
    match made {
        Ok(()) => step.done(),
        Err(_) => drop(step),
    }
    for line in worth_reading {
        eprintln!("{line}");
    }
    made.map_err(|error| match error {
        Error::Tool { what, status, .. } => Error::Shown { what, status },
        other => other,
    })
}
