// SPDX-License-Identifier: MIT OR Apache-2.0
//! The machines that cases run on, by what they have. How they are made is the host's business.

/// What a case runs on. Each GPU has [`crate::guest::VRAM`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Machine {
    /// One GPU.
    Small,
    /// Two of them.
    TwoGpus,
    /// Three of them, the driver with `dmirror=1`.
    Mirrors,
    /// As many as a VM has room for.
    EightGpus,
    /// One GPU, [`DISK`] with an empty ext4, [`SWAP_DISK`] with nothing, and zram and memory for CMA where the
    /// kernel has them.
    Disk,
    /// One GPU; two NUMA nodes of one CPU each, with `ZONE_MOVABLE`.
    Numa,
    /// One GPU with a node of `dmirror=1`, and a free slot for another.
    HotPlug,
    /// As many GPUs as a VM has room for, to be killed one after the other: the driver gives them
    /// [`DYING_LIMIT`].
    Dying,
}

/// How many seconds the driver gives a GPU of [`Machine::Dying`], on a kernel that is not slow.
pub const DYING_LIMIT: u32 = 3;

/// The disk for files.
pub(super) const DISK: &str = "/dev/vda";
/// The disk for swap.
pub(super) const SWAP_DISK: &str = "/dev/vdb";

impl Machine {
    /// How many GPUs it has.
    #[must_use]
    pub fn gpus(self) -> usize {
        match self {
            Self::Small | Self::Disk | Self::Numa | Self::HotPlug => 1,
            Self::TwoGpus => 2,
            Self::Mirrors => 3,
            Self::EightGpus | Self::Dying => 8,
        }
    }
}
