// SPDX-License-Identifier: MIT OR Apache-2.0
//! Tests of driver and GPU in a VM.
//!
//! | part | where it runs |
//! | --- | --- |
//! | [`guest`]: the cases, and programs that the host's cases use | in the VM, as `farfault-guest-tests` |
//! | [`compare`]: scripts for the nodes that test programs of the kernel use, and their transcripts | in the VM, as `hmm-compare` |
//! | `tests/vm`: boots VMs, runs the cases, looks at the GPU from outside | on the host, as test target `vm` |
//!
//! A case of the guest opens `/dev/farfault0` and checks data against what the CPU computes by itself.
//! The host's harness turns each into a test of the same name, and after each looks whether kernel
//! and device are well and nothing has leaked.

pub mod compare;
pub mod guest;
