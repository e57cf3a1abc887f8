// SPDX-License-Identifier: GPL-2.0
//! The module's own use count.
//!
//! C header: `include/linux/module.h`.

use crate::bindings;

/// Keeps the module loaded until the machine goes down. For when mm has callbacks into it that can't
/// be taken back.
pub(crate) fn pin_for_ever() {
    // SAFETY: The caller runs in this module, so it is live.
    unsafe { bindings::__module_get(crate::THIS_MODULE.as_ptr()) };
}
