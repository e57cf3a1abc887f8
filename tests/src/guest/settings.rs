// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a run of the tests chooses for its random and its long cases: `--seed N` and `--minutes N`, before a
//! case's name.

use anyhow::{Context, Result};
use std::{
    sync::{
        OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

#[derive(Debug, Default)]
struct Settings {
    seed: u64,
    minutes: Option<u64>,
}

static SETTINGS: OnceLock<Settings> = OnceLock::new();
static SEED_USED: AtomicBool = AtomicBool::new(false);

/// Takes the settings off the front of a command line; what is left of it.
pub(super) fn take(arguments: &[String]) -> Result<&[String]> {
    let mut settings = Settings::default();
    let mut rest = arguments;
    while let [name, value, more @ ..] = rest {
        let parsed = || value.parse().with_context(|| format!("{name} {value}"));
        match name.as_str() {
            "--seed" => settings.seed = parsed()?,
            "--minutes" => settings.minutes = Some(parsed()?),
            _ => break,
        }
        rest = more;
    }
    // Set once, by `main`; a second time only in a test of this.
    let _ = SETTINGS.set(settings);
    Ok(rest)
}

/// The seed of all that is random in a case. Another one in each run, unless `--seed` names it.
pub fn seed() -> u64 {
    SEED_USED.store(true, Ordering::Relaxed);
    SETTINGS.get().map_or(0, |settings| settings.seed)
}

/// How long a case that could go on for ever does so: `--minutes`, or this, which should be a second or two.
pub fn duration(short: Duration) -> Duration {
    share(short, 1)
}

/// As [`duration`], for each of the parts of a case that come after each other: they share the minutes.
pub fn share(short: Duration, parts: u32) -> Duration {
    let minutes = SETTINGS.get().and_then(|settings| settings.minutes);
    share_of(minutes, short, parts)
}

fn share_of(minutes: Option<u64>, short: Duration, parts: u32) -> Duration {
    minutes.map_or(short, |minutes| {
        Duration::from_secs(minutes * 60) / parts.max(1)
    })
}

/// The seed, if the case has asked for it.
pub(super) fn used_seed() -> Option<u64> {
    SEED_USED.load(Ordering::Relaxed).then(seed)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(line: &str) -> Vec<String> {
        line.split(' ').map(str::to_owned).collect()
    }

    #[test]
    fn take_of_settings_and_a_name_leaves_the_name_and_its_arguments() {
        let line = words("--seed 7 --minutes 3 case --seed 9");
        assert_eq!(take(&line).unwrap(), words("case --seed 9"));
    }

    #[test]
    fn share_of_parts_that_follow_each_other_is_all_of_the_minutes() {
        let short = Duration::from_millis(500);
        assert_eq!(share_of(None, short, 4), short);
        assert_eq!(share_of(Some(10), short, 4) * 4, Duration::from_secs(600));
        assert_eq!(share_of(Some(10), short, 1), Duration::from_secs(600));
    }

    #[test]
    fn take_of_a_value_that_is_no_number_is_an_error() {
        assert!(take(&words("--seed many case")).is_err());
    }
}
