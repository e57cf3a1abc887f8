// SPDX-License-Identifier: MIT OR Apache-2.0
//! Does the steps of a script, each with its result as text. A child has a copy of all this, gets its
//! steps through a socket and answers there, a line each.

use super::{
    address::{ARGUMENT, BUFFER, BUFFER_PAGES, PAGE, Range, SCRATCH, area, of_stage},
    content::{Content, describe, word},
    guard::Guard,
    node::{self, error},
    script::{Kind, Line, NodeCall, Step, parse},
};
use anyhow::{Context, Result, bail, ensure};
use farfault::{
    process::{Child, Ended, fork},
    stage::{self, Backing, Protection},
};
use rustix::{
    fs::{MemfdFlags, ftruncate, memfd_create},
    io::Errno,
    pipe::pipe,
};
use std::{
    collections::BTreeMap,
    fs::{File, OpenOptions},
    io::{BufRead, BufReader, Write},
    net::Shutdown,
    os::{
        fd::{AsFd, OwnedFd},
        unix::{net::UnixStream, process::CommandExt},
    },
    process::{Command, Stdio},
};

const RW: Protection = Protection {
    read: true,
    write: true,
};
const NO_ACCESS: Protection = Protection {
    read: false,
    write: false,
};
/// Said instead of a result.
const SKIPPED: &str = "skipped: test_hmm may not survive it";
/// The size of a script's files, and what they hold: like written with this tag to pages 0 and up of
/// area `a`.
const FILE_PAGES: u64 = 16;
const FILE_TAG: u16 = 999;
/// The name by which a program that was executed by a child is called.
pub(super) const SERVE: &str = "serve";

/// A child and the way to it.
struct Link {
    child: Child,
    socket: BufReader<UnixStream>,
}

/// What the model of the CPU's access needs of a page.
#[derive(Clone, Copy, Debug)]
struct Mapped {
    protection: Protection,
    private: bool,
}

/// A process that does steps.
pub(super) struct Process {
    descriptors: BTreeMap<String, File>,
    children: BTreeMap<String, Link>,
    mapped: BTreeMap<u64, Mapped>,
    pins: Vec<(OwnedFd, OwnedFd)>,
    guard: Guard,
    /// A child's way to its parent.
    parent: Option<UnixStream>,
    faults: bool,
}

impl Process {
    /// A process with the memory that all calls need.
    pub(super) fn new(faults: bool) -> Result<Self> {
        for (address, pages) in [(ARGUMENT, 1), (BUFFER, BUFFER_PAGES), (SCRATCH, 1)] {
            stage::map(address, pages * PAGE, RW, Backing::Anonymous)?;
            stage::advise(address, pages * PAGE, stage::Advice::NoHugePage)?;
        }
        Ok(Self {
            descriptors: BTreeMap::new(),
            children: BTreeMap::new(),
            mapped: BTreeMap::new(),
            pins: Vec::new(),
            guard: Guard::default(),
            parent: None,
            faults,
        })
    }

    /// Does a step; its result. An error is the script's fault.
    pub(super) fn step(&mut self, Line { step, forced }: Line) -> Result<String> {
        Ok(match step {
            Step::Map(range, kind, protection) => self.map(of_stage(range)?, kind, protection)?,
            Step::Unmap(range) => {
                let result = stage::unmap(range.address, range.length());
                if result.is_ok() {
                    self.guard.emptied(range);
                    self.forget(range);
                }
                said(result)
            }
            Step::Protect(range, protection) => {
                let result = stage::protect(range.address, range.length(), protection);
                self.guard.changed(range);
                // With a hole in the range, it has changed what comes before.
                let now = result.map_or(NO_ACCESS, |()| protection);
                for page in range.numbers() {
                    if let Some(mapped) = self.mapped.get_mut(&page) {
                        mapped.protection = now;
                    }
                }
                said(result)
            }
            Step::Move { range, to, keep } => self.move_pages(of_stage(range)?, to, keep)?,
            Step::Advise(range, advice) => {
                let result = stage::advise(range.address, range.length(), advice);
                self.guard.changed(range);
                said(result)
            }
            Step::Lock(range) => {
                let result = stage::lock(range.address, range.length());
                self.guard.changed(range);
                said(result)
            }
            Step::Unlock(range) => {
                self.guard.disturbed(range);
                said(stage::unlock(range.address, range.length()))
            }
            Step::Write { range, tag } => self.write(of_stage(range)?, tag)?,
            Step::Read(range) => self.read(of_stage(range)?)?,
            Step::KernelWrite { range, tag } => self.kernel_write(of_stage(range)?, tag)?,
            Step::KernelRead(range) => self.kernel_read(of_stage(range)?)?,
            Step::Pin(range) => self.pin(range)?,
            Step::Unpin => {
                self.pins.clear();
                "ok".to_owned()
            }
            Step::Open { name, node } => {
                let path = format!("/dev/hmm_dmirror{node}");
                match OpenOptions::new().read(true).write(true).open(path) {
                    Ok(file) => {
                        self.guard.open(&name, node);
                        self.descriptors.insert(name, file);
                        "ok".to_owned()
                    }
                    Err(failed) => error(Errno::from_io_error(&failed).unwrap_or(Errno::IO)),
                }
            }
            Step::Close(name) => {
                self.descriptors
                    .remove(&name)
                    .with_context(|| format!("there is no descriptor {name}"))?;
                // A child has it, too.
                self.guard.close(&name, self.children.is_empty());
                "ok".to_owned()
            }
            Step::Call(call) => self.call(&call, forced)?,
            Step::Place(address, range) => {
                node::place(address, range, BUFFER);
                let at = address / PAGE * PAGE;
                self.guard.used(
                    Range {
                        address: at,
                        pages: 1,
                    },
                    true,
                );
                "ok".to_owned()
            }
            Step::Fork(name) => self.fork(name)?,
            Step::In { child, line } => {
                self.guard.child_did_something();
                let link = self.children.get_mut(&child);
                let link = link.with_context(|| format!("there is no child {child}"))?;
                link.ask(&line)?
            }
            Step::End(name) => {
                self.guard.child_did_something();
                let link = self.children.remove(&name);
                link.with_context(|| format!("there is no child {name}"))?
                    .end()?
            }
            Step::Exec(name) => self.exec(&name)?,
        })
    }

    fn map(&mut self, range: Range, kind: Kind, protection: Protection) -> Result<String> {
        let file = match kind {
            Kind::File | Kind::FilePrivate => Some(new_file()?),
            Kind::Node(node) => {
                let path = format!("/dev/hmm_dmirror{node}");
                let file = OpenOptions::new().read(true).write(true).open(path)?;
                // Not by a name: a mapping keeps the file open until it goes.
                Some(OwnedFd::from(file))
            }
            _ => None,
        };
        let file = file.as_ref().map(AsFd::as_fd);
        let backing = match (kind, file) {
            (Kind::Stack, _) => Backing::Stack,
            (Kind::Shared, _) => Backing::Shared,
            (Kind::HugeTlb, _) => Backing::HugeTlb,
            (Kind::FilePrivate, Some(file)) => Backing::FilePrivate(file),
            (_, Some(file)) => Backing::File(file),
            (_, None) => Backing::Anonymous,
        };
        let result = stage::map(range.address, range.length(), protection, backing);
        if result.is_ok() {
            let private = matches!(kind, Kind::Anon | Kind::FilePrivate | Kind::Stack);
            let mapped = Mapped {
                protection,
                private,
            };
            self.mapped
                .extend(range.numbers().map(|page| (page, mapped)));
            self.guard.emptied(range);
        }
        Ok(said(result))
    }

    fn forget(&mut self, range: Range) {
        for page in range.numbers() {
            self.mapped.remove(&page);
        }
    }

    fn move_pages(&mut self, range: Range, address: u64, keep: bool) -> Result<String> {
        let to = of_stage(Range { address, ..range })?;
        let result = stage::remap(range.address, range.length(), address, keep);
        if result.is_ok() {
            let distance = to.numbers().start.wrapping_sub(range.numbers().start);
            let moved: Vec<_> = range
                .numbers()
                .filter_map(|page| Some((page.wrapping_add(distance), *self.mapped.get(&page)?)))
                .collect();
            self.forget(to);
            if !keep {
                self.forget(range);
            }
            self.mapped.extend(moved);
            self.guard.moved(range, to);
        } else {
            // It may have made room first.
            self.forget(to);
            self.guard.changed(range);
            self.guard.changed(to);
        }
        Ok(said(result))
    }

    fn may(&self, range: Range, access: impl Fn(Protection) -> bool) -> bool {
        let mut pages = range.numbers();
        pages.all(|page| {
            self.mapped
                .get(&page)
                .is_some_and(|page| access(page.protection))
        })
    }

    fn is_private(&self, range: Range) -> bool {
        let mut pages = range.numbers();
        pages.all(|page| self.mapped.get(&page).is_some_and(|page| page.private))
    }

    /// Where the program itself must not, the kernel tries.
    fn write(&mut self, range: Range, tag: u16) -> Result<String> {
        if !self.may(range, |protection| protection.write) {
            return self.kernel_write(range, tag);
        }
        for page in range.numbers() {
            for index in 0..PAGE / 8 {
                stage::store(page * PAGE + 8 * index, word(tag, page, index));
            }
        }
        self.guard.used(range, self.is_private(range));
        Ok("ok".to_owned())
    }

    fn read(&mut self, range: Range) -> Result<String> {
        if !self.may(range, |protection| protection.read) {
            return self.kernel_read(range);
        }
        let contents: Vec<_> = range
            .numbers()
            .map(|page| Content::of(|index| stage::load(page * PAGE + 8 * index)))
            .collect();
        self.guard.used(range, false);
        Ok(describe(&contents))
    }

    /// Page by page, until one fails.
    fn kernel_write(&mut self, range: Range, tag: u16) -> Result<String> {
        let (from, to) = pipe()?;
        for page in range.numbers() {
            for index in 0..PAGE / 8 {
                stage::store(SCRATCH + 8 * index, word(tag, page, index));
            }
            ensure!(stage::copy_to_file(to.as_fd(), SCRATCH, PAGE)? == PAGE as usize);
            let one = Range {
                address: page * PAGE,
                pages: 1,
            };
            match stage::copy_from_file(from.as_fd(), one.address, PAGE) {
                Ok(bytes) => {
                    ensure!(bytes == PAGE as usize, "{bytes} bytes of a page");
                    self.guard.used(one, self.is_private(one));
                }
                Err(errno) => {
                    self.guard.changed(one);
                    return Ok(format!(
                        "{} at page {}",
                        error(errno),
                        page - range.numbers().start
                    ));
                }
            }
        }
        Ok("ok".to_owned())
    }

    /// Page by page, and on after those that fail.
    fn kernel_read(&mut self, range: Range) -> Result<String> {
        let (from, to) = pipe()?;
        let mut contents = Vec::new();
        for page in range.numbers() {
            let one = Range {
                address: page * PAGE,
                pages: 1,
            };
            match stage::copy_to_file(to.as_fd(), one.address, PAGE) {
                Ok(bytes) => {
                    ensure!(bytes == PAGE as usize, "{bytes} bytes of a page");
                    self.guard.used(one, false);
                    ensure!(stage::copy_from_file(from.as_fd(), SCRATCH, PAGE)? == PAGE as usize);
                    contents.push(Content::of(|index| stage::load(SCRATCH + 8 * index)));
                }
                Err(errno) => {
                    self.guard.changed(one);
                    contents.push(Content::Failed(errno));
                }
            }
        }
        Ok(describe(&contents))
    }

    fn pin(&mut self, range: Range) -> Result<String> {
        let (from, to) = pipe()?;
        let result = stage::pin_in_pipe(to.as_fd(), range.address, range.length());
        self.guard.changed(range);
        self.pins.push((from, to));
        Ok(match result {
            Ok(bytes) => format!("ok {} pages", bytes as u64 / PAGE),
            Err(errno) => error(errno),
        })
    }

    fn call(&mut self, call: &NodeCall, forced: bool) -> Result<String> {
        let file = self.descriptors.get(&call.descriptor);
        let file = file.with_context(|| format!("there is no descriptor {}", call.descriptor))?;
        if !forced && !self.guard.allows(call) {
            return Ok(SKIPPED.to_owned());
        }
        let (success, text) = node::call(file.as_fd(), call, self.faults);
        self.guard.called(call, success);
        Ok(text)
    }

    fn fork(&mut self, name: String) -> Result<String> {
        let (ours, theirs) = UnixStream::pair()?;
        let child = fork(|| {
            // Their own parent speaks to them, and ends them.
            std::mem::take(&mut self.children)
                .into_values()
                .for_each(std::mem::forget);
            self.guard.is_child();
            let serve = || {
                self.parent = Some(theirs.try_clone()?);
                let answers = theirs.try_clone()?;
                self.serve(BufReader::new(theirs), answers)
            };
            u8::from(serve().is_err())
        })?;
        self.guard.forked();
        let socket = BufReader::new(ours);
        self.children.insert(name, Link { child, socket });
        Ok("ok".to_owned())
    }

    /// Does steps until there are no more.
    pub(super) fn serve(&mut self, steps: impl BufRead, mut answers: impl Write) -> Result<()> {
        for line in steps.lines() {
            let step = parse(&line?).and_then(|line| line.context("no step"));
            let answer = match step.and_then(|line| self.step(line)) {
                Ok(answer) => answer,
                Err(error) => format!("the script is wrong: {error:#}"),
            };
            writeln!(answers, "{answer}")?;
            answers.flush()?;
        }
        Ok(())
    }

    /// The rest of a child's life in a new program: its steps come on standard input, answers go to
    /// standard output, and the descriptor is standard error.
    fn exec(&mut self, name: &str) -> Result<String> {
        let file = self.descriptors.remove(name);
        let file = file.with_context(|| format!("there is no descriptor {name}"))?;
        let mut program = Command::new("/proc/self/exe");
        program.args([SERVE, name]).stderr(Stdio::from(file));
        let socket = self.parent.take().context("only a child can do that")?;
        program.stdout(Stdio::from(OwnedFd::from(socket.try_clone()?)));
        program.stdin(Stdio::from(OwnedFd::from(socket)));
        Err(program.exec().into())
    }

    /// Takes over a descriptor that was handed down to this program.
    pub(super) fn inherit(&mut self, name: &str, file: OwnedFd) {
        self.descriptors.insert(name.to_owned(), file.into());
        // It is not known of which node it is, and the memory behind it is gone anyway.
        self.guard.open(name, 0);
    }
}

impl Link {
    fn ask(&mut self, line: &str) -> Result<String> {
        let mut answer = String::new();
        if writeln!(self.socket.get_mut(), "{line}").is_ok() {
            self.socket.read_line(&mut answer)?;
        }
        match answer.strip_suffix('\n') {
            Some(wrong) if wrong.starts_with("the script is wrong") => bail!("{wrong}"),
            Some(answer) => Ok(answer.to_owned()),
            None => Ok("the child is gone".to_owned()),
        }
    }

    fn end(self) -> Result<String> {
        // Not only closed: other children have descriptors of it, too.
        self.socket.get_ref().shutdown(Shutdown::Both)?;
        Ok(match self.child.wait()? {
            Ended::Exited(code) => format!("exit code {code}"),
            Ended::Signaled(signal) => format!("signal {signal}"),
        })
    }
}

/// A result without data.
fn said(result: rustix::io::Result<()>) -> String {
    match result {
        Ok(()) => "ok".to_owned(),
        Err(errno) => error(errno),
    }
}

/// A file in memory.
fn new_file() -> Result<OwnedFd> {
    let file = memfd_create("compare", MemfdFlags::CLOEXEC)?;
    ftruncate(&file, FILE_PAGES * PAGE)?;
    let mut file = File::from(file);
    let first = area(0) / PAGE;
    for page in first..first + FILE_PAGES {
        let words = (0..PAGE / 8).flat_map(|index| word(FILE_TAG, page, index).to_le_bytes());
        file.write_all(&words.collect::<Vec<_>>())?;
    }
    Ok(file.into())
}
