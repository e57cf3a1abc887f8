// SPDX-License-Identifier: MIT OR Apache-2.0
//! The command line.

use crate::terminal::Color;
use lexopt::{
    Arg::{Long, Short},
    ValueExt as _,
};
use std::path::PathBuf;

pub(crate) const HELP: &str = "\
Usage: farfault-demo [options]

  --device PATH   the GPU (default: the first one, /dev/farfault0)
  --size MIB      data of the step that overfills VRAM (default: twice the VRAM,
                  or 64 where that would be more than 512)
  --color WHEN    auto, always or never (default: auto; NO_COLOR is honoured)
  --width N       columns (default: the terminal's, or 80)
";

/// What was asked for.
#[derive(Debug)]
pub(crate) enum Command {
    Run(Options),
    Help,
}

#[derive(Debug, Default)]
pub(crate) struct Options {
    pub(crate) device: Option<PathBuf>,
    pub(crate) size_mib: Option<usize>,
    pub(crate) color: Color,
    pub(crate) width: Option<usize>,
}

impl Options {
    pub(crate) fn parse(mut parser: lexopt::Parser) -> Result<Command, lexopt::Error> {
        let mut options = Self::default();
        while let Some(argument) = parser.next()? {
            match argument {
                Long("device") => options.device = Some(parser.value()?.into()),
                Long("size") => {
                    options.size_mib = Some(parser.value()?.parse_with(|text| {
                        let size = text
                            .parse()
                            .ok()
                            .filter(|size| (1..=1 << 20).contains(size));
                        size.ok_or("a number of MiB, at least 1")
                    })?);
                }
                Long("color") => {
                    options.color = parser.value()?.parse_with(|text| match text {
                        "auto" => Ok(Color::Auto),
                        "always" => Ok(Color::Always),
                        "never" => Ok(Color::Never),
                        _ => Err("auto, always or never"),
                    })?;
                }
                Long("width") => options.width = Some(parser.value()?.parse()?),
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
        let arguments = [
            "--size",
            "64",
            "--color=always",
            "--width",
            "120",
            "--device=/dev/x",
        ];
        let Ok(Command::Run(options)) = parse(&arguments) else {
            panic!("they are right");
        };
        assert_eq!((options.size_mib, options.width), (Some(64), Some(120)));
        assert_eq!(options.color, Color::Always);
        assert_eq!(options.device, Some("/dev/x".into()));
    }

    #[test]
    fn options_that_are_wrong_are_refused() {
        assert!(parse(&["--size", "0"]).is_err());
        assert!(parse(&["--size", "much"]).is_err());
        assert!(parse(&["--color", "pink"]).is_err());
        assert!(parse(&["--speed", "1"]).is_err());
        assert!(parse(&["more"]).is_err());
        assert!(matches!(parse(&["--help"]), Ok(Command::Help)));
    }
}
