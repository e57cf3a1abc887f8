// SPDX-License-Identifier: MIT OR Apache-2.0
//! The system calls: `ioctl` on `/dev/farfaultN`, `fork` and `madvise`. The one file with `unsafe`,
//! with its parts for tests in `sys/`.
//!
//! Two things are unsafe about a GPU that uses this process's memory, and both are dealt with here:
//! the kernel writes through the pointers that a call passes (each call is paired with its argument
//! in one place), and a job goes on reading and writing memory after SUBMIT has returned. The latter
//! is why jobs can be started only inside [`with_jobs`], which does not return before they ended.
//!
//! It knows what the interface promises, and no policy. The lock of [`Jobs`] is
//! held across no call. When a promise is broken so that a job cannot be ended, the process is
//! aborted: nothing else keeps memory from changing under safe code.
#![allow(
    unsafe_code,
    reason = "system calls; everything above this file is safe code"
)]

#[cfg(feature = "arena")]
pub mod arena;
#[cfg(feature = "arena")]
mod compat;
#[cfg(feature = "arena")]
mod kernel_access;
#[cfg(feature = "arena")]
mod looker;
#[cfg(feature = "arena")]
pub mod numa;
#[cfg(feature = "arena")]
mod region;
#[cfg(feature = "arena")]
pub mod ring;
#[cfg(feature = "arena")]
pub mod stage;

use crate::{
    error::{self, CallName, Error},
    launch::Launch,
    pages::Pages,
    uapi::{self, Kernel},
};
use rustix::{
    io::Errno,
    ioctl::{self, NoArg, Opcode, Setter, Updater},
    process::Pid,
};
use std::{
    marker::PhantomData,
    os::fd::BorrowedFd,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

type Result<T> = std::result::Result<T, Errno>;

/// How often a job that does not end is killed before the process gives up.
const KILL_ATTEMPTS: u32 = 10;

/// A call whose argument is read and written.
///
/// # Safety
///
/// `OPCODE` is a call that takes a pointer to a `T`, and whose effects on other memory are none or
/// are allowed by the caller.
unsafe fn update<const OPCODE: Opcode, T>(gpu: BorrowedFd<'_>, argument: &mut T) -> Result<()> {
    // SAFETY: As this function demands.
    unsafe { ioctl::ioctl(gpu, Updater::<OPCODE, T>::new(argument)) }
}

/// A call whose argument is only read.
///
/// # Safety
///
/// As [`update`].
unsafe fn set<const OPCODE: Opcode, T>(gpu: BorrowedFd<'_>, argument: T) -> Result<()> {
    // SAFETY: As this function demands.
    unsafe { ioctl::ioctl(gpu, Setter::<OPCODE, T>::new(argument)) }
}

pub(crate) fn info(gpu: BorrowedFd<'_>) -> Result<uapi::Info> {
    let mut info = uapi::Info::default();
    // SAFETY: INFO fills the struct, and touches nothing else.
    unsafe { update::<{ uapi::IOC_INFO }, _>(gpu, &mut info)? };
    Ok(info)
}

pub(crate) fn stats(gpu: BorrowedFd<'_>) -> Result<uapi::Stats> {
    let mut stats = uapi::Stats::default();
    // SAFETY: STATS fills the struct, and touches nothing else.
    unsafe { update::<{ uapi::IOC_STATS }, _>(gpu, &mut stats)? };
    Ok(stats)
}

pub(crate) fn ping(gpu: BorrowedFd<'_>) -> Result<()> {
    // SAFETY: PING has no argument, and touches no memory.
    unsafe { ioctl::ioctl(gpu, NoArg::<{ uapi::IOC_PING }>::new()) }
}

pub(crate) fn migrate(gpu: BorrowedFd<'_>, request: &mut uapi::Migrate) -> Result<()> {
    // SAFETY: MIGRATE writes the struct. Elsewhere it moves pages, which keep their content.
    unsafe { update::<{ uapi::IOC_MIGRATE }, _>(gpu, request) }
}

pub(crate) fn advise(gpu: BorrowedFd<'_>, request: uapi::Advise) -> Result<()> {
    // SAFETY: ADVISE reads the struct, and decides only where pages will be.
    unsafe { set::<{ uapi::IOC_ADVISE }, _>(gpu, request) }
}

pub(crate) fn exclusive(gpu: BorrowedFd<'_>, request: uapi::Exclusive) -> Result<()> {
    // SAFETY: EXCLUSIVE reads the struct. Pages keep their content, and a CPU gets them by touch.
    unsafe { set::<{ uapi::IOC_EXCLUSIVE }, _>(gpu, request) }
}

/// Asks for the pages of a range.
pub(crate) fn query(gpu: BorrowedFd<'_>, range: Pages) -> Result<Vec<uapi::Page>> {
    let mut pages = vec![uapi::Page::default(); range.count()];
    let request = uapi::Query {
        address: range.address() as u64,
        length: range.length() as u64,
        pages: pages.as_mut_ptr().expose_provenance() as u64,
    };
    // SAFETY: QUERY reads the struct, and writes one `Page` for each page of the range to `pages`:
    // it has room for so many, and nobody else uses it. Every bit pattern is a `Page`.
    unsafe { set::<{ uapi::IOC_QUERY }, _>(gpu, request)? };
    Ok(pages)
}

/// A job that was started and not collected.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Running {
    pub(crate) fence: u64,
    pub(crate) kernel: Kernel,
}

/// The jobs of one scope.
#[derive(Debug)]
pub(crate) struct Jobs<'scope, 'env: 'scope> {
    gpu: BorrowedFd<'scope>,
    running: Mutex<Vec<Running>>,
    /// Invariant, as in [`std::thread::Scope`]: `'scope` ends where [`with_jobs`] says.
    scope: PhantomData<&'scope mut &'scope ()>,
    env: PhantomData<&'env mut &'env ()>,
}

/// Jobs that nobody waited for, and how they ended.
pub(crate) type Leftovers = Vec<(Kernel, Result<uapi::Wait>)>;

/// Runs `body`, which may start jobs, and returns when each of them has ended. If `body` panics they
/// are killed. The [`Jobs`] live in this function's frame, so nobody can forget or leak them.
pub(crate) fn with_jobs<'env, R>(
    gpu: BorrowedFd<'_>,
    body: impl for<'scope> FnOnce(&'scope Jobs<'scope, 'env>) -> R,
) -> (R, Leftovers) {
    let jobs = Jobs {
        gpu,
        running: Mutex::new(Vec::new()),
        scope: PhantomData,
        env: PhantomData,
    };
    let result = catch_unwind(AssertUnwindSafe(|| body(&jobs)));
    if result.is_err() {
        for job in jobs.running() {
            // It has ended already if there is nothing to kill; `collect` tells.
            let _ = jobs.kill(job.fence);
        }
    }
    let leftovers = jobs
        .running()
        .into_iter()
        .map(|job| (job.kernel, jobs.collect(job.fence)))
        .collect();
    match result {
        Ok(value) => (value, leftovers),
        Err(panic) => resume_unwind(panic),
    }
}

impl<'scope> Jobs<'scope, '_> {
    /// Starts a job; its fence is remembered until it is collected.
    pub(crate) fn submit<T>(
        &'scope self,
        launch: &Launch<'scope, T>,
        max_waves: u32,
    ) -> error::Result<Running> {
        let kernel = launch.kernel();
        let mut request = launch.request(max_waves)?;
        // SAFETY: SUBMIT writes the struct. The job writes what the launch borrows exclusively (or
        // what is atomic) and reads what it borrows, by the invariant of `Launch`, all for `'scope`.
        // `with_jobs` returns, and with that `'scope` ends, only when the job has ended.
        unsafe { update::<{ uapi::IOC_SUBMIT }, _>(self.gpu, &mut request) }.map_err(|errno| {
            let call = CallName::of_kernel("SUBMIT", kernel);
            Error::call(call, Some(launch.memory()), errno)
        })?;
        let fence = request.fence;
        let job = Running { fence, kernel };
        self.lock().push(job);
        Ok(job)
    }

    /// Waits for a job, at most for so long (without a limit, if none is given), and collects it.
    /// Without an answer it still runs. Where it is an error, the job can reach no memory of ours.
    pub(crate) fn wait(&self, fence: u64, timeout: Option<Duration>) -> Result<Option<uapi::Wait>> {
        // A time beyond what the clock can tell is as good as none.
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        let result = loop {
            let mut request = uapi::Wait {
                fence,
                timeout_ns: deadline.map_or(-1, nanoseconds_until),
                ..uapi::Wait::default()
            };
            // SAFETY: WAIT writes the struct, and touches nothing else.
            match unsafe { update::<{ uapi::IOC_WAIT }, _>(self.gpu, &mut request) } {
                Err(Errno::INTR) => {}
                Err(Errno::TIMEDOUT) if deadline.is_some() => return Ok(None),
                // The driver's own limit: it still runs.
                Err(Errno::TIMEDOUT) => return Err(Errno::TIMEDOUT),
                // ENODEV, EIO: the device reaches nothing any more, and the driver has ended all
                // jobs. EPERM: we are a child after fork, and the job is in the parent's memory.
                // ENOENT: it was collected.
                Err(errno) => break Err(errno),
                Ok(()) => break Ok(Some(request)),
            }
        };
        self.lock().retain(|job| job.fence != fence);
        result
    }

    /// Ends a job soon.
    pub(crate) fn kill(&self, fence: u64) -> Result<()> {
        // SAFETY: KILL reads the struct, and touches no memory.
        unsafe { set::<{ uapi::IOC_KILL }, _>(self.gpu, uapi::Kill { fence }) }
    }

    /// Waits for the end of a job, whatever it takes.
    fn collect(&self, fence: u64) -> Result<uapi::Wait> {
        for _ in 0..KILL_ATTEMPTS {
            match self.wait(fence, None) {
                Ok(Some(end)) => return Ok(end),
                Ok(None) | Err(Errno::TIMEDOUT) => {
                    // Whether that worked is what the next round finds out.
                    let _ = self.kill(fence);
                }
                Err(errno) => return Err(errno),
            }
        }
        eprintln!(
            "farfault: job {fence} was killed {KILL_ATTEMPTS} times and still uses this process's \
             memory; aborting, for nothing else is safe. See `dmesg`."
        );
        std::process::abort()
    }

    fn running(&self) -> Vec<Running> {
        self.lock().clone()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Running>> {
        // No code that can panic runs under the lock, and a half-done change is not possible.
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// From now; zero if it has passed. Never negative, which would mean "without a limit".
fn nanoseconds_until(deadline: Instant) -> i64 {
    let left = deadline.saturating_duration_since(Instant::now());
    i64::try_from(left.as_nanos()).unwrap_or(i64::MAX)
}

/// Lets the kernel use huge pages in a range, or forbids it.
pub(crate) fn allow_huge_pages(range: Pages, allow: bool) -> Result<()> {
    use rustix::mm::{Advice, madvise};
    let advice = if allow {
        Advice::LinuxHugepage
    } else {
        Advice::LinuxNoHugepage
    };
    let address = std::ptr::without_provenance_mut(range.address());
    // SAFETY: These two kinds of advice change no memory's content; a range that is not mapped is
    // an error.
    unsafe { madvise(address, range.length(), advice) }
}

/// Runs `child` in a copy of this process, which ends with the code that it returns.
///
/// Fails with `EBUSY` in a process that has more than one thread.
pub(crate) fn fork(child: impl FnOnce() -> u8) -> std::io::Result<Pid> {
    if std::fs::read_dir("/proc/self/task")?.count() != 1 {
        return Err(Errno::BUSY.into());
    }
    // SAFETY: There is one thread, this one, so no lock can be held by a thread that the child does
    // not have, and the child may do anything. It leaves by `_exit`, below.
    match unsafe { libc::fork() } {
        -1 => Err(std::io::Error::last_os_error()),
        0 => {
            // Neither a panic nor a return may reach the frames above, which are the parent's.
            let code = catch_unwind(AssertUnwindSafe(child)).unwrap_or(101);
            // SAFETY: It ends the process at once, without the parent's exit handlers.
            unsafe { libc::_exit(code.into()) }
        }
        pid => Pid::from_raw(pid).ok_or_else(|| Errno::SRCH.into()),
    }
}
