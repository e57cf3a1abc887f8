// SPDX-License-Identifier: MIT OR Apache-2.0
//! Building with cargo: the device, and what the other builds need of it.

use std::{
    io::BufReader,
    path::PathBuf,
    process::{Command, Stdio},
};

use cargo_metadata::Message;

use crate::{
    Error, Paths, Result,
    paths::cargo,
    process::{bound, spawn},
    progress::Progress,
};

/// Builds the device and returns its program.
///
/// # Errors
/// It does not compile.
pub fn device(paths: &Paths) -> Result<PathBuf> {
    let mut command = cargo_build(paths);
    command.args(["--package", "farfault-device", "--bins"]);
    let programs = executables(command, "device: building")?;
    let program = programs
        .into_iter()
        .find(|program| program.ends_with("farfault-device"));
    program.ok_or_else(|| Error::vm("package farfault-device has no program farfault-device"))
}

/// An optimised build in this workspace, its messages readable by [`executables`].
pub(super) fn cargo_build(paths: &Paths) -> Command {
    let mut command = bound(cargo());
    command
        .args([
            "build",
            "--quiet",
            "--release",
            "--message-format=json-render-diagnostics",
        ])
        .current_dir(&paths.repository);
    command
}

/// Runs such a build and returns the programs that it made.
pub(super) fn executables(mut command: Command, what: &str) -> Result<Vec<PathBuf>> {
    let step = Progress::start(what);
    let failed = || Error::io(format!("{what}: cargo"));
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    let mut child = spawn(command).map_err(failed())?;
    let stdout = child
        .stdout
        .take()
        .ok_or_else(|| Error::vm(format!("{what}: cargo has no output")))?;
    let mut programs = Vec::new();
    for message in Message::parse_stream(BufReader::new(stdout)) {
        if let Message::CompilerArtifact(artifact) = message.map_err(failed())? {
            programs.extend(
                artifact
                    .executable
                    .map(cargo_metadata::camino::Utf8PathBuf::into_std_path_buf),
            );
        }
    }
    let status = child.wait().map_err(failed())?;
    if !status.success() {
        let what = what.to_owned();
        return Err(Error::Shown { what, status });
    }
    step.done();
    Ok(programs)
}
