// SPDX-License-Identifier: MIT OR Apache-2.0
//! The debug kernel, and the toolbox with LLVM that builds it: what nobody needs who does not ask for it.
//!
//! KASAN with Rust demands clang. So that no other command has to fetch it, the toolbox with LLVM is a folder beside the
//! toolbox: a copy of it by hard links, into which LLVM's packages are unpacked.
//!
//! Building the kernel takes long, so an interrupted build goes on where it stopped. All of it lives in one folder of the
//! cache with a lock of its own: who waits for the kernel's build does not make others wait.

use std::{
    ffi::OsStr,
    fs,
    path::{Path, PathBuf},
};

use crate::{
    Error, Paths, Result, paths,
    process::{bound, run_logged, run_watched},
    progress::{self, Progress},
    setup::{
        Lock, Step,
        apt::Apt,
        check_space,
        kernel::{Kernel, RUST_LIB_SRC, jobs, unpack_source},
        toolbox::{self, Toolbox},
    },
    versions::VERSIONS,
};

/// Options of the kernel and why it has them.
const FRAGMENT: &str = include_str!("../../debug.config");

/// Parts of the source that a kernel with these options is not built from.
const LEFT_OUT: [&str; 9] = [
    "*/Documentation/*/*",
    "*/arch/*.dts*",
    "*/drivers/gpu/drm/*/*.[ch]",
    "*/drivers/infiniband/*.[ch]",
    "*/drivers/media/*.[ch]",
    "*/drivers/net/ethernet/*.[ch]",
    "*/drivers/net/wireless/*.[ch]",
    "*/sound/*.[ch]",
    "*/tools/perf/*.json",
];

/// Which of the two somebody needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Need {
    /// The toolbox with LLVM, for modules of a kernel that clang has built.
    Llvm,
    /// The debug kernel too.
    Kernel,
}

/// The steps, in the folder of the cache that they share.
#[derive(Debug)]
pub(crate) struct Debug {
    folder: PathBuf,
    toolbox: Step,
    kernel: Step,
}

impl Debug {
    /// `base` is the step of the toolbox that is copied.
    pub(crate) fn new(cache: &Path, base: &Step) -> Self {
        let folder = cache.join("debug");
        let packages = format!("{:#?}", VERSIONS.debug_kernel.packages);
        let toolbox = Step::new(folder.join("toolbox"), &[&packages, base.stamp()]);
        let series = &VERSIONS.kernel.series;
        let fixed = format!("{LEFT_OUT:#?}");
        let kernel = Step::new(
            folder.join("kernel"),
            &[series, &fixed, FRAGMENT, toolbox.stamp()],
        );
        Self {
            folder,
            toolbox,
            kernel,
        }
    }

    /// Are they there and up to date?
    pub(crate) fn is_done(&self, need: Need) -> bool {
        self.toolbox.is_done() && (need == Need::Llvm || self.kernel.is_done())
    }

    /// Makes what is missing; the lock holds it against change.
    pub(crate) fn ensure(&self, need: Need, base: &Path, paths: &Paths) -> Result<Lock> {
        loop {
            let shared = Lock::shared(&self.folder)?;
            if self.is_done(need) {
                return Ok(shared);
            }
            drop(shared);
            let _alone = Lock::exclusive(&self.folder)?;
            if !self.is_done(need) {
                self.fill(need, base, paths)?;
            }
        }
    }

    /// The toolbox with LLVM.
    pub(crate) fn toolbox(&self) -> Toolbox {
        Toolbox::Debian(self.toolbox.folder().to_path_buf())
    }

    /// The debug kernel.
    pub(crate) fn kernel(&self) -> Result<Kernel> {
        let build = self.kernel.folder().join("build");
        Kernel::in_folder("debug", &build, build.join("arch/x86/boot/bzImage"))
    }

    fn fill(&self, need: Need, base: &Path, paths: &Paths) -> Result<()> {
        check_space(&self.folder, VERSIONS.debug_kernel.needed_mib)?;
        let log = paths.logs().join("debug-kernel.log");
        paths::remove(&log)?;
        let packages = Packages {
            folder: self.folder.join("apt"),
            log: &log,
        };
        self.toolbox
            .ensure(|root| fill_toolbox(root, base, &packages))?;
        if need == Need::Kernel {
            let toolbox = self.toolbox();
            self.kernel
                .ensure_going_on(|folder| fill_kernel(folder, &toolbox, &packages))?;
        }
        paths::remove(&packages.folder)
    }
}

/// Debian's packages, asked for only by what is not there yet.
struct Packages<'a> {
    folder: PathBuf,
    log: &'a Path,
}

impl Packages<'_> {
    fn apt(&self) -> Result<Apt> {
        Apt::new(&self.folder, self.log.to_path_buf())
    }
}

fn fill_toolbox(root: &Path, base: &Path, packages: &Packages<'_>) -> Result<()> {
    let step = Progress::start("debug kernel: fetching and unpacking LLVM");
    let archives = packages
        .apt()?
        .download_with_dependencies(&VERSIONS.debug_kernel.packages)?;
    let mut copy = bound("cp");
    copy.args(["--archive", "--link", "--no-target-directory"])
        .args([base, root]);
    run_logged(copy, "copying the toolbox", packages.log)?;
    // Unpacking replaces files, it writes into none: the links leave the original alone.
    toolbox::unpack_all(&archives, root, packages.log)?;
    step.done();
    Ok(())
}

fn fill_kernel(folder: &Path, toolbox: &Toolbox, packages: &Packages<'_>) -> Result<()> {
    let (source, build) = (folder.join("source"), folder.join("build"));
    if !source.exists() {
        let step = Progress::start("debug kernel: fetching and unpacking its source");
        let unpacked = folder.join("packages");
        paths::remove(&unpacked)?;
        let wanted = format!("linux-source-{}", VERSIONS.kernel.series);
        for archive in packages.apt()?.download_only(&[wanted], &unpacked)? {
            toolbox::unpack(&archive, &unpacked, &["./usr".to_owned()], packages.log)?;
            paths::remove(&archive)?;
        }
        let part = folder.join("source.part");
        paths::remove(&part)?;
        unpack_source(toolbox, folder, &unpacked, &part, &LEFT_OUT, packages.log)?;
        fs::rename(&part, &source).map_err(Error::io(format!(
            "moving {} to {}",
            part.display(),
            source.display()
        )))?;
        paths::remove(&unpacked)?;
        step.done();
    }

    paths::create_dir(&build)?;
    let fragment = folder.join("debug.config");
    paths::write_atomically(&fragment, FRAGMENT.as_bytes())?;
    let make = |arguments: &[String]| {
        let mut make = toolbox.make(&source, &[folder]);
        make.arg(format!("O={}", build.display()))
            .arg("LLVM=1")
            .arg(RUST_LIB_SRC)
            .args(arguments);
        make
    };
    let configure = make(&[
        format!("KCONFIG_ALLCONFIG={}", fragment.display()),
        "alldefconfig".to_owned(),
    ]);
    run_logged(configure, "configuring the debug kernel", packages.log)?;
    check_configuration(&build.join(".config"))?;

    progress::note(
        "the debug kernel is built once; that takes long, and an interrupted build goes on at the next command",
    );
    // The log is that of all attempts at this build, so that its length says how far they have come together.
    let log = folder.join("build.log");
    let lines = fs::read_to_string(&log).map_or(0, |text| text.lines().count());
    let step = Progress::with_steps("debug kernel: building", VERSIONS.debug_kernel.steps, lines);
    let targets = [
        format!("-j{}", jobs()),
        "bzImage".to_owned(),
        "modules".to_owned(),
    ];
    run_watched(make(&targets), "building the debug kernel", &log, |_line| {
        step.advance();
    })?;
    step.done();
    remove_leftovers(&source, &build)
}

/// Fails with the names of the fragment's options that did not come out as they stand there.
fn check_configuration(made: &Path) -> Result<()> {
    let config = fs::read_to_string(made).map_err(Error::io(made.display().to_string()))?;
    let lost = lost_options(FRAGMENT, &config);
    if lost.is_empty() {
        return Ok(());
    }
    Err(Error::unfit(
        format!(
            "the debug kernel's configuration cannot be had: {}",
            lost.join(", ")
        ),
        "put qemu-scripts/debug.config right: what these options depend on is in the kernel's Kconfig files",
    ))
}

/// What a fragment asks for and a configuration lacks.
fn lost_options<'a>(fragment: &'a str, config: &str) -> Vec<&'a str> {
    let is_set = |name: &str| {
        config.lines().any(|line| {
            line.strip_prefix(name)
                .is_some_and(|rest| rest.starts_with('='))
        })
    };
    let has = |line: &str| match line
        .strip_prefix("# ")
        .and_then(|rest| rest.strip_suffix(" is not set"))
    {
        // An option whose own conditions are not met has no line at all, and is not set either.
        Some(name) => !is_set(name),
        None => config.lines().any(|made| made == line),
    };
    fragment
        .lines()
        .filter(|line| line.starts_with("CONFIG_") || line.starts_with("# CONFIG_"))
        .filter(|line| !has(line))
        .collect()
}

/// Removes what neither a boot nor the build of a module reads.
fn remove_leftovers(source: &Path, build: &Path) -> Result<()> {
    let step = Progress::start("debug kernel: removing what was needed for building only");
    remove_files(build, &|path| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        has_extension(path, &["o", "a"])
            || name.starts_with("vmlinux")
            || name.starts_with(".tmp_vmlinux")
    })?;
    // The selftests, their mock device and make's own tools are built from sources that are left.
    for folder in [
        "arch", "block", "crypto", "drivers", "fs", "ipc", "kernel", "mm", "net", "security",
    ] {
        remove_files(&source.join(folder), &|path| {
            has_extension(path, &["c", "S"])
        })?;
    }
    step.done();
    Ok(())
}

fn has_extension(path: &Path, extensions: &[&str]) -> bool {
    path.extension()
        .and_then(OsStr::to_str)
        .is_some_and(|found| extensions.contains(&found))
}

/// Removes the files below a folder that are unwanted; links are left alone.
fn remove_files(folder: &Path, unwanted: &impl Fn(&Path) -> bool) -> Result<()> {
    for entry in entries(folder)? {
        let metadata =
            fs::symlink_metadata(&entry).map_err(Error::io(entry.display().to_string()))?;
        if metadata.is_dir() {
            remove_files(&entry, unwanted)?;
        } else if metadata.is_file() && unwanted(&entry) {
            paths::remove(&entry)?;
        }
    }
    Ok(())
}

fn entries(folder: &Path) -> Result<Vec<PathBuf>> {
    let failed = || Error::io(folder.display().to_string());
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).map_err(failed())? {
        found.push(entry.map_err(failed())?.path());
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lost_options_of_an_option_that_vanished_or_changed_are_named() {
        let fragment = "# why\nCONFIG_A=y\nCONFIG_B=m\nCONFIG_C=8\n# CONFIG_D is not set\n# CONFIG_E is not set\n";
        let made = "CONFIG_A=y\nCONFIG_B=y\n# CONFIG_D is not set\nCONFIG_E=y\nCONFIG_AB=y\n";
        assert_eq!(
            lost_options(fragment, made),
            ["CONFIG_B=m", "CONFIG_C=8", "# CONFIG_E is not set"]
        );
    }

    #[test]
    fn lost_options_of_a_fragment_that_came_out_are_none() {
        let fragment = "CONFIG_A=\"-x\"\n# CONFIG_D is not set\n";
        assert!(lost_options(fragment, "CONFIG_A=\"-x\"\nCONFIG_DD=y\n").is_empty());
    }

    #[test]
    fn remove_files_leaves_others_and_links() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        fs::create_dir(at("sub")).unwrap();
        for name in ["a.o", "a.h", "sub/b.o"] {
            fs::write(at(name), "").unwrap();
        }
        std::os::unix::fs::symlink(at("a.h"), at("link.o")).unwrap();
        remove_files(folder.path(), &|path| has_extension(path, &["o"])).unwrap();
        assert!(!at("a.o").exists() && !at("sub/b.o").exists());
        assert!(at("a.h").exists() && at("link.o").exists());
    }
}
