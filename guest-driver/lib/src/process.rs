// SPDX-License-Identifier: MIT OR Apache-2.0
//! A child process that shares this one's memory copy-on-write: for programs and tests that want to
//! see what `fork` does to memory that a GPU has.

use crate::{
    error::{Error, Result},
    sys,
};
use rustix::process::{Pid, Signal, WaitOptions, kill_process, waitpid};
use std::io;

/// A child made by [`fork`]. Dropped without [`Child::wait`], it is killed.
#[derive(Debug)]
pub struct Child {
    pid: Option<Pid>,
}

/// How a child ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// With this exit code; 101 after a panic.
    Exited(i32),
    /// By this signal.
    Signaled(i32),
}

/// Runs `child` in a copy of this process, which ends with the exit code that it returns. Buffered
/// output should be flushed before, or both will print it.
///
/// # Errors
///
/// In a process with more than one thread: the copy would have locks that nobody opens again.
pub fn fork(child: impl FnOnce() -> u8) -> Result<Child> {
    let pid = sys::fork(child).map_err(|cause| Error::Process {
        what: "fork a child (that needs a process with one thread)",
        cause,
    })?;
    Ok(Child { pid: Some(pid) })
}

impl Child {
    /// Its process number; nothing once it was waited for.
    pub fn pid(&self) -> Option<Pid> {
        self.pid
    }

    /// Waits for its end.
    pub fn wait(mut self) -> Result<Ended> {
        let failed = |cause: io::Error| Error::Process {
            what: "wait for a child",
            cause,
        };
        loop {
            match waitpid(self.pid, WaitOptions::empty()) {
                Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(failed(errno.into())),
                Ok(None) => {}
                Ok(Some((_, status))) => {
                    self.pid = None;
                    let exited = status.exit_status().map(Ended::Exited);
                    let signaled = status.terminating_signal().map(Ended::Signaled);
                    return exited
                        .or(signaled)
                        .ok_or_else(|| failed(io::ErrorKind::InvalidData.into()));
                }
            }
        }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        if let Some(pid) = self.pid {
            // A child that has ended by itself is as good; nobody is left to hear of an error.
            let _ = kill_process(pid, Signal::KILL);
            let _ = waitpid(Some(pid), WaitOptions::empty());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fork_with_more_than_one_thread_is_refused() {
        // The test harness has a thread of its own; this makes sure.
        let (end, wait) = std::sync::mpsc::channel::<()>();
        std::thread::scope(|scope| {
            scope.spawn(move || wait.recv());
            let error = fork(|| 0).unwrap_err().to_string();
            assert!(error.contains("one thread"), "{error}");
            drop(end);
        });
    }
}
