// SPDX-License-Identifier: MIT OR Apache-2.0
//! The program of [`farfault_tests::compare`].

use std::process::ExitCode;

fn main() -> ExitCode {
    farfault_tests::compare::main()
}
