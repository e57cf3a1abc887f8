// SPDX-License-Identifier: MIT OR Apache-2.0
//! Set-up: from nothing to a toolbox and a kernel in the cache, once.

mod apt;
mod debug;
mod disks;
pub(crate) mod kernel;
mod step;
pub mod toolbox;

use std::path::Path;

pub use kernel::Kernel;
pub use toolbox::Toolbox;

pub(crate) use disks::Disks;
pub(crate) use step::{Lock, Step};

use debug::{Debug, Need};
use kernel::Compiler;

use crate::{
    Error, KernelChoice, Options, Paths, Result, ToolboxChoice, checks, paths,
    process::on_path,
    progress::{self, Progress},
    versions::VERSIONS,
};

/// Tools and a kernel, held against change for as long as this lives.
#[derive(Debug)]
pub struct Setup {
    /// The tools.
    pub toolbox: Toolbox,
    /// The guest's kernel.
    pub kernel: Kernel,
    _locks: Vec<Lock>,
}

/// Makes what is missing and returns all of it.
///
/// # Errors
/// No space, no network, no right to make namespaces, a tool that fails: with what to do.
pub fn ensure(options: &Options, paths: &Paths) -> Result<Setup> {
    if !cfg!(target_arch = "x86_64") {
        return Err(Error::unfit(
            "this machine is no x86-64",
            "use one that is: guest and tools are built for it",
        ));
    }
    if options.toolbox == ToolboxChoice::Host {
        checks::host_fits(options)?;
        return Ok(Setup {
            toolbox: Toolbox::Host,
            kernel: kernel_on_host(options)?,
            _locks: Vec::new(),
        });
    }
    let toolbox_step = toolbox::step(&paths.cache);
    let kernel_step = kernel::step(&paths.cache, &toolbox_step);
    let is_done = || toolbox_step.is_done() && kernel_step.is_done();
    let toolbox = Toolbox::Debian(toolbox_step.folder().to_path_buf());
    // Two kinds of lock cannot be exchanged in one go: look again after each, another run may have been in between.
    let lock = loop {
        let shared = Lock::shared(&paths.cache)?;
        if is_done() {
            break shared;
        }
        drop(shared);
        let _alone = Lock::exclusive(&paths.cache)?;
        if !is_done() {
            fill(&toolbox_step, &kernel_step, &toolbox, paths)?;
        }
    };
    toolbox::check_namespaces()?;
    let debug = Debug::new(&paths.cache, &toolbox_step);
    let with_llvm = |need| -> Result<(Toolbox, Vec<Lock>)> {
        let debugs = debug.ensure(need, toolbox_step.folder(), paths)?;
        Ok((debug.toolbox(), vec![debugs]))
    };
    let (kernel, (toolbox, mut locks)) = match &options.kernel {
        KernelChoice::Stock => (kernel::stock(kernel_step.folder())?, (toolbox, Vec::new())),
        KernelChoice::Debug => {
            let made = with_llvm(Need::Kernel)?;
            (debug.kernel()?, made)
        }
        KernelChoice::Folder(folder) => {
            let kernel = kernel::own(folder)?;
            let made = match kernel.compiler {
                Compiler::Gcc(_) => (toolbox, Vec::new()),
                Compiler::Llvm => with_llvm(Need::Llvm)?,
            };
            (kernel, made)
        }
    };
    locks.push(lock);
    Ok(Setup {
        toolbox,
        kernel,
        _locks: locks,
    })
}

/// The kernel that the options ask for, where this machine is the toolbox.
pub(crate) fn kernel_on_host(options: &Options) -> Result<Kernel> {
    match &options.kernel {
        KernelChoice::Stock => kernel::on_host(),
        KernelChoice::Folder(folder) => kernel::own(folder),
        KernelChoice::Debug => Err(Error::unfit(
            "the debug kernel is built with the Debian toolbox's compilers",
            "use --toolbox debian, or build one with the options in qemu-scripts/debug.config and name its folder with --kernel",
        )),
    }
}

fn fill(toolbox_step: &Step, kernel_step: &Step, toolbox: &Toolbox, paths: &Paths) -> Result<()> {
    for tool in ["apt-get", "apt-config", "dpkg-deb"] {
        if !on_path(tool) {
            return Err(Error::unfit(
                format!("`{tool}` is missing, so the Debian toolbox cannot be made here"),
                "use a Debian or Ubuntu machine, or --toolbox host",
            ));
        }
    }
    toolbox::check_namespaces()?;
    check_space(&paths.cache, VERSIONS.space.needed_mib)?;
    progress::note(&format!(
        "set-up fills {} once; it takes a few minutes",
        paths.cache.display()
    ));
    let log = paths.logs().join("setup.log");
    paths::remove(&log)?;
    let step = Progress::start("toolbox: fetching Debian's package lists");
    let apt = apt::Apt::new(&paths.cache.join("apt"), log.clone())?;
    step.done();
    toolbox_step.ensure(|folder| {
        let step = Progress::start("toolbox: fetching and unpacking QEMU and the compilers");
        toolbox::fill(folder, &apt, &log)?;
        step.done();
        Ok(())
    })?;
    kernel_step.ensure(|folder| kernel::fill(folder, toolbox, &apt, &log))?;
    // Lists and archives are of use only to a set-up that was interrupted.
    paths::remove(apt.folder())
}

/// Free space where the cache is, in MiB.
fn space(cache: &Path) -> Result<u64> {
    let existing = cache
        .ancestors()
        .find(|folder| folder.exists())
        .unwrap_or(Path::new("/"));
    let space = rustix::fs::statvfs(existing).map_err(Error::io(existing.display().to_string()))?;
    Ok(space.f_bavail.saturating_mul(space.f_frsize) >> 20)
}

/// Is there room for what is to be made?
fn check_space(cache: &Path, needed: u64) -> Result<()> {
    let free = space(cache)?;
    if free >= needed {
        return Ok(());
    }
    Err(Error::unfit(
        format!(
            "{} has {free} MiB free, set-up needs {needed} MiB",
            cache.display()
        ),
        "make room, or name a folder elsewhere with --cache",
    ))
}

/// Is toolbox and kernel there? If not, is there room for them?
pub(crate) fn check(options: &Options, paths: &Paths) -> Result<bool> {
    let toolbox = toolbox::step(&paths.cache);
    let base = toolbox.is_done() && kernel::step(&paths.cache, &toolbox).is_done();
    let debug = options.kernel != KernelChoice::Debug
        || Debug::new(&paths.cache, &toolbox).is_done(Need::Kernel);
    let needed = [
        (base, VERSIONS.space.needed_mib),
        (debug, VERSIONS.debug_kernel.needed_mib),
    ]
    .iter()
    .filter_map(|(done, needed)| (!done).then_some(*needed))
    .sum();
    check_space(&paths.cache, needed)?;
    Ok(base && debug)
}
