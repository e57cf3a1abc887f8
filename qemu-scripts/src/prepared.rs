// SPDX-License-Identifier: MIT OR Apache-2.0
//! All that a VM needs, made or found.

use crate::{
    Options, Paths, Result,
    accel::Accel,
    build::{self, Artifacts, Extra},
    setup::{self, Setup},
};

/// Tools, kernel, device, driver and guest programs, ready to boot.
#[derive(Debug)]
pub struct Prepared {
    /// Which folder holds what.
    pub paths: Paths,
    /// Tools and kernel.
    pub setup: Setup,
    /// What was built from this tree.
    pub artifacts: Artifacts,
    /// What runs the guest's code.
    pub accel: Accel,
}

impl Prepared {
    /// Sets up and builds whatever is missing or out of date.
    ///
    /// # Errors
    /// Set-up or a build fails.
    pub fn new(options: &Options) -> Result<Self> {
        Self::with(options, Extra::None)
    }

    /// The same with more in the guest.
    ///
    /// # Errors
    /// Set-up or a build fails.
    pub fn with(options: &Options, extra: Extra) -> Result<Self> {
        let paths = Paths::new(options)?;
        let setup = setup::ensure(options, &paths)?;
        let artifacts = build::all(&paths, &setup, extra)?;
        let accel = Accel::choose(options, &paths, &setup)?;
        Ok(Self {
            paths,
            setup,
            artifacts,
            accel,
        })
    }
}
