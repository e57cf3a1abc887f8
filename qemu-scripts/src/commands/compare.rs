// SPDX-License-Identifier: MIT OR Apache-2.0
//! `cargo xtask hmm-compare`: the same calls to the kernel's mock device and to Farfault's nodes, in one VM; the answers
//! must be the same, line by line.

mod shrink;

use std::{
    fs,
    io::{Read, stdin},
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context, bail};
use farfault_init::{DRIVER_PATH, MOCK_PATH};
use xtask::{
    Options, Prepared,
    build::Extra,
    vm::{Config, Driver, Vm},
};

const PROGRAM: &str = "hmm-compare";
const VRAM: &str = "256M";
/// How long a script may take.
const LIMIT: Duration = Duration::from_secs(120);
const COMMAND_LIMIT: Duration = Duration::from_secs(60);
/// Lines before a difference that are shown.
const CONTEXT: usize = 12;
/// Where a script of the host's goes in the guest, and how much of it at a time: a command line has its limits.
const GUEST_SCRIPT: &str = "/tmp/script";
const PIECE: usize = 64 << 10;
/// In these cases test_hmm asks for memory that no machine has, and the kernel reports who did that, with a stack.
const WARNS: &str = "vmalloc::";

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Only cases whose name contains this
    filter: Option<String>,
    /// Only random steps, from this seed
    #[arg(long, value_name = "N", conflicts_with_all = ["filter", "script"])]
    seed: Option<u64>,
    /// How many random scripts, of consecutive seeds
    #[arg(long, value_name = "N", default_value_t = 1)]
    seeds: u64,
    /// Random steps of each
    #[arg(long, value_name = "N", default_value_t = 300)]
    steps: u64,
    /// Only this script, or transcript; `-` is standard input
    #[arg(long, value_name = "FILE", conflicts_with = "filter")]
    script: Option<PathBuf>,
    /// Compare the numbers of faults, too
    #[arg(long)]
    faults: bool,
    /// Leave out steps of the first script that differs, as long as it still does
    #[arg(long, conflicts_with = "only")]
    shrink: bool,
    /// Run on one driver only, and print the transcripts
    #[arg(long, value_enum)]
    only: Option<Side>,
}

/// Whose nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Side {
    /// The kernel's mock device
    #[value(name = "test_hmm")]
    Mock,
    /// Ours
    #[value(name = "farfault")]
    Ours,
}

/// What one run of the program is.
struct Script {
    name: String,
    /// Arguments of the program, or a line of shell with it.
    command: String,
    /// The options that repeat it.
    repeat: String,
}

/// What a script has printed on a driver, and how it ended.
#[derive(Debug, PartialEq, Eq)]
struct Transcript {
    lines: Vec<String>,
    end: String,
}

impl Side {
    fn module(self) -> (&'static str, String) {
        match self {
            Self::Mock => ("test_hmm", MOCK_PATH.to_owned()),
            Self::Ours => ("farfault", format!("{DRIVER_PATH} dmirror=1")),
        }
    }
}

pub(crate) fn run(options: &Options, arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let config = Config {
        name: PROGRAM.to_owned(),
        gpus: 2,
        vram: VRAM.to_owned(),
        driver: Driver::None,
        repeat: Some(format!("cargo xtask {PROGRAM}, with the same options")),
        ..Config::default()
    };
    let prepared = Prepared::with(options, Extra::Suite)?;
    let mut vm = Vm::boot(&prepared, &config)?;
    shell(&mut vm, &format!("{PROGRAM} prepare"))?;
    let scripts = scripts(&mut vm, arguments)?;
    let sides = arguments
        .only
        .map_or(vec![Side::Mock, Side::Ours], |side| vec![side]);
    let mut transcripts = Vec::new();
    for side in sides {
        transcripts.push(transcripts_of(&mut vm, &scripts, side, arguments.faults)?);
    }
    let mut different = Vec::new();
    for (index, script) in scripts.iter().enumerate() {
        let of_script: Vec<_> = transcripts
            .iter()
            .filter_map(|side| side.get(index))
            .collect();
        match of_script[..] {
            [mock, ours] if !compare(script, mock, ours) => different.push(mock),
            [only] => show(script, only),
            _ => {}
        }
    }
    if let (true, Some(first)) = (arguments.shrink, different.first()) {
        let shortest = shrink::shrink(&mut vm, first.lines.clone(), arguments.faults)?;
        println!("the shortest script found that differs:");
        shortest.iter().for_each(|line| println!("    {line}"));
    }
    vm.shutdown()?;
    let different = different.len();
    println!(
        "{PROGRAM}: {} scripts, {different} with differences",
        scripts.len()
    );
    Ok(if different == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// What is to be run.
fn scripts(vm: &mut Vm, arguments: &Arguments) -> anyhow::Result<Vec<Script>> {
    let mut scripts = Vec::new();
    if let Some(file) = &arguments.script {
        scripts.push(from_file(vm, file)?);
    }
    if arguments.script.is_none() && arguments.seed.is_none() {
        let cases = shell(vm, &format!("{PROGRAM} --list"))?;
        let filter = arguments.filter.as_deref().unwrap_or_default();
        scripts.extend(
            cases
                .lines()
                .filter(|name| name.contains(filter))
                .map(|name| Script {
                    name: name.to_owned(),
                    command: format!("case {name}"),
                    repeat: name.to_owned(),
                }),
        );
    }
    if arguments.script.is_none() && arguments.filter.is_none() {
        let (first, steps) = (arguments.seed.unwrap_or(1), arguments.steps);
        scripts.extend(
            (first..first.saturating_add(arguments.seeds)).map(|seed| Script {
                name: format!("random steps of seed {seed}"),
                command: format!("random {seed} {steps}"),
                repeat: format!("--seed {seed} --steps {steps}"),
            }),
        );
    }
    if scripts.is_empty() {
        bail!(
            "no case has this in its name: {}",
            arguments.filter.as_deref().unwrap_or_default()
        );
    }
    Ok(scripts)
}

fn from_file(vm: &mut Vm, file: &Path) -> anyhow::Result<Script> {
    let mut text = String::new();
    if file.as_os_str() == "-" {
        stdin().read_to_string(&mut text)?;
    } else {
        text = fs::read_to_string(file).with_context(|| format!("reading {}", file.display()))?;
    }
    let lines: Vec<_> = text.lines().map(str::to_owned).collect();
    Ok(Script {
        name: file.display().to_string(),
        command: put_script(vm, 0, &lines)?,
        repeat: format!("--script {}", file.display()),
    })
}

/// Puts a script into the guest; the command that runs it.
fn put_script(vm: &mut Vm, number: usize, lines: &[String]) -> anyhow::Result<String> {
    let path = format!("{GUEST_SCRIPT}{number}");
    shell(vm, &format!(": > {path}"))?;
    let append = format!("printf %s \"$1\" >> {path}");
    let mut piece = String::new();
    for (index, line) in lines.iter().enumerate() {
        piece.push_str(line);
        piece.push('\n');
        if piece.len() > PIECE || index + 1 == lines.len() {
            let words = ["sh", "-ec", &append, "sh", &piece];
            vm.run(&words, COMMAND_LIMIT)?.expect_success()?;
            piece.clear();
        }
    }
    Ok(format!("script < {path}"))
}

/// Runs all scripts on one driver.
fn transcripts_of(
    vm: &mut Vm,
    scripts: &[Script],
    side: Side,
    faults: bool,
) -> anyhow::Result<Vec<Transcript>> {
    let (name, module) = side.module();
    shell(vm, &format!("insmod {module}; test -c /dev/hmm_dmirror1"))?;
    let mut transcripts = Vec::new();
    for script in scripts {
        let faults = if faults { "--faults " } else { "" };
        let quiet = side == Side::Mock && script.name.starts_with(WARNS);
        if quiet {
            shell(vm, "dmesg -n 1")?;
        }
        let line = format!("{PROGRAM} {faults}{}", script.command);
        let output = vm.run(&["sh", "-c", &line], LIMIT)?;
        if quiet {
            shell(vm, "dmesg -n 8")?;
        }
        vm.check().with_context(|| {
            let (said, repeat) = (output.stdout_text(), &script.repeat);
            format!(
                "{} on {name} (cargo xtask {PROGRAM} {repeat}):\n{said}",
                script.name
            )
        })?;
        let end = match (output.code, output.signal) {
            (Some(code), _) => format!("exit code {code} {}", output.stderr_text()),
            (None, signal) => format!("signal {signal:?}"),
        };
        let lines = output.stdout_text().lines().map(str::to_owned).collect();
        transcripts.push(Transcript {
            lines,
            end: end.trim().to_owned(),
        });
    }
    shell(vm, &format!("rmmod {name}"))?;
    vm.check()
        .with_context(|| format!("after the end of {name}"))?;
    Ok(transcripts)
}

/// Runs a line of shell, which must succeed; what it prints.
fn shell(vm: &mut Vm, line: &str) -> anyhow::Result<String> {
    let output = vm.run(&["sh", "-ec", line], COMMAND_LIMIT)?;
    Ok(output.expect_success()?.stdout_text())
}

/// Says where two transcripts differ first.
fn compare(script: &Script, mock: &Transcript, ours: &Transcript) -> bool {
    const WELL: &str = "exit code 0";
    if mock == ours && mock.end == WELL {
        println!("same    {} ({} lines)", script.name, mock.lines.len());
        return true;
    }
    println!("DIFFERS {}", script.name);
    let same = mock
        .lines
        .iter()
        .zip(&ours.lines)
        .take_while(|(mock, ours)| mock == ours)
        .count();
    for line in &mock.lines[same.saturating_sub(CONTEXT)..same] {
        println!("    both      {line}");
    }
    for (name, transcript) in [("test_hmm", mock), ("farfault", ours)] {
        match transcript.lines.get(same) {
            Some(line) => println!("  > {name}  {line}"),
            None => println!("  > {name}  ended after {same} lines: {}", transcript.end),
        }
    }
    println!("  repeat it with: cargo xtask {PROGRAM} {}", script.repeat);
    false
}

fn show(script: &Script, transcript: &Transcript) {
    println!("# {}", script.name);
    for line in &transcript.lines {
        println!("{line}");
    }
    println!("# {}\n", transcript.end);
}
