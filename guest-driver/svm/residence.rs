// SPDX-License-Identifier: GPL-2.0
//! What mm asks of a page in VRAM: bring it home for the CPU, and take it back when nobody has it.

use super::{flight::Flight, Space};
use crate::{
    gpu::Gpu,
    kapi::{
        migrate::Collected,
        pagemap::{DevicePage, DevicePagemap, Fault, PagemapOps, VmFault},
        trace::{self, Cause, Direction},
    },
    vram::VramPage,
};
use kernel::{page::PAGE_SIZE, prelude::*, sync::Arc};

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
    /// memory and the task tries again or is killed, or the device is lost or the page has failed and the
    /// task gets SIGBUS.
    fn migrate_to_ram(map: &DevicePagemap<Self>, fault: &Fault<'_>) -> VmFault {
        let gpu = &map.gpu;
        let bytes = PAGE_SIZE << fault.order();
        let start = fault.address() & !(bytes - 1);
        let page = map.lookup(fault.pfn()).map(VramPage::from);
        // Of a huge one, those that are sound come home: it is split first.
        if fault.order() == 0 && page.is_some_and(|page| gpu.vram.has_failed(page)) {
            return VmFault::SigBus;
        }
        let collected = match Collected::fault(fault, start..start + bytes, map.owner()) {
            Ok(collected) => collected,
            Err(e) if e == ENOMEM => return VmFault::Oom,
            Err(_) => return VmFault::SigBus,
        };
        let context = page.and_then(|page| gpu.vram.context_of(page));
        let fails = || {
            context
                .and_then(|context| gpu.contexts.with(context, Space::takes_failure))
                .unwrap_or(false)
        };
        let flight = Flight::home(gpu, map, collected, |_| true, fails);
        let moved = match flight.and_then(Flight::land) {
            Ok(migrated) => migrated.count() as u64,
            Err(e) if e == ENOMEM => return VmFault::Oom,
            // A page has failed just now: the task looks again, when it is known which.
            Err(e) if e == EAGAIN => return VmFault::Done,
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
        // If it did not move, somebody else works on it, or it was a huge page that comes in small ones
        // now: the task looks again.
        VmFault::Done
    }
}
