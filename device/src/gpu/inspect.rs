// SPDX-License-Identifier: MIT OR Apache-2.0
//! A look inside the GPU that changes nothing in it, for people who write drivers.
//!
//! Numbers are as they are in the protocol; addresses are plain numbers, to be shown.

use super::{Gpu, mmu::walk};
use farfault_protocol::{
    address::{HUGE_PAGE_SHIFT, HUGE_PAGE_SIZE, PAGE_SHIFT, VramAddr},
    event::{Access, Engine, FaultCause},
    pte::{ENTRIES, ENTRY_SIZE, INDEX_BITS, Location, Pte, ROOT_LEVEL},
};
use serde::Serialize;
use std::sync::atomic::Ordering;

/// Most tables that one look at page tables visits: a table may point to itself.
const MAX_TABLES: u32 = 16 << 10;
/// Most runs that it returns.
const MAX_RUNS: usize = 64 << 10;

/// Where memory is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Aperture {
    /// In VRAM.
    Vram,
    /// In the guest's RAM.
    System,
}

/// A context.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Context {
    /// Its number.
    pub context: u32,
    /// Its level-3 table in VRAM.
    pub root: u64,
    /// Jobs that have not ended.
    pub jobs: usize,
    /// Jobs that have, and whose event found no buffer yet.
    pub waiting_fences: usize,
    /// Waves that wait for a replay.
    pub parked_waves: usize,
    /// Of these, the ones whose fault found no buffer.
    pub unreported_waves: usize,
}

/// Neighbouring pages with the same bits that lead to neighbouring memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Mapping {
    /// First virtual address.
    pub start: u64,
    /// Bytes.
    pub length: u64,
    /// Where the memory is.
    pub aperture: Aperture,
    /// Its first address there.
    pub address: u64,
    /// Whether stores are allowed.
    pub writable: bool,
    /// Whether atomics are.
    pub atomic: bool,
    /// Whether an engine used it.
    pub accessed: bool,
    /// Whether an engine stored through it.
    pub dirty: bool,
    /// Whether it is mapped in pages of 2 MiB.
    pub huge: bool,
}

/// The page tables of a context.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct PageTables {
    /// What they map, by address.
    pub mappings: Vec<Mapping>,
    /// Tables visited.
    pub tables: u32,
    /// Entries that are valid but wrong.
    pub bad_entries: u64,
    /// There is more than this: the tables are too many.
    pub truncated: bool,
}

/// A translation in a TLB.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct TlbEntry {
    /// Whose TLB.
    pub engine: &'static str,
    /// Whose translation.
    pub context: u32,
    /// First virtual address of the page.
    pub start: u64,
    /// Bytes of the page.
    pub length: u64,
    /// Where the page is.
    pub aperture: Aperture,
    /// Its address there.
    pub address: u64,
    /// Whether stores may use it.
    pub writable: bool,
    /// Whether atomics may.
    pub atomic: bool,
    /// Whether the leaf is marked as dirty.
    pub dirty: bool,
}

/// VRAM that is in use, in blocks of 2 MiB.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Vram {
    /// Bytes in all.
    pub size: u64,
    /// Bytes of blocks written to since the last reset.
    pub written: u64,
    /// These blocks, as (first byte, bytes).
    pub runs: Vec<(u64, u64)>,
    /// Pages that have lost their contents.
    pub poisoned: Vec<Poisoned>,
}

/// A page that has lost its contents.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Poisoned {
    /// Its address in VRAM.
    pub page: u64,
}

/// A job that has not ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Job {
    /// Its context.
    pub context: u32,
    /// The driver's name for it.
    pub fence: u64,
    /// Its kernel.
    pub kernel: String,
    /// Who runs it.
    pub engine: &'static str,
    /// Waves that it began with.
    pub waves: u32,
    /// Those that have not ended.
    pub live_waves: u32,
    /// Those that can go on.
    pub ready_waves: usize,
    /// Those with an access in flight.
    pub in_flight: u32,
    /// Whether it has failed and only waits for accesses in flight.
    pub failing: bool,
}

/// A fault that was reported and neither replayed nor cancelled.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Fault {
    /// Its sequence number.
    pub sequence: u64,
    /// Its context.
    pub context: u32,
    /// The page.
    pub page: u64,
    /// What was wanted.
    pub access: &'static str,
    /// Why it was not to be had.
    pub cause: &'static str,
    /// Who wanted it.
    pub engine: &'static str,
    /// The job that faulted first.
    pub fence: u64,
    /// Waves that wait for it.
    pub waves: usize,
}

/// Everything that waits somewhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Queues {
    /// Requests of the control queue that are not answered.
    pub control: usize,
    /// Copy lists that are not done.
    pub copies: usize,
    /// Work handed out.
    pub work_in_flight: usize,
    /// Buffers posted that no event has taken.
    pub event_buffers: u32,
    /// Ends of jobs that wait for a buffer.
    pub waiting_fences: usize,
}

impl Gpu {
    /// The contexts, by number.
    pub fn contexts(&self) -> Vec<Context> {
        let jobs = |number| {
            let of_context = |job: &&super::Job| job.context == number;
            self.jobs.values().filter(of_context).count()
        };
        let contexts = self.contexts.iter().map(|context| {
            let jobs = jobs(context.space.context);
            Context {
                context: context.space.context,
                root: context.space.root.get(),
                jobs,
                waiting_fences: context.fences.len().saturating_sub(jobs),
                parked_waves: context.faults.parked(),
                unreported_waves: context.faults.unreported(),
            }
        });
        contexts.collect()
    }

    /// What a context's page tables map; `None` if there is no such context.
    pub fn page_tables(&self, context: u32) -> Option<PageTables> {
        let root = self.contexts.get(context)?.space.root;
        let mut tables = PageTables::default();
        self.visit_table(&mut tables, root, ROOT_LEVEL, 0);
        Some(tables)
    }

    fn visit_table(&self, found: &mut PageTables, table: VramAddr, level: u32, base: u64) {
        if found.tables >= MAX_TABLES {
            found.truncated = true;
            return;
        }
        found.tables += 1;
        for index in 0..ENTRIES {
            let va = base + (index << (PAGE_SHIFT + INDEX_BITS * level));
            let entry = VramAddr::new(table.get() + index * ENTRY_SIZE);
            let Some(word) = self.vram.word(entry) else {
                return;
            };
            let value = Pte(u64::from_le(word.load(Ordering::Acquire)));
            if !value.has(Pte::VALID) {
                continue;
            }
            if level == 0 || (level == 1 && value.has(Pte::HUGE)) {
                match walk::check_leaf(&self.vram, value, level) {
                    Ok(leaf) => found.add(va, leaf, level),
                    Err(_) => found.bad_entries += 1,
                }
            } else {
                match walk::check_table(&self.vram, value) {
                    Ok(below) => self.visit_table(found, below, level - 1, va),
                    Err(_) => found.bad_entries += 1,
                }
            }
            if found.truncated {
                return;
            }
        }
    }

    /// What the TLBs hold.
    pub fn tlb(&self) -> Vec<TlbEntry> {
        let entries = self.engines.iter().flat_map(|engine| {
            engine.mmu.entries().map(|entry| {
                let (aperture, address) = place(entry.page);
                TlbEntry {
                    engine: engine_name(engine.name()),
                    context: entry.context,
                    start: entry.start().get(),
                    length: 1
                        << if entry.huge {
                            HUGE_PAGE_SHIFT
                        } else {
                            PAGE_SHIFT
                        },
                    aperture,
                    address,
                    writable: entry.writable,
                    atomic: entry.atomic,
                    dirty: entry.dirty,
                }
            })
        });
        entries.collect()
    }

    /// Which parts of VRAM are in use.
    pub fn vram(&self) -> Vram {
        let mut runs: Vec<(u64, u64)> = Vec::new();
        for block in self.vram.written_blocks() {
            let start = block * HUGE_PAGE_SIZE;
            match runs.last_mut() {
                Some((first, length)) if *first + *length == start => *length += HUGE_PAGE_SIZE,
                _ => runs.push((start, HUGE_PAGE_SIZE)),
            }
        }
        Vram {
            size: self.vram.size(),
            written: runs.iter().map(|(_, length)| length).sum(),
            runs,
            poisoned: self
                .vram
                .poisoned_pages()
                .iter()
                .map(|page| Poisoned { page: page.get() })
                .collect(),
        }
    }

    /// The jobs that have not ended, in the order of their launch.
    pub fn jobs(&self) -> Vec<Job> {
        let jobs = self.jobs.values().map(|job| Job {
            context: job.context,
            fence: job.fence,
            kernel: format!("{:?}", job.kernel),
            engine: engine_name(job.engine),
            waves: job.wave_count(),
            live_waves: job.live,
            ready_waves: job.ready.len(),
            in_flight: job.in_flight,
            failing: job.failure.is_some(),
        });
        jobs.collect()
    }

    /// The faults that wait for the driver.
    pub fn faults(&self) -> Vec<Fault> {
        let faults = self.contexts.iter().flat_map(|context| {
            context.faults.records().map(|(sequence, record)| Fault {
                sequence,
                context: context.space.context,
                page: record.page.get(),
                access: access_name(record.access),
                cause: cause_name(record.cause),
                engine: engine_name(record.engine),
                fence: record.fence,
                waves: record.waiters.len(),
            })
        });
        faults.collect()
    }

    /// What waits where.
    pub fn queues(&self) -> Queues {
        Queues {
            control: self.control.len(),
            copies: self.copies.len(),
            work_in_flight: self.flights.len(),
            event_buffers: self.events.free_buffers(),
            waiting_fences: self.events.waiting_fences(),
        }
    }
}

impl PageTables {
    fn add(&mut self, start: u64, leaf: Pte, level: u32) {
        let (aperture, address) = place(leaf.location());
        let new = Mapping {
            start,
            length: 1
                << if level == 0 {
                    PAGE_SHIFT
                } else {
                    HUGE_PAGE_SHIFT
                },
            aperture,
            address,
            writable: leaf.has(Pte::WRITABLE),
            atomic: leaf.has(Pte::ATOMIC),
            accessed: leaf.has(Pte::ACCESSED),
            dirty: leaf.has(Pte::DIRTY),
            huge: level != 0,
        };
        let full = self.mappings.len() >= MAX_RUNS;
        match self.mappings.last_mut() {
            Some(last) if last.goes_on_in(&new) => last.length += new.length,
            _ if full => self.truncated = true,
            _ => self.mappings.push(new),
        }
    }
}

impl Mapping {
    fn goes_on_in(&self, next: &Self) -> bool {
        let moved = Self {
            start: self.start + self.length,
            address: self.address + self.length,
            length: next.length,
            ..self.clone()
        };
        moved == *next
    }
}

fn place(at: Location) -> (Aperture, u64) {
    match at {
        Location::Vram(a) => (Aperture::Vram, a.get()),
        Location::System(a) => (Aperture::System, a.get()),
    }
}

fn engine_name(engine: Engine) -> &'static str {
    match engine {
        Engine::Compute => "compute",
        Engine::Copy => "copy",
    }
}

fn access_name(access: Access) -> &'static str {
    match access {
        Access::Read => "read",
        Access::Write => "write",
        Access::Atomic => "atomic",
    }
}

fn cause_name(cause: FaultCause) -> &'static str {
    match cause {
        FaultCause::NotPresent => "not_present",
        FaultCause::ReadOnly => "read_only",
        FaultCause::NotAtomic => "not_atomic",
        FaultCause::BadEntry => "bad_entry",
        FaultCause::BadAddress => "bad_address",
    }
}
