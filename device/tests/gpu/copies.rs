// SPDX-License-Identifier: MIT OR Apache-2.0
//! Copy lists: what moves, what is refused, and that nothing moves then.

use crate::rig::*;
use farfault_device::gpu::{Limits, Outcome, Queue};
use farfault_protocol::{
    address::{SystemAddr, VramAddr},
    command::Status,
    submit::{CopyAperture, CopyRun},
};
use vm_memory::{Bytes, GuestAddress};

const UP: u64 = MIB;

fn upload(from: u64, to: u64, length: u64) -> CopyRun {
    CopyRun::upload(SystemAddr::new(from), VramAddr::new(to), length as u32)
}

fn download(from: u64, to: u64, length: u64) -> CopyRun {
    CopyRun::download(VramAddr::new(from), SystemAddr::new(to), length as u32)
}

fn fill(pattern: u64, to: u64, length: u64) -> CopyRun {
    CopyRun::fill(pattern, VramAddr::new(to), length as u32)
}

fn pattern(length: u64, seed: u8) -> Vec<u8> {
    (0..length)
        .map(|i| (i * 7 + i / 251) as u8 ^ seed)
        .collect()
}

fn ram(rig: &Rig, at: u64, length: u64) -> Vec<u8> {
    let mut bytes = vec![0; length as usize];
    rig.ram.read_slice(&mut bytes, GuestAddress(at)).unwrap();
    bytes
}

#[test]
fn bytes_go_up_and_come_back() {
    let mut rig = Rig::new();
    // Odd ends, longer than one work, and across the border of two pieces of RAM.
    for (length, from, to) in [
        (1, 3, 5),
        (4096, 0, 0),
        (4 * MIB, 0x101, 0x33),
        (700_001, 24 * MIB - 300_000, 9),
    ] {
        let data = pattern(length, length as u8);
        rig.ram.write_slice(&data, GuestAddress(from)).unwrap();
        assert_eq!(rig.copy(&[upload(from, UP + to, length)]), (Status::Ok, 0));
        let back = 17 * MIB + 1;
        assert_eq!(
            rig.copy(&[download(UP + to, back, length)]),
            (Status::Ok, 0)
        );
        assert!(ram(&rig, back, length) == data);
    }
}

#[test]
fn list_of_many_runs_moves_each() {
    let mut rig = Rig::new();
    let data = pattern(1000 * 64, 1);
    rig.ram.write_slice(&data, GuestAddress(0)).unwrap();
    // In VRAM the pieces lie in the opposite order.
    let runs: Vec<_> = (0..1000)
        .map(|i| upload(i * 64, (999 - i) * 64, 64))
        .collect();
    assert_eq!(rig.copy(&runs), (Status::Ok, 0));
    assert_eq!(rig.copy(&[download(0, 16 * MIB, 64_000)]), (Status::Ok, 0));
    let back = ram(&rig, 16 * MIB, 64_000);
    let turned: Vec<u8> = data.chunks(64).rev().flatten().copied().collect();
    assert!(back == turned);
    let stats = rig.gpu.stats().copy;
    assert_eq!(
        (stats.bytes_to_vram, stats.bytes_to_system),
        (64_000, 64_000)
    );
}

#[test]
fn fill_repeats_the_pattern_and_nothing_else() {
    let mut rig = Rig::new();
    let word = 0x0123_4567_89ab_cdef;
    assert_eq!(rig.copy(&[fill(word, 8, 3 * MIB - 16)]), (Status::Ok, 0));
    let at = [0, 8, MIB, 3 * MIB - 16, 3 * MIB - 8];
    assert_eq!(at.map(|at| rig.vram_word(at)), [0, word, word, word, 0]);
}

#[test]
fn fill_behind_an_odd_run_keeps_its_phase() {
    let mut rig = Rig::new();
    let word = 0x0123_4567_89ab_cdef;
    let runs = [upload(0, 60 * MIB, 3), fill(word, 0, MIB)];
    assert_eq!(rig.copy(&runs), (Status::Ok, 0));
    for at in [0, 256 * KIB - 8, 256 * KIB, 512 * KIB, MIB - 8] {
        assert_eq!(rig.vram_word(at), word);
    }
}

#[test]
fn fill_with_zero_zeroes_exactly_and_uses_no_memory_of_its_own() {
    let mut rig = Rig::new();
    assert_eq!(
        rig.copy(&[fill(!0, 0, 4 * MIB), fill(!0, 4 * MIB, 4 * MIB)]),
        (Status::Ok, 0)
    );
    assert_eq!(rig.gpu.vram().written, 8 * MIB);
    let runs = [
        fill(0, MIB + 8, 3 * MIB - 8),
        fill(0, 4 * MIB, 2 * MIB + 16),
    ];
    assert_eq!(rig.copy(&runs), (Status::Ok, 0));
    for (at, expected) in [
        (MIB, !0),
        (MIB + 8, 0),
        (2 * MIB, 0),
        (6 * MIB + 8, 0),
        (6 * MIB + 16, !0),
    ] {
        assert_eq!(rig.vram_word(at), expected, "at {at:#x}");
    }
    let unused = fill(0, 8 * MIB - 16, 4 * MIB);
    assert_eq!(rig.copy(&[unused]), (Status::Ok, 0));
    assert_eq!(rig.vram_word(8 * MIB - 24), !0);
    assert_eq!([0, 8].map(|i| rig.vram_word(8 * MIB - 16 + i)), [0, 0]);
    assert_eq!(rig.gpu.vram().written, 8 * MIB);
}

#[test]
fn whatever_was_stored_in_vram_is_zeroed() {
    const LENGTH: u64 = 64 * KIB;
    type Store = fn(&mut Rig);
    let ways: [(&str, Store); 4] = [
        ("copied from RAM", |rig| {
            rig.set_ram_word(0, !0);
            assert_eq!(rig.copy(&[upload(0, 0, LENGTH)]).0, Status::Ok);
        }),
        ("copied from VRAM", |rig| {
            rig.set_vram_word(4 * MIB, !0);
            let run = CopyRun {
                source_aperture: CopyAperture::Vram.raw(),
                ..upload(4 * MIB, 0, LENGTH)
            };
            assert_eq!(rig.copy(&[run]).0, Status::Ok);
        }),
        ("filled", |rig| {
            assert_eq!(rig.copy(&[fill(!0, 0, LENGTH)]).0, Status::Ok);
        }),
        ("written as a page table", |rig| {
            rig.write_pte(VramAddr::new(0), !0);
        }),
    ];
    for (way, store) in ways {
        let mut rig = Rig::new();
        store(&mut rig);
        assert_eq!(rig.vram_word(0), !0, "{way}");
        assert_eq!(rig.copy(&[fill(0, 0, LENGTH)]).0, Status::Ok);
        assert_eq!(rig.vram_word(0), 0, "{way}");
    }
}

#[test]
fn runs_wrong_are_refused_with_their_index_and_nothing_moves() {
    let mut rig = Rig::new();
    let good = fill(!0, 0, 64);
    let wrong = |change: fn(&mut CopyRun)| {
        let mut run = good;
        change(&mut run);
        run
    };
    let cases = [
        (fill(1, 0, 0), Status::BadArgument),
        (upload(0, 0, 4 * MIB + 1), Status::LimitExceeded),
        (fill(1, 4, 8), Status::Misaligned),
        (fill(1, 8, 12), Status::Misaligned),
        (fill(1, VRAM - 8, 16), Status::BadAddress),
        (upload(0, VRAM, 1), Status::BadAddress),
        (upload(0, u64::MAX, 8), Status::BadAddress),
        (upload(8 * MIB - 1, 0, 2), Status::BadAddress),
        (upload(u64::MAX, 0, 2), Status::BadAddress),
        (download(0, 12 * MIB, 1), Status::BadAddress),
        (download(VRAM - 1, 0, 2), Status::BadAddress),
        (wrong(|run| run.reserved[9] = 1), Status::Malformed),
        (wrong(|run| run.source_aperture = 3), Status::BadArgument),
        (
            wrong(|run| run.destination_aperture = 9),
            Status::BadArgument,
        ),
        (
            wrong(|run| run.destination_aperture = CopyAperture::Pattern.raw()),
            Status::BadArgument,
        ),
    ];
    for (bad, expected) in cases {
        assert_eq!(rig.copy(&[good, good, bad, good]), (expected, 2), "{bad:?}");
    }
    assert_eq!(rig.vram_word(0), 0);
}

#[test]
fn submit_framing_wrong_is_refused() {
    let mut rig = Rig::new();
    let one = copy(&[fill(0, 0, 8)]);
    assert_eq!(rig.submit(&copy(&[])), (Status::Malformed, 0));
    assert_eq!(rig.submit(&[]), (Status::Malformed, 0));
    assert_eq!(rig.submit(&one[..16]), (Status::Malformed, 0));
    assert_eq!(
        rig.submit(&[one.clone(), nop()].concat()),
        (Status::Malformed, 0)
    );
    let mut unknown = nop();
    unknown[0] = 3;
    assert_eq!(rig.submit(&unknown), (Status::UnknownCommand, 0));
    assert_eq!(rig.submit(&nop()), (Status::Ok, 0));
    let most = Limits::default().max_request as usize / size_of::<CopyRun>();
    let long = copy(&vec![fill(0, 0, 8); most]);
    assert_eq!(rig.submit(&long), (Status::LimitExceeded, 0));
}

#[test]
fn lists_take_turns() {
    let mut rig = Rig::new();
    let long: Vec<_> = (0..4).map(|i| fill(1, i * 4 * MIB, 4 * MIB)).collect();
    assert_eq!(
        rig.gpu.submit(&copy(&long), 100, &rig.ram),
        Outcome::Pending
    );
    let short = copy(&[fill(2, 20 * MIB, PAGE)]);
    assert_eq!(rig.gpu.submit(&short, 101, &rig.ram), Outcome::Pending);
    for _ in 0..2 {
        assert!(rig.step());
    }
    assert!(
        rig.replies.contains_key(&101),
        "the short list waits for the long one"
    );
    assert!(!rig.replies.contains_key(&100));
}

#[test]
fn lists_that_wait_are_bounded_and_room_comes_back() {
    let mut rig = Rig::new();
    let runs: Vec<_> = (0..4096).map(|i| upload(i * 8, i * 8, 8)).collect();
    let request = copy(&runs);
    let mut sent = 0;
    while rig.gpu.has_room(Queue::Submit) {
        assert_eq!(rig.gpu.submit(&request, sent, &rig.ram), Outcome::Pending);
        sent += 1;
        assert!(sent <= 8, "a GPU holds MiBs of requests");
    }
    assert!(rig.gpu.has_room(Queue::Control));
    while !rig.gpu.has_room(Queue::Submit) {
        let work = rig.gpu.next_work().expect("lists go on by themselves");
        rig.finish(work);
    }
    assert!(rig.replies.len() < sent as usize);
    rig.run();
    assert_eq!(rig.replies.len(), sent as usize);
    while rig.gpu.has_room(Queue::Submit) {
        let _pending = rig.gpu.submit(&request, 0, &rig.ram);
    }
    rig.gpu.reset();
    assert!(rig.gpu.has_room(Queue::Submit));
}

#[test]
fn ram_that_went_away_fails_the_list_with_the_first_run_that_needed_it() {
    let mut rig = Rig::new();
    let runs = [
        fill(5, 0, 8),
        upload(16 * MIB, 0x1000, 4 * MIB),
        upload(20 * MIB, 0x1000, 8),
    ];
    assert_eq!(
        rig.gpu.submit(&copy(&runs), 100, &rig.ram),
        Outcome::Pending
    );
    rig.ram = vm_memory::GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MIB as usize)]).unwrap();
    rig.run();
    let (_, reply) = rig.replies.remove(&100).unwrap();
    assert_eq!(parse_submit_reply(&reply), (Status::BadAddress, 1));
}

#[test]
fn copies_switched_off_are_checked_and_answered_but_move_nothing() {
    let mut rig = Rig::new();
    rig.gpu.switch_copies(false);
    assert_eq!(rig.copy(&[fill(5, VRAM, 8)]), (Status::BadAddress, 0));
    rig.set_ram_word(0, 77);
    assert_eq!(rig.copy(&[upload(0, 0, 8)]), (Status::Ok, 0));
    assert_eq!(rig.copy(&[download(0, 8, 8)]), (Status::Ok, 0));
    assert_eq!(rig.ram_word(8), 0);

    rig.gpu.switch_copies(true);
    assert_eq!(rig.copy(&[upload(0, 0, 8), fill(5, 8, 8)]), (Status::Ok, 0));
    assert_eq!(rig.copy(&[download(0, 8, 16)]), (Status::Ok, 0));
    assert_eq!((rig.ram_word(8), rig.ram_word(16)), (77, 5));
}

#[test]
fn copies_switched_off_are_on_after_a_reset() {
    let mut rig = Rig::new();
    rig.gpu.switch_copies(false);
    rig.gpu.reset();
    assert_eq!(rig.copy(&[fill(5, 0, 8)]), (Status::Ok, 0));
    assert_eq!(rig.copy(&[download(0, 0, 8)]), (Status::Ok, 0));
    assert_eq!(rig.ram_word(0), 5);
}
