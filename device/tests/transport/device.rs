// SPDX-License-Identifier: MIT OR Apache-2.0
//! A device process of a test.

use crate::guest::DEADLINE;
use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Output},
    thread,
    time::{Duration, Instant},
};

/// A running `farfault-device`, killed on drop.
pub(crate) struct Device {
    child: Child,
    folder: tempfile::TempDir,
}

impl Device {
    /// Starts one with a GPU of 64 MiB and waits for its sockets.
    pub(crate) fn start() -> Self {
        Self::start_with(&["--vram", "64M"])
    }

    /// Starts one with these options, and waits for its sockets.
    pub(crate) fn start_with(options: &[&str]) -> Self {
        let folder = tempfile::tempdir().expect("a folder for the sockets");
        let child = Command::new(program())
            .arg("--socket")
            .arg(folder.path().join("gpu"))
            .arg("--control")
            .arg(folder.path().join("control"))
            .args(options)
            // Not a pipe: one that nobody reads would stop the device when it is full.
            .stderr(File::create(folder.path().join("log")).expect("a log"))
            .spawn()
            .expect("the device starts");
        let mut device = Self { child, folder };
        let start = Instant::now();
        while !device.socket().exists() {
            assert!(
                start.elapsed() < DEADLINE,
                "the device makes no socket: {}",
                device.log()
            );
            thread::sleep(Duration::from_millis(2));
        }
        device
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.folder.path().join("gpu")
    }

    pub(crate) fn control(&self) -> PathBuf {
        self.folder.path().join("control")
    }

    /// Runs `farfault-device` with these arguments and the control socket.
    pub(crate) fn command(&self, arguments: &[&str]) -> Output {
        Command::new(program())
            .args(arguments)
            .arg("--control")
            .arg(self.control())
            .output()
            .expect("the command runs")
    }

    /// What a command answers as JSON.
    pub(crate) fn json(&self, arguments: &[&str]) -> serde_json::Value {
        let output = self.command(&[arguments, &["--json"]].concat());
        assert!(output.status.success(), "{arguments:?}: {output:?}");
        serde_json::from_slice(&output.stdout).expect("JSON")
    }

    /// A counter of the transport.
    pub(crate) fn transport_stat(&self, name: &str) -> u64 {
        self.json(&["stats"])["transport"][name]
            .as_u64()
            .unwrap_or_else(|| panic!("no {name}"))
    }

    /// Waits until a counter of the transport has reached `value`.
    pub(crate) fn wait_for_transport_stat(&self, name: &str, value: u64) {
        let start = Instant::now();
        while self.transport_stat(name) < value {
            assert!(start.elapsed() < DEADLINE, "{name} does not reach {value}");
            thread::sleep(Duration::from_millis(2));
        }
    }

    pub(crate) fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, signal).expect("a signal can be sent");
    }

    /// Waits until the process ends by itself.
    pub(crate) fn wait(&mut self) -> ExitStatus {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().expect("the device can be waited for") {
                return status;
            }
            assert!(start.elapsed() < DEADLINE, "the device does not end");
            thread::sleep(Duration::from_millis(2));
        }
    }

    /// Fails if the process has ended.
    pub(crate) fn assert_alive(&mut self) {
        if let Some(status) = self.child.try_wait().expect("the device can be waited for") {
            panic!("the device ended: {status}: {}", self.log());
        }
    }

    /// The process's folder in `/proc`.
    pub(crate) fn proc(&self) -> PathBuf {
        Path::new("/proc").join(self.child.id().to_string())
    }

    /// Bytes of memory that are the process's own: neither the guest's RAM nor file pages.
    pub(crate) fn private_memory(&self) -> u64 {
        let statm = fs::read_to_string(self.proc().join("statm")).expect("statm");
        let pages: Vec<u64> = statm
            .split(' ')
            .filter_map(|field| field.trim().parse().ok())
            .collect();
        (pages[1] - pages[2]) * rustix::param::page_size() as u64
    }

    /// Number of file descriptors that the process has open.
    pub(crate) fn open_files(&self) -> usize {
        fs::read_dir(self.proc().join("fd"))
            .expect("the list of file descriptors")
            .count()
    }

    /// Ends the process and returns what it logged.
    pub(crate) fn log(&mut self) -> String {
        let _ = self.child.kill();
        let _ = self.child.wait();
        fs::read_to_string(self.folder.path().join("log")).expect("the log is text")
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        let log = self.log();
        if thread::panicking() {
            eprintln!("the device's log:\n{log}");
        }
    }
}

pub(crate) fn program() -> &'static str {
    env!("CARGO_BIN_EXE_farfault-device")
}
