// SPDX-License-Identifier: MIT OR Apache-2.0
//! A program of the guest at the host's terminal: its output as it comes, and, for a shell, the keyboard.
//!
//! At a terminal the program gets a terminal of the same size in the guest, so that colours, editing and job control work
//! as they do at home; elsewhere it gets pipes.

use std::{
    env,
    io::{self, IsTerminal, Read},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use farfault_init::TerminalSize;
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};

use crate::{
    Error, Result,
    vm::{
        Output, Vm,
        agent::{Launch, Sinks},
    },
};

/// How often the VM's processes and the terminal's size are looked after.
const LOOK: Duration = Duration::from_millis(200);

/// Ctrl-] ends the VM, whatever state its guest is in.
const ESCAPE: u8 = 0x1d;

/// What the guest's programs should know of the host's terminal.
const PASSED_ON: [&str; 4] = ["NO_COLOR", "CLICOLOR_FORCE", "COLORTERM", "TERM"];

/// How a program is attached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Attach {
    /// Its output is shown; it must end within this time (and more on a kernel that is slow).
    Output(Duration),
    /// It has the keyboard too, and all the time it wants.
    Keyboard,
}

impl Vm {
    /// Runs a program of the guest at this terminal, to its end.
    ///
    /// # Errors
    /// It cannot be started, takes too long, or the VM gets into trouble.
    pub fn attach<S: AsRef<str>>(&mut self, argv: &[S], how: Attach) -> Result<Output> {
        let ended = self.attach_to(argv, how);
        ended.map_err(|error| self.explain(error))
    }

    fn attach_to<S: AsRef<str>>(&mut self, argv: &[S], how: Attach) -> Result<Output> {
        let terminal = if io::stdout().is_terminal() {
            size()
        } else {
            None
        };
        let mut env: Vec<(String, String)> = PASSED_ON
            .iter()
            .filter_map(|name| Some(((*name).to_owned(), env::var(name).ok()?)))
            .collect();
        if terminal.is_none() {
            env.push(("TERM".to_owned(), "dumb".to_owned()));
        }
        let sinks = Sinks {
            stdout: Box::new(io::stdout()),
            stderr: Box::new(io::stderr()),
        };
        let argv = argv.iter().map(|word| word.as_ref().to_owned()).collect();
        let process = Arc::new(self.agent.start(Launch {
            argv,
            env,
            terminal,
            sinks: Some(sinks),
        })?);

        let escaped = Arc::new(AtomicBool::new(false));
        let _raw = if how == Attach::Keyboard {
            let (process, escaped) = (Arc::clone(&process), Arc::clone(&escaped));
            let raw = RawTerminal::new()?;
            // Ends with this process at the latest: a read from the keyboard cannot be called off.
            thread::spawn(move || {
                let mut buffer = [0; 1024];
                let mut stdin = io::stdin().lock();
                while let Ok(length) = stdin.read(&mut buffer) {
                    let data = buffer.get(..length).unwrap_or_default();
                    let sent = if data.is_empty() {
                        process.close_stdin()
                    } else {
                        process.write_stdin(data)
                    };
                    if data.contains(&ESCAPE) {
                        escaped.store(true, Ordering::Relaxed);
                    }
                    if data.is_empty() || sent.is_err() {
                        return;
                    }
                }
            });
            raw
        } else {
            None
        };
        let start = Instant::now();
        let mut last_size = terminal;
        while !process.wait_end(LOOK)? {
            self.check_processes()?;
            if escaped.load(Ordering::Relaxed) {
                return Ok(Output::default());
            }
            if let Attach::Output(limit) = how {
                let limit = self.limit(limit);
                if start.elapsed() >= limit {
                    return Err(Error::Timeout {
                        what: format!("the end of {process:?}"),
                        limit,
                        details: String::new(),
                    });
                }
            }
            if terminal.is_some() {
                let new_size = size();
                if let (true, Some(size)) = (new_size != last_size, new_size) {
                    process.resize(size)?;
                    last_size = new_size;
                }
            }
        }
        process.take_output()
    }
}

fn size() -> Option<TerminalSize> {
    let size = tcgetwinsize(io::stdout()).ok()?;
    (size.ws_col > 0).then_some(TerminalSize {
        rows: size.ws_row,
        columns: size.ws_col,
    })
}

/// A keyboard that passes each key on as it is; set back when dropped.
struct RawTerminal {
    before: Termios,
}

impl RawTerminal {
    fn new() -> Result<Option<Self>> {
        let what = "setting the terminal";
        if !io::stdin().is_terminal() {
            return Ok(None);
        }
        let before = tcgetattr(io::stdin()).map_err(Error::io(what))?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(io::stdin(), OptionalActions::Now, &raw).map_err(Error::io(what))?;
        Ok(Some(Self { before }))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        if let Err(error) = tcsetattr(io::stdin(), OptionalActions::Now, &self.before) {
            eprintln!("the terminal cannot be set back ({error}); `reset` does it");
        }
    }
}
