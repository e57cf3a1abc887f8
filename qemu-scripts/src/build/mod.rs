// SPDX-License-Identifier: MIT OR Apache-2.0
//! What is built from this tree: the device, the driver, the guest's programs and the initramfs with all of them.
//!
//! cargo and make know what is out of date, so they are simply asked each time; only the initramfs has a stamp of its own.

mod device;
mod guest_programs;
mod initramfs;
mod module;
mod suite;

use std::path::PathBuf;

pub use device::device;
pub use guest_programs::{Program, guest_programs};
pub use initramfs::initramfs;
pub use module::{clippy_module, module};
pub use suite::{PROGRAM as SUITE_PROGRAM, Suite, suite};

use crate::{
    Paths, Result,
    setup::{Disks, Lock, Setup},
};

/// What a VM is made of.
#[derive(Debug, Clone)]
pub struct Artifacts {
    /// The program that is one GPU.
    pub device: PathBuf,
    /// Driver and guest programs, with the init that starts them.
    pub initramfs: PathBuf,
    /// An empty ext4, for VMs with disks.
    pub file_system: Option<PathBuf>,
}

/// What the guest has beside driver and programs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Extra {
    /// Nothing.
    None,
    /// The kernel's own selftests for HMM, and their mock device.
    Suite,
    /// The kernel's own modules for disks; and there is a file system to put on one.
    Disks,
}

/// Builds all of it.
///
/// # Errors
/// A compiler says no.
pub fn all(paths: &Paths, setup: &Setup, extra: Extra) -> Result<Artifacts> {
    let _lock = Lock::exclusive(&paths.build())?;
    let device = device(paths)?;
    let mut modules = vec![module(paths, setup)?];
    let mut programs = guest_programs(paths, setup)?;
    let mut disks = None;
    let name = match extra {
        Extra::None => "initramfs",
        Extra::Disks => {
            disks = Disks::ensure(paths, setup)?;
            if let Some(disks) = &disks {
                modules.extend(disks.modules(&setup.kernel)?);
            }
            "initramfs-with-disks"
        }
        Extra::Suite => {
            let suite = suite(paths, setup)?;
            modules.push(suite.module);
            programs.push(suite.program);
            "initramfs-with-suite"
        }
    };
    let initramfs = initramfs(paths, setup, name, &modules, &programs)?;
    Ok(Artifacts {
        device,
        initramfs,
        file_system: disks.map(|disks| disks.file_system()),
    })
}
