// SPDX-License-Identifier: MIT OR Apache-2.0
//! What mm can be asked to do with a mapped [`Region`]: advice, `mremap` in all its ways, locks. Part of
//! [`super::arena`], and by the same rules: such memory is known by address only, so that no reference
//! can see it change.

use super::{
    arena::{Region, take_addresses},
    stage::{Advice, done, last_error},
};
use crate::pages::{HUGE_PAGE_SIZE, PAGE_SIZE};
use rustix::{
    io,
    mm::{self, MapFlags, MremapFlags, ProtFlags, UserfaultfdFlags},
};
use std::{
    ffi::{c_int, c_void},
    os::fd::OwnedFd,
    ptr::with_exposed_provenance_mut,
};

impl Region {
    /// Gives the kernel advice about it.
    pub fn advise(self, advice: Advice) -> io::Result<()> {
        // SAFETY: The arena's memory is known by address only.
        done(unsafe { libc::madvise(self.pointer(), self.length(), advice as c_int) })
    }

    /// Likewise, about memory of another process with a region at the same addresses.
    pub fn advise_in(self, process: &OwnedFd, advice: Advice) -> io::Result<usize> {
        use std::os::fd::AsRawFd;
        let part = libc::iovec {
            iov_base: self.pointer(),
            iov_len: self.length(),
        };
        // SAFETY: It passes numbers and one array of one element; what it does to the memory of the
        // other process is as in `advise`.
        let got = unsafe {
            libc::syscall(
                libc::SYS_process_madvise,
                process.as_raw_fd(),
                &raw const part,
                1usize,
                advice as c_int,
                0u32,
            )
        };
        usize::try_from(got).map_err(|_| last_error())
    }

    /// Makes it longer or shorter where it is; behind each region is room for 2 MiB.
    pub fn resize(self, length: usize) -> io::Result<Self> {
        let flags = MremapFlags::empty();
        // SAFETY: The arena's memory is known by address only. Nobody else maps anything behind it.
        unsafe { mm::mremap(self.pointer(), self.length, length, flags) }?;
        Ok(Self { length, ..self })
    }

    /// Moves it to new addresses with another length.
    pub fn remap_resized(self, length: usize) -> io::Result<Self> {
        let address = take_addresses(length)? + self.address % HUGE_PAGE_SIZE;
        self.move_to(address, length, libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED)?;
        Ok(Self { address, length })
    }

    /// Moves its pages to new addresses; the old ones stay mapped, with nothing there.
    pub fn remap_keeping(self) -> io::Result<Self> {
        let address = take_addresses(self.length)? + self.address % HUGE_PAGE_SIZE;
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED | libc::MREMAP_DONTUNMAP;
        self.move_to(address, self.length, flags)?;
        Ok(Self { address, ..self })
    }

    /// Moves it over another region, whose memory goes.
    pub fn remap_onto(self, to: Self) -> io::Result<()> {
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        self.move_to(to.address, to.length, flags)
    }

    fn move_to(self, to: usize, length: usize, flags: c_int) -> io::Result<()> {
        let to: *mut c_void = with_exposed_provenance_mut(to);
        // SAFETY: The arena's memory is known by address only, at both places.
        let got = unsafe { libc::mremap(self.pointer(), self.length, length, flags, to) };
        if got == libc::MAP_FAILED {
            return Err(last_error());
        }
        Ok(())
    }

    /// Maps new anonymous memory that stays in RAM (`MAP_LOCKED`).
    pub fn map_locked(length: usize) -> io::Result<Self> {
        Self::map_anonymous(length, MapFlags::LOCKED)
    }

    /// Maps new anonymous memory, of which there may be more than the machine has (`MAP_NORESERVE`).
    pub fn reserve(length: usize) -> io::Result<Self> {
        Self::map_anonymous(length, MapFlags::NORESERVE)
    }

    fn map_anonymous(length: usize, flags: MapFlags) -> io::Result<Self> {
        let length = length.next_multiple_of(PAGE_SIZE);
        let address = take_addresses(length)?;
        let at = with_exposed_provenance_mut(address);
        let flags = flags | MapFlags::PRIVATE | MapFlags::FIXED_NOREPLACE;
        // SAFETY: Nothing is mapped there, or it fails.
        unsafe { mm::mmap_anonymous(at, length, ProtFlags::READ | ProtFlags::WRITE, flags) }?;
        Ok(Self { address, length })
    }

    /// Keeps its pages in RAM (`mlock`).
    pub fn lock(self) -> io::Result<()> {
        // SAFETY: It changes no content.
        unsafe { mm::mlock(self.pointer(), self.length) }
    }

    /// Lets the kernel have them again.
    pub fn unlock(self) -> io::Result<()> {
        // SAFETY: It changes no content.
        unsafe { mm::munlock(self.pointer(), self.length) }
    }

    /// Waits until what was written to it is in its file (`msync`).
    pub fn sync(self) -> io::Result<()> {
        // SAFETY: It changes no content.
        unsafe { mm::msync(self.pointer(), self.length, mm::MsyncFlags::SYNC) }
    }

    /// Maps it anew at the same addresses, in one step with taking the old mapping away.
    pub fn replace(self) -> io::Result<()> {
        let flags = MapFlags::PRIVATE | MapFlags::FIXED;
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: The arena's memory is known by address only.
        unsafe { mm::mmap_anonymous(self.pointer(), self.length, access, flags) }.map(drop)
    }
}

/// A userfaultfd, which answers faults of the kernel, too.
pub fn userfaultfd() -> io::Result<OwnedFd> {
    let flags = UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK;
    // SAFETY: It only opens a descriptor. What is asked of that concerns the arena, whose memory is
    // known by address only.
    unsafe { mm::userfaultfd(flags) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::arena::Backing;

    #[test]
    fn region_resized_and_moved_keeps_its_words() {
        let region = Region::map(2 * PAGE_SIZE, Backing::Small).unwrap();
        region.store(3, 7);
        let region = region.resize(4 * PAGE_SIZE).unwrap();
        region.store(region.words() - 1, 8);
        let region = region.remap_resized(8 * PAGE_SIZE).unwrap();
        assert_eq!((region.load(3), region.load(4 * 512 - 1)), (7, 8));
        let kept = region.remap_keeping().unwrap();
        assert_eq!((kept.load(3), region.load(3)), (7, 0));
        kept.remap_onto(region).unwrap();
        assert_eq!(region.load(3), 7);
        region.replace().unwrap();
        assert_eq!(region.load(3), 0);
    }

    #[test]
    fn advice_that_empties_memory_is_taken() {
        let region = Region::map(PAGE_SIZE, Backing::Small).unwrap();
        region.store(0, 1);
        region.advise(Advice::DontNeed).unwrap();
        assert_eq!(region.load(0), 0);
    }
}
