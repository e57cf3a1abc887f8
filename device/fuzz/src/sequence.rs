// SPDX-License-Identifier: MIT OR Apache-2.0
//! Whole sequences: what a guest may write to its rings and its RAM, and what its front end may do at
//! any moment: kicks, resets, other memory tables, rings elsewhere. Manual, chapters 3 and 10.
//!
//! Whatever was before, after a reset the device answers; and RAM that was taken away from the guest
//! is not touched any more.

use crate::{
    command::{Control, Submit},
    machine::{check_bounds, new_gpu},
    number::{Number, Small},
};
use arbitrary::{Arbitrary, Unstructured};
use farfault_device::transport::local::{Local, RingPlace};
use farfault_protocol::{command::CommandHeader, config::queue, control::Opcode, submit};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};
use zerocopy::IntoBytes;

#[derive(Arbitrary, Debug)]
enum Step {
    /// A request in a chain as it should be, in one table or in one of its own.
    Control(Vec<Control>, Room),
    Submit(Submit, Room),
    Buffers(u8),
    Descriptor {
        queue: u8,
        index: u8,
        address: Number,
        length: Small,
        flags: u8,
        next: u8,
    },
    Offer(u8, u8),
    Index(u8, u16),
    Scribble(u16, Number),
    Kick(u8),
    Work(u8),
    Start(u8),
    StartAt {
        queue: u8,
        size: u16,
        places: [Number; 3],
        base: u16,
    },
    Stop(u8),
    Memory(u8),
    Reset,
    Disconnect,
}

#[derive(Arbitrary, Debug)]
struct Room {
    bytes: u16,
    indirect: bool,
    kick: bool,
}

/// RAM as the front end may give it to the guest. Most is the same in all.
const TABLES: [&[(u64, usize)]; 6] = [
    &[(0x1_0000, 0x2_0000)],
    &[(0x1_0000, 0x1_0000), (0x2_0000, 0x1_0000)],
    &[(0x1_0000, 0x8000)],
    &[(0x1_0000, 0x2_0000), (0xffff_ffff_fff0_0000, 0x1_0000)],
    &[(0x100_0000, 0x1_0000)],
    &[],
];
/// Descriptors of a ring.
const SIZE: u16 = 16;
const RINGS: u64 = 0x1_0000;
const RING: u64 = 0x1000;
/// Where requests, replies and tables of descriptors are.
const REQUEST: u64 = 0x1_4000;
const REPLY: u64 = 0x1_c000;
const INDIRECT: u64 = 0x1_f000;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const TABLE: u16 = 4;

/// Runs it.
pub fn run(data: &[u8]) {
    let Ok(steps) = Vec::<Step>::arbitrary_take_rest(Unstructured::new(data)) else {
        return;
    };
    let mut guest = Guest::new();
    for step in steps {
        guest.take(step);
        guest.device.look(check_bounds);
    }
    guest.assert_works();
}

struct Guest {
    device: Local,
    tables: Vec<GuestMemoryMmap>,
    current: usize,
    /// What the RAM held that the guest has not, when it was taken away.
    gone: Vec<Option<u64>>,
    /// Next index of each ring of available chains.
    next: [u16; 3],
}

impl Guest {
    fn new() -> Self {
        let tables = TABLES.map(|ranges| {
            let ranges: Vec<_> = ranges
                .iter()
                .map(|&(at, size)| (GuestAddress(at), size))
                .collect();
            match ranges.as_slice() {
                [] => GuestMemoryMmap::new(),
                ranges => GuestMemoryMmap::from_ranges(ranges).expect("RAM can be had"),
            }
        });
        let mut guest = Self {
            device: Local::new(new_gpu()).expect("a device can be made"),
            gone: vec![None; tables.len()],
            tables: tables.into(),
            current: 0,
            next: [0; 3],
        };
        guest.set_memory(0);
        guest.start_all();
        guest
    }

    fn take(&mut self, step: Step) {
        match step {
            Step::Control(commands, room) => {
                let bytes: Vec<Vec<u8>> = commands.iter().map(Control::bytes).collect();
                self.request(queue::CONTROL, &bytes.concat(), &room);
            }
            Step::Submit(command, room) => {
                self.request(queue::SUBMIT, &command.bytes(), &room);
            }
            Step::Buffers(count) => {
                for index in 0..u16::from(count) % SIZE {
                    self.describe(
                        queue::EVENT,
                        index,
                        REPLY + u64::from(index) * 64,
                        64,
                        WRITE,
                        0,
                    );
                    self.offer(queue::EVENT, index);
                }
                self.kick(queue::EVENT);
            }
            Step::Descriptor {
                queue,
                index,
                address,
                length,
                flags,
                next,
            } => {
                let (queue, index) = (u16::from(queue % 3), u16::from(index) % SIZE);
                let (flags, next) = (u16::from(flags % 16), u16::from(next) % (SIZE + 2));
                self.describe(
                    queue,
                    index,
                    address.0,
                    length.0.wrapping_mul(16),
                    flags,
                    next,
                );
            }
            Step::Offer(queue, head) => {
                self.offer(u16::from(queue % 3), u16::from(head) % (SIZE + 2));
            }
            Step::Index(queue, value) => self.set_index(u16::from(queue % 3), value),
            Step::Scribble(at, word) => {
                self.store(RINGS + u64::from(at) * 2, &word.0.to_le_bytes())
            }
            Step::Kick(queue) => self.kick(u16::from(queue % 4)),
            Step::Work(count) => {
                for _ in 0..count % 64 {
                    self.device.work();
                }
            }
            Step::Start(queue) => self.start(u16::from(queue % 3)),
            Step::StartAt {
                queue,
                size,
                places: [descriptors, available, used],
                base,
            } => {
                let place = RingPlace {
                    size: size % 1024 + 1,
                    descriptors: descriptors.0,
                    available: available.0,
                    used: used.0,
                    base,
                };
                // Refused or not: the device must stand either.
                let _refused = self.device.start(u16::from(queue % 3), place);
            }
            Step::Stop(queue) => self.stop(u16::from(queue % 3)),
            Step::Memory(table) => self.set_memory(usize::from(table) % TABLES.len()),
            Step::Reset => {
                (0..3).for_each(|queue| self.stop(queue));
                self.start_all();
            }
            Step::Disconnect => self
                .device
                .disconnect()
                .expect("the device is quiet in time"),
        }
    }

    /// Puts a request into a ring.
    fn request(&mut self, queue: u16, bytes: &[u8], room: &Room) {
        self.store(REQUEST, bytes);
        let (length, answer) = (bytes.len() as u32, u32::from(room.bytes) % 0x3000);
        if room.indirect {
            let table = [
                descriptor(REQUEST, length, NEXT, 1),
                descriptor(REPLY, answer, WRITE, 0),
            ];
            self.store(INDIRECT, &table.concat());
            self.describe(queue, 0, INDIRECT, 32, TABLE, 0);
        } else {
            self.describe(queue, 0, REQUEST, length, NEXT, 1);
            self.describe(queue, 1, REPLY, answer, WRITE, 0);
        }
        self.offer(queue, 0);
        if room.kick {
            self.kick(queue);
        }
    }

    /// After a reset everything works, whatever was before.
    fn assert_works(&mut self) {
        (0..3).for_each(|queue| self.stop(queue));
        self.set_memory(0);
        self.start_all();
        for (queue, opcode, answer) in [
            (queue::CONTROL, Opcode::Nop.raw(), 16),
            (queue::SUBMIT, submit::Opcode::Nop.raw(), 8),
        ] {
            let nop = CommandHeader::new(opcode, 8);
            let room = Room {
                bytes: answer,
                indirect: false,
                kick: true,
            };
            self.request(queue, nop.as_bytes(), &room);
            let used = ring(queue).used;
            assert_eq!(
                self.load::<2>(used + 2),
                [1, 0],
                "queue {queue} does not answer"
            );
            assert_eq!(self.load::<4>(used + 8), u32::from(answer).to_le_bytes());
            assert_eq!(self.load::<4>(REPLY), [0; 4], "a Nop fails");
        }
    }

    fn start_all(&mut self) {
        (0..3).for_each(|queue| self.start(queue));
    }

    fn start(&mut self, queue: u16) {
        self.store(RINGS + u64::from(queue) * RING, &[0; RING as usize]);
        self.next[usize::from(queue)] = 0;
        // Refused where the guest has no such RAM.
        let _refused = self.device.start(queue, ring(queue));
    }

    fn stop(&self, queue: u16) {
        self.device
            .stop(queue)
            .expect("the device is quiet in time");
    }

    fn kick(&self, queue: u16) {
        self.device.kick(queue).expect("a kick ends no thread");
    }

    fn set_memory(&mut self, table: usize) {
        let memory = self.tables[table].clone();
        self.device
            .set_memory(memory)
            .expect("the device is quiet in time");
        if table != self.current {
            self.gone[self.current] = Some(sum(&self.tables[self.current]));
        }
        for (gone, memory) in self.gone.iter().zip(&self.tables) {
            let unchanged = gone.is_none_or(|before| before == sum(memory));
            assert!(unchanged, "the device wrote to RAM that was taken away");
        }
        self.gone[table] = None;
        self.current = table;
    }

    fn describe(&self, queue: u16, index: u16, address: u64, length: u32, flags: u16, next: u16) {
        let at = ring(queue).descriptors + 16 * u64::from(index);
        self.store(at, &descriptor(address, length, flags, next));
    }

    fn offer(&mut self, queue: u16, head: u16) {
        let next = self.next[usize::from(queue)];
        let slot = ring(queue).available + 4 + 2 * u64::from(next % SIZE);
        self.store(slot, &head.to_le_bytes());
        self.set_index(queue, next.wrapping_add(1));
    }

    fn set_index(&mut self, queue: u16, value: u16) {
        self.next[usize::from(queue)] = value;
        self.store(ring(queue).available + 2, &value.to_le_bytes());
    }

    /// Writes to RAM, as far as there is some.
    fn store(&self, at: u64, bytes: &[u8]) {
        let _missing = self.tables[self.current].write(bytes, GuestAddress(at));
    }

    fn load<const N: usize>(&self, at: u64) -> [u8; N] {
        let mut bytes = [0; N];
        let memory = &self.tables[self.current];
        memory
            .read_slice(&mut bytes, GuestAddress(at))
            .expect("it is in RAM");
        bytes
    }
}

fn ring(queue: u16) -> RingPlace {
    let start = RINGS + u64::from(queue) * RING;
    RingPlace {
        size: SIZE,
        descriptors: start,
        available: start + 0x400,
        used: start + 0x800,
        base: 0,
    }
}

fn descriptor(address: u64, length: u32, flags: u16, next: u16) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&address.to_le_bytes());
    bytes[8..12].copy_from_slice(&length.to_le_bytes());
    bytes[12..14].copy_from_slice(&flags.to_le_bytes());
    bytes[14..].copy_from_slice(&next.to_le_bytes());
    bytes
}

/// A number that changes with any byte of RAM.
fn sum(memory: &GuestMemoryMmap) -> u64 {
    let mut sum = 0xcbf2_9ce4_8422_2325u64;
    for region in memory.iter() {
        let mut bytes = vec![0; region.len() as usize];
        memory
            .read_slice(&mut bytes, region.start_addr())
            .expect("a region is in RAM");
        for word in bytes.chunks_exact(8) {
            let word = u64::from_le_bytes(word.try_into().expect("8 bytes"));
            sum = (sum ^ word).wrapping_mul(0x100_0000_01b3);
        }
    }
    sum
}
