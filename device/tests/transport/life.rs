// SPDX-License-Identifier: MIT OR Apache-2.0
//! Reset, the end of a VM, and the end of the process. Manual, chapter 10.

use crate::{
    device::{Device, program},
    guest::{DATA, DEADLINE, GUEST_BASE, Guest, RING_SIZE, copy, launch, nop, ram},
    ring::Ring,
};
use farfault_device::{
    gpu::{Gpu, Settings},
    transport::local::{Local, RingPlace},
};
use farfault_protocol::{
    address::VramAddr,
    config::queue,
    pte::Location,
    submit::{CopyRun, Kernel},
};
use rustix::process::Signal;
use std::{
    fs,
    os::unix::{fs::PermissionsExt, net::UnixStream},
    process::Command,
    thread,
    time::{Duration, Instant},
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// Makes a job that never ends by itself, and a lot of copies that are on their way.
fn start_work(guest: &mut Guest) {
    let tables = guest.create_context(1);
    guest.map(tables, 0x1000, Location::Vram(VramAddr::new(0x20_0000)));
    // A word that points to itself: chased for ever.
    guest
        .memory
        .write_obj(0x1000u64.to_le(), GuestAddress(DATA))
        .unwrap();
    guest.submit_ok(&copy(&[CopyRun::upload(
        ram(0),
        VramAddr::new(0x20_0000),
        4096,
    )]));
    guest.submit_ok(&launch(
        1,
        Kernel::PointerChase,
        1,
        [0x1000, u64::MAX, 0, 0],
    ));
    for _ in 0..16 {
        let run = CopyRun::upload(ram(0), VramAddr::new(0x40_0000), 4 << 20);
        guest.send(queue::SUBMIT, &copy(&[run; 1]), 8);
    }
}

#[test]
fn reset_is_one_although_the_first_rings_to_run_again_were_never_used() {
    let device = Device::start();
    // The event queue alone is used: the other two are as new, and are started before it.
    let mut guest = Guest::boot(&device);
    let before = device.transport_stat("resets");
    guest.stop();
    guest.start_with_breaks(Duration::from_millis(100));
    guest.control_ok(&nop());
    assert_eq!(device.transport_stat("resets"), before + 1);
}

#[test]
fn reset_in_the_middle_of_work_makes_the_gpu_as_new() {
    let device = Device::start();
    let mut guest = Guest::boot(&device);
    guest
        .memory
        .write_slice(&[0xaa; 4096], GuestAddress(DATA + 4096))
        .unwrap();
    guest.submit_ok(&copy(&[CopyRun::upload(ram(4096), VramAddr::new(0), 4096)]));
    for _ in 0..5 {
        start_work(&mut guest);
        guest.stop();
        guest.start();
        guest.control_ok(&nop());
    }
    assert_eq!(
        device
            .json(&["inspect", "contexts"])
            .as_array()
            .map(Vec::len),
        Some(0)
    );
    guest.submit_ok(&copy(&[CopyRun::download(
        VramAddr::new(0),
        ram(8192),
        4096,
    )]));
    let mut after = [1; 4096];
    guest
        .memory
        .read_slice(&mut after, GuestAddress(DATA + 8192))
        .unwrap();
    assert_eq!(after, [0; 4096], "VRAM of before the reset");
}

#[test]
fn pause_of_the_vm_keeps_contexts_jobs_vram_and_replies() {
    let device = Device::start();
    let mut guest = Guest::boot(&device);
    let tables = guest.create_context(1);
    guest.map(tables, 0x1000, Location::Vram(VramAddr::new(0x20_0000)));
    guest
        .memory
        .write_obj(0x1000u64.to_le(), GuestAddress(DATA))
        .unwrap();
    let upload = CopyRun::upload(ram(0), VramAddr::new(0x20_0000), 4096);
    guest.submit_ok(&copy(&[upload]));
    // It chases itself for ever.
    let endless = [0x1000, u64::MAX, 0, 0];
    guest.submit_ok(&launch(1, Kernel::PointerChase, 1, endless));
    for round in 0..20 {
        let large = CopyRun::upload(ram(0), VramAddr::new(0x40_0000), 4 << 20);
        let heads = [0; 4].map(|_| guest.send(queue::SUBMIT, &copy(&[large]), 8));
        guest.pause(Duration::from_millis(round % 4));
        let mut left = heads.to_vec();
        while !left.is_empty() {
            let (head, _) = guest.receive_any(queue::SUBMIT);
            left.retain(|other| *other != head);
        }
        guest.control_ok(&nop());
    }
    let contexts = device.json(&["inspect", "contexts"]);
    assert_eq!(contexts.as_array().map(Vec::len), Some(1));
    let jobs = device.json(&["inspect", "jobs"]);
    assert_eq!(jobs.as_array().map(Vec::len), Some(1));
}

#[test]
fn pause_is_one_although_a_ring_is_first_looked_at_after_it() {
    let ranges = [(GuestAddress(GUEST_BASE), 1 << 20)];
    let memory = GuestMemoryMmap::from_ranges(&ranges).unwrap();
    let rings = [0, 1, 2].map(|index| Ring::new(&memory, index, RING_SIZE));
    let gpu = Gpu::new(Settings::new(4 << 20)).unwrap();
    let device = Local::new(gpu).unwrap();
    device.set_memory(memory.clone()).unwrap();
    let start = |queue| {
        let ring = &rings[usize::from(queue)];
        let place = RingPlace {
            size: ring.size,
            descriptors: ring.descriptors(),
            available: ring.available(),
            used: ring.used(),
            base: 0,
        };
        device.start(queue, place).unwrap();
    };
    (0..queue::COUNT).for_each(start);
    device.kick(queue::SUBMIT).unwrap();
    (0..queue::COUNT).for_each(|queue| device.stop(queue).unwrap());
    // The kick of before the pause is heard now, with the other queues still to come.
    start(queue::CONTROL);
    device.kick(queue::CONTROL).unwrap();
    start(queue::SUBMIT);
    start(queue::EVENT);
    assert_eq!(device.look(|gpu| gpu.stats().resets), 0);
}

#[test]
fn pause_of_the_vm_loses_no_interrupt() {
    let device = Device::start();
    let mut guest = Guest::boot(&device);
    guest.control_ok(&nop());
    for ring in &guest.rings {
        let _what_was_before = ring.call.read();
    }
    guest.pause(Duration::ZERO);
    // An interrupt may have been on its way when the ring was stopped: nobody knows, so all get one.
    for ring in &guest.rings {
        assert!(ring.hears_interrupt());
    }
}

#[test]
fn ram_is_not_touched_after_a_reset() {
    let device = Device::start();
    let mut guest = Guest::boot(&device);
    for _ in 0..20 {
        for _ in 0..8 {
            let run = CopyRun::fill(0x1111_1111_1111_1111, VramAddr::new(0), 4 << 20);
            guest.send(queue::SUBMIT, &copy(&[run]), 8);
            let run = CopyRun::download(VramAddr::new(0), ram(0), 4 << 20);
            guest.send(queue::SUBMIT, &copy(&[run]), 8);
        }
        guest.stop();
        guest
            .memory
            .write_slice(&[7; 4 << 20], GuestAddress(DATA))
            .unwrap();
        thread::sleep(Duration::from_millis(5));
        let mut after = vec![0; 4 << 20];
        guest
            .memory
            .read_slice(&mut after, GuestAddress(DATA))
            .unwrap();
        assert!(
            after.iter().all(|&byte| byte == 7),
            "the device wrote after its reset"
        );
        guest.start();
    }
}

#[test]
fn front_end_that_disconnects_in_the_middle_leaves_a_new_gpu_to_the_next() {
    let device = Device::start();
    for round in 1..=3 {
        let mut guest = Guest::boot(&device);
        guest.control_ok(&nop());
        start_work(&mut guest);
        drop(guest);
        device.wait_for_transport_stat("resets", round);
    }
    let mut guest = Guest::boot(&device);
    assert_eq!(
        device
            .json(&["inspect", "contexts"])
            .as_array()
            .map(Vec::len),
        Some(0)
    );
    guest.control_ok(&nop());
}

#[test]
fn front_ends_one_after_the_other_leak_nothing() {
    let device = Device::start();
    let serve = |round| {
        let mut guest = Guest::boot(&device);
        guest.control_ok(&nop());
        drop(guest);
        device.wait_for_transport_stat("resets", round);
    };
    serve(1);
    let before = device.open_files();
    for round in 2..=20 {
        serve(round);
    }
    // The last session may still be closing its own.
    let start = Instant::now();
    while device.open_files() > before {
        assert!(
            start.elapsed() < DEADLINE,
            "{} open files, {before} before",
            device.open_files()
        );
        thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn once_ends_with_the_first_vm_but_not_with_someone_who_only_looks() {
    let mut device = Device::start_with(&["--vram", "4M", "--once"]);
    drop(UnixStream::connect(device.socket()).unwrap());
    let mut guest = Guest::boot(&device);
    guest.control_ok(&nop());
    device.assert_alive();
    drop(guest);
    assert!(device.wait().success());
    assert!(!device.socket().exists() && !device.control().exists());
}

/// What `/proc` says of each thread of the process.
fn seccomp_of_threads(device: &Device) -> Vec<String> {
    let tasks = fs::read_dir(device.proc().join("task")).unwrap();
    let status = tasks.map(|task| fs::read_to_string(task.unwrap().path().join("status")).unwrap());
    let line = |status: String| {
        status
            .lines()
            .find_map(|l| l.strip_prefix("Seccomp:").map(Into::into))
    };
    status.filter_map(line).collect()
}

#[test]
fn running_device_is_in_its_sandbox_with_all_its_threads() {
    for (options, mode) in [(&[][..], "2"), (&["--no-sandbox"][..], "0")] {
        let device = Device::start_with(&[&["--vram", "4M"], options].concat());
        let mut guest = Guest::boot(&device);
        guest.control_ok(&nop());
        let threads = seccomp_of_threads(&device);
        assert!(threads.len() > 5, "{threads:?}");
        assert!(
            threads.iter().all(|of_one| of_one.trim() == mode),
            "{threads:?}"
        );
    }
}

#[test]
fn sockets_are_their_owners_alone() {
    let device = Device::start();
    for path in [device.socket(), device.control()] {
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{}", path.display());
    }
}

#[test]
fn signal_ends_the_process_cleanly() {
    for with_vm in [false, true] {
        for signal in [Signal::TERM, Signal::INT] {
            let mut device = Device::start();
            let guest = with_vm.then(|| {
                let mut guest = Guest::boot(&device);
                start_work(&mut guest);
                guest
            });
            device.signal(signal);
            assert!(device.wait().success(), "{}", device.log());
            assert!(!device.socket().exists() && !device.control().exists());
            drop(guest);
        }
    }
}

#[test]
fn second_device_on_a_socket_in_use_is_refused() {
    let device = Device::start();
    let output = Command::new(program())
        .arg("--socket")
        .arg(device.socket())
        .output()
        .expect("it runs");
    assert_eq!(output.status.code(), Some(1));
    let message = String::from_utf8_lossy(&output.stderr);
    assert!(
        message.contains("in use") && message.trim().lines().count() == 1,
        "{message}"
    );
    Guest::boot(&device).control_ok(&nop());
}

#[test]
fn socket_left_by_a_killed_device_is_replaced() {
    let mut first = Device::start();
    first.signal(Signal::KILL);
    first.wait();
    assert!(first.socket().exists());
    let mut second = Command::new(program())
        .arg("--socket")
        .arg(first.socket())
        .spawn()
        .unwrap();
    let start = Instant::now();
    while UnixStream::connect(first.socket()).is_err() {
        assert!(start.elapsed() < DEADLINE, "the socket is not replaced");
        thread::sleep(Duration::from_millis(2));
    }
    second.kill().unwrap();
    second.wait().unwrap();
}
