// SPDX-License-Identifier: MIT OR Apache-2.0
//! The host's end of the channel to the agent in the guest: commands, what they write, how they end.
//!
//! One thread reads replies into a table; whoever waits is woken by a condition variable. Lock order: the writer's mutex is
//! never taken while the table's is held.

use std::{
    collections::HashMap,
    fmt,
    io::{self, Write},
    os::unix::net::UnixStream,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use farfault_init::{Command, Id, Outcome, Reply, Request, Stream, TerminalSize, receive, send};

use crate::{Error, Result};

const WRITE_LIMIT: Duration = Duration::from_secs(10);

/// How long a command may take to die once it has been killed.
const KILL_LIMIT: Duration = Duration::from_secs(10);

/// More than this of one command's stream is counted, not kept.
const KEPT_OUTPUT: usize = 16 << 20;

const SIGKILL: i32 = 9;

/// Where a command's output goes while it runs, beside being kept.
pub(crate) struct Sinks {
    pub(crate) stdout: Box<dyn Write + Send>,
    pub(crate) stderr: Box<dyn Write + Send>,
}

impl Sinks {
    fn write(&mut self, stream: Stream, data: &[u8]) -> io::Result<()> {
        let sink = match stream {
            Stream::Stdout => &mut self.stdout,
            Stream::Stderr => &mut self.stderr,
        };
        sink.write_all(data)?;
        sink.flush()
    }
}

/// The connection to the agent.
#[derive(Clone)]
pub(crate) struct Agent {
    shared: Arc<Shared>,
}

impl fmt::Debug for Agent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Agent")
    }
}

struct Shared {
    table: Mutex<Table>,
    changed: Condvar,
    writer: Mutex<UnixStream>,
}

#[derive(Default)]
struct Table {
    next: Id,
    boots: u32,
    problems: Vec<String>,
    lost: Option<String>,
    commands: HashMap<Id, State>,
}

#[derive(Default)]
struct State {
    output: Output,
    sinks: Option<Sinks>,
    outcome: Option<Outcome>,
}

/// How a command is to be run.
#[derive(Default)]
pub(crate) struct Launch {
    pub(crate) argv: Vec<String>,
    pub(crate) env: Vec<(String, String)>,
    pub(crate) terminal: Option<TerminalSize>,
    pub(crate) sinks: Option<Sinks>,
}

/// What a command of the guest has written and how it ended.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Output {
    /// Exit code, unless a signal ended it.
    pub code: Option<i32>,
    /// The signal that ended it.
    pub signal: Option<i32>,
    /// Standard output.
    pub stdout: Vec<u8>,
    /// Standard error.
    pub stderr: Vec<u8>,
    /// The command, for messages.
    pub command: String,
}

impl Output {
    /// Did it end with exit code 0?
    #[must_use]
    pub fn success(&self) -> bool {
        self.code == Some(0)
    }

    /// Standard output as text.
    #[must_use]
    pub fn stdout_text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// Standard error as text.
    #[must_use]
    pub fn stderr_text(&self) -> String {
        String::from_utf8_lossy(&self.stderr).into_owned()
    }

    /// The output, if the command ended with exit code 0.
    ///
    /// # Errors
    /// It did not; the error carries all that it wrote.
    pub fn expect_success(self) -> Result<Self> {
        if self.success() {
            return Ok(self);
        }
        let end = match (self.code, self.signal) {
            (Some(code), _) => format!("exit code {code}"),
            (None, Some(signal)) => format!("signal {signal}"),
            (None, None) => "no exit code".to_owned(),
        };
        Err(Error::Vm {
            what: format!("in the guest, `{}` ended with {end}", self.command),
            details: self.details(),
        })
    }

    fn details(&self) -> String {
        let mut text = String::new();
        for (name, bytes) in [("stdout", &self.stdout), ("stderr", &self.stderr)] {
            for line in String::from_utf8_lossy(bytes).lines() {
                text.push_str(&format!("  {name} | {line}\n"));
            }
        }
        text
    }

    fn keep(&mut self, stream: Stream, data: &[u8]) {
        let kept = match stream {
            Stream::Stdout => &mut self.stdout,
            Stream::Stderr => &mut self.stderr,
        };
        let room = KEPT_OUTPUT.saturating_sub(kept.len());
        kept.extend_from_slice(data.get(..room.min(data.len())).unwrap_or_default());
    }
}

impl Agent {
    /// Takes over a fresh connection.
    pub(crate) fn new(stream: UnixStream) -> Result<Self> {
        let writer = stream
            .try_clone()
            .map_err(Error::io("the agent's channel"))?;
        writer
            .set_write_timeout(Some(WRITE_LIMIT))
            .map_err(Error::io("the agent's channel"))?;
        let shared = Arc::new(Shared {
            table: Mutex::default(),
            changed: Condvar::new(),
            writer: Mutex::new(writer),
        });
        let agent = Self { shared };
        let reader = agent.clone();
        thread::spawn(move || reader.read(stream));
        Ok(agent)
    }

    /// Waits until the agent has come up once more than `boots` times.
    pub(crate) fn wait_for_boot(&self, boots: u32, limit: Duration) -> Result<()> {
        let table = self.wait("the agent in the guest", limit, |table| table.boots > boots)?;
        if table.problems.is_empty() {
            return Ok(());
        }
        Err(Error::Vm {
            what: "the guest came up with problems".into(),
            details: table.problems.join("\n"),
        })
    }

    pub(crate) fn boots(&self) -> u32 {
        self.table().boots
    }

    pub(crate) fn start(&self, launch: Launch) -> Result<GuestProcess> {
        let command = launch.argv.join(" ");
        let id = {
            let mut table = self.table();
            let id = table.next;
            table.next += 1;
            let output = Output {
                command: command.clone(),
                ..Output::default()
            };
            table.commands.insert(
                id,
                State {
                    output,
                    sinks: launch.sinks,
                    outcome: None,
                },
            );
            id
        };
        let process = GuestProcess {
            agent: self.clone(),
            id,
            command,
        };
        let Launch {
            argv,
            env,
            terminal,
            ..
        } = launch;
        self.send(&Request::Run(Command {
            id,
            argv,
            env,
            terminal,
        }))?;
        Ok(process)
    }

    pub(crate) fn send(&self, request: &Request) -> Result<()> {
        let mut writer = self
            .shared
            .writer
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        send(&mut *writer, request).map_err(Error::io("speaking to the agent in the guest"))
    }

    fn read(&self, mut stream: UnixStream) {
        let end = loop {
            match receive(&mut stream) {
                Ok(Some(reply)) => self.take(reply),
                Ok(None) => break "QEMU closed the agent's channel".to_owned(),
                Err(error) => break format!("the agent's channel: {error}"),
            }
        };
        self.table().lost = Some(end);
        self.shared.changed.notify_all();
    }

    fn take(&self, reply: Reply) {
        let mut table = self.table();
        match reply {
            Reply::Hello { problems } => {
                table.boots += 1;
                table.problems = problems;
                for state in table.commands.values_mut() {
                    state.outcome.get_or_insert_with(|| {
                        Outcome::NotStarted("the guest was reset under it".into())
                    });
                }
            }
            Reply::Output { id, stream, data } => {
                if let Some(state) = table.commands.get_mut(&id) {
                    let written = state.sinks.as_mut().map(|sinks| sinks.write(stream, &data));
                    // A pipe that nobody reads any more gets no more; the command still runs to its end.
                    if matches!(written, Some(Err(_))) {
                        state.sinks = None;
                    }
                    state.output.keep(stream, &data);
                }
            }
            Reply::Ended { id, outcome } => {
                if let Some(state) = table.commands.get_mut(&id) {
                    state.outcome = Some(outcome);
                }
            }
        }
        drop(table);
        self.shared.changed.notify_all();
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        // Nothing is left half done in the table by a thread that panics.
        self.shared
            .table
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn wait(
        &self,
        what: &str,
        limit: Duration,
        ready: impl Fn(&Table) -> bool,
    ) -> Result<MutexGuard<'_, Table>> {
        let deadline = Instant::now() + limit;
        let mut table = self.table();
        loop {
            if ready(&table) {
                return Ok(table);
            }
            if let Some(lost) = &table.lost {
                return Err(Error::vm(format!("waiting for {what}: {lost}")));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Error::Timeout {
                    what: what.to_owned(),
                    limit,
                    details: String::new(),
                });
            }
            table = self
                .shared
                .changed
                .wait_timeout(table, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }
}

/// A command that runs in the guest. Can be used while the VM is; dropped before its end, it is killed.
pub struct GuestProcess {
    agent: Agent,
    id: Id,
    command: String,
}

impl fmt::Debug for GuestProcess {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "GuestProcess({}: {})", self.id, self.command)
    }
}

impl GuestProcess {
    /// Waits until standard output contains a text.
    ///
    /// # Errors
    /// It does not in time, or the command ends before.
    pub fn wait_for(&self, text: &str, limit: Duration) -> Result<()> {
        let what = format!("\"{text}\" from `{}` in the guest", self.command);
        let has = |table: &Table| {
            table
                .commands
                .get(&self.id)
                .is_some_and(|state| String::from_utf8_lossy(&state.output.stdout).contains(text))
        };
        let ended = |table: &Table| {
            table
                .commands
                .get(&self.id)
                .is_none_or(|state| state.outcome.is_some())
        };
        let table = self
            .agent
            .wait(&what, limit, |table| has(table) || ended(table))
            .map_err(|error| self.shown(error))?;
        if has(&table) {
            return Ok(());
        }
        drop(table);
        Err(self.shown(Error::Vm {
            what: format!("{what}: it ended before"),
            details: String::new(),
        }))
    }

    /// What it has written to standard output so far.
    #[must_use]
    pub fn stdout_so_far(&self) -> String {
        let table = self.agent.table();
        let output = table
            .commands
            .get(&self.id)
            .map(|state| &state.output.stdout);
        output.map_or_else(String::new, |bytes| {
            String::from_utf8_lossy(bytes).into_owned()
        })
    }

    /// Writes to standard input.
    ///
    /// # Errors
    /// The guest cannot be reached.
    pub fn write_stdin(&self, data: &[u8]) -> Result<()> {
        const PIECE: usize = 4096;
        data.chunks(PIECE).try_for_each(|piece| {
            self.agent.send(&Request::Stdin {
                id: self.id,
                data: piece.to_vec(),
            })
        })
    }

    /// Ends standard input.
    ///
    /// # Errors
    /// The guest cannot be reached.
    pub fn close_stdin(&self) -> Result<()> {
        self.agent.send(&Request::Stdin {
            id: self.id,
            data: Vec::new(),
        })
    }

    /// Sends a signal to the command and its children.
    ///
    /// # Errors
    /// The guest cannot be reached.
    pub fn signal(&self, signal: i32) -> Result<()> {
        self.agent.send(&Request::Signal {
            id: self.id,
            signal,
        })
    }

    /// Tells the command's terminal that it has another size.
    pub(crate) fn resize(&self, size: TerminalSize) -> Result<()> {
        self.agent.send(&Request::Resize { id: self.id, size })
    }

    /// Waits for the end; kills the command when the limit runs out.
    ///
    /// # Errors
    /// It could not be started, or did not end in time.
    pub fn wait(self, limit: Duration) -> Result<Output> {
        let what = format!("the end of `{}` in the guest", self.command);
        if let Err(error) = self.wait_for_outcome(&what, limit) {
            let error = self.shown(error);
            // The guest may be beyond help; the first error is the one to tell.
            if self.signal(SIGKILL).is_ok() && self.wait_for_outcome(&what, KILL_LIMIT).is_err() {
                return Err(Error::Vm {
                    what: format!("{error}\n  it cannot even be killed"),
                    details: String::new(),
                });
            }
            return Err(error);
        }
        self.take_output()
    }

    /// What it wrote and how it ended, once it has.
    pub(crate) fn take_output(&self) -> Result<Output> {
        let state = self
            .agent
            .table()
            .commands
            .remove(&self.id)
            .unwrap_or_default();
        let mut output = state.output;
        match state.outcome {
            Some(Outcome::Exited(code)) => output.code = Some(code),
            Some(Outcome::Signalled(signal)) => output.signal = Some(signal),
            Some(Outcome::NotStarted(reason)) => {
                return Err(Error::Vm {
                    what: format!("in the guest: {reason}"),
                    details: output.details(),
                });
            }
            None => {}
        }
        Ok(output)
    }

    /// Has it ended?
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.agent
            .table()
            .commands
            .get(&self.id)
            .is_none_or(|state| state.outcome.is_some())
    }

    /// Waits a moment for the end; says whether it came.
    pub(crate) fn wait_end(&self, moment: Duration) -> Result<bool> {
        match self.wait_for_outcome("", moment) {
            Ok(()) => Ok(true),
            Err(Error::Timeout { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn wait_for_outcome(&self, what: &str, limit: Duration) -> Result<()> {
        let ended = |table: &Table| {
            table
                .commands
                .get(&self.id)
                .is_none_or(|state| state.outcome.is_some())
        };
        self.agent.wait(what, limit, ended).map(drop)
    }

    /// Adds what the command has written so far to an error.
    fn shown(&self, error: Error) -> Error {
        let written = self
            .agent
            .table()
            .commands
            .get(&self.id)
            .map(|state| state.output.details())
            .unwrap_or_default();
        match error {
            Error::Timeout { what, limit, .. } => Error::Timeout {
                what,
                limit,
                details: written,
            },
            Error::Vm { what, details } => Error::Vm {
                what,
                details: details + &written,
            },
            other => other,
        }
    }
}

impl Drop for GuestProcess {
    fn drop(&mut self) {
        let running = self
            .agent
            .table()
            .commands
            .remove(&self.id)
            .is_some_and(|state| state.outcome.is_none());
        if running {
            // Whoever drops a running command no longer asks what becomes of it.
            let _ = self.signal(SIGKILL);
        }
    }
}
