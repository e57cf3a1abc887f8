// SPDX-License-Identifier: MIT OR Apache-2.0
//! Children of a case.

use anyhow::Result;

/// The code of a child that did what it should, or has said why not.
pub(crate) fn code(result: Result<()>) -> u8 {
    match result {
        Ok(()) => 0,
        Err(error) => {
            eprintln!("child: {error:?}");
            1
        }
    }
}
