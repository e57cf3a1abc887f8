// SPDX-License-Identifier: MIT OR Apache-2.0
//! Kernel modules, built by Kbuild in the toolbox with their output outside of the source tree, each kernel's in a folder of
//! its own: ours, and those that others of this folder name.

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
    let output = paths.for_kernel(&setup.kernel).join("module");
    let what = "driver: building farfault.ko";
    make(what, setup, &paths.repository, "guest-driver", &output, &[])?;
    Ok(output.join("farfault.ko"))
}

/// Checks the driver with clippy; warnings are errors.
///
/// # Errors
/// Clippy has something to say.
pub fn clippy_module(paths: &Paths, setup: &Setup) -> Result<()> {
    let output = paths.for_kernel(&setup.kernel).join("module-clippy");
    // Clippy speaks only about what it compiles, so it must compile all.
    paths::remove(&output)?;
    let more = ["CLIPPY=1", "KRUSTFLAGS=-Dwarnings"];
    let what = "driver: checking with clippy";
    make(
        what,
        setup,
        &paths.repository,
        "guest-driver",
        &output,
        &more,
    )
}

/// Builds the modules of one folder of a tree, all of which the build sees.
pub(super) fn make(
    what: &str,
    setup: &Setup,
    tree: &Path,
    folder: &str,
    output: &Path,
    more: &[&str],
) -> Result<()> {
    let step = Progress::start(what);
    paths::create_dir(output)?;
    let mut visible = setup.kernel.folders();
    visible.extend([tree, output]);
    let source = tree.join(folder);
    let mut make = setup.toolbox.make(tree, &visible);
    make.arg("--silent")
        .arg("-C")
        .arg(&setup.kernel.build)
        .arg(format!("M={}", source.display()))
        .arg(format!("MO={}", output.display()))
        .arg(setup.kernel.compiler.make_argument())
        .arg(format!("-j{}", jobs()))
        .args(more)
        .arg("modules");
    let log = output.with_extension("log");
    paths::remove(&log)?;
    let made = run_logged(make, what, &log);
    // What the compiler says belongs to the person who wrote the code, all of it.
    let said = fs::read(&log).map_err(Error::io(log.display().to_string()))?;
    match made {
        Ok(()) => step.done(),
        Err(_) => drop(step),
    }
    for line in String::from_utf8_lossy(&said).lines() {
        if !line.starts_with(NO_BTF) {
            eprintln!("{line}");
        }
    }
    made.map_err(|error| match error {
        Error::Tool { what, status, .. } => Error::Shown { what, status },
        other => other,
    })
}
