// SPDX-License-Identifier: GPL-2.0
//! Lists of physical copies (hardware manual, chapter 5): written, sent, and waited for.

use super::{Channel, Request, POLL};
use crate::kapi::spinlock_irq::{new_spinlock_irq, SpinLockIrq};
use farfault_protocol::{
    command::{CommandHeader, Status},
    submit::{Copy, CopyAperture, CopyRun, Opcode, Reply},
};
use kernel::{page::PAGE_SHIFT, prelude::*, time::Delta};
use zerocopy::IntoBytes;

/// Runs of one request. Its memory grows with them.
const RUNS: usize = 512;
/// Bytes of a request that holds them all.
pub(crate) const REQUEST_BYTES: usize = size_of::<Copy>() + RUNS * size_of::<CopyRun>();
/// Runs that there is room for at once.
const FIRST_RUNS: usize = 8;

/// How long an answer is looked for, beyond [`super::POLL`], for each 4 KiB that a list copies: more than
/// that takes, but less than to sleep and to be woken for a few hundred.
const POLL_PER_PAGE: Delta = Delta::from_micros(1);

/// Most requests that are kept for the next list.
const SPARE: usize = 8;

/// Memory of lists that have ended, for those that come: a CPU fault on one page allocates nothing of
/// its own then.
#[pin_data]
pub(crate) struct CopyMemory {
    /// Each of one request. There is room for [`SPARE`].
    #[pin]
    spare: SpinLockIrq<KVec<KVec<Request>>>,
}

impl CopyMemory {
    pub(crate) fn new() -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            spare <- new_spinlock_irq!(KVec::with_capacity(SPARE, GFP_KERNEL)?),
        })
    }

    fn take(&self) -> KVec<Request> {
        self.spare.lock().pop().unwrap_or_default()
    }

    fn give_back(&self, mut requests: KVec<Request>) {
        // What the device has kept is gone.
        requests.retain(|request| request.message.is_some());
        requests.truncate(1);
        if requests.is_empty() {
            return;
        }
        let full = self.spare.lock().push_within_capacity(requests);
        // Dropped without the lock.
        drop(full);
    }
}

/// Copies that go together. Neighbours become one run, and many runs several requests.
pub(crate) struct CopyList<'a> {
    memory: &'a CopyMemory,
    requests: KVec<Request>,
    /// How many of the requests have runs.
    used: usize,
    /// Runs of the last request.
    runs: usize,
    /// The run that may still grow.
    last: Option<CopyRun>,
    /// The device's limit for one run, in bytes.
    longest: u32,
    /// How many are copied in all.
    bytes: usize,
    /// How many of the requests were sent.
    sent: usize,
}

impl<'a> CopyList<'a> {
    /// `longest` is the device's limit for one run, in bytes.
    pub(crate) fn new(memory: &'a CopyMemory, longest: u32) -> Self {
        Self {
            memory,
            requests: memory.take(),
            used: 0,
            runs: RUNS,
            last: None,
            longest,
            bytes: 0,
            sent: 0,
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.last.is_none()
    }

    /// Adds a run, or makes the last one longer.
    pub(crate) fn push(&mut self, run: CopyRun) -> Result {
        let joined = self.last.and_then(|last| join(&last, &run, self.longest));
        if joined.is_none() {
            self.write_last()?;
        }
        self.last = joined.or(Some(run));
        self.bytes += run.length.get() as usize;
        Ok(())
    }

    /// Writes the last run to a request. It stays the last run: the next one replaces it.
    fn write_last(&mut self) -> Result {
        let Some(last) = self.last else {
            return Ok(());
        };
        if self.runs == RUNS {
            if self.requests.len() == self.used {
                let bytes = size_of::<Copy>() + FIRST_RUNS * size_of::<CopyRun>();
                let request = Request::new(bytes, size_of::<Reply>())?;
                self.requests.push(request, GFP_KERNEL)?;
            }
            let request = self.requests.get_mut(self.used).ok_or(EINVAL)?;
            let header = CommandHeader::new(Opcode::Copy.raw(), 0);
            let bytes = request.bytes()?;
            bytes.clear();
            bytes.extend_from_slice(header.as_bytes(), GFP_KERNEL)?;
            self.used += 1;
            self.runs = 0;
        }
        let last_used = self.used.checked_sub(1).ok_or(EINVAL)?;
        let request = self.requests.get_mut(last_used).ok_or(EINVAL)?;
        let bytes = request.bytes()?;
        bytes.extend_from_slice(last.as_bytes(), GFP_KERNEL)?;
        self.runs += 1;
        Ok(())
    }

    /// Begins to move the bytes. Errors as for [`Channel::start`]; some copies may be under way then,
    /// too.
    pub(crate) fn start(&mut self, channel: &Channel) -> Result {
        self.write_last()?;
        for request in self.requests.iter_mut().take(self.used) {
            let bytes = request.bytes()?;
            let header = CommandHeader::new(Opcode::Copy.raw(), bytes.len() as u32);
            let slot = bytes.get_mut(..size_of::<CommandHeader>());
            slot.ok_or(EINVAL)?.copy_from_slice(header.as_bytes());
            channel.start(request)?;
            self.sent += 1;
        }
        Ok(())
    }

    /// Waits until the bytes of all that was sent are where they belong. `ETIMEDOUT`: no answer in
    /// [`super::time_limit`]; the device may move them yet. `EIO`: it refused. `EAGAIN`:
    /// VRAM has failed there, and an event that tells where is on its way.
    pub(crate) fn finish(&mut self, channel: &Channel) -> Result {
        let sent = core::mem::take(&mut self.sent);
        let pages = (self.bytes >> PAGE_SHIFT) as i64;
        let poll_limit = Delta::from_nanos(POLL.as_nanos() + pages * POLL_PER_PAGE.as_nanos());
        let mut result = Ok(());
        for request in self.requests.iter_mut().take(sent) {
            // All of them, whatever becomes of one.
            let finished = channel
                .finish(request, poll_limit)
                .and_then(|()| status(request));
            // That VRAM has failed is the least of it.
            if result.is_ok() || (result == Err(EAGAIN) && finished.is_err()) {
                result = finished;
            }
        }
        result
    }
}

impl Drop for CopyList<'_> {
    fn drop(&mut self) {
        self.memory.give_back(core::mem::take(&mut self.requests));
    }
}

fn status(request: &Request) -> Result {
    match super::submitted(request)? {
        Status::Ok => Ok(()),
        Status::Poisoned => Err(EAGAIN),
        status => {
            pr_err!("a copy was refused: {status:?}\n");
            Err(EIO)
        }
    }
}

/// Both runs as one, if the second goes on where the first ends.
fn join(first: &CopyRun, second: &CopyRun, longest: u32) -> Option<CopyRun> {
    let length = first.length.get().checked_add(second.length.get())?;
    let pattern = first.source_aperture == CopyAperture::Pattern.raw();
    let source_follows = if pattern {
        first.source == second.source
    } else {
        first.source.get() + u64::from(first.length.get()) == second.source.get()
    };
    let follows = source_follows
        && first.source_aperture == second.source_aperture
        && first.destination_aperture == second.destination_aperture
        && first.destination.get() + u64::from(first.length.get()) == second.destination.get();
    (follows && length <= longest).then(|| CopyRun {
        length: length.into(),
        ..*first
    })
}
