// SPDX-License-Identifier: MIT OR Apache-2.0
//! `cargo xtask fuzz`: the device's fuzz targets under cargo-fuzz, one after the other. No VM.
//!
//! What is found interesting goes to cargo's target folder; the corpus of the repository is only read.

use std::{
    env, fs,
    process::{Command, ExitCode, Stdio},
};

use anyhow::{Context, bail};
use xtask::{
    Options, Paths,
    process::{bound, spawn},
};

/// The package, seen from the repository.
const FOLDER: &str = "device/fuzz";
/// What a target may use, in MiB, and how long one input may take, in seconds.
const MEMORY: u32 = 2048;
const TIME: u32 = 20;

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// The target; without it all, one after the other
    target: Option<String>,
    /// How long each runs
    #[arg(long, value_name = "N", default_value_t = 1)]
    minutes: u32,
}

pub(crate) fn run(options: &Options, arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let paths = Paths::new(options)?;
    let all = targets(&paths)?;
    let chosen = match &arguments.target {
        None => all,
        Some(name) if all.contains(name) => vec![name.clone()],
        Some(name) => bail!("there is no target {name}; there are {}", all.join(", ")),
    };
    check_tools()?;
    for target in &chosen {
        println!("{target}: {} min", arguments.minutes);
        let status = spawn(fuzz(&paths, target, arguments.minutes)?)
            .and_then(|mut child| child.wait())
            .context("running cargo fuzz")?;
        if !status.success() {
            bail!(
                "{target} ended with {status}; what it found, and how to repeat it, stands above"
            );
        }
    }
    println!("no finding in {}", chosen.join(", "));
    Ok(ExitCode::SUCCESS)
}

/// Each file of `fuzz_targets/` is one.
fn targets(paths: &Paths) -> anyhow::Result<Vec<String>> {
    let folder = paths.repository.join(FOLDER).join("fuzz_targets");
    let mut names = Vec::new();
    for file in fs::read_dir(&folder).with_context(|| folder.display().to_string())? {
        let path = file?.path();
        names.extend(path.file_stem().map(|name| name.to_string_lossy().into()));
    }
    names.sort();
    Ok(names)
}

fn check_tools() -> anyhow::Result<()> {
    for (program, argument, mend) in [
        (
            "cargo-fuzz",
            "--version",
            "cargo install cargo-fuzz --locked",
        ),
        ("c++", "--version", "apt-get install g++"),
    ] {
        let mut command = Command::new(program);
        command.arg(argument).stdout(Stdio::null());
        if command.status().is_err() {
            bail!("{program} is not there\n  to mend it: {mend}");
        }
    }
    Ok(())
}

fn fuzz(paths: &Paths, target: &str, minutes: u32) -> anyhow::Result<Command> {
    let found = paths.build().join("fuzz").join(target);
    fs::create_dir_all(&found).with_context(|| found.display().to_string())?;
    let mut command = bound(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command
        .args(["fuzz", "run", "--fuzz-dir", FOLDER])
        .args(["--features", "libfuzzer", target])
        // New inputs go to the first folder.
        .arg(&found)
        .arg(paths.repository.join(FOLDER).join("corpus").join(target))
        .arg("--")
        .arg(format!("-max_total_time={}", minutes.saturating_mul(60)))
        .arg(format!("-rss_limit_mb={MEMORY}"))
        .arg(format!("-timeout={TIME}"))
        // The sanitizer's flags are unstable; with this a stable compiler takes them.
        .env("RUSTC_BOOTSTRAP", "1")
        .current_dir(&paths.repository);
    Ok(command)
}
