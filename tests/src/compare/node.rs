// SPDX-License-Identifier: MIT OR Apache-2.0
//! One call of a node, as text. Its argument lies in a page of the stage, and its data in a buffer
//! there, unless a script says otherwise; so any of it may be wrong, or be moved by the call itself.

use super::{
    address::{ARGUMENT, BUFFER, BUFFER_PAGES, PAGE, Range},
    content::{Content, UNTOUCHED, describe, describe_snapshot, word},
    script::{Call, NodeCall},
};
use farfault::{
    arena::call_at,
    stage::{self, STAGE},
};
use rustix::{fd::BorrowedFd, io::Errno};

/// `_IOWR('H', number, struct hmm_dmirror_cmd)`.
const BASE: u32 = 3 << 30 | (WORDS as u32 * 8) << 16 | (b'H' as u32) << 8;
/// 64-bit words of the argument: addr, ptr, npages, cpages, faults.
pub(super) const WORDS: u64 = 5;
const CPAGES: u64 = 3;
const FAULTS: u64 = 4;
/// What the outputs hold before.
const BEFORE: u64 = 0x5e57;

impl Call {
    fn number(self) -> u32 {
        let number = match self {
            Self::Read => 0,
            Self::Write => 1,
            Self::ToDev => 2,
            Self::ToSys => 3,
            Self::Snapshot => 4,
            Self::Exclusive => 5,
            Self::Check => 6,
            Self::Release => 7,
            Self::Flags => 8,
            Self::Number(number) => return number,
        };
        BASE | number
    }

    /// Does the node give data back to the buffer?
    fn gives_data(self) -> bool {
        matches!(self, Self::Read | Self::ToDev | Self::Exclusive)
    }
}

/// Puts an argument somewhere.
pub(super) fn place(at: u64, range: Range, pointer: u64) {
    let words = [range.address, pointer, range.pages, BEFORE, BEFORE];
    for (index, value) in words.into_iter().enumerate() {
        stage::store(at + 8 * index as u64, value);
    }
}

/// How many pages of the buffer a call can reach, and how many are looked at.
fn buffer_pages(call: &NodeCall) -> u64 {
    match call.call {
        _ if call.pointer.is_some() || call.argument.is_some() => 0,
        Call::Snapshot => call.range.pages.min(PAGE).div_ceil(PAGE),
        _ => call.range.pages.min(BUFFER_PAGES),
    }
}

fn fill_buffer(call: &NodeCall) {
    for page in 0..buffer_pages(call) {
        let of = call.range.address / PAGE + page;
        for index in 0..PAGE / 8 {
            let in_stage = STAGE.contains(&(of * PAGE));
            let value = match call.call {
                Call::Write if in_stage => word(call.tag, of, index),
                Call::Write => u64::from(call.tag) << 48 | index,
                _ => UNTOUCHED,
            };
            stage::store(BUFFER + page * PAGE + 8 * index, value);
        }
    }
}

/// What the buffer holds afterwards.
fn buffer(call: &NodeCall) -> String {
    let pages = buffer_pages(call);
    if call.call == Call::Snapshot {
        let bytes: Vec<u8> = (0..call.range.pages.min(pages * PAGE))
            .map(|index| stage::load(BUFFER + index / 8 * 8).to_le_bytes()[index as usize % 8])
            .collect();
        return describe_snapshot(&bytes);
    }
    if !call.call.gives_data() {
        return String::new();
    }
    let contents: Vec<_> = (0..pages)
        .map(|page| Content::of(|index| stage::load(BUFFER + page * PAGE + 8 * index)))
        .collect();
    describe(&contents)
}

/// Makes the call and says what came of it; `faults` are shown on request only.
pub(super) fn call(file: BorrowedFd<'_>, call: &NodeCall, faults: bool) -> (bool, String) {
    let usual = call.argument.is_none();
    if usual {
        fill_buffer(call);
        place(ARGUMENT, call.range, call.pointer.unwrap_or(BUFFER));
    }
    let at = call.argument.unwrap_or(ARGUMENT);
    let result = call_at(file, call.call.number(), at);
    let mut text = match result {
        Ok(()) => "ok".to_owned(),
        Err(errno) => error(errno),
    };
    if usual {
        // Of a failed call nothing is written back.
        let cpages = stage::load(ARGUMENT + 8 * CPAGES);
        if result.is_ok() || cpages != BEFORE {
            text += &format!(" cpages={cpages}");
        }
        if faults && result.is_ok() {
            text += &format!(" faults={}", stage::load(ARGUMENT + 8 * FAULTS));
        }
        let inputs = [
            call.range.address,
            call.pointer.unwrap_or(BUFFER),
            call.range.pages,
        ];
        let kept = inputs.iter().enumerate();
        let kept = kept.map(|(index, value)| stage::load(ARGUMENT + 8 * index as u64) == *value);
        if !kept.into_iter().all(|kept| kept) {
            text += " inputs changed";
        }
        let buffer = buffer(call);
        let untouched = buffer.is_empty()
            || !buffer.contains(' ') && (buffer.starts_with('~') || buffer.starts_with('?'));
        if !untouched {
            text += &format!(" [{buffer}]");
        }
    }
    (result.is_ok(), text)
}

/// An errno's name, of those that are to be expected; others by number.
pub(super) fn error(errno: Errno) -> String {
    let name = match errno {
        Errno::ACCESS => "EACCES",
        Errno::AGAIN => "EAGAIN",
        Errno::BADF => "EBADF",
        Errno::BUSY => "EBUSY",
        Errno::EXIST => "EEXIST",
        Errno::FAULT => "EFAULT",
        Errno::INTR => "EINTR",
        Errno::INVAL => "EINVAL",
        Errno::IO => "EIO",
        Errno::NODEV => "ENODEV",
        Errno::NOENT => "ENOENT",
        Errno::NOMEM => "ENOMEM",
        Errno::NOTTY => "ENOTTY",
        Errno::NXIO => "ENXIO",
        Errno::OPNOTSUPP => "EOPNOTSUPP",
        Errno::OVERFLOW => "EOVERFLOW",
        Errno::PERM => "EPERM",
        other => return format!("errno {}", other.raw_os_error()),
    };
    name.to_owned()
}
