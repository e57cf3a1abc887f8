// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the disks of the machine [`Disk`](crate::guest::Machine::Disk) are for: an ext4 that is mounted, swap that
//! is on, each for as long as a case needs it. And what is swapped.

use super::start::eventually;
use crate::guest::machine::{DISK, SWAP_DISK};
use anyhow::{Context, Result, ensure};
use farfault::arena::Region;
use farfault::{Place, pagemap, stage::Advice};
use rustix::{
    fs::OFlags,
    mount::{MountFlags, UnmountFlags, mount, unmount},
};
use std::{
    fs::{self, File, OpenOptions},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    process::Command,
};

/// Pages that nobody uses and that are clean leave the page cache; and no CPU keeps any for itself.
pub(super) fn drop_caches() -> Result<()> {
    Ok(fs::write("/proc/sys/vm/drop_caches", "3")?)
}

fn run(program: &str, device: &str) -> Result<()> {
    let output = Command::new(program).arg(device).output()?;
    ensure!(
        output.status.success(),
        "{program} {device} failed: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}

/// A count of `/proc/vmstat`.
pub(super) fn vmstat(name: &str) -> Result<u64> {
    let text = fs::read_to_string("/proc/vmstat")?;
    let mut lines = text.lines().filter_map(|line| line.split_once(' '));
    let count = lines.find(|line| line.0 == name).context(name.to_owned())?;
    Ok(count.1.parse()?)
}

/// The ext4 of the disk, mounted, with one file. It goes when this is dropped.
pub(super) struct Ext4(PathBuf);

impl Ext4 {
    pub(super) fn mount() -> Result<Self> {
        let folder = PathBuf::from(format!("/run/farfault-ext4-{}", std::process::id()));
        fs::create_dir_all(&folder)?;
        let mounted = Self(folder);
        mounted.mount_there()?;
        Ok(mounted)
    }

    fn mount_there(&self) -> Result<()> {
        mount(DISK, &self.0, "ext4", MountFlags::empty(), None).context("mounting the ext4")
    }

    /// What is not on the disk has gone after this. Nobody may have the file open.
    pub(super) fn mount_again(&self) -> Result<()> {
        unmount(&self.0, UnmountFlags::empty()).context("unmounting the ext4")?;
        self.mount_there()
    }

    /// Who writes to it waits, with all locks that he holds, until this is dropped.
    pub(super) fn freeze(&self) -> Result<Frozen<'_>> {
        fsfreeze("--freeze", &self.0)?;
        Ok(Frozen(&self.0))
    }

    fn open_with(&self, flags: OFlags) -> Result<File> {
        let flags = i32::try_from(flags.bits())?;
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true);
        Ok(options.custom_flags(flags).open(self.0.join("file"))?)
    }

    pub(super) fn open(&self) -> Result<File> {
        self.open_with(OFlags::empty())
    }

    /// Past the page cache.
    pub(super) fn open_direct(&self) -> Result<File> {
        self.open_with(OFlags::DIRECT)
    }
}

impl Drop for Ext4 {
    fn drop(&mut self) {
        let _ = fs::remove_file(self.0.join("file"));
        // Lazily: a mapping may be left of a case that failed.
        let _ = unmount(&self.0, UnmountFlags::DETACH);
        let _ = fs::remove_dir(&self.0);
    }
}

fn fsfreeze(what: &str, folder: &Path) -> Result<()> {
    let status = Command::new("fsfreeze").arg(what).arg(folder).status()?;
    ensure!(status.success(), "fsfreeze {what} failed: {status}");
    Ok(())
}

/// A frozen filesystem.
pub(super) struct Frozen<'a>(&'a Path);

impl Drop for Frozen<'_> {
    fn drop(&mut self) {
        if let Err(error) = fsfreeze("--unfreeze", self.0) {
            eprintln!("{error:?}");
        }
    }
}

/// What swap lies on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::guest::cases) enum SwapOn {
    /// A disk, which takes its time: what is read stays in the swap cache.
    Disk,
    /// Compressed memory, which is read at once, and past the swap cache.
    Zram,
}

pub(super) const EACH_SWAP: [SwapOn; 2] = [SwapOn::Disk, SwapOn::Zram];

/// Swap that is on until this is dropped.
pub(in crate::guest::cases) struct Swap(SwapOn);

impl Swap {
    pub(in crate::guest::cases) fn on(what: SwapOn) -> Result<Self> {
        let swap = Self(what);
        if what == SwapOn::Zram {
            fs::write("/sys/block/zram0/disksize", "256M").context("the size of zram0")?;
        }
        run("mkswap", swap.device())?;
        run("swapon", swap.device())?;
        Ok(swap)
    }

    fn device(&self) -> &'static str {
        match self.0 {
            SwapOn::Disk => SWAP_DISK,
            SwapOn::Zram => "/dev/zram0",
        }
    }

    /// Brings back all that is swapped.
    pub(super) fn off(&self) -> Result<()> {
        run("swapoff", self.device())
    }
}

impl Drop for Swap {
    fn drop(&mut self) {
        // It may be off already.
        let _ = self.off();
        if self.0 == SwapOn::Zram {
            let _ = fs::write("/sys/block/zram0/reset", "1");
        }
    }
}

/// How many pages were swapped out since the machine is up.
pub(in crate::guest::cases) fn swapped_out() -> Result<u64> {
    vmstat("pswpout")
}

/// How many pages of a region are swapped.
pub(super) fn swapped(region: Region) -> Result<usize> {
    const SWAPPED: u64 = 1 << 62;
    let entries = pagemap::read(region.pages())?;
    let is_swapped =
        |entry: &&pagemap::Entry| entry.bits() & SWAPPED != 0 && entry.place() == Some(Place::None);
    Ok(entries.iter().filter(is_swapped).count())
}

/// Swaps out the pages of a region, all of which are in RAM and nobody else's.
pub(super) fn swap_out(region: Region) -> Result<()> {
    eventually("all pages are swapped", || {
        region.advise(Advice::PageOut)?;
        let all = swapped(region)? == region.pages().count();
        if !all {
            // What a CPU has still to put on the list of pages that can be reclaimed.
            drop_caches()?;
        }
        Ok(all)
    })
}
