// SPDX-License-Identifier: MIT OR Apache-2.0
//! Programs that run in the guest: statically linked, so that the guest needs no libraries.

use std::{
    env, fs,
    path::{Path, PathBuf},
};

use crate::{
    Error, Paths, Result,
    build::device::{cargo_build, executables},
    paths,
    process::run_logged,
    progress::Progress,
    setup::Setup,
};

/// The target is named even though it is the host's own: only then do the flags spare build scripts and macros.
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// One program of the guest.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Program {
    /// Its name in the guest's `/bin`.
    pub name: String,
    /// Where it lies on the host.
    pub path: PathBuf,
}

/// Builds the init, the bins and examples of the user library, the bins of the tests and the examples in C.
///
/// # Errors
/// One does not compile.
pub fn guest_programs(paths: &Paths, setup: &Setup) -> Result<Vec<Program>> {
    let mut rustflags = env::var("RUSTFLAGS").unwrap_or_default();
    rustflags.push_str(" -C target-feature=+crt-static");
    let build = |what: &str, arguments: &[&str]| {
        let mut command = cargo_build(paths);
        command
            .args(["--target", TARGET])
            .args(arguments)
            .env_remove("CARGO_ENCODED_RUSTFLAGS")
            .env("RUSTFLAGS", &rustflags)
            // Names for backtraces stay; the rest would only make the guest's memory smaller.
            .env("CARGO_PROFILE_RELEASE_STRIP", "debuginfo");
        executables(command, what)
    };
    let mut programs = build(
        "guest: building programs",
        &[
            "--bins",
            "--package=farfault-init",
            "--package=farfault-profile",
            "--package=farfault",
            "--package=farfault-tests",
        ],
    )?;
    programs.extend(build(
        "guest: building examples",
        &["--examples", "--package=farfault"],
    )?);
    programs.extend(c_examples(paths, setup)?);
    let mut programs: Vec<Program> = programs.into_iter().filter_map(named).collect();
    programs.sort();
    Ok(programs)
}

fn named(path: PathBuf) -> Option<Program> {
    let name = path.file_name()?.to_str()?.to_owned();
    Some(Program { name, path })
}

fn c_examples(paths: &Paths, setup: &Setup) -> Result<Vec<PathBuf>> {
    let driver = paths.repository.join("guest-driver");
    let folder = driver.join("lib/examples");
    let output = paths.build().join("c");
    let log = output.join("log");
    paths::create_dir(&output)?;
    paths::remove(&log)?;
    let mut programs = Vec::new();
    for source in c_sources(&folder)? {
        let Some(name) = source.file_stem() else {
            continue;
        };
        let program = output.join(name);
        let step = Progress::start(format!("guest: compiling {}", name.to_string_lossy()));
        let mut gcc = setup
            .toolbox
            .command("gcc", &folder, &[&paths.repository, &output]);
        gcc.args([
            "-std=gnu11",
            "-Wall",
            "-Wextra",
            "-Werror",
            "-O2",
            "-static",
            "-I",
        ])
        .arg(driver.join("include"))
        .arg("-o")
        .arg(&program)
        .arg(&source);
        run_logged(gcc, &format!("compiling {}", source.display()), &log)?;
        step.done();
        programs.push(program);
    }
    Ok(programs)
}

fn c_sources(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut sources = Vec::new();
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(sources),
        Err(error) => return Err(Error::io(folder.display().to_string())(error)),
    };
    for entry in entries {
        let path = entry
            .map_err(Error::io(folder.display().to_string()))?
            .path();
        if path.extension().is_some_and(|extension| extension == "c") {
            sources.push(path);
        }
    }
    sources.sort();
    Ok(sources)
}
