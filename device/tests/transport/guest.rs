// SPDX-License-Identifier: MIT OR Apache-2.0
//! A front end with a guest inside: RAM, three rings, and a driver's first steps.

use crate::{
    device::Device,
    ring::{Descriptor, NEXT, Ring, WRITE},
};
use farfault_protocol::{
    address::{GpuVa, SystemAddr, VramAddr},
    command::{CommandHeader, Status},
    config::{ConfigSpace, queue},
    control::{self, CreateContext, PteRun, Replay, WritePtes},
    event::{EVENT_SIZE, EventHeader, EventKind, FaultEvent, FenceEvent},
    pte::{self, Location, Pte},
    submit::{self, CopyRun, Kernel, Launch},
};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use std::{fs::File, os::unix::net::UnixStream, time::Duration};
use vhost::{
    VhostBackend, VhostUserMemoryRegionInfo, VringConfigData,
    vhost_user::{
        Frontend, VhostUserFrontend,
        message::{VhostUserConfigFlags, VhostUserProtocolFeatures},
    },
};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// No answer takes longer, on any machine.
pub(crate) const DEADLINE: Duration = Duration::from_secs(20);
/// RAM does not begin at zero, so that a forgotten address is an error.
pub(crate) const GUEST_BASE: u64 = 0x1000_0000;
/// Bytes of RAM.
pub(crate) const GUEST_SIZE: usize = 192 << 20;
/// Where the test's own data may be, behind rings and requests.
pub(crate) const DATA: u64 = GUEST_BASE + (128 << 20);
/// Where requests are: a slot for each descriptor of each queue.
const REQUESTS: u64 = GUEST_BASE + (1 << 20);
/// Bytes of a slot: the first half for the request, the second for the reply.
const SLOT: u64 = 0x8_0000;
/// Descriptors of each ring.
pub(crate) const RING_SIZE: u16 = 64;

const EVENT_IDX: u64 = 1 << 29;
const INDIRECT_DESC: u64 = 1 << 28;
const VERSION_1: u64 = 1 << 32;
const PROTOCOL_FEATURES: u64 = 1 << 30;

/// A virtual machine with the GPU in it, as far as the device can tell.
pub(crate) struct Guest {
    /// What the front end talks through, for words that it does not know.
    pub(crate) socket: UnixStream,
    pub(crate) frontend: Frontend,
    pub(crate) memory: GuestMemoryMmap,
    pub(crate) rings: [Ring; 3],
}

impl Guest {
    /// Connects, negotiates, starts the queues and posts as many event buffers as fit.
    pub(crate) fn boot(device: &Device) -> Self {
        let mut guest = Self::boot_without_event_buffers(device);
        let known = device.transport_stat("event_buffers");
        for _ in 0..RING_SIZE {
            guest.post_event_buffer();
        }
        // Each queue has its own thread: the first fault may be faster than the first buffer.
        device.wait_for_transport_stat("event_buffers", known + u64::from(RING_SIZE));
        guest
    }

    pub(crate) fn boot_without_event_buffers(device: &Device) -> Self {
        let mut guest = Self::connect(device);
        guest.start();
        guest
    }

    /// Connects and negotiates.
    pub(crate) fn connect(device: &Device) -> Self {
        let stream = UnixStream::connect(device.socket()).expect("the device listens");
        stream.set_read_timeout(Some(DEADLINE)).expect("a deadline");
        let socket = stream.try_clone().expect("a second descriptor");
        let mut frontend = Frontend::from_stream(stream, 3);
        frontend.set_owner().expect("SET_OWNER");
        let features = frontend.get_features().expect("GET_FEATURES");
        assert_eq!(
            features,
            VERSION_1 | EVENT_IDX | INDIRECT_DESC | PROTOCOL_FEATURES
        );
        let protocol = frontend
            .get_protocol_features()
            .expect("GET_PROTOCOL_FEATURES");
        frontend
            .set_protocol_features(protocol)
            .expect("SET_PROTOCOL_FEATURES");
        assert!(
            protocol.contains(VhostUserProtocolFeatures::CONFIG | VhostUserProtocolFeatures::MQ)
        );
        assert!(!protocol.contains(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS));
        frontend.set_features(features).expect("SET_FEATURES");
        let memory = new_memory();
        set_memory(&frontend, &memory);
        let rings = [0, 1, 2].map(|index| Ring::new(&memory, index, RING_SIZE));
        Self {
            socket,
            frontend,
            memory,
            rings,
        }
    }

    /// Starts all queues, with fresh rings.
    pub(crate) fn start(&mut self) {
        self.start_with_breaks(Duration::ZERO);
    }

    /// Starts all queues, with fresh rings, and with a break after each that is longer than the device needs to
    /// see it.
    pub(crate) fn start_with_breaks(&mut self, length: Duration) {
        self.rings = [0, 1, 2].map(|index| Ring::new(&self.memory, index, RING_SIZE));
        self.start_at([0; 3], length);
    }

    /// Starts all queues, with the rings that are there, taken so far; in QEMU's order.
    fn start_at(&mut self, bases: [u16; 3], length_of_breaks: Duration) {
        let to_host = self.host_address(GuestAddress(GUEST_BASE)) - GUEST_BASE;
        let frontend = &mut self.frontend;
        for ((index, ring), base) in self.rings.iter().enumerate().zip(bases) {
            frontend
                .set_vring_num(index, ring.size)
                .expect("SET_VRING_NUM");
            frontend
                .set_vring_addr(
                    index,
                    &VringConfigData {
                        queue_max_size: ring.size,
                        queue_size: ring.size,
                        flags: 0,
                        desc_table_addr: ring.descriptors() + to_host,
                        used_ring_addr: ring.used() + to_host,
                        avail_ring_addr: ring.available() + to_host,
                        log_addr: None,
                    },
                )
                .expect("SET_VRING_ADDR");
            frontend
                .set_vring_base(index, base)
                .expect("SET_VRING_BASE");
            frontend
                .set_vring_call(index, &ring.call)
                .expect("SET_VRING_CALL");
            frontend
                .set_vring_kick(index, &ring.kick)
                .expect("SET_VRING_KICK");
            if !length_of_breaks.is_zero() {
                // A queue's thread looks at a ring that it is kicked for.
                ring.kick();
                std::thread::sleep(length_of_breaks);
            }
        }
        for index in 0..3 {
            frontend
                .set_vring_enable(index, true)
                .expect("SET_VRING_ENABLE");
        }
    }

    /// Stops all queues and starts them again where they were, as QEMU does for a VM that is paused for some
    /// time.
    pub(crate) fn pause(&mut self, time: Duration) {
        for index in 0..3 {
            let disabled = self.frontend.set_vring_enable(index, false);
            disabled.expect("SET_VRING_ENABLE");
        }
        let bases = [0, 1, 2].map(|index| {
            let base = self.frontend.get_vring_base(index).expect("GET_VRING_BASE");
            base as u16
        });
        std::thread::sleep(time);
        self.start_at(bases, Duration::ZERO);
    }

    /// Stops all queues, as QEMU does when the guest resets the device.
    pub(crate) fn stop(&mut self) {
        for index in 0..3 {
            self.frontend.get_vring_base(index).expect("GET_VRING_BASE");
        }
    }

    fn host_address(&self, address: GuestAddress) -> u64 {
        self.memory.get_host_address(address).expect("in RAM") as u64
    }

    pub(crate) fn config(&mut self) -> ConfigSpace {
        let size = size_of::<ConfigSpace>();
        let (_, bytes) = self
            .frontend
            .get_config(
                0,
                size as u32,
                VhostUserConfigFlags::WRITABLE,
                &vec![0; size],
            )
            .expect("GET_CONFIG");
        ConfigSpace::read_from_bytes(&bytes).expect("256 bytes")
    }

    /// Puts a request on a queue and waits for all bytes of its reply.
    pub(crate) fn request(&mut self, queue: u16, request: &[u8], reply_room: u32) -> Vec<u8> {
        let head = self.send(queue, request, reply_room);
        self.receive(queue, head)
    }

    /// Puts a request on a queue; its chain's head.
    pub(crate) fn send(&mut self, queue: u16, request: &[u8], reply_room: u32) -> u16 {
        let ring = &mut self.rings[usize::from(queue)];
        let (head, tail) = (ring.allocate(), ring.allocate());
        let slot = slot(queue, head);
        self.memory
            .write_slice(request, GuestAddress(slot))
            .expect("in RAM");
        let length = request.len() as u32;
        ring.write_descriptor(
            head,
            Descriptor {
                address: slot,
                length,
                flags: NEXT,
                next: tail,
            },
        );
        let reply = Descriptor {
            address: slot + SLOT / 2,
            length: reply_room,
            flags: WRITE,
            next: 0,
        };
        ring.write_descriptor(tail, reply);
        ring.offer(head);
        // The tail is known again by its head.
        self.memory
            .write_obj(tail, GuestAddress(slot + SLOT - 2))
            .expect("in RAM");
        head
    }

    /// Waits for the reply to the chain at `head`, the next that the queue gives back.
    pub(crate) fn receive(&mut self, queue: u16, head: u16) -> Vec<u8> {
        let (got, length) = self.rings[usize::from(queue)].wait_used();
        assert_eq!(got, head, "replies out of order");
        self.take_reply(queue, got, length)
    }

    /// Waits for whatever reply comes next: its head too.
    pub(crate) fn receive_any(&mut self, queue: u16) -> (u16, Vec<u8>) {
        let (head, length) = self.rings[usize::from(queue)].wait_used();
        (head, self.take_reply(queue, head, length))
    }

    fn take_reply(&mut self, queue: u16, head: u16, length: u32) -> Vec<u8> {
        let slot = slot(queue, head);
        let mut reply = vec![0; length as usize];
        self.memory
            .read_slice(&mut reply, GuestAddress(slot + SLOT / 2))
            .expect("in RAM");
        let tail: u16 = self
            .memory
            .read_obj(GuestAddress(slot + SLOT - 2))
            .expect("in RAM");
        let ring = &mut self.rings[usize::from(queue)];
        ring.release(head);
        ring.release(tail);
        reply
    }

    /// A control request: the reply, which must be a whole one.
    pub(crate) fn control(&mut self, request: &[u8]) -> control::Reply {
        let reply = self.request(queue::CONTROL, request, size_of::<control::Reply>() as u32);
        control::Reply::read_from_bytes(&reply).expect("a control reply")
    }

    /// A control request that must succeed.
    pub(crate) fn control_ok(&mut self, request: &[u8]) -> control::Reply {
        let reply = self.control(request);
        assert_eq!(reply.status.get(), Status::Ok.raw(), "{reply:?}");
        reply
    }

    /// A submission: the reply, which must be a whole one.
    pub(crate) fn submit(&mut self, request: &[u8]) -> submit::Reply {
        let reply = self.request(queue::SUBMIT, request, size_of::<submit::Reply>() as u32);
        submit::Reply::read_from_bytes(&reply).expect("a submit reply")
    }

    /// A submission that must succeed.
    pub(crate) fn submit_ok(&mut self, request: &[u8]) {
        let reply = self.submit(request);
        assert_eq!(reply.status.get(), Status::Ok.raw(), "{reply:?}");
    }

    /// Posts one event buffer.
    pub(crate) fn post_event_buffer(&mut self) {
        let ring = &mut self.rings[usize::from(queue::EVENT)];
        let head = ring.allocate();
        let address = slot(queue::EVENT, head);
        let length = EVENT_SIZE as u32;
        ring.write_descriptor(
            head,
            Descriptor {
                address,
                length,
                flags: WRITE,
                next: 0,
            },
        );
        ring.offer(head);
    }

    /// Waits for an event, and posts its buffer again.
    pub(crate) fn event(&mut self) -> [u8; EVENT_SIZE] {
        self.event_for(DEADLINE)
            .unwrap_or_else(|| panic!("no event within {DEADLINE:?}"))
    }

    pub(crate) fn event_for(&mut self, limit: Duration) -> Option<[u8; EVENT_SIZE]> {
        let ring = &mut self.rings[usize::from(queue::EVENT)];
        let (head, length) = ring.wait_used_for(limit)?;
        assert_eq!(length as usize, EVENT_SIZE);
        let mut event = [0; EVENT_SIZE];
        self.memory
            .read_slice(&mut event, GuestAddress(slot(queue::EVENT, head)))
            .expect("in RAM");
        ring.release(head);
        self.post_event_buffer();
        Some(event)
    }

    pub(crate) fn fault(&mut self) -> FaultEvent {
        let event = self.event();
        assert_eq!(kind(&event), Some(EventKind::Fault), "{event:?}");
        FaultEvent::read_from_bytes(&event).expect("64 bytes")
    }

    pub(crate) fn fence(&mut self) -> FenceEvent {
        let event = self.event();
        assert_eq!(kind(&event), Some(EventKind::Fence), "{event:?}");
        FenceEvent::read_from_bytes(&event).expect("64 bytes")
    }

    /// Makes a context whose page tables are zero, at the beginning of VRAM.
    pub(crate) fn create_context(&mut self, context: u32) -> Tables {
        let root = VramAddr::new(u64::from(context) * 4 * pte::ENTRIES * 8);
        self.control_ok(
            command(CreateContext {
                header: CommandHeader::new(control::Opcode::CreateContext.raw(), 24),
                context: context.into(),
                reserved: 0.into(),
                root,
            })
            .as_slice(),
        );
        Tables { root: root.get() }
    }

    /// Maps the page at `va` of the first 2 MiB.
    pub(crate) fn map(&mut self, tables: Tables, va: u64, to: Location) {
        assert!(va < 1 << 21);
        let table = |level: u64| VramAddr::new(tables.root + level * 4096);
        let page = VramAddr::new(tables.root + 3 * 4096 + pte::index(GpuVa::new(va), 0) * 8);
        let runs = [
            run(table(0), Pte::table(table(1))),
            run(table(1), Pte::table(table(2))),
            run(table(2), Pte::table(table(3))),
            run(page, Pte::leaf(to, Pte::WRITABLE | Pte::ATOMIC)),
        ];
        self.control_ok(&write_ptes(&runs));
    }

    /// Lets parked waves go on.
    pub(crate) fn replay(&mut self, context: u32, through: u64) {
        self.control_ok(
            command(Replay {
                header: CommandHeader::new(control::Opcode::Replay.raw(), 24),
                context: context.into(),
                reserved: 0.into(),
                through: through.into(),
            })
            .as_slice(),
        );
    }
}

/// Page tables of a context: four tables, one behind the other.
#[derive(Clone, Copy)]
pub(crate) struct Tables {
    root: u64,
}

/// Where the requests of a queue's descriptor are.
fn slot(queue: u16, head: u16) -> u64 {
    REQUESTS + (u64::from(queue) * u64::from(RING_SIZE) + u64::from(head)) * SLOT
}

/// Guest RAM that another process can map.
pub(crate) fn new_memory() -> GuestMemoryMmap {
    let file = memory_file(GUEST_SIZE as u64);
    fcntl_add_seals(&file, SealFlags::SHRINK).expect("a memfd can be sealed");
    GuestMemoryMmap::from_ranges_with_files([(
        GuestAddress(GUEST_BASE),
        GUEST_SIZE,
        Some(FileOffset::new(file, 0)),
    )])
    .expect("RAM can be mapped")
}

/// A file in memory, as QEMU makes one, and not sealed yet.
pub(crate) fn memory_file(size: u64) -> File {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = File::from(memfd_create("guest", flags).expect("a memfd"));
    file.set_len(size).expect("a memfd has any size");
    file
}

/// Tells the device about its RAM.
pub(crate) fn set_memory(frontend: &Frontend, memory: &GuestMemoryMmap) {
    let regions: Vec<_> = memory
        .iter()
        .map(|region| VhostUserMemoryRegionInfo::from_guest_region(region).expect("a region"))
        .collect();
    frontend.set_mem_table(&regions).expect("SET_MEM_TABLE");
}

/// A command's bytes.
pub(crate) fn command<T: IntoBytes + Immutable + KnownLayout>(command: T) -> Vec<u8> {
    command.as_bytes().to_vec()
}

pub(crate) fn nop() -> Vec<u8> {
    command(CommandHeader::new(control::Opcode::Nop.raw(), 8))
}

fn run(entry: VramAddr, pte: Pte) -> PteRun {
    PteRun {
        entry,
        first: pte.0.into(),
        step: 0.into(),
        count: 1.into(),
        reserved: 0.into(),
    }
}

/// A command that writes page-table entries.
pub(crate) fn write_ptes(runs: &[PteRun]) -> Vec<u8> {
    let length = (size_of::<WritePtes>() + size_of_val(runs)) as u32;
    let header = WritePtes {
        header: CommandHeader::new(control::Opcode::WritePtes.raw(), length),
    };
    [header.as_bytes(), runs.as_bytes()].concat()
}

/// A command that copies.
pub(crate) fn copy(runs: &[CopyRun]) -> Vec<u8> {
    let length = (size_of::<submit::Copy>() + size_of_val(runs)) as u32;
    let header = submit::Copy {
        header: CommandHeader::new(submit::Opcode::Copy.raw(), length),
    };
    [header.as_bytes(), runs.as_bytes()].concat()
}

/// A command that starts a job.
pub(crate) fn launch(context: u32, kernel: Kernel, fence: u64, arguments: [u64; 4]) -> Vec<u8> {
    command(Launch {
        header: CommandHeader::new(submit::Opcode::Launch.raw(), 64),
        context: context.into(),
        kernel: kernel.raw().into(),
        fence: fence.into(),
        waves: 1.into(),
        reserved: 0.into(),
        arguments: arguments.map(Into::into),
    })
}

/// What an event is.
pub(crate) fn kind(event: &[u8; EVENT_SIZE]) -> Option<EventKind> {
    let (header, _) = EventHeader::read_from_prefix(event).expect("64 bytes");
    EventKind::from_raw(header.kind.get())
}

/// An address in the guest's RAM.
pub(crate) fn ram(offset: u64) -> SystemAddr {
    SystemAddr::new(DATA + offset)
}
