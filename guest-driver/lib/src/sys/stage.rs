// SPDX-License-Identifier: MIT OR Apache-2.0
//! Memory at addresses that the caller chooses, and what the system's calls do to it: for programs
//! that replay a script, with the feature `arena`. Not for other programs.
//!
//! All of it lies in one range of addresses, the stage, that nobody else uses: the kernel gives out
//! addresses from the top of the address space, and [`super::arena`] has a range of its own. Nothing
//! but this file reads or writes there, one atomic word at a time or by the kernel, so no reference
//! can see a change. What is mapped there is the script's business: a load or store where nothing is
//! mapped ends the process; the calls that take data in and out say `EFAULT` instead.

use rustix::io::{self, Errno};
use std::{
    ffi::{c_int, c_void},
    os::fd::{AsRawFd, BorrowedFd},
    ptr::with_exposed_provenance_mut,
    sync::atomic::{AtomicU64, Ordering},
};

/// The addresses of the stage.
pub const STAGE: std::ops::Range<u64> = 0x100_0000_0000..0x180_0000_0000;

/// What the CPU may do with pages, for [`map`] and [`protect`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Protection {
    /// Loads.
    pub read: bool,
    /// Stores.
    pub write: bool,
}

/// What new memory is made of.
#[derive(Clone, Copy, Debug)]
pub enum Backing<'a> {
    /// Anonymous and private.
    Anonymous,
    /// Anonymous and private, and it grows downwards, as a stack.
    Stack,
    /// Anonymous and shared.
    Shared,
    /// Anonymous and private, of the pool of huge pages.
    HugeTlb,
    /// A file or a device from its begin, shared.
    File(BorrowedFd<'a>),
    /// A file from its begin, private.
    FilePrivate(BorrowedFd<'a>),
}

/// Advice of `madvise`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
#[expect(missing_docs, reason = "they are named as in madvise(2)")]
pub enum Advice {
    DontNeed = libc::MADV_DONTNEED,
    WillNeed = libc::MADV_WILLNEED,
    Free = libc::MADV_FREE,
    Cold = libc::MADV_COLD,
    PageOut = libc::MADV_PAGEOUT,
    Remove = libc::MADV_REMOVE,
    DontFork = libc::MADV_DONTFORK,
    DoFork = libc::MADV_DOFORK,
    WipeOnFork = libc::MADV_WIPEONFORK,
    KeepOnFork = libc::MADV_KEEPONFORK,
    HugePage = libc::MADV_HUGEPAGE,
    NoHugePage = libc::MADV_NOHUGEPAGE,
    Mergeable = libc::MADV_MERGEABLE,
    Unmergeable = libc::MADV_UNMERGEABLE,
    PopulateRead = libc::MADV_POPULATE_READ,
    PopulateWrite = libc::MADV_POPULATE_WRITE,
    Collapse = libc::MADV_COLLAPSE,
    HwPoison = libc::MADV_HWPOISON,
}

/// The pointer to a range of the stage, which is all that the calls below may change.
fn stage(address: u64, length: u64) -> io::Result<*mut c_void> {
    let end = address.checked_add(length).ok_or(Errno::INVAL)?;
    if address < STAGE.start || end > STAGE.end {
        return Err(Errno::INVAL);
    }
    Ok(with_exposed_provenance_mut(address as usize))
}

pub(super) fn last_error() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)
}

pub(super) fn done(result: c_int) -> io::Result<()> {
    if result == -1 {
        return Err(last_error());
    }
    Ok(())
}

pub(super) fn count(result: isize) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| last_error())
}

impl Protection {
    fn flags(self) -> c_int {
        let flag = |set, flag| if set { flag } else { 0 };
        flag(self.read, libc::PROT_READ) | flag(self.write, libc::PROT_WRITE)
    }
}

/// Maps new memory where nothing is.
pub fn map(
    address: u64,
    length: u64,
    protection: Protection,
    backing: Backing<'_>,
) -> io::Result<()> {
    let at = stage(address, length)?;
    let (flags, file) = match backing {
        Backing::Anonymous => (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, None),
        Backing::Stack => (
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_GROWSDOWN,
            None,
        ),
        Backing::Shared => (libc::MAP_SHARED | libc::MAP_ANONYMOUS, None),
        Backing::HugeTlb => (
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB,
            None,
        ),
        Backing::File(file) => (libc::MAP_SHARED, Some(file)),
        Backing::FilePrivate(file) => (libc::MAP_PRIVATE, Some(file)),
    };
    let flags = flags | libc::MAP_FIXED_NOREPLACE;
    let descriptor = file.map_or(-1, |file| file.as_raw_fd());
    // SAFETY: Nothing is mapped there, or it fails.
    let got = unsafe {
        libc::mmap(
            at,
            length as usize,
            protection.flags(),
            flags,
            descriptor,
            0,
        )
    };
    if got == libc::MAP_FAILED {
        return Err(last_error());
    }
    Ok(())
}

/// Unmaps.
pub fn unmap(address: u64, length: u64) -> io::Result<()> {
    let at = stage(address, length)?;
    // SAFETY: The stage's memory is known by address only.
    done(unsafe { libc::munmap(at, length as usize) })
}

/// Changes what the CPU may do.
pub fn protect(address: u64, length: u64, protection: Protection) -> io::Result<()> {
    let at = stage(address, length)?;
    // SAFETY: As in `unmap`.
    done(unsafe { libc::mprotect(at, length as usize, protection.flags()) })
}

/// Moves a mapping to other addresses, over what may be there; `keep` leaves an empty mapping behind.
pub fn remap(from: u64, length: u64, to: u64, keep: bool) -> io::Result<()> {
    let (at, to) = (stage(from, length)?, stage(to, length)?);
    let length = length as usize;
    let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
    let flags = flags | if keep { libc::MREMAP_DONTUNMAP } else { 0 };
    // SAFETY: As in `unmap`, at both places.
    let got = unsafe { libc::mremap(at, length, length, flags, to) };
    if got == libc::MAP_FAILED {
        return Err(last_error());
    }
    Ok(())
}

/// Gives the kernel advice.
pub fn advise(address: u64, length: u64, advice: Advice) -> io::Result<()> {
    let at = stage(address, length)?;
    // SAFETY: As in `unmap`.
    done(unsafe { libc::madvise(at, length as usize, advice as c_int) })
}

/// Keeps pages in RAM.
pub fn lock(address: u64, length: u64) -> io::Result<()> {
    let at = stage(address, length)?;
    // SAFETY: It changes no content.
    done(unsafe { libc::mlock(at, length as usize) })
}

/// Lets the kernel have them again.
pub fn unlock(address: u64, length: u64) -> io::Result<()> {
    let at = stage(address, length)?;
    // SAFETY: It changes no content.
    done(unsafe { libc::munlock(at, length as usize) })
}

fn word<T>(address: u64, access: impl FnOnce(&AtomicU64) -> T) -> T {
    let at = stage(address, size_of::<u64>() as u64).expect("the address is on the stage");
    assert!(address % 8 == 0, "{address:#x} is no address of a word");
    // SAFETY: It is aligned, and on the stage, where everybody uses atomic words only; the reference
    // lives for one access. Where nothing is mapped, the access ends the process with a signal.
    access(unsafe { AtomicU64::from_ptr(at.cast()) })
}

/// Reads a word.
pub fn load(address: u64) -> u64 {
    word(address, |word| word.load(Ordering::Relaxed))
}

/// Writes a word.
pub fn store(address: u64, value: u64) {
    word(address, |word| word.store(value, Ordering::Relaxed));
}

/// The kernel reads memory and puts it into a file (`write`); how many bytes.
pub fn copy_to_file(file: BorrowedFd<'_>, address: u64, length: u64) -> io::Result<usize> {
    let at = stage(address, length)?;
    // SAFETY: It reads the stage only.
    count(unsafe { libc::write(file.as_raw_fd(), at, length as usize) })
}

/// The kernel writes memory with what is in a file (`read`); how many bytes.
pub fn copy_from_file(file: BorrowedFd<'_>, address: u64, length: u64) -> io::Result<usize> {
    let at = stage(address, length)?;
    // SAFETY: It writes the stage only.
    count(unsafe { libc::read(file.as_raw_fd(), at, length as usize) })
}

/// The kernel takes references on pages and puts these into a pipe (`vmsplice`); how many bytes. The
/// pages can't be moved as long as they are there.
pub fn pin_in_pipe(pipe: BorrowedFd<'_>, address: u64, length: u64) -> io::Result<usize> {
    let at = stage(address, length)?;
    let part = libc::iovec {
        iov_base: at,
        iov_len: length as usize,
    };
    // SAFETY: It reads the stage only, now and when the pipe is read.
    count(unsafe { libc::vmsplice(pipe.as_raw_fd(), &raw const part, 1, 0) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    const RW: Protection = Protection {
        read: true,
        write: true,
    };
    const PAGE: u64 = 4096;

    #[test]
    fn memory_mapped_moved_and_unmapped_is_where_it_should_be() {
        let at = STAGE.start;
        map(at, 2 * PAGE, RW, Backing::Anonymous).unwrap();
        assert_eq!(map(at, PAGE, RW, Backing::Shared), Err(Errno::EXIST));
        store(at + PAGE, 7);
        remap(at + PAGE, PAGE, at + 16 * PAGE, false).unwrap();
        assert_eq!(load(at + 16 * PAGE), 7);
        unmap(at, 2 * PAGE).unwrap();
        unmap(at + 16 * PAGE, PAGE).unwrap();
    }

    #[test]
    fn addresses_outside_of_the_stage_are_refused() {
        assert_eq!(unmap(STAGE.start - PAGE, PAGE), Err(Errno::INVAL));
        assert_eq!(unmap(STAGE.end, PAGE), Err(Errno::INVAL));
        assert_eq!(unmap(u64::MAX - PAGE + 1, PAGE), Err(Errno::INVAL));
    }

    #[test]
    fn copies_by_the_kernel_say_where_nothing_is_mapped() {
        let at = STAGE.start + 0x100_0000;
        map(at, PAGE, RW, Backing::Anonymous).unwrap();
        let file = rustix::fs::memfd_create("stage", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        store(at, 5);
        assert_eq!(copy_to_file(file.as_fd(), at, 8), Ok(8));
        rustix::fs::seek(&file, rustix::fs::SeekFrom::Start(0)).unwrap();
        assert_eq!(copy_from_file(file.as_fd(), at + 8, 8), Ok(8));
        assert_eq!(load(at + 8), 5);
        let copied = copy_to_file(file.as_fd(), at + PAGE, 8);
        assert_eq!(copied, Err(Errno::FAULT));
        unmap(at, PAGE).unwrap();
    }
}
