// SPDX-License-Identifier: MIT OR Apache-2.0
//! The toolbox: a Debian root folder with QEMU and the compilers, and how a program of it is run.
//!
//! Its packages are unpacked, not installed: none of the tools needs its maintainer scripts, and so no root is needed and
//! nothing runs that could go wrong. Compilers run inside (chroot in a mount and process namespace of their own, in a user
//! namespace too without root), with the folders they need at the same paths as outside. QEMU runs outside, through the
//! toolbox's own dynamic loader: it is then an ordinary child with ordinary sockets, devices and signals.

use std::{
    ffi::OsString,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

use crate::{
    Error, Result, paths,
    process::{bound, on_path, output, run_logged_from, spawn},
    setup::{apt::Apt, step::Step},
    versions::VERSIONS,
};

/// Left out when unpacking: nothing here reads them, and they take much of the space.
const LEFT_OUT: [&str; 6] = [
    "./usr/share/doc",
    "./usr/share/man",
    "./usr/share/info",
    "./usr/share/locale",
    "./usr/lib/llvm-*/lib/*.a",
    "./usr/share/qemu/*edk2*",
];

/// What maintainer scripts would have made.
const LINKS: [(&str, &str); 1] = [("mawk", "usr/bin/awk")];

/// Runs as process 1 of the new namespaces: ROOT, folders to bind, `--`, the working folder, and the command.
const ENTER: &str = r#"
PATH=$PATH:/usr/sbin:/sbin
root=$1; shift
mount --rbind /dev "$root/dev"
mount -t proc proc "$root/proc" 2>/dev/null || mount --rbind /proc "$root/proc"
while [ "$1" != -- ]; do
    mkdir -p "$root$1"
    mount --rbind "$1" "$root$1"
    shift
done
shift
exec chroot "$root" /usr/bin/env -i PATH=/usr/bin HOME=/tmp LC_ALL=C.UTF-8 KBUILD_BUILD_USER=farfault \
    KBUILD_BUILD_HOST=farfault /bin/sh -c 'cd "$1" && shift && exec "$@"' sh "$@"
"#;

/// Where tools come from.
#[derive(Debug, Clone)]
pub enum Toolbox {
    /// A Debian root in this folder.
    Debian(PathBuf),
    /// The host's own.
    Host,
}

impl Toolbox {
    /// A command that runs a program of the toolbox in a folder, able to see these folders of the host.
    #[must_use]
    pub fn command(&self, program: &str, folder: &Path, visible: &[&Path]) -> Command {
        match self {
            Self::Host => {
                let mut command = bound(program);
                command.current_dir(folder);
                command
            }
            Self::Debian(root) => {
                let mut command = bound("unshare");
                if !rustix::process::geteuid().is_root() {
                    command.args(["--user", "--map-root-user"]);
                }
                command
                    .args([
                        "--mount",
                        "--pid",
                        "--fork",
                        "--kill-child",
                        "--",
                        "/bin/sh",
                        "-eu",
                        "-c",
                        ENTER,
                        "sh",
                    ])
                    .arg(root)
                    .args(visible)
                    .arg("--")
                    .arg(folder)
                    .arg(program);
                command
            }
        }
    }

    /// `make`, as [`Self::command`] runs it.
    #[must_use]
    pub fn make(&self, folder: &Path, visible: &[&Path]) -> Command {
        let mut make = self.command("make", folder, visible);
        if matches!(self, Self::Debian(_)) {
            // Its pipe would be a file in /tmp named by its process number, and that is 1 in each of our namespaces.
            make.arg("--jobserver-style=pipe");
        }
        make
    }

    /// Program and first arguments that run QEMU outside of the toolbox.
    #[must_use]
    pub fn qemu(&self) -> Vec<OsString> {
        match self {
            Self::Host => vec!["qemu-system-x86_64".into()],
            Self::Debian(root) => {
                let at = |path: &str| root.join(path).into_os_string();
                vec![
                    at("usr/lib64/ld-linux-x86-64.so.2"),
                    "--library-path".into(),
                    at("usr/lib/x86_64-linux-gnu"),
                    "--argv0".into(),
                    "qemu-system-x86_64".into(),
                    at("usr/bin/qemu-system-x86_64"),
                    "-L".into(),
                    at("usr/share/qemu"),
                    "-L".into(),
                    at("usr/share/seabios"),
                ]
            }
        }
    }

    /// A statically linked busybox.
    pub(crate) fn busybox(&self) -> PathBuf {
        match self {
            Self::Host => "/usr/bin/busybox".into(),
            Self::Debian(root) => root.join("usr/bin/busybox"),
        }
    }
}

/// The step that makes the Debian toolbox.
pub(crate) fn step(cache: &Path) -> Step {
    let versions = format!("{:#?}{:#?}", VERSIONS.debian, VERSIONS.toolbox);
    let fixed = format!("{LEFT_OUT:#?}{LINKS:#?}");
    Step::new(cache.join("toolbox"), &[&versions, &fixed, ENTER])
}

/// Fills the toolbox's folder.
pub(crate) fn fill(root: &Path, apt: &Apt, log: &Path) -> Result<()> {
    let archives = apt.download_with_dependencies(&VERSIONS.toolbox.packages)?;
    unpack_all(&archives, root, log)?;
    for (target, link) in LINKS {
        symlink(target, root.join(link))
            .map_err(Error::io(format!("linking {link} in the toolbox")))?;
    }
    let toolbox = Toolbox::Debian(root.to_path_buf());
    check_rustc(&toolbox)?;
    check_qemu(&toolbox).map(drop)
}

/// Is rustc the one that the kernel was built with?
pub(crate) fn check_rustc(toolbox: &Toolbox) -> Result<String> {
    let wanted = &VERSIONS.toolbox.rustc;
    let mut command = toolbox.command("rustc", Path::new("/"), &[]);
    command.arg("--version");
    let found = output(command, "rustc for the kernel's modules")?;
    if found.split_whitespace().nth(1) == Some(wanted) {
        return Ok(found.trim().to_owned());
    }
    Err(Error::unfit(
        format!(
            "rustc for the kernel's modules is {}, not {wanted}",
            found.trim()
        ),
        "use --toolbox debian, or put the versions in qemu-scripts/versions.toml right",
    ))
}

/// Has QEMU the device that the GPU needs?
pub(crate) fn check_qemu(toolbox: &Toolbox) -> Result<String> {
    let wanted = &VERSIONS.toolbox.qemu;
    let found = qemu_version(toolbox)?;
    if is_at_least(&found, wanted) {
        return Ok(found);
    }
    Err(Error::unfit(
        format!("QEMU is {found}; its generic vhost-user device came with {wanted}"),
        "use --toolbox debian, or install a newer QEMU",
    ))
}

/// The version that QEMU says it has.
fn qemu_version(toolbox: &Toolbox) -> Result<String> {
    let line = toolbox.qemu();
    let (program, arguments) = line
        .split_first()
        .ok_or_else(|| Error::vm("QEMU has no command line"))?;
    let mut command = bound(program);
    command.args(arguments).arg("--version");
    let text = output(command, "QEMU")?;
    let version = text
        .split_whitespace()
        .skip_while(|word| *word != "version")
        .nth(1);
    Ok(version.unwrap_or("of an unknown version").to_owned())
}

fn is_at_least(version: &str, least: &str) -> bool {
    let numbers = |text: &str| {
        text.split('.')
            .map_while(|part| part.parse::<u32>().ok())
            .collect::<Vec<_>>()
    };
    numbers(version) >= numbers(least)
}

/// Can programs run inside the toolbox here?
///
/// # Errors
/// No, with the reason and the command that mends it.
pub fn check_namespaces() -> Result<()> {
    if !on_path("unshare") {
        return Err(Error::unfit(
            "`unshare` is missing",
            "apt-get install util-linux",
        ));
    }
    let root = rustix::process::geteuid().is_root();
    let mut command = bound("unshare");
    if !root {
        command.args(["--user", "--map-root-user"]);
    }
    command.args(["--mount", "--pid", "--fork", "--kill-child", "--", "true"]);
    output(command, "making namespaces").map(drop).map_err(|error| {
        let mend = if root {
            "run with the right to mount (in a container: --cap-add SYS_ADMIN), or use --toolbox host".to_owned()
        } else if Path::new("/proc/sys/kernel/apparmor_restrict_unprivileged_userns").exists() {
            "sudo sysctl kernel.apparmor_restrict_unprivileged_userns=0".to_owned()
        } else {
            "sudo sysctl kernel.unprivileged_userns_clone=1 user.max_user_namespaces=10000".to_owned()
        };
        Error::unfit(error.to_string(), mend)
    })
}

/// Unpacks archives with two of them under way at a time, and removes them.
pub(crate) fn unpack_all(archives: &[PathBuf], root: &Path, log: &Path) -> Result<()> {
    let queue = Mutex::new(archives.iter());
    let failed = AtomicBool::new(false);
    let work = || -> Result<()> {
        while !failed.load(Ordering::Relaxed) {
            let Some(archive) = queue.lock().unwrap_or_else(PoisonError::into_inner).next() else {
                break;
            };
            unpack(
                archive,
                root,
                &LEFT_OUT.map(|pattern| format!("--exclude={pattern}")),
                log,
            )
            .inspect_err(|_| {
                failed.store(true, Ordering::Relaxed);
            })?;
        }
        Ok(())
    };
    thread::scope(|scope| {
        let other = scope.spawn(work);
        let mine = work();
        let other = other
            .join()
            .unwrap_or_else(|_| Err(Error::vm("the thread that unpacks packages panicked")));
        mine.and(other)
    })?;
    archives
        .iter()
        .try_for_each(|archive| paths::remove(archive))
}

/// Unpacks one archive, `tar`'s further arguments deciding what of it.
pub(crate) fn unpack(archive: &Path, into: &Path, selection: &[String], log: &Path) -> Result<()> {
    let what = format!("unpacking {}", archive.display());
    let mut source = bound("dpkg-deb");
    source
        .arg("--fsys-tarfile")
        .arg(archive)
        .stdin(Stdio::null())
        .stdout(Stdio::piped());
    let mut source = spawn(source).map_err(Error::io(format!("{what}: dpkg-deb")))?;
    let mut command = bound("tar");
    command
        .args(["--extract", "--no-same-owner", "--wildcards", "--directory"])
        .arg(into)
        .args(selection);
    let pipe = source
        .stdout
        .take()
        .ok_or_else(|| Error::vm(format!("{what}: dpkg-deb has no output")))?;
    let unpacked = run_logged_from(command, pipe.into(), &what, log);
    let status = source
        .wait()
        .map_err(Error::io(format!("{what}: dpkg-deb")))?;
    unpacked?;
    if status.success() {
        return Ok(());
    }
    // A damaged archive would fail in the same way for ever.
    paths::remove(archive)?;
    Err(Error::unfit(
        format!("{what}: dpkg-deb ended with {status}"),
        "repeat the command; the package is fetched anew",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_at_least_compares_numbers_not_text() {
        assert!(is_at_least("11.1.3", "11.1"));
        assert!(is_at_least("11.10.0", "11.9"));
        assert!(!is_at_least("7.2.19", "11.1"));
        assert!(!is_at_least("of an unknown version", "11.1"));
    }

    #[test]
    fn command_in_a_debian_toolbox_names_root_folders_and_program_in_order() {
        let toolbox = Toolbox::Debian("/cache/toolbox".into());
        let command = toolbox.command(
            "make",
            Path::new("/src"),
            &[Path::new("/src"), Path::new("/out")],
        );
        let arguments: Vec<_> = command
            .get_args()
            .map(|argument| argument.to_string_lossy())
            .collect();
        let end = ["sh", "/cache/toolbox", "/src", "/out", "--", "/src", "make"];
        assert!(arguments.ends_with(&end.map(Into::into)), "{arguments:?}");
    }
}
