// SPDX-License-Identifier: MIT OR Apache-2.0
//! Children of a case.

use anyhow::{Context, Result, ensure};
use farfault::{
    arena::{Signaled, Traced},
    process::{Ended, fork},
};
use rustix::{io, pipe::pipe, process::Signal};
use std::os::fd::OwnedFd;

/// Why the kernel sends SIGBUS.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Bus {
    /// `BUS_ADRERR`: nothing is there.
    Nothing = 2,
    /// `BUS_MCEERR_AR`: the memory has failed.
    Failed = 4,
}

/// Where a child and its parent wait for each other. It is theirs if it was made before the fork.
pub(crate) struct Gate {
    inside: OwnedFd,
    outside: OwnedFd,
}

impl Gate {
    pub(crate) fn new() -> Result<Self> {
        let (inside, outside) = pipe()?;
        Ok(Self { inside, outside })
    }

    /// Lets one of those pass who wait, or the next one.
    pub(crate) fn open(&self) -> Result<()> {
        io::write(&self.outside, &[1])?;
        Ok(())
    }

    /// Waits until it is opened. The harness limits how long.
    pub(crate) fn wait(&self) -> Result<()> {
        io::read(&self.inside, &mut [0u8])?;
        Ok(())
    }
}

/// The code of a child that did what it should, or has said why not.
pub(crate) fn code(result: Result<()>) -> u8 {
    match result {
        Ok(()) => 0,
        Err(error) => {
            eprintln!("child: {error:?}");
            1
        }
    }
}

/// A child that does this is sent SIGBUS with this address, as nothing is there, and ends by it.
pub(crate) fn ensure_sigbus(address: u64, touch: impl FnOnce()) -> Result<()> {
    ensure_sigbus_for(Bus::Nothing, address, touch)
}

/// As [`ensure_sigbus`], for another reason.
pub(crate) fn ensure_sigbus_for(why: Bus, address: u64, touch: impl FnOnce()) -> Result<()> {
    let (from_parent, to_child) = pipe()?;
    let child = fork(|| {
        let told = io::read(&from_parent, &mut [0u8]).is_ok();
        if told {
            touch();
        }
        u8::from(!told)
    })?;
    let traced = Traced::attach(child.pid().context("the child has no pid")?)?;
    io::write(&to_child, &[1])?;
    let sent = traced.until_signal().context("a child that touches")?;
    let expected = Signaled {
        signal: Signal::BUS.as_raw(),
        code: why as i32,
        address,
    };
    ensure!(sent == expected, "{sent:x?} instead of {expected:x?}");
    drop(traced);
    let ended = child.wait()?;
    ensure!(ended == Ended::Signaled(expected.signal), "{ended:?}");
    Ok(())
}
