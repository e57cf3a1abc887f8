// SPDX-License-Identifier: MIT OR Apache-2.0
//! What is built from this tree: the device, the driver, the guest's programs and the initramfs with all of them.
//!
//! cargo and make know what is out of date, so they are simply asked each time; only the initramfs has a stamp of its own.

mod device;
mod guest_programs;
mod initramfs;
mod module;

use std::path::PathBuf;

pub use device::device;
pub use guest_programs::{Program, guest_programs};
pub use initramfs::initramfs;
pub use module::{clippy_module, module};

use crate::{
    Paths, Result,
    setup::{Lock, Setup},
};

/// What a VM is made of.
#[derive(Debug, Clone)]
pub struct Artifacts {
    /// The program that is one GPU.
    pub device: PathBuf,
    /// Driver and guest programs, with the init that starts them.
    pub initramfs: PathBuf,
}

/// Builds all of it.
///
/// # Errors
/// A compiler says no.
pub fn all(paths: &Paths, setup: &Setup) -> Result<Artifacts> {
    let _lock = Lock::exclusive(&paths.build())?;
    let device = device(paths)?;
    let driver = module(paths, setup)?;
    let programs = guest_programs(paths, setup)?;
    let initramfs = initramfs(paths, setup, &driver, &programs)?;
    Ok(Artifacts { device, initramfs })
}
