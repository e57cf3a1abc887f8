// SPDX-License-Identifier: MIT OR Apache-2.0
//! How the kernel reads and writes a [`Region`] for somebody: `read` and `write`, another process's
//! calls, a pipe that holds pages, a debugger. Part of [`super::arena`], and by the same rules.

use super::{
    arena::Region,
    stage::{count, done, last_error},
};
use rustix::{io, process::Pid};
use std::{
    os::fd::{AsFd, AsRawFd},
    ptr::{null_mut, with_exposed_provenance_mut},
};

impl Region {
    fn part_of_a_list(self) -> libc::iovec {
        libc::iovec {
            iov_base: self.pointer(),
            iov_len: self.length(),
        }
    }

    /// The kernel reads it and puts it into a file (`pwrite`); how many bytes.
    pub fn write_to(self, file: impl AsFd, offset: u64) -> io::Result<usize> {
        let file = file.as_fd().as_raw_fd();
        // SAFETY: It reads the arena only.
        count(unsafe { libc::pwrite(file, self.pointer(), self.length(), offset as i64) })
    }

    /// The kernel fills it from a file (`pread`); how many bytes.
    pub fn read_from(self, file: impl AsFd, offset: u64) -> io::Result<usize> {
        let file = file.as_fd().as_raw_fd();
        // SAFETY: It writes the arena only.
        count(unsafe { libc::pread(file, self.pointer(), self.length(), offset as i64) })
    }

    /// The kernel puts references on its pages into a pipe (`vmsplice`); how many bytes. They are
    /// there, and can't move, until the pipe is read.
    pub fn splice_to(self, pipe: impl AsFd) -> io::Result<usize> {
        let part = self.part_of_a_list();
        // SAFETY: It reads the arena only, now and when the pipe is read.
        count(unsafe { libc::vmsplice(pipe.as_fd().as_raw_fd(), &raw const part, 1, 0) })
    }

    /// Reads memory of a process, at the addresses of `from`, to here (`process_vm_readv`).
    pub fn read_process(self, process: Pid, from: Self) -> io::Result<usize> {
        let (to, from) = (self.part_of_a_list(), from.part_of_a_list());
        let pid = process.as_raw_nonzero().get();
        // SAFETY: It writes the arena only.
        count(unsafe { libc::process_vm_readv(pid, &raw const to, 1, &raw const from, 1, 0) })
    }

    /// Writes what is here to memory of a process, at the addresses of `to` (`process_vm_writev`).
    pub fn write_process(self, process: Pid, to: Self) -> io::Result<usize> {
        let (from, to) = (self.part_of_a_list(), to.part_of_a_list());
        let pid = process.as_raw_nonzero().get();
        // SAFETY: It writes the other process's arena, which is known by address only there, too.
        count(unsafe { libc::process_vm_writev(pid, &raw const from, 1, &raw const to, 1, 0) })
    }
}

/// A child of this process that is stopped for us to look at, until this is dropped.
#[derive(Debug)]
pub struct Traced(Pid);

impl Traced {
    /// Stops a child.
    pub fn attach(child: Pid) -> io::Result<Self> {
        Self::request(libc::PTRACE_ATTACH, child)?;
        let traced = Self(child);
        // SAFETY: It waits for a child and writes nothing.
        done(unsafe { libc::waitpid(child.as_raw_nonzero().get(), null_mut(), libc::__WALL) })?;
        Ok(traced)
    }

    fn request(request: u32, child: Pid) -> io::Result<()> {
        let pid = child.as_raw_nonzero().get();
        // SAFETY: These requests read and write no memory.
        let got = unsafe { libc::ptrace(request as _, pid, 0usize, 0usize) };
        if got == -1 {
            return Err(last_error());
        }
        Ok(())
    }

    /// Reads a word of its region (`PTRACE_PEEKDATA`).
    pub fn peek(&self, region: Region, index: usize) -> io::Result<u64> {
        let mut word = 0u64;
        let at: *mut u64 = with_exposed_provenance_mut(region.address() as usize + index * 8);
        // SAFETY: The system call, unlike the C library's function, writes the word to where the last
        // argument points.
        let got = unsafe {
            libc::syscall(
                libc::SYS_ptrace,
                libc::PTRACE_PEEKDATA,
                self.0.as_raw_nonzero().get(),
                at,
                &raw mut word,
            )
        };
        if got == -1 {
            return Err(last_error());
        }
        Ok(word)
    }

    /// Writes a word of its region (`PTRACE_POKEDATA`).
    pub fn poke(&self, region: Region, index: usize, word: u64) -> io::Result<()> {
        let at: *mut u64 = with_exposed_provenance_mut(region.address() as usize + index * 8);
        // SAFETY: It writes the other process's arena, which is known by address only there, too.
        let got = unsafe {
            libc::syscall(
                libc::SYS_ptrace,
                libc::PTRACE_POKEDATA,
                self.0.as_raw_nonzero().get(),
                at,
                word,
            )
        };
        if got == -1 {
            return Err(last_error());
        }
        Ok(())
    }
}

/// A signal that a traced process is about to get.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Signaled {
    /// Its number.
    pub signal: i32,
    /// `si_code`.
    pub code: i32,
    /// `si_addr`, where the signal is one of memory.
    pub address: u64,
}

impl Traced {
    /// Lets it go on until the next signal, before which it stops again. `ECHILD`: it has ended instead.
    pub fn until_signal(&self) -> io::Result<Signaled> {
        let pid = self.0.as_raw_nonzero().get();
        Self::request(libc::PTRACE_CONT, self.0)?;
        let mut status = 0;
        // SAFETY: It waits for a child and writes its status.
        done(unsafe { libc::waitpid(pid, &raw mut status, libc::__WALL) })?;
        if !libc::WIFSTOPPED(status) {
            return Err(io::Errno::CHILD);
        }
        // SAFETY: All zeros is a `siginfo_t`.
        let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
        let (request, info_at) = (libc::PTRACE_GETSIGINFO, &raw mut info);
        // SAFETY: It writes a `siginfo_t` to where the last argument points.
        done(unsafe { libc::ptrace(request as _, pid, 0usize, info_at) } as _)?;
        Ok(Signaled {
            signal: info.si_signo,
            code: info.si_code,
            // SAFETY: It is a word of the union that every signal has, used or not.
            address: unsafe { info.si_addr() } as u64,
        })
    }
}

impl Drop for Traced {
    fn drop(&mut self) {
        // A child that has gone needs nobody to let it go on.
        let _ = Self::request(libc::PTRACE_DETACH, self.0);
    }
}
