// SPDX-License-Identifier: MIT OR Apache-2.0
//! What was measured, by name, and its medians.

use serde_json::{Value, json};
use std::{fmt::Write as _, time::Duration};

/// Measured with an empty command, and what everything else is held against.
pub(crate) const PING: &str = "ping";

/// The cost of one fault: mapped in RAM, resolved and replayed.
pub(crate) const FAULT_MAP: &str = "gpu_fault_map";

/// What a figure counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unit {
    Nanoseconds,
    BytesPerSecond,
}

impl Unit {
    fn name(self) -> &'static str {
        match self {
            Self::Nanoseconds => "ns",
            Self::BytesPerSecond => "bytes/s",
        }
    }

    /// For people.
    fn show(self, value: f64) -> String {
        match self {
            Self::Nanoseconds => format!("{:.1} us", value / 1e3),
            Self::BytesPerSecond => format!("{:.1} MiB/s", value / f64::from(1 << 20)),
        }
    }
}

/// All samples of one name.
#[derive(Debug)]
struct Series {
    name: String,
    unit: Unit,
    values: Vec<f64>,
}

/// One line of the table.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Summary {
    median: f64,
    min: f64,
    max: f64,
    count: usize,
}

impl Series {
    fn summary(&self) -> Option<Summary> {
        let mut values = self.values.clone();
        values.sort_by(f64::total_cmp);
        let (min, max) = (*values.first()?, *values.last()?);
        let upper = *values.get(values.len() / 2)?;
        let lower = *values.get((values.len() - 1) / 2)?;
        Some(Summary {
            median: f64::midpoint(lower, upper),
            min,
            max,
            count: values.len(),
        })
    }
}

/// Everything measured, in the order in which names came first.
#[derive(Debug, Default)]
pub(crate) struct Samples {
    series: Vec<Series>,
}

impl Samples {
    pub(crate) fn time(&mut self, name: &str, time: Duration) {
        self.push(name, Unit::Nanoseconds, time.as_secs_f64() * 1e9);
    }

    /// Bytes moved in a time; nothing if the clock saw no time pass.
    pub(crate) fn rate(&mut self, name: &str, bytes: u64, time: Duration) {
        if !time.is_zero() {
            let rate = bytes as f64 / time.as_secs_f64();
            self.push(name, Unit::BytesPerSecond, rate);
        }
    }

    fn push(&mut self, name: &str, unit: Unit, value: f64) {
        match self.series.iter_mut().find(|series| series.name == name) {
            Some(series) => series.values.push(value),
            None => self.series.push(Series {
                name: name.to_owned(),
                unit,
                values: vec![value],
            }),
        }
    }

    /// Fails if one of these was never measured.
    pub(crate) fn expect(&self, names: &[&str]) -> Result<(), String> {
        match names.iter().find(|name| self.median(name).is_none()) {
            None => Ok(()),
            Some(name) => Err(format!(
                "{name} was never measured: no job had exactly one fault; see the driver's counts"
            )),
        }
    }

    fn median(&self, name: &str) -> Option<f64> {
        let series = self.series.iter().find(|series| series.name == name)?;
        Some(series.summary()?.median)
    }

    fn summaries(&self) -> impl Iterator<Item = (&Series, Summary)> {
        self.series
            .iter()
            .filter_map(|series| Some((series, series.summary()?)))
    }

    /// For people.
    pub(crate) fn table(&self) -> String {
        let mut lines = vec![[
            "what".to_owned(),
            "median".to_owned(),
            "least".to_owned(),
            "most".to_owned(),
            "samples".to_owned(),
        ]];
        lines.extend(self.summaries().map(|(series, summary)| {
            let show = |value| series.unit.show(value);
            [
                series.name.clone(),
                show(summary.median),
                show(summary.min),
                show(summary.max),
                summary.count.to_string(),
            ]
        }));
        let width = |column: usize| {
            lines
                .iter()
                .map(|line| line[column].len())
                .max()
                .unwrap_or(0)
        };
        let widths = [width(0), width(1), width(2), width(3), width(4)];
        let mut table = String::new();
        for [what, figures @ ..] in &lines {
            let _ = write!(table, "{what:<width$}", width = widths[0]);
            for (figure, width) in figures.iter().zip(&widths[1..]) {
                let _ = write!(table, "  {figure:>width$}");
            }
            table.push('\n');
        }
        if let (Some(fault), Some(ping)) = (self.median(FAULT_MAP), self.median(PING)) {
            let _ = writeln!(
                table,
                "\none GPU fault, resolved and replayed, costs {:.1} empty commands (the aim: at \
                 most 4)",
                fault / ping
            );
        }
        table
    }

    /// For programs.
    pub(crate) fn json(&self) -> Value {
        let figures = self.summaries().map(|(series, summary)| {
            json!({
                "name": series.name,
                "unit": series.unit.name(),
                "value": summary.median,
                "min": summary.min,
                "max": summary.max,
                "samples": summary.count,
            })
        });
        figures.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn samples(name: &str, nanoseconds: &[u64]) -> Samples {
        let mut samples = Samples::default();
        for time in nanoseconds {
            samples.time(name, Duration::from_nanos(*time));
        }
        samples
    }

    #[test]
    fn median_of_odd_and_even_numbers_is_in_the_middle() {
        assert_eq!(samples("a", &[9, 1, 5]).median("a"), Some(5.0));
        assert_eq!(samples("a", &[9, 1, 5, 7]).median("a"), Some(6.0));
        assert_eq!(samples("a", &[]).median("a"), None);
    }

    #[test]
    fn expect_of_missing_name_says_it() {
        let samples = samples(PING, &[1]);
        assert!(samples.expect(&[PING]).is_ok());
        assert!(
            samples
                .expect(&[PING, FAULT_MAP])
                .unwrap_err()
                .starts_with(FAULT_MAP)
        );
    }

    #[test]
    fn json_has_name_unit_and_value() {
        let mut samples = samples("ping", &[1000, 3000, 2000]);
        samples.rate("memcpy", 1 << 20, Duration::from_secs(1));
        let expected = json!([
            {"name": "ping", "unit": "ns", "value": 2000.0, "min": 1000.0, "max": 3000.0,
             "samples": 3},
            {"name": "memcpy", "unit": "bytes/s", "value": 1048576.0, "min": 1048576.0,
             "max": 1048576.0, "samples": 1},
        ]);
        assert_eq!(samples.json(), expected);
    }

    #[test]
    fn table_is_aligned_and_ends_with_the_ratio() {
        let mut samples = samples(PING, &[50_000]);
        samples.time(FAULT_MAP, Duration::from_micros(150));
        let table = samples.table();
        let lines: Vec<&str> = table.lines().collect();
        assert_eq!(lines[0].len(), lines[1].len());
        assert_eq!(lines[1].len(), lines[2].len());
        assert!(lines[1].contains("50.0 us"), "{table}");
        assert!(lines[4].contains("costs 3.0 empty commands"), "{table}");
    }

    #[test]
    fn rate_without_time_is_left_out() {
        let mut samples = Samples::default();
        samples.rate("memcpy", 1, Duration::ZERO);
        assert_eq!(samples.json(), json!([]));
    }
}
