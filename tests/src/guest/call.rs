// SPDX-License-Identifier: MIT OR Apache-2.0
//! The calls of the UAPI as they are, for tests of their errors and for jobs on memory of the arena.
//! Where it is not about that, tests use the library's `Gpu`.

use anyhow::{Context, Result, ensure};
use farfault::{
    Access, Kernel,
    arena::{self, Call, Region},
    uapi::{self, JobStatus},
};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
};
use std::{fs::File, io, os::fd::AsFd, time::Duration};

/// No job of a test takes longer, on a slow kernel and a busy host either, except those that are meant to.
pub(crate) const JOB_TIME: Duration = Duration::from_secs(240);

/// The first GPU.
pub(crate) const NODE: &str = "/dev/farfault0";

/// A descriptor without a call; the library's has made one.
pub(crate) fn open_raw(node: &str) -> io::Result<File> {
    File::options().read(true).write(true).open(node)
}

/// Makes a call, and gives back its argument as the driver left it.
pub(crate) fn call<T: Call>(gpu: impl AsFd, mut argument: T) -> Result<T, Errno> {
    arena::call(gpu.as_fd(), &mut argument)?;
    Ok(argument)
}

/// A job: kernel, waves, arguments.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Job {
    pub(crate) kernel: Kernel,
    pub(crate) waves: u32,
    pub(crate) arguments: [u64; 4],
}

impl Job {
    pub(crate) const fn new(kernel: Kernel, arguments: [u64; 4]) -> Self {
        Self {
            kernel,
            waves: 1,
            arguments,
        }
    }

    pub(crate) fn sum(region: Region) -> Self {
        let arguments = [region.address(), region.length() as u64, 0, 0];
        Self::new(Kernel::Sum, arguments)
    }

    pub(crate) fn add(region: Region, addend: u64) -> Self {
        let arguments = [region.address(), region.length() as u64, addend, 0];
        Self::new(Kernel::Add, arguments)
    }

    pub(crate) fn fill(region: Region, pattern: u64) -> Self {
        let arguments = [region.address(), region.length() as u64, pattern, 0];
        Self::new(Kernel::Fill, arguments)
    }

    pub(crate) fn atomic_add(word: u64, addend: u64, repeat: u64) -> Self {
        Self::new(Kernel::AtomicAdd, [word, addend, repeat, 0])
    }

    /// It goes round and round through the pages of a region, whose first words become the links.
    pub(crate) fn endless(region: Region) -> Self {
        let pages = region.pages().count();
        let words_per_page = region.words() / pages;
        for page in 0..pages {
            let next = region.part((page + 1) % pages * farfault::PAGE_SIZE, 0);
            region.store(page * words_per_page, next.address());
        }
        Self::new(Kernel::PointerChase, [region.address(), u64::MAX, 0, 0])
    }

    pub(crate) fn waves(self, waves: u32) -> Self {
        Self { waves, ..self }
    }

    /// Starts it; its fence.
    pub(crate) fn submit(self, gpu: impl AsFd) -> Result<u64, Errno> {
        let submit = uapi::Submit {
            kernel: self.kernel.raw(),
            waves: self.waves,
            arguments: self.arguments,
            fence: 0,
        };
        call(gpu, submit).map(|submit| submit.fence)
    }

    /// Runs it to its end, whatever that is.
    pub(crate) fn end(self, gpu: impl AsFd) -> Result<uapi::Wait> {
        let gpu = gpu.as_fd();
        let fence = self
            .submit(gpu)
            .with_context(|| format!("SUBMIT of {self:x?}"))?;
        wait(gpu, fence, JOB_TIME).with_context(|| format!("WAIT for {self:x?}"))
    }

    /// Runs it to its good end; its result.
    pub(crate) fn run(self, gpu: impl AsFd) -> Result<u64> {
        let end = self.end(gpu)?;
        ensure_status(&end, JobStatus::Ok).with_context(|| format!("{self:x?}"))?;
        Ok(end.result)
    }

    /// Runs it to its end, which is to be a fault at this page.
    pub(crate) fn fails_at(self, gpu: impl AsFd, page: u64, access: Access) -> Result<()> {
        let end = self.end(gpu)?;
        ensure_status(&end, JobStatus::Fault).with_context(|| format!("{self:x?}"))?;
        ensure!(
            end.fault_address == page && end.access == access.raw(),
            "{self:x?} failed at {:#x} with access {}, and should at {page:#x} with {access:?}",
            end.fault_address,
            end.access
        );
        Ok(())
    }
}

/// Waits for a job and collects it.
pub(crate) fn wait(gpu: impl AsFd, fence: u64, timeout: Duration) -> Result<uapi::Wait, Errno> {
    let wait = uapi::Wait {
        fence,
        timeout_ns: i64::try_from(timeout.as_nanos()).unwrap_or(i64::MAX),
        ..uapi::Wait::default()
    };
    call(gpu, wait)
}

/// Likewise, for as long as it takes.
pub(crate) fn wait_for_ever(gpu: impl AsFd, fence: u64) -> Result<uapi::Wait, Errno> {
    let wait = uapi::Wait {
        fence,
        timeout_ns: -1,
        ..uapi::Wait::default()
    };
    call(gpu, wait)
}

/// Events of the descriptor within a time.
pub(crate) fn events(gpu: impl AsFd, within: Duration) -> Result<PollFlags> {
    let mut descriptors = [PollFd::new(&gpu, PollFlags::IN)];
    let within = Timespec::try_from(within)?;
    poll(&mut descriptors, Some(&within))?;
    Ok(descriptors[0].revents())
}

/// Ends a job.
pub(crate) fn kill(gpu: impl AsFd, fence: u64) -> Result<(), Errno> {
    call(gpu, uapi::Kill { fence }).map(drop)
}

pub(crate) fn ensure_status(end: &uapi::Wait, status: JobStatus) -> Result<()> {
    ensure!(
        end.status == status.raw(),
        "the job ended with {:?}, and should with {status:?}: {end:x?}",
        JobStatus::from_raw(end.status)
    );
    Ok(())
}

/// Every call, with arguments that are right for a region of memory of one page at least, and its
/// result. They are in this order so that WAIT has a job to wait for.
pub(crate) fn every_call(gpu: impl AsFd, region: Region) -> Vec<(&'static str, Result<(), Errno>)> {
    let gpu = gpu.as_fd();
    let (address, length) = (region.address(), region.length() as u64);
    let query = uapi::Query {
        address,
        length: farfault::PAGE_SIZE as u64,
        pages: address,
    };
    let migrate = uapi::Migrate {
        address,
        length,
        destination: farfault::Place::Vram.raw(),
        ..uapi::Migrate::default()
    };
    let advise = uapi::Advise {
        address,
        length,
        ..uapi::Advise::default()
    };
    let exclusive = uapi::Exclusive { address, length };
    let submitted = Job::sum(region).submit(gpu);
    let fence = submitted.unwrap_or(1);
    vec![
        ("SUBMIT", submitted.map(drop)),
        ("WAIT", wait(gpu, fence, JOB_TIME).map(drop)),
        ("KILL", kill(gpu, fence)),
        ("INFO", call(gpu, uapi::Info::default()).map(drop)),
        ("STATS", call(gpu, uapi::Stats::default()).map(drop)),
        ("MIGRATE", call(gpu, migrate).map(drop)),
        ("ADVISE", call(gpu, advise).map(drop)),
        ("QUERY", call(gpu, query).map(drop)),
        ("EXCLUSIVE", call(gpu, exclusive).map(drop)),
        ("PING", arena::call_at(gpu, uapi::IOC_PING, 0)),
    ]
}

/// Every call fails with this error.
pub(crate) fn ensure_every_call_fails(gpu: impl AsFd, region: Region, errno: Errno) -> Result<()> {
    for (name, result) in every_call(gpu, region) {
        ensure!(
            result == Err(errno),
            "{name} gave {result:?}, and should fail with {errno:?}"
        );
    }
    Ok(())
}
