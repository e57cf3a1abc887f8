// SPDX-License-Identifier: MIT OR Apache-2.0
//! Gives a Farfault GPU the memory of this process.
//!
//! A job works on plain Rust memory, wherever it was allocated: the GPU uses the process's own
//! addresses, faults on pages that it has not got, and the driver maps them or moves them to VRAM.
//! When the CPU touches a page in VRAM, that faults too, and the page comes home.
//!
//! ```no_run
//! use farfault::Gpu;
//!
//! fn main() -> farfault::Result<()> {
//!     let gpu = Gpu::open_first()?;
//!     let mut data = vec![1u64; 1 << 20];
//!     gpu.add(&mut data, 41)?; // the GPU faults, and the pages move to VRAM
//!     println!("{} pages moved to VRAM", gpu.stats()?.pages_to_vram);
//!     println!("the GPU's sum is {}", gpu.sum(&data)?);
//!     println!("the last word is {}", data[data.len() - 1]); // the CPU faults: its page comes home
//!     Ok(())
//! }
//! ```
//!
//! | module | what it is |
//! | --- | --- |
//! | [`Gpu`] | an open GPU: jobs that are waited for, placement, counts |
//! | [`Launch`] | one job before it runs: kernel, memory, waves |
//! | [`Scope`], [`Job`] | jobs that run while the program goes on |
//! | [`Pages`] | a range of whole pages, to migrate, advise and query |
//! | [`Buffer`] | whole pages of words, from `malloc` |
//! | [`pagemap`] | what the kernel's own page tables say, to compare with [`Gpu::query`] |
//! | [`process`] | a child that shares memory copy-on-write |
//! | [`uapi`] | the raw interface, `include/uapi/farfault.h` in Rust |
//!
//! # Why this is safe
//!
//! The GPU reads and writes memory while the CPU runs on. A job borrows its memory, exclusively
//! where it writes; [`Gpu::run`] returns, and a [`Scope`] ends, only when the job can no longer
//! reach that memory. No destructor is relied on, so a leaked [`Job`] does no harm. All `unsafe`
//! code is in `sys.rs`.
//!
//! A job can't keep its memory beyond the scope:
//!
//! ```compile_fail,E0597
//! # use farfault::{Gpu, Launch};
//! # let gpu = Gpu::open_first().unwrap();
//! gpu.scope(|scope| {
//!     let mut data = vec![0u64; 512];
//!     let job = scope.launch(Launch::fill(&mut data, 1))?;
//!     std::mem::forget(job); // and then `data` would be freed under the GPU
//!     Ok(())
//! });
//! ```

mod buffer;
mod error;
mod gpu;
mod job;
mod launch;
pub mod pagemap;
mod pages;
pub mod process;
mod sys;
pub mod uapi;

pub use buffer::Buffer;
pub use error::{Error, Result};
pub use gpu::{Gpu, Moved, PageState, View};
pub use job::{Job, Scope};
pub use launch::{Chain, Launch, Output};
pub use pages::{HUGE_PAGE_SIZE, PAGE_SIZE, Pages};
#[cfg(feature = "arena")]
pub use sys::{arena, numa, ring, stage};
pub use uapi::{Access, Advice, Info, Kernel, Place, Stats};
