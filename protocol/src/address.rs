// SPDX-License-Identifier: MIT OR Apache-2.0
//! Addresses of the three spaces, each a type of its own (manual, chapter 1).

use crate::U64;
use zerocopy_derive::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// log2 of [`PAGE_SIZE`].
pub const PAGE_SHIFT: u32 = 12;
/// Bytes of the page that a level-0 leaf maps.
pub const PAGE_SIZE: u64 = 1 << PAGE_SHIFT;
/// log2 of [`HUGE_PAGE_SIZE`].
pub const HUGE_PAGE_SHIFT: u32 = 21;
/// Bytes of the page that a level-1 leaf maps.
pub const HUGE_PAGE_SIZE: u64 = 1 << HUGE_PAGE_SHIFT;

macro_rules! address {
    ($(#[$meta:meta])* $name:ident) => {
        $(#[$meta])*
        #[derive(
            Clone, Copy, Default, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable, KnownLayout,
        )]
        #[repr(transparent)]
        pub struct $name(U64);

        impl $name {
            /// The address with this number.
            pub const fn new(address: u64) -> Self {
                Self(U64::new(address))
            }

            /// The address as a number.
            pub const fn get(self) -> u64 {
                self.0.get()
            }

            /// Whether the address is a multiple of `align`, a power of two.
            pub const fn is_aligned(self, align: u64) -> bool {
                self.get() & (align - 1) == 0
            }

            /// The address rounded down to a multiple of `align`, a power of two.
            pub const fn align_down(self, align: u64) -> Self {
                Self::new(self.get() & !(align - 1))
            }

            /// The address `bytes` further on, unless it overflows.
            pub const fn checked_add(self, bytes: u64) -> Option<Self> {
                match self.get().checked_add(bytes) {
                    Some(sum) => Some(Self::new(sum)),
                    None => None,
                }
            }
        }

        impl PartialOrd for $name {
            fn partial_cmp(&self, other: &Self) -> Option<core::cmp::Ordering> {
                Some(self.cmp(other))
            }
        }

        impl Ord for $name {
            fn cmp(&self, other: &Self) -> core::cmp::Ordering {
                self.get().cmp(&other.get())
            }
        }

        impl core::fmt::Debug for $name {
            fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
                write!(f, concat!(stringify!($name), "({:#x})"), self.get())
            }
        }

        impl core::fmt::LowerHex for $name {
            fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
                core::fmt::LowerHex::fmt(&self.get(), f)
            }
        }
    };
}

address! {
    /// A virtual address of a context: what jobs use and page tables translate. 48 bits count;
    /// an address with a higher bit set is in no page table.
    GpuVa
}
address! {
    /// A byte offset into the device's own memory.
    VramAddr
}
address! {
    /// A physical address of the guest's RAM, as the guest's CPU has it.
    SystemAddr
}

impl GpuVa {
    /// Width of a virtual address.
    pub const BITS: u32 = 48;

    /// Whether page tables can map the address.
    pub const fn is_canonical(self) -> bool {
        self.get() >> Self::BITS == 0
    }
}
