// SPDX-License-Identifier: MIT OR Apache-2.0
//! `stats` and `inspect`, and what else may come in through the control socket.

use crate::{
    device::{Device, program},
    guest::{DATA, DEADLINE, Guest, copy, nop, ram},
};
use farfault_protocol::submit::{CopyAperture, CopyRun};
use std::{
    io::{BufRead, BufReader, Read, Write},
    os::unix::net::UnixStream,
    process::Command,
    time::Duration,
};
use vm_memory::{Bytes, GuestAddress};

fn connect(device: &Device) -> UnixStream {
    let stream = UnixStream::connect(device.control()).expect("the control socket listens");
    stream.set_read_timeout(Some(DEADLINE)).expect("a deadline");
    stream
}

/// What the device answers to `line`.
fn answer(stream: &UnixStream, line: &[u8]) -> String {
    (&*stream).write_all(line).expect("the request can be sent");
    let mut text = String::new();
    BufReader::new(stream)
        .read_line(&mut text)
        .expect("an answer");
    text
}

#[test]
fn stats_and_each_topic_are_answered_as_tables_and_as_json() {
    let device = Device::start();
    let mut guest = Guest::boot(&device);
    guest.create_context(3);
    let questions: [&[&str]; 7] = [
        &["stats"],
        &["inspect", "contexts"],
        &["inspect", "page-table", "3"],
        &["inspect", "tlb"],
        &["inspect", "vram"],
        &["inspect", "faults"],
        &["inspect", "jobs"],
    ];
    for question in questions {
        device.json(question);
        let table = device.command(question);
        assert!(
            table.status.success() && !table.stdout.is_empty(),
            "{question:?}: {table:?}"
        );
    }
    assert_eq!(device.transport_stat("control_requests"), 1);
    assert!(device.json(&["inspect"]).to_string().contains('3'));
}

#[test]
fn copies_can_be_switched_off_and_on_while_a_guest_runs() {
    let device = Device::start();
    let mut guest = Guest::boot(&device);
    let fill = |word: u64| {
        copy(&[CopyRun {
            source: word.into(),
            destination: ram(0).get().into(),
            length: 8.into(),
            source_aperture: CopyAperture::Pattern.raw(),
            destination_aperture: CopyAperture::System.raw(),
            reserved: [0; 10],
        }])
    };
    let word = |guest: &Guest| guest.memory.read_obj::<u64>(GuestAddress(DATA)).unwrap();
    guest.submit_ok(&fill(1));
    for (state, expected) in [("off", 1), ("on", 2)] {
        let answer = device.json(&["copies", state]);
        assert_eq!(answer, serde_json::json!({ "copies": state == "on" }));
        guest.submit_ok(&fill(2));
        assert_eq!(word(&guest), expected, "copies {state}");
    }
    let table = device.command(&["copies", "off"]);
    assert!(table.status.success() && !table.stdout.is_empty());
}

#[test]
fn context_that_does_not_exist_is_one_clear_line() {
    let device = Device::start();
    let output = device.command(&["inspect", "page-table", "9"]);
    assert_eq!(output.status.code(), Some(1));
    let message = String::from_utf8_lossy(&output.stderr);
    assert!(
        message.contains("context 9") && message.trim().lines().count() == 1,
        "{message}"
    );
}

#[test]
fn poisoned_page_is_told_to_the_guest_and_shown() {
    let device = Device::start();
    let mut guest = Guest::boot(&device);
    let before = device.transport_stat("events");
    let answer = device.json(&["poison", "0x201008"]);
    assert_eq!(answer, serde_json::json!([{"page": 0x20_1000}]));
    device.wait_for_transport_stat("events", before + 1);
    assert_eq!(device.json(&["inspect", "vram"])["poisoned"], answer);
    let table = device.command(&["inspect", "vram"]);
    assert!(
        String::from_utf8_lossy(&table.stdout).contains("0x201000"),
        "{table:?}"
    );
    let outside = device.command(&["poison", "64000000000"]);
    assert!(
        !outside.status.success() && !outside.stderr.is_empty(),
        "{outside:?}"
    );
    guest.stop();
    guest.start();
    guest.control_ok(&nop());
    assert_eq!(
        device.json(&["inspect", "vram"])["poisoned"],
        serde_json::json!([])
    );
}

#[test]
fn device_that_does_not_run_is_one_clear_line() {
    let folder = tempfile::tempdir().unwrap();
    let output = Command::new(program())
        .args(["stats", "--control"])
        .arg(folder.path().join("nothing"))
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let message = String::from_utf8_lossy(&output.stderr);
    assert!(
        message.contains("--control") && message.trim().lines().count() == 1,
        "{message}"
    );
}

#[test]
fn several_requests_of_one_client_are_answered_in_turn() {
    let device = Device::start();
    let stream = connect(&device);
    for _ in 0..3 {
        assert!(answer(&stream, b"{\"request\":\"tlb\"}\n").starts_with("{\"ok\":"));
    }
    // And two at once.
    (&stream)
        .write_all(b"{\"request\":\"tlb\"}\n{\"request\":\"jobs\"}\n")
        .unwrap();
    let mut lines = BufReader::new(&stream).lines();
    for _ in 0..2 {
        assert!(lines.next().unwrap().unwrap().starts_with("{\"ok\":"));
    }
}

#[test]
fn garbage_is_refused_and_the_client_dropped() {
    let device = Device::start();
    let garbage: [&[u8]; 6] = [
        b"\n",
        b"hello\n",
        b"\xff\xfe\x00\n",
        b"{\"request\":\"explode\"}\n",
        b"{\"request\":\"page-table\"}\n",
        b"{\"request\":\"page-table\",\"context\":-1}\n",
    ];
    for line in garbage {
        let mut stream = connect(&device);
        assert!(answer(&stream, line).starts_with("{\"error\":"), "{line:?}");
        assert_eq!(
            stream.read(&mut [0]).unwrap_or(0),
            0,
            "the client is still served"
        );
    }
    let mut stream = connect(&device);
    stream.write_all(&[b'x'; 5000]).unwrap();
    let mut text = String::new();
    let _ = stream.read_to_string(&mut text);
    assert!(text.starts_with("{\"error\":"), "{text}");
    device.json(&["stats"]);
}

#[test]
fn clients_that_never_read_or_write_stop_nobody() {
    let device = Device::start();
    let mut guest = Guest::boot(&device);
    // Some ask and never read the answers, which fill their sockets; some say nothing.
    let greedy = connect(&device);
    greedy
        .set_write_timeout(Some(Duration::from_millis(100)))
        .unwrap();
    while (&greedy).write_all(b"{\"request\":\"stats\"}\n").is_ok() {}
    let silent: Vec<UnixStream> = (0..6).map(|_| connect(&device)).collect();
    for _ in 0..100 {
        guest.control_ok(&nop());
    }
    device.json(&["stats"]);
    drop(silent);
}

#[test]
fn clients_beyond_the_limit_are_turned_away() {
    let device = Device::start();
    let kept: Vec<UnixStream> = (0..8)
        .map(|_| {
            let stream = connect(&device);
            assert!(answer(&stream, b"{\"request\":\"tlb\"}\n").starts_with("{\"ok\":"));
            stream
        })
        .collect();
    let mut text = String::new();
    connect(&device).read_to_string(&mut text).unwrap();
    assert!(text.starts_with("{\"error\":"), "{text}");
    drop(kept);
}
