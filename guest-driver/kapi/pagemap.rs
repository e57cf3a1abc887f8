// SPDX-License-Identifier: GPL-2.0
//! `dev_pagemap` of type `MEMORY_DEVICE_PRIVATE`: struct pages for memory that CPUs cannot reach.
//!
//! A [`DevicePagemap`] knows which of its pages are in use, so that no page is ever taken twice;
//! which one to take, and what is in it, is up to its [`PagemapOps`]. The calls of the memory
//! management core get at the whole pagemap, and through it at the driver's data in it.
//!
//! Locks: none of its own (an atomic bitmap). `folio_free` may be called in atomic context,
//! `migrate_to_ram` with the mmap lock and the page's lock held.
//!
//! C header: `include/linux/memremap.h`.

use super::{
    folio::{DeviceFolio, Pfn, PMD_ORDER, PMD_PAGES},
    mm::Vma,
};
use crate::bindings;
use core::{ops::Deref, ptr::NonNull};
use kernel::{
    container_of,
    error::from_err_ptr,
    page::{PAGE_SHIFT, PAGE_SIZE},
    prelude::*,
    sync::atomic::{Atomic, Full, Relaxed},
    types::Opaque,
};

/// A page of device memory, by its number in the pagemap.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct DevicePage(pub(crate) usize);

/// The identity of a pagemap, by which the core tells its pages from those of others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Owner(usize);

impl Owner {
    pub(super) fn as_ptr(self) -> *mut c_void {
        self.0 as *mut c_void
    }
}

/// How a CPU's fault ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum VmFault {
    /// The page is in system memory, or somebody else saw to it: try again.
    Done,
    /// No memory now: try again later.
    Oom,
    /// The data is lost: the task gets `SIGBUS`.
    SigBus,
}

/// What a driver does for its pagemap.
pub(crate) trait PagemapOps: Sized + Send + Sync + 'static {
    /// Nobody uses the folio at `page` any more; it may be taken again at once.
    ///
    /// May run in atomic context, under locks of the memory management core: must not sleep.
    fn folio_free(map: &DevicePagemap<Self>, page: DevicePage, order: u32);

    /// A CPU touched a page. Brings it back to system memory; must end within limited time.
    fn migrate_to_ram(map: &DevicePagemap<Self>, fault: &Fault<'_>) -> VmFault;
}

/// A range of physical addresses that stands for the device's memory.
struct Region {
    start: usize,
    len: usize,
}

impl Region {
    fn request(name: &'static CStr, len: usize) -> Result<Self> {
        // SAFETY: The resource is a valid static, the name is static.
        let resource = from_err_ptr(unsafe {
            bindings::request_free_mem_region(
                &raw mut bindings::iomem_resource,
                len,
                name.as_char_ptr(),
            )
        })?;
        // SAFETY: A valid resource, ours until it is released. The core rounds its size up.
        let (start, end) = unsafe { ((*resource).start, (*resource).end) };
        Ok(Self {
            start: start as usize,
            len: (end - start + 1) as usize,
        })
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: Requested in `request()` with these bounds, and mapped no longer.
        unsafe { bindings::farfault_c_release_mem_region(self.start as u64, self.len as u64) };
    }
}

/// Which pages are in use.
struct InUse {
    words: KVVec<Atomic<u64>>,
    count: Atomic<usize>,
}

impl InUse {
    fn new(pages: usize) -> Result<Self> {
        let n = pages.div_ceil(64);
        let mut words = KVVec::with_capacity(n, GFP_KERNEL)?;
        for _ in 0..n {
            words
                .push_within_capacity(Atomic::new(0))
                .map_err(|_| ENOMEM)?;
        }
        Ok(Self {
            words,
            count: Atomic::new(0),
        })
    }

    /// The words of the `1 << order` pages from `page` on, and which of their bits are meant.
    /// `page` must be aligned to the order.
    fn parts(&self, page: usize, order: u32) -> (&[Atomic<u64>], u64) {
        let (word, bit) = (page / 64, page % 64);
        if order >= 6 {
            (&self.words[word..word + (1 << (order - 6))], u64::MAX)
        } else {
            let ones = (1u64 << (1 << order)) - 1;
            (&self.words[word..=word], ones << bit)
        }
    }

    /// Takes all of the pages, or none if any is in use.
    fn take(&self, page: usize, order: u32) -> Result {
        let (words, mask) = self.parts(page, order);
        for (i, word) in words.iter().enumerate() {
            if !set_all(word, mask) {
                words[..i].iter().for_each(|word| clear(word, mask));
                return Err(EBUSY);
            }
        }
        self.count.fetch_add(1 << order, Relaxed);
        Ok(())
    }

    fn release(&self, page: usize, order: u32) {
        let (words, mask) = self.parts(page, order);
        words.iter().for_each(|word| clear(word, mask));
        self.count.fetch_sub(1 << order, Relaxed);
    }
}

/// Sets the bits of `mask` if all of them are clear.
fn set_all(word: &Atomic<u64>, mask: u64) -> bool {
    let mut old = word.load(Relaxed);
    while old & mask == 0 {
        match word.cmpxchg(old, old | mask, Full) {
            Ok(_) => return true,
            Err(now) => old = now,
        }
    }
    false
}

/// Clears the bits of `mask`.
fn clear(word: &Atomic<u64>, mask: u64) {
    let mut old = word.load(Relaxed);
    while let Err(now) = word.cmpxchg(old, old & !mask, Full) {
        old = now;
    }
}

/// A registered pagemap, and the driver's data that belongs to it (it dereferences to the data).
///
/// Dropping it waits until no page is in use, **for ever if need be**: bring all pages home first
/// ([`super::migrate::Collected::device_range`]) and see that [`DevicePagemap::in_use`] is zero.
///
/// # Invariants
///
/// - `map` is registered for `pages` pages from `base` on.
/// - A page has its bit set in `in_use` from before it is initialised until its `folio_free`.
#[pin_data(PinnedDrop)]
pub(crate) struct DevicePagemap<T: PagemapOps> {
    #[pin]
    data: T,
    base: usize,
    pages: usize,
    in_use: InUse,
    dying: Atomic<bool>,
    #[pin]
    map: Opaque<bindings::dev_pagemap>,
    _region: Region,
}

// SAFETY: A pagemap may be used and unregistered from any thread; `T` is `Send`.
unsafe impl<T: PagemapOps> Send for DevicePagemap<T> {}
// SAFETY: Shared methods only use atomics and what the core synchronises; `T` is `Sync`.
unsafe impl<T: PagemapOps> Sync for DevicePagemap<T> {}

impl<T: PagemapOps> DevicePagemap<T> {
    const OPS: bindings::dev_pagemap_ops = bindings::dev_pagemap_ops {
        folio_free: Some(Self::folio_free_callback),
        migrate_to_ram: Some(Self::migrate_to_ram_callback),
        memory_failure: None,
        // The driver finds a page's memory by the page's number, so a split changes nothing for it.
        folio_split: None,
    };

    /// Registers `pages` pages, a multiple of 512, named `name` in `/proc/iomem`.
    ///
    /// Fails with `EINVAL`, `ENOMEM`, or `ERANGE` where there are not enough physical addresses.
    pub(crate) fn new<'a>(
        name: &'static CStr,
        pages: usize,
        data: impl PinInit<T, Error> + 'a,
    ) -> impl PinInit<Self, Error> + 'a
    where
        T: 'a,
    {
        pin_init::pin_init_scope(move || {
            if pages == 0 || pages % PMD_PAGES != 0 {
                return Err(EINVAL);
            }
            let len = pages.checked_mul(PAGE_SIZE).ok_or(EINVAL)?;
            let region = Region::request(name, len)?;
            let start = region.start;
            let in_use = InUse::new(pages)?;
            Ok(try_pin_init!(Self {
                data <- data,
                base: start >> PAGE_SHIFT,
                pages,
                in_use,
                dying: Atomic::new(false),
                map <- Opaque::try_ffi_init(move |slot: *mut bindings::dev_pagemap| {
                    // SAFETY: `slot` is a valid place, and a `dev_pagemap` may be all zero.
                    unsafe {
                        slot.write_bytes(0, 1);
                        (*slot).type_ = bindings::memory_type_MEMORY_DEVICE_PRIVATE;
                        (*slot).ops = &Self::OPS;
                        (*slot).owner = slot.cast();
                        (*slot).nr_range = 1;
                        let range = (*slot).__bindgen_anon_1.range.as_mut();
                        range.start = start as u64;
                        range.end = (start + len - 1) as u64;
                    }
                    // SAFETY: Pinned, initialised, and unregistered before it goes away.
                    let mapped = unsafe { bindings::memremap_pages(slot, bindings::NUMA_NO_NODE) };
                    from_err_ptr(mapped).map(|_| ())
                }),
                _region: region,
            }? Error))
        })
    }

    /// By what the core knows its pages.
    pub(crate) fn owner(&self) -> Owner {
        Owner(self.map.get() as usize)
    }

    /// How many pages it has.
    pub(crate) fn pages(&self) -> usize {
        self.pages
    }

    /// How many of them are in use.
    pub(crate) fn in_use(&self) -> usize {
        self.in_use.count.load(Relaxed)
    }

    /// The page behind `pfn`, if it is one of this pagemap.
    pub(crate) fn lookup(&self, pfn: Pfn) -> Option<DevicePage> {
        let page = pfn.0.wrapping_sub(self.base);
        (page < self.pages).then_some(DevicePage(page))
    }

    /// The frame number of a page.
    pub(super) fn pfn(&self, page: DevicePage) -> Pfn {
        Pfn(self.base + page.0)
    }

    /// Takes a folio into use. `order` is 0 or [`PMD_ORDER`], and `page` aligned to it.
    ///
    /// Fails with `EBUSY` if any of the pages is in use, `EINVAL`, or `ENODEV` once the pagemap is
    /// being dropped.
    pub(crate) fn init_folio(&self, page: DevicePage, order: u32) -> Result<DeviceFolio> {
        if order != 0 && order != PMD_ORDER {
            return Err(EINVAL);
        }
        if page.0 >= self.pages || page.0 % (1 << order) != 0 {
            return Err(EINVAL);
        }
        if self.dying.load(Relaxed) {
            return Err(ENODEV);
        }
        self.in_use.take(page.0, order)?;
        // INVARIANT: The pages' bits are set.
        // SAFETY: The frame is one of ours, and nobody uses it: its bits were clear. `pages` is a
        // multiple of `PMD_PAGES`, so the whole folio is in the pagemap.
        unsafe {
            let folio = bindings::farfault_c_pfn_to_page(self.pfn(page).0).cast();
            bindings::farfault_c_zone_device_folio_init(folio, self.map.get(), order);
            Ok(DeviceFolio::from_raw(NonNull::new_unchecked(folio), order))
        }
    }

    /// # Safety
    ///
    /// `folio` must be of a pagemap that a `DevicePagemap<T>` registered, and in use for `'a`.
    unsafe fn from_folio<'a>(folio: *const bindings::folio) -> &'a Self {
        // SAFETY: By the function's contract the folio's pagemap is the `map` of a live `Self`,
        // whose drop waits for the folio.
        unsafe {
            let map = Opaque::cast_from(bindings::farfault_c_folio_pgmap(folio));
            &*container_of!(map.cast_mut(), Self, map)
        }
    }

    /// # Safety
    ///
    /// Only for the core: `folio` has lost its last reference.
    unsafe extern "C" fn folio_free_callback(folio: *mut bindings::folio) {
        // SAFETY: The core calls this for folios of our pagemaps, and counts them as in use until
        // it returns.
        let this = unsafe { Self::from_folio(folio) };
        // SAFETY: Nobody else uses the folio, so its order stays as it is.
        let (pfn, order) = unsafe {
            (
                bindings::farfault_c_folio_pfn(folio),
                bindings::farfault_c_folio_order(folio),
            )
        };
        let page = DevicePage(pfn - this.base);
        this.in_use.release(page.0, order);
        T::folio_free(this, page, order);
    }

    /// # Safety
    ///
    /// Only for the core: `vmf` is a fault on a page of our pagemap, which is locked and held.
    unsafe extern "C" fn migrate_to_ram_callback(
        vmf: *mut bindings::vm_fault,
    ) -> bindings::vm_fault_t {
        // SAFETY: The core calls this with a valid fault on a page of our pagemap.
        let (this, fault) = unsafe {
            let folio = bindings::farfault_c_page_folio((*vmf).page);
            (Self::from_folio(folio), Fault { vmf: &*vmf })
        };
        match T::migrate_to_ram(this, &fault) {
            VmFault::Done => 0,
            VmFault::Oom => bindings::vm_fault_reason_VM_FAULT_OOM,
            VmFault::SigBus => bindings::vm_fault_reason_VM_FAULT_SIGBUS,
        }
    }
}

impl<T: PagemapOps> Deref for DevicePagemap<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.data
    }
}

#[pinned_drop]
impl<T: PagemapOps> PinnedDrop for DevicePagemap<T> {
    fn drop(self: Pin<&mut Self>) {
        self.dying.store(true, Relaxed);
        // SAFETY: Registered by the type invariant. It waits until all pages are free; the region
        // and the data are dropped after it.
        unsafe { bindings::memunmap_pages(self.map.get()) };
    }
}

/// A CPU's fault on a device page, while the core holds the mmap lock, the page's lock and a
/// reference on it.
pub(crate) struct Fault<'a> {
    vmf: &'a bindings::vm_fault,
}

impl Fault<'_> {
    /// The page that was touched.
    pub(crate) fn address(&self) -> usize {
        self.vmf.__bindgen_anon_1.address & kernel::page::PAGE_MASK
    }

    /// [`PMD_ORDER`] if one PMD entry maps the whole folio, else 0.
    ///
    /// The core cannot split a folio during such a fault (it holds a reference that the split does
    /// not expect): it takes one destination of the same order, or nothing moves.
    pub(crate) fn order(&self) -> u32 {
        if self.vmf.pte.is_null() {
            PMD_ORDER
        } else {
            0
        }
    }

    /// Where the fault happened.
    pub(crate) fn vma(&self) -> Vma<'_> {
        // SAFETY: The core holds the mmap lock, not only the VMA's, during `migrate_to_ram`.
        unsafe { Vma::from_raw(self.vmf.__bindgen_anon_1.vma) }
    }

    /// The device page: [`DevicePagemap::lookup`] knows which.
    pub(crate) fn pfn(&self) -> Pfn {
        // SAFETY: The core holds a reference on the page.
        Pfn(unsafe { bindings::farfault_c_page_to_pfn(self.vmf.page) })
    }

    pub(super) fn page(&self) -> *mut bindings::page {
        self.vmf.page
    }
}
