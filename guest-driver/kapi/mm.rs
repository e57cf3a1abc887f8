// SPDX-License-Identifier: GPL-2.0
//! The mmap lock of an address space, and the VMAs that may be looked at under it.
//!
//! `kernel::mm` has the reference counts (`ARef<Mm>` is `mmgrab`, `ARef<MmWithUser>` is `mmget`)
//! and a guard; this adds what it keeps to itself: whose lock a guard holds, the next VMA, and what
//! a VMA is. [`Vma`] is under the **mmap** lock always, which `kernel::mm::virt::VmaRef` does not
//! promise (it may be under the VMA's own).
//!
//! C header: `include/linux/mm.h`.

use crate::bindings;
use core::{ops::Deref, ptr};
use kernel::{
    mm::{
        virt::{flags, vm_flags_t, VmaRef},
        Mm, MmWithUser, MmapReadGuard,
    },
    page::PAGE_SIZE,
    prelude::*,
    sync::aref::ARef,
    time::{delay::fsleep, Delta},
};

/// How often [`MmapLock::read_soon`] looks, and the pause between.
const LOOKS: usize = 20;
const PAUSE: Delta = Delta::from_millis(1);

/// Order of what an entry of the third level maps as a whole.
pub(crate) const PUD_ORDER: u32 = 18;

/// Beyond the addresses of all processes: four levels of page tables, as the GPU has them.
pub(crate) const ADDRESS_LIMIT: usize = 1 << 47;
/// Where the addresses of a process end: a page before that.
pub(crate) const TASK_SIZE: usize = ADDRESS_LIMIT - PAGE_SIZE;

/// The caller's address space. `None` in a kernel thread.
pub(crate) fn current_mm() -> Option<ARef<Mm>> {
    current!().mm().map(|mm| ARef::<Mm>::from(&**mm))
}

/// Whether both are the same address space.
pub(crate) fn same_mm(a: &Mm, b: &Mm) -> bool {
    ptr::eq(a.as_raw(), b.as_raw())
}

/// Whether `mm` is the caller's.
pub(crate) fn is_current_mm(mm: &Mm) -> bool {
    current!().mm().is_some_and(|current| same_mm(current, mm))
}

/// The mmap lock of `mm`, held for reading.
///
/// # Invariants
///
/// `guard` is of `mm`.
pub(crate) struct MmapLock<'mm> {
    mm: &'mm MmWithUser,
    _guard: MmapReadGuard<'mm>,
}

impl<'mm> MmapLock<'mm> {
    /// Takes the lock; may sleep.
    pub(crate) fn read(mm: &'mm MmWithUser) -> Self {
        // INVARIANT: The guard is made from `mm`.
        Self {
            mm,
            _guard: mm.mmap_read_lock(),
        }
    }

    /// Somebody else has given the lock up.
    ///
    /// # Safety
    ///
    /// So it is.
    pub(super) unsafe fn was_given_up(self) {
        core::mem::forget(self);
    }

    /// Takes the lock if it can be had in a while: `None` if not. May sleep.
    pub(crate) fn read_soon(mm: &'mm MmWithUser) -> Option<Self> {
        for _ in 0..LOOKS {
            if let Some(guard) = mm.mmap_read_trylock() {
                // INVARIANT: The guard is made from `mm`.
                return Some(Self { mm, _guard: guard });
            }
            fsleep(PAUSE);
        }
        None
    }

    /// Whose lock this is.
    pub(crate) fn mm(&self) -> &'mm MmWithUser {
        self.mm
    }

    /// The VMA that `address` is in.
    pub(crate) fn vma_lookup(&self, address: usize) -> Option<Vma<'_>> {
        self.find_vma(address).filter(|vma| vma.start() <= address)
    }

    /// The first VMA that ends above `address`: the one it is in, or else the next.
    pub(crate) fn find_vma(&self, address: usize) -> Option<Vma<'_>> {
        // SAFETY: `mm` has users and its mmap lock is held.
        let vma = unsafe { bindings::find_vma(self.mm.as_raw(), address) };
        // SAFETY: A VMA of `mm`, which stays as it is while the mmap lock is held.
        (!vma.is_null()).then(|| unsafe { Vma::from_raw(vma) })
    }
}

/// A VMA under the mmap lock of its address space.
///
/// # Invariants
///
/// The mmap lock is held for at least `'a`.
#[derive(Clone, Copy)]
pub(crate) struct Vma<'a>(&'a VmaRef);

impl<'a> Vma<'a> {
    /// # Safety
    ///
    /// `vma` must be valid, with its mmap lock held, for `'a`.
    pub(super) unsafe fn from_raw(vma: *const bindings::vm_area_struct) -> Self {
        // INVARIANT: By the function's contract.
        // SAFETY: By the function's contract.
        Self(unsafe { VmaRef::from_raw(vma) })
    }

    /// Private memory without a file behind it: what can move to device memory.
    pub(crate) fn is_anonymous(&self) -> bool {
        // SAFETY: A valid VMA.
        unsafe { bindings::farfault_c_vma_is_anonymous(self.0.as_ptr()) }
    }

    /// Loads are allowed. Without, it may be no more than reserved addresses.
    pub(crate) fn is_readable(&self) -> bool {
        self.has(flags::READ)
    }

    /// Stores are allowed.
    pub(crate) fn is_writable(&self) -> bool {
        self.has(flags::WRITE)
    }

    /// Other processes may have it, too, and see what is written.
    pub(crate) fn is_shared(&self) -> bool {
        self.has(flags::SHARED)
    }

    /// Of hugetlbfs.
    pub(crate) fn is_hugetlb(&self) -> bool {
        self.has(flags::HUGETLB)
    }

    /// `VM_SPECIAL`: of a device driver, not to be touched by anybody else.
    pub(crate) fn is_special(&self) -> bool {
        self.has(flags::IO | flags::DONTEXPAND | flags::PFNMAP | flags::MIXEDMAP)
    }

    /// Whether `migrate_vma_setup()` takes it. Only anonymous memory really moves to a device.
    pub(crate) fn can_migrate(&self) -> bool {
        // SAFETY: A valid VMA.
        let dax = unsafe { bindings::farfault_c_vma_is_dax(self.0.as_ptr()) };
        !(self.is_hugetlb() || self.is_special() || dax)
    }

    /// Whether any of `mask` is set.
    fn has(&self, mask: vm_flags_t) -> bool {
        self.0.flags() & mask != 0
    }
}

impl Deref for Vma<'_> {
    type Target = VmaRef;

    fn deref(&self) -> &VmaRef {
        self.0
    }
}
