// SPDX-License-Identifier: MIT OR Apache-2.0
//! Random input on all three queues: the device stays alive, answers, and does not grow.
//!
//! `FARFAULT_FUZZ_SECONDS` sets how long the second test runs (default 3).

use crate::{
    device::Device,
    guest::{DATA, GUEST_BASE, GUEST_SIZE, Guest, RING_SIZE, nop},
    ring::{Descriptor, INDIRECT, NEXT, WRITE},
};
use proptest::{
    prelude::*,
    strategy::ValueTree,
    test_runner::{Config, TestRunner},
};
use std::{
    env,
    time::{Duration, Instant},
};
use vm_memory::{Bytes, GuestAddress};

/// How much more of its own memory the device may use than its VRAM: tables, buffers, threads.
const OVERHEAD: u64 = 64 << 20;
/// VRAM of the device that is fuzzed.
const VRAM: u64 = 32 << 20;

/// One thing that a driver might do.
#[derive(Clone, Debug)]
enum Step {
    /// A request in a chain as it should be.
    Request {
        queue: u16,
        bytes: Vec<u8>,
        room: u32,
    },
    /// A descriptor as it comes, and perhaps its table.
    Descriptor {
        index: u16,
        queue: u16,
        descriptor: Descriptor,
    },
    /// A chain offered as it is.
    Offer { queue: u16, head: u16 },
    /// The available index goes anywhere.
    Jump { queue: u16, index: u16 },
    /// Garbage where tables and requests are.
    Scribble { offset: u64, bytes: Vec<u8> },
    /// The device is reset.
    Reset,
}

fn bytes(most: usize) -> impl Strategy<Value = Vec<u8>> {
    prop::collection::vec(any::<u8>(), 0..most)
}

/// A number that is small, at the edge of RAM, or anything.
fn address() -> impl Strategy<Value = u64> {
    prop_oneof![
        4 => (0..0x10_000u64).prop_map(|offset| DATA + offset),
        1 => (0..64u64).prop_map(|back| GUEST_BASE + GUEST_SIZE as u64 - back),
        1 => any::<u64>(),
    ]
}

/// Bytes that look like commands: a plausible header, small numbers behind it.
fn commands() -> impl Strategy<Value = Vec<u8>> {
    let word = prop_oneof![
        6 => 0..8u64,
        2 => (0..64u64).prop_map(|page| page << 12),
        2 => (0..64u64).prop_map(|page| page << 12 | 7),
        1 => address(),
        1 => any::<u64>(),
    ];
    let one = (
        0..12u16,
        prop::collection::vec(word, 0..12),
        prop::bool::weighted(0.9),
    )
        .prop_map(|(opcode, words, honest)| {
            let length = if honest {
                8 + 8 * words.len() as u32
            } else {
                1 << 20
            };
            let header = u64::from(opcode) | u64::from(length) << 32;
            std::iter::once(header)
                .chain(words)
                .flat_map(u64::to_le_bytes)
                .collect::<Vec<u8>>()
        });
    prop::collection::vec(one, 1..4).prop_map(|commands| commands.concat())
}

fn step() -> impl Strategy<Value = Step> {
    let queue = 0..3u16;
    let descriptor = (
        address(),
        prop_oneof![0..256u32, any::<u32>()],
        prop_oneof![
            Just(0),
            Just(NEXT),
            Just(WRITE),
            Just(NEXT | WRITE),
            Just(INDIRECT),
            any::<u16>()
        ],
        0..RING_SIZE + 2,
    )
        .prop_map(|(address, length, flags, next)| Descriptor {
            address,
            length,
            flags,
            next,
        });
    prop_oneof![
        8 => (0..2u16, commands(), prop_oneof![Just(16), Just(8192), 0..64u32])
            .prop_map(|(queue, bytes, room)| Step::Request { queue, bytes, room }),
        2 => (0..2u16, bytes(512), 0..64u32)
            .prop_map(|(queue, bytes, room)| Step::Request { queue, bytes, room }),
        6 => (queue.clone(), 0..RING_SIZE, descriptor)
            .prop_map(|(queue, index, descriptor)| Step::Descriptor { queue, index, descriptor }),
        6 => (queue.clone(), 0..RING_SIZE + 2).prop_map(|(queue, head)| Step::Offer { queue, head }),
        1 => (queue, any::<u16>()).prop_map(|(queue, index)| Step::Jump { queue, index }),
        2 => (0..0x10_000u64, bytes(256)).prop_map(|(offset, bytes)| Step::Scribble { offset, bytes }),
        1 => Just(Step::Reset),
    ]
}

/// Does one step. Nothing is waited for: answers may come, or not.
fn take(guest: &mut Guest, step: &Step) {
    match step {
        Step::Request { queue, bytes, room } => {
            // Scratch space of its own, as descriptors may be in any state.
            let (request, reply) = (DATA + 0x4_0000, DATA + 0x8_0000);
            guest
                .memory
                .write_slice(bytes, GuestAddress(request))
                .unwrap();
            let ring = &mut guest.rings[usize::from(*queue)];
            let length = bytes.len() as u32;
            ring.write_descriptor(
                0,
                Descriptor {
                    address: request,
                    length,
                    flags: NEXT,
                    next: 1,
                },
            );
            let room = Descriptor {
                address: reply,
                length: *room,
                flags: WRITE,
                next: 0,
            };
            ring.write_descriptor(1, room);
            ring.offer(0);
        }
        Step::Descriptor {
            index,
            queue,
            descriptor,
        } => {
            guest.rings[usize::from(*queue)].write_descriptor(*index, *descriptor);
        }
        Step::Offer { queue, head } => guest.rings[usize::from(*queue)].offer(*head),
        Step::Jump { queue, index } => {
            guest.rings[usize::from(*queue)].set_available_index(*index);
            guest.rings[usize::from(*queue)].kick();
        }
        Step::Scribble { offset, bytes } => {
            guest
                .memory
                .write_slice(bytes, GuestAddress(DATA + offset))
                .unwrap();
        }
        Step::Reset => {
            guest.stop();
            guest.start();
        }
    }
}

/// After a reset everything must work, whatever was before. Returns the bytes of its own memory that
/// the device uses.
fn assert_works(device: &mut Device, guest: &mut Guest) -> u64 {
    device.assert_alive();
    guest.stop();
    guest.start();
    guest.control_ok(&nop());
    guest.submit_ok(&nop());
    let memory = device.private_memory();
    assert!(
        memory < VRAM + OVERHEAD,
        "the device uses {} MiB of its own",
        memory >> 20
    );
    memory
}

#[test]
fn random_steps_of_a_driver_are_survived() {
    let mut device = Device::start_with(&["--vram", "32M"]);
    let mut guest = Guest::boot(&device);
    let mut runner = TestRunner::new(Config {
        cases: 64,
        ..Config::default()
    });
    let steps = prop::collection::vec(step(), 1..64);
    // Not `runner.run`: what one case leaves behind is a part of the next one.
    for _ in 0..runner.config().cases {
        let steps = steps.new_tree(&mut runner).unwrap().current();
        for step in &steps {
            take(&mut guest, step);
        }
        assert_works(&mut device, &mut guest);
    }
}

#[test]
fn random_steps_for_a_long_time_do_not_make_it_grow() {
    let seconds =
        env::var("FARFAULT_FUZZ_SECONDS").map_or(3, |text| text.parse().expect("seconds"));
    let end = Instant::now() + Duration::from_secs(seconds);
    let mut device = Device::start_with(&["--vram", "32M", "--threads", "2"]);
    let mut guest = Guest::boot(&device);
    let mut runner = TestRunner::default();
    let step = step();
    let mut steps = 0u64;
    let mut first = None;
    let mut most = 0;
    while Instant::now() < end {
        for _ in 0..500 {
            take(&mut guest, &step.new_tree(&mut runner).unwrap().current());
            steps += 1;
        }
        let memory = assert_works(&mut device, &mut guest);
        first.get_or_insert(memory);
        most = most.max(memory);
    }
    println!(
        "{steps} random steps in {seconds} s; memory of the device: {} KiB at first, {} KiB at most",
        first.unwrap_or_default() >> 10,
        most >> 10,
    );
}
