// SPDX-License-Identifier: MIT OR Apache-2.0
//! The time that one front end is connected.
//!
//! A session has a thread of its own, which waits for the connection to end and then tidies up:
//! the GPU reset, queue threads ended, the guest's memory unmapped. After it the next front end may
//! come.

use super::{
    Device,
    backend::{Backend, END_OF_SESSION},
    memory::MemoryRule,
};
use std::{
    io,
    os::fd::AsRawFd,
    sync::Arc,
    thread::{self, JoinHandle},
};
use vhost::vhost_user::{Error as ProtocolError, Listener};
use vhost_user_backend::{Error as DaemonError, ShutdownHandle, VhostUserDaemon};
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::{
    epoll::EventSet,
    eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd},
};

/// A front end's connection.
pub struct Session {
    thread: JoinHandle<Ended>,
    connection: Option<ShutdownHandle>,
}

/// How a session ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// A front end was there.
    Served,
    /// The connection was closed without a word, by someone who looked whether the device is alive.
    Unused,
}

/// Why there is no session.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// The connection cannot be set up.
    #[error("cannot serve the front end: {0}")]
    Daemon(DaemonError),
    /// A thread or file descriptor cannot be had.
    #[error("cannot serve the front end: {0}")]
    Io(#[from] io::Error),
}

impl Session {
    /// Accepts the front end that waits at `listener`, and writes to `ended` when it is gone.
    pub fn accept(
        device: Arc<Device>,
        listener: &mut Listener,
        ended: EventFd,
        memory: MemoryRule,
    ) -> Result<Self, SessionError> {
        let backend = Arc::new(Backend::new(Arc::clone(&device), memory));
        let mut service = Service::new(Arc::clone(&backend))?;
        device.welcome();
        service
            .daemon
            .start(listener)
            .map_err(SessionError::Daemon)?;
        let connection = service.daemon.shutdown_handle();
        let thread = thread::Builder::new()
            .name("session".into())
            .spawn(move || {
                report_end(service.daemon.wait());
                // First: a queue's thread ends when its ring is gone, and perhaps not before, as the
                // driver may add requests as long as it lives.
                if let Err(error) = device.detach() {
                    log::error!("the GPU cannot be reset after its VM: {error}");
                }
                drop(service);
                let outcome = if backend.has_spoken() {
                    Ended::Served
                } else {
                    Ended::Unused
                };
                if let Err(error) = ended.write(1) {
                    log::error!("cannot tell that the VM is gone: {error}");
                }
                outcome
            })?;
        Ok(Self { thread, connection })
    }

    /// Closes the connection; the session ends soon.
    pub fn close(&self) {
        if let Some(connection) = &self.connection {
            connection.shutdown();
        }
    }

    /// How it ended. Only called when it has: it waits.
    pub fn join(self) -> Ended {
        self.thread.join().unwrap_or_else(|_| {
            log::error!("the session's thread panicked");
            Ended::Served
        })
    }
}

/// The crate's daemon with its queue threads, ended on drop.
struct Service {
    // First, so that it is dropped first: it waits for threads that `end` has told to end, and that
    // would not hear of it if the file descriptor were closed already.
    daemon: VhostUserDaemon<Arc<Backend>>,
    end: EventFd,
}

impl Service {
    fn new(backend: Arc<Backend>) -> Result<Self, SessionError> {
        let end = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
        let daemon = VhostUserDaemon::new("vhost-user".into(), backend, memory)
            .map_err(SessionError::Daemon)?;
        let service = Self { daemon, end };
        for queue in service.daemon.get_epoll_handlers() {
            queue.register_listener(service.end.as_raw_fd(), EventSet::IN, END_OF_SESSION)?;
        }
        Ok(service)
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        if let Err(error) = self.end.write(1) {
            log::error!("cannot end the queues' threads: {error}");
        }
    }
}

fn report_end(result: Result<(), DaemonError>) {
    match result {
        Ok(())
        | Err(DaemonError::HandleRequest(
            ProtocolError::Disconnected
            | ProtocolError::PartialMessage
            | ProtocolError::SocketBroken(_),
        )) => log::debug!("the front end disconnected"),
        Err(error) => log::error!("the connection to the front end ends: {error}"),
    }
}
