// SPDX-License-Identifier: MIT OR Apache-2.0
//! Memory at addresses of one's own, and calls to the driver with any argument: for tests of the
//! driver, with the feature `arena`. Not for programs: nothing here keeps a job from memory that it
//! should not touch.
//!
//! Tests take mappings apart while a GPU uses them, and pass wrong addresses on purpose. No Rust
//! reference could stay valid through that, so there are none: all such memory lies in one range of
//! addresses, the arena, that nobody else uses (the kernel gives out addresses from the top of the
//! address space, the arena is at its bottom), and it is read and written one atomic word at a time.
//!
//! What a wrong call may do is what a test wants to know. A driver that accepts one can damage this
//! process only: it then ends as a failed test.

use crate::{
    pages::{HUGE_PAGE_SIZE, PAGE_SIZE, Pages},
    uapi,
};
use rustix::{
    io::{self, Errno},
    ioctl::{Ioctl, IoctlOutput, Opcode, ioctl},
    mm::{self, MapFlags, MprotectFlags, MremapFlags, ProtFlags},
};
use std::{
    ffi::c_void,
    fs::File,
    os::fd::{AsFd, BorrowedFd},
    ptr::with_exposed_provenance_mut,
    sync::atomic::{AtomicU64, AtomicUsize, Ordering},
};

pub use super::{
    compat::call_at_of_32_bits,
    kernel_access::{Signaled, Traced},
    looker::{Looked, fork_that_looks},
    region::userfaultfd,
};

const ARENA: std::ops::Range<usize> = 0x10_0000_0000..0x80_0000_0000;
/// Regions begin at a multiple of this, and at least so much is free behind each: the kernel can't
/// merge them, and each can hold huge pages.
const STEP: usize = HUGE_PAGE_SIZE;

/// Where the next region goes.
static NEXT: AtomicUsize = AtomicUsize::new(ARENA.start);

/// What a new region is made of.
#[derive(Clone, Copy, Debug)]
pub enum Backing<'a> {
    /// Anonymous and private, in small pages.
    Small,
    /// Anonymous and private, in huge pages where the kernel has them.
    Huge,
    /// Anonymous and shared.
    Shared,
    /// Anonymous and private, of the pool of huge pages.
    HugeTlb,
    /// A file, shared.
    File(&'a File),
    /// A file, private.
    FilePrivate(&'a File),
}

/// What the CPU may do with pages.
#[derive(Clone, Copy, Debug)]
pub enum Protection {
    /// Nothing.
    None,
    /// Loads.
    Read,
    /// Loads and stores.
    ReadWrite,
}

/// A range of whole pages in the arena: an address and a length, whatever is mapped there.
#[derive(Clone, Copy, Debug)]
pub struct Region {
    pub(super) address: usize,
    pub(super) length: usize,
}

pub(super) fn take_addresses(length: usize) -> io::Result<usize> {
    let step = length.next_multiple_of(STEP) + STEP;
    let address = NEXT.fetch_add(step, Ordering::Relaxed);
    if step > ARENA.end - ARENA.start || address > ARENA.end - step {
        return Err(Errno::NOMEM);
    }
    Ok(address)
}

impl Region {
    /// Maps new memory of this length, readable and writable.
    pub fn map(length: usize, backing: Backing<'_>) -> io::Result<Self> {
        let length = length.next_multiple_of(PAGE_SIZE);
        let address = take_addresses(length)?;
        let at = with_exposed_provenance_mut(address);
        let fixed = MapFlags::FIXED_NOREPLACE;
        let access = ProtFlags::READ | ProtFlags::WRITE;
        let anonymous = |flags| {
            // SAFETY: Nothing is mapped there, or it fails.
            unsafe { mm::mmap_anonymous(at, length, access, flags | fixed) }
        };
        let of_file = |file: &File, flags| {
            // SAFETY: As above. The file's content is only used by atomic words.
            unsafe { mm::mmap(at, length, access, flags | fixed, file, 0) }
        };
        let got = match backing {
            Backing::Small | Backing::Huge => anonymous(MapFlags::PRIVATE),
            Backing::Shared => anonymous(MapFlags::SHARED),
            Backing::HugeTlb => anonymous(MapFlags::PRIVATE | MapFlags::HUGETLB),
            Backing::File(file) => of_file(file, MapFlags::SHARED),
            Backing::FilePrivate(file) => of_file(file, MapFlags::PRIVATE),
        }?;
        if got.addr() != address {
            return Err(Errno::EXIST);
        }
        let region = Self { address, length };
        if let Backing::Small | Backing::Huge = backing {
            let huge = matches!(backing, Backing::Huge);
            let advised = region.pages().allow_huge(huge);
            advised.map_err(|_| Errno::INVAL)?;
        }
        Ok(region)
    }

    /// Addresses of the arena where nothing is mapped.
    pub fn nowhere(length: usize) -> io::Result<Self> {
        let length = length.next_multiple_of(PAGE_SIZE);
        let address = take_addresses(length)?;
        Ok(Self { address, length })
    }

    /// Some of its pages.
    ///
    /// # Panics
    ///
    /// They are not pages of it: the test is wrong.
    pub fn part(self, offset: usize, length: usize) -> Self {
        assert!(offset % PAGE_SIZE == 0 && length % PAGE_SIZE == 0);
        assert!(offset <= self.length && length <= self.length - offset);
        Self {
            address: self.address + offset,
            length,
        }
    }

    /// Where it begins.
    pub fn address(self) -> u64 {
        self.address as u64
    }

    /// Bytes.
    pub fn length(self) -> usize {
        self.length
    }

    /// 64-bit words.
    pub fn words(self) -> usize {
        self.length / size_of::<u64>()
    }

    /// Its pages.
    pub fn pages(self) -> Pages {
        Pages::new(self.address..self.address + self.length).expect("regions are whole pages")
    }

    fn word<T>(self, index: usize, access: impl FnOnce(&AtomicU64) -> T) -> T {
        assert!(index < self.words(), "word {index} of {}", self.words());
        let address = self.address + index * size_of::<u64>();
        // SAFETY: It is aligned, and in the arena, where everybody uses atomic words only; the
        // reference lives for one access. If nothing is mapped there, the access ends the process
        // with SIGSEGV, as a wrong test should.
        access(unsafe { AtomicU64::from_ptr(with_exposed_provenance_mut(address)) })
    }

    /// Reads a word.
    pub fn load(self, index: usize) -> u64 {
        self.word(index, |word| word.load(Ordering::Relaxed))
    }

    /// Writes a word.
    pub fn store(self, index: usize, value: u64) {
        self.word(index, |word| word.store(value, Ordering::Relaxed));
    }

    /// Adds to a word atomically.
    pub fn atomic_add(self, index: usize, addend: u64) {
        self.word(index, |word| word.fetch_add(addend, Ordering::Relaxed));
    }

    pub(super) fn pointer(self) -> *mut c_void {
        with_exposed_provenance_mut(self.address)
    }

    /// Unmaps it.
    pub fn unmap(self) -> io::Result<()> {
        // SAFETY: The arena's memory is known by address only.
        unsafe { mm::munmap(self.pointer(), self.length) }
    }

    /// Maps new anonymous memory where it was unmapped.
    pub fn map_again(self) -> io::Result<()> {
        let access = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::PRIVATE | MapFlags::FIXED_NOREPLACE;
        // SAFETY: Nothing is mapped there, or it fails.
        unsafe { mm::mmap_anonymous(self.pointer(), self.length, access, flags) }.map(drop)
    }

    /// Changes what the CPU may do.
    pub fn protect(self, protection: Protection) -> io::Result<()> {
        let flags = match protection {
            Protection::None => MprotectFlags::empty(),
            Protection::Read => MprotectFlags::READ,
            Protection::ReadWrite => MprotectFlags::READ | MprotectFlags::WRITE,
        };
        // SAFETY: As in `unmap`.
        unsafe { mm::mprotect(self.pointer(), self.length, flags) }
    }

    /// Throws its content away (`MADV_DONTNEED`).
    pub fn discard(self) -> io::Result<()> {
        // SAFETY: As in `unmap`.
        unsafe { mm::madvise(self.pointer(), self.length, mm::Advice::LinuxDontNeed) }
    }

    /// Moves the mapping to new addresses.
    pub fn remap(self) -> io::Result<Self> {
        let address = take_addresses(self.length)?;
        // Where huge pages stay whole: at the same place in 2 MiB.
        let address = address + self.address % STEP;
        let to = with_exposed_provenance_mut(address);
        let (from, length, flags) = (self.pointer(), self.length, MremapFlags::MAYMOVE);
        // SAFETY: As in `unmap`; nothing else has ever been at the new addresses.
        unsafe { mm::mremap_fixed(from, length, length, flags, to) }?;
        Ok(Self { address, length })
    }
}

/// An argument, and the call that takes it.
pub trait Call: Copy {
    /// The call's number.
    const NUMBER: u32;
}

macro_rules! calls {
    ($($argument:ident = $number:ident,)*) => {
        $(impl Call for uapi::$argument {
            const NUMBER: u32 = uapi::$number;
        })*
        $(const _: () = assert!((uapi::$number >> 16) as usize & 0x3fff == size_of::<uapi::$argument>());)*
    };
}

calls! {
    Info = IOC_INFO,
    Submit = IOC_SUBMIT,
    Wait = IOC_WAIT,
    Kill = IOC_KILL,
    Migrate = IOC_MIGRATE,
    Advise = IOC_ADVISE,
    Query = IOC_QUERY,
    Stats = IOC_STATS,
    Exclusive = IOC_EXCLUSIVE,
}

/// A call whose number and argument are known at run time only.
struct Raw {
    number: Opcode,
    argument: *mut c_void,
}

// SAFETY: It passes on what it was made of, and gives nothing back.
unsafe impl Ioctl for Raw {
    type Output = ();
    const IS_MUTATING: bool = true;

    fn opcode(&self) -> Opcode {
        self.number
    }

    fn as_ptr(&mut self) -> *mut c_void {
        self.argument
    }

    unsafe fn output_from_ptr(_: IoctlOutput, _: *mut c_void) -> io::Result<()> {
        Ok(())
    }
}

/// A call with an argument of its type. Addresses in it are the arena's, or wrong.
pub fn call<T: Call>(gpu: BorrowedFd<'_>, argument: &mut T) -> io::Result<()> {
    let argument = (&raw mut *argument).cast();
    let number = T::NUMBER;
    // SAFETY: The number names the type of the argument; what the call does to other memory, it does
    // to the arena, as the top of this file explains.
    unsafe { ioctl(gpu, Raw { number, argument }) }
}

/// A call with any number, whose argument is said to be at an address: of the arena, or a wrong one.
pub fn call_at(gpu: impl AsFd, number: u32, address: u64) -> io::Result<()> {
    let argument = with_exposed_provenance_mut(address as usize);
    // SAFETY: As in `call`; the argument itself is in the arena, too, or no memory of ours.
    unsafe { ioctl(gpu.as_fd(), Raw { number, argument }) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn regions_written_hold_their_words_and_never_overlap() {
        let file = tempfile().unwrap();
        let backings = [
            Backing::Small,
            Backing::Huge,
            Backing::Shared,
            Backing::File(&file),
            Backing::FilePrivate(&file),
        ];
        let regions = backings.map(|backing| Region::map(3 * PAGE_SIZE, backing).unwrap());
        for (index, region) in regions.iter().enumerate() {
            region.store(1, index as u64);
            region.atomic_add(1, 10);
        }
        for (index, region) in regions.iter().enumerate() {
            let shows_the_file = matches!(backings[index], Backing::File(_));
            assert!(shows_the_file || region.load(1) == index as u64 + 10);
            assert_eq!(region.address() % STEP as u64, 0);
        }
    }

    #[test]
    fn region_moved_keeps_its_words_and_leaves_a_hole() {
        let region = Region::map(4 * PAGE_SIZE, Backing::Small).unwrap();
        let part = region.part(PAGE_SIZE, PAGE_SIZE);
        part.store(0, 7);
        let moved = part.remap().unwrap();
        assert_eq!(moved.load(0), 7);
        part.map_again().unwrap();
        assert_eq!(part.load(0), 0);
    }

    #[test]
    fn region_discarded_is_zero_and_unmapped_can_be_mapped_again() {
        let region = Region::map(PAGE_SIZE, Backing::Small).unwrap();
        region.store(3, 1);
        region.discard().unwrap();
        assert_eq!(region.load(3), 0);
        assert_eq!(region.map_again(), Err(Errno::EXIST));
        region.unmap().unwrap();
        region.map_again().unwrap();
        region.protect(Protection::Read).unwrap();
        assert_eq!(region.load(3), 0);
    }

    #[test]
    fn call_of_another_device_is_enotty() {
        let null = File::open("/dev/null").unwrap();
        assert_eq!(call_at(&null, uapi::IOC_PING, 0), Err(Errno::NOTTY));
    }

    fn tempfile() -> io::Result<File> {
        let file = rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::CLOEXEC)?;
        rustix::fs::ftruncate(&file, 3 * PAGE_SIZE as u64)?;
        Ok(file.into())
    }
}
