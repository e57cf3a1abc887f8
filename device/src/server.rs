// SPDX-License-Identifier: MIT OR Apache-2.0
//! The process: sockets, signals, and one VM after the other.
//!
//! The main thread runs one event loop (`event-manager`) with two subscribers: [`ControlSocket`] and
//! the front door below, which accepts front ends and ends everything on a signal. One front end is
//! served at a time; the next waits in the socket's backlog. With `--once` the process ends with the
//! first VM that it served. Either way a VM finds the GPU as new.

use crate::{
    cli::Serve,
    control_socket::ControlSocket,
    gpu::{Gpu, NewError, Settings},
    sandbox::{self, SandboxError},
    socket::{self, SocketError},
    transport::{Device, Ended, MemoryRule, Session},
};
use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use signal_hook::consts::{SIGINT, SIGTERM};
use std::{
    cell::Cell,
    io::{self, Read},
    os::{fd::AsRawFd, unix::net::UnixStream},
    path::PathBuf,
    rc::Rc,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};
use vhost::vhost_user::Listener;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Workers, if nobody says how many: more than the memory bus can feed help no one.
const MOST_WORKERS: u32 = 4;
/// How long the end of a session may take after a signal.
const END_LIMIT: Duration = Duration::from_secs(15);

/// Why the device does not run.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// A socket cannot be had.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// The GPU cannot be made.
    #[error("cannot make the GPU: {0}; try a smaller --vram")]
    Gpu(#[from] NewError),
    /// The system refuses something.
    #[error("cannot {what}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
    /// The sandbox cannot be entered.
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
    /// The event loop broke.
    #[error("the event loop failed: {0}")]
    EventLoop(#[from] event_manager::Error),
    /// A front end cannot be served; the log has the reason.
    #[error("a VM connected and cannot be served")]
    Session,
    /// Some thread hangs.
    #[error("the VM's connection did not end within {END_LIMIT:?}")]
    Stuck,
}

/// Makes a GPU and serves it until a signal comes, or with `--once` until its VM is gone.
pub fn serve(options: &Serve) -> Result<(), ServeError> {
    let io = |what| move |source| ServeError::Io { what, source };

    // First: who sees the sockets may send a signal.
    let signals = signals().map_err(io("watch signals"))?;
    let mut settings = Settings::new(options.vram);
    settings.serial = options.serial;
    let device = Arc::new(Device::new(Gpu::new(settings)?));

    let mut manager = EventManager::<Box<dyn MutEventSubscriber>>::new()?;
    let mut _control_path = None;
    if let Some(path) = &options.control {
        let (listener, socket) = socket::listen(path)?;
        _control_path = Some(socket);
        let control = ControlSocket::new(listener, Arc::<Device>::clone(&device))
            .map_err(io("set up the control socket"))?;
        manager.add_subscriber(Box::new(control));
    }
    // Last: who sees it may use the control socket too.
    let (listener, _gpu_path) = socket::listen(&options.socket)?;

    // From here on all is open that will ever be, and no thread but this one runs.
    if !options.no_sandbox {
        let sockets = [Some(&options.socket), options.control.as_ref()];
        sandbox::enter(sockets.into_iter().flatten().map(PathBuf::as_path))?;
    }

    let workers = options.threads.unwrap_or_else(default_workers);
    let _workers = device
        .spawn_workers(workers)
        .map_err(io("start the worker threads"))?;

    let phase = Rc::new(Cell::new(Phase::Running));
    let door = FrontDoor::new(
        device,
        Listener::from(listener),
        signals,
        options,
        Rc::clone(&phase),
    )
    .map_err(io("make an eventfd"))?;
    manager.add_subscriber(Box::new(door));

    log::info!(
        "GPU with {} MiB of VRAM and {workers} workers waits for a VM at {}",
        options.vram >> 20,
        options.socket.display()
    );
    loop {
        match phase.get() {
            Phase::Running => manager.run()?,
            Phase::Ended => return Ok(()),
            Phase::Failed => return Err(ServeError::Session),
            Phase::Ending { deadline } => {
                let left = deadline.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    return Err(ServeError::Stuck);
                }
                manager.run_with_timeout(i32::try_from(left.as_millis()).unwrap_or(i32::MAX))?
            }
        };
    }
}

/// A stream that becomes readable with a signal that shall end the process.
fn signals() -> io::Result<UnixStream> {
    let (signals, sender) = UnixStream::pair()?;
    signals.set_nonblocking(true)?;
    for signal in [SIGTERM, SIGINT] {
        signal_hook::low_level::pipe::register(signal, sender.try_clone()?)?;
    }
    Ok(signals)
}

fn default_workers() -> u32 {
    let cores = thread::available_parallelism().map_or(1, |n| n.get());
    u32::try_from(cores)
        .unwrap_or(MOST_WORKERS)
        .min(MOST_WORKERS)
}

/// How far the process is.
#[derive(Clone, Copy)]
enum Phase {
    Running,
    /// A session is being ended.
    Ending {
        deadline: Instant,
    },
    Ended,
    /// No front end can be served.
    Failed,
}

/// Accepts front ends, one at a time, and takes signals.
struct FrontDoor {
    device: Arc<Device>,
    listener: Listener,
    once: bool,
    memory: MemoryRule,
    phase: Rc<Cell<Phase>>,
    session: Option<Session>,
    session_ended: EventFd,
    signals: UnixStream,
}

impl FrontDoor {
    fn new(
        device: Arc<Device>,
        listener: Listener,
        signals: UnixStream,
        options: &Serve,
        phase: Rc<Cell<Phase>>,
    ) -> io::Result<Self> {
        let session_ended = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        Ok(Self {
            device,
            listener,
            once: options.once,
            memory: if options.unsealed_memory {
                MemoryRule::Unsealed
            } else {
                MemoryRule::Sealed
            },
            phase,
            session: None,
            session_ended,
            signals,
        })
    }

    fn accept(&mut self, ops: &mut EventOps) {
        let session = self
            .session_ended
            .try_clone()
            .map_err(Into::into)
            .and_then(|ended| {
                let device = Arc::clone(&self.device);
                Session::accept(device, &mut self.listener, ended, self.memory)
            });
        match session {
            Ok(session) => {
                log::debug!("a front end connected");
                self.session = Some(session);
                // The next one waits in the backlog.
                warn_on(
                    "stop watching the socket",
                    ops.remove(Events::empty(&self.listener)),
                );
            }
            // The socket may stay readable, so that trying again would never end.
            Err(error) => {
                log::error!("{error}");
                self.phase.set(Phase::Failed);
            }
        }
    }

    fn session_ended(&mut self, ops: &mut EventOps) {
        if let Err(error) = self.session_ended.read() {
            log::warn!("cannot read that the session ended: {error}");
        }
        let Some(session) = self.session.take() else {
            return;
        };
        let ended = session.join();
        if ended == Ended::Served {
            log::info!("the VM is gone, the GPU is reset");
        }
        let last = self.once && ended == Ended::Served;
        if last || !matches!(self.phase.get(), Phase::Running) {
            self.phase.set(Phase::Ended);
        } else {
            warn_on(
                "watch the socket",
                ops.add(Events::new(&self.listener, EventSet::IN)),
            );
        }
    }

    fn signalled(&mut self) {
        let mut bytes = [0; 64];
        if let Err(error) = self.signals.read(&mut bytes) {
            return log::warn!("cannot read which signal came: {error}");
        }
        match &self.session {
            Some(session) => {
                log::info!("a signal came: the VM's connection is closed");
                session.close();
                if matches!(self.phase.get(), Phase::Running) {
                    self.phase.set(Phase::Ending {
                        deadline: Instant::now() + END_LIMIT,
                    });
                }
            }
            None => self.phase.set(Phase::Ended),
        }
    }
}

impl MutEventSubscriber for FrontDoor {
    fn init(&mut self, ops: &mut EventOps) {
        for fd in [
            self.listener.as_raw_fd(),
            self.session_ended.as_raw_fd(),
            self.signals.as_raw_fd(),
        ] {
            warn_on(
                "watch sockets and signals",
                ops.add(Events::new_raw(fd, EventSet::IN)),
            );
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        if events.fd() == self.signals.as_raw_fd() {
            self.signalled();
        } else if events.fd() == self.session_ended.as_raw_fd() {
            self.session_ended(ops);
        } else if self.session.is_none() && matches!(self.phase.get(), Phase::Running) {
            self.accept(ops);
        }
    }
}

fn warn_on(what: &str, result: event_manager::Result<()>) {
    if let Err(error) = result {
        log::error!("cannot {what}: {error}");
    }
}
