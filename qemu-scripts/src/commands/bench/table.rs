// SPDX-License-Identifier: MIT OR Apache-2.0
//! The rows as text for people, and as JSON for programs.

use std::fmt::Write as _;

use serde_json::{Value, json};

use super::figures::Row;

const HEAD: [&str; 8] = [
    "what",
    "unit",
    "Farfault",
    "reference",
    "of",
    "ratio",
    "aim",
    "",
];
/// The columns that are words, and begin at the left.
const WORDS: [bool; 8] = [true, true, false, false, true, false, false, true];

/// An aligned table, and a line that counts the aims.
pub(super) fn text(rows: &[Row]) -> String {
    let mut lines = vec![HEAD.map(str::to_owned)];
    lines.extend(rows.iter().map(cells));
    let mut text = String::new();
    for line in &lines {
        let mut shown = String::new();
        for (column, cell) in line.iter().enumerate() {
            let width = lines
                .iter()
                .filter_map(|line| line.get(column))
                .map(String::len)
                .max();
            let width = width.unwrap_or(0);
            let _ = match WORDS.get(column) {
                Some(true) => write!(shown, "{cell:<width$}  "),
                _ => write!(shown, "{cell:>width$}  "),
            };
        }
        text.push_str(shown.trim_end());
        text.push('\n');
    }
    let aims = rows.iter().filter_map(is_reached);
    let (reached, all) = aims.fold((0, 0), |(reached, all), is| {
        (reached + u32::from(is), all + 1)
    });
    let _ = writeln!(text, "\n{reached} of {all} aims reached");
    text
}

fn cells(row: &Row) -> [String; 8] {
    let reference = row.reference.as_ref();
    let aim = reference.and_then(|reference| reference.aim);
    [
        row.name.clone(),
        row.unit.to_string(),
        digits(row.farfault),
        reference.map_or_else(String::new, |reference| digits(reference.value)),
        reference.map_or_else(String::new, |reference| reference.name.to_owned()),
        reference.map_or_else(String::new, |reference| format!("{:.2}", reference.ratio)),
        aim.map_or_else(String::new, |aim| format!("<= {aim}")),
        match is_reached(row) {
            Some(true) => "ok".to_owned(),
            Some(false) => "missed".to_owned(),
            None => String::new(),
        },
    ]
}

/// By the ratio itself, not by what is shown of it.
fn is_reached(row: &Row) -> Option<bool> {
    let reference = row.reference.as_ref()?;
    Some(reference.ratio <= reference.aim?)
}

/// About four digits that say something.
fn digits(value: f64) -> String {
    match value {
        100.0.. => format!("{value:.0}"),
        10.0.. => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

/// A list of objects; what has no reference has nulls there.
pub(super) fn json(rows: &[Row]) -> Value {
    let objects = rows.iter().map(|row| {
        let reference = row.reference.as_ref();
        json!({
            "name": row.name,
            "unit": row.unit.to_string(),
            "farfault": row.farfault,
            "reference": reference.map(|reference| reference.value),
            "reference_name": reference.map(|reference| reference.name),
            "ratio": reference.map(|reference| reference.ratio),
        })
    });
    objects.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::bench::figures::{Reference, Unit};

    fn rows() -> [Row; 3] {
        let row = |name: &str, unit, farfault, reference| Row {
            name: name.to_owned(),
            unit,
            farfault,
            reference,
        };
        let reference = |name, value, ratio, aim| {
            Some(Reference {
                name,
                value,
                ratio,
                aim,
            })
        };
        [
            row("empty_command", Unit::Microseconds, 50.0, None),
            row(
                "fault",
                Unit::Microseconds,
                150.0,
                reference("empty command", 50.0, 3.001, Some(3.0)),
            ),
            row(
                "move",
                Unit::Milliseconds,
                1.25,
                reference("test_hmm", 2.5, 0.5, Some(0.5)),
            ),
        ]
    }

    #[test]
    fn text_is_aligned_and_counts_the_aims() {
        let text = text(&rows());
        let expected = "\
what           unit  Farfault  reference  of             ratio     aim
empty_command  us        50.0
fault          us         150       50.0  empty command   3.00    <= 3  missed
move           ms        1.25       2.50  test_hmm        0.50  <= 0.5  ok

1 of 2 aims reached
";
        assert_eq!(text, expected);
    }

    #[test]
    fn json_has_all_keys_and_nulls_where_there_is_no_reference() {
        let expected = json!([
            {"name": "empty_command", "unit": "us", "farfault": 50.0, "reference": null,
             "reference_name": null, "ratio": null},
            {"name": "fault", "unit": "us", "farfault": 150.0, "reference": 50.0,
             "reference_name": "empty command", "ratio": 3.001},
            {"name": "move", "unit": "ms", "farfault": 1.25, "reference": 2.5,
             "reference_name": "test_hmm", "ratio": 0.5},
        ]);
        assert_eq!(json(&rows()), expected);
    }
}
