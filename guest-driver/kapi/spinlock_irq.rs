// SPDX-License-Identifier: GPL-2.0
//! A spinlock that may be taken in interrupts too, which `kernel::sync` lacks: interrupts are off on
//! this CPU while it is held.
//!
//! C header: `include/linux/spinlock.h` (`spin_lock_irqsave`).

use crate::bindings;
use kernel::sync::lock::{Backend, Lock};

/// The lock.
pub(crate) type SpinLockIrq<T> = Lock<T, SpinLockIrqBackend>;

/// `spin_lock_irqsave()` and its counterparts.
pub(crate) struct SpinLockIrqBackend;

// SAFETY: The underlying spinlock ensures mutual exclusion.
unsafe impl Backend for SpinLockIrqBackend {
    type State = bindings::spinlock_t;
    /// Whether interrupts were on.
    type GuardState = usize;

    unsafe fn init(
        ptr: *mut Self::State,
        name: *const kernel::ffi::c_char,
        key: *mut bindings::lock_class_key,
    ) {
        // SAFETY: By the function's contract `ptr` is valid for writes, and name and key for ever.
        unsafe { bindings::__spin_lock_init(ptr, name, key) }
    }

    unsafe fn lock(ptr: *mut Self::State) -> Self::GuardState {
        // SAFETY: By the function's contract the lock is initialised.
        unsafe { bindings::farfault_c_spin_lock_irqsave(ptr) }
    }

    unsafe fn unlock(ptr: *mut Self::State, guard_state: &Self::GuardState) {
        // SAFETY: By the function's contract the caller owns the lock, taken with this state.
        unsafe { bindings::farfault_c_spin_unlock_irqrestore(ptr, *guard_state) }
    }

    unsafe fn try_lock(ptr: *mut Self::State) -> Option<Self::GuardState> {
        let mut flags = 0;
        // SAFETY: By the function's contract the lock is initialised.
        unsafe { bindings::farfault_c_spin_trylock_irqsave(ptr, &mut flags) }.then_some(flags)
    }

    unsafe fn assert_is_held(ptr: *mut Self::State) {
        // SAFETY: By the function's contract the lock is initialised.
        unsafe { bindings::spin_assert_is_held(ptr) }
    }
}

/// Makes a [`SpinLockIrq`] with a lock class of its own.
macro_rules! new_spinlock_irq {
    ($inner:expr) => {
        $crate::kapi::spinlock_irq::SpinLockIrq::new(
            $inner,
            ::kernel::optional_name!(),
            ::kernel::static_lock_class!(),
        )
    };
}
pub(crate) use new_spinlock_irq;
