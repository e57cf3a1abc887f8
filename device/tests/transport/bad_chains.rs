// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a broken driver does: each chain comes back, nothing else happens. Manual, chapter 3.

use crate::{
    device::Device,
    guest::{DATA, DEADLINE, GUEST_BASE, GUEST_SIZE, Guest, RING_SIZE, command, kind, nop},
    ring::{Descriptor, INDIRECT, NEXT, WRITE},
};
use farfault_protocol::{
    address::GpuVa,
    command::{CommandHeader, Status},
    config::queue,
    control::{self, ReadPtes},
    event::{ErrorCode, ErrorEvent, EventKind},
};
use std::time::Instant;
use vm_memory::{Bytes, GuestAddress};
use zerocopy::FromBytes;

const REQUEST: u64 = DATA;
const REPLY: u64 = DATA + 0x1_0000;
const TABLE: u64 = DATA + 0x2_0000;
const END_OF_RAM: u64 = GUEST_BASE + GUEST_SIZE as u64;

fn readable(address: u64, length: u32) -> Descriptor {
    Descriptor {
        address,
        length,
        flags: 0,
        next: 0,
    }
}

fn writable(address: u64, length: u32) -> Descriptor {
    Descriptor {
        address,
        length,
        flags: WRITE,
        next: 0,
    }
}

/// A guest with a request in place.
fn boot(device: &Device) -> Guest {
    let guest = Guest::boot(device);
    guest
        .memory
        .write_slice(&nop(), GuestAddress(REQUEST))
        .unwrap();
    guest
}

/// Offers a chain of these descriptors, linked in order; what comes back.
fn offer(guest: &mut Guest, queue: u16, chain: &[Descriptor]) -> (u16, u32) {
    let ring = &mut guest.rings[usize::from(queue)];
    let indices: Vec<u16> = chain.iter().map(|_| ring.allocate()).collect();
    for (position, &descriptor) in chain.iter().enumerate() {
        let linked = match indices.get(position + 1) {
            Some(&next) => Descriptor {
                flags: descriptor.flags | NEXT,
                next,
                ..descriptor
            },
            None => descriptor,
        };
        ring.write_descriptor(indices[position], linked);
    }
    let head = indices[0];
    ring.offer(head);
    let used = ring.wait_used();
    indices.into_iter().for_each(|index| ring.release(index));
    assert_eq!(used.0, head);
    used
}

/// The chain must come back empty, the driver be told, and the queue work.
#[track_caller]
fn assert_bad(guest: &mut Guest, queue: u16, chain: &[Descriptor]) {
    assert_eq!(offer(guest, queue, chain).1, 0, "{chain:?}");
    assert_told(guest, queue);
    guest.control_ok(&nop());
    guest.submit_ok(&nop());
}

#[track_caller]
fn assert_told(guest: &mut Guest, queue: u16) {
    let event = guest.event();
    assert_eq!(kind(&event), Some(EventKind::Error));
    let error = ErrorEvent::read_from_bytes(&event).unwrap();
    assert_eq!(error.code.get(), ErrorCode::BadDescriptor.raw());
    assert_eq!(error.detail.get(), u64::from(queue));
}

#[test]
fn chain_without_room_for_the_reply_comes_back_empty() {
    let device = Device::start();
    let mut guest = boot(&device);
    for queue in [queue::CONTROL, queue::SUBMIT] {
        assert_bad(&mut guest, queue, &[readable(REQUEST, 8)]);
        assert_bad(
            &mut guest,
            queue,
            &[readable(REQUEST, 8), writable(REPLY, 7)],
        );
        assert_bad(
            &mut guest,
            queue,
            &[readable(REQUEST, 8), writable(REPLY, 0)],
        );
    }
}

#[test]
fn chain_outside_of_ram_comes_back_empty() {
    let device = Device::start();
    let mut guest = boot(&device);
    for queue in [queue::CONTROL, queue::SUBMIT] {
        for outside in [0, END_OF_RAM - 4, END_OF_RAM, u64::MAX - 4, u64::MAX] {
            assert_bad(
                &mut guest,
                queue,
                &[readable(outside, 8), writable(REPLY, 16)],
            );
            assert_bad(
                &mut guest,
                queue,
                &[readable(REQUEST, 8), writable(outside, 16)],
            );
        }
        assert_bad(
            &mut guest,
            queue,
            &[readable(REQUEST, u32::MAX), writable(REPLY, 16)],
        );
    }
}

#[test]
fn chain_with_a_readable_descriptor_last_comes_back_empty() {
    let device = Device::start();
    let mut guest = boot(&device);
    assert_bad(
        &mut guest,
        queue::CONTROL,
        &[writable(REPLY, 16), readable(REQUEST, 8)],
    );
}

#[test]
fn chain_that_loops_comes_back_empty() {
    let device = Device::start();
    let mut guest = boot(&device);
    let ring = &mut guest.rings[0];
    let head = ring.allocate();
    ring.write_descriptor(
        head,
        Descriptor {
            flags: NEXT,
            next: head,
            ..readable(REQUEST, 8)
        },
    );
    ring.offer(head);
    assert_eq!(ring.wait_used(), (head, 0));
    assert_told(&mut guest, queue::CONTROL);
}

#[test]
fn chain_that_leads_beyond_the_table_comes_back_empty() {
    let device = Device::start();
    let mut guest = boot(&device);
    let ring = &mut guest.rings[0];
    let head = ring.allocate();
    let beyond = Descriptor {
        flags: NEXT,
        next: RING_SIZE,
        ..readable(REQUEST, 8)
    };
    ring.write_descriptor(head, beyond);
    ring.offer(head);
    assert_eq!(ring.wait_used(), (head, 0));
    assert_told(&mut guest, queue::CONTROL);
}

#[test]
fn indirect_table_that_is_none_comes_back_empty() {
    let device = Device::start();
    let mut guest = boot(&device);
    let nested = Descriptor {
        address: TABLE,
        length: 16,
        flags: INDIRECT,
        next: 0,
    };
    guest
        .memory
        .write_slice(&nested.bytes(), GuestAddress(TABLE))
        .unwrap();
    for (address, length) in [
        (TABLE, 16),
        (TABLE, 0),
        (TABLE, 15),
        (TABLE, 16 * 70_000),
        (0, 32),
        (END_OF_RAM - 8, 32),
    ] {
        let table = Descriptor {
            address,
            length,
            flags: INDIRECT,
            next: 0,
        };
        assert_bad(&mut guest, queue::CONTROL, &[table]);
    }
}

#[test]
fn indirect_table_longer_than_any_queue_comes_back_empty() {
    let device = Device::start();
    let mut guest = boot(&device);
    let count = 4096;
    let bytes: Vec<u8> = (0..count)
        .flat_map(|i| {
            Descriptor {
                flags: NEXT,
                next: i + 1,
                ..readable(REQUEST, 8)
            }
            .bytes()
        })
        .collect();
    guest
        .memory
        .write_slice(&bytes, GuestAddress(TABLE))
        .unwrap();
    let length = u32::from(count) * 16;
    let table = Descriptor {
        address: TABLE,
        length,
        flags: INDIRECT,
        next: 0,
    };
    assert_bad(&mut guest, queue::CONTROL, &[table]);
}

#[test]
fn empty_request_is_malformed() {
    let device = Device::start();
    let mut guest = boot(&device);
    let (_, length) = offer(&mut guest, queue::CONTROL, &[writable(REPLY, 16)]);
    assert_eq!(length, 16);
    let status: u32 = guest.memory.read_obj(GuestAddress(REPLY)).unwrap();
    assert_eq!(u32::from_le(status), Status::Malformed.raw());
}

#[test]
fn request_beyond_the_limit_is_refused() {
    let device = Device::start();
    let mut guest = boot(&device);
    let limit = guest.config().max_request.get();
    let half = limit / 2 + 8;
    let chain = [
        readable(REQUEST, half),
        readable(REQUEST, half),
        writable(REPLY, 16),
    ];
    assert_eq!(offer(&mut guest, queue::CONTROL, &chain).1, 16);
    let status: u32 = guest.memory.read_obj(GuestAddress(REPLY)).unwrap();
    assert_ne!(u32::from_le(status), Status::Ok.raw());
    guest.control_ok(&nop());
}

#[test]
fn reply_longer_than_its_room_comes_back_empty() {
    let device = Device::start();
    let mut guest = boot(&device);
    guest.create_context(0);
    let read = command(ReadPtes {
        header: CommandHeader::new(control::Opcode::ReadPtes.raw(), 24),
        context: 0.into(),
        count: 4.into(),
        start: GpuVa::new(0),
    });
    guest
        .memory
        .write_slice(&read, GuestAddress(REQUEST))
        .unwrap();
    assert_bad(
        &mut guest,
        queue::CONTROL,
        &[readable(REQUEST, 24), writable(REPLY, 16 + 31)],
    );
}

#[test]
fn event_buffer_that_is_too_small_comes_back_empty() {
    let device = Device::start();
    let mut guest = Guest::boot_without_event_buffers(&device);
    assert_eq!(offer(&mut guest, queue::EVENT, &[writable(REPLY, 63)]).1, 0);
    assert_eq!(offer(&mut guest, queue::EVENT, &[readable(REPLY, 64)]).1, 0);
    guest.post_event_buffer();
    assert_told(&mut guest, queue::EVENT);
}

#[test]
fn available_index_that_jumps_is_survived() {
    let device = Device::start();
    let mut guest = boot(&device);
    let before = guest.rings[0].available_index();
    guest.rings[0].set_available_index(before.wrapping_add(RING_SIZE + 1));
    guest.rings[0].kick();
    device.wait_for_transport_stat("bad_rings", 1);
    guest.submit_ok(&nop());
    guest.rings[0].set_available_index(before);
    guest.control_ok(&nop());
}

#[test]
fn head_beyond_the_table_is_survived() {
    let device = Device::start();
    let mut guest = boot(&device);
    guest.rings[0].offer(RING_SIZE + 3);
    assert_told(&mut guest, queue::CONTROL);
    guest.control_ok(&nop());
}

#[test]
fn one_chain_offered_again_and_again_is_bounded() {
    let device = Device::start();
    let mut guest = Guest::boot_without_event_buffers(&device);
    let ring = &mut guest.rings[2];
    let head = ring.allocate();
    ring.write_descriptor(head, writable(REPLY, 64));
    // What the ring has no room for comes back, and the event that tells so uses a buffer.
    for offered in 1..=3 * u64::from(RING_SIZE) {
        ring.offer(head);
        let start = Instant::now();
        loop {
            let stats = &device.json(&["stats"])["transport"];
            let [taken, bad, written] = ["event_buffers", "bad_chains", "events"]
                .map(|name| stats[name].as_u64().expect("a counter"));
            assert!(taken - written <= u64::from(RING_SIZE), "{stats}");
            if taken + bad == offered {
                break;
            }
            assert!(start.elapsed() < DEADLINE, "{offered} offered, {stats}");
        }
    }
    assert_ne!(device.transport_stat("bad_chains"), 0);
    guest.control_ok(&nop());
}
