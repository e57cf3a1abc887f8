// SPDX-License-Identifier: MIT OR Apache-2.0
//! Child processes that cannot outlive this one, and tools whose output goes to a log.
//!
//! A child gets a parent-death signal through `setpriv`, so that nothing survives a killed test. That signal comes when
//! the *thread* that made the child ends; so one thread makes them all, and lives as long as the process.

use std::{
    ffi::OsStr,
    fs::{self, File},
    io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write},
    path::Path,
    process::{Child, Command, ExitStatus, Stdio},
    sync::{
        OnceLock,
        mpsc::{self, Sender},
    },
    thread,
    time::{Duration, Instant},
};

use crate::{Error, Result};

/// How much of a log's end an error shows.
const TAIL_LINES: usize = 15;

/// How often a wait for a process looks again; processes have no other wait with a limit that needs no unsafe code.
const POLL: Duration = Duration::from_millis(10);

/// A command that is killed when this process ends, however it ends, once [`spawn`] has started it.
#[must_use]
pub fn bound(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--"]).arg(program);
    command
}

/// Starts a command from the thread that makes all children.
///
/// # Errors
/// Those of [`Command::spawn`].
pub fn spawn(command: Command) -> io::Result<Child> {
    type Job = (Command, Sender<io::Result<Child>>);
    static SPAWNER: OnceLock<Sender<Job>> = OnceLock::new();
    let gone = || io::Error::other("the thread that starts processes is gone");
    let spawner = SPAWNER.get_or_init(|| {
        let (sender, jobs) = mpsc::channel::<Job>();
        thread::spawn(move || {
            for (mut command, reply) in jobs {
                // Whoever asked waits for the answer; without them the child is dropped, and killed with this process.
                let _ = reply.send(command.spawn());
            }
        });
        sender
    });
    let (sender, reply) = mpsc::channel();
    spawner.send((command, sender)).map_err(|_| gone())?;
    reply.recv().map_err(|_| gone())?
}

/// Runs a tool to its end, its output appended to a log.
///
/// # Errors
/// It cannot be started, or fails; then the error carries the log's end.
pub fn run_logged(command: Command, what: &str, log: &Path) -> Result<()> {
    run_logged_from(command, Stdio::null(), what, log)
}

/// The same with something to read.
pub(crate) fn run_logged_from(
    mut command: Command,
    input: Stdio,
    what: &str,
    log: &Path,
) -> Result<()> {
    let (stdout, stderr) = open_twice(log)?;
    let failed = Error::io(format!("{what}: starting {command:?}"));
    command.stdin(input).stdout(stdout).stderr(stderr);
    let status = spawn(command)
        .and_then(|mut child| child.wait())
        .map_err(failed)?;
    ended(status, what, log)
}

/// Runs a tool to its end, its output appended to a log, each line of its standard output shown to `see`.
pub(crate) fn run_watched(
    mut command: Command,
    what: &str,
    log: &Path,
    mut see: impl FnMut(&str),
) -> Result<()> {
    let (mut copy, stderr) = open_twice(log)?;
    let failed = || Error::io(format!("{what}: running {command:?}"));
    let (not_started, not_read, not_waited) = (failed(), failed(), failed());
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(stderr);
    let mut child = spawn(command).map_err(not_started)?;
    let mut read = || -> io::Result<()> {
        let stdout = child.stdout.take().ok_or(io::ErrorKind::BrokenPipe)?;
        for line in BufReader::new(stdout).split(b'\n') {
            let mut line = line?;
            see(&String::from_utf8_lossy(&line));
            line.push(b'\n');
            copy.write_all(&line)?;
        }
        Ok(())
    };
    let read = read().map_err(not_read);
    if read.is_err() {
        // Nobody reads on, so it would hang.
        let _ = child.kill();
    }
    let status = child.wait().map_err(not_waited)?;
    read?;
    ended(status, what, log)
}

/// A log, opened for two streams to append to.
fn open_twice(log: &Path) -> Result<(File, File)> {
    if let Some(folder) = log.parent() {
        crate::paths::create_dir(folder)?;
    }
    let opened = File::options().append(true).create(true).open(log);
    opened
        .and_then(|file| Ok((file.try_clone()?, file)))
        .map_err(Error::io(format!("opening {}", log.display())))
}

fn ended(status: ExitStatus, what: &str, log: &Path) -> Result<()> {
    if status.success() {
        return Ok(());
    }
    Err(Error::Tool {
        what: what.to_owned(),
        status,
        tail: tail(log),
        log: log.to_path_buf(),
    })
}

/// Runs a command and returns what it printed.
///
/// # Errors
/// It cannot be started, or fails; then the error carries what it said.
pub fn output(mut command: Command, what: &str) -> Result<String> {
    let failed = Error::io(format!("{what}: starting {command:?}"));
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let output = spawn(command)
        .and_then(Child::wait_with_output)
        .map_err(failed)?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let details = String::from_utf8_lossy(&output.stderr).into_owned();
    Err(Error::Vm {
        what: format!("{what} failed ({})", output.status),
        details: last_lines(&details),
    })
}

/// Waits for a child for a limited time; `None` when it still runs.
///
/// # Errors
/// Those of [`Child::try_wait`].
pub fn wait_until(child: &mut Child, deadline: Instant) -> io::Result<Option<ExitStatus>> {
    loop {
        let status = child.try_wait()?;
        if status.is_some() || Instant::now() >= deadline {
            return Ok(status);
        }
        thread::sleep(POLL);
    }
}

/// The last lines of a log, indented for an error message.
#[must_use]
pub fn tail(log: &Path) -> String {
    const BYTES: u64 = 16 * 1024;
    let read = || -> io::Result<Vec<u8>> {
        let mut file = File::open(log)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(BYTES)))?;
        let mut text = Vec::new();
        file.take(BYTES).read_to_end(&mut text)?;
        Ok(text)
    };
    match read() {
        Ok(text) => last_lines(&String::from_utf8_lossy(&text)),
        Err(error) => format!("  (the log cannot be read: {error})"),
    }
}

fn last_lines(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    let from = lines.len().saturating_sub(TAIL_LINES);
    lines
        .iter()
        .skip(from)
        .map(|line| format!("  | {line}"))
        .collect::<Vec<_>>()
        .join("\n")
}

/// Is this program on the path?
#[must_use]
pub fn on_path(program: &str) -> bool {
    std::env::var_os("PATH").is_some_and(|path| {
        std::env::split_paths(&path).any(|folder| fs::metadata(folder.join(program)).is_ok())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn run_logged_of_a_failing_tool_carries_the_end_of_its_log() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("tool.log");
        let mut command = bound("sh");
        command.args(["-c", "seq 100; echo at last >&2; exit 3"]);
        let Err(Error::Tool { status, tail, .. }) = run_logged(command, "a tool", &log) else {
            panic!("it must fail");
        };
        assert_eq!(status.code(), Some(3));
        assert!(tail.ends_with("  | at last"), "{tail}");
        assert_eq!(tail.lines().count(), TAIL_LINES);
    }

    #[test]
    fn run_watched_shows_each_line_and_logs_both_streams() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("tool.log");
        let mut command = bound("sh");
        command.args(["-c", "echo one; echo two; echo three >&2"]);
        let mut seen = Vec::new();
        run_watched(command, "a tool", &log, |line| seen.push(line.to_owned())).unwrap();
        assert_eq!(seen, ["one", "two"]);
        let text = fs::read_to_string(log).unwrap();
        assert!(
            ["one\n", "two\n", "three\n"]
                .iter()
                .all(|line| text.contains(line))
        );
    }

    #[test]
    fn spawn_from_a_thread_that_ends_leaves_the_child_running() {
        let mut child = thread::spawn(|| {
            let mut command = bound("sleep");
            command.arg("60");
            spawn(command).unwrap()
        })
        .join()
        .unwrap();
        let status = wait_until(&mut child, Instant::now() + Duration::from_millis(200)).unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(status, None);
    }
}
