// SPDX-License-Identifier: MIT OR Apache-2.0
//! The language of scripts: one step a line, `#` begins a comment. Addresses and ranges are as in
//! [`super::address`].
//!
//! | step | what it does |
//! | --- | --- |
//! | `map RANGE KIND PROTECTION` | maps memory (`anon`, `stack`, `shared`, `file`, `file-private`, `hugetlb`, `node0`, `node1`; `none`, `r`, `rw`) |
//! | `unmap RANGE`, `protect RANGE PROTECTION`, `lock RANGE`, `unlock RANGE` | as the system calls |
//! | `move RANGE ADDRESS`, `move-keep RANGE ADDRESS` | `mremap`; the latter with `MREMAP_DONTUNMAP` |
//! | `advise RANGE ADVICE` | `madvise`, advice in the system's words: `hugepage`, `dontneed`, … |
//! | `write RANGE TAG`, `read RANGE` | stores and loads of the CPU |
//! | `kernel-write RANGE TAG`, `kernel-read RANGE` | the kernel does it for a system call |
//! | `pin RANGE`, `unpin` | references on pages, as direct I/O has them |
//! | `open NAME NODE`, `close NAME` | a descriptor of node 0 or 1 |
//! | `NAME CALL RANGE [TAG] [ptr=ADDRESS] [argument=ADDRESS]` | a call of the node: `read`, `write` (with the tag's data), `to-dev`, `to-sys`, `snapshot`, `exclusive`, `check`, `release`, `flags` (`RANGE` has the flags as number of pages), or a number |
//! | `place ADDRESS RANGE` | puts the argument of a call there, for `argument=` |
//! | `fork NAME`, `NAME: STEP`, `end NAME` | a child; a step of it; its end |
//! | `exec NAME` | (in a child) replaces the program, which has this descriptor afterwards |
//!
//! A step that test_hmm may not survive is skipped; with `!` before it, it is done.

use super::address::{Range, parse_address, parse_number};
use anyhow::{Context, Result, bail};
use farfault::stage::{Advice, Protection};

/// What new memory is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Anon,
    Stack,
    Shared,
    File,
    FilePrivate,
    HugeTlb,
    Node(usize),
}

/// A call of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Call {
    Read,
    Write,
    ToDev,
    ToSys,
    Snapshot,
    Exclusive,
    Check,
    Release,
    Flags,
    Number(u32),
}

/// A call and its argument.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct NodeCall {
    pub(super) descriptor: String,
    pub(super) call: Call,
    pub(super) range: Range,
    pub(super) tag: u16,
    pub(super) pointer: Option<u64>,
    pub(super) argument: Option<u64>,
}

/// One step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Step {
    Map(Range, Kind, Protection),
    Unmap(Range),
    Protect(Range, Protection),
    Move { range: Range, to: u64, keep: bool },
    Advise(Range, Advice),
    Lock(Range),
    Unlock(Range),
    Write { range: Range, tag: u16 },
    Read(Range),
    KernelWrite { range: Range, tag: u16 },
    KernelRead(Range),
    Pin(Range),
    Unpin,
    Open { name: String, node: usize },
    Close(String),
    Call(NodeCall),
    Place(u64, Range),
    Fork(String),
    In { child: String, line: String },
    End(String),
    Exec(String),
}

/// A step, and whether it is done in any case.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Line {
    pub(super) forced: bool,
    pub(super) step: Step,
}

/// A line's step, if there is one. A line of a transcript is one, too: its result is left out.
pub(super) fn parse(line: &str) -> Result<Option<Line>> {
    let text = line.split(" -> ").next().unwrap_or_default();
    let text = text.split('#').next().unwrap_or_default().trim();
    if text.is_empty() {
        return Ok(None);
    }
    let (forced, text) = match text.strip_prefix('!') {
        Some(rest) => (true, rest.trim()),
        None => (false, text),
    };
    let step = parse_step(text).with_context(|| format!("in `{line}`"))?;
    Ok(Some(Line { forced, step }))
}

fn parse_step(text: &str) -> Result<Step> {
    if let Some((child, line)) = text.split_once(": ") {
        let (child, line) = (child.to_owned(), line.to_owned());
        return Ok(Step::In { child, line });
    }
    let mut words = Words(text.split_whitespace());
    let verb = words.next()?;
    let step = match verb {
        "map" => Step::Map(words.range()?, words.kind()?, words.protection()?),
        "unmap" => Step::Unmap(words.range()?),
        "protect" => Step::Protect(words.range()?, words.protection()?),
        "move" | "move-keep" => Step::Move {
            range: words.range()?,
            to: parse_address(words.next()?)?,
            keep: verb == "move-keep",
        },
        "advise" => Step::Advise(words.range()?, words.advice()?),
        "lock" => Step::Lock(words.range()?),
        "unlock" => Step::Unlock(words.range()?),
        "write" => Step::Write {
            range: words.range()?,
            tag: words.tag()?,
        },
        "read" => Step::Read(words.range()?),
        "kernel-write" => Step::KernelWrite {
            range: words.range()?,
            tag: words.tag()?,
        },
        "kernel-read" => Step::KernelRead(words.range()?),
        "pin" => Step::Pin(words.range()?),
        "unpin" => Step::Unpin,
        "open" => Step::Open {
            name: words.next()?.to_owned(),
            node: parse_number(words.next()?)? as usize,
        },
        "close" => Step::Close(words.next()?.to_owned()),
        "place" => Step::Place(parse_address(words.next()?)?, words.range()?),
        "fork" => Step::Fork(words.next()?.to_owned()),
        "end" => Step::End(words.next()?.to_owned()),
        "exec" => Step::Exec(words.next()?.to_owned()),
        descriptor => Step::Call(words.node_call(descriptor)?),
    };
    if let Ok(more) = words.next() {
        bail!("`{more}` is too much");
    }
    Ok(step)
}

struct Words<'a>(std::str::SplitWhitespace<'a>);

impl<'a> Words<'a> {
    fn next(&mut self) -> Result<&'a str> {
        self.0.next().context("a word is missing")
    }

    fn range(&mut self) -> Result<Range> {
        Range::parse(self.next()?)
    }

    fn tag(&mut self) -> Result<u16> {
        Ok(self.next()?.parse()?)
    }

    fn kind(&mut self) -> Result<Kind> {
        Ok(match self.next()? {
            "anon" => Kind::Anon,
            "stack" => Kind::Stack,
            "shared" => Kind::Shared,
            "file" => Kind::File,
            "file-private" => Kind::FilePrivate,
            "hugetlb" => Kind::HugeTlb,
            "node0" => Kind::Node(0),
            "node1" => Kind::Node(1),
            other => bail!("there is no memory `{other}`"),
        })
    }

    fn protection(&mut self) -> Result<Protection> {
        let (read, write) = match self.next()? {
            "none" => (false, false),
            "r" => (true, false),
            "rw" => (true, true),
            other => bail!("there is no protection `{other}`"),
        };
        Ok(Protection { read, write })
    }

    fn advice(&mut self) -> Result<Advice> {
        Ok(match self.next()? {
            "dontneed" => Advice::DontNeed,
            "free" => Advice::Free,
            "remove" => Advice::Remove,
            "dontfork" => Advice::DontFork,
            "wipeonfork" => Advice::WipeOnFork,
            "hugepage" => Advice::HugePage,
            "nohugepage" => Advice::NoHugePage,
            "populate-read" => Advice::PopulateRead,
            "populate-write" => Advice::PopulateWrite,
            "collapse" => Advice::Collapse,
            other => bail!("there is no advice `{other}`"),
        })
    }

    fn node_call(&mut self, descriptor: &str) -> Result<NodeCall> {
        let word = self
            .next()
            .with_context(|| format!("there is no step `{descriptor}`"))?;
        let call = match word {
            "read" => Call::Read,
            "write" => Call::Write,
            "to-dev" => Call::ToDev,
            "to-sys" => Call::ToSys,
            "snapshot" => Call::Snapshot,
            "exclusive" => Call::Exclusive,
            "check" => Call::Check,
            "release" => Call::Release,
            "flags" => Call::Flags,
            number => Call::Number(u32::try_from(parse_number(number)?)?),
        };
        let mut parsed = NodeCall {
            descriptor: descriptor.to_owned(),
            call,
            range: self.range()?,
            tag: 0,
            pointer: None,
            argument: None,
        };
        for word in self.0.by_ref() {
            match word.split_once('=') {
                Some(("ptr", address)) => parsed.pointer = Some(parse_address(address)?),
                Some(("argument", address)) => parsed.argument = Some(parse_address(address)?),
                Some(_) => bail!("there is no `{word}`"),
                None => parsed.tag = word.parse()?,
            }
        }
        Ok(parsed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parse_of_a_transcript_leaves_out_results_and_comments() {
        assert_eq!(parse("  # nothing").unwrap(), None);
        let line = parse("!d0 read a+1:2 ptr=b -> EFAULT").unwrap().unwrap();
        assert!(line.forced);
        let Step::Call(call) = line.step else {
            panic!("{line:?}");
        };
        assert_eq!((call.call, call.range.pages), (Call::Read, 2));
        assert_eq!(call.pointer, Some(crate::compare::address::area(1)));
        assert!(parse("d0 red a:1").is_err());
        assert!(parse("unmap a:1 b").is_err());
    }
}
