// SPDX-License-Identifier: GPL-2.0
//! What mm asks of a page in VRAM: bring it home for the CPU, and take it back when nobody has it.

use super::{flight::Flight, Space};
use crate::{
    gpu::Gpu,
    kapi::{
        migrate::Collected,
        pagemap::{DevicePage, DevicePagemap, Fault, PagemapOps, VmFault},
        signal::fatal_signal_pending,
        trace::{self, Cause, Direction},
    },
};
use kernel::{
    page::PAGE_SIZE,
    prelude::*,
    sync::Arc,
    time::{delay::fsleep, Delta},
};

/// Before a task looks again for a page that a worker brings home.
const PAUSE: Delta = Delta::from_millis(1);

/// The pages of one GPU's VRAM.
pub(crate) type Pagemap = DevicePagemap<Residence>;

/// The GPU behind a pagemap.
pub(crate) struct Residence {
    gpu: Arc<Gpu>,
}

impl Residence {
    pub(crate) fn new(gpu: Arc<Gpu>) -> Self {
        Self { gpu }
    }
}

impl PagemapOps for Residence {
    fn folio_free(map: &DevicePagemap<Self>, page: DevicePage, order: u32) {
        map.gpu.vram.give_back(page.into(), order);
    }

    /// Runs under the mmap lock and a page lock. It always ends: the page comes home, or there is no
    /// memory and the task tries again or is killed, or the device is lost and the task gets SIGBUS.
    fn migrate_to_ram(map: &DevicePagemap<Self>, fault: &Fault<'_>) -> VmFault {
        let gpu = &map.gpu;
        let bytes = PAGE_SIZE << fault.order();
        let start = fault.address() & !(bytes - 1);
        let collected = match Collected::fault(fault, start..start + bytes, map.owner()) {
            Ok(collected) => collected,
            Err(e) if e == ENOMEM => return VmFault::Oom,
            Err(_) => return VmFault::SigBus,
        };
        let page = map.lookup(fault.pfn());
        let context = page.and_then(|page| gpu.vram.context_of(page.into()));
        let fails = || {
            context
                .and_then(|context| gpu.contexts.with(context, Space::takes_failure))
                .unwrap_or(false)
        };
        let flight = Flight::home(gpu, map, collected, |_| true, fails);
        let moved = match flight.and_then(Flight::land) {
            Ok(migrated) => migrated.count() as u64,
            Err(e) if e == ENOMEM => return Self::wait_for_memory(gpu, context, fault, start),
            Err(_) => return VmFault::SigBus,
        };
        gpu.count(context, |c| &c.cpu_faults, 1);
        gpu.count(context, |c| &c.pages_to_ram, moved);
        trace::migrate(
            gpu.index(),
            context.unwrap_or(u32::MAX),
            start as u64,
            (start + bytes) as u64,
            Direction::ToSystem,
            Cause::CpuFault,
            moved,
            1 << fault.order(),
        );
        // If it did not move, somebody else works on it: the task looks again.
        VmFault::Done
    }
}

impl Residence {
    /// There was no memory. mm does not split a huge page during a fault on it, so a worker brings it
    /// home in small ones, and the task looks again.
    fn wait_for_memory(
        gpu: &Arc<Gpu>,
        context: Option<u32>,
        fault: &Fault<'_>,
        start: usize,
    ) -> VmFault {
        let huge = fault.order() != 0 && !fatal_signal_pending();
        if huge && context.is_some_and(|context| gpu.bring_home_later(context, start)) {
            fsleep(PAUSE);
            return VmFault::Done;
        }
        VmFault::Oom
    }
}
