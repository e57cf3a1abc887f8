// SPDX-License-Identifier: MIT OR Apache-2.0
//! Tests of the GPU core: no socket, no clock, and but for `threads` one thread. Each drives a
//! [`rig::Rig`].

mod bus_master;
mod control;
mod copies;
mod faults;
mod garbage;
mod jobs;
mod manual;
mod mmu;
mod model;
mod poison;
mod promise;
mod rig;
mod scale;
mod threads;
