// SPDX-License-Identifier: MIT OR Apache-2.0
//! Answers for human eyes: a list of objects becomes a table, an object a list of its fields.
//!
//! Knows no single answer, so that what the GPU shows can change without it. A field that holds an
//! address is printed in hexadecimal; its name tells.

use comfy_table::{CellAlignment, Table, presets};
use serde_json::{Map, Value};
use std::io::{self, Write};

/// Names of fields, or last words of them, that hold addresses.
const ADDRESSES: [&str; 9] = [
    "address", "start", "end", "page", "root", "table", "va", "target", "serial",
];

/// Prints `answer`.
pub fn print(answer: &Value, out: &mut impl Write) -> io::Result<()> {
    section("", answer, out)
}

fn section(title: &str, value: &Value, out: &mut impl Write) -> io::Result<()> {
    match value {
        Value::Array(rows) => list(title, rows, out),
        Value::Object(fields) => object(title, fields, out),
        other => writeln!(out, "{}", scalar(title, other)),
    }
}

fn list(title: &str, rows: &[Value], out: &mut impl Write) -> io::Result<()> {
    let Some(Value::Object(first)) = rows.first() else {
        let items: Vec<String> = rows.iter().map(|row| scalar(title, row)).collect();
        return writeln!(
            out,
            "{}",
            if items.is_empty() {
                "none".into()
            } else {
                items.join(", ")
            }
        );
    };
    let columns: Vec<&String> = first.keys().collect();
    let mut table = new_table();
    table.set_header(columns.iter().map(|name| name.replace('_', " ")));
    for row in rows {
        table.add_row(
            columns
                .iter()
                .map(|name| scalar(name, row.get(name).unwrap_or(&Value::Null))),
        );
    }
    for (index, name) in columns.iter().enumerate() {
        let numeric = rows
            .iter()
            .all(|row| row.get(name).is_some_and(Value::is_number));
        if let (true, Some(column)) = (numeric, table.column_mut(index)) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    writeln!(out, "{}", table.trim_fmt())
}

/// The plain fields first, then what has an inside of its own, under its name.
fn object(title: &str, fields: &Map<String, Value>, out: &mut impl Write) -> io::Result<()> {
    let (nested, plain): (Vec<_>, Vec<_>) = fields
        .iter()
        .partition(|(_, value)| matches!(value, Value::Object(_) | Value::Array(_)));
    if !plain.is_empty() {
        let mut table = new_table();
        for (name, value) in plain {
            table.add_row([name.replace('_', " "), scalar(name, value)]);
        }
        if let Some(column) = table.column_mut(1) {
            column.set_cell_alignment(CellAlignment::Right);
        }
        writeln!(out, "{}", table.trim_fmt())?;
    }
    for (name, value) in nested {
        let name = if title.is_empty() {
            name.clone()
        } else {
            format!("{title} {name}")
        };
        writeln!(out, "\n{}:", name.replace('_', " "))?;
        section(&name, value, out)?;
    }
    Ok(())
}

fn new_table() -> Table {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING);
    table
}

fn scalar(name: &str, value: &Value) -> String {
    let last_word = name.rsplit(['_', ' ']).next().unwrap_or(name);
    match value {
        Value::Null => "-".into(),
        Value::Bool(true) => "yes".into(),
        Value::Bool(false) => "no".into(),
        Value::String(text) => text.clone(),
        Value::Number(number) => match number.as_u64() {
            Some(address) if ADDRESSES.contains(&last_word) => format!("{address:#x}"),
            _ => number.to_string(),
        },
        Value::Array(items) => items
            .iter()
            .map(|item| scalar(name, item))
            .collect::<Vec<_>>()
            .join(" "),
        Value::Object(fields) => fields
            .iter()
            .map(|(name, value)| format!("{}={}", name.replace('_', " "), scalar(name, value)))
            .collect::<Vec<_>>()
            .join(" "),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn printed(answer: &Value) -> String {
        let mut out = Vec::new();
        print(answer, &mut out).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn list_of_objects_becomes_a_table() {
        let text = printed(&json!([{"context": 1, "root": 4096}, {"context": 12, "root": 0}]));
        let lines: Vec<&str> = text.lines().map(str::trim).collect();
        assert_eq!(lines.len(), 3, "{text}");
        assert!(lines[1].ends_with("0x1000"), "{text}");
    }

    #[test]
    fn empty_list_says_so() {
        assert_eq!(printed(&json!([])), "none\n");
    }

    #[test]
    fn nested_object_gets_its_name() {
        let text = printed(&json!({"faults": 3, "tlb": {"hits": 7}}));
        assert!(
            text.contains("faults") && text.contains("\ntlb:\n") && text.contains('7'),
            "{text}"
        );
    }
}
