// SPDX-License-Identifier: MIT OR Apache-2.0
//! The machines beside the small one have what they are for.

/// `sh` runs these lines to a good end.
fn shell(lines: &str) -> anyhow::Result<()> {
    let status = std::process::Command::new("sh")
        .args(["-ec", lines])
        .status()?;
    anyhow::ensure!(status.success(), "`{lines}` ended with {status}");
    Ok(())
}

pub(super) mod disk {
    use super::shell;
    use crate::guest::machine::{DISK, SWAP_DISK};
    use anyhow::Result;

    group! { "machines::disk", on Disk, seconds 60:
        ext4_on_the_disk_keeps_what_was_written,
        swap_disk_is_taken_as_swap,
    }

    fn ext4_on_the_disk_keeps_what_was_written() -> Result<()> {
        shell(&format!(
            "mkdir -p /run/disk; mount -t ext4 {DISK} /run/disk; echo kept > /run/disk/file; umount /run/disk; \
             mount -t ext4 {DISK} /run/disk; grep -q kept /run/disk/file; rm /run/disk/file; umount /run/disk"
        ))
    }

    fn swap_disk_is_taken_as_swap() -> Result<()> {
        shell(&format!(
            "mkswap {SWAP_DISK} > /dev/null; swapon {SWAP_DISK}; grep -q {SWAP_DISK} /proc/swaps; \
             swapoff {SWAP_DISK}; test -b /dev/zram0"
        ))
    }
}

pub(super) mod numa {
    use super::shell;
    use anyhow::Result;

    group! { "machines::numa", on Numa, seconds 60:
        nodes_are_two_with_a_cpu_each,
        movable_zone_is_there,
    }

    fn nodes_are_two_with_a_cpu_each() -> Result<()> {
        shell(
            "cd /sys/devices/system/node; test \"$(cat node0/cpulist node1/cpulist | xargs)\" = '0 1'",
        )
    }

    fn movable_zone_is_there() -> Result<()> {
        shell("grep -A 9 'zone  *Movable' /proc/zoneinfo | grep -q 'managed  *[1-9]'")
    }
}

pub(super) mod eight_gpus {
    use crate::guest::{Machine, call::Job, oracle};
    use anyhow::{Result, ensure};
    use farfault::arena::{Backing, Region};
    use farfault::{Gpu, PAGE_SIZE};

    group! { "machines::eight_gpus", on EightGpus, seconds 60:
        job_on_each_reads_the_same_memory,
    }

    const SEED: u64 = 0xe18;

    fn job_on_each_reads_the_same_memory() -> Result<()> {
        let region = Region::map(PAGE_SIZE, Backing::Small)?;
        oracle::write(region, SEED);
        for number in 0..Machine::EightGpus.gpus() {
            let gpu = Gpu::open(format!("/dev/farfault{number}"))?;
            let sum = Job::sum(region).run(&gpu)?;
            ensure!(sum == oracle::expected_sum(region, SEED, 0), "GPU {number}");
        }
        Ok(())
    }
}
