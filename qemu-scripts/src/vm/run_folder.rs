// SPDX-License-Identifier: MIT OR Apache-2.0
//! The folder of one VM's logs (deleted when all went well, kept and pointed at otherwise), and that of its sockets.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process,
    sync::atomic::{AtomicU32, Ordering},
};

use tempfile::TempDir;

use crate::{Error, Result, paths};

/// The name of the file that says how to run the same again.
const REPEAT: &str = "repeat";

/// A folder of logs.
#[derive(Debug)]
pub(crate) struct RunFolder {
    path: PathBuf,
    keep: bool,
}

impl RunFolder {
    /// Makes a folder for a VM of this name; those of earlier runs of the name go.
    pub(crate) fn new(runs: &Path, name: &str, repeat: &str) -> Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name: String = name
            .chars()
            .map(|c| if c.is_ascii_alphanumeric() { c } else { '_' })
            .collect();
        for old in of_ended_processes(runs, &name) {
            paths::remove(&old)?;
        }
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = runs.join(format!("{name}.{}.{count}", process::id()));
        paths::remove(&path)?;
        paths::create_dir(&path)?;
        paths::write_atomically(&path.join(REPEAT), repeat.as_bytes())?;
        Ok(Self { path, keep: true })
    }

    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// All went well: nobody will want to read this.
    pub(crate) fn discard(&mut self) {
        self.keep = false;
    }
}

impl Drop for RunFolder {
    fn drop(&mut self) {
        if self.keep {
            eprintln!(
                "the VM's console and logs are in {}; `{REPEAT}` there says how to run it again",
                self.path.display()
            );
        } else if let Err(error) = paths::remove(&self.path) {
            eprintln!("{error}");
        }
    }
}

/// A folder for a VM's sockets. Their paths are limited to some 100 bytes, which a clone's own folders can exceed, so it is
/// one for temporary files; those of processes that were killed go.
pub(crate) fn socket_folder() -> Result<TempDir> {
    const NAME: &str = "farfault";
    for old in of_ended_processes(&env::temp_dir(), NAME) {
        // Another user's stays: only its owner may remove it, and will.
        let _ = paths::remove(&old);
    }
    let prefix = format!("{NAME}.{}.", process::id());
    let folder = tempfile::Builder::new().prefix(&prefix).tempdir();
    folder.map_err(Error::io("making a folder for sockets"))
}

/// The folders `NAME.PID.…` whose process has ended.
fn of_ended_processes(parent: &Path, name: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(parent).into_iter().flatten().flatten();
    let has_ended = |path: &PathBuf| {
        let file_name = path.file_name().unwrap_or_default().to_string_lossy();
        let mut parts = file_name.split('.');
        let pid = (parts.next() == Some(name)).then(|| parts.next()).flatten();
        pid.is_some_and(|pid| pid.parse::<u32>().is_ok() && !Path::new("/proc").join(pid).exists())
    };
    entries
        .map(|entry| entry.path())
        .filter(has_ended)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn run_folder_of_a_failed_run_is_kept_until_the_next_of_its_name() {
        let runs = tempfile::tempdir().unwrap();
        // No process has this number.
        let old = runs.path().join("a_test.4194305.0");
        fs::create_dir(&old).unwrap();
        let folder = RunFolder::new(runs.path(), "a/test", "cargo xtask test a/test").unwrap();
        let kept = folder.file(REPEAT);
        drop(folder);
        assert!(!old.exists());
        assert_eq!(fs::read_to_string(kept).unwrap(), "cargo xtask test a/test");
    }

    #[test]
    fn run_folder_that_is_discarded_is_gone() {
        let runs = tempfile::tempdir().unwrap();
        let mut folder = RunFolder::new(runs.path(), "x", "").unwrap();
        let file = folder.file(REPEAT);
        folder.discard();
        drop(folder);
        assert!(!file.exists());
    }
}
