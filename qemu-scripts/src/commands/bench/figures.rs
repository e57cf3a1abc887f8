// SPDX-License-Identifier: MIT OR Apache-2.0
//! What is compared with what, and the medians and ratios of it.
//!
//! A round has one figure of each series: the median of its samples. A row's figures are the medians over the rounds. Its
//! ratio is not the quotient of the two: it is taken in each round, of figures that the same machine gave at nearly the same
//! time, and the row has the median of these.

use std::{collections::BTreeMap, fmt, time::Duration};

use anyhow::{Context, ensure};

use super::suite::{self, Way};

/// An empty command on the control queue: what faults are held against.
const EMPTY_COMMAND: &str = "empty_command";

/// Who gave a figure.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Source {
    Farfault,
    /// Farfault, and its device does not copy.
    CopiesOff,
    TestHmm,
    HostMemcpy,
}

/// All samples of one round.
#[derive(Debug, Default)]
pub(super) struct Round(BTreeMap<(Source, String), Vec<Duration>>);

impl Round {
    pub(super) fn take(&mut self, source: Source, name: String, samples: Vec<Duration>) {
        self.0.entry((source, name)).or_default().extend(samples);
    }

    /// The median of a series, in seconds.
    fn get(&self, source: Source, name: &str) -> anyhow::Result<f64> {
        let samples = self.0.get(&(source, name.to_owned()));
        let samples = samples.into_iter().flatten();
        median(samples.map(Duration::as_secs_f64).collect()).with_context(|| {
            format!("{name} ({source:?}) was not measured in each round: what was to be timed never happened alone")
        })
    }
}

/// The middle one, or the mean of the middle two.
fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let upper = *values.get(values.len() / 2)?;
    let lower = *values.get((values.len() - 1) / 2)?;
    Some(f64::midpoint(lower, upper))
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Unit {
    Milliseconds,
    Microseconds,
}

impl Unit {
    fn of_seconds(self, seconds: f64) -> f64 {
        match self {
            Self::Milliseconds => seconds * 1e3,
            Self::Microseconds => seconds * 1e6,
        }
    }
}

impl fmt::Display for Unit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Milliseconds => "ms",
            Self::Microseconds => "us",
        })
    }
}

/// One line of the table.
#[derive(Debug, PartialEq)]
pub(super) struct Row {
    pub(super) name: String,
    pub(super) unit: Unit,
    pub(super) farfault: f64,
    pub(super) reference: Option<Reference>,
}

#[derive(Debug, PartialEq)]
pub(super) struct Reference {
    pub(super) name: &'static str,
    pub(super) value: f64,
    pub(super) ratio: f64,
    /// The ratio should be at most this.
    pub(super) aim: Option<f64>,
}

/// The whole table.
///
/// # Errors
/// Something was not measured.
pub(super) fn rows(rounds: &[Round], sizes: &[u32]) -> anyhow::Result<Vec<Row>> {
    let mut rows = Vec::new();
    for way in Way::ALL {
        for size in suite::SIZES {
            for huge in [true, false] {
                let name = suite::name(way, size, huge);
                let reference = (Source::TestHmm, name.as_str(), "test_hmm");
                let aim = Some(suite_aim(way, size));
                rows.push(row(
                    rounds,
                    &name,
                    Unit::Milliseconds,
                    &name,
                    Some(reference),
                    aim,
                )?);
            }
        }
    }
    rows.push(row(
        rounds,
        EMPTY_COMMAND,
        Unit::Microseconds,
        EMPTY_COMMAND,
        None,
        None,
    )?);
    for (name, aim) in [
        ("job", None),
        ("gpu_fault_map", Some(3.0)),
        ("gpu_fault_burst_512_per_page", Some(0.25)),
        ("gpu_fault_migrate_4k", None),
        ("gpu_fault_migrate_2m", None),
        ("cpu_fault_4k", None),
        ("cpu_fault_2m", None),
    ] {
        let reference = (Source::Farfault, EMPTY_COMMAND, "empty command");
        rows.push(row(
            rounds,
            name,
            Unit::Microseconds,
            name,
            Some(reference),
            aim,
        )?);
    }
    for size in sizes {
        for way in ["to_vram", "to_ram"] {
            for pages in ["thp", "4k"] {
                let name = format!("migrate_{way}_{size}mb_{pages}");
                let reference = (Source::CopiesOff, name.as_str(), "copies off");
                rows.push(row(
                    rounds,
                    &name,
                    Unit::Milliseconds,
                    &name,
                    Some(reference),
                    Some(1.3),
                )?);
                let memcpy = format!("memcpy_{size}mb");
                let reference = (Source::HostMemcpy, memcpy.as_str(), "host memcpy");
                let row_name = format!("{name}_memcpy");
                rows.push(row(
                    rounds,
                    &row_name,
                    Unit::Milliseconds,
                    &name,
                    Some(reference),
                    None,
                )?);
            }
        }
    }
    Ok(rows)
}

/// How many times the mock device's time a migration may take.
fn suite_aim(way: Way, size: &str) -> f64 {
    match (way, size) {
        (_, "0.5" | "1.0") => 1.3,
        (Way::ToDevice, "256.0") => 0.5,
        (Way::ToDevice, _) => 0.7,
        (Way::ToSystem, "256.0") => 0.8,
        (Way::ToSystem, _) => 1.0,
    }
}

/// A row of Farfault's series `series`, held against a reference: whose series, and how it is called.
fn row(
    rounds: &[Round],
    name: &str,
    unit: Unit,
    series: &str,
    reference: Option<(Source, &str, &'static str)>,
    aim: Option<f64>,
) -> anyhow::Result<Row> {
    let figures = |source, series| -> anyhow::Result<Vec<f64>> {
        rounds
            .iter()
            .map(|round| round.get(source, series))
            .collect()
    };
    let over_rounds = |figures: Vec<f64>| median(figures).context("no round was measured");
    let ours = figures(Source::Farfault, series)?;
    let reference = match reference {
        None => None,
        Some((source, series, name)) => {
            let theirs = figures(source, series)?;
            ensure!(
                theirs.iter().all(|figure| *figure > 0.0),
                "{series} ({source:?}) took no time"
            );
            let ratios = ours.iter().zip(&theirs).map(|(ours, theirs)| ours / theirs);
            Some(Reference {
                name,
                ratio: over_rounds(ratios.collect())?,
                value: unit.of_seconds(over_rounds(theirs)?),
                aim,
            })
        }
    };
    Ok(Row {
        name: name.to_owned(),
        unit,
        farfault: unit.of_seconds(over_rounds(ours)?),
        reference,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A round in which everything took as long as `time` says.
    fn round(time: impl Fn(Source, &str) -> u64) -> Round {
        let mut round = Round::default();
        let mut take = |source, name: &str| {
            let sample = Duration::from_micros(time(source, name));
            round.take(source, name.to_owned(), vec![sample]);
        };
        for way in Way::ALL {
            for size in suite::SIZES {
                for huge in [true, false] {
                    let name = suite::name(way, size, huge);
                    take(Source::Farfault, &name);
                    take(Source::TestHmm, &name);
                }
            }
        }
        for name in [
            EMPTY_COMMAND,
            "job",
            "gpu_fault_map",
            "gpu_fault_burst_512_per_page",
            "gpu_fault_migrate_4k",
            "gpu_fault_migrate_2m",
            "cpu_fault_4k",
            "cpu_fault_2m",
        ] {
            take(Source::Farfault, name);
        }
        for way in ["to_vram", "to_ram"] {
            for pages in ["thp", "4k"] {
                let name = format!("migrate_{way}_16mb_{pages}");
                take(Source::Farfault, &name);
                take(Source::CopiesOff, &name);
            }
        }
        take(Source::HostMemcpy, "memcpy_16mb");
        round
    }

    fn find<'a>(rows: &'a [Row], name: &str) -> &'a Row {
        rows.iter().find(|row| row.name == name).unwrap()
    }

    #[test]
    fn median_of_odd_and_even_numbers_is_in_the_middle() {
        assert_eq!(median(vec![9.0, 1.0, 5.0]), Some(5.0));
        assert_eq!(median(vec![9.0, 1.0, 5.0, 7.0]), Some(6.0));
        assert_eq!(median(vec![]), None);
    }

    #[test]
    fn rows_have_names_of_their_own() {
        let rows = rows(&[round(|_, _| 5)], &[16]).unwrap();
        let mut names: Vec<&str> = rows.iter().map(|row| row.name.as_str()).collect();
        names.sort_unstable();
        let count = names.len();
        names.dedup();
        assert_eq!(names.len(), count);
    }

    #[test]
    fn ratio_is_the_median_of_the_rounds_ratios() {
        // A machine that slows down tenfold: the quotient of the medians would be 10 / 40.
        let speeds = [(4, 8), (40, 80), (10, 40)];
        let rounds = speeds.map(|(fault, command)| {
            round(move |_, name| {
                if name == "gpu_fault_map" {
                    fault
                } else {
                    command
                }
            })
        });
        let rows = rows(&rounds, &[16]).unwrap();
        let row = find(&rows, "gpu_fault_map");
        let reference = row.reference.as_ref().unwrap();
        assert!((row.farfault - 10.0).abs() < 1e-9, "{row:?}");
        assert!((reference.value - 40.0).abs() < 1e-9, "{row:?}");
        assert!((reference.ratio - 0.5).abs() < 1e-9, "{row:?}");
        assert_eq!(reference.aim, Some(3.0));
    }

    #[test]
    fn rows_are_held_against_their_own_references() {
        let round = round(|source, _| match source {
            Source::Farfault => 6000,
            Source::TestHmm => 12_000,
            Source::CopiesOff => 3000,
            Source::HostMemcpy => 2000,
        });
        let rows = rows(&[round], &[16]).unwrap();
        for (name, reference_name, ratio, aim) in [
            ("hmm_tests_to_device_256mb_thp", "test_hmm", 0.5, Some(0.5)),
            ("hmm_tests_to_system_2mb_4k", "test_hmm", 0.5, Some(1.0)),
            ("migrate_to_vram_16mb_thp", "copies off", 2.0, Some(1.3)),
            ("migrate_to_vram_16mb_thp_memcpy", "host memcpy", 3.0, None),
            ("cpu_fault_2m", "empty command", 1.0, None),
        ] {
            let reference = find(&rows, name).reference.as_ref().unwrap();
            assert_eq!(reference.name, reference_name);
            assert!(
                (reference.ratio - ratio).abs() < 1e-9,
                "{name}: {reference:?}"
            );
            assert_eq!(reference.aim, aim, "{name}");
        }
        assert_eq!(find(&rows, EMPTY_COMMAND).reference, None);
    }

    #[test]
    fn rows_without_a_figure_in_one_round_are_an_error() {
        let mut second = round(|_, _| 5);
        second
            .0
            .remove(&(Source::Farfault, "cpu_fault_4k".to_owned()));
        let error = rows(&[round(|_, _| 5), second], &[16]).unwrap_err();
        assert!(error.to_string().starts_with("cpu_fault_4k"), "{error}");
        assert!(rows(&[], &[16]).is_err());
    }

    #[test]
    fn rows_against_a_reference_that_took_no_time_are_an_error() {
        let round = round(|source, _| u64::from(source == Source::Farfault));
        assert!(rows(&[round], &[16]).is_err());
    }
}
