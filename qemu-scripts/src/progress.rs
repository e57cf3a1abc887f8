// SPDX-License-Identifier: MIT OR Apache-2.0
//! Telling the person who waits what is being done: a spinner in a terminal, lines elsewhere. All of it goes to standard
//! error; standard output belongs to what was asked for.

use std::{
    io::{self, IsTerminal},
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressStyle};

/// One step, from its start until [`Progress::done`] or its drop.
#[derive(Debug)]
pub struct Progress {
    bar: Option<ProgressBar>,
    what: String,
    start: Instant,
}

impl Progress {
    /// Says that a step begins.
    #[must_use]
    pub fn start(what: impl Into<String>) -> Self {
        let what = what.into();
        let bar = if io::stderr().is_terminal() {
            let bar = ProgressBar::new_spinner().with_message(what.clone());
            // The template is a constant; should it ever be wrong, the default style does.
            if let Ok(style) = ProgressStyle::with_template("{spinner:.cyan} {msg} {elapsed:.dim}")
            {
                bar.set_style(style);
            }
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
