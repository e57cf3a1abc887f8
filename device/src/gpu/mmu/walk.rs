// SPDX-License-Identifier: MIT OR Apache-2.0
//! The page walk (manual, chapter 7): functions over (VRAM, root, address, access), with no state
//! and no locks.
//!
//! Tables are the driver's: anything may be in them, and the driver may write to them meanwhile.
//! Each entry is therefore read once, and changed only by compare-and-exchange.

use crate::gpu::vram::Vram;
use farfault_protocol::{
    address::{GpuVa, HUGE_PAGE_SHIFT, HUGE_PAGE_SIZE, PAGE_SHIFT, PAGE_SIZE, VramAddr},
    event::{Access, FaultCause},
    pte::{self, ENTRY_SIZE, INDEX_BITS, Location, Pte, ROOT_LEVEL},
};
use std::sync::atomic::{AtomicU64, Ordering};

/// A leaf that a walk ended at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leaf {
    /// What it said, with the bits that the walk set.
    pub pte: Pte,
    /// 0 or 1.
    pub level: u32,
    /// Where it stands.
    pub entry: VramAddr,
}

impl Leaf {
    /// Whether it maps 2 MiB.
    pub fn is_huge(&self) -> bool {
        self.level != 0
    }

    /// Bytes that it maps.
    pub fn page_size(&self) -> u64 {
        if self.is_huge() {
            HUGE_PAGE_SIZE
        } else {
            PAGE_SIZE
        }
    }
}

/// A walk that found no leaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Miss {
    /// Why.
    pub cause: FaultCause,
    /// Bytes of addresses, aligned, that the same entry keeps from being mapped.
    pub span: u64,
}

impl Miss {
    /// The end of the addresses around `va` that miss for the same reason.
    pub fn end_after(&self, va: GpuVa) -> u64 {
        (va.get() & !(self.span - 1)).saturating_add(self.span)
    }
}

/// Translates an address for an access. Marks the leaf as accessed, and as dirty if it stores.
pub fn translate(
    vram: &Vram,
    root: VramAddr,
    va: GpuVa,
    access: Access,
) -> Result<Leaf, FaultCause> {
    let mut leaf = find(vram, root, va).map_err(|miss| miss.cause)?;
    let marks = match access {
        Access::Read => Pte::ACCESSED,
        Access::Write | Access::Atomic => Pte::ACCESSED | Pte::DIRTY,
    };
    loop {
        check_access(leaf.pte, access)?;
        if leaf.pte.has(marks) {
            return Ok(leaf);
        }
        let entry = word(vram, leaf.entry)?;
        let marked = Pte(leaf.pte.0 | marks);
        match replace(entry, leaf.pte, marked) {
            Ok(()) => leaf.pte = marked,
            // Somebody wrote to the entry since it was read: what counts is what it says now.
            Err(now) => leaf.pte = check_leaf(vram, now, leaf.level)?,
        }
    }
}

/// The leaf that maps an address. Changes nothing.
pub fn find(vram: &Vram, root: VramAddr, va: GpuVa) -> Result<Leaf, Miss> {
    let miss = |cause, level| Miss {
        cause,
        span: 1u64 << (PAGE_SHIFT + INDEX_BITS * level),
    };
    if !va.is_canonical() {
        return Err(miss(FaultCause::BadAddress, 0));
    }
    let mut table = root;
    let mut level = ROOT_LEVEL;
    loop {
        let entry = VramAddr::new(table.get() + pte::index(va, level) * ENTRY_SIZE);
        let word = word(vram, entry).map_err(|cause| miss(cause, level))?;
        let value = Pte(u64::from_le(word.load(Ordering::Acquire)));
        let is_leaf = level == 0 || (level == 1 && value.has(Pte::VALID | Pte::HUGE));
        if is_leaf {
            return match check_leaf(vram, value, level) {
                Ok(pte) => Ok(Leaf { pte, level, entry }),
                Err(cause) => Err(miss(cause, level)),
            };
        }
        table = check_table(vram, value).map_err(|cause| miss(cause, level))?;
        level -= 1;
    }
}

/// The leaf of one page, zero if there is none: a page of a huge leaf gets its own address.
pub fn page_entry(leaf: &Leaf, va: GpuVa) -> Pte {
    let offset = va.get() & (leaf.page_size() - 1) & !(PAGE_SIZE - 1);
    Pte(leaf.pte.0 + offset)
}

/// Clears the accessed bit of a leaf that [`find`] found. Whether it was set.
pub fn clear_accessed(vram: &Vram, leaf: &Leaf) -> bool {
    let mut seen = leaf.pte;
    while let Ok(entry) = word(vram, leaf.entry) {
        // An entry that is no leaf any more has no accessed bit.
        if check_leaf(vram, seen, leaf.level).is_err() || !seen.has(Pte::ACCESSED) {
            return false;
        }
        match replace(entry, seen, Pte(seen.0 & !Pte::ACCESSED)) {
            Ok(()) => return true,
            Err(now) => seen = now,
        }
    }
    false
}

/// What an entry of level 1 to 3 says that is no leaf: the table below.
pub fn check_table(vram: &Vram, value: Pte) -> Result<VramAddr, FaultCause> {
    if !value.has(Pte::VALID) {
        return Err(FaultCause::NotPresent);
    }
    let table = VramAddr::new(value.address());
    if value.0 & Pte::TABLE_RESERVED != 0 || !vram.contains(table, PAGE_SIZE) {
        return Err(FaultCause::BadEntry);
    }
    Ok(table)
}

/// The same value, if it is one of a leaf at this level.
pub fn check_leaf(vram: &Vram, value: Pte, level: u32) -> Result<Pte, FaultCause> {
    if !value.has(Pte::VALID) {
        return Err(FaultCause::NotPresent);
    }
    let (reserved, size_shift) = if level == 0 {
        (Pte::LEAF_RESERVED, PAGE_SHIFT)
    } else {
        (Pte::HUGE_RESERVED, HUGE_PAGE_SHIFT)
    };
    if value.0 & reserved != 0 || (level != 0 && !value.has(Pte::HUGE)) {
        return Err(FaultCause::BadEntry);
    }
    match value.location() {
        Location::Vram(page) if !vram.contains(page, 1 << size_shift) => Err(FaultCause::BadEntry),
        Location::Vram(_) | Location::System(_) => Ok(value),
    }
}

fn check_access(leaf: Pte, access: Access) -> Result<(), FaultCause> {
    match access {
        Access::Write | Access::Atomic if !leaf.has(Pte::WRITABLE) => Err(FaultCause::ReadOnly),
        Access::Atomic if !leaf.has(Pte::ATOMIC) => Err(FaultCause::NotAtomic),
        _ => Ok(()),
    }
}

/// An entry's word. Roots and tables are checked before, so that it is always there.
fn word(vram: &Vram, entry: VramAddr) -> Result<&AtomicU64, FaultCause> {
    vram.word(entry).ok_or(FaultCause::BadEntry)
}

/// Changes an entry, unless it is not what it was: then returns what it is.
fn replace(entry: &AtomicU64, old: Pte, new: Pte) -> Result<(), Pte> {
    let (old, new) = (old.0.to_le(), new.0.to_le());
    match entry.compare_exchange(old, new, Ordering::AcqRel, Ordering::Acquire) {
        Ok(_) => Ok(()),
        Err(now) => Err(Pte(u64::from_le(now))),
    }
}
