// SPDX-License-Identifier: MIT OR Apache-2.0
//! The device as QEMU meets it: the real process, over a real socket, with a front end and a driver
//! that live in the test. Manual, chapters 2 to 10.
//!
//! Every wait has a deadline ([`guest::DEADLINE`]); every device process is ended with its test.

mod bad_chains;
mod control_socket;
mod device;
mod fuzz;
mod guest;
mod hostile;
mod life;
mod requests;
mod ring;
