// SPDX-License-Identifier: GPL-2.0
//! The jobs of one address space: from submission until their result is collected.
//!
//! A job is named by its fence. Its end comes from the device as an event; or from the driver, when
//! the device is lost or the address space closes: every job ends.
//!
//! Locking: one mutex, held for look-ups only.

use crate::uapi;
use kernel::{
    new_mutex,
    prelude::*,
    sync::{poll::PollCondVar, Arc, CondVarTimeoutResult, Mutex},
    time::{msecs_to_jiffies, Jiffies},
};

/// Jobs of one address space that are not collected yet.
pub(crate) const MAX_JOBS: usize = 256;

/// How often a waiter looks whether the device still answers, milliseconds.
const CHECK_MS: u32 = 2_000;

/// How a job ended.
#[derive(Clone, Copy)]
pub(crate) struct Outcome {
    pub(crate) status: uapi::JobStatus,
    /// Raw [`uapi::Access`], zero if it is not about one.
    pub(crate) access: u32,
    pub(crate) result: u64,
    pub(crate) fault_address: u64,
}

impl Outcome {
    /// A job that ended without a result or an address.
    pub(crate) const fn failed(status: uapi::JobStatus) -> Self {
        Self {
            status,
            access: 0,
            result: 0,
            fault_address: 0,
        }
    }
}

struct Job {
    fence: u64,
    outcome: Option<Outcome>,
}

struct List {
    jobs: KVec<Job>,
    /// Set once, when no job can run any more.
    closed: Option<uapi::JobStatus>,
}

impl List {
    fn position(&self, fence: u64) -> Option<usize> {
        self.jobs.iter().position(|job| job.fence == fence)
    }

    /// Removes an ended job: the one of `fence`, or any for zero. `None`: it still runs.
    fn collect(&mut self, fence: u64) -> Result<Option<(u64, Outcome)>> {
        let index = if fence != 0 {
            self.position(fence).ok_or(ENOENT)?
        } else if self.jobs.is_empty() {
            return Err(ENOENT);
        } else {
            match self.jobs.iter().position(|job| job.outcome.is_some()) {
                Some(index) => index,
                None => return Ok(None),
            }
        };
        let Some(outcome) = self.jobs.get(index).and_then(|job| job.outcome) else {
            return Ok(None);
        };
        let job = self.jobs.remove(index).map_err(|_| EINVAL)?;
        Ok(Some((job.fence, outcome)))
    }
}

/// The table of jobs.
#[pin_data]
pub(crate) struct Jobs {
    #[pin]
    list: Mutex<List>,
    /// Notified when a job ends.
    ended: Arc<PollCondVar>,
}

impl Jobs {
    pub(crate) fn new(ended: Arc<PollCondVar>) -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            list <- new_mutex!(List {
                jobs: KVec::with_capacity(MAX_JOBS, GFP_KERNEL)?,
                closed: None,
            }),
            ended,
        })
    }

    /// Records a new job. `EAGAIN`: too many are not collected yet.
    pub(crate) fn begin(&self, fence: u64) -> Result {
        let mut list = self.list.lock();
        if list.closed.is_some() {
            return Err(ENODEV);
        }
        let job = Job {
            fence,
            outcome: None,
        };
        list.jobs.push_within_capacity(job).map_err(|_| EAGAIN)
    }

    /// Forgets a job that the device did not take.
    pub(crate) fn abandon(&self, fence: u64) {
        let mut list = self.list.lock();
        if let Some(index) = list.position(fence) {
            // The index was found just now.
            let _ = list.jobs.remove(index);
        }
    }

    /// Records the end of a job, if there is one to end; `before` runs before anybody can see it.
    pub(crate) fn end(&self, fence: u64, outcome: Outcome, before: impl FnOnce()) {
        let mut list = self.list.lock();
        let running = list
            .jobs
            .iter_mut()
            .find(|job| job.fence == fence && job.outcome.is_none());
        let Some(job) = running else {
            return;
        };
        before();
        job.outcome = Some(outcome);
        drop(list);
        self.ended.notify_all();
    }

    /// Ends all jobs that run, and takes no more; `before` as for [`Jobs::end`], for each.
    pub(crate) fn close(&self, status: uapi::JobStatus, before: impl Fn()) {
        self.list.lock().closed.get_or_insert(status);
        self.end_all(status, before);
    }

    /// Ends all jobs that run; `before` as for [`Jobs::end`], for each.
    pub(crate) fn end_all(&self, status: uapi::JobStatus, before: impl Fn()) {
        let mut list = self.list.lock();
        for job in list.jobs.iter_mut().filter(|job| job.outcome.is_none()) {
            before();
            job.outcome = Some(Outcome::failed(status));
        }
        drop(list);
        self.ended.notify_all();
    }

    /// Whether the job is known and has not ended. `ENOENT`: it is not known.
    pub(crate) fn is_running(&self, fence: u64) -> Result<bool> {
        let list = self.list.lock();
        let index = list.position(fence).ok_or(ENOENT)?;
        Ok(list.jobs.get(index).is_some_and(|j| j.outcome.is_none()))
    }

    /// Waits for the job of `fence`, or for any if it is zero, and collects it. Without a `limit` it
    /// waits for as long as `alive`, asked now and then, succeeds. `ERESTARTNOHAND`: a signal came, or
    /// only the freezer, or a debugger.
    pub(crate) fn wait(
        &self,
        fence: u64,
        limit: Option<Jiffies>,
        alive: impl Fn() -> Result,
    ) -> Result<(u64, Outcome)> {
        let mut left = limit;
        loop {
            let mut list = self.list.lock();
            if let Some(ended) = list.collect(fence)? {
                return Ok(ended);
            }
            let check = msecs_to_jiffies(CHECK_MS);
            let slice = check.min(left.unwrap_or(Jiffies::MAX));
            if slice == 0 {
                return Err(ETIMEDOUT);
            }
            let waited = match self.ended.wait_interruptible_timeout(&mut list, slice) {
                CondVarTimeoutResult::Signal { .. } => return Err(ERESTARTNOHAND),
                CondVarTimeoutResult::Woken { jiffies } => slice - jiffies.min(slice),
                CondVarTimeoutResult::Timeout => {
                    drop(list);
                    // When it fails, the device was lost and the job has ended: collect that. A limit
                    // that is shorter is not to be waited for twice.
                    if slice == check {
                        let _ = alive();
                    }
                    slice
                }
            };
            left = left.map(|left| left - waited.min(left));
        }
    }

    /// Whether there is a job to collect.
    pub(crate) fn any_ended(&self) -> bool {
        let list = self.list.lock();
        list.jobs.iter().any(|job| job.outcome.is_some())
    }
}
