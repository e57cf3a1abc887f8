// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a VM with disks needs beside the kernel: the modules that the stock kernel has for them, with all that these
//! depend on, and an empty ext4 that is copied for each VM. Nobody fetches them who boots no such VM.
//!
//! They live in a folder of the cache with a lock of its own: it is filled while others use the toolbox.

use std::{
    fs,
    path::{Path, PathBuf},
};

use crate::{
    Error, Paths, Result, paths,
    process::{output, run_logged},
    progress::Progress,
    setup::{
        Kernel, Lock, Setup, Step,
        apt::Apt,
        check_space,
        toolbox::{Toolbox, unpack},
    },
    versions::VERSIONS,
};

/// The file system's size; the file is sparse.
const SIZE: &str = "1G";

/// Names the modules in the order in which they are loaded; `vm::disks` reads it in the guest.
const ORDER: &str = "order";

/// The folder, held against change.
#[derive(Debug)]
pub(crate) struct Disks {
    folder: PathBuf,
    _lock: Lock,
}

impl Disks {
    /// Makes what is missing; there is none without the Debian toolbox.
    pub(crate) fn ensure(paths: &Paths, setup: &Setup) -> Result<Option<Self>> {
        if matches!(setup.toolbox, Toolbox::Host) {
            return Ok(None);
        }
        let folder = paths.cache.join("disks");
        let inputs = format!("{:#?}{:#?}{SIZE}", VERSIONS.disks, VERSIONS.debian);
        let step = Step::new(folder.join("content"), &[&VERSIONS.kernel.release, &inputs]);
        loop {
            let shared = Lock::shared(&folder)?;
            if step.is_done() {
                return Ok(Some(Self {
                    folder: step.folder().to_path_buf(),
                    _lock: shared,
                }));
            }
            drop(shared);
            let _alone = Lock::exclusive(&folder)?;
            check_space(&folder, VERSIONS.disks.needed_mib)?;
            step.ensure(|content| fill(content, &setup.toolbox, paths))?;
        }
    }

    /// An empty ext4.
    pub(crate) fn file_system(&self) -> PathBuf {
        self.folder.join("ext4")
    }

    /// What of modules this kernel is to have in the guest. Any but the stock one has them built in, or not at all.
    pub(crate) fn modules(&self, kernel: &Kernel) -> Result<Vec<PathBuf>> {
        if kernel.release != VERSIONS.kernel.release {
            return Ok(Vec::new());
        }
        let order = self.folder.join(ORDER);
        let text = fs::read_to_string(&order).map_err(Error::io(order.display().to_string()))?;
        let mut files: Vec<_> = text.lines().map(|name| self.folder.join(name)).collect();
        files.push(order);
        Ok(files)
    }
}

fn fill(content: &Path, toolbox: &Toolbox, paths: &Paths) -> Result<()> {
    let log = paths.logs().join("disks.log");
    paths::remove(&log)?;
    let step = Progress::start("disks: fetching the kernel's modules");
    let packages = content.join("packages");
    let apt = Apt::new(&content.join("apt"), log.clone())?;
    for archive in apt.download_only(&VERSIONS.disks.packages, &packages)? {
        unpack(&archive, &packages, &["./usr".to_owned()], &log)?;
        paths::remove(&archive)?;
    }
    paths::remove(apt.folder())?;
    step.done();
    keep_modules(content, &packages, toolbox, &log)?;
    make_file_system(content, &packages, toolbox, &log)?;
    paths::remove(&packages)
}

/// Keeps the modules that are wanted and those that they need, as the kernel loads them.
fn keep_modules(content: &Path, packages: &Path, toolbox: &Toolbox, log: &Path) -> Result<()> {
    let release = &VERSIONS.kernel.release;
    let visible = [content];
    let mut depmod = toolbox.command("/usr/sbin/depmod", packages, &visible);
    depmod
        .arg("--basedir")
        .arg(packages.join("usr"))
        .arg(release);
    run_logged(depmod, "finding out which module needs which", log)?;
    let mut modprobe = toolbox.command("/usr/sbin/modprobe", packages, &visible);
    modprobe
        .args(["--show-depends", "--all", "--set-version", release])
        .arg("--dirname")
        .arg(packages.join("usr"))
        .args(&VERSIONS.disks.modules);
    let listed = output(modprobe, "listing modules")?;
    let mut order = Vec::new();
    // One line for each: `insmod PATH`, those that others need first; some come more than once.
    for path in listed
        .lines()
        .filter_map(|line| line.strip_prefix("insmod "))
    {
        let packed = Path::new(path.trim());
        let name = packed.file_name().unwrap_or_default().to_string_lossy();
        let name = name.trim_end_matches(".xz").to_owned();
        if order.contains(&name) {
            continue;
        }
        let mut xz = toolbox.command("xz", packages, &visible);
        xz.arg("--decompress").arg(packed);
        run_logged(xz, "unpacking a module", log)?;
        let (from, to) = (packed.with_extension(""), content.join(&name));
        fs::rename(&from, &to).map_err(Error::io(format!("moving {}", from.display())))?;
        order.push(name);
    }
    let text = order.join("\n") + "\n";
    paths::write_atomically(&content.join(ORDER), text.as_bytes())
}

fn make_file_system(content: &Path, packages: &Path, toolbox: &Toolbox, log: &Path) -> Result<()> {
    let libraries = packages.join("usr/lib/x86_64-linux-gnu");
    let mut mke2fs = toolbox.command("env", content, &[content]);
    mke2fs
        .arg(format!("LD_LIBRARY_PATH={}", libraries.display()))
        .arg(packages.join("usr/sbin/mke2fs"))
        .args(["-q", "-t", "ext4", "ext4", SIZE]);
    run_logged(mke2fs, "making an empty ext4", log)
}
