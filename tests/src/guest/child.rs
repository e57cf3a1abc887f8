// SPDX-License-Identifier: MIT OR Apache-2.0
//! Children of a case.

use anyhow::{Context, Result, ensure};
use farfault::{
    arena::{Signaled, Traced},
    process::{Ended, fork},
};
use rustix::{io, pipe::pipe, process::Signal};

/// `BUS_ADRERR`: nothing is there.
const NOTHING_THERE: i32 = 2;

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

/// A child that does this is sent SIGBUS with this address, and ends by it.
pub(crate) fn ensure_sigbus(address: u64, touch: impl FnOnce()) -> Result<()> {
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
        code: NOTHING_THERE,
        address,
    };
    ensure!(sent == expected, "{sent:x?} instead of {expected:x?}");
    drop(traced);
    let ended = child.wait()?;
    ensure!(ended == Ended::Signaled(expected.signal), "{ended:?}");
    Ok(())
}
