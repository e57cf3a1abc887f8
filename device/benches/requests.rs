// SPDX-License-Identifier: MIT OR Apache-2.0
//! `cargo bench -p farfault-device --bench requests`: what the device's own part of a request costs.
//!
//! It runs the real process over a real socket, with the front end of `tests/transport` in place of
//! a VM: kick, execution, interrupt, no guest kernel and no QEMU. Copies and fills are compared with
//! `memcpy` of as many bytes in this process. All cases take turns, so that a machine that changes
//! its speed changes it for all; figures are medians. Compare those of one run only.

#[allow(dead_code, reason = "a bench needs less of it than tests")]
#[path = "../tests/transport/device.rs"]
mod device;
#[allow(dead_code, reason = "a bench needs less of it than tests")]
#[path = "../tests/transport/guest.rs"]
mod guest;
#[allow(dead_code, reason = "a bench needs less of it than tests")]
#[path = "../tests/transport/ring.rs"]
mod ring;

use device::Device;
use farfault_protocol::{
    address::VramAddr,
    config::queue,
    control::PteRun,
    pte::Location,
    submit::{CopyRun, Kernel, Reply},
};
use guest::{Guest, Tables, copy, launch, nop, ram, write_ptes};
use std::{
    hint::black_box,
    time::{Duration, Instant},
};

const ROUNDS: usize = 101;
const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const PAGE: u64 = 4 * KIB;
/// What all cases stay within, in RAM and in VRAM.
const WINDOW: u64 = 16 * MIB;
/// The context of the faults.
const CONTEXT: u32 = 0;

/// One thing to be measured.
struct Case {
    name: &'static str,
    bytes: u64,
    what: What,
    samples: Vec<Duration>,
}

enum What {
    Memcpy,
    Nop(u16),
    Control(Vec<u8>),
    /// A job of one word on a page that is mapped when it faults: four requests and two events.
    Fault(Tables),
    /// `before` goes first and is not measured; the lists go together.
    Copy {
        before: Vec<Vec<u8>>,
        lists: Vec<Vec<u8>>,
    },
}

fn main() {
    let device = Device::start_with(&["--vram", "64M"]);
    let mut guest = Guest::boot(&device);
    let most_runs = (guest.config().max_request.get() as usize - 8) / size_of::<CopyRun>();
    let tables = guest.create_context(CONTEXT);
    let mut cases = cases(most_runs, tables);
    let mut buffers = (vec![1u8; WINDOW as usize], vec![2u8; WINDOW as usize]);
    // Memory that is used for the first time would be measured too.
    let all = (0..WINDOW / MIB)
        .map(|i| CopyRun::upload(ram(i * MIB), VramAddr::new(i * MIB), MIB as u32));
    guest.submit_ok(&copy(&all.collect::<Vec<_>>()));

    for round in 0..=ROUNDS {
        for case in &mut cases {
            let time = measure(&mut guest, case, round, &mut buffers);
            // The first is to warm up.
            if round > 0 {
                case.samples.push(time);
            }
        }
    }
    print(&mut cases);
}

fn cases(most_runs: usize, tables: Tables) -> Vec<Case> {
    let case = |name, bytes, what| Case {
        name,
        bytes,
        what,
        samples: Vec::new(),
    };
    let copies = |name, bytes, before: Vec<CopyRun>, runs: Vec<CopyRun>| {
        let lists = |runs: &[CopyRun]| runs.chunks(most_runs).map(copy).collect();
        let what = What::Copy {
            before: lists(&before),
            lists: lists(&runs),
        };
        case(name, bytes, what)
    };
    let up = |(from, to), length| CopyRun::upload(ram(from), VramAddr::new(to), length as u32);
    let down = |(to, from), length| CopyRun::download(VramAddr::new(from), ram(to), length as u32);
    let zero = |(_, to), length| CopyRun::fill(0, VramAddr::new(to), length as u32);
    let pages = |bytes, run: &dyn Fn((u64, u64), u64) -> CopyRun| -> Vec<CopyRun> {
        scattered(bytes).map(|place| run(place, PAGE)).collect()
    };
    let huge = 2 * MIB;
    // Entries anywhere: they belong to no context, so nobody walks them.
    let entries = |runs: usize, count: u64| {
        let run = |index| PteRun {
            entry: VramAddr::new(WINDOW + index * count * 8 % WINDOW),
            first: 0.into(),
            step: 0.into(),
            count: (count as u32).into(),
            reserved: 0.into(),
        };
        What::Control(write_ptes(&(0..runs as u64).map(run).collect::<Vec<_>>()))
    };
    vec![
        case("memcpy", PAGE, What::Memcpy),
        case("memcpy", 64 * KIB, What::Memcpy),
        case("memcpy", huge, What::Memcpy),
        case("memcpy", WINDOW, What::Memcpy),
        case("nop on the control queue", 0, What::Nop(queue::CONTROL)),
        case("nop on the submit queue", 0, What::Nop(queue::SUBMIT)),
        case("a fault, mapped and replayed", 0, What::Fault(tables)),
        case("4096 entries, each a run", 0, entries(4096, 1)),
        case("the longest control request", 0, entries(most_runs, 512)),
        copies("to VRAM, one page", PAGE, vec![], pages(PAGE, &up)),
        copies("to VRAM, pages", 64 * KIB, vec![], pages(64 * KIB, &up)),
        copies("to VRAM, one run", huge, vec![], vec![up((0, 0), huge)]),
        copies("to VRAM, pages", huge, vec![], pages(huge, &up)),
        copies("to VRAM, pages", WINDOW, vec![], pages(WINDOW, &up)),
        copies("to RAM, one run", huge, vec![], vec![down((0, 0), huge)]),
        copies("to RAM, pages", huge, vec![], pages(huge, &down)),
        copies("to RAM, pages", WINDOW, vec![], pages(WINDOW, &down)),
        copies(
            "zero VRAM, one run",
            huge,
            vec![up((0, 0), huge)],
            vec![zero((0, 0), huge)],
        ),
        copies(
            "zero VRAM, pages",
            huge,
            pages(huge, &up),
            pages(huge, &zero),
        ),
        copies(
            "to VRAM that was zeroed, one run",
            huge,
            vec![zero((0, 0), huge)],
            vec![up((0, 0), huge)],
        ),
        copies(
            "to VRAM that was zeroed, pages",
            huge,
            vec![zero((0, 0), huge)],
            (0..huge / PAGE)
                .map(|i| up((i * PAGE, i * PAGE), PAGE))
                .collect(),
        ),
    ]
}

/// Pages all over the window: no two that follow each other are neighbours, on either side.
fn scattered(bytes: u64) -> impl Iterator<Item = (u64, u64)> {
    let pages = WINDOW / PAGE;
    // Odd factors make each page come once.
    (0..bytes / PAGE).map(move |i| (i * 1229 % pages * PAGE, i * 2741 % pages * PAGE))
}

fn measure(
    guest: &mut Guest,
    case: &Case,
    round: usize,
    buffers: &mut (Vec<u8>, Vec<u8>),
) -> Duration {
    match &case.what {
        What::Memcpy => {
            let length = case.bytes as usize;
            let start = Instant::now();
            buffers.0[..length].copy_from_slice(black_box(&buffers.1[..length]));
            black_box(&mut buffers.0);
            start.elapsed()
        }
        What::Nop(queue) => {
            let start = Instant::now();
            guest.request(*queue, &nop(), 16);
            start.elapsed()
        }
        What::Control(request) => {
            let start = Instant::now();
            guest.control_ok(request);
            start.elapsed()
        }
        What::Fault(tables) => {
            // A page that it has not used yet.
            let page = round as u64;
            let (va, fence) = (page * PAGE, page);
            let start = Instant::now();
            guest.submit_ok(&launch(CONTEXT, Kernel::Sum, fence, [va, 8, 0, 0]));
            let fault = guest.fault();
            guest.map(*tables, va, Location::Vram(VramAddr::new(WINDOW)));
            guest.replay(CONTEXT, fault.sequence.get());
            guest.fence();
            start.elapsed()
        }
        What::Copy { before, lists } => {
            send_all(guest, before);
            let start = Instant::now();
            send_all(guest, lists);
            start.elapsed()
        }
    }
}

fn send_all(guest: &mut Guest, lists: &[Vec<u8>]) {
    for list in lists {
        guest.send(queue::SUBMIT, list, size_of::<Reply>() as u32);
    }
    for _ in lists {
        let (_, reply) = guest.receive_any(queue::SUBMIT);
        assert_eq!(reply, [0; size_of::<Reply>()], "a copy failed");
    }
}

fn print(cases: &mut [Case]) {
    let median = |case: &mut Case| {
        case.samples.sort_unstable();
        case.samples[case.samples.len() / 2].as_secs_f64() * 1e6
    };
    let mut plain = Vec::new();
    println!("{:34} {:>9} {:>11} {:>10}", "", "KiB", "µs", "× memcpy");
    for case in cases {
        let time = median(case);
        if matches!(case.what, What::Memcpy) {
            plain.push((case.bytes, time));
        }
        let ratio = plain.iter().find(|(bytes, _)| *bytes == case.bytes);
        let ratio = ratio.map_or(String::new(), |(_, plain)| format!("{:.2}", time / plain));
        println!(
            "{:34} {:>9} {time:>11.1} {ratio:>10}",
            case.name,
            case.bytes / KIB
        );
    }
}
