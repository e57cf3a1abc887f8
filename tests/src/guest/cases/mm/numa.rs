// SPDX-License-Identifier: MIT OR Apache-2.0
//! NUMA nodes: the kernel moves mirrored pages between them, by request and by hinting faults, and the GPU
//! follows. Pages in VRAM are on no node; they come home to the one that the policy says.

use super::{
    frames::count_on_node,
    start::{
        At, SEED, STARTS, Start, ensure_sum, eventually, exercise, exercise_all, spin, while_adding,
    },
    storage::vmstat,
    swap::MIRRORED,
};
use crate::guest::{
    call::Job,
    oracle,
    place::{ensure_place, migrate, move_all},
    tunables::Tunables,
};
use anyhow::{Context, Result, ensure};
use farfault::arena::{Backing, Region};
use farfault::{Gpu, HUGE_PAGE_SIZE, PAGE_SIZE, Place, numa::move_all_pages};
use rustix::thread::{CpuSet, sched_setaffinity};
use std::time::Duration;

group! { "mm::numa", on Numa, seconds 120:
    move_pages_of_mirrored_pages_is_followed_by_the_gpu,
    mbind_of_mirrored_pages_is_followed_by_the_gpu,
    migrate_pages_of_the_process_is_followed_by_the_gpu,
    pages_moved_between_nodes_during_a_job_lose_nothing,
    pages_in_vram_are_not_moved_between_nodes,
    pages_come_home_to_the_node_of_their_policy,
    pages_come_home_to_the_node_of_the_cpu_that_touches_them,
    hinting_faults_on_mirrored_pages_are_served_for_cpu_and_gpu,
    hinting_faults_beside_pages_in_vram_lose_nothing,
}

/// Runs on this CPU only, which on this machine is the one of the node of that number.
pub(in crate::guest) fn on_cpu(cpu: usize) -> Result<()> {
    let mut set = CpuSet::new();
    set.set(cpu);
    Ok(sched_setaffinity(None, &set)?)
}

fn on_all_cpus() -> Result<()> {
    let mut set = CpuSet::new();
    set.set(0);
    set.set(1);
    Ok(sched_setaffinity(None, &set)?)
}

/// On 2 MiB of mirrored pages, first on node 0.
fn each_mirrored(case: impl Fn(&Gpu, Region) -> Result<()>) -> Result<()> {
    let _balancing = balancing_off()?;
    for start in MIRRORED {
        let gpu = Gpu::open_first()?;
        let region = start.region(&gpu, HUGE_PAGE_SIZE)?;
        move_to(region, 0)?;
        Job::add(region, 0).waves(2).run(&gpu)?;
        case(&gpu, region).with_context(|| format!("{start:?}"))?;
        region.unmap()?;
    }
    Ok(())
}

fn ensure_on(region: Region, node: u32) -> Result<()> {
    let (pages, there) = (region.pages().count(), count_on_node(region, node)?);
    ensure!(
        there == pages,
        "{there} of {pages} pages are on node {node}"
    );
    Ok(())
}

/// Pages that somebody holds for a moment move the next time.
fn move_to(region: Region, node: u32) -> Result<()> {
    eventually("the pages are on the other node", || {
        region.move_to_node(i32::try_from(node)?)?;
        Ok(ensure_on(region, node).is_ok())
    })
}

/// After a move: the GPU has lost the old pages, and finds the new ones.
fn ensure_followed(gpu: &Gpu, region: Region, added: u64) -> Result<()> {
    let states = gpu.query(region.pages())?;
    ensure!(
        states.iter().all(|page| page.gpu.place == Place::None),
        "the GPU has pages that have moved"
    );
    ensure_sum(gpu, region, 0, added)?;
    exercise(gpu, region, 0, added)
}

fn move_pages_of_mirrored_pages_is_followed_by_the_gpu() -> Result<()> {
    each_mirrored(|gpu, region| {
        for (round, node) in [1, 0, 1].into_iter().enumerate() {
            move_to(region, node)?;
            ensure_followed(gpu, region, 2 * round as u64)?;
            ensure_on(region, node)?;
        }
        Ok(())
    })
}

fn mbind_of_mirrored_pages_is_followed_by_the_gpu() -> Result<()> {
    each_mirrored(|gpu, region| {
        for (round, node) in [1, 0].into_iter().enumerate() {
            eventually("the pages are where the policy says", || {
                region.bind_to_node(node)?;
                Ok(ensure_on(region, node).is_ok())
            })?;
            ensure_followed(gpu, region, 2 * round as u64)?;
            ensure_on(region, node)?;
        }
        Ok(())
    })
}

fn migrate_pages_of_the_process_is_followed_by_the_gpu() -> Result<()> {
    each_mirrored(|gpu, region| {
        for (round, (from, to)) in [(0, 1), (1, 0)].into_iter().enumerate() {
            eventually("the process is on the other node", || {
                move_all_pages(from, to)?;
                Ok(ensure_on(region, to).is_ok())
            })?;
            ensure_followed(gpu, region, 2 * round as u64)?;
        }
        Ok(())
    })
}

fn pages_moved_between_nodes_during_a_job_lose_nothing() -> Result<()> {
    each_mirrored(|gpu, region| {
        for round in 0..4u64 {
            while_adding(gpu, region, || {
                for node in [1, 0, 1, 0] {
                    region.move_to_node(node)?;
                }
                Ok(())
            })?;
            oracle::check(region, SEED, round + 1)?;
        }
        exercise(gpu, region, 0, 4)
    })
}

fn in_vram() -> [Start; 2] {
    [Backing::Small, Backing::Huge].map(|backing| Start {
        backing,
        at: At::Vram,
    })
}

fn pages_in_vram_are_not_moved_between_nodes() -> Result<()> {
    for start in in_vram() {
        let gpu = Gpu::open_first()?;
        let region = start.region(&gpu, HUGE_PAGE_SIZE)?;
        for node in [0, 1] {
            let moved = region.move_to_node(node)?;
            // "The page is not present", as for pages that are swapped out.
            ensure!(moved.iter().all(|&status| status == -2), "{moved:?}");
            region.bind_to_node(node.try_into()?)?;
            move_all_pages(0, 1)?;
        }
        ensure_place(&gpu, region, Place::Vram)?;
        exercise_all(&gpu, region).with_context(|| format!("{start:?}"))?;
        region.unmap()?;
    }
    Ok(())
}

fn pages_come_home_to_the_node_of_their_policy() -> Result<()> {
    let _balancing = balancing_off()?;
    for start in in_vram() {
        for node in [0u32, 1] {
            let gpu = Gpu::open_first()?;
            let region = start.region(&gpu, HUGE_PAGE_SIZE)?;
            region.bind_to_node(node)?;
            // The CPU is one of the other node.
            on_cpu(1 - node as usize)?;
            let context = || format!("{start:?} to node {node}");
            oracle::check(region, SEED, 0)?;
            ensure_on(region, node)
                .context("by a CPU's touch")
                .with_context(context)?;
            move_all(&gpu, region, Place::Vram)?;
            move_all(&gpu, region, Place::Ram)?;
            ensure_on(region, node)
                .context("by a request")
                .with_context(context)?;
            // New pages of the GPU's fault, too.
            region.discard()?;
            Job::fill(region, 0).waves(2).run(&gpu)?;
            ensure_on(region, node)
                .context("by the GPU's first touch")
                .with_context(context)?;
            oracle::write(region, SEED);
            exercise_all(&gpu, region).with_context(context)?;
            on_all_cpus()?;
            region.unmap()?;
        }
    }
    Ok(())
}

fn pages_come_home_to_the_node_of_the_cpu_that_touches_them() -> Result<()> {
    let _balancing = balancing_off()?;
    for start in in_vram() {
        for node in [1u32, 0] {
            let gpu = Gpu::open_first()?;
            let region = start.region(&gpu, HUGE_PAGE_SIZE)?;
            on_cpu(node as usize)?;
            oracle::check(region, SEED, 0)?;
            ensure_on(region, node).with_context(|| format!("{start:?}"))?;
            on_all_cpus()?;
            exercise_all(&gpu, region)?;
            region.unmap()?;
        }
    }
    Ok(())
}

const BALANCING: &str = "/proc/sys/kernel/numa_balancing";

/// The kernel watches all the time where tasks use their memory, until this is dropped.
fn balancing_often() -> Result<Tunables> {
    let settings = [
        ("scan_delay_ms", "1"),
        ("scan_period_min_ms", "5"),
        ("scan_period_max_ms", "20"),
    ];
    let mut tunables = Tunables::set("/sys/kernel/debug/sched/numa_balancing", &settings)?;
    tunables.also(BALANCING, "1")?;
    Ok(tunables)
}

/// Pages stay on their nodes, unless they are asked to move.
fn balancing_off() -> Result<Tunables> {
    let mut tunables = Tunables::default();
    tunables.also(BALANCING, "0")?;
    Ok(tunables)
}

fn hinting_faults_on_mirrored_pages_are_served_for_cpu_and_gpu() -> Result<()> {
    for by_gpu in [true, false] {
        let balancing = balancing_often()?;
        let start = MIRRORED[0];
        let gpu = Gpu::open_first()?;
        let region = start.region(&gpu, HUGE_PAGE_SIZE)?;
        move_to(region, 1)?;
        on_cpu(0)?;
        Job::add(region, 0).waves(2).run(&gpu)?;
        let (updates, faults) = (vmstat("numa_pte_updates")?, vmstat("numa_hint_faults")?);
        // A task that works is looked at; what it has mapped, the GPU loses.
        eventually(
            "the kernel takes the GPU's pages to see who uses them",
            || {
                spin(Duration::from_millis(20));
                let states = gpu.query(region.pages())?;
                Ok(states.iter().any(|page| page.gpu.place == Place::None))
            },
        )?;
        ensure!(vmstat("numa_pte_updates")? > updates);
        if by_gpu {
            Job::add(region, 1).waves(2).run(&gpu)?;
            oracle::check(region, SEED, 1)?;
        } else {
            oracle::check(region, SEED, 0)?;
            Job::add(region, 1).waves(2).run(&gpu)?;
        }
        ensure!(vmstat("numa_hint_faults")? > faults);
        // And with the kernel at it all the time.
        for added in 2..6 {
            Job::add(region, 1).waves(2).run(&gpu)?;
            oracle::check(region, SEED, added)?;
        }
        drop(balancing);
        on_all_cpus()?;
        exercise(&gpu, region, 0, 5)?;
        region.unmap()?;
    }
    Ok(())
}

/// Of each size, from every start, with the kernel looking all the time: it takes entries of the CPU, of small and of
/// huge pages, which have no page in RAM or go to VRAM in the next moment.
fn hinting_faults_beside_pages_in_vram_lose_nothing() -> Result<()> {
    const ROUNDS: u64 = 6;
    let balancing = balancing_often()?;
    on_cpu(0)?;
    let looks = || vmstat("numa_pte_updates");
    let before = looks()?;
    for start in STARTS {
        let gpu = Gpu::open_first()?;
        let region = start.region(&gpu, 2 * HUGE_PAGE_SIZE)?;
        for round in 0..ROUNDS {
            while_adding(&gpu, region, || {
                let place = if round % 2 == 0 {
                    Place::Ram
                } else {
                    Place::Vram
                };
                migrate(&gpu, region.part(0, HUGE_PAGE_SIZE), place)?;
                // A task that works is looked at.
                spin(Duration::from_millis(20));
                Ok(())
            })?;
            oracle::check_part(region.part(0, PAGE_SIZE), SEED, 0, round + 1)
                .with_context(|| format!("{start:?}"))?;
        }
        oracle::check(region, SEED, ROUNDS).with_context(|| format!("{start:?}"))?;
        exercise(&gpu, region, 0, ROUNDS).with_context(|| format!("{start:?}"))?;
        region.unmap()?;
    }
    ensure!(looks()? > before, "the kernel never looked");
    drop(balancing);
    on_all_cpus()
}
