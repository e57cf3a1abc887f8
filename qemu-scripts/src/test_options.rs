// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a run of the VM tests chooses beside their names: from the command line of `cargo xtask test`, and from there, or
//! from whoever starts the test program otherwise, by the environment.

use clap::{Args, Parser, ValueEnum};

/// Which VM tests run, and how those that are random or could go on for ever do.
#[derive(Debug, Clone, Default, Args)]
pub struct TestOptions {
    /// Only the VM tests of one suite
    #[arg(long, env = "FARFAULT_SUITE", value_enum)]
    pub suite: Option<TestSuite>,
    /// The seed of random tests [default: another one in each run, which is printed]
    #[arg(long, env = "FARFAULT_SEED", value_name = "N")]
    pub seed: Option<u64>,
    /// How long each test that could go on for ever does so [default: a second or two]
    #[arg(long, env = "FARFAULT_MINUTES", value_name = "N", value_parser = clap::value_parser!(u64).range(1..=1440))]
    pub minutes: Option<u64>,
}

/// A part of the VM tests, by the beginning of their names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum TestSuite {
    /// What the kernel's memory management does
    Mm,
    /// What the world around the driver does: devices and drivers that come, go and die
    Lifecycle,
    /// Many at work on the same pages
    Races,
    /// All VM tests
    All,
}

impl TestSuite {
    /// Does the test of this name belong to it?
    #[must_use]
    pub fn has(self, test: &str) -> bool {
        let suite = match self {
            Self::Mm => "mm",
            Self::Lifecycle => "lifecycle",
            Self::Races => "races",
            Self::All => return true,
        };
        test.split("::").next() == Some(suite)
    }
}

impl TestOptions {
    /// The options as the environment gives them.
    ///
    /// # Errors
    /// A variable has a value that is none of the possible ones.
    pub fn from_env() -> Result<Self, clap::Error> {
        #[derive(Parser)]
        #[command(name = "environment")]
        struct OnlyOptions {
            #[command(flatten)]
            options: TestOptions,
        }
        OnlyOptions::try_parse_from(["environment"]).map(|parsed| parsed.options)
    }

    /// The environment from which [`TestOptions::from_env`] gets the same options.
    #[must_use]
    pub fn to_env(&self) -> Vec<(&'static str, String)> {
        let suite = self.suite.and_then(|suite| suite.to_possible_value());
        [
            (
                "FARFAULT_SUITE",
                suite.map(|value| value.get_name().to_owned()),
            ),
            ("FARFAULT_SEED", self.seed.map(|seed| seed.to_string())),
            (
                "FARFAULT_MINUTES",
                self.minutes.map(|minutes| minutes.to_string()),
            ),
        ]
        .into_iter()
        .filter_map(|(name, value)| Some((name, value?)))
        .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_suite_has_the_tests_whose_name_begins_with_it() {
        assert!(TestSuite::Mm.has("mm::fork::child_reads"));
        assert!(!TestSuite::Mm.has("comm::x"));
        assert!(!TestSuite::Races.has("lifecycle::races::x"));
        assert!(TestSuite::All.has("faults::x"));
    }

    #[test]
    fn to_env_of_some_options_names_those_alone() {
        let options = TestOptions {
            suite: Some(TestSuite::Lifecycle),
            seed: Some(7),
            minutes: None,
        };
        let expected = [("FARFAULT_SUITE", "lifecycle"), ("FARFAULT_SEED", "7")];
        assert_eq!(
            options.to_env(),
            expected.map(|(name, value)| (name, value.to_owned()))
        );
    }
}
