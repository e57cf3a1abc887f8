// SPDX-License-Identifier: MIT OR Apache-2.0
//! Steps that are done once, and the lock over the cache that they fill.
//!
//! A step fills one folder. Its stamp is a file in that folder, written last and in one piece, that holds everything the
//! result depends on, as text. A folder without the stamp, or with another one, is thrown away and filled anew: so an
//! interrupted step and a stale one are the same case, and a look at the stamp says what the folder was made from.
//! A step that takes long can go on where it stopped: it keeps a folder that was begun with the same stamp.
//!
//! Lock: whoever uses the cache holds it shared for as long as it lives, whoever fills it holds it alone.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
};

use rustix::fs::{FlockOperation, flock};

use crate::{Error, Result, paths, progress};

const STAMP: &str = ".stamp";

/// What a step that can go on has begun with.
const BEGUN: &str = ".begun";

/// A folder and what its content is made from.
#[derive(Debug, Clone)]
pub(crate) struct Step {
    folder: PathBuf,
    stamp: String,
}

impl Step {
    pub(crate) fn new(folder: PathBuf, inputs: &[&str]) -> Self {
        Self {
            folder,
            stamp: inputs.join("\n---\n"),
        }
    }

    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    pub(crate) fn stamp(&self) -> &str {
        &self.stamp
    }

    pub(crate) fn is_done(&self) -> bool {
        self.is_in(STAMP)
    }

    fn is_in(&self, file: &str) -> bool {
        fs::read_to_string(self.folder.join(file)).is_ok_and(|stamp| stamp == self.stamp)
    }

    /// Fills the folder anew, unless it is as it should be.
    pub(crate) fn ensure(&self, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
        if self.is_done() {
            return Ok(());
        }
        self.empty()?;
        fill(&self.folder)?;
        self.write_to(STAMP)
    }

    /// The same for a filling that can go on where an earlier one with the same stamp stopped.
    pub(crate) fn ensure_going_on(&self, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
        if self.is_done() {
            return Ok(());
        }
        if !self.is_in(BEGUN) {
            self.empty()?;
            self.write_to(BEGUN)?;
        }
        fill(&self.folder)?;
        paths::remove(&self.folder.join(BEGUN))?;
        self.write_to(STAMP)
    }

    fn empty(&self) -> Result<()> {
        // What says that the folder is worth something goes first, for a removal that is interrupted.
        paths::remove(&self.folder.join(STAMP))?;
        paths::remove(&self.folder.join(BEGUN))?;
        paths::remove(&self.folder)?;
        paths::create_dir(&self.folder)
    }

    fn write_to(&self, file: &str) -> Result<()> {
        paths::write_atomically(&self.folder.join(file), self.stamp.as_bytes())
    }
}

/// The lock over a folder that several runs share; released when it is dropped.
#[derive(Debug)]
pub(crate) struct Lock {
    _file: File,
}

impl Lock {
    /// For use: others may use it too.
    pub(crate) fn shared(folder: &Path) -> Result<Self> {
        Self::take(
            folder,
            FlockOperation::NonBlockingLockShared,
            FlockOperation::LockShared,
        )
    }

    /// For change: nobody else is there.
    pub(crate) fn exclusive(folder: &Path) -> Result<Self> {
        Self::take(
            folder,
            FlockOperation::NonBlockingLockExclusive,
            FlockOperation::LockExclusive,
        )
    }

    fn take(folder: &Path, now: FlockOperation, wait: FlockOperation) -> Result<Self> {
        paths::create_dir(folder)?;
        let path = folder.join("lock");
        let what = || format!("locking {}", path.display());
        let file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .map_err(Error::io(what()))?;
        match flock(&file, now) {
            Err(rustix::io::Errno::WOULDBLOCK) => {
                progress::note(&format!(
                    "waiting for another run that uses {} (Ctrl-C ends the wait)",
                    folder.display()
                ));
                flock(&file, wait).map_err(Error::io(what()))?;
            }
            other => other.map_err(Error::io(what()))?,
        }
        Ok(Self { _file: file })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fill_counting(step: &Step) -> usize {
        let mut fills = 0;
        step.ensure(|folder| {
            fills += 1;
            fs::write(folder.join("content"), "x").map_err(Error::io("content"))
        })
        .unwrap();
        fills
    }

    #[test]
    fn step_done_once_is_not_repeated() {
        let folder = tempfile::tempdir().unwrap();
        let step = Step::new(folder.path().join("step"), &["a", "b"]);
        assert_eq!(fill_counting(&step), 1);
        assert_eq!(fill_counting(&step), 0);
    }

    #[test]
    fn step_with_another_input_is_redone() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(
            fill_counting(&Step::new(folder.path().join("step"), &["a"])),
            1
        );
        assert_eq!(
            fill_counting(&Step::new(folder.path().join("step"), &["b"])),
            1
        );
    }

    #[test]
    fn step_interrupted_is_redone_from_an_empty_folder() {
        let folder = tempfile::tempdir().unwrap();
        let step = Step::new(folder.path().join("step"), &["a"]);
        let interrupted = step.ensure(|folder| {
            fs::write(folder.join("half"), "x").map_err(Error::io("half"))?;
            Err(Error::vm("interrupted"))
        });
        assert!(interrupted.is_err());
        assert!(!step.is_done());
        assert_eq!(fill_counting(&step), 1);
        assert!(!step.folder().join("half").exists());
    }

    fn go_on(step: &Step, name: &str, end: Result<()>) -> bool {
        let went_on = |folder: &Path| {
            fs::write(folder.join(name), "x").map_err(Error::io("content"))?;
            end
        };
        step.ensure_going_on(went_on).is_ok()
    }

    #[test]
    fn step_that_can_go_on_keeps_what_an_interrupted_one_left() {
        let folder = tempfile::tempdir().unwrap();
        let step = Step::new(folder.path().join("step"), &["a"]);
        assert!(!go_on(&step, "half", Err(Error::vm("interrupted"))));
        assert!(!step.is_done());
        assert!(go_on(&step, "rest", Ok(())));
        assert!(step.is_done());
        assert!(step.folder().join("half").exists() && step.folder().join("rest").exists());
    }

    #[test]
    fn step_that_can_go_on_starts_anew_with_another_input() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("step");
        assert!(!go_on(
            &Step::new(path.clone(), &["a"]),
            "half",
            Err(Error::vm("interrupted"))
        ));
        let other = Step::new(path, &["b"]);
        assert!(go_on(&other, "rest", Ok(())));
        assert!(!other.folder().join("half").exists());
    }

    #[test]
    fn lock_held_shared_is_not_had_alone() {
        let folder = tempfile::tempdir().unwrap();
        let _one = Lock::shared(folder.path()).unwrap();
        let _two = Lock::shared(folder.path()).unwrap();
        let file = File::open(folder.path().join("lock")).unwrap();
        assert_eq!(
            flock(&file, FlockOperation::NonBlockingLockExclusive),
            Err(rustix::io::Errno::WOULDBLOCK)
        );
    }
}
