// SPDX-License-Identifier: MIT OR Apache-2.0
//! The Farfault GPU: [`gpu`] is the hardware, what is around it makes it a device of a VM.

pub mod gpu;
