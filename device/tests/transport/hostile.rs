// SPDX-License-Identifier: MIT OR Apache-2.0
//! A front end that means harm: what it sends ends its own connection at worst. The device stays, and
//! the next front end finds it as new.

use crate::{
    device::Device,
    guest::{DATA, DEADLINE, GUEST_BASE, GUEST_SIZE, Guest, copy, memory_file, nop, ram},
};
use farfault_protocol::{address::VramAddr, config::queue, submit::CopyRun};
use proptest::{
    prelude::*,
    strategy::ValueTree,
    test_runner::{Config, TestRunner},
};
use rustix::{
    event::EventfdFlags,
    fs::{SealFlags, fcntl_add_seals},
    process::Signal,
};
use std::{
    fs::File,
    io::{self, Read, Write},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::net::UnixStream,
    },
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};
use vhost::{
    VhostBackend, VhostUserMemoryRegionInfo, VringConfigData, vhost_user::VhostUserFrontend,
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};
use vmm_sys_util::{eventfd::EventFd, sock_ctrl_msg::ScmSocket};

const SET_OWNER: u32 = 3;
const GET_FEATURES: u32 = 1;
const SET_MEM_TABLE: u32 = 5;
const SET_VRING_KICK: u32 = 12;
const SET_VRING_CALL: u32 = 13;
/// Version 1 of the protocol, which each message must say.
const VERSION: u32 = 1;

/// A connection that sends what it is told to.
struct Raw(UnixStream);

impl Raw {
    fn connect(device: &Device) -> Self {
        let stream = UnixStream::connect(device.socket()).expect("the device listens");
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        stream
            .set_write_timeout(Some(Duration::from_millis(200)))
            .unwrap();
        Self(stream)
    }

    /// Sends a message; an error is one of a connection that the device has closed.
    fn send(&self, request: u32, flags: u32, body: &[u8], files: &[i32]) -> io::Result<()> {
        let header = [request, flags, body.len() as u32].map(u32::to_le_bytes);
        let message = [&header.concat(), body].concat();
        self.0
            .send_with_fds(&[&message[..]], files)
            .map(|_| ())
            .map_err(Into::into)
    }

    /// Waits until the device closes the connection.
    fn assert_closed(&mut self, why: &str) {
        let end = self.0.read_to_end(&mut Vec::new());
        let timed_out = matches!(&end, Err(error) if error.kind() == io::ErrorKind::WouldBlock);
        assert!(!timed_out, "{why}: the connection stays");
    }
}

/// A region of a memory table.
#[derive(Clone, Copy)]
struct Region {
    guest: u64,
    size: u64,
    user: u64,
    offset: u64,
}

fn region(guest: u64, size: u64) -> Region {
    Region {
        guest,
        size,
        user: guest,
        offset: 0,
    }
}

fn table(regions: &[Region]) -> Vec<u8> {
    let mut body = u64::to_le_bytes(regions.len() as u64).to_vec();
    for region in regions {
        for word in [region.guest, region.size, region.user, region.offset] {
            body.extend_from_slice(&word.to_le_bytes());
        }
    }
    body
}

fn sealed(size: u64) -> File {
    let file = memory_file(size);
    fcntl_add_seals(&file, SealFlags::SHRINK).unwrap();
    file
}

fn assert_serves(device: &mut Device, after: &str) {
    device.assert_alive();
    println!("after {after}");
    Guest::boot(device).control_ok(&nop());
}

#[test]
fn memory_table_that_cannot_be_used_is_refused() {
    const MIB: u64 = 1 << 20;
    let folder = tempfile::tempdir().unwrap();
    let on_disk = tempfile::tempfile().unwrap();
    on_disk.set_len(MIB).unwrap();
    let (pipe, _other_end) = io::pipe().unwrap();
    let (stream, _peer) = UnixStream::pair().unwrap();
    let good = || OwnedFd::from(sealed(MIB));
    let one = region(0, MIB);
    let cases: Vec<(&str, Vec<Region>, Vec<OwnedFd>)> = vec![
        (
            "a file that is too short",
            vec![region(0, 2 * MIB)],
            vec![good()],
        ),
        ("an empty file", vec![one], vec![sealed(0).into()]),
        (
            "a region beyond the file's end",
            vec![Region {
                offset: 4096,
                ..one
            }],
            vec![good()],
        ),
        (
            "a file that is not sealed",
            vec![one],
            vec![memory_file(MIB).into()],
        ),
        ("a file on a disk", vec![one], vec![on_disk.into()]),
        (
            "an offset within a page",
            vec![Region {
                offset: 8,
                size: 4096,
                ..one
            }],
            vec![good()],
        ),
        ("no bytes", vec![region(0, 0)], vec![good()]),
        ("all bytes", vec![region(0, u64::MAX)], vec![good()]),
        (
            "addresses that overflow",
            vec![region(u64::MAX - 4096, MIB)],
            vec![good()],
        ),
        (
            "addresses of its own that overflow",
            vec![Region {
                user: u64::MAX - 4096,
                ..one
            }],
            vec![good()],
        ),
        (
            "an offset that overflows",
            vec![Region {
                offset: u64::MAX - 4095,
                ..one
            }],
            vec![good()],
        ),
        (
            "regions that overlap",
            vec![one, region(4096, MIB)],
            vec![good(), good()],
        ),
        (
            "regions that are the same",
            vec![one, one],
            vec![good(), good()],
        ),
        (
            "fewer files than regions",
            vec![one, region(MIB, MIB)],
            vec![good()],
        ),
        ("more files than regions", vec![one], vec![good(), good()]),
        ("no file", vec![one], vec![]),
        ("no region", vec![], vec![]),
        (
            "a folder",
            vec![one],
            vec![File::open(folder.path()).unwrap().into()],
        ),
        ("a pipe", vec![one], vec![pipe.into()]),
        ("a socket", vec![one], vec![stream.into()]),
        (
            "a device",
            vec![one],
            vec![File::open("/dev/null").unwrap().into()],
        ),
        (
            "zeroes without end",
            vec![one],
            vec![
                File::options()
                    .read(true)
                    .write(true)
                    .open("/dev/zero")
                    .unwrap()
                    .into(),
            ],
        ),
        (
            "too many regions",
            (0..40).map(|n| region(n * MIB, MIB)).collect(),
            (0..40).map(|_| good()).collect(),
        ),
    ];
    let mut device = Device::start();
    for (name, regions, files) in cases {
        let mut raw = Raw::connect(&device);
        raw.send(SET_OWNER, VERSION, &[], &[]).unwrap();
        let files: Vec<i32> = files.iter().map(|file| file.as_raw_fd()).collect();
        // Linux may refuse to send so many files.
        let _refused = raw.send(SET_MEM_TABLE, VERSION, &table(&regions), &files);
        if files.len() <= 32 {
            raw.assert_closed(name);
        }
        drop(raw);
        assert_serves(&mut device, name);
    }
}

#[test]
fn memory_table_that_lies_about_its_count_is_refused() {
    let mut device = Device::start();
    for count in [0, 2, 8, 33, u32::MAX] {
        let mut raw = Raw::connect(&device);
        let file = sealed(1 << 20);
        let mut body = table(&[region(0, 1 << 20)]);
        body[..4].copy_from_slice(&count.to_le_bytes());
        raw.send(SET_OWNER, VERSION, &[], &[]).unwrap();
        let _refused = raw.send(SET_MEM_TABLE, VERSION, &body, &[file.as_raw_fd()]);
        raw.assert_closed("a table with another count than regions");
        assert_serves(&mut device, &format!("a table of {count} regions"));
    }
}

#[test]
fn memory_table_that_is_refused_is_never_touched_by_work_in_flight() {
    let mut device = Device::start();
    for _ in 0..10 {
        let mut guest = Guest::boot(&device);
        for _ in 0..16 {
            let run = CopyRun::upload(ram(0), VramAddr::new(0x40_0000), 4 << 20);
            guest.send(queue::SUBMIT, &copy(&[run]), 8);
        }
        // Everything is where it was, in a file that ends before.
        let short = sealed(4096);
        let userspace_addr = guest
            .memory
            .get_host_address(GuestAddress(GUEST_BASE))
            .unwrap() as u64;
        let region = VhostUserMemoryRegionInfo {
            guest_phys_addr: GUEST_BASE,
            memory_size: GUEST_SIZE as u64,
            userspace_addr,
            mmap_offset: 0,
            mmap_handle: short.as_raw_fd(),
        };
        let _refused = guest.frontend.set_mem_table(&[region]);
        drop(guest);
        assert_serves(&mut device, "a table with a short file");
    }
}

#[test]
fn memory_that_is_not_sealed_is_taken_on_request_only() {
    let file = || {
        let file = memory_file(1 << 20);
        (table(&[region(0, 1 << 20)]), file)
    };
    for (options, taken) in [(&[][..], false), (&["--unsealed-memory"][..], true)] {
        let device = Device::start_with(&[&["--vram", "4M"], options].concat());
        let mut raw = Raw::connect(&device);
        let (body, file) = file();
        raw.send(SET_OWNER, VERSION, &[], &[]).unwrap();
        raw.send(SET_MEM_TABLE, VERSION, &body, &[file.as_raw_fd()])
            .unwrap();
        let asked = raw.send(GET_FEATURES, VERSION, &[], &[]);
        let answered = asked.is_ok() && raw.0.read_exact(&mut [0; 20]).is_ok();
        assert_eq!(answered, taken, "{options:?}");
    }
}

#[test]
fn rings_where_none_can_be_are_survived() {
    let end = GUEST_BASE + GUEST_SIZE as u64;
    let mut device = Device::start();
    let places = [
        ("outside of RAM", [GUEST_BASE - 0x1000; 3]),
        ("at the end of RAM", [end; 3]),
        ("nowhere", [u64::MAX; 3]),
        ("at zero", [0; 3]),
        ("over the end of RAM", [end - 16, end - 4, end - 4]),
        ("not aligned", [DATA + 1, DATA + 0x1001, DATA + 0x2003]),
        ("on each other", [DATA; 3]),
    ];
    for (name, [descriptors, available, used]) in places {
        for size in [0, 1, 3, 64, 1024, 1025, u16::MAX] {
            let mut guest = Guest::connect(&device);
            let host = guest
                .memory
                .get_host_address(GuestAddress(GUEST_BASE))
                .unwrap() as u64;
            let to_host = host.wrapping_sub(GUEST_BASE);
            let ring = &guest.rings[0];
            let config = VringConfigData {
                queue_max_size: 1024,
                queue_size: size,
                flags: 0,
                desc_table_addr: descriptors.wrapping_add(to_host),
                used_ring_addr: used.wrapping_add(to_host),
                avail_ring_addr: available.wrapping_add(to_host),
                log_addr: None,
            };
            // Some of it is refused, and ends the connection; the rest must do no harm.
            let frontend = &mut guest.frontend;
            let _refused = frontend.set_vring_num(0, size);
            let _refused = frontend.set_vring_addr(0, &config);
            let _refused = frontend.set_vring_call(0, &ring.call);
            let _refused = frontend.set_vring_kick(0, &ring.kick);
            let _refused = frontend.set_vring_enable(0, true);
            ring.kick();
            device.assert_alive();
        }
        assert_serves(&mut device, &format!("rings {name}"));
    }
}

#[test]
fn files_that_are_no_eventfds_block_and_kill_nothing() {
    let mut device = Device::start();
    type Make = fn() -> OwnedFd;
    let make: [(&str, Make); 5] = [
        ("a full pipe", || {
            let (reader, mut writer) = io::pipe().unwrap();
            rustix::io::ioctl_fionbio(&writer, true).unwrap();
            while writer.write(&[0; 4096]).is_ok() {}
            rustix::io::ioctl_fionbio(&writer, false).unwrap();
            // Open for as long as the test, or writing would fail instead.
            std::mem::forget(reader);
            writer.into()
        }),
        ("the end of a closed pipe", || io::pipe().unwrap().1.into()),
        ("a full eventfd that blocks", || {
            let full = rustix::event::eventfd(0, EventfdFlags::empty()).unwrap();
            rustix::io::write(&full, &u64::to_ne_bytes(u64::MAX - 1)).unwrap();
            full
        }),
        ("a file", || tempfile::tempfile().unwrap().into()),
        ("a folder", || File::open("/").unwrap().into()),
    ];
    for (name, make) in make {
        for kick in [false, true] {
            let mut guest = Guest::boot_without_event_buffers(&device);
            let file = make();
            let request = if kick { SET_VRING_KICK } else { SET_VRING_CALL };
            let raw = Raw(guest.socket.try_clone().unwrap());
            let index = u64::from(queue::CONTROL).to_le_bytes();
            raw.send(request, VERSION, &index, &[file.as_raw_fd()])
                .unwrap();
            for _ in 0..4 {
                guest.send(queue::CONTROL, &nop(), 16);
            }
            if !kick {
                // The other queues go on: nobody waits for the interrupt.
                guest.submit_ok(&nop());
            }
            drop((guest, raw));
            assert_serves(&mut device, name);
        }
    }
}

#[test]
fn random_messages_are_survived() {
    let mut device = Device::start();
    let body = prop_oneof![
        prop::collection::vec(any::<u8>(), 0..300),
        prop::collection::vec(prop_oneof![0..4u64, any::<u64>()], 0..9)
            .prop_map(|words| words.into_iter().flat_map(u64::to_le_bytes).collect()),
    ];
    let flags = prop_oneof![4 => Just(VERSION), 2 => Just(VERSION | 8), 1 => any::<u32>()];
    let message = (0..48u32, flags, body, 0..3usize, prop::bool::weighted(0.1));
    let mut runner = TestRunner::new(Config::default());
    let eventfds = [EventFd::new(0).unwrap(), EventFd::new(0).unwrap()];
    let files: Vec<i32> = eventfds.iter().map(AsRawFd::as_raw_fd).collect();
    for round in 0..150 {
        let raw = Raw::connect(&device);
        let mut reader = raw.0.try_clone().unwrap();
        reader.set_nonblocking(true).unwrap();
        let _closed = raw.send(SET_OWNER, VERSION, &[], &[]);
        for _ in 0..20 {
            let (request, flags, body, count, half) =
                message.new_tree(&mut runner).unwrap().current();
            let sent = if half {
                // It says more than there is; what comes next is taken for it.
                let header = [request, flags, 64].map(u32::to_le_bytes).concat();
                (&raw.0).write_all(&header)
            } else {
                raw.send(request, flags, &body, &files[..count])
            };
            if sent.is_err() {
                break;
            }
            let _nothing = reader.read(&mut [0; 4096]);
        }
        device.assert_alive();
        if round % 50 == 0 {
            drop(raw);
            assert_serves(&mut device, "random messages");
        }
    }
    assert_serves(&mut device, "random messages");
}

#[test]
fn messages_cut_anywhere_end_with_their_connection() {
    let mut device = Device::start();
    let header = [GET_FEATURES, VERSION, 0].map(u32::to_le_bytes).concat();
    let table = [
        [SET_MEM_TABLE, VERSION, 40].map(u32::to_le_bytes).concat(),
        table(&[region(0, 4096)]),
    ]
    .concat();
    for message in [header, table] {
        for length in (0..message.len()).step_by(5) {
            let raw = Raw::connect(&device);
            (&raw.0).write_all(&message[..length]).unwrap();
            drop(raw);
        }
    }
    assert_serves(&mut device, "half messages");
}

#[test]
fn half_a_message_does_not_keep_the_process_from_ending() {
    let mut device = Device::start();
    let raw = Raw::connect(&device);
    (&raw.0).write_all(&[1, 0, 0]).unwrap();
    // It is the one that is served: the device has accepted it.
    thread::sleep(Duration::from_millis(50));
    device.signal(Signal::TERM);
    assert!(device.wait().success());
}

#[test]
fn front_end_that_never_reads_its_answers_harms_itself_only() {
    let mut device = Device::start();
    let raw = Raw::connect(&device);
    while raw.send(GET_FEATURES, VERSION, &[], &[]).is_ok() {}
    // The control socket answers all the while.
    device.json(&["stats"]);
    drop(raw);
    assert_serves(&mut device, "a front end that does not read");
}

#[test]
fn connections_by_the_hundred_are_served_in_turn() {
    let mut device = Device::start();
    let many: Vec<UnixStream> = (0..100)
        .map_while(|_| UnixStream::connect(device.socket()).ok())
        .collect();
    drop(many);
    assert_serves(&mut device, "a hundred connections");
}

#[test]
fn driver_that_adds_requests_for_ever_does_not_keep_its_session() {
    let mut device = Device::start();
    let end = AtomicBool::new(false);
    let mut guest = Guest::boot(&device);
    guest.control_ok(&nop());
    let memory = guest.memory.clone();
    let index = guest.rings[0].available() + 2;
    thread::scope(|scope| {
        // The guest's processor, which runs on: chains without end, all of them empty.
        scope.spawn(|| {
            let mut next = 0u16;
            while !end.load(Ordering::Relaxed) {
                next = next.wrapping_add(16);
                memory.write_obj(next, GuestAddress(index)).unwrap();
            }
        });
        guest.rings[0].kick();
        thread::sleep(Duration::from_millis(50));
        drop(guest);
        device.wait_for_transport_stat("resets", 1);
        assert_serves(&mut device, "a driver that does not stop");
        end.store(true, Ordering::Relaxed);
    });
}
