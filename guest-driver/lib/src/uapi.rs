// SPDX-License-Identifier: (GPL-2.0 WITH Linux-syscall-note) OR MIT
//! The Rust mirror of `guest-driver/include/uapi/farfault.h`: the same names, layouts and numbers.
//!
//! The header is the reference and says what each call does and how it fails. One source for two
//! crates: cargo compiles this file into the user library, Kbuild into `farfault.ko`. So it knows
//! neither of them, nor `std`. A test of the library compiles the header with a C compiler and
//! compares every item of both sides (`tests/uapi.rs`).
//!
//! Numbers of the calls are those of x86 and arm64 (`asm-generic/ioctl.h`); other architectures
//! that split the bits differently are not supported.

use zerocopy_derive::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// A closed set of numbers, and its parser: the only way from what somebody wrote to the enum.
macro_rules! raw_enum {
    (
        $(#[$meta:meta])*
        pub enum $name:ident {
            $($(#[$variant_meta:meta])* $variant:ident = $value:literal,)*
        }
    ) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u32)]
        pub enum $name {
            $($(#[$variant_meta])* $variant = $value,)*
        }

        impl $name {
            /// Every value, in the order of their numbers.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];

            /// The value that `raw` stands for, if any does.
            pub const fn from_raw(raw: u32) -> Option<Self> {
                match raw {
                    $($value => Some(Self::$variant),)*
                    _ => None,
                }
            }

            /// The number in the interface.
            pub const fn raw(self) -> u32 {
                self as u32
            }
        }
    };
}

/// Asserts a struct's size and the offset of each of its fields when the crate compiles.
macro_rules! assert_layout {
    ($type:ty, size = $size:literal, $($field:ident @ $offset:literal),+ $(,)?) => {
        const _: () = {
            assert!(core::mem::size_of::<$type>() == $size);
            assert!(core::mem::align_of::<$type>() == 8);
            $(assert!(core::mem::offset_of!($type, $field) == $offset);)+
        };
    };
}

const DIRECTION_NONE: u32 = 0;
const DIRECTION_WRITE: u32 = 1;
const DIRECTION_READ: u32 = 2;

/// The number of a call, as `_IOC` of `asm-generic/ioctl.h` puts it together.
const fn ioc(direction: u32, number: u32, size: usize) -> u32 {
    assert!(size < 1 << 14, "the size of an argument has 14 bits");
    direction << 30 | (size as u32) << 16 | (b'F' as u32) << 8 | number
}

const fn io(number: u32) -> u32 {
    ioc(DIRECTION_NONE, number, 0)
}

const fn ior<T>(number: u32) -> u32 {
    ioc(DIRECTION_READ, number, core::mem::size_of::<T>())
}

const fn iow<T>(number: u32) -> u32 {
    ioc(DIRECTION_WRITE, number, core::mem::size_of::<T>())
}

const fn iowr<T>(number: u32) -> u32 {
    ioc(
        DIRECTION_READ | DIRECTION_WRITE,
        number,
        core::mem::size_of::<T>(),
    )
}

/// Raised by each addition. What exists keeps its number, layout and meaning.
pub const UAPI_VERSION: u32 = 2;

/// Facts about the GPU and the driver.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Info {
    /// Out: [`UAPI_VERSION`] of the driver.
    pub uapi_version: u32,
    /// Out: number of the address space on the GPU.
    pub context: u32,
    /// Out: bytes.
    pub vram_size: u64,
    /// Out: tells this GPU from others.
    pub serial: u64,
    /// Out: most waves of one job.
    pub max_waves: u32,
    /// Out: most jobs of this descriptor not yet collected by [`IOC_WAIT`].
    pub max_jobs: u32,
}

assert_layout!(
    Info, size = 32,
    uapi_version @ 0, context @ 4, vram_size @ 8, serial @ 16, max_waves @ 24, max_jobs @ 28,
);

/// Fills an [`Info`].
pub const IOC_INFO: u32 = ior::<Info>(0x00);

raw_enum! {
    /// Kernels, and their arguments in order. Addresses and lengths are multiples of 8 bytes; memory
    /// is seen as little-endian 64-bit words. Unused arguments are zero; lengths, repeat and steps
    /// are not. Ranges end within the address space of processes, and those of [`Kernel::Copy`] may
    /// not overlap. All else is `EINVAL`.
    pub enum Kernel {
        /// Destination, length, pattern.
        Fill = 1,
        /// Destination, source, length; not overlapping.
        Copy = 2,
        /// Source, length; the result is the sum.
        Sum = 3,
        /// Destination, length, addend.
        Add = 4,
        /// Destination, addend, repeat of each wave; the result is the word before the last addition.
        AtomicAdd = 5,
        /// Destination, expected, desired; the result is the word before.
        CompareAndSwap = 6,
        /// Start, steps; the result is the last word read.
        PointerChase = 7,
    }
}

/// Starts a job.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Submit {
    /// In: [`Kernel`].
    pub kernel: u32,
    /// In: 1 to [`Info::max_waves`]; [`Kernel::CompareAndSwap`] and [`Kernel::PointerChase`]: 1.
    pub waves: u32,
    /// In: by kernel.
    pub arguments: [u64; 4],
    /// Out: name of the job, never zero.
    pub fence: u64,
}

assert_layout!(Submit, size = 48, kernel @ 0, waves @ 4, arguments @ 8, fence @ 40);

/// Starts the job of a [`Submit`], and returns its fence at once.
pub const IOC_SUBMIT: u32 = iowr::<Submit>(0x01);

raw_enum! {
    /// How a job ended.
    pub enum JobStatus {
        /// It did all that it asks.
        Ok = 0,
        /// It may not access [`Wait::fault_address`]: see [`Wait::access`].
        Fault = 1,
        /// Somebody ended it, or the machine went to sleep.
        Killed = 2,
        /// The GPU could not reach the memory behind [`Wait::fault_address`].
        BusError = 3,
        /// The device stopped answering, or was unbound or unplugged, while the job was under way.
        DeviceLost = 4,
        /// The memory behind [`Wait::fault_address`] has failed: its contents are lost, and a CPU
        /// that touches it gets SIGBUS.
        MemoryError = 5,
    }
}

raw_enum! {
    /// What a job wanted to do to memory.
    pub enum Access {
        /// A load.
        Read = 1,
        /// A store.
        Write = 2,
        /// An atomic read-modify-write.
        Atomic = 3,
    }
}

/// Waits for a job and collects its result.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Wait {
    /// In: the job; zero: any. Out: the job.
    pub fence: u64,
    /// In: from now; zero: look only; negative: no limit but the device's. Out, after `EINTR`: what is left
    /// of it.
    pub timeout_ns: i64,
    /// Out: by kernel.
    pub result: u64,
    /// Out: page that a failed job could not access.
    pub fault_address: u64,
    /// Out: [`JobStatus`].
    pub status: u32,
    /// Out: [`Access`] of a failed job.
    pub access: u32,
}

assert_layout!(
    Wait, size = 40,
    fence @ 0, timeout_ns @ 8, result @ 16, fault_address @ 24, status @ 32, access @ 36,
);

/// Waits as a [`Wait`] says. The fence is forgotten then; after `ETIMEDOUT` or `EINTR` it is not, and
/// the job goes on. `EINTR` is for signals that have a handler: others, and what stops a process for a
/// while, do not end the call.
pub const IOC_WAIT: u32 = iowr::<Wait>(0x02);

/// Ends a job that was submitted and not collected.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Kill {
    /// In.
    pub fence: u64,
}

assert_layout!(Kill, size = 8, fence @ 0);

/// Ends the job of a [`Kill`] with [`JobStatus::Killed`], if it has not ended already.
pub const IOC_KILL: u32 = iow::<Kill>(0x03);

raw_enum! {
    /// Where a page is.
    pub enum Place {
        /// Nowhere: not in memory, not mapped.
        None = 0,
        /// In the machine's memory.
        Ram = 1,
        /// In the GPU's memory.
        Vram = 2,
    }
}

/// Moves the pages of a range.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Migrate {
    /// In: aligned to the page size.
    pub address: u64,
    /// In: bytes, likewise, not zero.
    pub length: u64,
    /// In: [`Place::Ram`] or [`Place::Vram`].
    pub destination: u32,
    /// Zero.
    pub reserved: u32,
    /// Out: pages moved now.
    pub moved: u64,
    /// Out: pages that were there before.
    pub there: u64,
    /// Out: pages that are elsewhere.
    pub stayed: u64,
}

assert_layout!(
    Migrate, size = 48,
    address @ 0, length @ 8, destination @ 16, reserved @ 20, moved @ 24, there @ 32, stayed @ 40,
);

/// Moves the pages that a [`Migrate`] names; what cannot move stays, and is counted.
pub const IOC_MIGRATE: u32 = iowr::<Migrate>(0x04);

raw_enum! {
    /// Where the pages of a range should be when the GPU wants them.
    pub enum Advice {
        /// A GPU fault on anonymous memory moves the page (or the huge page) to VRAM, other memory
        /// is mapped where it is.
        Default = 0,
        /// Like [`Advice::Default`], with all of the range in the same 2 MiB.
        PreferGpu = 1,
        /// A GPU fault brings the page to RAM and maps it there.
        PreferCpu = 2,
        /// A GPU fault maps the page where it is.
        MapOnly = 3,
    }
}

/// Says where the pages of a range should be.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Advise {
    /// In: aligned to the page size.
    pub address: u64,
    /// In: bytes, likewise, not zero.
    pub length: u64,
    /// In: [`Advice`].
    pub advice: u32,
    /// Zero.
    pub reserved: u32,
}

assert_layout!(Advise, size = 24, address @ 0, length @ 8, advice @ 16, reserved @ 20);

/// Gives the advice of an [`Advise`].
pub const IOC_ADVISE: u32 = iow::<Advise>(0x05);

/// Writes are allowed.
pub const PAGE_WRITE: u8 = 1 << 0;
/// Mapped by a 2 MiB entry.
pub const PAGE_HUGE: u8 = 1 << 1;
/// GPU only: atomics are allowed.
pub const PAGE_ATOMIC: u8 = 1 << 2;
/// GPU only: used since it was mapped or looked at.
pub const PAGE_ACCESSED: u8 = 1 << 3;
/// GPU only: written since it was mapped.
pub const PAGE_DIRTY: u8 = 1 << 4;

/// One page, as the CPU's page tables and as the GPU's own have it.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Page {
    /// [`Place`]; [`Place::None`]: not in memory, or never touched.
    pub cpu_place: u8,
    /// `PAGE_*`.
    pub cpu_flags: u8,
    /// [`Place`]; [`Place::None`]: the GPU would fault.
    pub gpu_place: u8,
    /// `PAGE_*`.
    pub gpu_flags: u8,
    /// [`Advice`].
    pub advice: u8,
    /// Zero.
    pub reserved: [u8; 3],
    /// Where `cpu_place` is VRAM: the page's address there, else zero.
    pub cpu_vram: u64,
    /// Where `gpu_place` is VRAM: the page's address there, else zero.
    pub gpu_vram: u64,
}

assert_layout!(
    Page, size = 24,
    cpu_place @ 0, cpu_flags @ 1, gpu_place @ 2, gpu_flags @ 3, advice @ 4, reserved @ 5,
    cpu_vram @ 8, gpu_vram @ 16,
);

/// Asks where the pages of a range are.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Query {
    /// In: aligned to the page size.
    pub address: u64,
    /// In: bytes, likewise, not zero.
    pub length: u64,
    /// In: pointer to one [`Page`] for each page.
    pub pages: u64,
}

assert_layout!(Query, size = 24, address @ 0, length @ 8, pages @ 16);

/// Fills the pages that a [`Query`] points to.
pub const IOC_QUERY: u32 = iow::<Query>(0x06);

/// Counts since the descriptor was opened, for its address space.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Stats {
    /// Faults of the GPU served.
    pub gpu_faults: u64,
    /// Of these, ended in a failed job.
    pub gpu_faults_failed: u64,
    /// Faults of CPUs on pages in VRAM.
    pub cpu_faults: u64,
    /// For a fault or on request.
    pub pages_to_vram: u64,
    /// For a fault, on request, evicted, at a close or for the machine's sleep.
    pub pages_to_ram: u64,
    /// Of these, to make room in VRAM.
    pub pages_evicted: u64,
    /// Entries written to the GPU's page tables, in pages.
    pub pages_mapped: u64,
    /// Calls of the MMU notifier that unmapped something.
    pub invalidations: u64,
    /// Time spent in migrations, nanoseconds.
    pub migrate_ns: u64,
    /// Jobs ended.
    pub jobs: u64,
}

assert_layout!(
    Stats, size = 80,
    gpu_faults @ 0, gpu_faults_failed @ 8, cpu_faults @ 16, pages_to_vram @ 24, pages_to_ram @ 32,
    pages_evicted @ 40, pages_mapped @ 48, invalidations @ 56, migrate_ns @ 64, jobs @ 72,
);

/// Fills a [`Stats`].
pub const IOC_STATS: u32 = ior::<Stats>(0x07);

/// Sends an empty command to the GPU and waits for the answer: the cost of the way there and back.
pub const IOC_PING: u32 = io(0x08);

/// Takes the pages of a range from the CPU.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Exclusive {
    /// In: aligned to the page size.
    pub address: u64,
    /// In: bytes, likewise, not zero.
    pub length: u64,
}

assert_layout!(Exclusive, size = 16, address @ 0, length @ 8);

/// Takes the pages of an [`Exclusive`] for the GPU's atomics; a CPU that touches one gets it back.
pub const IOC_EXCLUSIVE: u32 = iow::<Exclusive>(0x09);
