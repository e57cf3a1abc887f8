// SPDX-License-Identifier: MIT OR Apache-2.0
//! `cargo xtask doctor`: a list of checks, each `ok` or what is wrong and the command that mends it. Changes nothing.

use std::process::ExitCode;

use xtask::{Error, Options, checks};

pub(crate) fn run(options: &Options) -> anyhow::Result<ExitCode> {
    let mut all_well = true;
    for check in checks::all(options) {
        match check.result {
            Ok(found) => println!("ok       {}: {found}", check.name),
            Err(Error::Unfit { what, mend }) => {
                all_well = false;
                println!(
                    "MISSING  {}: {what}\n         to mend it: {mend}",
                    check.name
                );
            }
            Err(error) => {
                all_well = false;
                println!("MISSING  {}: {error}", check.name);
            }
        }
    }
    Ok(if all_well {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
