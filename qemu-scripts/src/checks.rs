// SPDX-License-Identifier: MIT OR Apache-2.0
//! What `doctor` looks at. Looks only: nothing is fetched, built or changed.

use std::path::Path;

use crate::{
    AccelChoice, Error, KernelChoice, Options, Paths, Result, ToolboxChoice,
    process::{bound, on_path, output},
    setup::{self, Toolbox, toolbox},
};

/// One thing that was looked at.
#[derive(Debug)]
pub struct Check {
    /// What it is about.
    pub name: &'static str,
    /// What was found, or what is wrong and how to mend it.
    pub result: Result<String>,
}

/// Looks at everything that the options make necessary.
#[must_use]
pub fn all(options: &Options) -> Vec<Check> {
    let mut checks = vec![
        Check {
            name: "processor",
            result: processor(),
        },
        Check {
            name: "Rust",
            result: rust(),
        },
        Check {
            name: "static linking",
            result: static_linking(),
        },
        Check {
            name: "process tools",
            result: tools(&["setpriv", "unshare"], "apt-get install util-linux"),
        },
    ];
    match options.toolbox {
        ToolboxChoice::Debian => {
            let packages = tools(
                &["apt-get", "apt-config", "dpkg-deb", "tar"],
                "use a Debian or Ubuntu machine, or --toolbox host",
            );
            checks.push(Check {
                name: "package tools",
                result: packages,
            });
            checks.push(Check {
                name: "namespaces",
                result: toolbox::check_namespaces().map(|()| "can be made".into()),
            });
            checks.push(Check {
                name: "toolbox and kernel",
                result: cache(options),
            });
        }
        ToolboxChoice::Host => checks.extend(host(options)),
    }
    checks.push(Check {
        name: "accelerator",
        result: accelerator(options),
    });
    checks
}

/// What the host must have where it is the toolbox.
fn host(options: &Options) -> Vec<Check> {
    let build = ["make", "gcc", "bindgen", "flex", "bison", "bc", "busybox"];
    let kernel = setup::kernel_on_host(options);
    vec![
        Check {
            name: "host's build tools",
            result: tools(&build, "install them, or use --toolbox debian"),
        },
        Check {
            name: "host's rustc",
            result: toolbox::check_rustc(&Toolbox::Host),
        },
        Check {
            name: "host's QEMU",
            result: toolbox::check_qemu(&Toolbox::Host),
        },
        Check {
            name: "host's kernel",
            result: kernel.map(|kernel| kernel.release),
        },
    ]
}

/// Can the host be the toolbox?
pub(crate) fn host_fits(options: &Options) -> Result<()> {
    let failed = host(options)
        .into_iter()
        .filter_map(|check| check.result.err());
    let lines: Vec<String> = failed.map(|error| error.to_string()).collect();
    if lines.is_empty() {
        return Ok(());
    }
    Err(Error::vm(format!(
        "this machine cannot be the toolbox itself:\n{}",
        lines.join("\n")
    )))
}

fn processor() -> Result<String> {
    if cfg!(target_arch = "x86_64") {
        Ok("x86-64".into())
    } else {
        Err(Error::unfit(
            "it is no x86-64",
            "use a machine with one: guest and tools are built for it",
        ))
    }
}

fn rust() -> Result<String> {
    let mut command = bound("rustc");
    command.arg("--version");
    output(command, "rustc")
        .map(|text| text.trim().to_owned())
        .map_err(|error| Error::unfit(error.to_string(), "install Rust, see https://rustup.rs"))
}

fn static_linking() -> Result<String> {
    let mut command = bound("cc");
    command.arg("-print-file-name=libc.a");
    let mend = "apt-get install gcc libc6-dev";
    let path = output(command, "cc").map_err(|error| Error::unfit(error.to_string(), mend))?;
    let path = path.trim();
    // What cc does not find it prints as it was asked for.
    if Path::new(path).is_absolute() {
        Ok(path.to_owned())
    } else {
        Err(Error::unfit(
            "the C library for static linking is missing; the guest's programs need it",
            mend,
        ))
    }
}

fn tools(names: &[&str], mend: &str) -> Result<String> {
    let missing: Vec<&str> = names
        .iter()
        .copied()
        .filter(|name| !on_path(name))
        .collect();
    if missing.is_empty() {
        Ok(names.join(", "))
    } else {
        Err(Error::unfit(
            format!("not on the path: {}", missing.join(", ")),
            mend,
        ))
    }
}

fn cache(options: &Options) -> Result<String> {
    let paths = Paths::new(options)?;
    let cache = paths.cache.display();
    Ok(match (setup::check(options, &paths)?, &options.kernel) {
        (true, _) => format!("ready in {cache}"),
        (false, KernelChoice::Debug) => format!(
            "will be made in {cache} by the next command that needs them; building the debug kernel takes long"
        ),
        (false, _) => format!("will be made in {cache} by the next command that needs them"),
    })
}

fn accelerator(options: &Options) -> Result<String> {
    let open = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm");
    match (options.accel, open) {
        (AccelChoice::Tcg, _) => Ok("TCG, as asked for".into()),
        (AccelChoice::Kvm, Ok(_)) => Ok("KVM, as asked for".into()),
        (AccelChoice::Kvm, Err(error)) => Err(Error::unfit(
            format!("/dev/kvm: {error}"),
            "use --accel auto, or: sudo usermod --append --groups kvm $USER",
        )),
        (AccelChoice::Auto, Ok(_)) => {
            Ok("KVM if a kernel boots under it, TCG otherwise (the first VM tries)".into())
        }
        (AccelChoice::Auto, Err(error)) => Ok(format!("TCG, because /dev/kvm: {error}")),
    }
}
