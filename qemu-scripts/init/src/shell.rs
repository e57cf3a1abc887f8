// SPDX-License-Identifier: MIT OR Apache-2.0
//! A guest without a host's harness: the driver loaded, a shell on the console.

use std::{path::Path, process::Command};

use farfault_init::DRIVER_PATH;

use crate::prepare;

/// Loads the driver and gives the command that is the guest's life.
pub(crate) fn command() -> Command {
    if Path::new(DRIVER_PATH).exists() {
        if let Err(error) = prepare::load_driver() {
            eprintln!("farfault-init: loading the driver: {error}");
        }
    }
    println!("The guest powers off when this shell ends (exit, or Ctrl-D).");
    let mut command = Command::new("/bin/busybox");
    // A session of its own with the console as its terminal is what job control and Ctrl-C need; cttyhack finds the
    // real device behind /dev/console.
    command
        .args(["setsid", "cttyhack", "/bin/sh", "-l"])
        .env("TERM", "linux")
        .env("HOME", "/root");
    command
}
