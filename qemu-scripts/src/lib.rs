// SPDX-License-Identifier: MIT OR Apache-2.0
//! Everything that makes and boots the VM: tools, kernel, driver, initramfs, QEMU's command line; each usable by itself.
//!
//! `cargo xtask` is a thin command line over this library, and the VM tests are another user of it.
//! Knows the device's and the guest programs' command lines; knows nothing of the protocol between GPU and driver.

pub mod accel;
pub mod build;
pub mod checks;
mod error;
pub mod ktap;
mod options;
mod paths;
mod prepared;
pub mod process;
pub mod progress;
pub mod setup;
mod test_options;
pub mod versions;
pub mod vm;

pub use error::{Error, Result};
pub use options::{AccelChoice, KernelChoice, Options, ToolboxChoice};
pub use paths::Paths;
pub use prepared::Prepared;
pub use test_options::{TestOptions, TestSuite};

/// How the VM tests begin the line of a case that the running kernel lacks something for. It passed, as far
/// as their test program knows; `cargo xtask test` counts it as skipped.
pub const SKIPPED_CASE: &str = "skipped in the VM: ";
