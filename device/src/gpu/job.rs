// SPDX-License-Identifier: MIT OR Apache-2.0
//! Jobs and their waves: the state that an engine goes through (manual, section 5.4,
//! chapter 9).

use super::{
    kernels::{Access, Combine, Plan, Program},
    memory::Lack,
};
use farfault_protocol::{
    U32, U64,
    address::GpuVa,
    event::{self, EventKind, FaultCause, FenceEvent, JobStatus},
    submit::Kernel,
};
use std::collections::VecDeque;

/// One of a job's threads of execution. Whether it can go on, is parked or in flight is told by who
/// holds its index: the job's `ready`, the context's fault table, or a work in flight.
pub(crate) struct Wave {
    pub(crate) program: Box<dyn Program>,
    /// The access that it waits for, once it has begun.
    pub(crate) wanted: Option<Access>,
}

/// Why a job failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Failure {
    Cancelled {
        page: GpuVa,
        access: event::Access,
        cause: FaultCause,
    },
    Killed,
    NoMemory {
        page: GpuVa,
        access: event::Access,
        lack: Lack,
    },
}

/// A launch that was accepted.
pub(crate) struct Job {
    pub(crate) context: u32,
    pub(crate) fence: u64,
    pub(crate) kernel: Kernel,
    pub(crate) engine: event::Engine,
    pub(crate) waves: Vec<Wave>,
    /// Waves that can go on, in turn.
    pub(crate) ready: VecDeque<u32>,
    /// Whether its context has it in its rotation.
    pub(crate) queued: bool,
    /// Accesses in flight.
    pub(crate) in_flight: u32,
    /// Waves that have not ended.
    pub(crate) live: u32,
    /// Set when it fails: it ends when nothing is in flight.
    pub(crate) failure: Option<Failure>,
    combine: Combine,
    result: u64,
}

impl Job {
    /// A job whose waves have not begun.
    pub(crate) fn new(context: u32, fence: u64, plan: Plan) -> Self {
        let waves = (0..plan.waves()).map(|index| Wave {
            program: plan.wave(index),
            wanted: None,
        });
        Self {
            context,
            fence,
            kernel: plan.kernel(),
            engine: plan.engine(),
            waves: waves.collect(),
            ready: VecDeque::new(),
            queued: false,
            in_flight: 0,
            live: plan.waves(),
            failure: None,
            combine: plan.combine(),
            result: 0,
        }
    }

    /// Takes note that a wave ended with a value.
    pub(crate) fn end_wave(&mut self, index: u32, value: u64) {
        self.live = self.live.saturating_sub(1);
        match self.combine {
            Combine::Sum => self.result = self.result.wrapping_add(value),
            Combine::Last if index as usize + 1 == self.waves.len() => self.result = value,
            Combine::Last => {}
        }
    }

    /// How many waves it began with.
    pub(crate) fn wave_count(&self) -> u32 {
        // No more than `max_waves`.
        self.waves.len() as u32
    }

    /// How it ended, or will.
    pub(crate) fn status(&self) -> JobStatus {
        match self.failure {
            None => JobStatus::Ok,
            Some(Failure::Cancelled { .. }) => JobStatus::Fault,
            Some(Failure::Killed) => JobStatus::Killed,
            Some(Failure::NoMemory { lack, .. }) => match lack {
                Lack::Absent => JobStatus::BusError,
                Lack::Poisoned => JobStatus::MemoryError,
            },
        }
    }

    /// The event that tells of its end.
    pub(crate) fn fence_event(&self) -> FenceEvent {
        let (page, access, cause) = match self.failure {
            None | Some(Failure::Killed) => (GpuVa::default(), 0, 0),
            Some(Failure::Cancelled {
                page,
                access,
                cause,
            }) => (page, access.raw(), cause.raw()),
            Some(Failure::NoMemory { page, access, .. }) => (page, access.raw(), 0),
        };
        let result = if self.failure.is_none() {
            self.result
        } else {
            0
        };
        FenceEvent {
            header: super::event::header(EventKind::Fence, self.context),
            fence: U64::new(self.fence),
            result: U64::new(result),
            page,
            status: U32::new(self.status().raw()),
            access,
            cause,
            reserved: [0; 26],
        }
    }
}
