// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the guest's kernel says of its own troubles on the console.

use std::{
    fs::File,
    io::{Read, Seek, SeekFrom},
    path::{Path, PathBuf},
};

use crate::{Error, Result, progress};

/// Texts with which the kernel reports that something went wrong in it. Each is how its source prints it.
const SPLATS: [&str; 23] = [
    "WARNING: ",
    "BUG: ",
    "kernel BUG at",
    "Oops: ",
    "Oops[",
    "Call Trace:",
    "Kernel panic",
    "general protection fault",
    "Unable to handle kernel",
    "blocked for more than",
    "blocked in I/O wait for more than",
    "possible circular locking dependency",
    "possible recursive locking",
    "possible irq lock inversion",
    "inconsistent lock state",
    "suspicious RCU usage",
    "detected stalls on CPUs",
    "self-detected stall",
    "UBSAN: ",
    "refcount_t: ",
    "rust_kernel: panicked at",
    // The driver's: it, or the bus, loses interrupts.
    "an answer came without its interrupt",
    "new suspected memory leaks",
];

/// The OOM killer tells whom it kills, and why, with a stack: that is its work. The stack comes so many
/// lines after this text at most.
const OOM_KILLER: &str = "invoked oom-killer:";
const OOM_KILLER_HEAD: usize = 6;

/// How many lines before and after its first one an error shows of a splat.
const LINES_BEFORE: usize = 3;
const LINES_AFTER: usize = 40;

/// The line that KASAN puts before and after a report.
const KASAN_RULE: &str = "==================";

/// The line that ends a stack, and with it a report of lockdep.
const STACK_END: &str = "</TASK>";

/// A report of KASAN or lockdep that is known to be about a bug of the kernel itself, named by its stack.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KnownReport {
    /// What the report's first line contains.
    pub title: &'static str,
    /// Functions of the stack, innermost first; others may be in between.
    pub frames: &'static [&'static str],
}

impl KnownReport {
    /// Is it this one?
    fn is(&self, report: &[&str]) -> bool {
        let mut stack = report
            .iter()
            .skip_while(|line| !line.contains("Call Trace:"))
            .take_while(|line| !line.contains(STACK_END))
            // What the kernel only found on the stack on its way.
            .filter(|line| !line.contains(" ? "));
        report.first().is_some_and(|line| line.contains(self.title))
            && self
                .frames
                .iter()
                .all(|frame| stack.any(|line| line.contains(&format!(" {frame}+"))))
    }
}

/// The console's file, and how much of it has been looked at.
#[derive(Debug)]
pub(crate) struct Console {
    path: PathBuf,
    seen: u64,
    known: &'static [KnownReport],
}

impl Console {
    pub(crate) fn new(path: PathBuf, known: &'static [KnownReport]) -> Self {
        Self {
            path,
            seen: 0,
            known,
        }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Everything so far.
    pub(crate) fn text(&self) -> Result<String> {
        Ok(self.read_from(0)?.0)
    }

    /// The first splat since the last call, with its surroundings. A last line that is not complete yet waits for the
    /// next call, so that no text is cut in two; likewise a report that may be a known one.
    pub(crate) fn new_splat(&mut self) -> Result<Option<String>> {
        let (text, _) = self.read_from(self.seen)?;
        let complete = text
            .rfind('\n')
            .map_or("", |end| text.get(..=end).unwrap_or_default());
        let (splat, lines) = find_splat(complete, self.known);
        let read = complete.split_inclusive('\n').take(lines).map(str::len);
        self.seen += read.sum::<usize>() as u64;
        Ok(splat)
    }

    fn read_from(&self, from: u64) -> Result<(String, u64)> {
        let what = || format!("reading {}", self.path.display());
        let mut bytes = Vec::new();
        let mut file = File::open(&self.path).map_err(Error::io(what()))?;
        file.seek(SeekFrom::Start(from))
            .map_err(Error::io(what()))?;
        let length = file.read_to_end(&mut bytes).map_err(Error::io(what()))?;
        // Each byte that is no ASCII becomes one that is, so that offsets in the text are offsets in the file.
        let text = bytes
            .into_iter()
            .map(|byte| {
                if byte.is_ascii() {
                    char::from(byte)
                } else {
                    '?'
                }
            })
            .collect();
        Ok((text, length as u64))
    }
}

/// The first splat, with its surroundings, and how many lines need not be looked at again.
fn find_splat(text: &str, known: &[KnownReport]) -> (Option<String>, usize) {
    let lines: Vec<&str> = text.lines().collect();
    let is_splat = |line: &&str| SPLATS.iter().any(|splat| line.contains(splat));
    let mut from = 0;
    while let Some(length) = lines.iter().skip(from).position(is_splat) {
        let first = from + length;
        let report = lines.get(first..).unwrap_or_default();
        let resembles = |known: &KnownReport| {
            let title = report.first();
            title.is_some_and(|line| line.contains(known.title))
        };
        if is_of_oom_killer(&lines, first) {
            from = first + 1;
            continue;
        }
        if known.iter().any(resembles) {
            let Some(report) = end_of_report(report).and_then(|end| report.get(..end)) else {
                return (None, first);
            };
            if known.iter().any(|known| known.is(report)) {
                progress::note(
                    "the kernel reports a bug of its own that is known (docs/kernel-findings.md)",
                );
                from = first + report.len();
                continue;
            }
        }
        let around = lines
            .iter()
            .skip(first.saturating_sub(LINES_BEFORE))
            .take(LINES_BEFORE + LINES_AFTER);
        let around: Vec<_> = around
            .map(|line| format!("  | {}", line.trim_end()))
            .collect();
        return (Some(around.join("\n")), lines.len());
    }
    (None, lines.len())
}

/// How many lines a report has, if all of it is there.
fn end_of_report(report: &[&str]) -> Option<usize> {
    let of_kasan = report.first()?.contains("KASAN");
    let end = if of_kasan { KASAN_RULE } else { STACK_END };
    Some(report.iter().position(|line| line.contains(end))? + 1)
}

/// Whether the stack that begins in this line is the OOM killer's.
fn is_of_oom_killer(lines: &[&str], at: usize) -> bool {
    let head = lines.get(at.saturating_sub(OOM_KILLER_HEAD)..at);
    lines
        .get(at)
        .is_some_and(|line| line.contains("Call Trace:"))
        && head.is_some_and(|head| head.iter().any(|line| line.contains(OOM_KILLER)))
}

#[cfg(test)]
mod tests {
    use std::{fs, io::Write};

    use super::*;

    fn find_splat(text: &str, known: &[KnownReport]) -> Option<String> {
        super::find_splat(text, known).0
    }

    #[test]
    fn find_splat_in_an_ordinary_boot_finds_nothing() {
        let text = "[    0.5] Linux version 7.2.12\n[    1.0] farfault: loading out-of-tree module taints kernel.\n\
                    [    1.1] farfault 0000:01:00.0: 32 MiB of VRAM\n";
        assert_eq!(find_splat(text, &[]), None);
    }

    #[test]
    fn find_splat_of_each_kind_of_trouble_finds_it() {
        for line in [
            "[ 1.0] WARNING: CPU: 0 PID: 1 at mm/memory.c:1 f+0x1/0x2",
            "[ 1.0] BUG: KASAN: slab-use-after-free in f",
            "[ 1.0] BUG: kernel NULL pointer dereference, address: 0000000000000000",
            "[ 1.0] Oops: Oops: 0002 [#1] SMP",
            "[ 1.0] INFO: task sh:12 blocked for more than 30 seconds.",
            "[ 1.0] WARNING: possible circular locking dependency detected",
            "[ 1.0] UBSAN: array-index-out-of-bounds in a.c:1:2",
            "[ 1.0] refcount_t: underflow; use-after-free.",
            "[ 1.0] rcu: INFO: rcu_preempt detected stalls on CPUs/tasks:",
            "[ 1.0] rust_kernel: panicked at main.rs:1:2:",
            "[ 1.0] farfault: an answer came without its interrupt",
        ] {
            let text = format!("before\n{line}\nafter\n");
            let splat = find_splat(&text, &[]).unwrap_or_else(|| panic!("nothing found in {line}"));
            assert!(splat.contains("before") && splat.contains(line) && splat.contains("after"));
        }
    }

    #[test]
    fn find_splat_of_the_oom_killer_finds_only_what_else_there_is() {
        let oom = "[ 1.0] a invoked oom-killer: gfp_mask=0xcc0(GFP_KERNEL), order=0\n\
                   [ 1.0] CPU: 1 UID: 0 PID: 2 Comm: a\n[ 1.0] Call Trace:\n[ 1.0]  <TASK>\n\
                   [ 1.0] Memory cgroup out of memory: Killed process 2 (a)\n";
        assert_eq!(find_splat(oom, &[]), None);
        let text = format!("{oom}[ 1.0] WARNING: CPU: 0 PID: 1 at a.c:1\n[ 1.0] Call Trace:\n");
        assert!(find_splat(&text, &[]).is_some_and(|splat| splat.contains("a.c:1")));
    }

    const KNOWN: &[KnownReport] = &[KnownReport {
        title: "BUG: KASAN: slab-use-after-free in",
        frames: &["walk", "remove", "finalize"],
    }];

    fn report(title: &str, frames: &[&str]) -> String {
        let stack: String = frames
            .iter()
            .map(|frame| format!("[ 1.0]  {frame}+0x1/0x2\n"))
            .collect();
        format!(
            "{KASAN_RULE}\n[ 1.0] {title} walk+0x1/0x2\n[ 1.0] Call Trace:\n[ 1.0]  <TASK>\n{stack}\
             [ 1.0]  </TASK>\n\nFreed by task 7:\n  finalize+0x1/0x2\n{KASAN_RULE}\n"
        )
    }

    #[test]
    fn find_splat_of_a_known_report_finds_what_comes_after_it() {
        let known = report(
            "BUG: KASAN: slab-use-after-free in",
            &["kasan_report", "walk", "? other", "remove", "finalize"],
        );
        assert_eq!(find_splat(&known, KNOWN), None);
        assert!(find_splat(&known, &[]).is_some());
        let more = format!("{known}[ 2.0] WARNING: CPU: 0\n");
        assert!(
            find_splat(&more, KNOWN)
                .unwrap()
                .contains("WARNING: CPU: 0")
        );
    }

    #[test]
    fn find_splat_of_a_report_that_only_resembles_a_known_one_finds_it() {
        for (title, frames) in [
            (
                "BUG: KASAN: slab-use-after-free in",
                ["walk", "remove", "? finalize"],
            ),
            (
                "BUG: KASAN: slab-use-after-free in",
                ["remove", "walk", "finalize"],
            ),
            (
                "BUG: KASAN: wild-memory-access in",
                ["walk", "remove", "finalize"],
            ),
        ] {
            assert!(find_splat(&report(title, &frames), KNOWN).is_some());
        }
    }

    #[test]
    fn new_splat_of_a_known_report_waits_for_all_of_it() {
        const CIRCLE: &[KnownReport] = &[KnownReport {
            title: "possible circular locking dependency",
            frames: &["down_read", "remove"],
        }];
        let begin = "fine\n[ 1.0] WARNING: possible circular locking dependency detected\n\
                     -> #0 (&lock){+}-{4:4}:\n       other+0x1/0x2\n";
        let stack = "[ 1.0] Call Trace:\n[ 1.0]  <TASK>\n[ 1.0]  down_read+0x1/0x2\n";
        for (last, is_known) in [("remove", true), ("insert", false)] {
            let mut file = tempfile::NamedTempFile::new().unwrap();
            let mut console = Console::new(file.path().to_path_buf(), CIRCLE);
            for part in [begin, stack] {
                file.write_all(part.as_bytes()).unwrap();
                assert_eq!(console.new_splat().unwrap(), None);
            }
            let end = format!("[ 1.0]  {last}+0x1/0x2\n[ 1.0]  </TASK>\n");
            file.write_all(end.as_bytes()).unwrap();
            assert_eq!(console.new_splat().unwrap().is_none(), is_known);
            file.write_all(b"[ 2.0] WARNING: CPU: 0\n").unwrap();
            assert!(console.new_splat().unwrap().unwrap().contains("CPU: 0"));
        }
    }

    #[test]
    fn new_splat_reports_each_splat_once_and_waits_for_whole_lines() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        let mut console = Console::new(file.path().to_path_buf(), &[]);
        file.write_all(b"\xff fine\n[ 1.0] WARN").unwrap();
        assert_eq!(console.new_splat().unwrap(), None);
        file.write_all(b"ING: CPU: 0\n").unwrap();
        assert!(
            console
                .new_splat()
                .unwrap()
                .unwrap()
                .contains("WARNING: CPU: 0")
        );
        assert_eq!(console.new_splat().unwrap(), None);
        fs::remove_file(file.path()).unwrap();
    }
}
