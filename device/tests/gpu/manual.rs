// SPDX-License-Identifier: MIT OR Apache-2.0
//! Chapter 11 of the manual, byte for byte: what it sends is sent, what it says comes back must come
//! back. The bytes are read from the chapter itself, so that it cannot go stale.

use crate::rig::{cancel, read_ptes};
use farfault_device::gpu::{EventBytes, Gpu, Outcome, Queue, Settings};
use farfault_protocol::event::{Access, FaultCause, FenceEvent, JobStatus};
use std::collections::VecDeque;
use vm_memory::{GuestAddress, GuestMemoryMmap};
use zerocopy::FromBytes;

const CHAPTER: &str = include_str!("../../../docs/manual/11-writing-a-driver.md");

/// What a block of bytes is.
#[derive(Clone, Copy, Debug)]
enum Role {
    /// A request of the control queue.
    Control,
    /// A request of the submit queue.
    Submit,
    /// The reply to the last request. Where none is printed it is `Ok`.
    Reply,
    /// What the device writes to the next event buffer.
    Event,
}
use Role::{Control, Event, Reply, Submit};

/// The blocks of each section that has any, in order.
const SECTIONS: [(&str, &[Role]); 7] = [
    ("11.2", &[Control, Reply]),
    ("11.3", &[Control, Reply]),
    ("11.4", &[Submit, Reply, Control]),
    ("11.5", &[Submit, Event]),
    ("11.6", &[Submit, Event, Control, Event]),
    ("11.7", &[Control]),
    ("11.8", &[Control]),
];

/// The bytes of a block: lines of an offset, bytes, and words after three spaces.
fn bytes(block: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    for line in block.lines() {
        let (offset, rest) = line.split_once("  ").expect("an offset");
        let offset = usize::from_str_radix(offset, 16).expect("a hexadecimal offset");
        assert_eq!(offset, bytes.len(), "{line}");
        let hex = rest.split("   ").next().expect("bytes");
        let byte = |text| u8::from_str_radix(text, 16).unwrap_or_else(|e| panic!("{line}: {e}"));
        bytes.extend(hex.split(' ').map(byte));
    }
    bytes
}

/// The blocks of a section of the chapter.
fn blocks(section: &str) -> Vec<Vec<u8>> {
    let blocks = section.split("```").skip(1).step_by(2);
    blocks.map(|block| bytes(block.trim())).collect()
}

/// Sections of the chapter that have blocks, by number.
fn sections() -> Vec<(&'static str, Vec<Vec<u8>>)> {
    let sections = CHAPTER.split("\n## ").skip(1);
    let numbered = sections.map(|text| (text.split(' ').next().unwrap_or(text), blocks(text)));
    numbered.filter(|(_, blocks)| !blocks.is_empty()).collect()
}

/// A driver that follows the chapter.
struct Reader {
    gpu: Gpu,
    ram: GuestMemoryMmap,
    /// The reply that was not compared yet.
    reply: Option<Vec<u8>>,
    events: VecDeque<EventBytes>,
}

impl Reader {
    fn new() -> Self {
        let mut gpu = Gpu::new(Settings::new(4 << 20)).unwrap();
        gpu.post_event_buffers(8);
        Self {
            gpu,
            ram: GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap(),
            reply: None,
            events: VecDeque::new(),
        }
    }

    /// Sends a request and lets the GPU do all that there is to do.
    fn send(&mut self, queue: Queue, request: &[u8]) -> Vec<u8> {
        let outcome = match queue {
            Queue::Control => self.gpu.control(request, 0),
            Queue::Submit => self.gpu.submit(request, 0, &self.ram),
        };
        while let Some(work) = self.gpu.next_work() {
            let done = work.execute(&self.ram);
            self.gpu.retire(done);
        }
        self.events
            .extend(std::iter::from_fn(|| self.gpu.next_event()));
        match outcome {
            Outcome::Done(reply) => reply,
            Outcome::Pending => self.gpu.next_completion().expect("a reply").reply,
        }
    }

    fn follow(&mut self, role: Role, block: &[u8]) {
        let queue = match role {
            Control => Queue::Control,
            Submit => Queue::Submit,
            Reply => return assert_eq!(self.reply.take().as_deref(), Some(block)),
            Event => {
                let event = self.events.pop_front();
                return assert_eq!(event.as_ref().map(<[u8; 64]>::as_slice), Some(block));
            }
        };
        let reply = self.send(queue, block);
        assert_eq!(reply[..4], [0; 4], "the status is Ok");
        self.reply = Some(reply);
    }

    /// The leaf of a page of context 1.
    fn leaf(&mut self, page: u64) -> u64 {
        let reply = self.send(Queue::Control, &read_ptes(1, page, 1));
        u64::read_from_bytes(&reply[16..]).unwrap()
    }
}

#[test]
fn manual_followed_byte_for_byte_comes_to_its_end() {
    let mut reader = Reader::new();
    let sections = sections();
    assert_eq!(sections.len(), SECTIONS.len(), "sections with bytes");
    for ((number, blocks), (expected, roles)) in sections.iter().zip(SECTIONS) {
        assert_eq!(*number, expected);
        assert_eq!(blocks.len(), roles.len(), "blocks of section {number}");
        for (block, role) in blocks.iter().zip(roles) {
            println!("section {number}: {role:?}, {} bytes", block.len());
            reader.follow(*role, block);
        }
        assert!(reader.events.is_empty(), "events after section {number}");
        match *number {
            "11.5" => assert_eq!(reader.leaf(0x7f00_0000_1000), 0x4063),
            "11.7" => assert_eq!(reader.leaf(0x7f00_0000_1000), 0),
            _ => {}
        }
    }
    assert!(reader.gpu.contexts().is_empty());
}

#[test]
fn manual_with_its_fault_cancelled_ends_the_job_as_it_says() {
    let mut reader = Reader::new();
    for ((number, blocks), (_, roles)) in sections().iter().zip(SECTIONS) {
        let until_the_fault = if *number == "11.6" { 2 } else { roles.len() };
        for (block, role) in blocks.iter().zip(roles).take(until_the_fault) {
            reader.follow(*role, block);
        }
        if *number == "11.6" {
            break;
        }
    }
    reader.follow(Control, &cancel(1, 1));
    let event = reader.events.pop_front().expect("a fence event");
    let fence = FenceEvent::read_from_bytes(&event).unwrap();
    assert_eq!(fence.fence.get(), 8);
    assert_eq!(fence.status.get(), JobStatus::Fault.raw());
    assert_eq!(fence.page.get(), 0x7f00_0000_2000);
    assert_eq!(fence.access, Access::Read.raw());
    assert_eq!(fence.cause, FaultCause::NotPresent.raw());
}
