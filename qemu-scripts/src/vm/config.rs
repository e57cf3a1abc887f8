// SPDX-License-Identifier: MIT OR Apache-2.0
//! What somebody who boots a VM can choose.

use std::time::Duration;

use crate::{setup::Kernel, vm::KnownReport};

/// A VM to boot. `Config { name: …, ..Config::default() }` is one with one GPU and the driver loaded.
#[derive(Debug, Clone)]
pub struct Config {
    /// What it is for: a test's name. Its logs are kept under it.
    pub name: String,
    /// How many GPUs it has from the start.
    pub gpus: usize,
    /// How much VRAM each has, as the device's `--vram` reads it.
    pub vram: String,
    /// Further arguments for the devices.
    pub device_args: Vec<String>,
    /// RAM, in MiB.
    pub memory_mib: u32,
    /// Virtual CPUs. More than the host has makes an emulated VM slower.
    pub cpus: u32,
    /// Their model, as QEMU names it; the one that suits what runs the VM if there is none.
    pub cpu: Option<String>,
    /// The driver.
    pub driver: Driver,
    /// Free slots for hot-plug.
    pub spare_slots: usize,
    /// Two disks: `vda` with an empty ext4, `vdb` with nothing. Needs [`Extra::Disks`](crate::build::Extra::Disks).
    pub disks: bool,
    /// NUMA nodes, among which RAM and CPUs are divided.
    pub numa_nodes: u32,
    /// Further words for the kernel's command line.
    pub kernel_args: Vec<String>,
    /// How long it may take until the guest is up; a kernel that is slow has more.
    pub boot_limit: Duration,
    /// Reports of the kernel's own bugs, which are no failure here.
    pub known_reports: &'static [KnownReport],
    /// The command that runs the same again; `cargo xtask test NAME` if there is none.
    pub repeat: Option<String>,
}

/// What becomes of the driver when the guest is up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Driver {
    /// It is loaded, with these parameters.
    Load(Vec<String>),
    /// The kernel's mock device is loaded instead, where the guest has it.
    Mock,
    /// Nothing.
    None,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            name: "vm".to_owned(),
            gpus: 1,
            vram: "1G".to_owned(),
            device_args: Vec::new(),
            memory_mib: 2048,
            cpus: 2,
            cpu: None,
            driver: Driver::Load(Vec::new()),
            spare_slots: 0,
            disks: false,
            numa_nodes: 1,
            kernel_args: Vec::new(),
            boot_limit: Duration::from_secs(120),
            known_reports: &[],
            repeat: None,
        }
    }
}

impl Config {
    /// The words for the kernel's command line, its own included.
    pub(crate) fn kernel_args(&self, kernel: &Kernel) -> Vec<String> {
        let own = kernel.arguments.iter().map(|word| (*word).to_owned());
        own.chain(self.kernel_args.iter().cloned()).collect()
    }

    pub(crate) fn repeat(&self) -> String {
        self.repeat
            .clone()
            .unwrap_or_else(|| format!("cargo xtask test {}", self.name))
            + "\n"
    }

    /// The arguments of GPU `index`, without its sockets.
    pub(crate) fn device_arguments(&self, index: usize, vram: &str) -> Vec<String> {
        let mut arguments = vec!["--serial".to_owned(), index.to_string()];
        arguments.extend(["--vram".to_owned(), vram.to_owned()]);
        arguments.extend(self.device_args.iter().cloned());
        arguments
    }
}
