// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the Farfault GPU and its driver say to each other: layouts and constants, no algorithms.
//!
//! One crate, compiled by cargo for the device and by Kbuild for the kernel module, so that both
//! sides cannot disagree. Its prose is the hardware manual (`docs/manual/`); every item names the
//! chapter that it follows.
//!
//! | module | manual chapter |
//! | --- | --- |
//! | [`address`] | 1, Addresses |
//! | [`config`] | 2, Configuration space |
//! | [`command`] | 3, Queues: framing, replies and status |
//! | [`control`] | 4, Control queue |
//! | [`submit`] | 5, Submit queue |
//! | [`event`] | 6, Event queue |
//! | [`pte`] | 7, Page tables |
//!
//! # Rules for changing it
//!
//! - Everything is little-endian and has alignment 1; there is no implicit padding, and no field
//!   changes its meaning once a version was released.
//! - Reserved fields are zero. Each receiver checks that: only so can they get a meaning later.
//! - A new command, kernel, event or cause takes a number never used before, and a bit in
//!   [`config::Features`]; it raises [`config::VERSION_MINOR`]. A driver uses it only where the bit
//!   is set, so old drivers run on new devices and new drivers on old devices.
//! - Anything else (a removed command, a changed layout) raises [`config::VERSION_MAJOR`], and a
//!   driver refuses a major version that it does not know.
//! - Sizes and offsets are asserted at compile time beside each type. A failing assertion means
//!   that the wire changed, never that the assertion is out of date.
// Kbuild compiles every module with `no_std` already and refuses a second one.
#![cfg_attr(not(MODULE), no_std)]
#![forbid(unsafe_code)]

pub mod address;
pub mod command;
pub mod config;
pub mod control;
pub mod event;
pub mod pte;
pub mod submit;

pub use zerocopy::little_endian::{U16, U32, U64};

/// Asserts the size of a wire type, and the offset of each field named, when the crate compiles.
macro_rules! assert_layout {
    ($type:ty, size = $size:expr $(, $field:ident @ $offset:expr)* $(,)?) => {
        const _: () = {
            assert!(core::mem::size_of::<$type>() == $size);
            assert!(core::mem::align_of::<$type>() == 1);
            $(assert!(core::mem::offset_of!($type, $field) == $offset);)*
        };
    };
}
pub(crate) use assert_layout;

/// A closed set of numbers with a wire form of `$raw`: the enum and its parser.
macro_rules! wire_enum {
    (
        $(#[$meta:meta])*
        pub enum $name:ident: $raw:ty {
            $($(#[$variant_meta:meta])* $variant:ident = $value:expr,)*
        }
    ) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr($raw)]
        pub enum $name {
            $($(#[$variant_meta])* $variant = $value,)*
        }

        impl $name {
            /// Every value, in the order of their numbers.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];

            /// The value that `raw` stands for, if any does.
            pub const fn from_raw(raw: $raw) -> Option<Self> {
                match raw {
                    $($value => Some(Self::$variant),)*
                    _ => None,
                }
            }

            /// The number on the wire.
            pub const fn raw(self) -> $raw {
                self as $raw
            }
        }
    };
}
pub(crate) use wire_enum;
