// SPDX-License-Identifier: MIT OR Apache-2.0
//! What pages hold, in few words. A script's data says itself which page it was written to: each
//! word has a tag, the number of its page, and its own index.
//!
//! | shown | is |
//! | --- | --- |
//! | `0:8` | eight pages of zeros |
//! | `5@b+3:8` | what tag 5 wrote to `b+3` and the seven pages after it |
//! | `~:2` | two pages of the buffer as they were before the call |
//! | `#1f…` | anything else: a digest |
//! | `EFAULT:4` | four pages that could not be read |

use super::{
    address::{PAGE, PageName},
    node::error,
};
use farfault::stage::STAGE;
use rustix::io::Errno;
use std::fmt::Write as _;

const WORDS: u64 = PAGE / 8;
/// What the buffer is filled with before a call.
pub(super) const UNTOUCHED: u64 = 0xeeee_eeee_eeee_eeee;

/// A word of a page of the stage.
pub(super) fn word(tag: u16, page: u64, index: u64) -> u64 {
    u64::from(tag) << 48 | (page - STAGE.start / PAGE) << 9 | index
}

/// One page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Content {
    Zero,
    Untouched,
    Written { tag: u16, page: u64 },
    Other(u64),
    Failed(Errno),
}

impl Content {
    /// Of a page, by its words.
    pub(super) fn of(load: impl Fn(u64) -> u64) -> Self {
        let first = load(0);
        let (tag, page) = (
            (first >> 48) as u16,
            (first << 16 >> 25) + STAGE.start / PAGE,
        );
        let all =
            |expected: &dyn Fn(u64) -> u64| (0..WORDS).all(|index| load(index) == expected(index));
        if all(&|_| 0) {
            Self::Zero
        } else if all(&|_| UNTOUCHED) {
            Self::Untouched
        } else if all(&|index| word(tag, page, index)) {
            Self::Written { tag, page }
        } else {
            // FNV-1a, over words.
            let mix = |hash: u64, index| (hash ^ load(index)).wrapping_mul(0x100_0000_01b3);
            Self::Other((0..WORDS).fold(0xcbf2_9ce4_8422_2325, mix))
        }
    }

    /// Does a page with this follow, in the same run?
    fn goes_on_with(self, count: u64, next: Self) -> bool {
        match self {
            Self::Written { tag, page } => {
                next == Self::Written {
                    tag,
                    page: page + count,
                }
            }
            Self::Zero | Self::Untouched | Self::Failed(_) => next == self,
            Self::Other(_) => false,
        }
    }
}

/// Runs of pages.
pub(super) fn describe(pages: &[Content]) -> String {
    let mut text = String::new();
    let mut rest = pages;
    while let Some((first, _)) = rest.split_first() {
        let count = (1..rest.len())
            .find(|&count| !first.goes_on_with(count as u64, rest[count]))
            .unwrap_or(rest.len());
        rest = &rest[count..];
        let _ = match *first {
            Content::Zero => write!(text, " 0:{count}"),
            Content::Untouched => write!(text, " ~:{count}"),
            Content::Written { tag, page } => write!(text, " {tag}@{}:{count}", PageName(page)),
            Content::Other(hash) => write!(text, " #{hash:016x}"),
            Content::Failed(errno) => write!(text, " {}:{count}", error(errno)),
        };
    }
    text.trim_start().to_owned()
}

/// Runs of bytes of a snapshot: what the page is (`-` nothing special, `z` zero page, `L` local
/// device page, `R` remote one, `E` error, `?` not written), then `r` or `w`, `P` for a huge page.
pub(super) fn describe_snapshot(bytes: &[u8]) -> String {
    let mut text = String::new();
    let mut rest = bytes;
    while let Some((&first, _)) = rest.split_first() {
        let count = rest.iter().take_while(|&&byte| byte == first).count();
        rest = &rest[count..];
        let _ = write!(text, " {}:{count}", protection(first));
    }
    text.trim_start().to_owned()
}

fn protection(byte: u8) -> String {
    match byte {
        0xff => return "E".to_owned(),
        0xee => return "?".to_owned(),
        0 => return "none".to_owned(),
        _ => {}
    }
    let mut text = match byte & 0xf0 {
        0x00 => "-",
        0x10 => "z",
        0x20 => "L",
        0x30 => "R",
        _ => return format!("{byte:#04x}"),
    }
    .to_owned();
    for (bit, letter) in [(1, 'r'), (2, 'w'), (4, 'P'), (8, 'U')] {
        if byte & bit != 0 {
            text.push(letter);
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compare::address::area;

    #[test]
    fn describe_of_written_pages_names_them_in_runs() {
        let page = area(1) / PAGE + 3;
        let written = |page, tag| Content::of(|index| word(tag, page, index));
        let pages = [
            Content::of(|_| 0),
            written(page, 5),
            written(page + 1, 5),
            written(page + 1, 5),
            Content::of(|_| UNTOUCHED),
        ];
        assert_eq!(describe(&pages), "0:1 5@b+3:2 5@b+4:1 ~:1");
        assert!(matches!(Content::of(|index| index / 7), Content::Other(_)));
    }

    #[test]
    fn describe_snapshot_names_each_kind_of_page() {
        let bytes = [0xff, 0, 0, 1, 0x26, 0x26, 0x31, 0x11, 0xee];
        let text = "E:1 none:2 -r:1 LwP:2 Rr:1 zr:1 ?:1";
        assert_eq!(describe_snapshot(&bytes), text);
    }
}
