// SPDX-License-Identifier: MIT OR Apache-2.0
//! Suite `mm`: what the kernel's memory management does to pages in VRAM and to pages that the GPU has
//! mapped. A file for each of its parts.

mod fork;

use crate::guest::Case;

/// All groups of the suite.
pub(super) const GROUPS: &[&[Case]] = &[fork::CASES];
