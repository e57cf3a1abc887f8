// SPDX-License-Identifier: MIT OR Apache-2.0
//! The memory that all threads of the engine work on: blocks of 2 MiB, and in each of them, next to each
//! other, pages that everybody writes, pages that are taken apart, and pages that never change.

use super::written::Written;
use crate::guest::oracle;
use anyhow::{Context, Result, ensure};
use farfault::arena::{Backing, Region};
use farfault::{HUGE_PAGE_SIZE, PAGE_SIZE};
use rand_chacha::{
    ChaCha8Rng,
    rand_core::{RngCore, SeedableRng},
};

/// Pages of a group: one that is written, [`TORN_PAGES`] that are taken apart, and the others.
pub(super) const GROUP_PAGES: usize = 64;
/// Pages of a run that is taken apart.
pub(super) const TORN_PAGES: usize = 3;
/// The word to which all add.
pub(super) const COUNTER: usize = 0;
/// The first word of which one thread stores a generation; behind it are those of others.
pub(super) const GENERATION: usize = 1;
/// Words of a page that are written; the others never change.
pub(super) const WRITTEN_WORDS: usize = 5;

const PAGE_WORDS: usize = PAGE_SIZE / 8;

/// A page that everybody writes.
#[derive(Debug)]
pub(super) struct Page {
    pub(super) region: Region,
    pub(super) written: [Written; WRITTEN_WORDS],
    /// The oracle's index of its first word.
    first: usize,
    seed: u64,
}

/// 64 pages of a block.
#[derive(Debug)]
pub(super) struct Group {
    pub(super) page: Page,
    /// Nobody but one thread writes here, or reads by CPU.
    pub(super) torn: Region,
    /// Never written after the begin.
    pub(super) constant: Region,
    /// The sum of its words.
    pub(super) sum: u64,
}

/// A block of 2 MiB.
#[derive(Debug)]
pub(super) struct Block {
    pub(super) region: Region,
    pub(super) groups: Vec<Group>,
    /// Whether its torn pages are torn. If not, it can stay a huge page.
    pub(super) is_torn: bool,
}

/// All of it, of one process.
#[derive(Debug)]
pub(super) struct Field {
    pub(super) blocks: Vec<Block>,
}

impl Page {
    /// The least values that a read that begins now may give.
    pub(super) fn least(&self) -> [u64; WRITTEN_WORDS] {
        self.written.each_ref().map(Written::least)
    }

    /// A read of all of it gave what is in `copy`.
    pub(super) fn ensure_copy(&self, least: [u64; WRITTEN_WORDS], copy: Region) -> Result<()> {
        for (index, (written, least)) in self.written.iter().zip(least).enumerate() {
            written
                .ensure_read(least, copy.load(index))
                .with_context(|| format!("word {index} of {:#x}", self.region.address()))?;
        }
        self.ensure_rest(copy)
    }

    /// The words that never change.
    fn ensure_rest(&self, copy: Region) -> Result<()> {
        for index in WRITTEN_WORDS..PAGE_WORDS {
            let (is, should) = (
                copy.load(index),
                oracle::word(self.seed, self.first + index),
            );
            ensure!(
                is == should,
                "word {index} of {:#x}, which never changes, is {is:#x} and should be {should:#x}",
                self.region.address()
            );
        }
        Ok(())
    }

    fn ensure_final(&self) -> Result<()> {
        for (index, written) in self.written.iter().enumerate() {
            written
                .ensure_final(self.region.load(index))
                .with_context(|| format!("word {index} of {:#x}", self.region.address()))?;
        }
        self.ensure_rest(self.region)
    }
}

impl Block {
    fn new(seed: u64, backing: Backing<'_>, is_torn: bool) -> Result<Self> {
        let region = Region::map(HUGE_PAGE_SIZE, backing)?;
        oracle::write(region, seed);
        let groups = (0..HUGE_PAGE_SIZE / PAGE_SIZE / GROUP_PAGES).map(|group| {
            let pages = |from: usize, count: usize| {
                region.part((group * GROUP_PAGES + from) * PAGE_SIZE, count * PAGE_SIZE)
            };
            let first = group * GROUP_PAGES * PAGE_WORDS;
            let page = Page {
                region: pages(0, 1),
                written: <[Written; WRITTEN_WORDS]>::default(),
                first,
                seed,
            };
            (0..WRITTEN_WORDS).for_each(|index| page.region.store(index, 0));
            let begin = 1 + TORN_PAGES;
            let words = first + begin * PAGE_WORDS..first + GROUP_PAGES * PAGE_WORDS;
            Group {
                page,
                torn: pages(1, TORN_PAGES),
                constant: pages(begin, GROUP_PAGES - begin),
                sum: oracle::sum(seed, words),
            }
        });
        Ok(Self {
            groups: groups.collect(),
            region,
            is_torn,
        })
    }
}

impl Field {
    pub(super) fn new(seed: u64) -> Result<Self> {
        let kinds = [
            (Backing::Huge, false),
            (Backing::Huge, true),
            (Backing::Small, true),
        ];
        let kinds = kinds.into_iter().zip(0u64..);
        let blocks = kinds.map(|((backing, is_torn), number)| {
            Block::new(seed.wrapping_add(number << 32), backing, is_torn)
        });
        Ok(Self {
            blocks: blocks.collect::<Result<_>>()?,
        })
    }

    /// All groups of all blocks.
    pub(super) fn groups(&self) -> Vec<&Group> {
        self.blocks.iter().flat_map(|block| &block.groups).collect()
    }

    /// When nobody writes any more: nothing was lost, nothing came from elsewhere.
    pub(super) fn ensure_final(&self) -> Result<()> {
        for group in self.groups() {
            group.page.ensure_final()?;
            let words = group.constant.words();
            let sum = (0..words).fold(0u64, |sum, index| {
                sum.wrapping_add(group.constant.load(index))
            });
            ensure!(
                sum == group.sum,
                "the CPU's sum at {:#x}, which never changes",
                group.constant.address()
            );
        }
        Ok(())
    }
}

/// Numbers of a seed.
#[derive(Debug)]
pub(super) struct Random(ChaCha8Rng);

impl Random {
    pub(super) fn new(seed: u64) -> Self {
        Self(ChaCha8Rng::seed_from_u64(seed))
    }

    /// A number below a bound.
    pub(super) fn below(&mut self, bound: usize) -> usize {
        (self.0.next_u64() % bound as u64) as usize
    }

    /// Any number.
    pub(super) fn any(&mut self) -> u64 {
        self.0.next_u64()
    }

    pub(super) fn coin(&mut self) -> bool {
        self.below(2) == 0
    }

    pub(super) fn one_of<'a, T>(&mut self, choices: &'a [T]) -> &'a T {
        &choices[self.below(choices.len())]
    }

    /// Some pages of a region: all of it, or from anywhere to anywhere.
    pub(super) fn part(&mut self, region: Region) -> Region {
        if self.below(4) == 0 {
            return region;
        }
        let pages = region.pages().count();
        let first = self.below(pages);
        let count = 1 + self.below(pages - first);
        region.part(first * PAGE_SIZE, count * PAGE_SIZE)
    }
}
