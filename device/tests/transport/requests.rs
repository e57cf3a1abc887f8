// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a correct driver does: manual, chapters 2 to 6.

use crate::{
    device::Device,
    guest::{
        DATA, Guest, RING_SIZE, command, copy, kind, launch, new_memory, nop, ram, set_memory,
    },
    ring::{Descriptor, INDIRECT, NEXT, WRITE},
};
use farfault_protocol::{
    address::{GpuVa, VramAddr},
    command::{CommandHeader, Status},
    config::{MAGIC, VERSION_MAJOR, queue},
    control::{self, Cancel, ReadPtes},
    event::{Access, Engine, ErrorCode, ErrorEvent, EventKind, FaultCause, JobStatus},
    pte::Location,
    submit::{self, CopyRun, Kernel},
};
use std::{collections::HashSet, time::Duration};
use vhost::vhost_user::{VhostUserFrontend, message::VhostUserConfigFlags};
use vm_memory::{Bytes, GuestAddress};
use zerocopy::FromBytes;

/// Long enough for an event that should not be there to come.
const NOTHING_COMES: Duration = Duration::from_millis(50);

#[test]
fn handshake_with_any_front_end_tells_the_queues() {
    let device = Device::start();
    let mut guest = Guest::connect(&device);
    assert_eq!(guest.frontend.get_queue_num().unwrap(), 3);
}

#[test]
fn config_space_describes_the_gpu() {
    let device = Device::start_with(&["--vram", "32M", "--serial", "7"]);
    let config = Guest::connect(&device).config();
    assert_eq!(config.magic, MAGIC);
    assert_eq!(config.version_major.get(), VERSION_MAJOR);
    assert_eq!(config.vram_size.get(), 32 << 20);
    assert_eq!(config.serial.get(), 7);
}

#[test]
fn config_space_written_by_the_guest_stays_as_it_is() {
    let device = Device::start();
    let mut guest = Guest::boot(&device);
    let before = guest.config();
    guest
        .frontend
        .set_config(0, VhostUserConfigFlags::WRITABLE, &[0; 256])
        .unwrap();
    assert_eq!(guest.config(), before);
    guest.control_ok(&nop());
}

#[test]
fn nop_is_answered_on_both_queues() {
    let device = Device::start();
    let mut guest = Guest::boot(&device);
    assert_eq!(
        guest.control_ok(&[nop(), nop()].concat()).completed.get(),
        2
    );
    guest.submit_ok(&nop());
}

#[test]
fn requests_beyond_the_ring_size_are_all_answered() {
    let device = Device::start();
    let mut guest = Guest::boot(&device);
    for _ in 0..4 * RING_SIZE {
        guest.control_ok(&nop());
        guest.submit_ok(&nop());
    }
}

#[test]
fn many_requests_in_one_go_are_all_answered() {
    let device = Device::start();
    let mut guest = Guest::boot(&device);
    for _ in 0..20 {
        let heads: Vec<u16> = (0..RING_SIZE / 2)
            .map(|_| guest.send(queue::CONTROL, &nop(), 16))
            .collect();
        for head in heads {
            assert_eq!(guest.receive(queue::CONTROL, head).len(), 16);
        }
    }
}

#[test]
fn unknown_command_is_refused_and_the_next_one_works() {
    let device = Device::start();
    let mut guest = Guest::boot(&device);
    let unknown = command(CommandHeader::new(999, 8));
    assert_eq!(
        guest.control(&unknown).status.get(),
        Status::UnknownCommand.raw()
    );
    assert_eq!(
        guest.submit(&unknown).status.get(),
        Status::UnknownCommand.raw()
    );
    guest.control_ok(&nop());
}

#[test]
fn request_in_an_indirect_table_is_answered() {
    let device = Device::start();
    let mut guest = Guest::boot(&device);
    let (table, request, reply) = (DATA, DATA + 0x1000, DATA + 0x2000);
    let descriptors = [
        Descriptor {
            address: request,
            length: 8,
            flags: NEXT,
            next: 1,
        },
        Descriptor {
            address: reply,
            length: 16,
            flags: WRITE,
            next: 0,
        },
    ];
    guest
        .memory
        .write_slice(&nop(), GuestAddress(request))
        .unwrap();
    let bytes: Vec<u8> = descriptors.iter().flat_map(|d| d.bytes()).collect();
    guest
        .memory
        .write_slice(&bytes, GuestAddress(table))
        .unwrap();
    let ring = &mut guest.rings[0];
    let head = ring.allocate();
    ring.write_descriptor(
        head,
        Descriptor {
            address: table,
            length: 32,
            flags: INDIRECT,
            next: 0,
        },
    );
    ring.offer(head);
    assert_eq!(ring.wait_used(), (head, 16));
}

#[test]
fn copy_to_vram_and_back_moves_the_bytes() {
    let device = Device::start();
    let mut guest = Guest::boot(&device);
    let bytes: Vec<u8> = (0..1_000_000u32).map(|i| (i * 7) as u8).collect();
    guest
        .memory
        .write_slice(&bytes, GuestAddress(DATA))
        .unwrap();
    let (vram, length) = (VramAddr::new(0x20_0000), bytes.len() as u32);
    guest.submit_ok(&copy(&[CopyRun::upload(ram(0), vram, length)]));
    guest.submit_ok(&copy(&[CopyRun::download(vram, ram(4 << 20), length)]));
    let mut back = vec![0; bytes.len()];
    guest
        .memory
        .read_slice(&mut back, GuestAddress(DATA + (4 << 20)))
        .unwrap();
    assert!(back == bytes, "the bytes differ");
}

#[test]
fn copies_in_flight_together_are_all_answered_once() {
    let device = Device::start();
    let mut guest = Guest::boot(&device);
    let mut heads: HashSet<u16> = (0..u64::from(RING_SIZE) / 2)
        .map(|i| {
            let run = CopyRun::upload(ram(0), VramAddr::new(i << 20), 1 << 20);
            guest.send(queue::SUBMIT, &copy(&[run]), 8)
        })
        .collect();
    while !heads.is_empty() {
        let (head, reply) = guest.receive_any(queue::SUBMIT);
        assert_eq!(reply, [0; 8]);
        assert!(heads.remove(&head), "{head} was answered twice");
    }
}

#[test]
fn copy_outside_of_ram_fails_alone() {
    let device = Device::start();
    let mut guest = Guest::boot(&device);
    let good = CopyRun::upload(ram(0), VramAddr::new(0), 4096);
    let bad = CopyRun::upload(ram(1 << 30), VramAddr::new(4096), 4096);
    let reply = guest.submit(&copy(&[good, bad]));
    assert_eq!(reply.status.get(), Status::BadAddress.raw());
    assert_eq!(reply.index.get(), 1);
    guest.submit_ok(&copy(&[good]));
}

#[test]
fn job_faults_is_replayed_and_ends_with_its_result() {
    let device = Device::start();
    let mut guest = Guest::boot(&device);
    let tables = guest.create_context(1);
    for word in 0..512u64 {
        guest
            .memory
            .write_obj(word.to_le(), GuestAddress(DATA + word * 8))
            .unwrap();
    }
    guest.submit_ok(&launch(1, Kernel::Sum, 42, [0x5000, 4096, 0, 0]));
    let fault = guest.fault();
    assert_eq!(fault.header.context.get(), 1);
    assert_eq!(fault.page, GpuVa::new(0x5000));
    assert_eq!(fault.fence.get(), 42);
    assert_eq!(fault.access, Access::Read.raw());
    assert_eq!(fault.cause, FaultCause::NotPresent.raw());
    assert_eq!(fault.engine, Engine::Compute.raw());
    assert!(
        device
            .json(&["inspect", "faults"])
            .as_array()
            .is_some_and(|f| !f.is_empty())
    );

    guest.map(tables, 0x5000, Location::System(ram(0)));
    guest.replay(1, fault.sequence.get());
    let fence = guest.fence();
    assert_eq!(fence.fence.get(), 42);
    assert_eq!(fence.status.get(), JobStatus::Ok.raw());
    assert_eq!(fence.result.get(), 511 * 512 / 2);
}

#[test]
fn job_whose_fault_is_cancelled_fails_with_its_address() {
    let device = Device::start();
    let mut guest = Guest::boot(&device);
    guest.create_context(2);
    guest.submit_ok(&launch(2, Kernel::Fill, 1, [0x7000, 4096, 9, 0]));
    let fault = guest.fault();
    guest.control_ok(&command(Cancel {
        header: CommandHeader::new(control::Opcode::Cancel.raw(), 24),
        context: 2.into(),
        reserved: 0.into(),
        sequence: fault.sequence,
    }));
    let fence = guest.fence();
    assert_eq!(fence.status.get(), JobStatus::Fault.raw());
    assert_eq!(fence.page, GpuVa::new(0x7000));
}

#[test]
fn page_table_entries_are_read_back() {
    let device = Device::start();
    let mut guest = Guest::boot(&device);
    let tables = guest.create_context(0);
    guest.map(tables, 0x3000, Location::Vram(VramAddr::new(0x40_0000)));
    let read = command(ReadPtes {
        header: CommandHeader::new(control::Opcode::ReadPtes.raw(), 24),
        context: 0.into(),
        count: 512.into(),
        start: GpuVa::new(0),
    });
    let reply = guest.request(queue::CONTROL, &read, 16 + 512 * 8);
    assert_eq!(reply.len(), 16 + 512 * 8);
    let entry = u64::from_le_bytes(reply[16 + 3 * 8..][..8].try_into().unwrap());
    assert_eq!(entry & !0xfff, 0x40_0000);
    let runs = device.json(&["inspect", "page-table", "0"]).to_string();
    assert!(runs.contains(&0x3000.to_string()), "{runs}");
}

#[test]
fn fault_without_a_buffer_is_told_when_there_is_one() {
    let device = Device::start();
    let mut guest = Guest::boot_without_event_buffers(&device);
    guest.create_context(1);
    guest.submit_ok(&launch(1, Kernel::Sum, 5, [0x1000, 4096, 0, 0]));
    assert!(guest.rings[2].wait_used_for(NOTHING_COMES).is_none());
    guest.post_event_buffer();
    let event = guest.event();
    assert_eq!(kind(&event), Some(EventKind::Error));
    let error = ErrorEvent::read_from_bytes(&event).unwrap();
    assert_eq!(error.code.get(), ErrorCode::FaultOverflow.raw());
    // Nothing is lost: the wave faults again at a replay, and now there is a buffer for it.
    device.wait_for_transport_stat("event_buffers", 2);
    guest.replay(1, 0);
    assert_eq!(guest.fault().page, GpuVa::new(0x1000));
}

#[test]
fn event_buffers_posted_one_by_one_are_all_used() {
    let device = Device::start();
    let mut guest = Guest::boot_without_event_buffers(&device);
    let tables = guest.create_context(1);
    guest.map(tables, 0, Location::Vram(VramAddr::new(0x20_0000)));
    guest.post_event_buffer();
    for fence in 1..=2 * u64::from(RING_SIZE) {
        guest.submit_ok(&launch(1, Kernel::Fill, fence, [0, 4096, fence, 0]));
        assert_eq!(guest.fence().fence.get(), fence);
    }
}

#[test]
fn memory_table_replaced_while_copies_run_is_used_from_then_on() {
    let device = Device::start();
    let mut guest = Guest::boot(&device);
    let old = guest.memory.clone();
    let run = CopyRun::upload(ram(0), VramAddr::new(0), 1 << 20);
    for _ in 0..8 {
        guest.send(queue::SUBMIT, &copy(&[run; 1]), 8);
    }
    for _ in 0..8 {
        assert_eq!(guest.receive_any(queue::SUBMIT).1, [0; 8]);
    }
    // The same RAM again, and then another one: rings move with it.
    set_memory(&guest.frontend, &old);
    guest.control_ok(&nop());
    guest.stop();
    guest.memory = new_memory();
    set_memory(&guest.frontend, &guest.memory);
    guest.start();
    guest.control_ok(&nop());
    guest
        .memory
        .write_slice(b"new", GuestAddress(DATA))
        .unwrap();
    guest.submit_ok(&copy(&[run]));
    guest.submit_ok(&copy(&[CopyRun::download(
        VramAddr::new(0),
        ram(8192),
        4096,
    )]));
    let mut back = [0; 3];
    guest
        .memory
        .read_slice(&mut back, GuestAddress(DATA + 8192))
        .unwrap();
    assert_eq!(&back, b"new");
}

/// A copy of whole pages, each from another place, that fills a request of `limit` bytes.
fn longest_copy(limit: u32) -> Vec<u8> {
    let runs = (limit as usize - size_of::<submit::Copy>()) / size_of::<CopyRun>();
    let pages = (0..runs as u64).map(|page| {
        // The pages of 8 MiB in another order, several times over.
        let from = page * 1229 % 2048;
        CopyRun::upload(ram(from * 4096), VramAddr::new(page * 4096), 4096)
    });
    copy(&pages.collect::<Vec<_>>())
}

#[test]
fn request_of_the_largest_size_in_many_descriptors_is_executed() {
    let device = Device::start();
    let mut guest = Guest::boot(&device);
    let limit = guest.config().max_request.get();
    assert!(limit >= 8 + 4096 * 32, "16 MiB of pages are no one request");
    for page in 0..2048u64 {
        let at = GuestAddress(DATA + page * 4096);
        guest.memory.write_obj(page.to_le(), at).unwrap();
    }
    let request = longest_copy(limit);
    // As a kernel's memory is: pages, none of which follows the one before, in an indirect table.
    let (table, pages) = (DATA + (16 << 20), DATA + (17 << 20));
    let count = request.len().div_ceil(4096);
    let mut descriptors = Vec::new();
    for (index, part) in request.chunks(4096).enumerate() {
        let address = pages + (count - index) as u64 * 4096;
        guest
            .memory
            .write_slice(part, GuestAddress(address))
            .unwrap();
        descriptors.push(Descriptor {
            address,
            length: part.len() as u32,
            flags: NEXT,
            next: index as u16 + 1,
        });
    }
    descriptors.push(Descriptor {
        address: pages,
        length: 8,
        flags: WRITE,
        next: 0,
    });
    let bytes: Vec<u8> = descriptors.iter().flat_map(|d| d.bytes()).collect();
    guest
        .memory
        .write_slice(&bytes, GuestAddress(table))
        .unwrap();
    let ring = &mut guest.rings[usize::from(queue::SUBMIT)];
    let head = ring.allocate();
    ring.write_descriptor(
        head,
        Descriptor {
            address: table,
            length: bytes.len() as u32,
            flags: INDIRECT,
            next: 0,
        },
    );
    ring.offer(head);
    assert_eq!(ring.wait_used(), (head, 8));
    let status: u32 = guest.memory.read_obj(GuestAddress(pages)).unwrap();
    assert_eq!(u32::from_le(status), Status::Ok.raw());

    let all = CopyRun::download(VramAddr::new(0), ram(24 << 20), 4 << 20);
    guest.submit_ok(&copy(&[all]));
    for page in 0..1024u64 {
        let at = GuestAddress(DATA + (24 << 20) + page * 4096);
        let word: u64 = guest.memory.read_obj(at).unwrap();
        assert_eq!(u64::from_le(word), page * 1229 % 2048, "page {page}");
    }
}

#[test]
fn more_requests_than_the_device_holds_are_all_executed() {
    let device = Device::start();
    let mut guest = Guest::boot(&device);
    let limit = guest.config().max_request.get();
    let request = longest_copy(limit);
    let heads: HashSet<u16> = (0..RING_SIZE / 2)
        .map(|_| guest.send(queue::SUBMIT, &request, 8))
        .collect();
    // The control queue does not wait behind them.
    guest.control_ok(&nop());
    let mut answered = HashSet::new();
    for _ in &heads {
        let (head, reply) = guest.receive_any(queue::SUBMIT);
        assert_eq!(reply, [0; 8]);
        assert!(answered.insert(head));
    }
    assert_eq!(answered, heads);
    guest.submit_ok(&nop());
}
