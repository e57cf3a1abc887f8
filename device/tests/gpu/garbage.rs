// SPDX-License-Identifier: MIT OR Apache-2.0
//! Bytes that no driver would send, and page tables that no driver would build: a status or a fault,
//! never a panic, a loop, or memory without bound.

use crate::rig::*;
use farfault_device::gpu::{Gpu, Outcome, Work};
use farfault_protocol::{
    address::{SystemAddr, VramAddr},
    submit::{CopyRun, Kernel},
};
use proptest::{collection::vec, prelude::*, sample::Index};

/// Numbers that are often at the border of something.
fn number() -> impl Strategy<Value = u64> {
    prop_oneof![
        0..4u64,
        (0..64u32).prop_map(|bit| 1 << bit),
        (0..64u32).prop_map(|bit| (1u64 << bit).wrapping_sub(1)),
        (0..40u64).prop_map(|page| page * PAGE),
        any::<u64>(),
    ]
}

fn small() -> impl Strategy<Value = u32> {
    prop_oneof![9 => 0..4u32, 1 => any::<u32>()]
}

fn control_command() -> impl Strategy<Value = Vec<u8>> {
    (0..11, small(), number(), number(), small()).prop_map(|(which, context, a, b, count)| {
        let va = a & !0xfff;
        match which {
            0 => create_context(context, VramAddr::new(va)),
            1 => destroy_context(context),
            2 => write_ptes(&[pte_run(VramAddr::new(a & !7), b, a, count)]),
            3 => invalidate(context, va, b & !0xfff),
            4 => replay(context, a),
            5 => cancel(context, a),
            6 => read_ptes(context, va, count),
            7 => harvest(context, va, count),
            8 => kill_job(context, a),
            9 => set_bus_master_word(a),
            _ => nop(),
        }
    })
}

fn submit_command() -> impl Strategy<Value = Vec<u8>> {
    (0..4, small(), 0..9u32, vec(number(), 4), small()).prop_map(
        |(which, context, kernel, n, waves)| {
            let (system, vram) = (SystemAddr::new(n[0]), VramAddr::new(n[1]));
            let length = n[2] as u32;
            match which {
                0 => copy(&[
                    CopyRun::upload(system, vram, length),
                    CopyRun::fill(n[3], vram, length),
                ]),
                1 => copy(&[CopyRun::download(vram, system, length)]),
                _ => {
                    let mut request = launch(context, n[0], Kernel::Fill, &n[1..], waves);
                    request[12] = kernel as u8;
                    request
                }
            }
        },
    )
}

/// A request, with some of its bytes changed.
#[derive(Clone, Debug)]
enum Action {
    Control(Vec<u8>),
    Submit(Vec<u8>),
    Post(u32),
    Take,
    Finish(Index),
    BadDescriptor(u16),
    Reset,
}

fn action() -> impl Strategy<Value = Action> {
    let spoilt = |command: BoxedStrategy<Vec<u8>>| {
        let spoils = prop_oneof![3 => Just(vec![]), 1 => vec((any::<Index>(), any::<u8>()), 1..3)];
        (command, spoils).prop_map(|(mut bytes, spoils)| {
            for (at, value) in spoils {
                let at = at.index(bytes.len());
                bytes[at] = value;
            }
            bytes
        })
    };
    let control = vec(control_command(), 1..5).prop_map(|commands| commands.concat());
    prop_oneof![
        8 => spoilt(control.boxed()).prop_map(Action::Control),
        8 => spoilt(submit_command().boxed()).prop_map(Action::Submit),
        1 => vec(any::<u8>(), 0..200).prop_map(Action::Control),
        1 => vec(any::<u8>(), 0..200).prop_map(Action::Submit),
        2 => small().prop_map(Action::Post),
        8 => Just(Action::Take),
        8 => any::<Index>().prop_map(Action::Finish),
        1 => any::<u16>().prop_map(Action::BadDescriptor),
        1 => Just(Action::Reset),
    ]
}

/// Looks at everything that can be looked at.
fn look(gpu: &Gpu) {
    assert!(gpu.jobs().len() <= 1024);
    assert!(gpu.jobs().iter().map(|job| job.waves).sum::<u32>() <= 4096);
    assert!(gpu.faults().len() <= 4096);
    assert!(gpu.contexts().len() <= 64);
    assert!(gpu.queues().control <= 1025 && gpu.queues().copies <= 1024);
    assert!(gpu.vram().written <= gpu.vram().size);
    serde_json::to_string(&gpu.stats()).unwrap();
    serde_json::to_string(&gpu.tlb()).unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn random_requests_are_each_answered_once(actions in vec(action(), 1..80)) {
        let mut rig = Rig::new();
        let mut held: Vec<Work> = Vec::new();
        let mut pending = std::collections::HashSet::new();
        for action in actions {
            let outcome = match action {
                Action::Control(bytes) => {
                    let tag = rig.tag();
                    Some((tag, rig.gpu.control(&bytes, tag)))
                }
                Action::Submit(bytes) => {
                    let tag = rig.tag();
                    Some((tag, rig.gpu.submit(&bytes, tag, &rig.ram)))
                }
                Action::Post(count) => {
                    rig.gpu.post_event_buffers(count);
                    None
                }
                Action::Take => {
                    held.extend(rig.gpu.next_work());
                    None
                }
                Action::Finish(index) => {
                    if !held.is_empty() {
                        let work = held.remove(index.index(held.len()));
                        rig.finish(work);
                    }
                    None
                }
                Action::BadDescriptor(queue) => {
                    rig.gpu.report_bad_descriptor(queue);
                    None
                }
                Action::Reset => {
                    rig.gpu.reset();
                    pending.clear();
                    None
                }
            };
            if let Some((tag, outcome)) = outcome {
                match outcome {
                    Outcome::Pending => {
                        pending.insert(tag);
                    }
                    Outcome::Done(reply) => prop_assert!(reply.len() <= 16 + 32 * 1024),
                }
            }
            look(&rig.gpu);
        }
        // Nothing waits for ever: with all work done, all is answered but endless jobs.
        held.drain(..).for_each(|work| rig.finish(work));
        for context in 0..64 {
            rig.try_control(&destroy_context(context));
        }
        rig.run();
        prop_assert!(!rig.gpu.is_resetting() && rig.gpu.is_idle());
        for tag in pending {
            prop_assert!(rig.replies.contains_key(&tag), "request {} has no answer", tag);
        }
        prop_assert!(rig.gpu.jobs().is_empty() && rig.gpu.queues().waiting_fences == 0);
    }

    #[test]
    fn random_page_tables_lead_to_data_or_faults(
        entries in vec((0..8u64, 0..4u64, number(), 0..16u64), 1..60),
        jobs in vec((1..8u32, vec(0..4u64, 8), number(), 1..4u32), 1..20),
    ) {
        let mut rig = Rig::new();
        rig.control_ok(&create_context(0, VramAddr::new(0)));
        for (table, index, value, bits) in entries {
            // Tables point at one another, and jobs may well store to them.
            let value = if bits & 1 == 0 { (value % 8) << 12 | 7 } else { value & !0xff | bits | 1 };
            rig.write_pte(VramAddr::new(table * PAGE + index * 8), value);
        }
        prop_assert!(rig.gpu.page_tables(0).is_some());
        for (fence, (kernel, indices, number, waves)) in (0..).zip(jobs) {
            let va = |i: &[u64]| i[0] << 39 | i[1] << 30 | i[2] << 21 | i[3] << 12;
            let (to, from) = (va(&indices), va(&indices[4..]));
            let length = (number % (8 * MIB)) & !7;
            let kernel = Kernel::from_raw(kernel).unwrap();
            let arguments = match kernel {
                Kernel::Copy => vec![to, from, length],
                Kernel::Sum | Kernel::PointerChase => vec![to, length],
                _ => vec![to, length, number],
            };
            let waves = if matches!(kernel, Kernel::CompareAndSwap | Kernel::PointerChase) { 1 } else { waves };
            rig.try_launch(0, fence, kernel, &arguments, waves);
            for _ in 0..50 {
                rig.step();
            }
            rig.control_ok(&harvest(0, to, 1));
            for event in rig.take_events() {
                rig.gpu.post_event_buffers(1);
                if let Event::Fault(fault) = event {
                    rig.control_ok(&cancel(0, fault.sequence.get()));
                }
            }
            look(&rig.gpu);
        }
        rig.control_ok(&destroy_context(0));
        rig.run();
        prop_assert!(rig.gpu.is_idle());
    }
}
