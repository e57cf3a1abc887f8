// SPDX-License-Identifier: GPL-2.0
//! Bindings for the C headers that `kernel::bindings` lacks, made by bindgen when the module is
//! built (see `Kbuild`).
//!
//! Every type that the kernel crate has already is taken from there, so that pointers of both
//! worlds have the same Rust types. Only [`crate::kapi`] uses this module.
#![allow(
    missing_docs,
    non_camel_case_types,
    non_snake_case,
    non_upper_case_globals,
    unreachable_pub,
    dead_code,
    improper_ctypes,
    unsafe_op_in_unsafe_fn,
    unsafe_code,
    clippy::all,
    clippy::as_underscore,
    clippy::cast_lossless,
    clippy::ptr_as_ptr,
    clippy::ref_as_ptr,
    clippy::undocumented_unsafe_blocks,
    reason = "generated from C headers"
)]

pub(crate) use kernel::{bindings::*, ffi};

include!(env!("FARFAULT_BINDINGS"));
