// SPDX-License-Identifier: MIT OR Apache-2.0
//! The command line.

use lexopt::{
    Arg::{Long, Short},
    ValueExt as _,
};
use std::{ffi::OsString, path::PathBuf};

pub(crate) const HELP: &str = "\
Usage: farfault-bench [options]

  --device PATH   the GPU (default: the first one, /dev/farfault0)
  --rounds N      how often everything is measured in turn (default: 5)
  --json PATH     write the figures there, too; `-`: JSON to standard output, and
                  the table to standard error
";

const DEFAULT_ROUNDS: u32 = 5;

/// What was asked for.
#[derive(Debug)]
pub(crate) enum Command {
    Run(Options),
    Help,
}

/// Where the figures for programs go.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum JsonTo {
    Stdout,
    File(PathBuf),
}

impl From<OsString> for JsonTo {
    fn from(path: OsString) -> Self {
        if path == "-" {
            Self::Stdout
        } else {
            Self::File(path.into())
        }
    }
}

#[derive(Debug)]
pub(crate) struct Options {
    pub(crate) device: Option<PathBuf>,
    pub(crate) rounds: u32,
    pub(crate) json: Option<JsonTo>,
}

impl Options {
    pub(crate) fn parse(mut parser: lexopt::Parser) -> Result<Command, lexopt::Error> {
        let mut options = Self {
            device: None,
            rounds: DEFAULT_ROUNDS,
            json: None,
        };
        while let Some(argument) = parser.next()? {
            match argument {
                Long("device") => options.device = Some(parser.value()?.into()),
                Long("json") => options.json = Some(parser.value()?.into()),
                Long("rounds") => {
                    options.rounds = parser.value()?.parse_with(|text| {
                        let rounds = text
                            .parse()
                            .ok()
                            .filter(|rounds| (1..=1000).contains(rounds));
                        rounds.ok_or("a number from 1 to 1000")
                    })?;
                }
                Short('h') | Long("help") => return Ok(Command::Help),
                _ => return Err(argument.unexpected()),
            }
        }
        Ok(Command::Run(options))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(arguments: &[&str]) -> Result<Command, lexopt::Error> {
        Options::parse(lexopt::Parser::from_args(arguments))
    }

    #[test]
    fn options_given_are_taken() {
        let Ok(Command::Run(options)) = parse(&["--rounds=2", "--json", "out.json"]) else {
            panic!("they are right");
        };
        assert_eq!(options.rounds, 2);
        assert_eq!(options.json, Some(JsonTo::File("out.json".into())));
        let Ok(Command::Run(options)) = parse(&["--json", "-"]) else {
            panic!("they are right");
        };
        assert_eq!(options.json, Some(JsonTo::Stdout));
    }

    #[test]
    fn options_that_are_wrong_are_refused() {
        assert!(parse(&["--rounds", "0"]).is_err());
        assert!(parse(&["--rounds", "many"]).is_err());
        assert!(parse(&["--fast"]).is_err());
        assert!(matches!(parse(&["-h"]), Ok(Command::Help)));
    }
}
