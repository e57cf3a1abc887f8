// SPDX-License-Identifier: GPL-2.0
//! The module's own use count.
//!
//! C header: `include/linux/module.h`.

use crate::bindings;

/// Keeps the module loaded until the machine goes down. For when mm has callbacks into it that can't
/// be taken back. `false`: it is being unloaded already.
pub(crate) fn try_pin_for_ever() -> bool {
    // SAFETY: The caller runs in this module, so its structure is there.
    unsafe { bindings::try_module_get(crate::THIS_MODULE.as_ptr()) }
}
