// SPDX-License-Identifier: GPL-2.0
//! `/dev/hmm_dmirrorN`: the interface of the kernel's own HMM test module (`lib/test_hmm_uapi.h`), for
//! its self-tests and for programs written against it. With the module parameter `dmirror=1` the
//! first two GPUs have such a node.
//!
//! What the calls mean is what `lib/test_hmm.c` does, as far as a program can see it. Reads and writes
//! are jobs of the GPU; `faults` is how often it faulted. Pages are migrated in the parts in which
//! that module does it, because part of a huge page that migrates is split.
//!
//! A file belongs to the process that opened it, whoever calls: a child that inherits it works on
//! its parent's memory. There are no nodes for device-coherent memory.

use crate::{
    gpu::Gpu,
    kapi::{
        chardev::{FileOps, Kind},
        hmm::HmmPfn,
        mm::{ADDRESS_LIMIT, PUD_ORDER},
        signal::fatal_signal_pending,
        trace::Cause,
    },
    svm::{
        access::{OnFault, Window, MOST_BYTES},
        migrate::{PASSES, PASS_PAUSE},
        Space, REGION_BYTES,
    },
    uapi,
    vram::BLOCK_ORDER,
};
use core::ops::Range;
use kernel::{
    ioctl::_IOWR,
    mm::{virt::VmaNew, Mm},
    page::{Page, PAGE_SHIFT, PAGE_SIZE},
    prelude::*,
    sync::{poll::PollCondVar, Arc},
    time::delay::fsleep,
    uaccess::{UserPtr, UserSlice},
};
use zerocopy::{FromZeros, IntoBytes};
use zerocopy_derive::{FromBytes, Immutable, IntoBytes};

/// The nodes. The self-tests take more for devices of another kind.
pub(crate) static KIND: Kind = Kind::new("hmm_dmirror", 2);

/// `struct hmm_dmirror_cmd`.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct Command {
    address: u64,
    /// Memory of the caller.
    pointer: u64,
    pages: u64,
    /// Out: pages copied or moved.
    copied: u64,
    /// Out: how often the GPU faulted.
    faults: u64,
}

const READ: u32 = _IOWR::<Command>(b'H' as u32, 0);
const WRITE: u32 = _IOWR::<Command>(b'H' as u32, 1);
const MIGRATE_TO_DEV: u32 = _IOWR::<Command>(b'H' as u32, 2);
const MIGRATE_TO_SYS: u32 = _IOWR::<Command>(b'H' as u32, 3);
const SNAPSHOT: u32 = _IOWR::<Command>(b'H' as u32, 4);
const EXCLUSIVE: u32 = _IOWR::<Command>(b'H' as u32, 5);
const CHECK_EXCLUSIVE: u32 = _IOWR::<Command>(b'H' as u32, 6);
const RELEASE: u32 = _IOWR::<Command>(b'H' as u32, 7);
const FLAGS: u32 = _IOWR::<Command>(b'H' as u32, 8);

const FLAG_FAIL_ALLOC: u64 = 1 << 0;

const PROT_ERROR: u8 = 0xff;
const PROT_NONE: u8 = 0x00;
const PROT_READ: u8 = 0x01;
const PROT_WRITE: u8 = 0x02;
const PROT_PMD: u8 = 0x04;
const PROT_PUD: u8 = 0x08;
const PROT_ZERO: u8 = 0x10;
const PROT_DEV_PRIVATE_LOCAL: u8 = 0x20;

/// The kernel's module looks at 32 pages at once, and from here on they wrap around.
const LAST_START: usize = usize::MAX - 32 * PAGE_SIZE + 1;

/// An open file.
pub(crate) struct OpenMirror {
    gpu: Arc<Gpu>,
    space: Arc<Space>,
}

impl FileOps for OpenMirror {
    type Shared = Gpu;

    fn check(gpu: &Gpu) -> Result {
        gpu.usable()
    }

    fn may_call(_opener: &Mm) -> Result {
        Ok(())
    }

    fn open(gpu: &Arc<Gpu>, opener: &Mm, ready: &Arc<PollCondVar>) -> Result<Self> {
        Ok(Self {
            gpu: gpu.clone(),
            space: Space::open(gpu, opener, ready).map_err(without_mm)?,
        })
    }

    fn ioctl(&self, cmd: u32, arg: usize) -> Result<isize> {
        let user = || UserSlice::new(UserPtr::from_addr(arg), size_of::<Command>());
        let mut command = Command::new_zeroed();
        user().reader().read_slice(command.as_mut_bytes())?;
        if self.space.is_closed() {
            return Err(ENODEV);
        }
        let size = command.pages << PAGE_SHIFT;
        let end = command.address.wrapping_add(size);
        if command.address % PAGE_SIZE as u64 != 0 || command.address >= end {
            return Err(EINVAL);
        }
        let range = command.address as usize..end as usize;
        command.copied = 0;
        command.faults = 0;
        match cmd {
            READ => self.read(&mut command, range),
            WRITE => self.write(&mut command, range),
            MIGRATE_TO_DEV => self.migrate_to_device(&mut command, range),
            MIGRATE_TO_SYS => self.migrate_to_system(&mut command, range),
            SNAPSHOT => self.snapshot(&mut command, range),
            EXCLUSIVE => self.exclusive(&mut command, range),
            CHECK_EXCLUSIVE if self.space.has_exclusive(clamp(&range))? => Err(EPERM),
            CHECK_EXCLUSIVE => Ok(()),
            RELEASE => {
                self.gpu.bring_all_home(None, Cause::Request);
                Ok(())
            }
            FLAGS => {
                let fail = command.pages & FLAG_FAIL_ALLOC != 0;
                self.space.fail_next_allocation(fail);
                Ok(())
            }
            _ => Err(EINVAL),
        }?;
        user().writer().write_slice(command.as_bytes())?;
        Ok(0)
    }

    fn poll(_gpu: &Gpu, _this: Option<&Self>) -> u32 {
        0
    }

    fn all_ready(gpu: &Gpu) -> &PollCondVar {
        gpu.unusable()
    }

    /// Pages of the kernel, each in a mapping of its own kind.
    fn mmap(vma: &VmaNew) -> Result {
        let mixed = vma.set_mixedmap();
        for address in (vma.start()..vma.end()).step_by(PAGE_SIZE) {
            // The mapping has a reference of its own.
            let page = Page::alloc_page(GFP_KERNEL | __GFP_ZERO)?;
            mixed.vm_insert_page(address, &page)?;
        }
        Ok(())
    }

    /// Nothing stays on the device behind any file that is closed, as in the kernel's module.
    fn release(&self) {
        self.space.close(uapi::JobStatus::Killed);
        self.gpu.bring_all_home(None, Cause::Request);
    }
}

impl OpenMirror {
    fn read(&self, command: &mut Command, range: Range<usize>) -> Result {
        let mut data = VVec::with_capacity(range.len(), GFP_KERNEL | __GFP_NOWARN)?;
        check_limit(&range)?;
        let mut window = Window::new(&self.space, range.len())?;
        for part in parts(range.clone()) {
            command.faults += window.load(part.clone(), OnFault::MapRest)?;
            let bytes = window.bytes().get(..part.len()).ok_or(EINVAL)?;
            data.extend_from_slice(bytes, GFP_KERNEL)?;
        }
        drop(window);
        writer(command.pointer, range.len()).write_slice(&data)?;
        command.copied = (range.len() >> PAGE_SHIFT) as u64;
        Ok(())
    }

    fn write(&self, command: &mut Command, range: Range<usize>) -> Result {
        let mut data = VVec::new();
        data.reserve(range.len(), GFP_KERNEL | __GFP_NOWARN)?;
        let user = UserPtr::from_addr(command.pointer as usize);
        UserSlice::new(user, range.len()).read_all(&mut data, GFP_KERNEL)?;
        check_limit(&range)?;
        // What the GPU has for itself is not open to plain stores here.
        if self.space.has_exclusive(range.clone())? {
            self.space.unmap(range.clone())?;
        }
        let mut window = Window::new(&self.space, range.len())?;
        for part in parts(range.clone()) {
            let offset = part.start - range.start;
            let bytes = data.get(offset..offset + part.len()).ok_or(EINVAL)?;
            let to = window.bytes_mut().get_mut(..part.len()).ok_or(EINVAL)?;
            to.copy_from_slice(bytes);
            command.faults += window.store(part)?;
        }
        command.copied = (range.len() >> PAGE_SHIFT) as u64;
        Ok(())
    }

    fn migrate_to_device(&self, command: &mut Command, range: Range<usize>) -> Result {
        // What fails on purpose is not tried again.
        let passes = if self.space.will_fail() { 1 } else { PASSES };
        for pass in 0..passes {
            if pass != 0 {
                fsleep(PASS_PAUSE);
            }
            self.space
                .migrate_parts_to_vram(clamp(&range))
                .map_err(without_mm)?;
            if self.space.is_mapped(clamp(&range))? {
                break;
            }
        }
        check_limit(&range).map_err(|_| EINVAL)?;
        self.report(command, range)
    }

    fn migrate_to_system(&self, command: &mut Command, range: Range<usize>) -> Result {
        let folios = self.space.migrate_parts_to_ram(range).map_err(without_mm)?;
        command.copied = folios as u64;
        Ok(())
    }

    fn exclusive(&self, command: &mut Command, range: Range<usize>) -> Result {
        self.space
            .make_exclusive(clamp(&range))
            .map_err(without_mm)?;
        check_limit(&range).map_err(|_| EFAULT)?;
        self.report(command, range)
    }

    /// Gives the caller what the GPU reads of a range without a fault.
    fn report(&self, command: &mut Command, range: Range<usize>) -> Result {
        if !self.space.is_mapped(range.clone())? {
            return Err(ENOENT);
        }
        // The GPU can write to the caller's memory, if it is the mirrored process and the memory of a
        // usual kind.
        let direct = match self.space.is_current() {
            true => self
                .space
                .copy_mapped(range.clone(), command.pointer as usize),
            false => Err(EINVAL),
        };
        match direct {
            Ok(()) => {}
            Err(error) if error == ENOENT || error == ERESTARTNOHAND => return Err(error),
            Err(_) => self.report_by_window(command.pointer, range.clone())?,
        }
        command.copied = (range.len() >> PAGE_SHIFT) as u64;
        Ok(())
    }

    fn report_by_window(&self, pointer: u64, range: Range<usize>) -> Result {
        let mut window = Window::new(&self.space, range.len())?;
        let mut writer = writer(pointer, range.len());
        for part in parts(range) {
            window.load(part.clone(), OnFault::Refuse)?;
            writer.write_slice(window.bytes().get(..part.len()).ok_or(EINVAL)?)?;
        }
        Ok(())
    }

    fn snapshot(&self, command: &mut Command, range: Range<usize>) -> Result {
        let mut writer = writer(command.pointer, range.len() >> PAGE_SHIFT);
        let mut protections = KVec::new();
        if range.start > LAST_START {
            return Err(EOVERFLOW);
        }
        let mut at = range.start;
        while at < range.end {
            let region = at & !(REGION_BYTES - 1);
            let end = range.end.min(region.saturating_add(REGION_BYTES));
            protections.clear();
            protections.reserve((end - at) >> PAGE_SHIFT, GFP_KERNEL)?;
            if at >= ADDRESS_LIMIT {
                protections.resize((end - at) >> PAGE_SHIFT, PROT_ERROR, GFP_KERNEL)?;
            } else {
                self.space
                    .snapshot(at..end, |pfn, in_vram| {
                        // There is room.
                        let _ = protections.push_within_capacity(protection(pfn, in_vram));
                    })
                    .map_err(without_mm)?;
            }
            if fatal_signal_pending() {
                return Err(EINTR);
            }
            writer.write_slice(&protections)?;
            command.copied += protections.len() as u64;
            at = end;
        }
        Ok(())
    }
}

/// `HMM_DMIRROR_PROT_*` of a page.
fn protection(pfn: HmmPfn, in_vram: bool) -> u8 {
    if pfn.is_error() {
        return PROT_ERROR;
    }
    if !pfn.is_valid() {
        return PROT_NONE;
    }
    let place = match in_vram {
        true => PROT_DEV_PRIVATE_LOCAL,
        false if pfn.is_zero_page() => PROT_ZERO,
        false => PROT_NONE,
    };
    let access = match pfn.is_writable() {
        true => PROT_WRITE,
        false => PROT_READ,
    };
    let size = match pfn.order() {
        BLOCK_ORDER => PROT_PMD,
        PUD_ORDER => PROT_PUD,
        _ => 0,
    };
    place | access | size
}

/// The part of a range where processes can have memory.
fn clamp(range: &Range<usize>) -> Range<usize> {
    range.start.min(ADDRESS_LIMIT)..range.end.min(ADDRESS_LIMIT)
}

/// Refuses a range where no process can have memory, as the kernel's module does.
fn check_limit(range: &Range<usize>) -> Result {
    if range.end <= ADDRESS_LIMIT {
        return Ok(());
    }
    Err(if range.start > LAST_START {
        EINVAL
    } else {
        EFAULT
    })
}

/// A range in what one job copies.
fn parts(range: Range<usize>) -> impl Iterator<Item = Range<usize>> {
    let end = range.end;
    range
        .step_by(MOST_BYTES)
        .map(move |start| start..end.min(start.saturating_add(MOST_BYTES)))
}

fn writer(pointer: u64, bytes: usize) -> kernel::uaccess::UserSliceWriter {
    UserSlice::new(UserPtr::from_addr(pointer as usize), bytes).writer()
}

/// The kernel's module answers so when the process is gone.
fn without_mm(error: Error) -> Error {
    if error == ESRCH {
        return EINVAL;
    }
    error
}
