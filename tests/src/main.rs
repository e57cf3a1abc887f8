// SPDX-License-Identifier: MIT OR Apache-2.0
//! The cases and programs of [`farfault_tests::guest`], by name.

use std::process::ExitCode;

fn main() -> ExitCode {
    farfault_tests::guest::main()
}
