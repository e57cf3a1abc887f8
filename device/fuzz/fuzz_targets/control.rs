// SPDX-License-Identifier: MIT OR Apache-2.0
//! `farfault_fuzz::control` for cargo-fuzz.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| farfault_fuzz::control::run(data));
