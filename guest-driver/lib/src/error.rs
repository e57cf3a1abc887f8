// SPDX-License-Identifier: MIT OR Apache-2.0
//! What can go wrong: each error says what happened, where, and what to do.

use crate::uapi::{Access, Kernel};
use rustix::io::Errno;
use std::{fmt, io, ops::Range, path::PathBuf};

/// The result of everything in this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// What went wrong. `{:?}` shows the same text as `{}`: it is what a `main` that returns an error
/// prints.
#[derive(thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// There is no device node.
    #[error(
        "found no GPU: there is no /dev/farfault0; load the driver (`insmod farfault.ko`) and see \
         `dmesg` for what it says"
    )]
    NoGpu,
    /// A device node could not be opened.
    #[error("could not open {}: {cause}; {}", path.display(), hint_on_open(cause))]
    Open {
        /// The device node.
        path: PathBuf,
        /// Why.
        cause: io::Error,
    },
    /// The driver is older than this library.
    #[error(
        "{}: the driver has version {driver} of the interface and this library needs {library}; \
         update the driver", path.display()
    )]
    Version {
        /// The device node.
        path: PathBuf,
        /// What the driver has.
        driver: u32,
        /// What the library needs.
        library: u32,
    },
    /// The driver refused a call.
    #[error("{call}{} failed: {}", place(at), explain(cause))]
    Call {
        /// Name of the call, and of the kernel if it was to start or wait for a job.
        call: CallName,
        /// The addresses that it was about, if it was about any.
        at: Option<Range<usize>>,
        /// What the driver said.
        cause: io::Error,
    },
    /// The library refused a call before the driver saw it.
    #[error("{call}: {problem}")]
    Argument {
        /// Name of the call.
        call: CallName,
        /// What is wrong with it, and what would be right.
        problem: String,
    },
    /// A job wanted to access memory that it may not.
    #[error(
        "{kernel} job failed: the GPU may not {} {address:#x}: nothing is mapped there, or not for \
         that; see /proc/self/maps", verb(*access)
    )]
    Fault {
        /// What ran.
        kernel: Kernel,
        /// The page.
        address: u64,
        /// What the job wanted to do.
        access: Access,
    },
    /// A job was killed.
    #[error("{0} job was killed before it ended; what it wrote until then stays")]
    Killed(Kernel),
    /// The GPU could not reach the memory behind an address.
    #[error(
        "{kernel} job failed: the GPU could not reach the memory behind {address:#x} (bus error); \
         see `dmesg`, for this is a fault of the driver or the device"
    )]
    BusError {
        /// What ran.
        kernel: Kernel,
        /// The page.
        address: u64,
    },
    /// The memory behind an address has failed.
    #[error(
        "{kernel} job failed: the GPU's memory behind {address:#x} has failed, and its contents are \
         lost; map the page anew before it is used again"
    )]
    MemoryError {
        /// What ran.
        kernel: Kernel,
        /// The page.
        address: u64,
    },
    /// The device stopped answering, or the driver was unbound, while the job ran.
    #[error(
        "{0} job was lost: the GPU stopped answering or was taken away while it ran; see `dmesg`, \
         and open the GPU again when it is back"
    )]
    DeviceLost(Kernel),
    /// The driver answered what the interface does not describe.
    #[error("{call}: the driver answered {answer}, which its interface does not have; update it")]
    Answer {
        /// Name of the call.
        call: CallName,
        /// What it said.
        answer: String,
    },
    /// A child process could not be made, or not be waited for.
    #[error("could not {what}: {cause}")]
    Process {
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        cause: io::Error,
    },
}

/// The name of a call to the driver, for messages: `MIGRATE`, `SUBMIT (fill)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CallName {
    call: &'static str,
    kernel: Option<Kernel>,
}

impl CallName {
    pub(crate) const fn new(call: &'static str) -> Self {
        Self { call, kernel: None }
    }

    pub(crate) const fn of_kernel(call: &'static str, kernel: Kernel) -> Self {
        Self {
            call,
            kernel: Some(kernel),
        }
    }
}

impl fmt::Display for CallName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.kernel {
            Some(kernel) => write!(f, "{} ({kernel})", self.call),
            None => f.write_str(self.call),
        }
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Fill => "fill",
            Self::Copy => "copy",
            Self::Sum => "sum",
            Self::Add => "add",
            Self::AtomicAdd => "atomic-add",
            Self::CompareAndSwap => "compare-and-swap",
            Self::PointerChase => "pointer-chase",
        })
    }
}

impl Error {
    pub(crate) fn call(call: CallName, at: Option<Range<usize>>, errno: Errno) -> Self {
        Self::Call {
            call,
            at,
            cause: errno.into(),
        }
    }

    /// True if the call can succeed later, when a job has ended and was collected.
    pub fn is_busy(&self) -> bool {
        matches!(self, Self::Call { cause, .. } if Errno::from_io_error(cause) == Some(Errno::AGAIN))
    }

    /// True if the call is for private anonymous memory only, and this is not.
    pub fn is_not_anonymous(&self) -> bool {
        matches!(self, Self::Call { cause, .. } if Errno::from_io_error(cause) == Some(Errno::OPNOTSUPP))
    }

    /// True if this GPU is gone for good: unplugged, unbound or not answering.
    pub fn is_device_gone(&self) -> bool {
        match self {
            Self::DeviceLost(_) => true,
            Self::Call { cause, .. } => {
                matches!(Errno::from_io_error(cause), Some(Errno::NODEV | Errno::IO))
            }
            _ => false,
        }
    }
}

fn hint_on_open(cause: &io::Error) -> &'static str {
    match cause.kind() {
        io::ErrorKind::NotFound => "is the driver loaded (`insmod farfault.ko`)?",
        io::ErrorKind::PermissionDenied => "who may use it is decided by the node's owner and mode",
        _ => "see `dmesg` for what the driver says",
    }
}

fn place(at: &Option<Range<usize>>) -> String {
    at.as_ref().map_or(String::new(), |range| {
        format!(" on {:#x}..{:#x}", range.start, range.end)
    })
}

/// What an error number of the interface means, and what to do.
fn explain(cause: &io::Error) -> String {
    let text = match Errno::from_io_error(cause) {
        Some(Errno::NODEV) => "the GPU was unbound or unplugged; open it again when it is back",
        Some(Errno::IO) => "the GPU does not answer any more; see `dmesg` and replug it",
        Some(Errno::INVAL) => "the driver does not accept a value; check alignment and limits",
        Some(Errno::FAULT) => "part of the range is not mapped; see /proc/self/maps",
        Some(Errno::PERM) => {
            "the GPU was opened by another process; a child must open it for itself after fork"
        }
        Some(Errno::NOTTY) => "the driver has no such call; update it, or open a farfault device",
        Some(Errno::AGAIN) => "too many jobs have not been collected; wait for one first",
        Some(Errno::NOENT) => "there is no such job; it was collected before",
        Some(Errno::NOSPC) => {
            "no context or no VRAM for page tables is left, or too many ranges have an advice of their \
             own; close other users of the GPU, or advise larger ranges"
        }
        Some(Errno::NOMEM) => "the kernel has no memory for the call; free some and try again",
        Some(Errno::OPNOTSUPP) => {
            "the GPU can take only private anonymous memory for itself; job atomics need no call"
        }
        Some(Errno::BUSY) => "the pages kept changing; try again when the program is calmer",
        Some(Errno::TIMEDOUT) => "it has not ended in time; wait longer, or kill it",
        _ => return cause.to_string(),
    };
    format!("{text} ({cause})")
}

fn verb(access: Access) -> &'static str {
    match access {
        Access::Read => "read",
        Access::Write => "write",
        Access::Atomic => "do an atomic operation on",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call_error(errno: Errno) -> Error {
        Error::call(CallName::new("MIGRATE"), Some(0x1000..0x3000), errno)
    }

    #[test]
    fn call_error_shown_says_what_where_and_what_to_do() {
        let text = call_error(Errno::FAULT).to_string();
        assert!(
            text.starts_with("MIGRATE on 0x1000..0x3000 failed: "),
            "{text}"
        );
        assert!(text.contains("not mapped; see /proc/self/maps"), "{text}");
        assert!(text.contains("os error 14"), "{text}");
    }

    #[test]
    fn submit_error_shown_names_the_kernel() {
        let call = CallName::of_kernel("SUBMIT", Kernel::AtomicAdd);
        let text = Error::call(call, None, Errno::AGAIN).to_string();
        assert!(
            text.starts_with("SUBMIT (atomic-add) failed: too many jobs"),
            "{text}"
        );
    }

    #[test]
    fn every_errno_of_the_interface_explained_has_advice() {
        use Errno as E;
        for errno in [
            E::NODEV,
            E::IO,
            E::INVAL,
            E::FAULT,
            E::PERM,
            E::NOTTY,
            E::AGAIN,
            E::NOENT,
            E::NOSPC,
            E::NOMEM,
            E::OPNOTSUPP,
            E::BUSY,
            E::TIMEDOUT,
        ] {
            let text = explain(&errno.into());
            assert!(text.contains(';'), "{errno:?}: {text}");
        }
    }

    #[test]
    fn fault_shown_has_address_and_access() {
        let text = Error::Fault {
            kernel: Kernel::Sum,
            address: 0x7000,
            access: Access::Read,
        }
        .to_string();
        assert!(
            text.contains("sum job failed: the GPU may not read 0x7000"),
            "{text}"
        );
    }

    #[test]
    fn open_error_of_missing_node_asks_for_the_driver() {
        let text = Error::Open {
            path: "/dev/farfault9".into(),
            cause: io::ErrorKind::NotFound.into(),
        }
        .to_string();
        assert!(
            text.contains("/dev/farfault9") && text.contains("insmod farfault.ko"),
            "{text}"
        );
    }

    #[test]
    fn questions_about_errors_tell_errnos_apart() {
        assert!(call_error(Errno::AGAIN).is_busy());
        assert!(!call_error(Errno::NODEV).is_busy());
        assert!(call_error(Errno::NODEV).is_device_gone());
        assert!(call_error(Errno::IO).is_device_gone());
        assert!(Error::DeviceLost(Kernel::Fill).is_device_gone());
        assert!(!call_error(Errno::PERM).is_device_gone());
        assert!(call_error(Errno::OPNOTSUPP).is_not_anonymous());
        assert!(!call_error(Errno::FAULT).is_not_anonymous());
    }
}
