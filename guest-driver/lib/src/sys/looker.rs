// SPDX-License-Identifier: MIT OR Apache-2.0
//! A fork while other threads run, for tests: its child does nothing but look at regions. Part of
//! [`super::arena`].

use super::arena::Region;
use rustix::{
    io::{self, Errno},
    process::{Pid, WaitOptions, waitpid},
};
use std::time::Duration;

/// Words of each page that the child looks at, from its first on.
const WORDS: usize = 8;
/// The child's exit code when it is well; a place that changed is told by codes below.
const STILL: i32 = 255;

/// What the child saw.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Looked {
    /// Its memory is its own.
    Still,
    /// This region's word of this number changed without it.
    Changed(usize, usize),
}

/// Forks, whatever other threads do. The child sees that the first words of these regions stay as they
/// are for a while, then writes `mark` to them, sees that this stays, too, and ends.
///
/// At most 30 regions are looked at.
pub fn fork_that_looks(regions: &[Region], pause: Duration, mark: u64) -> io::Result<Looked> {
    let regions = &regions[..regions.len().min(STILL as usize / WORDS - 1)];
    let mut seen = vec![[0; WORDS]; regions.len()];
    let pause = libc::timespec {
        tv_sec: 0,
        tv_nsec: i64::from(pause.subsec_nanos()),
    };
    // SAFETY: The child calls `look` alone, which allocates nothing and takes no lock: a lock that
    // another thread had is held for ever there. It ends by `_exit`.
    let pid = match unsafe { libc::fork() } {
        -1 => return Err(super::stage::last_error()),
        0 => {
            let code = look(regions, &mut seen, &pause, mark);
            // SAFETY: It ends the process at once.
            unsafe { libc::_exit(code) }
        }
        pid => Pid::from_raw(pid).ok_or(Errno::SRCH)?,
    };
    let status = loop {
        match waitpid(Some(pid), WaitOptions::empty()) {
            Err(Errno::INTR) | Ok(None) => {}
            Err(errno) => return Err(errno),
            Ok(Some((_, status))) => break status,
        }
    };
    match status.exit_status() {
        Some(STILL) => Ok(Looked::Still),
        Some(place) => Ok(Looked::Changed(
            place as usize / WORDS,
            place as usize % WORDS,
        )),
        // A signal: memory that it should have was not there.
        None => Err(Errno::FAULT),
    }
}

/// The child's work: its exit code.
fn look(regions: &[Region], seen: &mut [[u64; WORDS]], pause: &libc::timespec, mark: u64) -> i32 {
    let rest = || {
        // SAFETY: It reads the time and writes nothing.
        unsafe { libc::nanosleep(pause, std::ptr::null_mut()) };
    };
    for (region, seen) in regions.iter().zip(&mut *seen) {
        for (index, word) in seen.iter_mut().enumerate() {
            *word = region.load(index);
        }
    }
    rest();
    for (number, (region, seen)) in regions.iter().zip(&*seen).enumerate() {
        for (index, word) in seen.iter().enumerate() {
            if region.load(index) != *word {
                return (number * WORDS + index) as i32;
            }
            region.store(index, mark);
        }
    }
    rest();
    for (number, region) in regions.iter().enumerate() {
        if let Some(index) = (0..WORDS).find(|&index| region.load(index) != mark) {
            return (number * WORDS + index) as i32;
        }
    }
    STILL
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{PAGE_SIZE, sys::arena::Backing};

    #[test]
    fn child_that_looks_sees_private_memory_still_and_shared_memory_change() {
        let private = Region::map(PAGE_SIZE, Backing::Small).unwrap();
        let shared = Region::map(PAGE_SIZE, Backing::Shared).unwrap();
        let pause = Duration::from_millis(50);
        let stop = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    private.atomic_add(0, 1);
                    shared.atomic_add(3, 1);
                }
            });
            assert_eq!(fork_that_looks(&[private], pause, 1), Ok(Looked::Still));
            let looked = fork_that_looks(&[private, shared], pause, 1);
            stop.store(true, std::sync::atomic::Ordering::Relaxed);
            assert_eq!(looked, Ok(Looked::Changed(1, 3)));
        });
    }
}
