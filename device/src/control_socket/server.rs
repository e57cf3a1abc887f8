// SPDX-License-Identifier: MIT OR Apache-2.0
//! The serving end of the control socket, a subscriber of the process's event loop.
//!
//! No client can make it wait or grow: sockets never block, a request has at most
//! [`MAX_REQUEST`] bytes, there are at most [`MAX_CLIENTS`], and each has [`IDLE_LIMIT`] to send its
//! next request and to take its answer. A client that breaks a rule is told why, if it listens, and
//! dropped.

use super::{Answer, Request, Response};
use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use std::{
    collections::HashMap,
    io::{self, Read, Write},
    os::{
        fd::{AsRawFd, RawFd},
        unix::net::{UnixListener, UnixStream},
    },
    sync::Arc,
    time::{Duration, Instant},
};
use vmm_sys_util::timerfd::TimerFd;

/// Clients at a time; more are turned away.
const MAX_CLIENTS: usize = 8;
/// Bytes of a request with its newline.
const MAX_REQUEST: usize = 4096;
/// How long a client may take for its next request, or to read an answer.
const IDLE_LIMIT: Duration = Duration::from_secs(10);

/// The socket and its clients.
pub struct ControlSocket {
    listener: UnixListener,
    timer: TimerFd,
    clients: HashMap<RawFd, Client>,
    source: Arc<dyn Answer>,
}

struct Client {
    stream: UnixStream,
    input: Vec<u8>,
    output: Vec<u8>,
    written: usize,
    deadline: Instant,
    /// No further requests: ends when the output is written.
    closing: bool,
}

/// What comes next for a client.
#[derive(Debug, PartialEq, Eq)]
enum Next {
    Read,
    Write,
    Close,
}

impl ControlSocket {
    /// Serves `listener` with what `source` answers.
    pub fn new(listener: UnixListener, source: Arc<dyn Answer>) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        let timer = TimerFd::new().map_err(io::Error::from)?;
        Ok(Self {
            listener,
            timer,
            clients: HashMap::new(),
            source,
        })
    }

    fn accept(&mut self, ops: &mut EventOps) {
        // One at a time: the loop comes back while more wait.
        let stream = match self.listener.accept() {
            Ok((stream, _)) => stream,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
            Err(error) => return log::warn!("control socket: cannot accept a client: {error}"),
        };
        if let Err(error) = stream.set_nonblocking(true) {
            return log::warn!("control socket: cannot set up a client: {error}");
        }
        let mut client = Client::new(stream);
        if self.clients.len() == MAX_CLIENTS {
            client.refuse("too many clients ask at the same time: try again");
            let _ = client.flush();
            return;
        }
        let fd = client.stream.as_raw_fd();
        if let Err(error) = ops.add(Events::new_raw(fd, EventSet::IN)) {
            return log::warn!("control socket: cannot watch a client: {error}");
        }
        self.clients.insert(fd, client);
        self.arm_timer();
    }

    fn serve(&mut self, fd: RawFd, events: EventSet, ops: &mut EventOps) {
        let Some(client) = self.clients.get_mut(&fd) else {
            return;
        };
        let hung_up = events.intersects(EventSet::ERROR | EventSet::HANG_UP)
            && !events.contains(EventSet::IN);
        let next = if hung_up {
            Next::Close
        } else {
            client.turn(self.source.as_ref()).unwrap_or(Next::Close)
        };
        let watch = match next {
            Next::Read => ops.modify(Events::new_raw(fd, EventSet::IN)),
            Next::Write => ops.modify(Events::new_raw(fd, EventSet::OUT)),
            Next::Close => {
                self.drop_client(fd, ops);
                Ok(())
            }
        };
        if let Err(error) = watch {
            log::warn!("control socket: cannot watch a client: {error}");
            self.drop_client(fd, ops);
        }
        self.arm_timer();
    }

    fn drop_client(&mut self, fd: RawFd, ops: &mut EventOps) {
        if self.clients.contains_key(&fd) {
            if let Err(error) = ops.remove(Events::empty_raw(fd)) {
                log::warn!("control socket: cannot forget a client: {error}");
            }
            self.clients.remove(&fd);
        }
    }

    fn drop_idle(&mut self, ops: &mut EventOps) {
        let now = Instant::now();
        let late: Vec<RawFd> = self
            .clients
            .iter()
            .filter(|(_, c)| c.deadline <= now)
            .map(|(fd, _)| *fd)
            .collect();
        for fd in late {
            log::debug!("control socket: a client was idle for {IDLE_LIMIT:?}, dropped");
            self.drop_client(fd, ops);
        }
        self.arm_timer();
    }

    fn arm_timer(&mut self) {
        let result = match self.clients.values().map(|c| c.deadline).min() {
            // Zero would disarm it.
            Some(deadline) => self.timer.reset(
                deadline
                    .saturating_duration_since(Instant::now())
                    .max(Duration::from_millis(1)),
                None,
            ),
            None => self.timer.clear(),
        };
        if let Err(error) = result {
            log::warn!("control socket: cannot set the timer: {error}");
        }
    }
}

impl MutEventSubscriber for ControlSocket {
    fn init(&mut self, ops: &mut EventOps) {
        for fd in [self.listener.as_raw_fd(), self.timer.as_raw_fd()] {
            if let Err(error) = ops.add(Events::new_raw(fd, EventSet::IN)) {
                log::error!("control socket: cannot watch it, nothing will be answered: {error}");
            }
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        if events.fd() == self.listener.as_raw_fd() {
            self.accept(ops);
        } else if events.fd() == self.timer.as_raw_fd() {
            // Not read: another event of the same round may have set it anew, and a read would wait
            // for that. Setting it clears it.
            self.drop_idle(ops);
        } else {
            self.serve(events.fd(), events.event_set(), ops);
        }
    }
}

impl Client {
    fn new(stream: UnixStream) -> Self {
        Self {
            stream,
            input: Vec::new(),
            output: Vec::new(),
            written: 0,
            deadline: Instant::now() + IDLE_LIMIT,
            closing: false,
        }
    }

    /// Takes one turn: at most one request, so that no client keeps the event loop to itself.
    fn turn(&mut self, source: &dyn Answer) -> io::Result<Next> {
        if self.flush()? && !self.closing {
            if !self.has_line() && !self.fill()? {
                return Ok(Next::Close);
            }
            if let Some(end) = self.line_end() {
                let line: Vec<u8> = self.input.drain(..=end).collect();
                self.answer(&line, source);
            } else if self.input.len() == MAX_REQUEST {
                self.refuse("the request is longer than 4096 bytes");
            }
        }
        Ok(if !self.flush()? || self.has_line() {
            Next::Write
        } else if self.closing {
            Next::Close
        } else {
            Next::Read
        })
    }

    fn line_end(&self) -> Option<usize> {
        self.input.iter().position(|&byte| byte == b'\n')
    }

    fn has_line(&self) -> bool {
        self.line_end().is_some()
    }

    /// Reads what is there; false at the end of the stream.
    fn fill(&mut self) -> io::Result<bool> {
        let mut bytes = [0; MAX_REQUEST];
        let room = MAX_REQUEST.saturating_sub(self.input.len());
        match self.stream.read(&mut bytes[..room]) {
            Ok(read) => {
                self.input.extend_from_slice(&bytes[..read]);
                Ok(read != 0)
            }
            Err(e)
                if matches!(
                    e.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                ) =>
            {
                Ok(true)
            }
            Err(e) => Err(e),
        }
    }

    fn answer(&mut self, line: &[u8], source: &dyn Answer) {
        self.deadline = Instant::now() + IDLE_LIMIT;
        match serde_json::from_slice::<Request>(line) {
            Ok(request) => self.respond(&source.answer(request)),
            Err(error) => self.refuse(&format!("the request is not understood: {error}")),
        }
    }

    /// Answers with an error, the last answer of this client.
    fn refuse(&mut self, why: &str) {
        self.closing = true;
        self.input.clear();
        self.respond(&Response::Error(why.into()));
    }

    fn respond(&mut self, response: &Response) {
        match serde_json::to_vec(response) {
            Ok(line) => {
                self.output.extend_from_slice(&line);
                self.output.push(b'\n');
            }
            Err(error) => {
                log::warn!("control socket: cannot write an answer: {error}");
                self.closing = true;
            }
        }
    }

    /// Writes what it can; whether that was all.
    fn flush(&mut self) -> io::Result<bool> {
        while self.written < self.output.len() {
            match self.stream.write(&self.output[self.written..]) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => self.written += n,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        self.output = Vec::new();
        self.written = 0;
        Ok(true)
    }
}
