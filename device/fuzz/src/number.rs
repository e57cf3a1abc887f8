// SPDX-License-Identifier: MIT OR Apache-2.0
//! Numbers that are often at the border of something.

use crate::machine::{RAM_END, VRAM};
use arbitrary::{Arbitrary, Result, Unstructured};

/// Any number; small ones, powers of two and ends of memory more often.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Number(pub(crate) u64);

/// One that is mostly a multiple of 4 KiB.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Page(pub(crate) u64);

/// One that is mostly below 8.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Small(pub(crate) u32);

impl<'a> Arbitrary<'a> for Number {
    fn arbitrary(u: &mut Unstructured<'a>) -> Result<Self> {
        let kind = u8::arbitrary(u)? % 16;
        if kind == 15 {
            return Ok(Self(u.arbitrary()?));
        }
        let byte = u64::from(u8::arbitrary(u)?);
        Ok(Self(match kind {
            0..4 => byte,
            4..9 => byte << 12,
            9 => byte << 21,
            10 => 1 << (byte % 64),
            11 => (1 << (byte % 64)) - 1,
            12 => u64::MAX - byte,
            13 => VRAM.wrapping_sub(byte * 8),
            _ => RAM_END.wrapping_sub(byte * 8),
        }))
    }
}

impl<'a> Arbitrary<'a> for Page {
    fn arbitrary(u: &mut Unstructured<'a>) -> Result<Self> {
        let byte = u8::arbitrary(u)?;
        Ok(Self(match byte {
            0..160 => u64::from(byte % 64) << 12,
            160..240 => Number::arbitrary(u)?.0 & !0xfff,
            _ => Number::arbitrary(u)?.0,
        }))
    }
}

impl<'a> Arbitrary<'a> for Small {
    fn arbitrary(u: &mut Unstructured<'a>) -> Result<Self> {
        let byte = u8::arbitrary(u)?;
        Ok(Self(match byte {
            0..240 => u32::from(byte % 8),
            240..248 => Number::arbitrary(u)?.0 as u32,
            _ => u.arbitrary()?,
        }))
    }
}
