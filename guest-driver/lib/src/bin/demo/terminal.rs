// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the output may look like: with colours or without, and how wide.

use std::{
    ffi::OsStr,
    io::{IsTerminal, stdout},
};

const DEFAULT_WIDTH: usize = 80;
const MIN_WIDTH: usize = 32;

/// When to use colours.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Color {
    /// On a terminal that can, unless `NO_COLOR` is set.
    #[default]
    Auto,
    Always,
    Never,
}

/// Where the output goes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Terminal {
    color: bool,
    width: usize,
}

impl Terminal {
    pub(crate) fn new(color: Color, width: Option<usize>) -> Self {
        let variable = |name| std::env::var_os(name);
        let columns = || {
            rustix::termios::tcgetwinsize(stdout())
                .ok()
                .map(|size| size.ws_col.into())
        };
        let set_columns = || variable("COLUMNS")?.to_str()?.parse().ok();
        // A serial console says 0: it doesn't know.
        let width = width
            .or_else(|| columns().filter(|columns| *columns > 0))
            .or_else(set_columns);
        Self::with(
            wants_color(
                color,
                variable("NO_COLOR").as_deref(),
                variable("TERM").as_deref(),
                stdout().is_terminal(),
            ),
            width.unwrap_or(DEFAULT_WIDTH),
        )
    }

    pub(crate) fn with(color: bool, width: usize) -> Self {
        let width = width.max(MIN_WIDTH);
        Self { color, width }
    }

    pub(crate) fn width(&self) -> usize {
        self.width
    }

    pub(crate) fn bold(&self, text: &str) -> String {
        self.sgr("1", text)
    }

    pub(crate) fn dim(&self, text: &str) -> String {
        self.sgr("2", text)
    }

    pub(crate) fn good(&self, text: &str) -> String {
        self.sgr("1;32", text)
    }

    pub(crate) fn bad(&self, text: &str) -> String {
        self.sgr("1;31", text)
    }

    /// The text in a graphic rendition (ECMA-48, SGR), if there are colours.
    pub(crate) fn sgr(&self, parameters: &str, text: &str) -> String {
        if self.color {
            format!("\x1b[{parameters}m{text}\x1b[0m")
        } else {
            text.to_owned()
        }
    }

    /// Breaks a text into lines of this width, each after `indent` spaces.
    pub(crate) fn wrap(&self, text: &str, indent: usize) -> String {
        let mut lines: Vec<String> = Vec::new();
        for word in text.split_whitespace() {
            match lines.last_mut() {
                Some(line) if line.len() + 1 + word.len() <= self.width => {
                    line.push(' ');
                    line.push_str(word);
                }
                _ => lines.push(format!("{:indent$}{word}", "")),
            }
        }
        lines.join("\n")
    }
}

/// <https://no-color.org>: set and not empty means no. What the command line says comes first.
fn wants_color(
    color: Color,
    no_color: Option<&OsStr>,
    term: Option<&OsStr>,
    is_terminal: bool,
) -> bool {
    match color {
        Color::Always => true,
        Color::Never => false,
        Color::Auto => {
            is_terminal
                && no_color.is_none_or(OsStr::is_empty)
                && term.is_some_and(|term| term != "dumb")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wants_color_of_each_environment_is_as_agreed() {
        let xterm = Some(OsStr::new("xterm"));
        let auto = |no_color: Option<&str>, term, terminal| {
            wants_color(Color::Auto, no_color.map(OsStr::new), term, terminal)
        };
        assert!(auto(None, xterm, true));
        assert!(auto(Some(""), xterm, true));
        assert!(!auto(Some("1"), xterm, true));
        assert!(!auto(None, xterm, false));
        assert!(!auto(None, Some(OsStr::new("dumb")), true));
        assert!(!auto(None, None, true));
        assert!(wants_color(
            Color::Always,
            Some(OsStr::new("1")),
            None,
            false
        ));
        assert!(!wants_color(Color::Never, None, xterm, true));
    }

    #[test]
    fn sgr_without_color_is_the_text() {
        assert_eq!(Terminal::with(false, 80).bold("x"), "x");
        assert_eq!(Terminal::with(true, 80).bold("x"), "\x1b[1mx\x1b[0m");
    }

    #[test]
    fn wrap_keeps_to_the_width() {
        let terminal = Terminal::with(false, 40);
        let text = "one two three four five six seven eight nine ten eleven twelve";
        let wrapped = terminal.wrap(text, 4);
        assert!(
            wrapped
                .lines()
                .all(|line| line.len() <= 40 && line.starts_with("    "))
        );
        assert_eq!(
            wrapped.split_whitespace().collect::<Vec<_>>().join(" "),
            text
        );
    }

    #[test]
    fn width_too_small_is_raised() {
        assert_eq!(Terminal::with(false, 3).width(), MIN_WIDTH);
    }
}
