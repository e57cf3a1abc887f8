// SPDX-License-Identifier: MIT OR Apache-2.0
//! The Farfault GPU: [`gpu`] is the hardware, what is around it makes it a device of a VM.
//!
//! | module | what it does |
//! | --- | --- |
//! | [`gpu`] | the hardware: contexts, page tables, faults, copies, jobs |
//! | [`transport`] | the hardware as a vhost-user device |
//! | [`control_socket`] | questions about a running GPU |
//! | [`server`] | the process: sockets, signals, one VM after the other |
//! | [`sandbox`] | what the process gives up |
//! | [`cli`] | the command line |
//!
//! `gpu` imports none of the others; only `server` and `main.rs` know all of them.

pub mod cli;
pub mod control_socket;
pub mod gpu;
mod rate_limit;
pub mod sandbox;
pub mod server;
pub mod socket;
pub mod transport;
