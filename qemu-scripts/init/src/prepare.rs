// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the guest needs before anything runs in it: tables of mounts and kernel settings, and the loop over them.

use std::{fs, os::unix::fs::symlink, path::Path, process::Command};

use farfault_init::DRIVER_PATH;
use rustix::mount::{MountFlags, mount};

struct Mount {
    target: &'static str,
    kind: &'static str,
    options: &'static str,
}

const MOUNTS: &[Mount] = &[
    Mount {
        target: "/proc",
        kind: "proc",
        options: "",
    },
    Mount {
        target: "/sys",
        kind: "sysfs",
        options: "",
    },
    Mount {
        target: "/dev",
        kind: "devtmpfs",
        options: "mode=755",
    },
    Mount {
        target: "/dev/pts",
        kind: "devpts",
        options: "mode=620,ptmxmode=666",
    },
    Mount {
        target: "/dev/shm",
        kind: "tmpfs",
        options: "mode=1777",
    },
    Mount {
        target: "/tmp",
        kind: "tmpfs",
        options: "mode=1777",
    },
    Mount {
        target: "/run",
        kind: "tmpfs",
        options: "mode=755",
    },
    Mount {
        target: "/sys/kernel/debug",
        kind: "debugfs",
        options: "",
    },
    Mount {
        target: "/sys/kernel/tracing",
        kind: "tracefs",
        options: "",
    },
    Mount {
        target: "/sys/fs/cgroup",
        kind: "cgroup2",
        options: "",
    },
];

/// Name below `/proc/sys` and value.
const SETTINGS: &[(&str, &str)] = &[
    // The driver's notes reach the console too; while booting they would only cost time.
    ("kernel/printk", "7"),
    // A task that sleeps this long without being woken is a bug of the driver, whose waits all have limits below it.
    ("kernel/hung_task_timeout_secs", "30"),
    ("kernel/hung_task_warnings", "10"),
    // An emulated CPU can be off its host's CPUs for seconds when the host is busy: that is no lockup.
    ("kernel/watchdog_thresh", "30"),
];

/// Links that udev would make.
const LINKS: &[(&str, &str)] = &[
    ("/proc/self/fd", "/dev/fd"),
    ("/proc/self/fd/0", "/dev/stdin"),
    ("/proc/self/fd/1", "/dev/stdout"),
    ("/proc/self/fd/2", "/dev/stderr"),
];

/// Does all of it and returns what did not work.
pub(crate) fn all() -> Vec<String> {
    let mut problems = Vec::new();
    let mut note = |what: &str, result: std::io::Result<()>| {
        if let Err(error) = result {
            problems.push(format!("{what}: {error}"));
        }
    };
    for entry in MOUNTS {
        note(entry.target, mount_one(entry));
    }
    for (name, value) in SETTINGS {
        let path = Path::new("/proc/sys").join(name);
        // A kernel may be built without a watchdog; what is absent needs no setting.
        if path.exists() {
            note(name, fs::write(path, value));
        }
    }
    for (target, link) in LINKS {
        note(link, symlink(target, link));
    }
    note("lo", loopback_up());
    problems
}

/// Loads the driver, for a guest without a host that would do it.
pub(crate) fn load_driver() -> std::io::Result<()> {
    busybox(&["insmod", DRIVER_PATH])
}

fn mount_one(entry: &Mount) -> std::io::Result<()> {
    fs::create_dir_all(entry.target)?;
    let options = std::ffi::CString::new(entry.options)?;
    mount(
        "none",
        entry.target,
        entry.kind,
        MountFlags::empty(),
        options.as_c_str(),
    )?;
    Ok(())
}

fn loopback_up() -> std::io::Result<()> {
    busybox(&["ip", "link", "set", "lo", "up"])
}

fn busybox(arguments: &[&str]) -> std::io::Result<()> {
    let status = Command::new("/bin/busybox").args(arguments).status()?;
    if status.success() {
        Ok(())
    } else {
        Err(std::io::Error::other(format!(
            "`{}` ended with {status}",
            arguments.join(" ")
        )))
    }
}
