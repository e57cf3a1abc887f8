// SPDX-License-Identifier: MIT OR Apache-2.0
//! The MMU of one engine: the TLB in front of the walk (manual, chapter 7).
//!
//! It knows nothing of waves, nor of who waits for what. Owned by the GPU, under its lock.

pub mod tlb;
pub mod walk;

use super::vram::Vram;
use farfault_protocol::{
    address::{GpuVa, HUGE_PAGE_SIZE, PAGE_SIZE, SystemAddr, VramAddr},
    event::{Access, FaultCause},
    pte::Location,
};
use serde::Serialize;
use tlb::Tlb;

/// An address space, as an MMU needs to know it.
#[derive(Clone, Copy, Debug)]
pub struct Space {
    /// The context's number.
    pub context: u32,
    /// Its level-3 table.
    pub root: VramAddr,
}

/// Where an address leads, and for how many bytes from there on: to the end of the page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target {
    /// The physical address.
    pub at: Location,
    /// Bytes to the end of the page, or of what was asked for.
    pub length: u64,
}

/// Addresses that whole leaves map: those from `start` and before `end`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Span {
    pub(crate) start: u64,
    pub(crate) end: u64,
}

/// A leaf, as an access uses it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Translation {
    pub(crate) target: Target,
    /// All that the leaf maps: what an invalidation may name to be meant.
    pub(crate) span: Span,
}

/// What an MMU did so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct MmuStats {
    /// Translations found in the TLB.
    pub hits: u64,
    /// Translations that were not, or not for this access.
    pub misses: u64,
    /// Valid translations that made room for others.
    pub evictions: u64,
    /// Walks that ended in a fault.
    pub faults: u64,
}

/// The MMU of one engine.
#[derive(Debug)]
pub(crate) struct Mmu {
    tlb: Option<Tlb>,
    pub(crate) stats: MmuStats,
}

impl Mmu {
    pub(crate) fn new(with_tlb: bool) -> Self {
        Self {
            tlb: with_tlb.then(Tlb::default),
            stats: MmuStats::default(),
        }
    }

    /// Where `va` leads for this kind of access.
    pub(crate) fn translate(
        &mut self,
        vram: &Vram,
        space: Space,
        va: GpuVa,
        access: Access,
    ) -> Result<Translation, FaultCause> {
        if let Some(entry) = self
            .tlb
            .as_ref()
            .and_then(|tlb| tlb.lookup(space.context, va, access))
        {
            self.stats.hits += 1;
            return Ok(translation(entry.page, entry.huge, va));
        }
        self.stats.misses += 1;
        let leaf = walk::translate(vram, space.root, va, access)
            .inspect_err(|_| self.stats.faults += 1)?;
        if let Some(tlb) = &mut self.tlb {
            let evicted = tlb.insert(tlb::Entry::new(space.context, va, &leaf));
            self.stats.evictions += u64::from(evicted);
        }
        Ok(translation(leaf.pte.location(), leaf.is_huge(), va))
    }

    /// Where the first part of a range leads: appends to `runs`, with neighbours made one, until
    /// `length` bytes or a fault. A fault of the first page is an error; returns the bytes, and what
    /// their leaves map.
    pub(crate) fn translate_range(
        &mut self,
        vram: &Vram,
        space: Space,
        va: GpuVa,
        length: u64,
        access: Access,
        runs: &mut Vec<Target>,
    ) -> Result<(u64, Span), FaultCause> {
        let mut done = 0;
        let mut span = Span {
            start: va.get(),
            end: va.get(),
        };
        while done < length {
            // Past the last address there is nothing to translate; launches do not wrap around.
            let Some(next) = va.checked_add(done) else {
                break;
            };
            let Translation {
                mut target,
                span: Span { start, end },
            } = match self.translate(vram, space, next, access) {
                Ok(translation) => translation,
                Err(cause) if done == 0 => return Err(cause),
                Err(_) => break,
            };
            target.length = target.length.min(length - done);
            done += target.length;
            span.start = span.start.min(start);
            span.end = end;
            match runs.last_mut() {
                Some(last) if follows(last, &target) => last.length += target.length,
                _ => runs.push(target),
            }
        }
        Ok((done, span))
    }

    /// Drops the translations of a range.
    pub(crate) fn invalidate(&mut self, context: u32, start: GpuVa, length: u64) {
        if let Some(tlb) = &mut self.tlb {
            tlb.invalidate(context, start, length);
        }
    }

    /// Drops the translations of a context.
    pub(crate) fn invalidate_context(&mut self, context: u32) {
        if let Some(tlb) = &mut self.tlb {
            tlb.retain(|entry| entry.context != context);
        }
    }

    /// Drops all translations.
    pub(crate) fn reset(&mut self) {
        if let Some(tlb) = &mut self.tlb {
            *tlb = Tlb::default();
        }
    }

    /// What the TLB holds.
    pub(crate) fn entries(&self) -> impl Iterator<Item = &tlb::Entry> {
        self.tlb.iter().flat_map(Tlb::entries)
    }
}

/// The address `offset` bytes after `at`, in the same aperture.
pub(crate) fn advance(at: Location, offset: u64) -> Location {
    match at {
        Location::Vram(a) => Location::Vram(VramAddr::new(a.get().wrapping_add(offset))),
        Location::System(a) => Location::System(SystemAddr::new(a.get().wrapping_add(offset))),
    }
}

fn translation(page: Location, huge: bool, va: GpuVa) -> Translation {
    let size = if huge { HUGE_PAGE_SIZE } else { PAGE_SIZE };
    let start = va.align_down(size);
    let offset = va.get() - start.get();
    Translation {
        target: Target {
            at: advance(page, offset),
            length: size - offset,
        },
        span: Span {
            start: start.get(),
            end: start.get().saturating_add(size),
        },
    }
}

fn follows(last: &Target, next: &Target) -> bool {
    advance(last.at, last.length) == next.at
}
