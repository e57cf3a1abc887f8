// SPDX-License-Identifier: MIT OR Apache-2.0
//! Counters of everything that the GPU does. They only grow, across resets too.

use super::{event::EventStats, mmu::MmuStats};
use farfault_protocol::{control, event::JobStatus, submit};
use serde::Serialize;

/// Commands of the control queue that succeeded, by opcode.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[allow(missing_docs, reason = "each is named as the command that it counts")]
pub struct ControlStats {
    pub nop: u64,
    pub create_context: u64,
    pub destroy_context: u64,
    pub write_ptes: u64,
    pub invalidate: u64,
    pub replay: u64,
    pub cancel: u64,
    pub read_ptes: u64,
    pub harvest_accessed: u64,
    pub kill_job: u64,
    pub set_bus_master_word: u64,
    /// Requests, however they ended.
    pub requests: u64,
    /// Requests that ended with another status than `Ok`.
    pub failed: u64,
    /// Page-table entries written.
    pub entries_written: u64,
    /// Invalidations and ends of contexts that had to wait for work in flight.
    pub waited: u64,
}

impl ControlStats {
    pub(crate) fn count(&mut self, opcode: control::Opcode) {
        let counter = match opcode {
            control::Opcode::Nop => &mut self.nop,
            control::Opcode::CreateContext => &mut self.create_context,
            control::Opcode::DestroyContext => &mut self.destroy_context,
            control::Opcode::WritePtes => &mut self.write_ptes,
            control::Opcode::Invalidate => &mut self.invalidate,
            control::Opcode::Replay => &mut self.replay,
            control::Opcode::Cancel => &mut self.cancel,
            control::Opcode::ReadPtes => &mut self.read_ptes,
            control::Opcode::HarvestAccessed => &mut self.harvest_accessed,
            control::Opcode::KillJob => &mut self.kill_job,
            control::Opcode::SetBusMasterWord => &mut self.set_bus_master_word,
        };
        *counter += 1;
    }
}

/// Requests of the submit queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[allow(missing_docs, reason = "each is named as the command that it counts")]
pub struct SubmitStats {
    pub nop: u64,
    pub copy: u64,
    pub launch: u64,
    /// Requests, however they ended.
    pub requests: u64,
    /// Requests that ended with another status than `Ok`.
    pub failed: u64,
}

impl SubmitStats {
    pub(crate) fn count(&mut self, opcode: submit::Opcode) {
        let counter = match opcode {
            submit::Opcode::Nop => &mut self.nop,
            submit::Opcode::Copy => &mut self.copy,
            submit::Opcode::Launch => &mut self.launch,
        };
        *counter += 1;
    }
}

/// Copy lists.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct CopyStats {
    /// Runs accepted.
    pub runs: u64,
    /// Bytes accepted, RAM to VRAM.
    pub bytes_to_vram: u64,
    /// Bytes accepted, VRAM to RAM.
    pub bytes_to_system: u64,
    /// Bytes accepted within one of both.
    pub bytes_within: u64,
    /// Bytes accepted to be filled with a pattern.
    pub bytes_filled: u64,
}

/// Faults, by what became of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct FaultStats {
    /// Written to a buffer.
    pub reported: u64,
    /// Found one of their page reported already.
    pub merged: u64,
    /// Found no buffer.
    pub overflowed: u64,
    /// Waves that a replay let go on.
    pub replayed: u64,
    /// Waves that a cancellation ended.
    pub cancelled: u64,
}

/// Jobs, by their end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct JobStats {
    /// Accepted.
    pub launched: u64,
    /// Did all that they ask.
    pub ok: u64,
    /// Failed by a cancelled fault.
    pub fault: u64,
    /// Killed.
    pub killed: u64,
    /// Failed where no RAM is.
    pub bus_error: u64,
    /// Met memory that has lost its contents.
    pub memory_error: u64,
    /// Ended with their context, without an event.
    pub destroyed: u64,
}

impl JobStats {
    pub(crate) fn count(&mut self, status: JobStatus) {
        let counter = match status {
            JobStatus::Ok => &mut self.ok,
            JobStatus::Fault => &mut self.fault,
            JobStatus::Killed => &mut self.killed,
            JobStatus::BusError => &mut self.bus_error,
            JobStatus::MemoryError => &mut self.memory_error,
        };
        *counter += 1;
    }
}

/// Work handed out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct WorkStats {
    /// Handed out.
    pub issued: u64,
    /// Come back.
    pub retired: u64,
    /// Bytes of what was handed out for waves.
    pub wave_bytes: u64,
}

/// Everything.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Stats {
    /// The control queue.
    pub control: ControlStats,
    /// The submit queue.
    pub submit: SubmitStats,
    /// Requests that were malformed, or had an opcode that nobody knows.
    pub malformed: u64,
    /// Copy lists.
    pub copy: CopyStats,
    /// The MMU of the compute engine.
    pub compute_mmu: MmuStats,
    /// The MMU of the copy engine.
    pub copy_mmu: MmuStats,
    /// Faults.
    pub faults: FaultStats,
    /// Jobs.
    pub jobs: JobStats,
    /// Events.
    pub events: EventStats,
    /// Work.
    pub work: WorkStats,
    /// Resets.
    pub resets: u64,
}
