// SPDX-License-Identifier: MIT OR Apache-2.0
//! The core under a lock with threads that work for it, as in the shell: the invalidation promise
//! with real accesses in flight.

use crate::rig::*;
use farfault_device::gpu::Gpu;
use farfault_protocol::{
    address::{SystemAddr, VramAddr},
    command::Status,
    event::JobStatus,
    pte::Pte,
    submit::{CopyRun, Kernel},
};
use std::{
    sync::{Arc, Condvar, Mutex, MutexGuard},
    thread,
    time::Duration,
};

const VA: u64 = 0x1234_5000;
const HERE: u64 = 3 * MIB;
const THERE: u64 = 5 * MIB;
const WAVES: u32 = 6;
const TIMES: u64 = 500_000;

/// For anything to happen.
const LIMIT: Duration = Duration::from_secs(30);

type State<'a> = MutexGuard<'a, (Rig, bool)>;

struct Shell {
    /// The rig, and whether the threads shall end.
    rig: Mutex<(Rig, bool)>,
    changed: Condvar,
}

impl Shell {
    /// What a worker thread does.
    fn work(&self) {
        let mut guard = self.rig.lock().unwrap();
        while !guard.1 {
            match guard.0.gpu.next_work() {
                Some(work) => {
                    let ram = guard.0.ram.clone();
                    drop(guard);
                    let done = work.execute(&ram);
                    guard = self.rig.lock().unwrap();
                    guard.0.gpu.retire(done);
                    guard.0.collect();
                    self.changed.notify_all();
                }
                None => guard = self.wait_for_change(guard),
            }
        }
    }

    /// Calls `send`, then waits for what `look` is after.
    fn wait<S, T>(
        &self,
        send: impl FnOnce(&mut Rig) -> S,
        mut look: impl FnMut(&mut Rig, &S) -> Option<T>,
    ) -> T {
        let mut guard = self.rig.lock().unwrap();
        let sent = send(&mut guard.0);
        self.changed.notify_all();
        loop {
            if let Some(found) = look(&mut guard.0, &sent) {
                return found;
            }
            guard = self.wait_for_change(guard);
        }
    }

    fn wait_for_change<'a>(&self, guard: State<'a>) -> State<'a> {
        let (guard, result) = self.changed.wait_timeout(guard, LIMIT).unwrap();
        assert!(!result.timed_out(), "nothing happened for {LIMIT:?}");
        guard
    }

    fn control(&self, request: &[u8]) -> Answer {
        self.wait(
            |rig| rig.try_control(request),
            |rig, (tag, now)| now.clone().or_else(|| rig.late(*tag)),
        )
    }

    fn copy(&self, run: CopyRun) {
        let reply = self.wait(
            |rig| {
                let tag = rig.tag();
                let ram = rig.ram.clone();
                let _ = rig.gpu.submit(&copy(&[run]), tag, &ram);
                tag
            },
            |rig, tag| rig.replies.remove(tag),
        );
        assert_eq!(parse_submit_reply(&reply.1), (Status::Ok, 0));
    }
}

#[test]
fn gpu_can_be_sent_to_another_thread() {
    fn assert_send<T: Send>() {}
    assert_send::<Gpu>();
}

#[test]
fn page_that_moves_under_atomics_loses_none() {
    let mut rig = Rig::new();
    rig.gpu.post_event_buffers(100_000);
    rig.create_context(0);
    let entry = rig.entry(0, VA, 0);
    let leaves = [system(HERE), vram(THERE)].map(|at| Pte::leaf(at, RW).0);
    rig.write_pte(entry, leaves[0]);
    rig.launch(0, 1, Kernel::AtomicAdd, &[VA + 8, 1, TIMES], WAVES);
    let shell = Arc::new(Shell {
        rig: Mutex::new((rig, false)),
        changed: Condvar::new(),
    });
    let workers = [(); 2].map(|()| {
        let shell = Arc::clone(&shell);
        thread::spawn(move || shell.work())
    });

    let runs = [
        CopyRun::upload(SystemAddr::new(HERE), VramAddr::new(THERE), PAGE as u32),
        CopyRun::download(VramAddr::new(THERE), SystemAddr::new(HERE), PAGE as u32),
    ];
    let mut moves = 0;
    let mut jobs = 1;
    'moving: loop {
        // As a driver does: out of the tables, wait, copy, into the tables, replay.
        let drop = [
            write_ptes(&[pte_run(entry, 0, 0, 1)]),
            invalidate(0, VA, PAGE),
        ];
        assert_eq!(shell.control(&drop.concat()).status, Status::Ok);
        shell.copy(runs[moves % 2]);
        moves += 1;
        let add = [
            write_ptes(&[pte_run(entry, leaves[moves % 2], 0, 1)]),
            replay(0, u64::MAX),
        ];
        assert_eq!(shell.control(&add.concat()).status, Status::Ok);
        let rig = &mut shell.rig.lock().unwrap().0;
        for event in rig.take_events() {
            let Event::Fence(fence) = event else { continue };
            assert_eq!(fence.status.get(), JobStatus::Ok.raw());
            if moves > 10 {
                break 'moving;
            }
            // It was over before the page had moved often: once more.
            jobs += 1;
            rig.launch(0, jobs, Kernel::AtomicAdd, &[VA + 8, 1, TIMES], WAVES);
            shell.changed.notify_all();
        }
    }
    shell.rig.lock().unwrap().1 = true;
    shell.changed.notify_all();
    for worker in workers {
        worker.join().unwrap();
    }

    let shell = Arc::into_inner(shell).unwrap();
    let mut rig = shell.rig.into_inner().unwrap().0;
    let count = match moves % 2 {
        0 => rig.ram_word(HERE + 8),
        _ => rig.vram_word(THERE + 8),
    };
    assert_eq!(
        count,
        TIMES * u64::from(WAVES) * jobs,
        "after {moves} moves"
    );
}
