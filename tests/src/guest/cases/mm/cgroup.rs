// SPDX-License-Identifier: MIT OR Apache-2.0
//! A memory cgroup of a case, by its files.

use super::start::eventually;
use anyhow::{Context, Result, ensure};
use std::{fs, path::PathBuf};

const ROOT: &str = "/sys/fs/cgroup";

/// A group. It goes when this is dropped, with the processes that are in it.
#[derive(Debug)]
pub(super) struct Cgroup(PathBuf);

impl Cgroup {
    pub(super) fn new(name: &str) -> Result<Self> {
        let control = format!("{ROOT}/cgroup.subtree_control");
        fs::write(control, "+memory").context("the kernel has no memory controller")?;
        let folder = PathBuf::from(format!("{ROOT}/farfault-{name}-{}", std::process::id()));
        fs::create_dir(&folder)?;
        Ok(Self(folder))
    }

    fn read(&self, file: &str) -> Result<String> {
        fs::read_to_string(self.0.join(file)).with_context(|| file.to_owned())
    }

    /// Takes the calling process in.
    pub(super) fn enter(&self) -> Result<()> {
        Ok(fs::write(self.0.join("cgroup.procs"), "0")?)
    }

    /// Bytes that are charged. Each CPU keeps some ahead: [`Cgroup::SLACK`].
    pub(super) fn current(&self) -> Result<u64> {
        Ok(self.read("memory.current")?.trim().parse()?)
    }

    /// How far [`Cgroup::current`] may be off.
    pub(super) const SLACK: u64 = 1 << 20;

    pub(super) fn ensure_current(&self, bytes: u64, what: &str) -> Result<()> {
        let current = self.current()?;
        ensure!(
            current.abs_diff(bytes) <= Self::SLACK,
            "{what}: {current} bytes are charged, and should be {bytes}"
        );
        Ok(())
    }

    pub(super) fn set_max(&self, bytes: u64) -> Result<()> {
        fs::write(self.0.join("memory.max"), bytes.to_string()).context("memory.max")
    }

    /// Lets the kernel reclaim so much of the group, as far as it can.
    pub(super) fn reclaim(&self, bytes: u64) -> Result<()> {
        match fs::write(self.0.join("memory.reclaim"), bytes.to_string()) {
            Err(error) if error.kind() != std::io::ErrorKind::WouldBlock => {
                Err(error).context("memory.reclaim")
            }
            _ => Ok(()),
        }
    }

    /// How often something happened, by the names of `memory.events`.
    pub(super) fn events(&self, name: &str) -> Result<u64> {
        let text = self.read("memory.events")?;
        let lines = text.lines().filter_map(|line| line.split_once(' '));
        let mut counts = lines.filter(|line| line.0 == name).map(|line| line.1);
        Ok(counts.next().context(name.to_owned())?.parse()?)
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let _ = fs::write(self.0.join("cgroup.kill"), "1");
        // Processes that end are there a moment longer.
        let _ = eventually("the group is empty", || Ok(fs::remove_dir(&self.0).is_ok()));
    }
}
