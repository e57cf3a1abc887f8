// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a hostile guest may do to the device, from bytes: one function for each fuzz target.
//!
//! `fuzz_targets/` makes programs of them for cargo-fuzz; `tests/corpus.rs` runs each over the corpus
//! and over some random bytes, so that every test run does a little of it. Bytes become steps by
//! `arbitrary`: whatever they are, they mean something. Each function panics when the device does
//! what it must not: panic, go on without end, keep more than its limits, answer twice or never, map
//! what no page table says.
//!
//! | target | what is fuzzed | how |
//! | --- | --- | --- |
//! | [`control`] | requests of the control queue | the GPU alone, with work in flight |
//! | [`submit`] | requests of the submit queue | the same |
//! | [`event`] | buffers, faults, fences, errors | the same, with few buffers |
//! | [`walk`] | page tables of any contents | the walk alone, against a model |
//! | [`config`] | reads and writes of the configuration space | the transport |
//! | [`sequence`] | rings, chains, kicks, resets, memory tables | the transport with all behind it |
//!
//! The same over a real socket, slower: `device/tests/transport/fuzz.rs`.

mod command;
pub mod config;
pub mod control;
pub mod event;
mod machine;
mod number;
pub mod sequence;
pub mod submit;
pub mod walk;

/// A target: its name, which is its corpus's, and what runs it.
pub type Target = (&'static str, fn(&[u8]));

/// All of them.
pub const TARGETS: &[Target] = &[
    ("control", control::run),
    ("submit", submit::run),
    ("event", event::run),
    ("walk", walk::run),
    ("config", config::run),
    ("sequence", sequence::run),
];
