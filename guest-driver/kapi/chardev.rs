// SPDX-License-Identifier: GPL-2.0
//! Misc devices whose open files outlive them.
//!
//! `kernel::miscdevice` leaves `file_operations::owner` empty, so a module can go away under an
//! open file, and has no `poll`. Here an open file pins the module (the core sees to that by the
//! owner) and has a value of its own; the device may be deregistered under it.
//!
//! The core opens files with a mutex held that all misc devices of the machine share. So an open only
//! notes whose address space it is, and the file's value is made by its first call.
//!
//! C headers: `include/linux/miscdevice.h`, `include/linux/fs.h`.

use super::mm;
use crate::bindings;
use kernel::{
    container_of,
    error::to_result,
    fs::File,
    mm::{virt::VmaNew, Mm},
    new_mutex, new_poll_condvar,
    prelude::*,
    str::CString,
    sync::{
        aref::ARef,
        atomic::{Atomic, Full, Relaxed},
        poll::{PollCondVar, PollTable},
        Arc, Mutex, SetOnce,
    },
    types::{ForeignOwnable, Opaque},
};

/// There is something to read.
pub(crate) const POLLIN: u32 = bindings::POLLIN | bindings::POLLRDNORM;
/// Something is wrong.
pub(crate) const POLLERR: u32 = bindings::POLLERR;
/// The other side is gone.
pub(crate) const POLLHUP: u32 = bindings::POLLHUP;

/// What an open file does; a value for each.
pub(crate) trait FileOps: Sized + Send + Sync + 'static {
    /// What all files of a device share.
    type Shared: Send + Sync + 'static;

    /// Somebody opens the device, with a mutex of all misc devices held: whether he may. It must not wait
    /// for anything.
    fn check(shared: &Self::Shared) -> Result;

    /// Whether the caller may use a file that `opener` has opened.
    fn may_call(opener: &Mm) -> Result;

    /// The first call of a file that `opener` has opened; the next one tries again if it fails. `EINTR`
    /// restarts the call. `ready` is to be notified of what [`FileOps::poll`] would say.
    fn open(shared: &Arc<Self::Shared>, opener: &Mm, ready: &Arc<PollCondVar>) -> Result<Self>;

    /// `arg` is a user pointer or a number; 32-bit programs' pointers are converted.
    fn ioctl(&self, cmd: u32, arg: usize) -> Result<isize>;

    /// What is ready, of `POLLIN` and so on; `None` stands for a file without a call yet. Whoever may not
    /// call may ask this, and locks may be held that others need: it must not wait for anything.
    fn poll(shared: &Self::Shared, this: Option<&Self>) -> u32;

    /// Notified of what [`FileOps::poll`] would say of all files.
    fn all_ready(shared: &Self::Shared) -> &PollCondVar;

    /// Somebody maps the device, with his mmap lock held. `ENODEV`: it cannot be.
    fn mmap(_vma: &VmaNew) -> Result {
        Err(ENODEV)
    }

    /// The last close, if there was a call. Work that was queued may still go on.
    fn release(&self);
}

/// An open file.
#[pin_data]
struct Opened<F: FileOps> {
    shared: Arc<F::Shared>,
    opener: ARef<Mm>,
    ready: Arc<PollCondVar>,
    /// One first call at a time.
    #[pin]
    first: Mutex<()>,
    ops: SetOnce<F>,
}

impl<F: FileOps> Opened<F> {
    fn new(shared: &Arc<F::Shared>) -> Result<Pin<KBox<Self>>> {
        F::check(shared)?;
        let opener = mm::current_mm().ok_or(EINVAL)?;
        let ready = Arc::pin_init(new_poll_condvar!(), GFP_KERNEL)?;
        KBox::pin_init(
            try_pin_init!(Self {
                shared: shared.clone(),
                opener,
                ready,
                first <- new_mutex!(()),
                ops: SetOnce::new(),
            }? Error),
            GFP_KERNEL,
        )
    }

    /// What the file does.
    fn ops(&self) -> Result<&F> {
        if let Some(ops) = self.ops.as_ref() {
            return Ok(ops);
        }
        let _first = self.first.lock();
        if self.ops.as_ref().is_none() {
            let ops = F::open(&self.shared, &self.opener, &self.ready)?;
            self.ops.populate(ops);
        }
        self.ops.as_ref().ok_or(EINVAL)
    }

    fn ioctl(&self, cmd: u32, arg: usize) -> Result<isize> {
        // Before the lock: others must not wait for the opener.
        F::may_call(&self.opener)?;
        let ops = self.ops().map_err(|error| match error {
            // As nothing has happened yet, nobody need see it.
            EINTR => ERESTARTNOINTR,
            error => error,
        })?;
        ops.ioctl(cmd, arg)
    }

    fn poll(&self, file: &File, table: &PollTable<'_>) -> u32 {
        table.register_wait(file, &self.ready);
        table.register_wait(file, F::all_ready(&self.shared));
        F::poll(&self.shared, self.ops.as_ref())
    }
}

/// A kind of device: what the names of its nodes begin with, and which numbers are in use.
pub(crate) struct Kind {
    prefix: &'static str,
    /// How many there can be.
    most: u32,
    /// A bit for each number.
    used: Atomic<u64>,
}

impl Kind {
    /// Nodes `/dev/<prefix><number>`, at most `most` of them and at most 64.
    pub(crate) const fn new(prefix: &'static str, most: u32) -> Self {
        Self {
            prefix,
            most,
            used: Atomic::new(0),
        }
    }

    /// The lowest free number, or `ENOSPC`.
    fn lowest(&'static self) -> Result<Number> {
        let mut used = self.used.load(Relaxed);
        loop {
            let number = used.trailing_ones();
            if number >= self.most {
                return Err(ENOSPC);
            }
            let bit = 1u64.checked_shl(number).ok_or(ENOSPC)?;
            match self.used.cmpxchg(used, used | bit, Full) {
                Ok(_) => return Ok(Number { kind: self, number }),
                Err(now) => used = now,
            }
        }
    }
}

/// A number that no other device of its kind has.
struct Number {
    kind: &'static Kind,
    number: u32,
}

impl Drop for Number {
    fn drop(&mut self) {
        let bit = 1 << self.number;
        let mut used = self.kind.used.load(Relaxed);
        while let Err(now) = self.kind.used.cmpxchg(used, used & !bit, Full) {
            used = now;
        }
    }
}

/// A registered misc device. Dropping it deregisters; files that are open stay so.
///
/// # Invariants
///
/// `misc` is registered with the file operations of `F`.
#[pin_data(PinnedDrop)]
pub(crate) struct Chardev<F: FileOps> {
    shared: Arc<F::Shared>,
    number: Number,
    name: CString,
    #[pin]
    misc: Opaque<bindings::miscdevice>,
}

// SAFETY: A misc device may be deregistered by any thread.
unsafe impl<F: FileOps> Send for Chardev<F> {}
// SAFETY: Shared methods only read what never changes.
unsafe impl<F: FileOps> Sync for Chardev<F> {}

impl<F: FileOps> Chardev<F> {
    const FOPS: bindings::file_operations = bindings::file_operations {
        owner: crate::THIS_MODULE.as_ptr(),
        open: Some(Self::open_callback),
        release: Some(Self::release_callback),
        unlocked_ioctl: Some(Self::ioctl_callback),
        #[cfg(CONFIG_COMPAT)]
        compat_ioctl: bindings::compat_ptr_ioctl,
        poll: Some(Self::poll_callback),
        mmap: Some(Self::mmap_callback),
        ..pin_init::zeroed()
    };

    /// Makes the node of `kind` with the lowest number that is free, and permissions `mode`.
    /// `ENOSPC`: there are as many as there can be.
    pub(crate) fn new(
        kind: &'static Kind,
        mode: u16,
        shared: Arc<F::Shared>,
    ) -> impl PinInit<Self, Error> {
        pin_init::pin_init_scope(move || {
            let number = kind.lowest()?;
            let name = CString::try_from_fmt(fmt!("{}{}", kind.prefix, number.number))?;
            let name_ptr = name.as_char_ptr();
            Ok(try_pin_init!(Self {
                shared,
                number,
                name,
                // Last: files may be opened as soon as it is registered.
                misc <- Opaque::try_ffi_init(move |slot: *mut bindings::miscdevice| {
                    // SAFETY: `slot` is pinned until it is deregistered in drop, and the name, which
                    // a `CString` keeps on the heap, lives as long. The operations are static.
                    unsafe {
                        slot.write_bytes(0, 1);
                        (*slot).minor = bindings::MISC_DYNAMIC_MINOR as c_int;
                        (*slot).name = name_ptr;
                        (*slot).mode = mode;
                        (*slot).fops = &Self::FOPS;
                        to_result(bindings::misc_register(slot))
                    }
                }),
            }? Error))
        })
    }

    /// Its name in `/dev`.
    pub(crate) fn name(&self) -> &CStr {
        &self.name
    }

    /// # Safety
    ///
    /// Only for the core: `file` is being opened, and its private data is the misc device.
    unsafe extern "C" fn open_callback(
        _inode: *mut bindings::inode,
        file: *mut bindings::file,
    ) -> c_int {
        // SAFETY: The core sets the private data so, and keeps the device registered meanwhile.
        let this = unsafe {
            let misc = Opaque::cast_from((*file).private_data.cast::<bindings::miscdevice>());
            &*container_of!(misc.cast_mut(), Self, misc)
        };
        match Opened::<F>::new(&this.shared) {
            Ok(opened) => {
                // SAFETY: From here on the private data is ours.
                unsafe { (*file).private_data = opened.into_foreign() };
                0
            }
            Err(error) => error.to_errno(),
        }
    }

    /// # Safety
    ///
    /// `file` must have been opened by `open_callback`, and not be released for `'a`.
    unsafe fn borrow<'a>(file: *mut bindings::file) -> Pin<&'a Opened<F>> {
        // SAFETY: `open_callback` has stored it.
        unsafe { <Pin<KBox<Opened<F>>> as ForeignOwnable>::borrow((*file).private_data) }
    }

    /// # Safety
    ///
    /// Only for the core: `file` was opened by `open_callback`, and is used no more.
    unsafe extern "C" fn release_callback(
        _inode: *mut bindings::inode,
        file: *mut bindings::file,
    ) -> c_int {
        // SAFETY: `open_callback` has stored it, and this is the only call.
        let opened =
            unsafe { <Pin<KBox<Opened<F>>> as ForeignOwnable>::from_foreign((*file).private_data) };
        if let Some(ops) = opened.ops.as_ref() {
            ops.release();
        }
        0
    }

    /// # Safety
    ///
    /// Only for the core: `file` was opened by `open_callback`.
    unsafe extern "C" fn ioctl_callback(
        file: *mut bindings::file,
        cmd: c_uint,
        arg: c_ulong,
    ) -> c_long {
        // SAFETY: By the function's contract; files are not released during a call.
        let opened = unsafe { Self::borrow(file) };
        match opened.ioctl(cmd, arg) {
            Ok(value) => value,
            Err(error) => error.to_errno() as c_long,
        }
    }

    /// # Safety
    ///
    /// Only for the core: `file` was opened by `open_callback`, `vma` is being set up for it.
    unsafe extern "C" fn mmap_callback(
        _file: *mut bindings::file,
        vma: *mut bindings::vm_area_struct,
    ) -> c_int {
        // SAFETY: By the function's contract.
        let vma = unsafe { VmaNew::from_raw(vma) };
        match F::mmap(vma) {
            Ok(()) => 0,
            Err(error) => error.to_errno(),
        }
    }

    /// # Safety
    ///
    /// Only for the core: `file` was opened by `open_callback`, `table` is null or valid.
    unsafe extern "C" fn poll_callback(
        file: *mut bindings::file,
        table: *mut bindings::poll_table_struct,
    ) -> bindings::__poll_t {
        // SAFETY: By the function's contract; files are not released during a call.
        let (opened, file, table) = unsafe {
            (
                Self::borrow(file),
                File::from_raw_file(file),
                PollTable::from_raw(table),
            )
        };
        opened.poll(file, &table)
    }
}

#[pinned_drop]
impl<F: FileOps> PinnedDrop for Chardev<F> {
    fn drop(self: Pin<&mut Self>) {
        // SAFETY: Registered by the type invariant. Waits for an open that runs.
        unsafe { bindings::misc_deregister(self.misc.get()) };
    }
}
