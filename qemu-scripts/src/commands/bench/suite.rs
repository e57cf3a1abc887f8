// SPDX-License-Identifier: MIT OR Apache-2.0
//! The suite's `benchmark_thp_migration`: its name, and what it prints. For each size it prints a table:
//!
//! ```text
//! === Half THP Size (1.0 MB) ===
//!                      | With THP        | Without THP     | Improvement
//! ---------------------------------------------------------------------
//! Sys->Dev Migration   | 1.234 ms        | 2.345 ms        | 47.4%
//! Dev->Sys Migration   | 0.600 ms        | 0.700 ms        | 14.3%
//! S->D Throughput      | …
//! ```

use std::time::Duration;

use anyhow::{Context, bail};

/// The one test, on the first node.
pub(super) const BENCHMARK: &str = "hmm.hmm_device_private.benchmark_thp_migration";

/// Its sizes, as it prints them.
pub(super) const SIZES: [&str; 7] = ["0.5", "1.0", "2.0", "4.0", "8.0", "16.0", "256.0"];

/// One way of its migrations.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    ToDevice,
    ToSystem,
}

impl Way {
    pub(super) const ALL: [Self; 2] = [Self::ToDevice, Self::ToSystem];

    fn label(self) -> &'static str {
        match self {
            Self::ToDevice => "Sys->Dev Migration",
            Self::ToSystem => "Dev->Sys Migration",
        }
    }
}

/// The name of a figure, such as `hmm_tests_to_device_16mb_thp`.
pub(super) fn name(way: Way, size: &str, huge: bool) -> String {
    let way = match way {
        Way::ToDevice => "to_device",
        Way::ToSystem => "to_system",
    };
    let size = size.trim_end_matches(".0");
    let pages = if huge { "thp" } else { "4k" };
    format!("hmm_tests_{way}_{size}mb_{pages}")
}

/// All figures in what it printed.
pub(super) fn parse(output: &str) -> anyhow::Result<Vec<(String, Duration)>> {
    let mut figures = Vec::new();
    let mut size = None;
    // The harness writes each line of a test as a comment of its own protocol.
    for line in output
        .lines()
        .map(|line| line.trim_start_matches("# ").trim())
    {
        if let Some(title) = line.strip_prefix("=== ") {
            size = Some(size_in(title).with_context(|| format!("no size in `{line}`"))?);
        }
        let Some(way) = Way::ALL
            .into_iter()
            .find(|way| line.starts_with(way.label()))
        else {
            continue;
        };
        let size = size.with_context(|| format!("no size before `{line}`"))?;
        for (column, huge) in [(1, true), (2, false)] {
            let time = time_in(line, column).with_context(|| format!("no time in `{line}`"))?;
            figures.push((name(way, size, huge), time));
        }
    }
    if figures.is_empty() {
        bail!("the suite's benchmark printed no figures");
    }
    Ok(figures)
}

/// `Half THP Size (1.0 MB) ===`
fn size_in(title: &str) -> Option<&str> {
    Some(title.split_once('(')?.1.split_once(" MB)")?.0)
}

fn time_in(line: &str, column: usize) -> Option<Duration> {
    let milliseconds: f64 = line
        .split('|')
        .nth(column)?
        .trim()
        .strip_suffix(" ms")?
        .parse()
        .ok()?;
    Duration::try_from_secs_f64(milliseconds / 1e3).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const OUTPUT: &str = "\
TAP version 13
1..1
# Starting 1 tests from 1 test cases.
#  RUN           hmm.hmm_device_private.benchmark_thp_migration ...

HMM THP Migration Benchmark
---------------------------
System page size: 4096 bytes

=== Small Buffer (0.5 MB) ===
                     | With THP        | Without THP     | Improvement
---------------------------------------------------------------------
Sys->Dev Migration   | 1.904 ms        | 1.890 ms        | -0.7%
Dev->Sys Migration   | 0.640 ms        | 0.660 ms        | 3.0%
S->D Throughput      | 0.26 GB/s      | 0.26 GB/s      | -0.7%
D->S Throughput      | 0.76 GB/s      | 0.74 GB/s      | 3.1%

=== One twenty eight THP Size (256.0 MB) ===
                     | With THP        | Without THP     | Improvement
---------------------------------------------------------------------
Sys->Dev Migration   | 606.250 ms        | 935.000 ms        | 35.2%
Dev->Sys Migration   | 132.000 ms        | 378.000 ms        | 65.1%
#            OK  hmm.hmm_device_private.benchmark_thp_migration
ok 1 hmm.hmm_device_private.benchmark_thp_migration
";

    #[test]
    fn parse_of_its_output_finds_each_figure() {
        let figures = parse(OUTPUT).unwrap();
        assert_eq!(figures.len(), 8);
        let expected = [
            ("hmm_tests_to_device_0.5mb_thp", 1_904),
            ("hmm_tests_to_device_0.5mb_4k", 1_890),
            ("hmm_tests_to_system_0.5mb_thp", 640),
            ("hmm_tests_to_device_256mb_thp", 606_250),
            ("hmm_tests_to_system_256mb_4k", 378_000),
        ];
        for (name, microseconds) in expected {
            let figure = (name.to_owned(), Duration::from_micros(microseconds));
            assert!(figures.contains(&figure), "{figure:?} in {figures:?}");
        }
    }

    #[test]
    fn parse_of_lines_with_the_protocols_marks_finds_the_same() {
        let marked: String = OUTPUT.lines().map(|line| format!("# {line}\n")).collect();
        assert_eq!(parse(&marked).unwrap(), parse(OUTPUT).unwrap());
    }

    #[test]
    fn parse_of_anything_else_says_what_is_wrong() {
        for (output, said) in [
            ("not ok 1 hmm", "no figures"),
            ("Sys->Dev Migration   | 1.0 ms | 1.0 ms |", "no size before"),
            ("=== Small Buffer ===", "no size in"),
            (
                "=== A (1.0 MB) ===\nDev->Sys Migration | 1.0 ms | nan ms",
                "no time in",
            ),
            (
                "=== A (1.0 MB) ===\nDev->Sys Migration | 1.0 ms",
                "no time in",
            ),
        ] {
            let error = parse(output).unwrap_err().to_string();
            assert!(error.contains(said), "{error}");
        }
    }
}
