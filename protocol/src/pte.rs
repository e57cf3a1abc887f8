// SPDX-License-Identifier: MIT OR Apache-2.0
//! Page-table entries (manual, chapter 7).
//!
//! Four levels of 512 entries of 8 bytes. A table is 4 KiB of VRAM, aligned. Level 3 is the root;
//! a level-1 entry is a 2 MiB leaf or points to a level-0 table, whose entries are 4 KiB leaves.

use crate::address::{GpuVa, SystemAddr, VramAddr, HUGE_PAGE_SIZE, PAGE_SHIFT, PAGE_SIZE};

/// log2 of [`ENTRIES`].
pub const INDEX_BITS: u32 = 9;
/// Entries of a table.
pub const ENTRIES: u64 = 1 << INDEX_BITS;
/// Bytes of an entry.
pub const ENTRY_SIZE: u64 = 8;
/// The root's level. Leaves are at level 0 (4 KiB) or 1 (2 MiB).
pub const ROOT_LEVEL: u32 = 3;

/// Index of the entry of `va` in a table of `level`.
pub const fn index(va: GpuVa, level: u32) -> u64 {
    (va.get() >> (PAGE_SHIFT + INDEX_BITS * level)) & (ENTRIES - 1)
}

/// Where a leaf's page is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Location {
    /// In the device's memory.
    Vram(VramAddr),
    /// In the guest's RAM.
    System(SystemAddr),
}

/// One entry.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
#[repr(transparent)]
pub struct Pte(pub u64);

impl Pte {
    /// The entry counts. Without it all other bits are ignored.
    pub const VALID: u64 = 1 << 0;
    /// Leaf: stores are allowed.
    pub const WRITABLE: u64 = 1 << 1;
    /// Leaf: atomics are allowed, if stores are.
    pub const ATOMIC: u64 = 1 << 2;
    /// At level 1: this is a leaf of 2 MiB. Reserved at the other levels.
    pub const HUGE: u64 = 1 << 3;
    /// Leaf: the address is one of the guest's RAM, not of VRAM. Reserved in a table entry.
    pub const SYSTEM: u64 = 1 << 4;
    /// Leaf: an engine translated through the entry. Set by the device, cleared by the driver.
    pub const ACCESSED: u64 = 1 << 5;
    /// Leaf: an engine translated through the entry for a store. Set by the device, cleared by the
    /// driver: which loses a bit set since it read the entry (manual, section 7.4).
    pub const DIRTY: u64 = 1 << 6;
    /// The address, in place: of a 4 KiB page, a 2 MiB page, or a table in VRAM.
    pub const ADDRESS: u64 = ((1 << 52) - 1) & !(PAGE_SIZE - 1);
    /// Bits that must be zero in a table entry that is valid.
    pub const TABLE_RESERVED: u64 = !(Self::VALID | Self::ADDRESS);
    /// Bits that must be zero in a 4 KiB leaf that is valid.
    pub const LEAF_RESERVED: u64 = !(Self::VALID
        | Self::WRITABLE
        | Self::ATOMIC
        | Self::SYSTEM
        | Self::ACCESSED
        | Self::DIRTY
        | Self::ADDRESS);
    /// Bits that must be zero in a 2 MiB leaf that is valid.
    pub const HUGE_RESERVED: u64 =
        (Self::LEAF_RESERVED & !Self::HUGE) | (Self::ADDRESS & (HUGE_PAGE_SIZE - 1));

    /// An entry that maps nothing.
    pub const EMPTY: Self = Self(0);

    /// An entry of level 1 to 3 that points to a table.
    pub const fn table(table: VramAddr) -> Self {
        Self(table.get() & Self::ADDRESS | Self::VALID)
    }

    /// A leaf with `flags` of [`Self::WRITABLE`], [`Self::ATOMIC`] and [`Self::HUGE`].
    pub const fn leaf(location: Location, flags: u64) -> Self {
        let address = match location {
            Location::Vram(a) => a.get() & Self::ADDRESS,
            Location::System(a) => a.get() & Self::ADDRESS | Self::SYSTEM,
        };
        Self(address | flags | Self::VALID)
    }

    /// Whether all bits of `mask` are set.
    pub const fn has(self, mask: u64) -> bool {
        self.0 & mask == mask
    }

    /// The address field, as a number.
    pub const fn address(self) -> u64 {
        self.0 & Self::ADDRESS
    }

    /// The address field of a leaf, with its aperture.
    pub const fn location(self) -> Location {
        if self.has(Self::SYSTEM) {
            Location::System(SystemAddr::new(self.address()))
        } else {
            Location::Vram(VramAddr::new(self.address()))
        }
    }
}

impl core::fmt::Debug for Pte {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "Pte({:#x})", self.0)
    }
}
