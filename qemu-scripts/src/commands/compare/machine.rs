// SPDX-License-Identifier: MIT OR Apache-2.0
//! Runs scripts in a VM, on one driver or the other. A VM whose kernel has had trouble is replaced by a new one, and the
//! trouble is how the script ended.

use std::time::Duration;

use farfault_init::{DRIVER_PATH, MOCK_PATH};
use xtask::{
    Options, Prepared,
    build::Extra,
    vm::{Config, Driver, Output, Vm},
};

use super::PROGRAM;

const VRAM: &str = "256M";
/// How long a script may take.
const LIMIT: Duration = Duration::from_secs(120);
const COMMAND_LIMIT: Duration = Duration::from_secs(60);
/// After so much trouble the rest is not worth the time.
const MAX_TROUBLE: u32 = 30;
/// How a script ended that was not run then.
const NOT_RUN: &str = "it was not run, after too much trouble with the others";
/// Where a script of the host's goes in the guest, and how much of it at a time: a command line has its limits.
const GUEST_SCRIPT: &str = "/tmp/script";
const PIECE: usize = 64 << 10;
/// In these cases test_hmm asks for memory that no machine has, and the kernel reports who did that, with a stack.
const WARNS: &str = "vmalloc::";

/// Whose nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Side {
    /// The kernel's mock device
    #[value(name = "test_hmm")]
    Mock,
    /// Ours
    #[value(name = "farfault")]
    Ours,
}

/// What one run of the program is.
pub(super) enum Run {
    Case(String),
    Random { seed: u64, steps: u64 },
    Lines(Vec<String>),
}

/// A run with a name.
pub(super) struct Script {
    pub(super) name: String,
    pub(super) run: Run,
    /// The options that repeat it.
    pub(super) repeat: String,
}

/// What a script has printed on a driver, and how it ended.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Transcript {
    pub(super) lines: Vec<String>,
    pub(super) end: String,
}

/// The VM that runs, if there is one, and what is needed to boot another.
pub(super) struct Machine {
    prepared: Prepared,
    config: Config,
    faults: bool,
    vm: Option<(Vm, Option<Side>)>,
    trouble: u32,
}

impl Transcript {
    /// Did the script come to its end?
    pub(super) fn is_well(&self) -> bool {
        self.end == "exit code 0"
    }
}

impl Side {
    fn module(self) -> (&'static str, String) {
        match self {
            Self::Mock => ("test_hmm", MOCK_PATH.to_owned()),
            Self::Ours => ("farfault", format!("{DRIVER_PATH} dmirror=1")),
        }
    }
}

impl Machine {
    pub(super) fn new(options: &Options, faults: bool) -> anyhow::Result<Self> {
        let config = Config {
            name: PROGRAM.to_owned(),
            gpus: 2,
            vram: VRAM.to_owned(),
            driver: Driver::None,
            repeat: Some(format!("cargo xtask {PROGRAM}, with the same options")),
            ..Config::default()
        };
        Ok(Self {
            prepared: Prepared::with(options, Extra::Suite)?,
            config,
            faults,
            vm: None,
            trouble: 0,
        })
    }

    /// The names of the cases.
    pub(super) fn cases(&mut self) -> anyhow::Result<Vec<String>> {
        let list = shell(self.vm(None)?, &format!("{PROGRAM} --list"))?;
        Ok(list.lines().map(str::to_owned).collect())
    }

    /// Runs scripts on one driver.
    pub(super) fn transcripts(
        &mut self,
        scripts: &[Script],
        side: Side,
    ) -> anyhow::Result<Vec<Transcript>> {
        scripts
            .iter()
            .map(|script| self.transcript(script, side))
            .collect()
    }

    fn transcript(&mut self, script: &Script, side: Side) -> anyhow::Result<Transcript> {
        if self.trouble > MAX_TROUBLE {
            return Ok(Transcript {
                lines: Vec::new(),
                end: NOT_RUN.to_owned(),
            });
        }
        let flag = if self.faults { "--faults " } else { "" };
        let vm = self.vm(Some(side))?;
        let what = match &script.run {
            Run::Case(name) => format!("case {name}"),
            Run::Random { seed, steps } => format!("random {seed} {steps}"),
            Run::Lines(lines) => put_script(vm, lines)?,
        };
        let quiet = side == Side::Mock && script.name.starts_with(WARNS);
        if quiet {
            shell(vm, "dmesg -n 1")?;
        }
        let ended = vm.run(
            &["sh", "-c", &format!("exec {PROGRAM} {flag}{what}")],
            LIMIT,
        );
        let (lines, trouble) = match ended {
            Ok(output) => {
                let trouble = vm.check().err();
                let text = output.stdout_text();
                let lines: Vec<_> = text.lines().map(str::to_owned).collect();
                if trouble.is_none() {
                    if quiet {
                        shell(vm, "dmesg -n 8")?;
                    }
                    // The device is lost: what comes next would say so, too, and nothing else.
                    if lines.iter().any(|line| line.ends_with("-> EIO")) {
                        self.give_up();
                    }
                    return Ok(Transcript {
                        lines,
                        end: end(&output),
                    });
                }
                (lines, trouble)
            }
            Err(error) => (Vec::new(), Some(error)),
        };
        self.give_up();
        let end = trouble.map_or_else(String::new, |trouble| trouble.to_string());
        Ok(Transcript { lines, end })
    }

    /// Ends the VM; its logs are kept, and its end says where.
    fn give_up(&mut self) {
        self.vm = None;
        self.trouble += 1;
    }

    /// The VM, with this driver.
    fn vm(&mut self, side: Option<Side>) -> anyhow::Result<&mut Vm> {
        let (vm, loaded) = match &mut self.vm {
            Some(running) => running,
            none => {
                let mut vm = Vm::boot(&self.prepared, &self.config)?;
                shell(&mut vm, &format!("{PROGRAM} prepare"))?;
                none.insert((vm, None))
            }
        };
        if side.is_some() && side != *loaded {
            if let Some(other) = loaded.take() {
                shell(vm, &format!("rmmod {}", other.module().0))?;
                vm.check()?;
            }
            if let Some(side) = side {
                let module = side.module().1;
                shell(vm, &format!("insmod {module}; test -c /dev/hmm_dmirror1"))?;
                *loaded = Some(side);
            }
        }
        Ok(vm)
    }

    /// Ends it; all must be well.
    pub(super) fn end(mut self) -> anyhow::Result<()> {
        if let Some((mut vm, loaded)) = self.vm.take() {
            if let Some(side) = loaded {
                shell(&mut vm, &format!("rmmod {}", side.module().0))?;
            }
            vm.shutdown()?;
        }
        Ok(())
    }
}

fn end(output: &Output) -> String {
    match (output.code, output.signal) {
        (Some(code), _) => format!("exit code {code} {}", output.stderr_text())
            .trim()
            .to_owned(),
        (None, signal) => format!("signal {}", signal.unwrap_or_default()),
    }
}

/// Puts a script into the guest; what runs it.
fn put_script(vm: &mut Vm, lines: &[String]) -> anyhow::Result<String> {
    shell(vm, &format!(": > {GUEST_SCRIPT}"))?;
    let append = format!("printf %s \"$1\" >> {GUEST_SCRIPT}");
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
    Ok(format!("script < {GUEST_SCRIPT}"))
}

/// Runs a line of shell, which must succeed; what it prints.
fn shell(vm: &mut Vm, line: &str) -> anyhow::Result<String> {
    let output = vm.run(&["sh", "-ec", line], COMMAND_LIMIT)?;
    Ok(output.expect_success()?.stdout_text())
}
