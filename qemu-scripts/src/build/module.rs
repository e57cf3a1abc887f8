// SPDX-License-Identifier: MIT OR Apache-2.0
//! The kernel module, built by Kbuild in the toolbox with its output outside of the source tree.

use std::{
    path::{Path, PathBuf},
    process::Stdio,
};

use crate::{
    Error, Paths, Result, paths,
    process::spawn,
    progress::Progress,
    setup::{Setup, kernel::jobs},
};

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
        .arg("modules")
        .stdin(Stdio::null())
        // What the compiler says belongs to the person who wrote the code; standard output is not for it.
        .stdout(std::io::stderr());
    let what = "building the driver";
    let status = spawn(make)
        .and_then(|mut child| child.wait())
        .map_err(Error::io(what))?;
    if !status.success() {
        return Err(Error::Shown {
            what: what.to_owned(),
            status,
        });
    }
    step.done();
    Ok(())
}
