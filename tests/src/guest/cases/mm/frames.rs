// SPDX-License-Identifier: MIT OR Apache-2.0
//! Where in RAM pages are: their frames, and the nodes and zones that these belong to by `/proc/zoneinfo`.

use anyhow::{Context, Result, ensure};
use farfault::{Place, arena::Region, pagemap};
use std::{fs, ops::Range};

/// A zone of a node.
#[derive(Clone, Debug)]
pub(super) struct Zone {
    pub(super) node: u32,
    pub(super) name: String,
    pub(super) frames: Range<u64>,
}

pub(super) fn zones() -> Result<Vec<Zone>> {
    let text = fs::read_to_string("/proc/zoneinfo")?;
    let mut zones = Vec::new();
    for part in text.split("Node ").skip(1) {
        let (head, rest) = part.split_once('\n').context("zoneinfo")?;
        let (node, name) = head.split_once(", zone").context("zoneinfo")?;
        let number = |name: &str| {
            let mut lines = rest
                .lines()
                .filter_map(|line| line.trim().strip_prefix(name));
            let word = lines.next()?.trim().parse::<u64>();
            word.ok()
        };
        let spanned = number("spanned ").unwrap_or(0);
        let start = number("start_pfn:").unwrap_or(0);
        zones.push(Zone {
            node: node.parse()?,
            name: name.trim().to_owned(),
            frames: start..start + spanned,
        });
    }
    ensure!(!zones.is_empty(), "zoneinfo has no zones");
    Ok(zones)
}

/// The frames of a region's pages, as far as they are in RAM.
pub(super) fn frames(region: Region) -> Result<Vec<u64>> {
    let entries = pagemap::read(region.pages())?;
    let in_ram = entries
        .iter()
        .filter(|entry| entry.place() == Some(Place::Ram));
    Ok(in_ram.filter_map(|entry| entry.frame()).collect())
}

/// How many pages of a region are in RAM and in such zones.
pub(super) fn count_in(region: Region, zone: impl Fn(&Zone) -> bool) -> Result<usize> {
    let zones: Vec<Zone> = zones()?.into_iter().filter(zone).collect();
    let frames = frames(region)?;
    let inside = |frame: &&u64| zones.iter().any(|zone| zone.frames.contains(frame));
    Ok(frames.iter().filter(inside).count())
}

/// How many pages of a region are in RAM of a node.
pub(super) fn count_on_node(region: Region, node: u32) -> Result<usize> {
    count_in(region, |zone| zone.node == node)
}

/// How many pages of a region are in RAM and in `ZONE_MOVABLE`.
pub(super) fn count_movable(region: Region) -> Result<usize> {
    count_in(region, |zone| zone.name == "Movable")
}
