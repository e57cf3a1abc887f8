// SPDX-License-Identifier: MIT OR Apache-2.0
//! The map of residency is true: for each page the driver's answer, `/proc/self/pagemap` and the
//! GPU's own page tables agree.

use super::{
    HostCase,
    inside::{self, Aperture, Mapping},
    machines::{After, Machines},
};
use anyhow::{Context, Result, ensure};
use farfault_tests::guest::{
    Machine,
    programs::{HOLD_PAGES, MappedPage, READY, Report},
};
use std::{collections::BTreeMap, time::Duration};
use xtask::vm::Vm;

const PAGE: u64 = 4096;

pub(crate) const CASES: &[HostCase] = &[HostCase {
    name: "tables::driver_pagemap_and_gpu_tables_agree_page_by_page",
    machine: Machine::Small,
    after: After::Keep,
    run: driver_pagemap_and_gpu_tables_agree_page_by_page,
}];

/// What the GPU's tables say of each page of a range.
fn pages_of(mappings: &[Mapping], range: &std::ops::Range<u64>) -> BTreeMap<u64, Mapping> {
    let mut pages = BTreeMap::new();
    for mapping in mappings {
        for offset in (0..mapping.length).step_by(PAGE as usize) {
            let page = Mapping {
                start: mapping.start + offset,
                length: PAGE,
                address: mapping.address + offset,
                ..mapping.clone()
            };
            if range.contains(&page.start) {
                pages.insert(page.start, page);
            }
        }
    }
    pages
}

fn agrees(driver: &MappedPage, gpu: &Mapping) -> bool {
    let place = match gpu.aperture {
        Aperture::Vram => driver.vram == Some(gpu.address) && driver.frame.is_none(),
        // The machine's RAM begins at zero, so that a frame's number is its address.
        Aperture::System => {
            driver.vram.is_none() && driver.frame.map(|frame| frame * PAGE) == Some(gpu.address)
        }
    };
    let flags = (driver.write, driver.atomic, driver.huge);
    place && flags == (gpu.writable, gpu.atomic, gpu.huge)
}

fn driver_pagemap_and_gpu_tables_agree_page_by_page(
    vm: &mut Vm,
    machines: &Machines,
) -> Result<()> {
    // That driver and pagemap agree, the program finds out itself.
    let process = inside::start(vm, machines, HOLD_PAGES, READY)?;
    let contexts = inside::contexts(vm, 0)?;
    ensure!(contexts.len() == 1, "{contexts:?}");
    let context = contexts.first().context("no context")?.context;
    let tables = inside::page_tables(vm, 0, context)?;
    let output = inside::go_on(process, machines, Duration::from_secs(30))?;

    ensure!(!tables.truncated && tables.bad_entries == 0, "{tables:?}");
    let text = output.stdout_text();
    let line = text.lines().next().context("the program printed nothing")?;
    let report: Report = serde_json::from_str(line).with_context(|| text.clone())?;
    ensure!(
        report.context == context,
        "context {} and {context}",
        report.context
    );
    ensure!(
        report.mapped.len() > 512 && report.in_vram.len() > 512,
        "{report:?}"
    );

    let gpu = pages_of(&tables.mappings, &report.range);
    for page in &report.mapped {
        let entry = gpu.get(&page.address);
        ensure!(
            entry.is_some_and(|entry| agrees(page, entry)),
            "the driver says {page:x?}, the GPU's tables say {entry:x?}"
        );
    }
    ensure!(
        gpu.len() == report.mapped.len(),
        "the GPU has {} pages mapped, the driver says {}",
        gpu.len(),
        report.mapped.len()
    );
    // No two addresses of one process have the same page of VRAM.
    let distinct: std::collections::HashSet<_> =
        report.in_vram.iter().map(|(_, vram)| vram).collect();
    ensure!(distinct.len() == report.in_vram.len());
    Ok(())
}
