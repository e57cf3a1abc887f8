// SPDX-License-Identifier: MIT OR Apache-2.0
//! Calls to the driver as a 32-bit program makes them, and memory that such a program could have. Part of
//! [`super::arena`], and by the same rules.

use super::{arena::Region, stage::last_error};
use crate::pages::PAGE_SIZE;
use rustix::io::{self, Errno};
use std::{
    arch::asm,
    os::fd::{AsFd, AsRawFd},
    ptr::null_mut,
};

/// `ioctl`, as a 32-bit program names it.
const IOCTL: i32 = 54;

impl Region {
    /// Maps new memory below 4 GiB, where nobody else has any.
    pub fn map_low(length: usize) -> io::Result<Self> {
        let length = length.next_multiple_of(PAGE_SIZE);
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_32BIT;
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: The kernel chooses addresses where nothing is.
        let got = unsafe { libc::mmap(null_mut(), length, access, flags, -1, 0) };
        if got == libc::MAP_FAILED {
            return Err(last_error());
        }
        let address = got.expose_provenance();
        Ok(Self { address, length })
    }
}

/// As [`super::arena::call_at`], by the entry of 32-bit programs (`int 0x80`). A kernel without that sends
/// SIGSEGV.
pub fn call_at_of_32_bits(gpu: impl AsFd, number: u32, address: u64) -> io::Result<()> {
    let address = u32::try_from(address).map_err(|_| Errno::INVAL)?;
    let descriptor = gpu.as_fd().as_raw_fd();
    let result: i32;
    // SAFETY: The kernel takes the numbers in EAX, EBX, ECX and EDX, and changes EAX and at most R8 to R11; RBX,
    // which the compiler keeps to itself, is put back. What the call does to memory, it does to the arena, or to
    // what `Region::map_low` gave, which is known by address only.
    unsafe {
        asm!(
            "xchg rbx, {descriptor:r}",
            "int 0x80",
            "xchg rbx, {descriptor:r}",
            descriptor = inout(reg) i64::from(descriptor) => _,
            inlateout("eax") IOCTL => result,
            in("ecx") number,
            in("edx") address,
            out("r8") _,
            out("r9") _,
            out("r10") _,
            out("r11") _,
        );
    }
    if result < 0 {
        return Err(Errno::from_raw_os_error(-result));
    }
    Ok(())
}
