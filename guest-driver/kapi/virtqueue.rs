// SPDX-License-Identifier: GPL-2.0
//! Virtqueues: buffers go to the device and come back.
//!
//! The queue owns a [`Transfer`] while it is in flight, so nobody can touch bytes that the device
//! reads or writes. [`Queues`] belongs to the bound device; a [`Virtqueue`] may outlive it (open
//! files do), and its operations fail from then on: each looks, under the RCU read lock, whether
//! the rings are still there.
//!
//! Must not know what is in a transfer. Locks: operations take `&mut self`, so the owner serialises
//! them (a mutex); [`Notifier::notify`] is for after that lock. Nothing here sleeps but
//! [`Queues::new`], [`Queues::reset`] and drop.
//!
//! Not implemented: configuration of affinity, packed rings (the transport may use them), resize.
//!
//! C header: `include/linux/virtio.h`.

use super::virtio::Device;
use crate::bindings;
use core::{marker::PhantomData, ptr, ptr::NonNull};
use kernel::{
    alloc::Flags,
    device::Bound,
    error::to_result,
    new_mutex,
    prelude::*,
    revocable::Revocable,
    sync::{
        atomic::{Acquire, Atomic, Release},
        Arc, Mutex, SetOnce,
    },
};

/// Is told that the device has used buffers of a queue.
pub(crate) trait QueueHandler: Send + Sync + 'static {
    /// Runs in **hard interrupt** context: completes something or enqueues work, nothing more. May
    /// be called without reason.
    fn notify(&self, queue: usize);

    /// The device is reset for good and [`QueueHandler::notify`] called no more. What it has not answered
    /// comes back by [`Virtqueue::detach_unused`] now, and is dropped after.
    fn closed(&self);
}

/// A request to the device, the room for its reply, and what the driver wants to remember of it.
pub(crate) struct Transfer<T> {
    /// What the device reads.
    pub(crate) request: KVec<u8>,
    /// The driver's own.
    pub(crate) data: T,
    /// The room: its length never changes.
    reply: KVec<u8>,
    used: usize,
}

impl<T> Transfer<T> {
    /// An empty request with room for `request_capacity` bytes, and `reply_room` bytes of zeroes
    /// for the device to write.
    pub(crate) fn new(
        request_capacity: usize,
        reply_room: usize,
        data: T,
        flags: Flags,
    ) -> Result<KBox<Self>> {
        Ok(KBox::new(
            Self {
                request: KVec::with_capacity(request_capacity, flags)?,
                data,
                reply: KVec::from_elem(0, reply_room, flags)?,
                used: 0,
            },
            flags,
        )?)
    }

    /// What the device has written.
    pub(crate) fn reply(&self) -> &[u8] {
        &self.reply[..self.used]
    }
}

/// A ring of a bound device.
#[derive(Clone, Copy)]
struct Ring(NonNull<bindings::virtqueue>);

// SAFETY: A ring may be used by any thread, by one at a time but for `virtqueue_notify()`.
unsafe impl Send for Ring {}
// SAFETY: As above; whoever has a `&Ring` sees to that.
unsafe impl Sync for Ring {}

/// One queue, as shared by [`Queues`], [`Virtqueue`] and [`Notifier`].
#[pin_data]
struct Slot {
    #[pin]
    ring: Revocable<Ring>,
    /// Set once the queue has its [`Virtqueue`]: how to drop a transfer of it.
    drop_transfer: SetOnce<unsafe fn(*mut c_void)>,
    reset: Atomic<bool>,
}

impl Slot {
    /// Runs `f` with the ring, if it is still there. `f` must not sleep.
    fn with_ring<R>(&self, f: impl FnOnce(*mut bindings::virtqueue) -> R) -> Option<R> {
        self.ring.try_access_with(|ring| f(ring.0.as_ptr()))
    }
}

/// The rings of a device. Deletes them when it is dropped.
struct Rings<'bound, const N: usize> {
    dev: &'bound Device<Bound>,
    rings: [*mut bindings::virtqueue; N],
}

// SAFETY: Rings may be deleted by any thread.
unsafe impl<const N: usize> Send for Rings<'_, N> {}
// SAFETY: A shared one gives out nothing that changes.
unsafe impl<const N: usize> Sync for Rings<'_, N> {}

impl<const N: usize> Rings<'_, N> {
    /// Stops the device, if the bus has not done so already: it does between unbind and drop.
    fn reset(&self) {
        const DRIVER: u8 = bindings::VIRTIO_CONFIG_S_DRIVER as u8;
        let dev = self.dev.as_raw();
        // SAFETY: A bound device, or one being unbound. The broken rings and the callbacks that have
        // ended keep others from kicking a device that has been reset.
        unsafe {
            bindings::virtio_break_device(dev);
            bindings::farfault_c_virtio_synchronize_cbs(dev);
            if bindings::farfault_c_virtio_get_status(dev) & DRIVER != 0 {
                bindings::virtio_reset_device(dev);
            }
        }
    }
}

impl<const N: usize> Drop for Rings<'_, N> {
    fn drop(&mut self) {
        self.reset();
        // SAFETY: Found by `Queues::new`; the device is reset, so nobody uses them.
        unsafe { bindings::farfault_c_virtio_del_vqs(self.dev.as_raw()) };
    }
}

/// How far a device's queues are.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    Found,
    Ready,
    Reset,
}

/// All queues of a bound device, with the one who is told of used buffers.
///
/// Dropping it resets the device, makes every [`Virtqueue`] fail from then on, drops the transfers
/// that are still in flight, and deletes the rings.
///
/// # Invariants
///
/// The device's `priv` points to this value from `new` until its rings are deleted.
#[pin_data(PinnedDrop)]
pub(crate) struct Queues<'bound, H: QueueHandler, const N: usize> {
    #[pin]
    handler: H,
    rings: Rings<'bound, N>,
    slots: KVec<Arc<Slot>>,
    #[pin]
    stage: Mutex<Stage>,
}

impl<'bound, H: QueueHandler, const N: usize> Queues<'bound, H, N> {
    /// Finds the device's first `N` queues. In probe, once.
    pub(crate) fn new(
        dev: &'bound Device<Bound>,
        names: [&'static CStr; N],
        handler: impl PinInit<H, Error> + 'bound,
    ) -> impl PinInit<Self, Error> + 'bound {
        try_pin_init!(&this in Self {
            handler <- handler,
            rings: {
                let mut rings = [ptr::null_mut(); N];
                let mut info = names.map(|name| bindings::virtqueue_info {
                    name: name.as_char_ptr(),
                    callback: Some(Self::callback),
                    ctx: false,
                });
                // INVARIANT: Set before there are queues that could call.
                // SAFETY: A device in probe, whose `priv` is the driver's.
                unsafe { (*dev.as_raw()).priv_ = this.as_ptr().cast() };
                // SAFETY: Both arrays have `N` entries, and names are static.
                to_result(unsafe {
                    bindings::farfault_c_virtio_find_vqs(
                        dev.as_raw(),
                        N as u32,
                        rings.as_mut_ptr(),
                        info.as_mut_ptr(),
                    )
                })?;
                Rings { dev, rings }
            },
            slots: {
                let mut slots = KVec::with_capacity(N, GFP_KERNEL)?;
                for ring in rings.rings {
                    let ring = Ring(NonNull::new(ring).ok_or(EINVAL)?);
                    let slot = Arc::pin_init(
                        try_pin_init!(Slot {
                            ring <- Revocable::new(ring),
                            drop_transfer: SetOnce::new(),
                            reset: Atomic::new(false),
                        }),
                        GFP_KERNEL,
                    )?;
                    slots.push(slot, GFP_KERNEL)?;
                }
                slots
            },
            stage <- new_mutex!(Stage::Found),
        })
    }

    /// The queue with number `index`. Fails with `EBUSY` the second time, and `EINVAL`.
    pub(crate) fn queue<T: Send + 'static>(&self, index: usize) -> Result<Virtqueue<T>> {
        let slot = self.slots.get(index).ok_or(EINVAL)?;
        if !slot.drop_transfer.populate(drop_transfer::<T>) {
            return Err(EBUSY);
        }
        // INVARIANT: `populate` succeeds once.
        Ok(Virtqueue {
            slot: slot.clone(),
            _transfers: PhantomData,
        })
    }

    /// Tells the device that the driver is ready (`DRIVER_OK`): kicks and used buffers may come.
    pub(crate) fn ready(&self) {
        let mut stage = self.stage.lock();
        if *stage == Stage::Found {
            // SAFETY: A device whose queues are found, and which is not ready yet.
            unsafe { bindings::farfault_c_virtio_device_ready(self.rings.dev.as_raw()) };
            *stage = Stage::Ready;
        }
    }

    /// Stops the device. When it returns, no callback runs, the device touches no buffer, and
    /// [`Virtqueue::detach_unused`] gives back what was in flight. May sleep; harmless when repeated.
    pub(crate) fn reset(&self) {
        let mut stage = self.stage.lock();
        if *stage == Stage::Reset {
            return;
        }
        self.rings.reset();
        for slot in &self.slots {
            slot.reset.store(true, Release);
        }
        *stage = Stage::Reset;
    }

    /// # Safety
    ///
    /// Only for the transport: `vq` is a queue that `new` found.
    unsafe extern "C" fn callback(vq: *mut bindings::virtqueue) {
        // SAFETY: By the type invariant `priv` is a `Self`, whose handler was initialised before the
        // queues were found and is dropped only when the device is reset.
        let (handler, index) = unsafe {
            let this = (*(*vq).vdev).priv_.cast::<Self>();
            (&(*this).handler, (*vq).index)
        };
        handler.notify(index as usize);
    }
}

#[pinned_drop]
impl<H: QueueHandler, const N: usize> PinnedDrop for Queues<'_, H, N> {
    fn drop(self: Pin<&mut Self>) {
        self.reset();
        self.handler.closed();
        for (slot, ring) in self.slots.iter().zip(self.rings.rings) {
            // Waits for operations that are using the ring.
            slot.ring.revoke();
            let Some(drop_transfer) = slot.drop_transfer.as_ref() else {
                continue;
            };
            loop {
                // SAFETY: A ring of a device that is reset, and nobody else gets at it any more.
                let transfer = unsafe { bindings::virtqueue_detach_unused_buf(ring) };
                if transfer.is_null() {
                    break;
                }
                // SAFETY: All transfers in this ring are of the type that this function is for.
                unsafe { drop_transfer(transfer) };
            }
        }
    }
}

/// # Safety
///
/// `transfer` must be a `KBox<Transfer<T>>` that [`Virtqueue::add`] made raw, and be given away.
unsafe fn drop_transfer<T>(transfer: *mut c_void) {
    // SAFETY: By the function's contract.
    drop(unsafe { KBox::from_raw(transfer.cast::<Transfer<T>>()) });
}

/// One queue.
///
/// # Invariants
///
/// It is the only one of its slot, so every transfer in the ring is a `KBox<Transfer<T>>`.
pub(crate) struct Virtqueue<T> {
    slot: Arc<Slot>,
    _transfers: PhantomData<KBox<Transfer<T>>>,
}

impl<T> Virtqueue<T> {
    /// Puts a transfer in the ring. It comes back with the error if that fails: `ENOSPC` (full),
    /// `EIO` (broken), `ENODEV` (gone), `EINVAL` (neither request nor room for a reply).
    ///
    /// Needs no memory: an indirect table is made if there is some at once.
    pub(crate) fn add(
        &mut self,
        mut transfer: KBox<Transfer<T>>,
    ) -> Result<(), (Error, KBox<Transfer<T>>)> {
        transfer.used = 0;
        let (out, room) = (transfer.request.len(), transfer.reply.len());
        if out == 0 && room == 0 {
            return Err((EINVAL, transfer));
        }
        let raw = KBox::into_raw(transfer);
        let added = self.slot.with_ring(|ring| {
            let mut lists = [bindings::scatterlist::default(); 2];
            let [request, reply] = &mut lists;
            // SAFETY: `raw` is a valid transfer. Its buffers are kmalloc memory, which no one else
            // touches until the ring gives the transfer back.
            unsafe {
                if out != 0 {
                    let bytes = (*raw).request.as_mut_ptr().cast();
                    bindings::sg_init_one(request, bytes, out as u32);
                }
                if room != 0 {
                    let bytes = (*raw).reply.as_mut_ptr().cast();
                    bindings::sg_init_one(reply, bytes, room as u32);
                }
            }
            let mut both: [*mut bindings::scatterlist; 2] = [request, reply];
            let used = if out != 0 {
                &mut both[..]
            } else {
                &mut both[1..]
            };
            // SAFETY: The ring is there; `&mut self` serialises. The lists are read now only.
            to_result(unsafe {
                bindings::virtqueue_add_sgs(
                    ring,
                    used.as_mut_ptr(),
                    u32::from(out != 0),
                    u32::from(room != 0),
                    raw.cast(),
                    bindings::GFP_NOWAIT | bindings::__GFP_NOWARN,
                )
            })
        });
        match added.unwrap_or(Err(ENODEV)) {
            Ok(()) => Ok(()),
            // SAFETY: The ring has not taken it.
            Err(error) => Err((error, unsafe { KBox::from_raw(raw) })),
        }
    }

    /// The next transfer that the device is done with.
    pub(crate) fn take(&mut self) -> Option<KBox<Transfer<T>>> {
        let mut written = 0;
        let raw = self.slot.with_ring(|ring| {
            // SAFETY: The ring is there; `&mut self` serialises.
            unsafe { bindings::virtqueue_get_buf(ring, &mut written) }
        })?;
        let mut transfer = Self::from_ring(raw)?;
        transfer.used = transfer.reply.len().min(written as usize);
        Some(transfer)
    }

    /// Whether the device wants to be told of what was added: [`Notifier::notify`] then.
    pub(crate) fn kick_prepare(&mut self) -> bool {
        self.slot
            // SAFETY: The ring is there; `&mut self` serialises.
            .with_ring(|ring| unsafe { bindings::virtqueue_kick_prepare(ring) })
            .unwrap_or(false)
    }

    /// Asks the device not to interrupt for this queue: a hint.
    pub(crate) fn disable_callbacks(&mut self) {
        // Without a ring there are none.
        let _ = self
            .slot
            // SAFETY: The ring is there; `&mut self` serialises.
            .with_ring(|ring| unsafe { bindings::virtqueue_disable_cb(ring) });
    }

    /// Asks it to interrupt again. `false`: there is something to take already, for which it will not.
    pub(crate) fn enable_callbacks(&mut self) -> bool {
        self.slot
            // SAFETY: The ring is there; `&mut self` serialises.
            .with_ring(|ring| unsafe { bindings::virtqueue_enable_cb(ring) })
            .unwrap_or(true)
    }

    /// What tells the device, outside of the lock that serialises the queue.
    pub(crate) fn notifier(&self) -> Notifier {
        Notifier(self.slot.clone())
    }

    /// A transfer that the device never got to. Only once [`Queues::reset`] has returned.
    pub(crate) fn detach_unused(&mut self) -> Option<KBox<Transfer<T>>> {
        if !self.slot.reset.load(Acquire) {
            return None;
        }
        let raw = self
            .slot
            // SAFETY: The ring is there, its device is reset; `&mut self` serialises.
            .with_ring(|ring| unsafe { bindings::virtqueue_detach_unused_buf(ring) })?;
        Self::from_ring(raw)
    }

    /// Free descriptors. A transfer takes two at most.
    pub(crate) fn free(&self) -> usize {
        self.slot
            // SAFETY: The ring is there; whoever changes the number has `&mut self`.
            .with_ring(|ring| unsafe { (*ring).num_free as usize })
            .unwrap_or(0)
    }

    /// What a ring gave back.
    fn from_ring(raw: *mut c_void) -> Option<KBox<Transfer<T>>> {
        // SAFETY: By the type invariant rings hold what `add` put there, and give it back once.
        (!raw.is_null()).then(|| unsafe { KBox::from_raw(raw.cast()) })
    }
}

/// Tells the device that a queue has new buffers.
#[derive(Clone)]
pub(crate) struct Notifier(Arc<Slot>);

impl Notifier {
    /// `false` if the queue is broken or gone. Does not sleep.
    pub(crate) fn notify(&self) -> bool {
        self.0
            // SAFETY: The ring is there; a notification needs no serialisation.
            .with_ring(|ring| unsafe { bindings::virtqueue_notify(ring) })
            .unwrap_or(false)
    }
}
