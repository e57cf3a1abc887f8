// SPDX-License-Identifier: GPL-2.0
//! Safe wrappers of the kernel facilities that `rust/kernel` lacks, one file each, named as in C.
//!
//! This folder and [`crate::bindings`] are the only places of the driver with `unsafe`. Nothing
//! here knows of GPUs, of the protocol or of the driver's policy: each file could move to
//! `rust/kernel` as it is.
//!
//! | module | C |
//! | --- | --- |
//! | [`chardev`] | `miscdevice.h`, with the owner and poll that `kernel::miscdevice` leaves out |
//! | [`bounce`] | `vmalloc()` memory that a device uses, too |
//! | [`completion`] | `completion.h`, with time limits |
//! | [`exclusive`] | `make_device_exclusive()` |
//! | [`folio`] | folios as owned values |
//! | [`hmm`] | `hmm_range_fault()` |
//! | [`migrate`] | `migrate_vma_*()`, `migrate_device_range()` |
//! | [`mm`] | the mmap lock and VMAs |
//! | [`mmu_interval`] | `mmu_interval_notifier` with its update lock |
//! | [`module`] | the module's use count |
//! | [`page_fault`] | `handle_mm_fault()`, where `hmm_range_fault()` will not do |
//! | [`pagemap`] | `dev_pagemap` of type `MEMORY_DEVICE_PRIVATE` |
//! | [`poll`] | spinning for a short while |
//! | [`shared_word`] | a word that a device reads whenever it likes |
//! | [`signal`] | `fatal_signal_pending()` |
//! | [`spinlock_irq`] | `spin_lock_irqsave()` |
//! | [`trace`] | the driver's trace events |
//! | [`virtio`] | the virtio bus |
//! | [`virtqueue`] | virtqueues |
//! | [`workqueue`] | a workqueue of one's own |
#![allow(unsafe_code, reason = "wraps C")]

pub(crate) mod bounce;
pub(crate) mod chardev;
pub(crate) mod completion;
pub(crate) mod exclusive;
pub(crate) mod folio;
pub(crate) mod hmm;
pub(crate) mod migrate;
pub(crate) mod mm;
pub(crate) mod mmu_interval;
pub(crate) mod module;
pub(crate) mod page_fault;
pub(crate) mod pagemap;
pub(crate) mod poll;
pub(crate) mod shared_word;
pub(crate) mod signal;
pub(crate) mod spinlock_irq;
pub(crate) mod trace;
pub(crate) mod virtio;
pub(crate) mod virtqueue;
pub(crate) mod workqueue;
