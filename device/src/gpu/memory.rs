// SPDX-License-Identifier: MIT OR Apache-2.0
//! Physical memory as engines see it: VRAM and the guest's RAM behind one set of operations
//! (manual, chapter 1).
//!
//! It knows nothing of virtual addresses. The guest and other workers use the same memory at the
//! same time: bulk operations promise nothing about who wins, word operations are atomic.

use super::{
    mmu::{Target, advance},
    vram::Vram,
};
use farfault_protocol::{address::SystemAddr, pte::Location};
use std::sync::atomic::{AtomicU64, Ordering};
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, VolatileMemory, VolatileSlice,
};

/// Bytes that a bulk operation holds in its hands at a time; a multiple of 8.
const BUFFER: usize = 4096;

static ZEROES: [u8; BUFFER] = [0; BUFFER];

/// Both memories, for as long as one operation takes.
#[derive(Clone, Copy)]
pub(crate) struct Memory<'a> {
    pub(crate) vram: &'a Vram,
    pub(crate) ram: &'a GuestMemoryMmap,
    pub(crate) bus_master: BusMaster<'a>,
}

/// Whether RAM may be accessed (manual, section 10.4).
#[derive(Clone, Copy)]
pub(crate) enum BusMaster<'a> {
    Always,
    /// While this word is not zero. It can become so at any time.
    While(VolatileSlice<'a>),
    /// The word is where no RAM is.
    Never,
}

impl<'a> BusMaster<'a> {
    /// What a word of RAM says, if there is one to say it.
    pub(crate) fn new(word: Option<SystemAddr>, ram: &'a GuestMemoryMmap) -> Self {
        let Some(word) = word else {
            return Self::Always;
        };
        match ram.get_slice(GuestAddress(word.get()), size_of::<u32>()) {
            Ok(word) => Self::While(word),
            Err(_) => Self::Never,
        }
    }

    fn is_enabled(self) -> bool {
        match self {
            Self::Always => true,
            Self::While(word) => word
                .load::<u32>(0, Ordering::Acquire)
                .is_ok_and(|word| word != 0),
            Self::Never => false,
        }
    }
}

/// Why there is nothing to access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lack {
    /// No memory is there.
    Absent,
    /// It is there, and has lost its contents.
    Poisoned,
}

/// An address that cannot be accessed: so many bytes into the operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct NoMemory {
    pub(crate) offset: u64,
    pub(crate) lack: Lack,
}

impl NoMemory {
    /// The same place, where the operand begins so many bytes earlier.
    fn behind(self, bytes: u64) -> Self {
        Self {
            offset: self.offset + bytes,
            ..self
        }
    }
}

/// Which end of a copy is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CopyError {
    Source(NoMemory),
    Destination(NoMemory),
}

/// Goes through runs piece by piece, each contiguous in the host.
struct Cursor<'a> {
    memory: Memory<'a>,
    /// From the current one on.
    runs: &'a [Target],
    /// Bytes of the current run that lie behind.
    done: u64,
    /// Bytes of all runs that do.
    offset: u64,
    store: bool,
}

impl<'a> Cursor<'a> {
    fn new(memory: Memory<'a>, runs: &'a [Target], store: bool) -> Self {
        Self {
            memory,
            runs,
            done: 0,
            offset: 0,
            store,
        }
    }

    /// What comes next, as far as it is contiguous; `None` at the end.
    fn peek(&mut self) -> Result<Option<VolatileSlice<'a>>, NoMemory> {
        while let Some((run, behind)) = self.runs.split_first() {
            let mut rest = run.length - self.done;
            if rest > 0 {
                let at = advance(run.at, self.done);
                if let (Location::System(_), BusMaster::While(_)) = (at, self.memory.bus_master) {
                    // It is to be asked again soon.
                    rest = rest.min(BUFFER as u64);
                }
                let nothing = |lack| NoMemory {
                    offset: self.offset,
                    lack,
                };
                let slice = self.memory.first_slice(at, rest, self.store);
                return slice.map_err(nothing).map(Some);
            }
            self.runs = behind;
            self.done = 0;
        }
        Ok(None)
    }

    /// Steps over some of what [`Self::peek`] showed.
    fn consume(&mut self, bytes: u64) {
        self.offset += bytes;
        self.done += bytes;
    }
}

impl<'a> Memory<'a> {
    /// Whether memory is at all of the addresses.
    pub(crate) fn contains(self, at: Location, length: u64) -> bool {
        match at {
            Location::Vram(at) => self.vram.contains(at, length),
            Location::System(at) => usize::try_from(length)
                .is_ok_and(|length| self.ram.check_range(GuestAddress(at.get()), length)),
        }
    }

    /// Copies to all of `to`. What `from` has beyond that is not looked at: it may be no memory.
    pub(crate) fn copy(self, to: &'a [Target], from: &'a [Target]) -> Result<(), CopyError> {
        let mut from = Cursor::new(self, from, false);
        let mut to = Cursor::new(self, to, true);
        while let Some(destination) = to.peek().transpose() {
            let Some(source) = from.peek().map_err(CopyError::Source)? else {
                break;
            };
            let destination = destination.map_err(CopyError::Destination)?;
            let bytes = source.len().min(destination.len()) as u64;
            source.copy_to_volatile_slice(destination);
            from.consume(bytes);
            to.consume(bytes);
        }
        Ok(())
    }

    /// Copies one run. Lists of thousands of these are common: what is between them and the bytes
    /// stays in registers, as a value that goes through memory waits there for the bytes before it.
    pub(crate) fn copy_run(
        self,
        to: Location,
        from: Location,
        length: u64,
    ) -> Result<(), NoMemory> {
        let mut offset = 0;
        while offset < length {
            let rest = length - offset;
            let nothing = |lack| NoMemory { offset, lack };
            let source = self.first_slice(advance(from, offset), rest, false);
            let source = source.map_err(nothing)?;
            let destination = self.first_slice(advance(to, offset), rest, true);
            let destination = destination.map_err(nothing)?;
            source.copy_to_volatile_slice(destination);
            offset += source.len().min(destination.len()) as u64;
        }
        Ok(())
    }

    /// Repeats a word over runs.
    pub(crate) fn fill(self, to: &'a [Target], pattern: u64) -> Result<(), NoMemory> {
        if pattern == 0 {
            return self.zero(to);
        }
        let mut buffer = [0; BUFFER];
        for word in buffer.chunks_exact_mut(8) {
            word.copy_from_slice(&pattern.to_le_bytes());
        }
        let mut done = 0;
        for run in to {
            self.store(*run, &buffer).map_err(|at| at.behind(done))?;
            done += run.length;
        }
        Ok(())
    }

    /// Zeroes runs. Nothing is stored where VRAM was never used.
    fn zero(self, to: &'a [Target]) -> Result<(), NoMemory> {
        let mut done = 0;
        for run in to {
            match run.at {
                Location::Vram(at) => {
                    for (part, length) in self.vram.written_parts(at, run.length) {
                        let offset = part.get() - at.get();
                        let at = Location::Vram(part);
                        self.store(Target { at, length }, &ZEROES)
                            .map_err(|at| at.behind(done + offset))?;
                    }
                }
                Location::System(_) => {
                    self.store(*run, &ZEROES).map_err(|at| at.behind(done))?;
                }
            }
            done += run.length;
        }
        Ok(())
    }

    /// The wrapping sum of the words of runs.
    pub(crate) fn sum(self, from: &'a [Target]) -> Result<u64, NoMemory> {
        let mut sum = 0u64;
        self.each_buffer(from, false, |piece, buffer| {
            piece.copy_to(buffer);
            for word in buffer.chunks_exact(8) {
                sum = sum.wrapping_add(word_of(word));
            }
        })?;
        Ok(sum)
    }

    /// Adds to each word of runs, wrapping.
    pub(crate) fn add(self, to: &'a [Target], addend: u64) -> Result<(), NoMemory> {
        self.each_buffer(to, true, |piece, buffer| {
            piece.copy_to(buffer);
            for word in buffer.chunks_exact_mut(8) {
                let sum = word_of(word).wrapping_add(addend);
                word.copy_from_slice(&sum.to_le_bytes());
            }
            piece.copy_from(buffer);
        })
    }

    /// Adds to one word `times` times, atomically each. What it was before the last time.
    pub(crate) fn atomic_add(self, at: Location, addend: u64, times: u64) -> Result<u64, NoMemory> {
        self.with_word(at, true, |word| {
            let mut before = 0;
            for _ in 0..times {
                before = add_little_endian(word, addend);
            }
            before
        })
    }

    /// Replaces one word if it is `expected`, atomically. What it was before.
    pub(crate) fn compare_and_swap(
        self,
        at: Location,
        expected: u64,
        desired: u64,
    ) -> Result<u64, NoMemory> {
        self.with_word(at, true, |word| {
            let (expected, desired) = (expected.to_le(), desired.to_le());
            let result =
                word.compare_exchange(expected, desired, Ordering::SeqCst, Ordering::SeqCst);
            u64::from_le(result.unwrap_or_else(|now| now))
        })
    }

    /// Reads one word.
    pub(crate) fn load(self, at: Location) -> Result<u64, NoMemory> {
        self.with_word(at, false, |word| u64::from_le(word.load(Ordering::Acquire)))
    }

    fn with_word<T>(
        self,
        at: Location,
        store: bool,
        operate: impl FnOnce(&AtomicU64) -> T,
    ) -> Result<T, NoMemory> {
        let nothing = |lack| NoMemory { offset: 0, lack };
        let slice = self.first_slice(at, 8, store).map_err(nothing)?;
        match slice.get_atomic_ref(0) {
            Ok(word) => Ok(operate(word)),
            Err(_) => Err(nothing(Lack::Absent)),
        }
    }

    /// Calls `operate` with each piece of runs and as many bytes of a buffer.
    fn each_buffer(
        self,
        runs: &'a [Target],
        store: bool,
        mut operate: impl FnMut(&VolatileSlice<'a>, &mut [u8]),
    ) -> Result<(), NoMemory> {
        let mut buffer = [0; BUFFER];
        let mut cursor = Cursor::new(self, runs, store);
        while let Some(slice) = cursor.peek()? {
            let bytes = slice.len().min(BUFFER);
            if let (Ok(piece), Some(buffer)) = (slice.subslice(0, bytes), buffer.get_mut(..bytes)) {
                operate(&piece, buffer);
            }
            cursor.consume(bytes as u64);
        }
        Ok(())
    }

    /// Stores the buffer over and over.
    fn store(self, to: Target, buffer: &[u8; BUFFER]) -> Result<(), NoMemory> {
        let run = [to];
        let memory: Memory<'_> = self;
        let mut cursor = Cursor::new(memory, &run, true);
        // Where pieces of RAM meet, the pattern goes on at the word where it stopped: regions
        // begin and end at pages.
        while let Some(slice) = cursor.peek()? {
            let bytes = slice.len().min(BUFFER);
            if let (Ok(piece), Some(buffer)) = (slice.subslice(0, bytes), buffer.get(..bytes)) {
                piece.copy_from(buffer);
            }
            cursor.consume(bytes as u64);
        }
        Ok(())
    }

    /// The longest part of `[at, at + length)`, from its start, that is contiguous in the host.
    fn first_slice(
        self,
        at: Location,
        length: u64,
        store: bool,
    ) -> Result<VolatileSlice<'a>, Lack> {
        let slice = match at {
            Location::Vram(at) => {
                let sound = self.vram.sound_bytes(at, length);
                if sound == 0 && length != 0 {
                    return Err(Lack::Poisoned);
                }
                if store {
                    self.vram.slice_mut(at, sound)
                } else {
                    self.vram.slice(at, sound)
                }
            }
            Location::System(_) if !self.bus_master.is_enabled() => None,
            Location::System(at) => usize::try_from(length).ok().and_then(|length| {
                let mut slices = self.ram.get_slices(GuestAddress(at.get()), length);
                slices.next()?.ok()
            }),
        };
        slice.ok_or(Lack::Absent)
    }
}

fn word_of(bytes: &[u8]) -> u64 {
    bytes.try_into().map_or(0, u64::from_le_bytes)
}

/// An atomic addition to a word that is little-endian whatever the host is.
fn add_little_endian(word: &AtomicU64, addend: u64) -> u64 {
    if cfg!(target_endian = "little") {
        return word.fetch_add(addend, Ordering::SeqCst);
    }
    let mut before = word.load(Ordering::SeqCst);
    loop {
        let after = u64::from_le(before).wrapping_add(addend).to_le();
        match word.compare_exchange_weak(before, after, Ordering::SeqCst, Ordering::SeqCst) {
            Ok(_) => return u64::from_le(before),
            Err(now) => before = now,
        }
    }
}
