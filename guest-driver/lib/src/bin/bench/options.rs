// SPDX-License-Identifier: MIT OR Apache-2.0
//! The command line.

use lexopt::{
    Arg::{Long, Short, Value},
    ValueExt as _,
};
use std::path::PathBuf;

pub(crate) const HELP: &str = "\
Usage: farfault-bench [options] faults
       farfault-bench [options] migrations MEBIBYTES...

Prints samples as JSON, in nanoseconds. `cargo xtask bench` makes a table of them.

  --device PATH   the GPU (default: the first one, /dev/farfault0)
  --copies-off    migrations: the device's copies are switched off, so there is no
                  data to check afterwards
";

/// More than any VRAM.
const MOST_MEBIBYTES: usize = 1 << 20;

/// What was asked for.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Command {
    Run { device: Option<PathBuf>, what: What },
    Help,
}

/// What is measured.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum What {
    /// Commands and faults.
    Faults,
    /// Migrations of these sizes, after which the data is what it was before, or is of no matter.
    Migrations { mebibytes: Vec<usize>, data: Data },
}

/// What becomes of data that migrates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Data {
    /// It must stay the same.
    Kept,
    /// The device does not copy.
    Lost,
}

pub(crate) fn parse(mut parser: lexopt::Parser) -> Result<Command, lexopt::Error> {
    let (mut device, mut what, mut data) = (None, None, Data::Kept);
    let mut mebibytes = Vec::new();
    while let Some(argument) = parser.next()? {
        match argument {
            Long("device") => device = Some(parser.value()?.into()),
            Long("copies-off") => data = Data::Lost,
            Short('h') | Long("help") => return Ok(Command::Help),
            Value(word) if what.is_none() => what = Some(word.string()?),
            Value(size) => mebibytes.push(size.parse_with(|text| {
                let size = text.parse().ok();
                size.filter(|size| (1..=MOST_MEBIBYTES).contains(size))
                    .ok_or("a number of mebibytes, from 1 on")
            })?),
            _ => return Err(argument.unexpected()),
        }
    }
    let what = match (what.as_deref(), mebibytes.is_empty()) {
        (Some("faults"), true) => What::Faults,
        (Some("migrations"), false) => What::Migrations { mebibytes, data },
        _ => return Err("say `faults`, or `migrations` and sizes".into()),
    };
    Ok(Command::Run { device, what })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(arguments: &[&str]) -> Result<Command, lexopt::Error> {
        super::parse(lexopt::Parser::from_args(arguments))
    }

    #[test]
    fn options_given_are_taken() {
        let faults = Command::Run {
            device: Some("/dev/farfault1".into()),
            what: What::Faults,
        };
        assert_eq!(
            parse(&["--device", "/dev/farfault1", "faults"]).unwrap(),
            faults
        );
        let migrations = Command::Run {
            device: None,
            what: What::Migrations {
                mebibytes: vec![16, 256],
                data: Data::Lost,
            },
        };
        assert_eq!(
            parse(&["migrations", "16", "256", "--copies-off"]).unwrap(),
            migrations
        );
        assert_eq!(parse(&["-h"]).unwrap(), Command::Help);
    }

    #[test]
    fn options_that_are_wrong_are_refused() {
        for wrong in [
            &[][..],
            &["everything"],
            &["faults", "16"],
            &["migrations"],
            &["migrations", "0"],
            &["migrations", "many"],
            &["faults", "--fast"],
        ] {
            assert!(parse(wrong).is_err(), "{wrong:?}");
        }
    }
}
