// SPDX-License-Identifier: GPL-2.0
//! `/dev/farfaultN`: what user space may ask (`include/uapi/farfault.h`).
//!
//! Every field is checked here, before anything is done. The rest is the address space's business.

use crate::{
    gpu::Gpu,
    kapi::{
        chardev::{FileOps, Kind, POLLERR, POLLHUP, POLLIN},
        mm::{is_current_mm, TASK_SIZE},
        signal::fatal_signal_pending,
    },
    svm::{jobs::MAX_JOBS, query, Space, REGION_BYTES},
    uapi,
    vram::BLOCK_PAGES,
};
use core::ops::Range;
use farfault_protocol::submit::Kernel;
use kernel::{
    mm::Mm,
    page::PAGE_SIZE,
    prelude::*,
    sync::{poll::PollCondVar, Arc},
    time::{msecs_to_jiffies, Instant, Jiffies, Monotonic},
    uaccess::{UserPtr, UserSlice},
};
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// The nodes.
pub(crate) static KIND: Kind = Kind::new("farfault", 64);

/// An open file.
pub(crate) struct OpenFile {
    gpu: Arc<Gpu>,
    space: Arc<Space>,
}

impl FileOps for OpenFile {
    type Shared = Gpu;

    fn check(gpu: &Gpu) -> Result {
        gpu.usable()
    }

    fn may_call(opener: &Mm) -> Result {
        if !is_current_mm(opener) {
            return Err(EPERM);
        }
        Ok(())
    }

    fn open(gpu: &Arc<Gpu>, opener: &Mm, ready: &Arc<PollCondVar>) -> Result<Self> {
        Ok(Self {
            gpu: gpu.clone(),
            space: Space::open(gpu, opener, ready)?,
        })
    }

    fn ioctl(&self, cmd: u32, arg: usize) -> Result<isize> {
        if self.space.is_closed() {
            return Err(ENODEV);
        }
        match cmd {
            uapi::IOC_INFO => write_to_user(arg, &self.info()),
            uapi::IOC_SUBMIT => self.submit(arg),
            uapi::IOC_WAIT => self.wait(arg),
            uapi::IOC_KILL => self.space.kill(read_from_user::<uapi::Kill>(arg)?.fence),
            uapi::IOC_MIGRATE => self.migrate(arg),
            uapi::IOC_ADVISE => self.advise(arg),
            uapi::IOC_QUERY => self.query(arg),
            uapi::IOC_STATS => write_to_user(arg, &self.space.counters.read()),
            uapi::IOC_EXCLUSIVE => self.exclusive(arg),
            uapi::IOC_PING => self.gpu.usable().and_then(|()| self.gpu.ping()),
            _ => return Err(ENOTTY),
        }?;
        Ok(0)
    }

    fn poll(gpu: &Gpu, this: Option<&Self>) -> u32 {
        let mut mask = 0;
        if this.is_some_and(|file| file.space.jobs.any_ended()) {
            mask |= POLLIN;
        }
        match gpu.usable() {
            Ok(()) => {}
            Err(e) if e == EIO => mask |= POLLERR,
            Err(_) => mask |= POLLHUP,
        }
        mask
    }

    fn all_ready(gpu: &Gpu) -> &PollCondVar {
        gpu.unusable()
    }

    fn release(&self) {
        self.space.close(uapi::JobStatus::Killed);
    }
}

impl OpenFile {
    fn info(&self) -> uapi::Info {
        uapi::Info {
            uapi_version: uapi::UAPI_VERSION,
            context: self.space.context(),
            vram_size: (self.gpu.limits.vram_pages * PAGE_SIZE) as u64,
            serial: self.gpu.limits.serial,
            max_waves: self.gpu.limits.max_waves,
            max_jobs: MAX_JOBS as u32,
        }
    }

    fn submit(&self, arg: usize) -> Result {
        self.gpu.usable()?;
        let mut submit: uapi::Submit = read_from_user(arg)?;
        let kernel = Kernel::from_raw(submit.kernel).ok_or(EINVAL)?;
        check_job(kernel, &submit, self.gpu.limits.max_waves)?;
        submit.fence = self
            .space
            .submit(submit.kernel, submit.waves, submit.arguments)?;
        let written = write_to_user(arg, &submit);
        if written.is_err() {
            // Nobody knows the job's name: it shall not run on. A WAIT for any job collects it, or the close.
            let _ = self.space.kill(submit.fence);
        }
        written
    }

    fn wait(&self, arg: usize) -> Result {
        let mut wait: uapi::Wait = read_from_user(arg)?;
        let limit = u64::try_from(wait.timeout_ns).ok().map(to_jiffies);
        let alive = || self.gpu.ping();
        let begun = Instant::<Monotonic>::now();
        let waited = self.space.jobs.wait(wait.fence, limit, alive);
        if matches!(waited, Err(error) if error == ERESTARTNOHAND) && wait.timeout_ns > 0 {
            // The call begins anew where no handler ran.
            let left = wait.timeout_ns - begun.elapsed().as_nanos();
            wait.timeout_ns = left.max(0);
            write_to_user(arg, &wait)?;
        }
        let (fence, outcome) = waited?;
        wait.fence = fence;
        wait.result = outcome.result;
        wait.fault_address = outcome.fault_address;
        wait.status = outcome.status.raw();
        wait.access = outcome.access;
        write_to_user(arg, &wait)
    }

    fn migrate(&self, arg: usize) -> Result {
        self.gpu.usable()?;
        let mut migrate: uapi::Migrate = read_from_user(arg)?;
        let range = check_range(migrate.address, migrate.length)?;
        let place = uapi::Place::from_raw(migrate.destination).ok_or(EINVAL)?;
        if place == uapi::Place::None || migrate.reserved != 0 {
            return Err(EINVAL);
        }
        let moved = self.space.migrate(range, place)?;
        migrate.moved = moved.moved as u64;
        migrate.there = moved.there as u64;
        migrate.stayed = moved.stayed as u64;
        write_to_user(arg, &migrate)
    }

    fn advise(&self, arg: usize) -> Result {
        let advise: uapi::Advise = read_from_user(arg)?;
        let range = check_range(advise.address, advise.length)?;
        let advice = uapi::Advice::from_raw(advise.advice).ok_or(EINVAL)?;
        if advise.reserved != 0 {
            return Err(EINVAL);
        }
        self.space.advise(range, advice)
    }

    fn exclusive(&self, arg: usize) -> Result {
        self.gpu.usable()?;
        let exclusive: uapi::Exclusive = read_from_user(arg)?;
        let range = check_range(exclusive.address, exclusive.length)?;
        self.space.make_exclusive(range)
    }

    fn query(&self, arg: usize) -> Result {
        self.gpu.usable()?;
        let query: uapi::Query = read_from_user(arg)?;
        let range = check_range(query.address, query.length)?;
        let bytes = range.len() / PAGE_SIZE * size_of::<uapi::Page>();
        let answer = UserPtr::from_addr(query.pages as usize);
        let mut answer = UserSlice::new(answer, bytes).writer();
        let mut pages = KVVec::from_elem(query::UNKNOWN, BLOCK_PAGES, GFP_KERNEL)?;
        let mut at = range.start;
        while at < range.end {
            let end = range.end.min((at & !(REGION_BYTES - 1)) + REGION_BYTES);
            let count = (end - at) / PAGE_SIZE;
            let part = pages.get_mut(..count).ok_or(EINVAL)?;
            self.space.query(at..end, part)?;
            answer.write_slice(part.as_bytes())?;
            at = end;
            if fatal_signal_pending() {
                return Err(EINTR);
            }
        }
        Ok(())
    }
}

/// Refuses what the device would refuse, and what no memory can be meant by.
fn check_job(kernel: Kernel, submit: &uapi::Submit, max_waves: u32) -> Result {
    let [a, b, c, d] = submit.arguments;
    let single = matches!(kernel, Kernel::CompareAndSwap | Kernel::PointerChase);
    let waves = 1..=if single { 1 } else { max_waves };
    if !waves.contains(&submit.waves) || d != 0 {
        return Err(EINVAL);
    }
    match kernel {
        Kernel::Fill | Kernel::Add => check_words(a, b),
        Kernel::Copy => {
            check_words(a, c)?;
            check_words(b, c)?;
            // Which of them would win is nobody's promise.
            if a < b + c && b < a + c {
                return Err(EINVAL);
            }
            Ok(())
        }
        Kernel::Sum if c != 0 => Err(EINVAL),
        Kernel::Sum => check_words(a, b),
        Kernel::AtomicAdd if c == 0 => Err(EINVAL),
        Kernel::AtomicAdd | Kernel::CompareAndSwap => check_words(a, 8),
        Kernel::PointerChase if b == 0 || c != 0 => Err(EINVAL),
        Kernel::PointerChase => check_words(a, 8),
    }
}

fn check_words(address: u64, length: u64) -> Result {
    let end = address.checked_add(length).ok_or(EINVAL)?;
    if (address | length) % 8 != 0 || length == 0 || end > TASK_SIZE as u64 {
        return Err(EINVAL);
    }
    Ok(())
}

fn check_range(address: u64, length: u64) -> Result<Range<usize>> {
    let end = address.checked_add(length).ok_or(EINVAL)?;
    if (address | length) % PAGE_SIZE as u64 != 0 || length == 0 || end > TASK_SIZE as u64 {
        return Err(EINVAL);
    }
    Ok(address as usize..end as usize)
}

/// Rounded up, with one more for the one that has begun, so that nobody waits for less than asked.
fn to_jiffies(nanoseconds: u64) -> Jiffies {
    const LONGEST_MS: u64 = 1 << 30;
    match nanoseconds.div_ceil(1_000_000).min(LONGEST_MS) {
        0 => 0,
        milliseconds => msecs_to_jiffies(milliseconds as u32) + 1,
    }
}

fn read_from_user<T: FromBytes + IntoBytes + Immutable>(arg: usize) -> Result<T> {
    let mut value = T::new_zeroed();
    UserSlice::new(UserPtr::from_addr(arg), size_of::<T>())
        .reader()
        .read_slice(value.as_mut_bytes())?;
    Ok(value)
}

fn write_to_user<T: IntoBytes + Immutable>(arg: usize, value: &T) -> Result {
    UserSlice::new(UserPtr::from_addr(arg), size_of::<T>())
        .writer()
        .write_slice(value.as_bytes())
}
