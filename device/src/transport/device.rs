// SPDX-License-Identifier: MIT OR Apache-2.0
//! The GPU with its threads: who may touch it when. Manual, chapters 3 and 10 (reset).
//!
//! There is one lock, around [`Queues`], and everything happens under it except what takes long:
//! executing [`Work`](crate::gpu::Work). Whoever holds it delivers what the GPU made before letting
//! go, and interrupts the guest right after. Nobody waits with the lock held.
//!
//! | thread | what it does |
//! | --- | --- |
//! | queue (3) | kick, take requests, reply, interrupt: no other thread in between |
//! | worker (`--threads`) | takes work, executes it, retires it, delivers events and replies |
//! | vhost-user | memory table and ring addresses: waits here until no work uses the old ones |
//! | main | control socket: copies what it shows under the lock, prints it without; bench switch |
//!
//! The submit queue's thread works at copies, too, until none is left. Requests that the GPU had no
//! room for stay in their ring, and a worker takes them later.
//!
//! Workers sleep on a condition variable. One that takes work wakes another if there is more, so
//! that as many wake as there is work, and none for nothing.

use super::{
    queues::{QUEUES, Queues, Restart, Taken, TransportStats},
    ring::Ring,
};
use crate::{
    control_socket::{Answer, Request, Response},
    gpu::{Gpu, Stats},
    rate_limit::RateLimit,
};
use farfault_protocol::{
    address::VramAddr,
    config::{ConfigSpace, queue},
};
use parking_lot::{Condvar, Mutex, MutexGuard};
use serde::Serialize;
use std::{io, sync::Arc, thread::JoinHandle, time::Duration};
use vm_memory::GuestMemoryMmap;

/// How long work in flight may take. It is some hundred KiB for each thread, so that only a host
/// that hardly runs at all needs so much. It is waited for in slices: when the process was stopped
/// for a while, one is over, and the workers still have all others.
const QUIET_LIMIT: Duration = QUIET_SLICE.saturating_mul(QUIET_SLICES);
const QUIET_SLICE: Duration = Duration::from_millis(100);
const QUIET_SLICES: u32 = 100;

/// One GPU, for one VM after the other.
pub struct Device {
    state: Mutex<State>,
    /// There may be work.
    work: Condvar,
    /// No work is in flight, while someone waits for that.
    quiet: Condvar,
    config: ConfigSpace,
    interrupt_log: RateLimit,
}

struct State {
    queues: Queues,
    /// How many wait until no work is in flight: none is started.
    holds: u32,
    /// The front end has stopped a ring: no work is started until it starts one.
    halted: bool,
    /// Workers end.
    ending: bool,
}

/// Worker threads, ended on drop.
pub struct Workers {
    device: Arc<Device>,
    threads: Vec<JoinHandle<()>>,
}

/// What [`Request::Stats`] answers.
#[derive(Serialize)]
struct AllStats {
    gpu: Stats,
    transport: TransportStats,
}

/// What [`Request::Copies`] answers.
#[derive(Serialize)]
struct CopiesState {
    copies: bool,
}

impl Device {
    /// A GPU without a VM.
    pub fn new(gpu: Gpu) -> Self {
        Self {
            config: gpu.config_space(),
            state: Mutex::new(State {
                queues: Queues::new(gpu),
                holds: 0,
                halted: false,
                ending: false,
            }),
            work: Condvar::new(),
            quiet: Condvar::new(),
            interrupt_log: RateLimit::default(),
        }
    }

    /// Starts `count` workers.
    pub fn spawn_workers(self: &Arc<Self>, count: u32) -> io::Result<Workers> {
        let mut workers = Workers {
            device: Arc::clone(self),
            threads: Vec::new(),
        };
        for number in 0..count {
            let device = Arc::clone(self);
            let thread = std::thread::Builder::new()
                .name(format!("worker{number}"))
                .spawn(move || device.work())?;
            workers.threads.push(thread);
        }
        Ok(workers)
    }

    /// The configuration space.
    pub(super) fn config(&self) -> &ConfigSpace {
        &self.config
    }

    /// A front end comes.
    pub(super) fn welcome(&self) {
        self.state.lock().queues.welcome_front_end();
    }

    /// Makes a ring known, which the front end has just enabled.
    pub(super) fn attach(&self, index: u16, ring: impl FnOnce() -> Ring) {
        self.state.lock().queues.attach(index, ring);
    }

    /// Takes all requests of queue `index`, after a kick.
    pub(super) fn serve(&self, index: u16) {
        let mut seen = None;
        while let Some(base) = self.serve_round(index, seen) {
            seen = Some(base);
        }
    }

    /// Takes what is in queue `index` and asks for kicks again. Where the ring stands if chains came
    /// meanwhile, whose kick may be missing: they are for the next round, which is told that as `seen`.
    fn serve_round(&self, index: u16, seen: Option<u16>) -> Option<u16> {
        self.with(|queues| {
            queues.stats.rounds += 1;
            queues.begin(index);
        });
        let mut progress = false;
        // The lock is given up between requests, so that no queue waits behind another one's.
        loop {
            let (taken, work) = self.locked(|queues| queues.take(index));
            if work {
                self.start_work(index);
            }
            match taken {
                Taken::One => progress = true,
                Taken::Nothing if index == queue::SUBMIT && self.help_copy() => {}
                Taken::Nothing => break,
                // A worker comes back to it.
                Taken::Later => return None,
            }
        }
        self.with(|queues| {
            // Chains were seen, and nobody could take one, not even a worker that looked for event
            // buffers: the ring is broken, its driver too.
            if seen.is_some() && !progress && queues.base(index) == seen {
                return None;
            }
            queues.end(index)
        })
    }

    /// Takes `memory` as the guest's RAM. On return nothing uses what was the RAM before.
    pub(super) fn set_memory(&self, memory: Arc<GuestMemoryMmap>) -> io::Result<()> {
        let mut state = self.state.lock();
        state.queues.memory = memory;
        self.wait_quiet(&mut state)
    }

    /// The front end stopped a ring: because the driver resets the device, or because the VM is paused.
    /// Which of them shows when it starts again. On return nothing is done until then.
    pub(super) fn ring_stopped(&self) -> io::Result<()> {
        let mut state = self.state.lock();
        state.halted = true;
        state.queues.note_stop();
        self.wait_quiet(&mut state)
    }

    /// The front end has started a ring again.
    pub(super) fn ring_started(&self) {
        self.leave_halt();
        // Of each ring: it may be the one for which something is held.
        self.with(Queues::go_on);
        self.work.notify_all();
    }

    /// A ring runs. If all were stopped, it is either the VM that goes on, with its rings as they were, or a
    /// driver that begins with new ones: then the GPU is as new. A ring that was never used looks the same in
    /// both, so the first one that was decides; until then nothing is done.
    pub(super) fn leave_halt(&self) {
        let mut state = self.state.lock();
        if !state.halted || !state.queues.any_running() {
            return;
        }
        match state.queues.restart() {
            Restart::Undecided => return,
            Restart::GoesOn => {}
            Restart::Anew => {
                if let Err(error) = self.reset(&mut state) {
                    log::error!("the GPU cannot be reset: {error}");
                }
            }
        }
        state.halted = false;
        drop(state);
        self.with(Queues::go_on);
        self.work.notify_all();
    }

    /// The front end is gone: on return its memory is not used any more, and the GPU is as new.
    pub(super) fn detach(&self) -> io::Result<()> {
        let mut state = self.state.lock();
        state.queues.forget_front_end();
        self.reset(&mut state)?;
        state.halted = false;
        Ok(())
    }

    fn reset(&self, state: &mut MutexGuard<'_, State>) -> io::Result<()> {
        state.queues.forget_requests();
        state.queues.stats.resets += 1;
        state.queues.gpu.reset();
        self.wait_quiet(state)
    }

    /// Waits until no work is in flight.
    fn wait_quiet(&self, state: &mut MutexGuard<'_, State>) -> io::Result<()> {
        let mut slices = QUIET_SLICES;
        state.holds += 1;
        while state.queues.gpu.work_in_flight() != 0 && slices > 0 {
            let over = self.quiet.wait_for(state, QUIET_SLICE).timed_out();
            slices -= u32::from(over);
        }
        state.holds -= 1;
        self.work.notify_one();
        match state.queues.gpu.work_in_flight() {
            0 => Ok(()),
            left => Err(io::Error::new(
                io::ErrorKind::TimedOut,
                format!("{left} pieces of work still use the guest's memory after {QUIET_LIMIT:?}"),
            )),
        }
    }

    /// Does `action` with the lock held, then delivers what it caused and has the work done.
    fn with<R>(&self, action: impl FnOnce(&mut Queues) -> R) -> R {
        let (result, work) = self.locked(action);
        if work {
            self.work.notify_one();
        }
        result
    }

    /// Does `action` with the lock held, then delivers what it caused. Also tells whether there is
    /// work now, which is up to the caller.
    fn locked<R>(&self, action: impl FnOnce(&mut Queues) -> R) -> (R, bool) {
        let mut state = self.state.lock();
        let result = action(&mut state.queues);
        state.queues.deliver();
        let interrupts = state.queues.take_interrupts();
        let work = state.queues.gpu.has_work() || state.queues.to_take_up().is_some();
        drop(state);
        self.interrupt(&interrupts);
        (result, work)
    }

    /// The thread of queue `index` has made work.
    fn start_work(&self, index: u16) {
        if index == queue::SUBMIT {
            // It does the first piece itself: a small copy needs no other thread.
            let _nothing_left = self.work_round(self.state.lock());
        } else {
            // The control queue waits for nothing.
            self.work.notify_one();
        }
    }

    /// Does a piece of work if there are copies, so that these wait for no worker to wake, or to be
    /// done with something else; whether there was one.
    fn help_copy(&self) -> bool {
        let state = self.state.lock();
        state.queues.gpu.has_copies() && self.work_round(state).is_ok()
    }

    /// Copies something out of the GPU.
    pub(super) fn look<R>(&self, at: impl FnOnce(&Gpu) -> R) -> R {
        at(&self.state.lock().queues.gpu)
    }

    /// A worker's life.
    fn work(&self) {
        let mut state = self.state.lock();
        while !state.ending {
            if let Some(index) = state.queues.take_up() {
                drop(state);
                self.serve(index);
                state = self.state.lock();
                continue;
            }
            match self.work_round(state) {
                Ok(()) => state = self.state.lock(),
                Err(idle) => {
                    state = idle;
                    self.work.wait(&mut state);
                }
            }
        }
    }

    /// Sends the interrupts that are due, without the lock: the guest may run at once.
    fn interrupt(&self, due: &[Option<Ring>; QUEUES]) {
        for ring in due.iter().flatten() {
            ring.interrupt(&self.interrupt_log);
        }
    }

    /// Does one thing that a worker would do; whether there was one. For a device without workers.
    pub(super) fn work_once(&self) -> bool {
        let mut state = self.state.lock();
        match state.queues.take_up() {
            Some(index) => {
                drop(state);
                self.serve(index);
                true
            }
            None => self.work_round(state).is_ok(),
        }
    }

    /// Does one piece of work, or gives the lock back if there is nothing to do.
    fn work_round<'a>(
        &'a self,
        mut state: MutexGuard<'a, State>,
    ) -> Result<(), MutexGuard<'a, State>> {
        if state.holds != 0 || state.halted {
            return Err(state);
        }
        // Looking for work parks the waves that fault, which the driver is to hear of at once.
        state.queues.refill_event_buffers();
        let work = state.queues.gpu.next_work();
        state.queues.deliver();
        let interrupts = state.queues.take_interrupts();
        let Some(work) = work else {
            if interrupts.iter().all(Option::is_none) {
                return Err(state);
            }
            drop(state);
            self.interrupt(&interrupts);
            return Ok(());
        };
        let memory = Arc::clone(&state.queues.memory);
        let more = state.queues.gpu.has_work();
        drop(state);
        self.interrupt(&interrupts);
        if more {
            self.work.notify_one();
        }
        let done = work.execute(&memory);
        // Before it is retired: then nobody uses the memory, as `wait_quiet` promises.
        drop(memory);
        self.with(|queues| {
            queues.gpu.retire(done);
            if queues.gpu.work_in_flight() == 0 {
                self.quiet.notify_all();
            }
        });
        Ok(())
    }
}

impl Answer for Device {
    fn answer(&self, request: Request) -> Response {
        let answer = match request {
            Request::Stats => {
                let state = self.state.lock();
                let (gpu, transport) = (state.queues.gpu.stats(), state.queues.stats);
                drop(state);
                serde_json::to_value(AllStats { gpu, transport })
            }
            Request::Contexts => serde_json::to_value(self.look(Gpu::contexts)),
            Request::PageTable { context } => match self.look(|gpu| gpu.page_tables(context)) {
                Some(tables) => serde_json::to_value(tables),
                None => return Response::Error(format!("context {context} does not exist")),
            },
            Request::Tlb => serde_json::to_value(self.look(Gpu::tlb)),
            Request::Vram => serde_json::to_value(self.look(Gpu::vram)),
            Request::Faults => serde_json::to_value(self.look(Gpu::faults)),
            Request::Jobs => serde_json::to_value(self.look(Gpu::jobs)),
            Request::Copies { on } => {
                self.state.lock().queues.gpu.switch_copies(on);
                if on {
                    log::info!("copies are on");
                } else {
                    log::warn!("copies are off: they move nothing, and data is lost");
                }
                serde_json::to_value(CopiesState { copies: on })
            }
            Request::Poison { address } => {
                let poison = |queues: &mut Queues| {
                    // A buffer that was posted without a kick is for this, not for what comes next.
                    queues.refill_event_buffers();
                    queues.gpu.poison(VramAddr::new(address))
                };
                if let Err(error) = self.with(poison) {
                    return Response::Error(format!("cannot poison {address:#x}: {error}"));
                }
                log::warn!("the page of VRAM at {address:#x} is poisoned");
                serde_json::to_value(self.look(Gpu::vram).poisoned)
            }
        };
        match answer {
            Ok(value) => Response::Ok(value),
            Err(error) => Response::Error(format!("the answer cannot be written: {error}")),
        }
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.device.state.lock().ending = true;
        self.device.work.notify_all();
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                log::error!("a worker thread panicked");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{gpu::Settings, transport::vring::Vring};
    use farfault_protocol::event::{EVENT_SIZE, ErrorCode, ErrorEvent};
    use vhost_user_backend::VringT;
    use virtio_bindings::virtio_ring::VRING_DESC_F_WRITE;
    use vm_memory::{Bytes, GuestAddress, GuestMemoryAtomic};
    use zerocopy::FromBytes;

    const DESCRIPTORS: u64 = 0x1000;
    const AVAILABLE: u64 = 0x2000;
    const USED: u64 = 0x3000;
    const BUFFERS: u64 = 0x4000;
    const SIZE: u16 = 16;

    /// A device without threads, and the driver of its event queue.
    struct Rig {
        device: Device,
        memory: GuestMemoryMmap,
        posted: u16,
    }

    impl Rig {
        fn new() -> Self {
            let ranges = [(GuestAddress(0), 1 << 20)];
            let memory = GuestMemoryMmap::from_ranges(&ranges).unwrap();
            let device = Device::new(Gpu::new(Settings::new(4 << 20)).unwrap());
            device.welcome();
            device.set_memory(Arc::new(memory.clone())).unwrap();
            let vring = Vring::new(GuestMemoryAtomic::new(memory.clone()), SIZE).unwrap();
            vring.set_queue_size(SIZE);
            vring.set_queue_info(DESCRIPTORS, AVAILABLE, USED).unwrap();
            vring.set_queue_event_idx(true);
            vring.set_queue_ready(true);
            vring.set_enabled(true);
            device.attach(queue::EVENT, || Ring::new(vring));
            Self {
                device,
                memory,
                posted: 0,
            }
        }

        /// Posts a buffer, without a kick.
        fn post(&mut self) {
            let number = self.posted;
            self.posted += 1;
            let address = BUFFERS + u64::from(number) * EVENT_SIZE as u64;
            let flags = u64::from(VRING_DESC_F_WRITE) << 32 | EVENT_SIZE as u64;
            let descriptor = DESCRIPTORS + 16 * u64::from(number);
            self.write(descriptor, address);
            self.write(descriptor + 8, flags);
            self.write(AVAILABLE + 4 + 2 * u64::from(number), number);
            self.write(AVAILABLE + 2, self.posted);
        }

        fn write<T: vm_memory::ByteValued>(&self, address: u64, value: T) {
            self.memory.write_obj(value, GuestAddress(address)).unwrap();
        }

        fn read(&self, address: u64) -> u16 {
            self.memory.read_obj(GuestAddress(address)).unwrap()
        }

        /// Code and detail of the errors that the device has written.
        fn events(&self) -> Vec<(u32, u64)> {
            let used = u64::from(self.read(USED + 2));
            let entries = (0..used).map(|slot| USED + 4 + 8 * slot);
            let written = entries.filter(|entry| self.read(entry + 4) != 0);
            let event = |entry| {
                let address = BUFFERS + u64::from(self.read(entry)) * EVENT_SIZE as u64;
                let mut bytes = [0; EVENT_SIZE];
                let address = GuestAddress(address);
                self.memory.read_slice(&mut bytes, address).unwrap();
                let error = ErrorEvent::read_from_bytes(&bytes).unwrap();
                (error.code.get(), error.detail.get())
            };
            written.map(event).collect()
        }

        /// The buffer that the device wants a kick for.
        fn kick_wanted_for(&self) -> u16 {
            self.read(USED + 4 + 8 * u64::from(SIZE))
        }
    }

    #[test]
    fn queue_whose_chain_a_worker_took_asks_for_kicks_again() {
        let mut rig = Rig::new();
        // The queue's thread has taken all, and while it asks for kicks a buffer comes without one.
        rig.device.with(|queues| queues.begin(queue::EVENT));
        rig.post();
        let seen = rig.device.with(|queues| queues.end(queue::EVENT));
        assert_eq!(seen, Some(0));
        rig.device.work_once();
        assert_eq!(rig.device.state.lock().queues.stats.event_buffers, 1);
        assert_eq!(rig.device.serve_round(queue::EVENT, seen), None);
        assert_eq!(rig.kick_wanted_for(), 1);
    }

    #[test]
    fn event_whose_buffer_went_bad_comes_with_the_next_one() {
        let mut rig = Rig::new();
        for _ in 0..2 {
            rig.post();
        }
        rig.device.serve(queue::EVENT);
        // All RAM but the ring goes.
        let ring_only = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), BUFFERS as usize)]);
        let vram = |page: u64| VramAddr::new(page * 4096);
        rig.device.with(|queues| {
            let all = std::mem::replace(&mut queues.memory, Arc::new(ring_only.unwrap()));
            queues.gpu.poison(vram(1)).unwrap();
            queues.deliver();
            queues.memory = all;
        });
        assert_eq!(rig.device.state.lock().queues.stats.bad_chains, 2);
        assert_eq!(rig.events(), []);
        for _ in 0..2 {
            rig.post();
        }
        rig.device.serve(queue::EVENT);
        let bad_descriptor = (ErrorCode::BadDescriptor.raw(), u64::from(queue::EVENT));
        let poisoned = (ErrorCode::MemoryPoisoned.raw(), 4096);
        assert_eq!(rig.events(), [poisoned, bad_descriptor]);
        // Two buffers for two events: the GPU counts none that is gone.
        rig.device
            .with(|queues| queues.gpu.poison(vram(2)).unwrap());
        assert_eq!(rig.events().len(), 2);
        let waiting = rig.device.look(|gpu| gpu.first_event().copied());
        assert_eq!(waiting, None);
    }

    #[test]
    fn poisoned_page_is_told_in_a_buffer_that_had_no_kick() {
        let mut rig = Rig::new();
        rig.post();
        let answer = rig.device.answer(Request::Poison { address: 4096 });
        assert!(matches!(answer, Response::Ok(_)));
        assert_eq!(rig.events(), [(ErrorCode::MemoryPoisoned.raw(), 4096)]);
    }
}
