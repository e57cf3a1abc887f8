// SPDX-License-Identifier: MIT OR Apache-2.0
//! The tables of the manual against the types of the crate: names, offsets and sizes of fields, and
//! the numbers of all values. The tables are read from the manual, so that neither can go stale.

use core::mem::offset_of;
use farfault_protocol::{
    command::{CommandHeader, Status},
    config::ConfigSpace,
    control, event, submit,
};

/// A field: name, offset and size.
type Field = (String, usize, usize);

/// A type, as the crate has it.
struct Layout {
    name: &'static str,
    size: usize,
    fields: Vec<Field>,
}

fn field_size<T, F>(_: fn(&T) -> &F) -> usize {
    size_of::<F>()
}

/// The cells of a table's row; none for other lines.
fn cells(line: &str) -> Vec<&str> {
    let row = line.strip_prefix("| ").and_then(|l| l.strip_suffix(" |"));
    row.map_or(Vec::new(), |row| row.split(" | ").map(str::trim).collect())
}

/// The fields of each table of a layout; rows of lists of any length are left out.
fn tables(chapter: &str) -> Vec<Vec<Field>> {
    let mut tables: Vec<Vec<Field>> = Vec::new();
    let mut inside = false;
    for line in chapter.lines() {
        match cells(line)[..] {
            ["offset", "size", ..] => {
                tables.push(Vec::new());
                inside = true;
            }
            ["---", ..] => {}
            [offset, size, _, field, ..] if inside => {
                let table = tables.last_mut().expect("a table");
                if let (Ok(offset), Ok(size)) = (offset.parse(), size.parse()) {
                    table.push((field.trim_matches('`').into(), offset, size));
                }
            }
            _ => inside = false,
        }
    }
    tables
}

/// Compares the tables of a chapter with types, in their order.
fn check_layouts(chapter: &str, layouts: &[Layout]) {
    let tables = tables(chapter);
    assert_eq!(tables.len(), layouts.len(), "tables of layouts");
    for (table, layout) in tables.iter().zip(layouts) {
        assert_eq!(*table, layout.fields, "{}", layout.name);
        let end = table.last().map_or(0, |(_, at, size)| at + size);
        assert_eq!(end, layout.size, "{}", layout.name);
    }
}

/// Finds each value in a row of the chapter that has its name and its number.
fn check_values(chapter: &str, values: impl IntoIterator<Item = (String, u32)>) {
    for (name, number) in values {
        let (name, number) = (format!("`{name}`"), number.to_string());
        let found = chapter.lines().map(cells).any(|row| {
            row.contains(&number.as_str()) && row.iter().take(2).any(|cell| cell.contains(&name))
        });
        assert!(found, "no row with {name} and {number}");
    }
}

/// Checks a chapter: the tables of these layouts, in this order, and the values of these sets.
macro_rules! check {
    ($file:literal, [$($type:ty: $($field:ident)*,)*], [$($set:ty),*]) => {{
        let chapter = include_str!(concat!("../../docs/manual/", $file));
        check_layouts(chapter, &[$(Layout {
            name: stringify!($type),
            size: size_of::<$type>(),
            fields: vec![$((
                stringify!($field).into(),
                offset_of!($type, $field),
                field_size(|value: &$type| &value.$field),
            )),*],
        }),*]);
        $(check_values(
            chapter,
            <$set>::ALL.iter().map(|value| (format!("{value:?}"), u32::from(value.raw()))),
        );)*
    }};
}

#[test]
fn manual_chapters_2_and_3_agree_with_the_crate() {
    check!("02-configuration-space.md", [
        ConfigSpace: magic version_major version_minor features vram_size serial max_contexts
            max_jobs max_waves max_request max_copy_run reserved,
    ], []);
    check!("03-queues.md", [CommandHeader: opcode reserved length,], [Status]);
}

#[test]
fn manual_chapter_4_agrees_with_the_crate() {
    use control::*;
    /// The crate has no type of its own for it.
    struct Nop {
        header: CommandHeader,
    }
    check!("04-control-queue.md", [
        Reply: status completed value,
        Nop: header,
        CreateContext: header context reserved root,
        DestroyContext: header context reserved,
        WritePtes: header,
        PteRun: entry first step count reserved,
        Invalidate: header context reserved start length,
        Replay: header context reserved through,
        Cancel: header context reserved sequence,
        ReadPtes: header context count start,
        HarvestAccessed: header context count start,
        KillJob: header context reserved fence,
        SetBusMasterWord: header word,
    ], [Opcode]);
}

#[test]
fn manual_chapter_5_agrees_with_the_crate() {
    use submit::*;
    check!("05-submit-queue.md", [
        Reply: status index,
        Copy: header,
        CopyRun: source destination length source_aperture destination_aperture reserved,
        Launch: header context kernel fence waves reserved arguments,
    ], [Opcode, CopyAperture, Kernel]);
}

#[test]
fn manual_chapter_6_agrees_with_the_crate() {
    use event::*;
    check!("06-event-queue.md", [
        EventHeader: kind reserved context,
        FenceEvent: header fence result page status access cause reserved,
        ErrorEvent: header code reserved detail reserved2,
        FaultEvent: header page sequence fence wave access cause engine reserved,
    ], [EventKind, Access, FaultCause, Engine, JobStatus, ErrorCode]);
}
