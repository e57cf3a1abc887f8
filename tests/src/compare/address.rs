// SPDX-License-Identifier: MIT OR Apache-2.0
//! Names for addresses, the same in each run: areas of the stage `a` to `z`, and special places.
//!
//! An address is a name or a number, with more added: decimal numbers are pages, hexadecimal ones
//! bytes, so `b+3+0x10` is 16 bytes into the fourth page of area `b`. A range is an address and a
//! number of pages: `b+3:8`.

use anyhow::{Context, Result, bail, ensure};
use farfault::stage::STAGE;
use std::fmt;

/// Bytes of a page.
pub(super) const PAGE: u64 = 4096;
/// Areas are so far from each other; each may have huge pages.
const AREA: u64 = 64 << 20;
const AREAS: u64 = 26;

/// Data of the nodes' calls goes to and comes from here.
pub(super) const BUFFER: u64 = STAGE.start + 0x40_0000_0000;
/// No call with the usual buffer gets more pages than this back.
pub(super) const BUFFER_PAGES: u64 = 2048;
/// The page of the calls' argument.
pub(super) const ARGUMENT: u64 = BUFFER - 0x1000_0000;
/// A page for copies by the kernel.
pub(super) const SCRATCH: u64 = ARGUMENT - 0x100_0000;

/// Pages, from an address that need not be a page's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Range {
    pub(super) address: u64,
    pub(super) pages: u64,
}

impl Range {
    pub(super) fn length(self) -> u64 {
        self.pages.saturating_mul(PAGE)
    }

    /// The numbers of its pages; none if it is not a range of the stage.
    pub(super) fn numbers(self) -> std::ops::Range<u64> {
        let end = self.address.saturating_add(self.length());
        if self.address < STAGE.start || end > STAGE.end {
            return 0..0;
        }
        self.address / PAGE..end / PAGE
    }

    pub(super) fn parse(text: &str) -> Result<Self> {
        let (address, pages) = text.split_once(':').unwrap_or((text, "1"));
        Ok(Self {
            address: parse_address(address)?,
            pages: parse_number(pages)?,
        })
    }
}

/// Where area `index` begins.
pub(super) fn area(index: u64) -> u64 {
    STAGE.start + (index + 1) * AREA
}

/// A decimal or hexadecimal number.
pub(super) fn parse_number(text: &str) -> Result<u64> {
    let number = match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16),
        None => text.parse(),
    };
    number.with_context(|| format!("`{text}` is no number"))
}

pub(super) fn parse_address(text: &str) -> Result<u64> {
    let mut address = 0u64;
    for (index, term) in text.split('+').enumerate() {
        let value = if index == 0 && !term.starts_with(|first: char| first.is_ascii_digit()) {
            named(term)?
        } else if term.starts_with("0x") {
            parse_number(term)?
        } else {
            parse_number(term)?.wrapping_mul(PAGE)
        };
        address = address.wrapping_add(value);
    }
    Ok(address)
}

fn named(name: &str) -> Result<u64> {
    match (name, name.as_bytes()) {
        (_, [letter @ b'a'..=b'z']) => Ok(area(u64::from(letter - b'a'))),
        ("buffer", _) => Ok(BUFFER),
        ("argument", _) => Ok(ARGUMENT),
        ("stack", _) => Ok(mapping("[stack]")?.end - PAGE),
        ("vvar" | "vdso", _) => Ok(mapping(&format!("[{name}]"))?.start),
        _ => bail!("there is no place `{name}`"),
    }
}

/// A mapping that the kernel or the loader made.
fn mapping(name: &str) -> Result<std::ops::Range<u64>> {
    let maps = std::fs::read_to_string("/proc/self/maps")?;
    let line = maps.lines().find(|line| line.ends_with(name));
    let line = line.with_context(|| format!("there is no {name}"))?;
    let (start, rest) = line.split_once('-').context("/proc/self/maps")?;
    let end = rest.split(' ').next().unwrap_or_default();
    Ok(u64::from_str_radix(start, 16)?..u64::from_str_radix(end, 16)?)
}

/// A page of the stage, by name.
pub(super) struct PageName(pub(super) u64);

impl fmt::Display for PageName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let first = STAGE.start / PAGE;
        let pages = AREA / PAGE;
        match self.0.checked_sub(first + pages) {
            Some(page) if page / pages < AREAS => {
                let letter = char::from(b'a' + (page / pages) as u8);
                write!(f, "{letter}")?;
                match page % pages {
                    0 => Ok(()),
                    page => write!(f, "+{page}"),
                }
            }
            _ => write!(f, "{:#x}", self.0 * PAGE),
        }
    }
}

/// A range must have whole pages of the stage.
pub(super) fn of_stage(range: Range) -> Result<Range> {
    ensure!(
        range.address % PAGE == 0 && !range.numbers().is_empty(),
        "{range:x?} is no range of the stage"
    );
    Ok(range)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_names_pages_and_bytes() {
        let a = area(0);
        assert_eq!(parse_address("a").unwrap(), a);
        assert_eq!(parse_address("a+3+0x10").unwrap(), a + 3 * PAGE + 16);
        assert_eq!(parse_address("0xffff+0x1").unwrap(), 0x1_0000);
        assert!(parse_address("A").is_err());
        let range = Range::parse("b+1:0x10").unwrap();
        assert_eq!((range.address, range.pages), (area(1) + PAGE, 16));
        assert_eq!(PageName(range.address / PAGE).to_string(), "b+1");
        assert_eq!(PageName(a / PAGE).to_string(), "a");
    }
}
