// SPDX-License-Identifier: MIT OR Apache-2.0
//! QEMU's command line, as a plain function of what the VM shall be. Starts nothing.

use std::{
    ffi::{OsStr, OsString},
    path::{Path, PathBuf},
};

use farfault_init::{MODE_KEY, PORT_NAME};

use crate::accel::Accel;

/// The GPU's virtio device as QEMU is told of it; device and driver know the same numbers.
mod gpu {
    /// A type that no driver of Linux claims.
    pub(super) const VIRTIO_ID: u32 = 38;
    /// Control, submit, event.
    pub(super) const QUEUES: u32 = 3;
    pub(super) const QUEUE_SIZE: u32 = 512;
    pub(super) const CONFIG_SIZE: u32 = 256;
}

/// As many GPUs as a VM has root ports for at most.
pub(crate) const MAX_GPUS: usize = 8;

/// What the VM shall be.
#[derive(Debug, Clone)]
pub(crate) struct Spec<'a> {
    /// Program and first arguments of QEMU.
    pub(crate) qemu: Vec<OsString>,
    pub(crate) accel: Accel,
    pub(crate) memory_mib: u32,
    pub(crate) cpus: u32,
    /// Their model.
    pub(crate) cpu: &'a str,
    pub(crate) kernel: &'a Path,
    pub(crate) initramfs: &'a Path,
    pub(crate) kernel_args: &'a [String],
    pub(crate) host: Host<'a>,
    /// The sockets of the GPUs that are there from the start.
    pub(crate) gpus: Vec<PathBuf>,
    /// Root ports beside those of the GPUs.
    pub(crate) spare_slots: usize,
    /// Files of disks, in the order of their names in the guest.
    pub(crate) disks: Vec<PathBuf>,
    pub(crate) numa_nodes: u32,
}

/// Who is at the other end of the VM.
#[derive(Debug, Clone)]
pub(crate) enum Host<'a> {
    /// The harness, which listens on these sockets.
    Harness {
        console: &'a Path,
        agent: &'a Path,
        qmp: &'a Path,
    },
    /// A person, at this terminal.
    Person,
}

/// The whole command line, the program first.
pub(crate) fn command_line(spec: &Spec<'_>) -> Vec<OsString> {
    let mut line = Line(spec.qemu.clone());
    line.add("-name", "farfault");
    line.0
        .extend(["-nodefaults", "-no-user-config", "-no-reboot"].map(OsString::from));
    line.add("-display", "none");
    line.add("-accel", spec.accel.argument());
    line.add("-cpu", spec.cpu);
    line.add("-m", format!("{}M", spec.memory_mib));
    add_nodes(&mut line, spec);
    // ACPI hot-plug cannot remove a vhost-user device whose driver is bound; PCIe's own can.
    line.add(
        "-global",
        "ICH9-LPC.acpi-pci-hotplug-with-bridge-support=off",
    );
    line.add("-kernel", spec.kernel);
    line.add("-initrd", spec.initramfs);
    line.add("-append", kernel_command_line(spec));
    match spec.host {
        Host::Harness {
            console,
            agent,
            qmp,
        } => {
            line.add("-chardev", with_path("file,id=console,path=", console));
            line.add("-serial", "chardev:console");
            line.add("-chardev", with_path("socket,id=qmp,path=", qmp));
            line.add("-mon", "chardev=qmp,mode=control");
            line.add("-chardev", with_path("socket,id=agent,path=", agent));
            line.add("-device", "virtio-serial-pci,id=serial");
            line.add(
                "-device",
                format!("virtserialport,bus=serial.0,chardev=agent,name={PORT_NAME}"),
            );
        }
        Host::Person => line.add("-serial", "mon:stdio"),
    }
    add_disks(&mut line, spec);
    for slot in 0..spec.gpus.len() + spec.spare_slots {
        line.add(
            "-device",
            format!(
                "pcie-root-port,id={},chassis={1},slot={1}",
                root_port(slot),
                slot + 1
            ),
        );
    }
    for (index, socket) in spec.gpus.iter().enumerate() {
        let chardev = format!("socket,id={},path=", gpu_chardev(index));
        line.add("-chardev", with_path(&chardev, socket));
        let properties = gpu_properties(index)
            .map(|(key, value)| format!(",{key}={value}"))
            .concat();
        line.add("-device", format!("{GPU_DRIVER}{properties}"));
    }
    line.0
}

/// CPUs, RAM, and the nodes that they belong to. The GPU maps it, so it must be a file that can be shared.
fn add_nodes(line: &mut Line, spec: &Spec<'_>) {
    let ram = |id: &str, mib: u32| format!("memory-backend-memfd,id={id},size={mib}M,share=on");
    if spec.numa_nodes < 2 {
        line.add("-smp", spec.cpus.to_string());
        line.add("-object", ram("ram", spec.memory_mib));
        line.add("-machine", "q35,memory-backend=ram");
        return;
    }
    // The kernel does not expect two nodes in one socket.
    line.add("-smp", format!("{},sockets={}", spec.cpus, spec.numa_nodes));
    line.add("-machine", "q35");
    for node in 0..spec.numa_nodes {
        let id = format!("ram{node}");
        line.add("-object", ram(&id, spec.memory_mib / spec.numa_nodes));
        line.add("-numa", format!("node,nodeid={node},memdev={id}"));
        line.add("-numa", format!("cpu,node-id={node},socket-id={node}"));
    }
}

fn add_disks(line: &mut Line, spec: &Spec<'_>) {
    for (index, file) in spec.disks.iter().enumerate() {
        let drive = format!("if=none,id=disk{index},format=raw,cache=unsafe,discard=unmap,file=");
        line.add("-drive", with_path(&drive, file));
        line.add("-device", format!("virtio-blk-pci,drive=disk{index}"));
    }
}

/// QEMU's name for a vhost-user device of any type.
pub(crate) const GPU_DRIVER: &str = "vhost-user-test-device-pci";

/// The properties of one GPU, the same for the command line and for hot-plug.
pub(crate) fn gpu_properties(index: usize) -> [(&'static str, String); 7] {
    [
        ("id", gpu_id(index)),
        ("bus", root_port(index)),
        ("chardev", gpu_chardev(index)),
        ("virtio-id", gpu::VIRTIO_ID.to_string()),
        ("num_vqs", gpu::QUEUES.to_string()),
        ("vq_size", gpu::QUEUE_SIZE.to_string()),
        ("config_size", gpu::CONFIG_SIZE.to_string()),
    ]
}

pub(crate) fn gpu_id(index: usize) -> String {
    format!("gpu{index}")
}

pub(crate) fn gpu_chardev(index: usize) -> String {
    format!("gpu{index}-socket")
}

fn root_port(slot: usize) -> String {
    format!("port{slot}")
}

fn kernel_command_line(spec: &Spec<'_>) -> String {
    let mode = match spec.host {
        Host::Harness { .. } => "agent",
        Host::Person => "shell",
    };
    let mut words = vec![
        "console=ttyS0".to_owned(),
        // Warnings reach the console, the boot's chatter does not: a serial line costs a second for it.
        "loglevel=5".to_owned(),
        // With -no-reboot, a panic ends QEMU.
        "panic=-1".to_owned(),
        "random.trust_cpu=on".to_owned(),
        // On a busy host an emulated timer can be late for the kernel's look at it, which then panics.
        "no_timer_check".to_owned(),
        format!("{MODE_KEY}={mode}"),
    ];
    words.extend(spec.kernel_args.iter().cloned());
    words.join(" ")
}

fn with_path(start: &str, path: &Path) -> OsString {
    let mut text = OsString::from(start);
    text.push(path);
    text
}

struct Line(Vec<OsString>);

impl Line {
    fn add(&mut self, option: &str, value: impl AsRef<OsStr>) {
        self.0.push(option.into());
        self.0.push(value.as_ref().to_owned());
    }
}

/// A command line as a shell reads it.
pub(crate) fn quoted(line: &[OsString]) -> String {
    line.iter()
        .map(|word| quoted_word(&word.to_string_lossy()))
        .collect::<Vec<_>>()
        .join(" ")
}

fn quoted_word(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_=,./:+@%".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(host: Host<'_>, gpus: usize, spare_slots: usize) -> Vec<String> {
        let spec = Spec {
            qemu: vec!["qemu".into()],
            accel: Accel::Tcg,
            memory_mib: 2048,
            cpus: 2,
            cpu: "max",
            kernel: Path::new("/k"),
            initramfs: Path::new("/i"),
            kernel_args: &["debug".to_owned()],
            host,
            gpus: (0..gpus)
                .map(|index| format!("/s/gpu{index}").into())
                .collect(),
            spare_slots,
            disks: Vec::new(),
            numa_nodes: 1,
        };
        command_line(&spec)
            .into_iter()
            .map(|word| word.into_string().unwrap())
            .collect()
    }

    fn harness() -> Host<'static> {
        Host::Harness {
            console: Path::new("/c"),
            agent: Path::new("/a"),
            qmp: Path::new("/q"),
        }
    }

    fn count(line: &[String], text: &str) -> usize {
        line.iter().filter(|word| word.contains(text)).count()
    }

    #[test]
    fn command_line_with_two_gpus_and_a_spare_slot_has_three_root_ports() {
        let line = line(harness(), 2, 1);
        assert_eq!(count(&line, "pcie-root-port"), 3);
        assert_eq!(count(&line, GPU_DRIVER), 2);
        let second = "id=gpu1,bus=port1,chardev=gpu1-socket,virtio-id=38,num_vqs=3,vq_size=512,config_size=256";
        assert_eq!(count(&line, second), 1, "{line:?}");
        assert_eq!(count(&line, "socket,id=gpu1-socket,path=/s/gpu1"), 1);
    }

    #[test]
    fn command_line_for_the_harness_shares_memory_and_starts_the_agent() {
        let line = line(harness(), 0, 0);
        assert_eq!(
            count(&line, "memory-backend-memfd,id=ram,size=2048M,share=on"),
            1
        );
        assert_eq!(count(&line, "farfault_init.mode=agent debug"), 1);
        assert_eq!(count(&line, "name=farfault.agent"), 1);
    }

    #[test]
    fn command_line_for_a_person_has_a_shell_at_the_terminal_and_no_sockets() {
        let line = line(Host::Person, 0, 0);
        assert_eq!(count(&line, "mon:stdio"), 1);
        assert_eq!(count(&line, "farfault_init.mode=shell"), 1);
        assert_eq!(count(&line, "socket"), 0);
    }

    #[test]
    fn quoted_of_words_with_blanks_and_quotes_is_what_a_shell_reads_back() {
        let line = ["-append", "a b", "it's", ""].map(OsString::from);
        assert_eq!(quoted(&line), r"-append 'a b' 'it'\''s' ''");
    }
}
