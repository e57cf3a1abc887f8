// SPDX-License-Identifier: MIT OR Apache-2.0
//! The GPU is there and is the one that the host has configured.

use crate::guest::VRAM;
use anyhow::{Result, ensure};
use farfault::{Gpu, uapi};

group! { "smoke", on Small, seconds 20:
    info_of_the_gpu_is_what_the_host_configured,
    ping_is_answered,
    each_open_is_an_address_space_of_its_own,
    stats_of_a_new_descriptor_are_zero,
}

fn info_of_the_gpu_is_what_the_host_configured() -> Result<()> {
    let gpu = Gpu::open("/dev/farfault0")?;
    let info = gpu.info();
    ensure!(info.uapi_version == uapi::UAPI_VERSION, "{info:?}");
    ensure!(info.vram_size == VRAM, "{info:?}");
    ensure!(info.max_waves >= 64 && info.max_jobs >= 128, "{info:?}");
    Ok(())
}

fn ping_is_answered() -> Result<()> {
    let gpu = Gpu::open_first()?;
    for _ in 0..100 {
        gpu.ping()?;
    }
    // PING has no argument: whatever is passed is not looked at.
    Ok(farfault::arena::call_at(&gpu, uapi::IOC_PING, u64::MAX)?)
}

fn each_open_is_an_address_space_of_its_own() -> Result<()> {
    let gpus = (0..4)
        .map(|_| Gpu::open_first())
        .collect::<Result<Vec<_>, _>>()?;
    let mut contexts: Vec<_> = gpus.iter().map(|gpu| gpu.info().context).collect();
    contexts.sort_unstable();
    contexts.dedup();
    ensure!(contexts.len() == gpus.len(), "contexts {contexts:?}");
    Ok(())
}

fn stats_of_a_new_descriptor_are_zero() -> Result<()> {
    let busy = Gpu::open_first()?;
    busy.add(&mut vec![1; 4096], 1)?;
    let stats = busy.stats()?;
    ensure!(stats.jobs == 1 && stats.gpu_faults > 0, "{stats:?}");
    let new = Gpu::open_first()?.stats()?;
    ensure!(new == uapi::Stats::default(), "{new:?}");
    Ok(())
}
