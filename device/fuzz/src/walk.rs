// SPDX-License-Identifier: MIT OR Apache-2.0
//! The page walk over tables of any contents, against a model that reads the manual's chapter 7 anew.

use crate::{machine::VRAM, number::Number};
use arbitrary::{Arbitrary, Unstructured};
use farfault_device::gpu::{mmu::walk, vram::Vram};
use farfault_protocol::{
    address::{GpuVa, HUGE_PAGE_SIZE, PAGE_SIZE, VramAddr},
    event::{Access, FaultCause},
    pte::Pte,
};
use std::{collections::BTreeMap, sync::atomic::Ordering};

#[derive(Arbitrary, Debug)]
struct Entry {
    table: u8,
    index: u16,
    value: Value,
}

#[derive(Arbitrary, Debug)]
enum Value {
    /// Points to one of the tables.
    Table(u8),
    Leaf {
        page: Number,
        flags: u8,
    },
    Any(Number),
}

#[derive(Arbitrary, Debug)]
enum Step {
    Write(Entry),
    Walk {
        /// Indices, from the root's on, and the offset in the page.
        indices: [u16; 4],
        offset: u16,
        high: bool,
        access: u8,
    },
    ClearAccessed([u16; 4]),
}

/// Tables are the first pages of VRAM; the root is the first of them.
const TABLES: u64 = 8;

/// Runs it.
pub fn run(data: &[u8]) {
    let Ok(steps) = Vec::<Step>::arbitrary_take_rest(Unstructured::new(data)) else {
        return;
    };
    let vram = Vram::new(VRAM).expect("VRAM can be had");
    let root = VramAddr::new(0);
    let mut model = Model::default();
    for step in steps {
        match step {
            Step::Write(entry) => {
                let at =
                    u64::from(entry.table) % TABLES * PAGE_SIZE + u64::from(entry.index % 512) * 8;
                model.entries.insert(at, entry.value.word());
                vram.mark_written(VramAddr::new(at), 8);
                let word = vram.word(VramAddr::new(at)).expect("a table is in VRAM");
                word.store(entry.value.word().to_le(), Ordering::Relaxed);
            }
            Step::Walk {
                indices,
                offset,
                high,
                access,
            } => {
                let va = address(indices, offset) | if high { 1 << 63 } else { 0 };
                let access = Access::ALL[usize::from(access) % Access::ALL.len()];
                let expected = model.translate(va, access);
                let found = walk::translate(&vram, root, GpuVa::new(va), access);
                let found = found.map(|leaf| (leaf.entry.get(), leaf.pte.0, leaf.level));
                assert_eq!(found, expected, "{access:?} of {va:#x}");
                let again = walk::find(&vram, root, GpuVa::new(va));
                let again = again.map(|leaf| (leaf.entry.get(), leaf.pte.0, leaf.level));
                assert_eq!(again.map_err(|miss| miss.cause), model.find(va));
            }
            Step::ClearAccessed(indices) => {
                let va = address(indices, 0);
                if let Ok(leaf) = walk::find(&vram, root, GpuVa::new(va)) {
                    let was_set = leaf.pte.has(Pte::ACCESSED);
                    assert_eq!(walk::clear_accessed(&vram, &leaf), was_set);
                    let word = model.entries.entry(leaf.entry.get()).or_default();
                    *word &= !Pte::ACCESSED;
                }
            }
        }
    }
    // The walk has changed nothing but what the model did.
    for at in (0..TABLES * PAGE_SIZE).step_by(8) {
        let word = vram.word(VramAddr::new(at)).expect("a table is in VRAM");
        let value = u64::from_le(word.load(Ordering::Relaxed));
        assert_eq!(value, model.word(at), "the entry at {at:#x}");
    }
}

fn address(indices: [u16; 4], offset: u16) -> u64 {
    let indices = indices.map(|index| u64::from(index % 512));
    let page = indices.iter().fold(0, |va, index| va << 9 | index);
    page << 12 | u64::from(offset % 4096)
}

impl Value {
    fn word(&self) -> u64 {
        match *self {
            Self::Table(table) => (u64::from(table) % TABLES * PAGE_SIZE) | Pte::VALID,
            Self::Leaf { page, flags } => page.0 & Pte::ADDRESS | u64::from(flags) | Pte::VALID,
            Self::Any(number) => number.0,
        }
    }
}

/// Where a leaf stands, what it says, and its level.
type Found = (u64, u64, u32);

/// Page tables as the manual tells of them.
#[derive(Default)]
struct Model {
    entries: BTreeMap<u64, u64>,
}

impl Model {
    /// Tables that nobody wrote to are zero, wherever in VRAM they are.
    fn word(&self, at: u64) -> u64 {
        self.entries.get(&at).copied().unwrap_or_default()
    }

    fn find(&self, va: u64) -> Result<Found, FaultCause> {
        if va >> 48 != 0 {
            return Err(FaultCause::BadAddress);
        }
        let mut table = 0;
        for level in (0..4).rev() {
            let at = table + (va >> (12 + 9 * level) & 511) * 8;
            let word = self.word(at);
            if word & Pte::VALID == 0 {
                return Err(FaultCause::NotPresent);
            }
            let target = word & Pte::ADDRESS;
            if level == 0 || (level == 1 && word & Pte::HUGE != 0) {
                let size = if level == 0 {
                    PAGE_SIZE
                } else {
                    HUGE_PAGE_SIZE
                };
                let mut allowed = Pte::ADDRESS | 0b111_0111;
                if level == 1 {
                    allowed |= Pte::HUGE;
                }
                let in_vram = word & Pte::SYSTEM == 0;
                let wrong =
                    word & !allowed != 0 || target % size != 0 || (in_vram && target + size > VRAM);
                return if wrong {
                    Err(FaultCause::BadEntry)
                } else {
                    Ok((at, word, level))
                };
            }
            if word & !(Pte::ADDRESS | Pte::VALID) != 0 || target + PAGE_SIZE > VRAM {
                return Err(FaultCause::BadEntry);
            }
            table = target;
        }
        unreachable!("level 0 ends it")
    }

    fn translate(&mut self, va: u64, access: Access) -> Result<Found, FaultCause> {
        let (at, word, level) = self.find(va)?;
        let mut marks = Pte::ACCESSED;
        if access != Access::Read {
            if word & Pte::WRITABLE == 0 {
                return Err(FaultCause::ReadOnly);
            }
            marks |= Pte::DIRTY;
        }
        if access == Access::Atomic && word & Pte::ATOMIC == 0 {
            return Err(FaultCause::NotAtomic);
        }
        self.entries.insert(at, word | marks);
        Ok((at, word | marks, level))
    }
}
