// SPDX-License-Identifier: MIT OR Apache-2.0
//! Jobs that run while the program goes on, in a scope that does not end before they do.

use crate::{
    error::{CallName, Error, Result},
    launch::{Launch, Output},
    sys::{Jobs, Running},
    uapi::{self, Access, JobStatus, Kernel},
};
use std::{marker::PhantomData, time::Duration};

/// Where jobs can be started that run on: see [`crate::Gpu::scope`].
#[derive(Clone, Copy, Debug)]
pub struct Scope<'scope, 'env: 'scope> {
    jobs: &'scope Jobs<'scope, 'env>,
    max_waves: u32,
}

impl<'scope, 'env> Scope<'scope, 'env> {
    pub(crate) fn new(jobs: &'scope Jobs<'scope, 'env>, max_waves: u32) -> Self {
        Self { jobs, max_waves }
    }

    /// Starts a job. Its memory stays borrowed until the scope ends.
    pub fn launch<T: Output>(self, launch: Launch<'scope, T>) -> Result<Job<'scope, 'env, T>> {
        let running = self.jobs.submit(&launch, self.max_waves)?;
        Ok(Job {
            jobs: self.jobs,
            running,
            end: None,
            output: PhantomData,
        })
    }
}

/// A job that was started. Dropping it changes nothing: the scope waits for it.
#[derive(Debug)]
#[must_use = "its result, or its error, is known only by waiting for it"]
pub struct Job<'scope, 'env, T> {
    jobs: &'scope Jobs<'scope, 'env>,
    running: Running,
    end: Option<uapi::Wait>,
    output: PhantomData<fn() -> T>,
}

impl<T: Output> Job<'_, '_, T> {
    /// Waits until it ends.
    pub fn wait(mut self) -> Result<T> {
        let result = self.look(None)?;
        result.ok_or_else(|| self.wait_error(rustix::io::Errno::TIMEDOUT))
    }

    /// Waits until it ends, but not longer than `timeout`; nothing if it still runs then.
    pub fn wait_timeout(&mut self, timeout: Duration) -> Result<Option<T>> {
        self.look(Some(timeout))
    }

    /// Its result, if it has ended.
    pub fn try_wait(&mut self) -> Result<Option<T>> {
        self.look(Some(Duration::ZERO))
    }

    /// Ends it soon, with [`Error::Killed`]. What it has written by then stays.
    pub fn kill(&self) -> Result<()> {
        if self.end.is_some() {
            return Ok(());
        }
        self.jobs
            .kill(self.running.fence)
            .map_err(|errno| Error::call(CallName::of_kernel("KILL", self.kernel()), None, errno))
    }

    /// What runs.
    pub fn kernel(&self) -> Kernel {
        self.running.kernel
    }

    fn look(&mut self, timeout: Option<Duration>) -> Result<Option<T>> {
        if self.end.is_none() {
            self.end = self
                .jobs
                .wait(self.running.fence, timeout)
                .map_err(|errno| self.wait_error(errno))?;
        }
        let Some(end) = &self.end else {
            return Ok(None);
        };
        outcome(self.kernel(), end).map(|result| Some(Launch::<T>::output(result)))
    }

    fn wait_error(&self, errno: rustix::io::Errno) -> Error {
        Error::call(CallName::of_kernel("WAIT", self.kernel()), None, errno)
    }
}

/// The result of a job that ended well, or the error that it ended with.
pub(crate) fn outcome(kernel: Kernel, end: &uapi::Wait) -> Result<u64> {
    let address = end.fault_address;
    let unknown = |what: &str, number: u32| Error::Answer {
        call: CallName::of_kernel("WAIT", kernel),
        answer: format!("{what} {number}"),
    };
    match JobStatus::from_raw(end.status) {
        Some(JobStatus::Ok) => Ok(end.result),
        Some(JobStatus::Fault) => Err(match Access::from_raw(end.access) {
            Some(access) => Error::Fault {
                kernel,
                address,
                access,
            },
            None => unknown("access", end.access),
        }),
        Some(JobStatus::Killed) => Err(Error::Killed(kernel)),
        Some(JobStatus::BusError) => Err(Error::BusError { kernel, address }),
        Some(JobStatus::MemoryError) => Err(Error::MemoryError { kernel, address }),
        Some(JobStatus::DeviceLost) => Err(Error::DeviceLost(kernel)),
        None => Err(unknown("job status", end.status)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn end(status: JobStatus) -> uapi::Wait {
        uapi::Wait {
            result: 9,
            fault_address: 0x5000,
            status: status.raw(),
            access: Access::Write.raw(),
            ..uapi::Wait::default()
        }
    }

    #[test]
    fn outcome_of_each_status_is_result_or_its_error() {
        let of = |status| outcome(Kernel::Fill, &end(status));
        assert!(matches!(of(JobStatus::Ok), Ok(9)));
        assert!(matches!(
            of(JobStatus::Fault),
            Err(Error::Fault {
                kernel: Kernel::Fill,
                address: 0x5000,
                access: Access::Write
            })
        ));
        assert!(matches!(of(JobStatus::Killed), Err(Error::Killed(_))));
        assert!(matches!(
            of(JobStatus::BusError),
            Err(Error::BusError {
                address: 0x5000,
                ..
            })
        ));
        assert!(matches!(
            of(JobStatus::DeviceLost),
            Err(Error::DeviceLost(_))
        ));
    }

    #[test]
    fn outcome_of_unknown_numbers_says_them() {
        let mut strange = end(JobStatus::Fault);
        strange.access = 77;
        let text = outcome(Kernel::Sum, &strange).unwrap_err().to_string();
        assert!(text.contains("access 77"), "{text}");
        strange.status = 99;
        let text = outcome(Kernel::Sum, &strange).unwrap_err().to_string();
        assert!(text.contains("job status 99"), "{text}");
    }
}
