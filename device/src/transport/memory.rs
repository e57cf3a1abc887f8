// SPDX-License-Identifier: MIT OR Apache-2.0
//! Whether a memory table of the front end can be used: each region must be there, and stay.
//!
//! A mapping of a file that is shorter than its region, or that somebody makes shorter later, kills
//! the process that touches it there (`SIGBUS`). So a file must be sealed against that, as QEMU's
//! `memory-backend-memfd` does by itself, and long enough. What cannot be sealed, such as a file of a
//! file system, is taken only by who trusts his front end (`--unsealed-memory`).
//!
//! Knows nothing of rings and requests.

use rustix::fs::{SealFlags, fcntl_get_seals};
use std::{fs::File, io};
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

/// Which files a memory table may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemoryRule {
    /// Only such as nobody can make shorter.
    Sealed,
    /// Any that is long enough now.
    Unsealed,
}

/// Checks all regions.
pub(super) fn check(memory: &GuestMemoryMmap, rule: MemoryRule) -> io::Result<()> {
    for region in memory.iter() {
        let refused = |why: String| {
            let start = region.start_addr().0;
            io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("the guest's memory at {start:#x} cannot be used: {why}"),
            )
        };
        let Some(file) = region.file_offset() else {
            return Err(refused("it has no file".into()));
        };
        if rule == MemoryRule::Sealed && !is_sealed(file.file()) {
            return Err(refused(
                "its file can be made shorter at any time, which would end this process; use QEMU's \
                 memory-backend-memfd with its seal=on, or start farfault-device with \
                 --unsealed-memory"
                    .into(),
            ));
        }
        let size = file.file().metadata()?.len();
        if file
            .start()
            .checked_add(region.len())
            .is_none_or(|end| end > size)
        {
            return Err(refused(format!(
                "it would be {} bytes from {} on in a file of {size}",
                region.len(),
                file.start(),
            )));
        }
    }
    Ok(())
}

fn is_sealed(file: &File) -> bool {
    // Only memory files have seals; others say so by an error.
    fcntl_get_seals(file).is_ok_and(|seals| seals.contains(SealFlags::SHRINK))
}
