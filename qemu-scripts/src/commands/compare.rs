// SPDX-License-Identifier: MIT OR Apache-2.0
//! `cargo xtask hmm-compare`: the same calls to the kernel's mock device and to Farfault's nodes, in one VM; the answers
//! must be the same, line by line.

mod machine;
mod shrink;

use std::{
    fs,
    io::{Read, stdin},
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context, bail};
use xtask::Options;

use machine::{Machine, Run, Script, Side, Transcript};

const PROGRAM: &str = "hmm-compare";
/// Lines before a difference that are shown.
const CONTEXT: usize = 12;

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

pub(crate) fn run(options: &Options, arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let mut machine = Machine::new(options, arguments.faults)?;
    let scripts = scripts(&mut machine, arguments)?;
    let sides = arguments
        .only
        .map_or(vec![Side::Mock, Side::Ours], |side| vec![side]);
    let mut transcripts = Vec::new();
    for side in sides {
        transcripts.push(machine.transcripts(&scripts, side)?);
    }
    let mut different = Vec::new();
    for (index, script) in scripts.iter().enumerate() {
        let of_script: Vec<_> = transcripts
            .iter()
            .filter_map(|side| side.get(index))
            .collect();
        match of_script[..] {
            [mock, ours] if !compare(script, mock, ours) => different.push(mock),
            [only] if !show(script, only) => different.push(only),
            _ => {}
        }
    }
    if let (true, Some(first)) = (arguments.shrink, different.first()) {
        let shortest = shrink::shrink(&mut machine, first.lines.clone())?;
        println!("the shortest script found that differs:");
        shortest.iter().for_each(|line| println!("    {line}"));
    }
    machine.end()?;
    let (scripts, different) = (scripts.len(), different.len());
    println!("{PROGRAM}: {scripts} scripts, {different} with differences or trouble");
    Ok(if different == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// What is to be run.
fn scripts(machine: &mut Machine, arguments: &Arguments) -> anyhow::Result<Vec<Script>> {
    if let Some(file) = &arguments.script {
        return Ok(vec![from_file(file)?]);
    }
    let mut scripts = Vec::new();
    if arguments.seed.is_none() {
        let filter = arguments.filter.as_deref().unwrap_or_default();
        let cases = machine.cases()?.into_iter();
        scripts.extend(
            cases
                .filter(|name| name.contains(filter))
                .map(|name| Script {
                    repeat: name.clone(),
                    name: name.clone(),
                    run: Run::Case(name),
                }),
        );
    }
    if arguments.filter.is_none() {
        let (first, steps) = (arguments.seed.unwrap_or(1), arguments.steps);
        let seeds = first..first.saturating_add(arguments.seeds);
        scripts.extend(seeds.map(|seed| Script {
            name: format!("random steps of seed {seed}"),
            run: Run::Random { seed, steps },
            repeat: format!("--seed {seed} --steps {steps}"),
        }));
    }
    if scripts.is_empty() {
        bail!(
            "no case has this in its name: {}",
            arguments.filter.as_deref().unwrap_or_default()
        );
    }
    Ok(scripts)
}

fn from_file(file: &Path) -> anyhow::Result<Script> {
    let mut text = String::new();
    if file.as_os_str() == "-" {
        stdin().read_to_string(&mut text)?;
    } else {
        text = fs::read_to_string(file).with_context(|| format!("reading {}", file.display()))?;
    }
    Ok(Script {
        name: file.display().to_string(),
        run: Run::Lines(text.lines().map(str::to_owned).collect()),
        repeat: format!("--script {}", file.display()),
    })
}

/// Says where two transcripts differ first.
fn compare(script: &Script, mock: &Transcript, ours: &Transcript) -> bool {
    if mock == ours && mock.is_well() {
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

/// Shows one whole; did it end well?
fn show(script: &Script, transcript: &Transcript) -> bool {
    println!("# {}", script.name);
    for line in &transcript.lines {
        println!("{line}");
    }
    println!("# {}\n", transcript.end);
    transcript.is_well()
}
