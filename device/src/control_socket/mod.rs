// SPDX-License-Identifier: MIT OR Apache-2.0
//! The control socket: questions about a running GPU, asked by `farfault-device stats` and
//! `inspect`, answered while it runs.
//!
//! JSON, one line for a request and one for its answer, over a Unix stream; a client may ask several
//! in turn. All but [`Request::Copies`] and [`Request::Poison`], which are for benchmarks and tests, only
//! look: they change nothing that the guest sees.
//!
//! | part | what it does |
//! | --- | --- |
//! | this file | the messages |
//! | `server` | clients, their limits and deadlines, in the process's event loop |
//! | `client` | one request from the command line |
//! | `tables` | answers for human eyes |

mod client;
mod server;
mod tables;

pub use client::{ClientError, ask};
pub use server::ControlSocket;
pub use tables::print;

use serde::{Deserialize, Serialize};

/// What can be asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// The counters.
    Stats,
    /// The contexts, and how much runs in each.
    Contexts,
    /// What the page tables of one context map, as runs.
    PageTable {
        /// Its number.
        context: u32,
    },
    /// The translations that the TLBs hold.
    Tlb,
    /// Device memory in use.
    Vram,
    /// Faults that wait for the driver.
    Faults,
    /// Jobs and where their waves are.
    Jobs,
    /// For benchmarks only: off, copy lists are answered and move nothing, so that the contents of
    /// their destinations are undefined. Answers with what holds from now on.
    Copies {
        /// Whether they move anything.
        on: bool,
    },
    /// For tests of drivers only: a page of VRAM loses its contents. Answers with all such pages.
    Poison {
        /// An address in it.
        address: u64,
    },
}

/// The answer to a [`Request`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Response {
    /// It could be answered.
    Ok(serde_json::Value),
    /// It could not: why.
    Error(String),
}

/// Who can answer requests.
pub trait Answer {
    /// Answers one request, in bounded time.
    fn answer(&self, request: Request) -> Response;
}
