// SPDX-License-Identifier: MIT OR Apache-2.0
//! Telling the person who waits what is being done: a spinner or a bar in a terminal, lines elsewhere. All of it goes to
//! standard error; standard output belongs to what was asked for.

use std::{
    cell::Cell,
    io::{self, IsTerminal},
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressStyle};

/// How often a step of known length says where it is when there is no terminal: so many times.
const LINES: u64 = 10;

/// One step, from its start until [`Progress::done`] or its drop.
#[derive(Debug)]
pub struct Progress {
    bar: Option<ProgressBar>,
    what: String,
    start: Instant,
    total: u64,
    at: Cell<u64>,
}

impl Progress {
    /// Says that a step begins.
    #[must_use]
    pub fn start(what: impl Into<String>) -> Self {
        Self::new(what.into(), 0, 0, "{spinner:.cyan} {msg} {elapsed:.dim}")
    }

    /// The same for a step of some `total` parts, of which the first `at` have been done before.
    pub(crate) fn with_steps(what: impl Into<String>, total: u64, at: usize) -> Self {
        let template = "{spinner:.cyan} {msg} {bar:30} {pos} of some {len} {elapsed:.dim}";
        Self::new(what.into(), total, at as u64, template)
    }

    fn new(what: String, total: u64, at: u64, template: &str) -> Self {
        let bar = if io::stderr().is_terminal() {
            let bar = ProgressBar::new(total).with_message(what.clone());
            // The template is a constant; should it ever be wrong, the default style does.
            if let Ok(style) = ProgressStyle::with_template(template) {
                bar.set_style(style);
            }
            bar.set_position(at);
            bar.enable_steady_tick(Duration::from_millis(120));
            Some(bar)
        } else {
            eprintln!("... {what}");
            None
        };
        Self {
            bar,
            what,
            start: Instant::now(),
            total,
            at: Cell::new(at),
        }
    }

    /// Says that one part more is done.
    pub(crate) fn advance(&self) {
        let at = self.at.get() + 1;
        self.at.set(at);
        if let Some(bar) = &self.bar {
            // How many parts there are is known from another run only.
            bar.set_length(self.total.max(at));
            bar.set_position(at);
        } else if at % (self.total / LINES).max(1) == 0 {
            let seconds = self.start.elapsed().as_secs();
            eprintln!(
                "... {}: {at} of some {} ({seconds} s)",
                self.what, self.total
            );
        }
    }

    /// Says that it has ended well.
    pub fn done(self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        eprintln!(
            " ok {} ({:.1} s)",
            self.what,
            self.start.elapsed().as_secs_f32()
        );
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}

/// One line about something that is no step.
pub fn note(line: &str) {
    eprintln!("    {line}");
}
