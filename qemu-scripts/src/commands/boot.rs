// SPDX-License-Identifier: MIT OR Apache-2.0
//! `cargo xtask boot`: a shell in the guest.

use std::process::ExitCode;

use xtask::{Options, progress::note, vm::Attach};

use crate::commands::VmArguments;

const VRAM: &str = "1G";

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    #[command(flatten)]
    vm: VmArguments,
}

pub(crate) fn run(options: &Options, arguments: &Arguments) -> anyhow::Result<ExitCode> {
    arguments.vm.run(options, "boot", VRAM, |vm| {
        note("the guest's programs are in /bin; `exit` powers the VM off, Ctrl-] ends it at once");
        if let Ok(gpu) = vm.device(0) {
            let control = gpu.control_socket().display();
            note(&format!(
                "from another terminal: farfault-device inspect --control {control}"
            ));
        }
        vm.attach(&["/bin/sh", "-l"], Attach::Keyboard)?;
        Ok(ExitCode::SUCCESS)
    })
}
