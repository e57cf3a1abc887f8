// SPDX-License-Identifier: MIT OR Apache-2.0
//! The disks of a VM: files of its own, sparse, that go with its logs; and how the guest gets to them.

use std::{fs::File, path::PathBuf};

use crate::{
    Error, Prepared, Result,
    process::{bound, output},
    vm::{Config, run_folder::RunFolder},
};

/// What swap has for itself.
const SWAP_BYTES: u64 = 1 << 30;

/// Loads the kernel's modules, where they are not built in, and waits for the disks.
pub(super) const LOAD_MODULES: &str = "cd /lib/modules; \
    test ! -e order || while read module; do insmod $module; done < order; \
    for try in $(seq 100); do \
        if test -b /dev/vda -a -b /dev/vdb; then exit 0; fi; \
        sleep 0.1; \
    done; \
    echo 'the disks do not appear: has this kernel virtio_blk?' >&2; exit 1";

/// Makes the disks that the VM shall have, in the order of their names.
pub(super) fn files(
    prepared: &Prepared,
    config: &Config,
    folder: &RunFolder,
) -> Result<Vec<PathBuf>> {
    if !config.disks {
        return Ok(Vec::new());
    }
    let empty = prepared.artifacts.file_system.as_deref().ok_or_else(|| {
        Error::unfit(
            "a VM with disks needs an empty file system, which is made in the toolbox",
            "use --toolbox debian",
        )
    })?;
    let (files, swap) = (folder.file("files.disk"), folder.file("swap.disk"));
    let mut copy = bound("cp");
    copy.args(["--sparse=always", "--no-target-directory"])
        .args([empty, &files]);
    output(copy, "copying the empty file system")?;
    let made = File::create(&swap).and_then(|file| file.set_len(SWAP_BYTES));
    made.map_err(Error::io(swap.display().to_string()))?;
    Ok(vec![files, swap])
}
