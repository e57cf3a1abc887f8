// SPDX-License-Identifier: MIT OR Apache-2.0
//! One GPU's process on the host.

use std::{
    fs::File,
    path::{Path, PathBuf},
    process::{Child, Stdio},
    thread,
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process, waitid};

use crate::{
    Error, Result, paths,
    process::{bound, output, spawn, tail},
};

/// How long a device may take until it listens.
const START_LIMIT: Duration = Duration::from_secs(20);
/// How long its threads may take until they have all stopped.
const STOP_LIMIT: Duration = Duration::from_secs(10);
const POLL: Duration = Duration::from_millis(5);

/// A running device.
#[derive(Debug)]
pub struct Gpu {
    program: PathBuf,
    child: Child,
    socket: PathBuf,
    control: PathBuf,
    log: PathBuf,
    /// Its end is no failure any more.
    may_end: bool,
}

impl Gpu {
    /// Starts a device and waits until QEMU can connect to it.
    pub(crate) fn start(
        program: &Path,
        sockets: &Path,
        index: usize,
        arguments: &[String],
        log: PathBuf,
    ) -> Result<Self> {
        let what = format!("starting GPU {index}");
        let (socket, control) = sockets_of(sockets, index);
        // Of one that was in the same slot before: nobody listens there any more.
        paths::remove(&socket)?;
        paths::remove(&control)?;
        let file = File::options()
            .append(true)
            .create(true)
            .open(&log)
            .map_err(Error::io(log.display().to_string()))?;
        let copy = file
            .try_clone()
            .map_err(Error::io(log.display().to_string()))?;
        let mut command = bound(program);
        command
            .arg("--socket")
            .arg(&socket)
            .arg("--control")
            .arg(&control)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(file)
            .stderr(copy);
        let child = spawn(command).map_err(Error::io(format!("{what}: {}", program.display())))?;
        let mut gpu = Self {
            program: program.to_path_buf(),
            child,
            socket,
            control,
            log,
            may_end: false,
        };
        let deadline = Instant::now() + START_LIMIT;
        while !gpu.socket.exists() {
            gpu.check()
                .map_err(|error| Error::vm(format!("{what}: {error}")))?;
            if Instant::now() >= deadline {
                return Err(Error::Timeout {
                    what: format!("{what}: its socket"),
                    limit: START_LIMIT,
                    details: tail(&gpu.log),
                });
            }
            thread::sleep(POLL);
        }
        Ok(gpu)
    }

    /// The socket for `farfault-device stats` and `inspect`.
    #[must_use]
    pub fn control_socket(&self) -> &Path {
        &self.control
    }

    /// Where QEMU connects.
    pub(crate) fn socket(&self) -> &Path {
        &self.socket
    }

    /// Runs `farfault-device ARGUMENTS --control SOCKET` and returns what it prints.
    ///
    /// # Errors
    /// It fails; with its words.
    pub fn command(&self, arguments: &[&str]) -> Result<String> {
        let mut command = bound(&self.program);
        command.args(arguments).arg("--control").arg(&self.control);
        output(command, &format!("farfault-device {}", arguments.join(" ")))
    }

    /// Fails when the process has ended by itself.
    pub(crate) fn check(&mut self) -> Result<()> {
        match self
            .child
            .try_wait()
            .map_err(Error::io("asking after a device's process"))?
        {
            Some(status) if !self.may_end => Err(Error::Vm {
                what: format!("the device's process has ended ({status})"),
                details: tail(&self.log),
            }),
            _ => Ok(()),
        }
    }

    /// Whether the process has not ended yet; a stopped one has not.
    ///
    /// # Errors
    /// The system refuses to say.
    pub fn is_alive(&mut self) -> Result<bool> {
        let ended = self.child.try_wait();
        let ended = ended.map_err(Error::io("asking after a device's process"))?;
        Ok(ended.is_none())
    }

    /// The process, while it runs.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Its end, by itself or by [`Gpu::kill`], is no failure from now on.
    pub(crate) fn expect_end(&mut self) {
        self.may_end = true;
    }

    /// Ends the process at once.
    pub(crate) fn kill(&mut self) -> Result<()> {
        self.may_end = true;
        self.child
            .kill()
            .and_then(|()| self.child.wait())
            .map(drop)
            .map_err(Error::io("killing a device's process"))
    }

    /// Stops it, and waits until none of its threads runs any more: on a busy host one of them may go on for a while.
    pub(crate) fn stop(&self) -> Result<()> {
        self.signal(Signal::STOP)?;
        let pid = Pid::from_child(&self.child);
        let look = WaitIdOptions::STOPPED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
        let deadline = Instant::now() + STOP_LIMIT;
        loop {
            let stopped = waitid(WaitId::Pid(pid), look)
                .map_err(Error::io("waiting for a device to stop"))?;
            if stopped.is_some() {
                return Ok(());
            }
            if Instant::now() >= deadline {
                return Err(Error::vm(format!(
                    "the process of a device did not stop within {STOP_LIMIT:?}"
                )));
            }
            thread::sleep(Duration::from_micros(100));
        }
    }

    pub(crate) fn signal(&self, signal: Signal) -> Result<()> {
        kill_process(Pid::from_child(&self.child), signal)
            .map_err(Error::io("signalling a device's process"))
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        if let Err(error) = self.kill() {
            eprintln!("{error}");
        }
    }
}

/// Data and control socket of a GPU.
pub(crate) fn sockets_of(folder: &Path, index: usize) -> (PathBuf, PathBuf) {
    (
        folder.join(format!("gpu{index}.sock")),
        folder.join(format!("gpu{index}-control.sock")),
    )
}
