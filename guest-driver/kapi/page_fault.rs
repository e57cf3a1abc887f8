// SPDX-License-Identifier: GPL-2.0
//! Page faults of memory that `hmm_range_fault()` must not be asked to fault in. They are taken here first,
//! one at a time.
//!
//! - A userfaultfd watches it. Its handler, a program, is waited for, with a time limit: whoever wants the
//!   page comes again. `hmm_range_fault()` keeps the mmap lock, and without giving that up nobody may wait
//!   for a handler: the core fails such a fault. So does `make_device_exclusive()`.
//! - It is of hugetlbfs: `hmm_range_fault()` would take its locks in the wrong order
//!   (`docs/kernel-findings.md`, 8).
//!
//! Must not know who wants the page. Locks: the mmap lock, which is given up.
//!
//! C headers: `include/linux/mm.h`, `include/linux/userfaultfd_k.h`, `include/linux/hrtimer.h`.

use super::mm::{MmapLock, Vma};
use crate::bindings;
use kernel::{
    impl_has_hr_timer,
    prelude::*,
    sync::aref::ARef,
    task::Task,
    time::{
        hrtimer::{
            HrTimer, HrTimerCallback, HrTimerCallbackContext, HrTimerPointer, HrTimerRestart,
            RelativeMode,
        },
        Delta, Monotonic,
    },
};

const WRITE: u32 = bindings::fault_flag_FAULT_FLAG_WRITE;
const FLAGS: u32 = bindings::fault_flag_FAULT_FLAG_REMOTE
    | bindings::fault_flag_FAULT_FLAG_ALLOW_RETRY
    | bindings::fault_flag_FAULT_FLAG_KILLABLE;

const RETRY: u32 = bindings::vm_fault_reason_VM_FAULT_RETRY;
const COMPLETED: u32 = bindings::vm_fault_reason_VM_FAULT_COMPLETED;
const OOM: u32 = bindings::vm_fault_reason_VM_FAULT_OOM;
/// `VM_FAULT_ERROR`, without what only large pages have.
const REFUSED: u32 = bindings::vm_fault_reason_VM_FAULT_SIGBUS
    | bindings::vm_fault_reason_VM_FAULT_SIGSEGV
    | bindings::vm_fault_reason_VM_FAULT_HWPOISON
    | bindings::vm_fault_reason_VM_FAULT_HWPOISON_LARGE;

/// Wakes a task again and again, so that none of its sleeps is without a limit.
#[pin_data]
struct Alarm {
    #[pin]
    timer: HrTimer<Self>,
    task: ARef<Task>,
    period: Delta,
}

impl HrTimerCallback for Alarm {
    type Pointer<'a> = Pin<KBox<Self>>;

    fn run(this: Pin<&mut Self>, mut context: HrTimerCallbackContext<'_, Self>) -> HrTimerRestart {
        this.task.wake_up();
        context.forward_now(this.period);
        HrTimerRestart::Restart
    }
}

impl_has_hr_timer! {
    impl HasHrTimer<Self> for Alarm {
        mode: RelativeMode<Monotonic>, field: self.timer
    }
}

impl Vma<'_> {
    /// Whether a userfaultfd watches it.
    pub(crate) fn has_userfaultfd(&self) -> bool {
        // SAFETY: A valid VMA.
        unsafe { bindings::farfault_c_userfaultfd_armed(self.as_ptr()) }
    }

    /// Whether its pages are to be faulted in by [`fault_in`].
    pub(crate) fn faults_by_itself(&self) -> bool {
        self.has_userfaultfd() || self.is_hugetlb()
    }
}

/// Faults one page in, for loads, or for stores too. `Ok(false)`: the handler was told, and has not
/// answered within `limit`, or the page is locked. `Ok(true)` says only that it may be worth to look again.
///
/// Fails with `EFAULT` and `EPERM` (not mapped so, or the handler says so), and `ENOMEM`.
pub(crate) fn fault_in(
    lock: MmapLock<'_>,
    address: usize,
    write: bool,
    limit: Delta,
) -> Result<bool> {
    let vma = lock.vma_lookup(address).ok_or(EFAULT)?;
    let allowed = if write {
        vma.is_writable()
    } else {
        vma.is_readable()
    };
    if !allowed {
        return Err(EPERM);
    }
    let vma = vma.as_ptr();
    let task = ARef::from(&**current!());
    let alarm = KBox::pin_init(
        pin_init!(Alarm {
            timer <- HrTimer::new(),
            task,
            period: limit,
        }),
        GFP_KERNEL,
    )?;
    let alarm = alarm.start(limit);
    let flags = FLAGS | if write { WRITE } else { 0 };
    // SAFETY: The VMA is of the address space whose mmap lock is held, and the address in it.
    let fault = unsafe { bindings::handle_mm_fault(vma, address, flags, core::ptr::null_mut()) };
    drop(alarm);
    if fault & (RETRY | COMPLETED) != 0 {
        // SAFETY: With these answers the core has given the lock up.
        unsafe { lock.was_given_up() };
    }
    match fault {
        fault if fault & OOM != 0 => Err(ENOMEM),
        fault if fault & REFUSED != 0 => Err(EFAULT),
        fault => Ok(fault & RETRY == 0),
    }
}
