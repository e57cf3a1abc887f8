// SPDX-License-Identifier: MIT OR Apache-2.0
//! The host's hands in the guest: reads requests from the virtio-serial port, runs commands, sends back what they write
//! and how they end.
//!
//! Threads: one reads requests; each command has one that waits for it and one for each of its streams, input included.
//! They share the port behind a mutex, which is held for one frame at a time, and the table of running commands behind
//! another, which is never held while the port's is waited for.

use std::{
    collections::HashMap,
    fs::{self, File, OpenOptions},
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
};

use farfault_init::{Id, Outcome, PORT_NAME, Reply, Request, receive, send};

use crate::command::Running;

/// The way back to the host.
#[derive(Clone)]
pub(crate) struct Host {
    port: Arc<Mutex<File>>,
}

impl Host {
    /// Sends one reply. A port that cannot be written has lost its host, and with it the only one who could be told.
    pub(crate) fn send(&self, reply: &Reply) {
        if let Err(error) = send(&mut *lock(&self.port), reply) {
            eprintln!("farfault-init: the agent cannot reach the host: {error}");
        }
    }
}

/// Serves the host until it asks for the end or goes away.
pub(crate) fn serve(problems: Vec<String>) -> io::Result<()> {
    let path = find_port()?;
    let port = OpenOptions::new().read(true).write(true).open(&path)?;
    let mut requests = port.try_clone()?;
    let host = Host {
        port: Arc::new(Mutex::new(port)),
    };
    let commands: Arc<Mutex<HashMap<Id, Running>>> = Arc::default();
    host.send(&Reply::Hello { problems });
    while let Some(request) = receive(&mut requests)? {
        match request {
            Request::Run(command) => {
                let id = command.id;
                match Running::start(&command, &host) {
                    Ok((running, end)) => {
                        lock(&commands).insert(id, running);
                        let (commands, host) = (Arc::clone(&commands), host.clone());
                        thread::spawn(move || {
                            let outcome = end.wait();
                            lock(&commands).remove(&id);
                            host.send(&Reply::Ended { id, outcome });
                        });
                    }
                    Err(error) => {
                        let reason = format!("{}: {error}", command.argv.join(" "));
                        host.send(&Reply::Ended {
                            id,
                            outcome: Outcome::NotStarted(reason),
                        });
                    }
                }
            }
            // A request that crosses the end of its command on the way is no error.
            Request::Stdin { id, data } => with(&commands, id, |running| {
                running.stdin(data);
                Ok(())
            }),
            Request::Signal { id, signal } => with(&commands, id, |running| running.signal(signal)),
            Request::Resize { id, size } => with(&commands, id, |running| running.resize(size)),
            Request::PowerOff => return Ok(()),
        }
    }
    Ok(())
}

fn with(
    commands: &Mutex<HashMap<Id, Running>>,
    id: Id,
    act: impl FnOnce(&mut Running) -> io::Result<()>,
) {
    if let Some(running) = lock(commands).get_mut(&id) {
        if let Err(error) = act(running) {
            eprintln!("farfault-init: command {id}: {error}");
        }
    }
}

/// A thread that panicked leaves nothing half done under these locks, so their poison means nothing.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn find_port() -> io::Result<PathBuf> {
    for entry in fs::read_dir("/sys/class/virtio-ports")? {
        let entry = entry?;
        let name = fs::read_to_string(entry.path().join("name")).unwrap_or_default();
        if name.trim_end() == PORT_NAME {
            return Ok(Path::new("/dev").join(entry.file_name()));
        }
    }
    Err(io::Error::new(
        io::ErrorKind::NotFound,
        format!("no virtio-serial port is named {PORT_NAME}"),
    ))
}
