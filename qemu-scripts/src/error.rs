// SPDX-License-Identifier: MIT OR Apache-2.0
//! What can go wrong for the person at the keyboard. Each message says what happened, where, and what to do.

use std::{io, path::PathBuf, process::ExitStatus, time::Duration};

/// A result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An operational error.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The system refused something.
    #[error("{what}: {answer}")]
    Io {
        /// What was tried, on what.
        what: String,
        /// The system's answer.
        answer: io::Error,
    },
    /// Something outside is missing or unfit, and somebody can mend it.
    #[error("{what}\n  to mend it: {mend}")]
    Unfit {
        /// What is missing.
        what: String,
        /// A command, or what to change.
        mend: String,
    },
    /// A tool that was run said no.
    #[error("{what} failed ({status}); its last lines:\n{tail}\n  the whole log: {}", log.display())]
    Tool {
        /// What was being done.
        what: String,
        /// How the tool ended.
        status: ExitStatus,
        /// The end of its log.
        tail: String,
        /// All of its log.
        log: PathBuf,
    },
    /// A build whose output has already been shown.
    #[error("{what} failed ({status}); the reason stands above")]
    Shown {
        /// What was being done.
        what: String,
        /// How the tool ended.
        status: ExitStatus,
    },
    /// A time limit ran out.
    #[error("{what} did not happen within {limit:?}{}", tail(details))]
    Timeout {
        /// What was waited for.
        what: String,
        /// For how long.
        limit: Duration,
        /// What there is to see, or nothing.
        details: String,
    },
    /// A VM, or a process that belongs to it, is not as it should be.
    #[error("{what}{}", tail(details))]
    Vm {
        /// What is wrong.
        what: String,
        /// What there is to see, or nothing.
        details: String,
    },
}

fn tail(details: &str) -> String {
    if details.is_empty() {
        String::new()
    } else {
        format!("\n{}", details.trim_end())
    }
}

impl Error {
    /// For `map_err` on the results of the standard library and of rustix.
    pub(crate) fn io<E: Into<io::Error>>(what: impl Into<String>) -> impl FnOnce(E) -> Self {
        let what = what.into();
        move |answer| Self::Io {
            what,
            answer: answer.into(),
        }
    }

    pub(crate) fn unfit(what: impl Into<String>, mend: impl Into<String>) -> Self {
        Self::Unfit {
            what: what.into(),
            mend: mend.into(),
        }
    }

    pub(crate) fn vm(what: impl Into<String>) -> Self {
        Self::Vm {
            what: what.into(),
            details: String::new(),
        }
    }
}
