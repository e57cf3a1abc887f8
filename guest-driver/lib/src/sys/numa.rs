// SPDX-License-Identifier: MIT OR Apache-2.0
//! NUMA: on which nodes a [`Region`]'s pages are to be, and moving them there. Part of [`super::arena`],
//! and by the same rules.

use super::{arena::Region, stage::count};
use crate::pages::PAGE_SIZE;
use rustix::io;
use std::ffi::c_void;

/// Bits of a mask of nodes, as these calls count them.
const MASK_BITS: usize = u64::BITS as usize;
/// Of `linux/mempolicy.h`; the `libc` crate lacks it.
const MPOL_MF_MOVE: libc::c_int = 1 << 1;

fn call(result: i64) -> io::Result<usize> {
    count(isize::try_from(result).unwrap_or(-1))
}

impl Region {
    /// Its pages are to be on one node from now on; those that are elsewhere move (`mbind`).
    pub fn bind_to_node(self, node: u32) -> io::Result<()> {
        let mask = 1u64 << node;
        // SAFETY: It reads the mask. Pages that move keep their content.
        let got = unsafe {
            libc::syscall(
                libc::SYS_mbind,
                self.pointer(),
                self.length(),
                libc::MPOL_BIND,
                &raw const mask,
                MASK_BITS + 1,
                MPOL_MF_MOVE,
            )
        };
        call(got).map(drop)
    }

    /// Moves its pages to one node, once; for each page, where it is then or a negative error
    /// (`move_pages`).
    pub fn move_to_node(self, node: i32) -> io::Result<Vec<i32>> {
        let pages = self.pages().count();
        let addresses: Vec<*mut c_void> = (0..pages)
            .map(|page| self.part(page * PAGE_SIZE, PAGE_SIZE).pointer())
            .collect();
        let nodes = vec![node; pages];
        let mut status = vec![0i32; pages];
        // SAFETY: It reads two arrays and writes one, all of so many elements. Pages that move keep
        // their content.
        let got = unsafe {
            libc::syscall(
                libc::SYS_move_pages,
                0,
                pages,
                addresses.as_ptr(),
                nodes.as_ptr(),
                status.as_mut_ptr(),
                MPOL_MF_MOVE,
            )
        };
        call(got)?;
        Ok(status)
    }
}

/// Moves all pages of this process from one node to another (`migrate_pages`); how many could not.
pub fn move_all_pages(from: u32, to: u32) -> io::Result<usize> {
    let (from, to) = (1u64 << from, 1u64 << to);
    // SAFETY: It reads two masks. Pages that move keep their content.
    let got = unsafe {
        libc::syscall(
            libc::SYS_migrate_pages,
            0,
            MASK_BITS + 1,
            &raw const from,
            &raw const to,
        )
    };
    call(got)
}
