// SPDX-License-Identifier: MIT OR Apache-2.0
//! Where pages are by `/proc/self/pagemap`: the kernel's word, to hold against the driver's.
//!
//! A page in VRAM is a device-private entry there. It looks like a swapped page, and its swap type is
//! one of two that no swap file can have: the kernel counts its special types down from the last
//! (`include/linux/swap.h`: markers, three for devices, three for migration). The type is shown only
//! to those with CAP_SYS_ADMIN.

use crate::{
    gpu::PageState,
    pages::{PAGE_SIZE, Pages},
    uapi::Place,
};
use std::{fs::File, io, os::unix::fs::FileExt};

const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
const FRAME: u64 = (1 << 55) - 1;
const TYPE_BITS: u32 = 5;

const TYPE_DEVICE_WRITE: u64 = 28;
const TYPE_DEVICE_READ: u64 = 29;
const TYPE_DEVICE_EXCLUSIVE: u64 = 30;
const TYPE_MIGRATION: std::ops::RangeInclusive<u64> = 25..=27;

/// The entry of one page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry(u64);

/// Reads the entries of a range.
pub fn read(pages: Pages) -> io::Result<Vec<Entry>> {
    let mut bytes = vec![0u8; pages.count() * size_of::<u64>()];
    let offset = (pages.address() / PAGE_SIZE * size_of::<u64>()) as u64;
    File::open("/proc/self/pagemap")?.read_exact_at(&mut bytes, offset)?;
    let words = bytes.chunks_exact(size_of::<u64>());
    // Each chunk has eight bytes: the default is never used.
    let word = |bytes: &[u8]| u64::from_ne_bytes(bytes.try_into().unwrap_or_default());
    Ok(words.map(|bytes| Entry(word(bytes))).collect())
}

impl Entry {
    /// As the kernel has it (`Documentation/admin-guide/mm/pagemap.rst`).
    pub fn bits(self) -> u64 {
        self.0
    }

    /// Where the page is; nothing if the entry can't tell: it is on its way from one place to
    /// another, or this process may not see types.
    pub fn place(self) -> Option<Place> {
        if self.0 & PRESENT != 0 {
            return Some(Place::Ram);
        }
        if self.0 & SWAPPED == 0 {
            return Some(Place::None);
        }
        match self.swap_type()? {
            TYPE_DEVICE_WRITE | TYPE_DEVICE_READ => Some(Place::Vram),
            TYPE_DEVICE_EXCLUSIVE => Some(Place::Ram),
            swap_type if TYPE_MIGRATION.contains(&swap_type) => None,
            _ => Some(Place::None),
        }
    }

    /// The page's number, if it is in RAM or VRAM and this process may see it.
    pub fn frame(self) -> Option<u64> {
        let frame = match self.place()? {
            Place::None => 0,
            Place::Vram => (self.0 & FRAME) >> TYPE_BITS,
            Place::Ram if self.0 & PRESENT == 0 => (self.0 & FRAME) >> TYPE_BITS,
            Place::Ram => self.0 & FRAME,
        };
        (frame != 0).then_some(frame)
    }

    fn swap_type(self) -> Option<u64> {
        let frame = self.0 & FRAME;
        // Zero is no swap entry: it was hidden.
        (frame != 0).then_some(frame & ((1 << TYPE_BITS) - 1))
    }
}

/// What the driver's answer and the page tables of kernel and GPU disagree about, if they do. Pages
/// may move between the two readings: ask again before it counts.
pub fn disagreement(pages: Pages, states: &[PageState], entries: &[Entry]) -> Option<String> {
    if states.len() != pages.count() || entries.len() != pages.count() {
        return Some(format!(
            "{} pages, {} answers of the driver, {} entries of pagemap",
            pages.count(),
            states.len(),
            entries.len()
        ));
    }
    let addresses = pages.range().step_by(PAGE_SIZE);
    addresses
        .zip(states.iter().zip(entries))
        .find_map(|(address, (state, entry))| {
            let problem = page_disagreement(state, *entry)?;
            Some(format!("page {address:#x}: {problem}"))
        })
}

fn page_disagreement(state: &PageState, entry: Entry) -> Option<String> {
    let (cpu, gpu) = (state.cpu, state.gpu);
    match entry.place() {
        None => {
            return Some(format!(
                "pagemap cannot tell where it is ({:#x}); reading types needs CAP_SYS_ADMIN",
                entry.0
            ));
        }
        Some(place) if place != cpu.place => {
            return Some(format!(
                "the driver says {:?}, pagemap says {place:?} ({:#x})",
                cpu.place, entry.0
            ));
        }
        Some(_) => {}
    }
    if gpu.place != Place::None && gpu.place != cpu.place {
        return Some(format!(
            "the data is in {:?}, and the GPU has it mapped in {:?}",
            cpu.place, gpu.place
        ));
    }
    match (cpu.vram, gpu.vram) {
        (Some(cpu), Some(gpu)) if cpu != gpu => Some(format!(
            "the CPU's tables say VRAM {cpu:#x}, the GPU's {gpu:#x}"
        )),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{gpu::View, uapi::Advice};

    const VRAM_FRAME: u64 = 0x1_2345;

    fn device_private(swap_type: u64) -> Entry {
        Entry(SWAPPED | VRAM_FRAME << TYPE_BITS | swap_type)
    }

    fn view(place: Place, vram: Option<u64>) -> View {
        View {
            place,
            write: true,
            huge: false,
            atomic: false,
            accessed: false,
            dirty: false,
            vram,
        }
    }

    fn state(cpu: View, gpu: View) -> PageState {
        PageState {
            cpu,
            gpu,
            advice: Advice::Default,
        }
    }

    #[test]
    fn entry_of_each_kind_has_its_place() {
        assert_eq!(Entry(0).place(), Some(Place::None));
        assert_eq!(Entry(PRESENT | 5).place(), Some(Place::Ram));
        assert_eq!(device_private(TYPE_DEVICE_WRITE).place(), Some(Place::Vram));
        assert_eq!(device_private(TYPE_DEVICE_READ).place(), Some(Place::Vram));
        assert_eq!(
            device_private(TYPE_DEVICE_EXCLUSIVE).place(),
            Some(Place::Ram)
        );
        assert_eq!(device_private(26).place(), None);
        assert_eq!(device_private(0).place(), Some(Place::None));
        assert_eq!(Entry(SWAPPED).place(), None);
    }

    #[test]
    fn frame_shown_is_without_the_type() {
        assert_eq!(device_private(TYPE_DEVICE_WRITE).frame(), Some(VRAM_FRAME));
        assert_eq!(Entry(PRESENT | 0x77).frame(), Some(0x77));
        assert_eq!(Entry(PRESENT).frame(), None);
        assert_eq!(Entry(0).frame(), None);
    }

    #[test]
    fn read_of_touched_and_untouched_memory_tells_them_apart() {
        // More than malloc ever takes from memory that it had before.
        let mut memory = vec![0u64; (64 << 20) / 8];
        let pages = Pages::inside(&memory);
        pages.allow_huge(false).unwrap();
        let first = (pages.address() - memory.as_ptr().addr()) / 8;
        memory[first] = 1;
        let entries = read(pages).unwrap();
        assert_eq!(entries.len(), pages.count());
        assert_eq!(entries[0].place(), Some(Place::Ram));
        assert_eq!(entries[pages.count() - 1].place(), Some(Place::None));
    }

    #[test]
    fn disagreement_of_equal_views_is_none() {
        let vram = view(Place::Vram, Some(0x3000));
        let entry = device_private(TYPE_DEVICE_WRITE);
        assert_eq!(page_disagreement(&state(vram, vram), entry), None);
        let unmapped = view(Place::None, None);
        assert_eq!(page_disagreement(&state(vram, unmapped), entry), None);
    }

    #[test]
    fn disagreement_with_pagemap_names_both_sides() {
        let ram = view(Place::Ram, None);
        let entry = device_private(TYPE_DEVICE_WRITE);
        let text = page_disagreement(&state(ram, ram), entry).unwrap();
        assert!(
            text.contains("driver says Ram, pagemap says Vram"),
            "{text}"
        );
    }

    #[test]
    fn disagreement_between_cpu_and_gpu_is_found() {
        let (ram, vram) = (view(Place::Ram, None), view(Place::Vram, Some(0x3000)));
        let other = view(Place::Vram, Some(0x4000));
        let entry = device_private(TYPE_DEVICE_WRITE);
        assert!(page_disagreement(&state(vram, ram), entry).is_some());
        assert!(page_disagreement(&state(vram, other), entry).is_some());
    }

    #[test]
    fn disagreement_of_counts_is_found() {
        let pages = Pages::new(PAGE_SIZE..3 * PAGE_SIZE).unwrap();
        assert!(disagreement(pages, &[], &[]).is_some());
    }
}
