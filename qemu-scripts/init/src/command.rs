// SPDX-License-Identifier: MIT OR Apache-2.0
//! One command of the host: its process, its streams or its terminal.

use std::{
    fs::File,
    io::{self, Read, Write},
    os::{
        fd::{AsFd, OwnedFd},
        unix::process::{CommandExt, ExitStatusExt},
    },
    process::{Child, Command as Process, ExitStatus, Stdio},
    sync::mpsc,
    thread,
    time::Duration,
};

use farfault_init::{Command, Id, Outcome, Reply, Stream, TerminalSize};
use rustix::{
    process::{Pid, Signal, kill_process_group},
    pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt},
    termios::{Winsize, tcsetwinsize},
};

use crate::agent::Host;

/// A child of the command can hold its streams open for ever; they are given up this long after the command's own end.
const STREAMS_AFTER_END: Duration = Duration::from_secs(2);

/// What a terminal takes for the end of input.
const END_OF_INPUT: u8 = 4;

/// A running command, as the thread that reads requests needs it.
pub(crate) struct Running {
    group: Pid,
    input: Option<mpsc::Sender<Vec<u8>>>,
    terminal: Option<File>,
}

/// A running command, as the thread that waits for its end needs it.
pub(crate) struct End {
    child: Child,
    streams: mpsc::Receiver<()>,
    open: usize,
}

impl Running {
    /// Starts a command; its output goes to the host from now on.
    pub(crate) fn start(command: &Command, host: &Host) -> io::Result<(Self, End)> {
        let (program, arguments) = command
            .argv
            .split_first()
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "no program is named"))?;
        let mut process = match command.terminal {
            None => Process::new(program),
            Some(_) => {
                let mut process = Process::new("/bin/busybox");
                // Its own session, with its standard input as the terminal of it.
                process.args(["setsid", "-c", program]);
                process
            }
        };
        process
            .args(arguments)
            .env("PATH", "/bin")
            .env("HOME", "/root")
            .envs(command.env.iter().map(|(key, value)| (key, value)))
            .current_dir("/tmp");
        let (sender, streams) = mpsc::channel();
        let forward = |stream, source: Box<dyn Read + Send>| {
            let (id, host, sender) = (command.id, host.clone(), sender.clone());
            thread::spawn(move || {
                forward(id, stream, source, &host);
                // Nobody listens any more when the streams have been given up.
                let _ = sender.send(());
            });
        };
        match command.terminal {
            None => {
                process
                    .process_group(0)
                    .stdin(Stdio::piped())
                    .stdout(Stdio::piped())
                    .stderr(Stdio::piped());
                let mut child = process.spawn()?;
                let sources: [(Stream, Option<Box<dyn Read + Send>>); 2] = [
                    (
                        Stream::Stdout,
                        child.stdout.take().map(|pipe| Box::new(pipe) as _),
                    ),
                    (
                        Stream::Stderr,
                        child.stderr.take().map(|pipe| Box::new(pipe) as _),
                    ),
                ];
                let mut open = 0;
                for (stream, source) in sources {
                    if let Some(source) = source {
                        forward(stream, source);
                        open += 1;
                    }
                }
                Ok((
                    Self {
                        group: Pid::from_child(&child),
                        input: child.stdin.take().map(|pipe| feed(command.id, pipe)),
                        terminal: None,
                    },
                    End {
                        child,
                        streams,
                        open,
                    },
                ))
            }
            Some(size) => {
                let (ours, theirs) = open_terminal(size)?;
                process
                    .stdin(theirs.try_clone()?)
                    .stdout(theirs.try_clone()?)
                    .stderr(theirs);
                let child = process.spawn()?;
                // The child's end of the terminal must close with the child: it is held by `process` until here.
                drop(process);
                forward(Stream::Stdout, Box::new(ours.try_clone()?));
                let running = Self {
                    group: Pid::from_child(&child),
                    input: Some(feed(command.id, ours.try_clone()?)),
                    terminal: Some(ours),
                };
                Ok((
                    running,
                    End {
                        child,
                        streams,
                        open: 1,
                    },
                ))
            }
        }
    }

    /// Passes on input; no bytes mean its end.
    pub(crate) fn stdin(&mut self, mut data: Vec<u8>) {
        let end = data.is_empty();
        if end && self.terminal.is_some() {
            data.push(END_OF_INPUT);
        }
        if let Some(input) = &self.input {
            // A command that reads no more, or has ended, misses nothing.
            let _ = input.send(data);
        }
        if end {
            self.input = None;
        }
    }

    /// Sends a signal to the command and its children.
    pub(crate) fn signal(&self, signal: i32) -> io::Result<()> {
        let signal = Signal::from_named_raw(signal).ok_or_else(|| {
            io::Error::new(io::ErrorKind::InvalidInput, format!("no signal {signal}"))
        })?;
        Ok(kill_process_group(self.group, signal)?)
    }

    /// Changes the size of the command's terminal.
    pub(crate) fn resize(&self, size: TerminalSize) -> io::Result<()> {
        self.terminal
            .as_ref()
            .map_or(Ok(()), |terminal| set_size(terminal, size))
    }
}

impl End {
    /// Waits for the command, then for what it has written to be on its way.
    pub(crate) fn wait(mut self) -> Outcome {
        let status = self.child.wait();
        for _ in 0..self.open {
            if self.streams.recv_timeout(STREAMS_AFTER_END).is_err() {
                break;
            }
        }
        match status {
            Ok(status) => outcome(status),
            Err(error) => Outcome::NotStarted(format!("waiting for it: {error}")),
        }
    }
}

fn outcome(status: ExitStatus) -> Outcome {
    match (status.code(), status.signal()) {
        (Some(code), _) => Outcome::Exited(code),
        (None, Some(signal)) => Outcome::Signalled(signal),
        (None, None) => Outcome::NotStarted(format!("it ended in an unknown way: {status}")),
    }
}

/// Writes a command's input from a thread of its own: a command that does not read must not stop the agent.
fn feed(id: Id, mut input: impl Write + Send + 'static) -> mpsc::Sender<Vec<u8>> {
    let (sender, pieces) = mpsc::channel::<Vec<u8>>();
    thread::spawn(move || {
        for piece in pieces {
            match input.write_all(&piece) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return,
                Err(error) => {
                    eprintln!("farfault-init: the input of command {id}: {error}");
                    return;
                }
            }
        }
    });
    sender
}

fn forward(id: Id, stream: Stream, mut source: impl Read, host: &Host) {
    let mut buffer = [0; 16 * 1024];
    loop {
        match source.read(&mut buffer) {
            Ok(0) => return,
            Ok(length) => {
                let data = buffer.get(..length).unwrap_or_default().to_vec();
                host.send(&Reply::Output { id, stream, data });
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // A terminal whose last user is gone reads as EIO: its ordinary end.
            Err(error) if error.raw_os_error() == Some(rustix::io::Errno::IO.raw_os_error()) => {
                return;
            }
            Err(error) => {
                eprintln!("farfault-init: reading what command {id} writes: {error}");
                return;
            }
        }
    }
}

/// Opens a new terminal: our end, and the command's.
fn open_terminal(size: TerminalSize) -> io::Result<(File, OwnedFd)> {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let ours = openpt(flags)?;
    grantpt(&ours)?;
    unlockpt(&ours)?;
    let name = ptsname(&ours, Vec::new())?;
    let theirs = rustix::fs::open(
        name.as_c_str(),
        rustix::fs::OFlags::RDWR | rustix::fs::OFlags::NOCTTY | rustix::fs::OFlags::CLOEXEC,
        rustix::fs::Mode::empty(),
    )?;
    set_size(&ours, size)?;
    Ok((File::from(ours), theirs))
}

fn set_size(terminal: impl AsFd, size: TerminalSize) -> io::Result<()> {
    let size = Winsize {
        ws_row: size.rows,
        ws_col: size.columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    Ok(tcsetwinsize(terminal, size)?)
}
