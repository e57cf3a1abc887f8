// SPDX-License-Identifier: GPL-2.0
//! Requests to the device and their answers (hardware manual, chapter 3).
//!
//! A [`Channel`] is the control or the submit queue: one request is sent, and its answer waited for,
//! with a time limit; a copy list's sender may do other things in between. Who waits looks for the
//! answer by himself for a while, and most come then: interrupts are off until somebody sleeps. They
//! take answers from the ring themselves, so that nobody else need wake.
//!
//! What a request that ran out of time held stays with the device until it is reset: its memory is
//! the queue's, and the caller gets `ETIMEDOUT` and nothing else.
//!
//! Locking: a channel's ring is behind an interrupt-safe spinlock, held for no other.

pub(crate) mod batch;
pub(crate) mod copy;
pub(crate) mod event;

pub(crate) use self::{
    batch::Batch,
    copy::{CopyList, CopyMemory},
};

use crate::kapi::{
    completion::Completion,
    poll::poll,
    spinlock_irq::{new_spinlock_irq, SpinLockIrq},
    virtqueue::{Transfer, Virtqueue},
};
use farfault_protocol::{
    command::{CommandHeader, Status},
    control, submit,
};
use kernel::{
    prelude::*,
    sync::Arc,
    time::{delay::fsleep, Delta, Instant, Monotonic},
};
use zerocopy::{FromBytes, IntoBytes};

/// How long one request may take before the device counts as lost: the module's parameter. An
/// invalidation waits for accesses in flight, each of which is short; a copy moves at most 2 MiB.
fn time_limit() -> Delta {
    const LONGEST: u16 = 600;
    let seconds = *crate::module_parameters::time_limit.value();
    Delta::from_secs(seconds.clamp(1, LONGEST).into())
}

/// How long an answer is looked for before its sender sleeps: about what that takes.
const POLL: Delta = Delta::from_micros(100);

/// The pause between looks at a full ring.
const ROOM_PAUSE: Delta = Delta::from_millis(1);

/// Descriptors of a transfer, at most.
const DESCRIPTORS: usize = 2;
/// Descriptors for the requests of invalidations, one for each address space at most: any number of
/// others leaves them free.
const RESERVED: usize = crate::gpu::MOST_CONTEXTS as usize * DESCRIPTORS;

type Message = KBox<Transfer<Arc<Call>>>;

/// Where a request is.
enum Progress {
    /// With the caller, or in the ring.
    Sent,
    Answered(Message),
    /// The caller went away: nobody wants the answer.
    Abandoned,
}

/// One request at a time, used again and again.
#[pin_data]
struct Call {
    #[pin]
    answered: Completion,
    #[pin]
    progress: SpinLockIrq<Progress>,
}

impl Call {
    fn new() -> Result<Arc<Self>> {
        Arc::pin_init(
            try_pin_init!(Self {
                answered <- Completion::new(),
                progress <- new_spinlock_irq!(Progress::Sent),
            }),
            GFP_KERNEL,
        )
    }

    /// The device is done with the message.
    fn answer(&self, message: Message) {
        let mut progress = self.progress.lock();
        let before = core::mem::replace(&mut *progress, Progress::Answered(message));
        if let Progress::Abandoned = before {
            let answer = core::mem::replace(&mut *progress, Progress::Abandoned);
            drop(progress);
            drop(answer);
            return;
        }
        drop(progress);
        self.answered.complete_all();
    }
}

/// Memory for a request and its reply.
pub(crate) struct Request {
    call: Arc<Call>,
    /// `None` once the device has kept it beyond the time limit.
    message: Option<Message>,
    /// It leaves [`Ring::reserved`] descriptors to others.
    patient: bool,
}

impl Request {
    /// Room for a request of `request` bytes and a reply of `reply` bytes.
    fn new(request: usize, reply: usize) -> Result<Self> {
        let call = Call::new()?;
        let message = Transfer::new(request, reply, call.clone(), GFP_KERNEL)?;
        Ok(Self {
            call,
            message: Some(message),
            patient: false,
        })
    }

    /// The bytes of the request.
    fn bytes(&mut self) -> Result<&mut KVec<u8>> {
        self.message.as_mut().map(|m| &mut m.request).ok_or(EIO)
    }

    /// What the device answered.
    fn reply(&self) -> &[u8] {
        self.message.as_ref().map_or(&[], |m| m.reply())
    }
}

/// The ring, and how many sleep until it is looked at: only then is the device to interrupt.
struct Ring {
    queue: Virtqueue<Arc<Call>>,
    sleepers: u32,
    /// Descriptors that are for requests of which there are few.
    reserved: usize,
}

impl Ring {
    /// Hands answers to those who wait for them.
    fn drain(&mut self) {
        while let Some(message) = self.queue.take() {
            let call = message.data.clone();
            call.answer(message);
        }
    }
}

/// A request queue of the device.
#[pin_data]
pub(crate) struct Channel {
    #[pin]
    ring: SpinLockIrq<Option<Ring>>,
}

impl Channel {
    /// A channel without a ring: every call fails with `ENODEV`.
    pub(crate) fn new() -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            ring <- new_spinlock_irq!(None),
        })
    }

    /// Takes the ring over from the bus, at probe.
    pub(crate) fn open<H, const N: usize>(
        &self,
        queues: &crate::kapi::virtqueue::Queues<'_, H, N>,
        index: u16,
    ) -> Result
    where
        H: crate::kapi::virtqueue::QueueHandler,
    {
        let queue: Virtqueue<Arc<Call>> = queues.queue(index.into())?;
        let reserved = RESERVED.min(queue.free() / 2);
        *self.ring.lock() = Some(Ring {
            queue,
            sleepers: 0,
            reserved,
        });
        Ok(())
    }

    /// Called in hard interrupt context.
    pub(crate) fn interrupt(&self) {
        self.drain();
    }

    fn drain(&self) {
        if let Some(ring) = &mut *self.ring.lock() {
            ring.drain();
        }
    }

    /// After the device was reset: nothing is answered any more. Those who wait are told.
    pub(crate) fn close(&self) {
        loop {
            let message = match &mut *self.ring.lock() {
                Some(ring) => ring.queue.detach_unused(),
                None => None,
            };
            let Some(message) = message else { break };
            let call = message.data.clone();
            call.answer(message);
        }
        let ring = self.ring.lock().take();
        drop(ring);
    }

    /// Puts a message in the ring and tells the device. If the ring is full, others have to be
    /// answered first: that is waited for, with the same limit as an answer.
    fn send(&self, mut message: Message, patient: bool) -> Result<(), (Error, Message)> {
        let begun = Instant::<Monotonic>::now();
        loop {
            let mut ring = self.ring.lock();
            let Some(Ring {
                queue,
                sleepers,
                reserved,
            }) = &mut *ring
            else {
                return Err((ENODEV, message));
            };
            let added = if patient && queue.free() < *reserved + DESCRIPTORS {
                Err((ENOSPC, message))
            } else {
                queue.add(message)
            };
            match added {
                Ok(()) => {
                    if *sleepers == 0 {
                        queue.disable_callbacks();
                    }
                    let notifier = queue.kick_prepare().then(|| queue.notifier());
                    drop(ring);
                    if let Some(notifier) = notifier {
                        // If it fails the queue is broken, and who waits finds that out.
                        let _ = notifier.notify();
                    }
                    return Ok(());
                }
                Err((error, back)) if error == ENOSPC => message = back,
                Err(refused) => return Err(refused),
            }
            drop(ring);
            // Behind a last look, as for an answer.
            if begun.elapsed() >= time_limit() {
                return Err((ETIMEDOUT, message));
            }
            fsleep(ROOM_PAUSE);
            self.drain();
        }
    }

    /// Sends a request. Its answer is to be waited for with [`Channel::finish`].
    ///
    /// `EIO`: an earlier request in this memory was never answered, or the queue is broken. `ENODEV`:
    /// the device is gone. `ETIMEDOUT`: the ring stayed full.
    fn start(&self, request: &mut Request) -> Result {
        let message = request.message.take().ok_or(EIO)?;
        *request.call.progress.lock() = Progress::Sent;
        request.call.answered.reinit();
        self.send(message, request.patient)
            .map_err(|(error, message)| {
                request.message = Some(message);
                error
            })
    }

    /// Waits for the reply to a request that was sent, which the request holds then; without sleeping
    /// for as long as `poll_limit`. `ETIMEDOUT`: no answer in [`time_limit`].
    fn finish(&self, request: &mut Request, poll_limit: Delta) -> Result {
        let call = &request.call;
        let was_answered = || matches!(*call.progress.lock(), Progress::Answered(_));
        let is_answered = || {
            self.drain();
            was_answered()
        };
        let _sleep = (!poll(poll_limit, is_answered)).then(|| Sleep::new(self));
        loop {
            let waited = call.answered.wait_timeout(time_limit());
            // A device that answers is not lost.
            if waited.is_err() && !was_answered() && is_answered() {
                pr_warn!("an answer came without its interrupt\n");
            }
            let mut progress = call.progress.lock();
            match core::mem::replace(&mut *progress, Progress::Abandoned) {
                Progress::Answered(message) => {
                    drop(progress);
                    request.message = Some(message);
                    return Ok(());
                }
                Progress::Sent if waited.is_ok() => {
                    // The wake-up of an answer before this one, which came too late for it.
                    *progress = Progress::Sent;
                    call.answered.reinit();
                }
                Progress::Sent | Progress::Abandoned => return Err(ETIMEDOUT),
            }
        }
    }

    /// Sends a request and waits for the reply. Errors as for both steps.
    fn call(&self, request: &mut Request) -> Result {
        self.start(request)?;
        self.finish(request, POLL)
    }

    /// Sends a batch of control commands. Returns how the last one executed ended.
    pub(crate) fn control(&self, batch: &mut Batch) -> Result<(Status, control::Reply)> {
        self.call(&mut batch.request)?;
        let reply = control::Reply::read_from_prefix(batch.request.reply());
        let (reply, _) = reply.map_err(|_| EIO)?;
        let status = Status::from_raw(reply.status.get()).ok_or(EIO)?;
        Ok((status, reply))
    }

    /// Starts a job. `EAGAIN`: the device has no room for it now. `EINVAL`: it does not like an
    /// argument.
    pub(crate) fn launch(&self, launch: &submit::Launch) -> Result {
        let mut request = Request::new(size_of::<submit::Launch>(), size_of::<submit::Reply>())?;
        let bytes = request.bytes()?;
        bytes.extend_from_slice(launch.as_bytes(), GFP_KERNEL)?;
        self.call(&mut request)?;
        match submitted(&request)? {
            Status::Ok => Ok(()),
            Status::Busy => Err(EAGAIN),
            Status::BadArgument | Status::Misaligned | Status::LimitExceeded => Err(EINVAL),
            Status::BadContext => Err(ENODEV),
            status => {
                pr_err!("a job was refused: {status:?}\n");
                Err(EIO)
            }
        }
    }
}

/// While it exists, the device interrupts for the channel.
struct Sleep<'a>(&'a Channel);

impl<'a> Sleep<'a> {
    fn new(channel: &'a Channel) -> Self {
        if let Some(ring) = &mut *channel.ring.lock() {
            ring.sleepers += 1;
            while !ring.queue.enable_callbacks() {
                ring.drain();
            }
        }
        Self(channel)
    }
}

impl Drop for Sleep<'_> {
    fn drop(&mut self) {
        if let Some(ring) = &mut *self.0.ring.lock() {
            ring.sleepers = ring.sleepers.saturating_sub(1);
        }
    }
}

/// The status of a submit command that was answered.
fn submitted(request: &Request) -> Result<Status> {
    let (reply, _) = submit::Reply::read_from_prefix(request.reply()).map_err(|_| EIO)?;
    Status::from_raw(reply.status.get()).ok_or(EIO)
}

/// The header of a submit or control command of type `T`.
fn header<T>(opcode: u16) -> CommandHeader {
    CommandHeader::new(opcode, size_of::<T>() as u32)
}
