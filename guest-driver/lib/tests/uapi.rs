// SPDX-License-Identifier: MIT OR Apache-2.0
//! The C header and its Rust mirror say the same: every struct, field, enum and number of one side
//! is on the other, with the same size, offset and value.
//!
//! The header's names are read from its text, a C compiler says what they are; the mirror's come
//! from exhaustive patterns and from its text. So an item on one side only fails here, too.

use farfault::uapi;
use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    process::Command,
};

const HEADER: &str = include_str!("../../include/uapi/farfault.h");
const MIRROR: &str = include_str!("../src/uapi.rs");

/// What is compared: "struct farfault_info" (size), "farfault_info.context @" (offset),
/// "farfault_info.context #" (size), "FARFAULT_JOB_OK" (value).
type Facts = BTreeMap<String, u64>;

/// Size of what a field's projection yields: fields have no type that could be named here.
fn size_of_field<S, F>(_: fn(&S) -> &F) -> u64 {
    size_of::<F>() as u64
}

macro_rules! struct_facts {
    ($facts:ident, $type:ident = $name:literal { $($field:ident),+ $(,)? }) => {
        $facts.insert(format!("struct {}", $name), size_of::<uapi::$type>() as u64);
        $(
            let key = format!("{}.{}", $name, stringify!($field));
            let offset = std::mem::offset_of!(uapi::$type, $field) as u64;
            $facts.insert(format!("{key} @"), offset);
            $facts.insert(format!("{key} #"), size_of_field(|s: &uapi::$type| &s.$field));
        )+
        // A field that is missing above does not compile here.
        let _ = |uapi::$type { $($field: _),+ }: uapi::$type| {};
    };
}

macro_rules! enum_facts {
    ($facts:ident, $($type:ident = $prefix:literal),+ $(,)?) => {
        $(for value in uapi::$type::ALL {
            let key = format!("{}_{}", $prefix, screaming(&format!("{value:?}")));
            $facts.insert(key, u64::from(value.raw()));
            assert_eq!(uapi::$type::from_raw(value.raw()), Some(*value));
        })+
    };
}

macro_rules! const_facts {
    ($facts:ident, $($name:ident),+ $(,)?) => {
        $($facts.insert(format!("FARFAULT_{}", stringify!($name)), u64::from(uapi::$name));)+
    };
}

/// `AtomicAdd` to `ATOMIC_ADD`.
fn screaming(camel: &str) -> String {
    let mut text = String::new();
    for (i, c) in camel.char_indices() {
        if i > 0 && c.is_ascii_uppercase() {
            text.push('_');
        }
        text.push(c.to_ascii_uppercase());
    }
    text
}

fn mirror_facts() -> Facts {
    let mut facts = Facts::new();
    struct_facts!(facts, Info = "farfault_info" {
        uapi_version, context, vram_size, serial, max_waves, max_jobs
    });
    struct_facts!(facts, Submit = "farfault_submit" { kernel, waves, arguments, fence });
    struct_facts!(facts, Wait = "farfault_wait" {
        fence, timeout_ns, result, fault_address, status, access
    });
    struct_facts!(facts, Kill = "farfault_kill" { fence });
    struct_facts!(facts, Migrate = "farfault_migrate" {
        address, length, destination, reserved, moved, there, stayed
    });
    struct_facts!(facts, Advise = "farfault_advise" { address, length, advice, reserved });
    struct_facts!(facts, Page = "farfault_page" {
        cpu_place, cpu_flags, gpu_place, gpu_flags, advice, reserved, cpu_vram, gpu_vram
    });
    struct_facts!(facts, Query = "farfault_query" { address, length, pages });
    struct_facts!(facts, Stats = "farfault_stats" {
        gpu_faults, gpu_faults_failed, cpu_faults, pages_to_vram, pages_to_ram, pages_evicted,
        pages_mapped, invalidations, migrate_ns, jobs
    });
    struct_facts!(facts, Exclusive = "farfault_exclusive" { address, length });
    enum_facts!(
        facts,
        Kernel = "FARFAULT_KERNEL",
        JobStatus = "FARFAULT_JOB",
        Access = "FARFAULT_ACCESS",
        Place = "FARFAULT_PLACE",
        Advice = "FARFAULT_ADVICE",
    );
    const_facts!(
        facts,
        UAPI_VERSION,
        IOC_INFO,
        IOC_SUBMIT,
        IOC_WAIT,
        IOC_KILL,
        IOC_MIGRATE,
        IOC_ADVISE,
        IOC_QUERY,
        IOC_STATS,
        IOC_PING,
        IOC_EXCLUSIVE,
        PAGE_WRITE,
        PAGE_HUGE,
        PAGE_ATOMIC,
        PAGE_ACCESSED,
        PAGE_DIRTY,
    );
    facts
}

/// The C text without its comments.
fn without_comments(text: &str) -> String {
    let mut rest = text;
    let mut code = String::new();
    while let Some((before, comment)) = rest.split_once("/*") {
        code.push_str(before);
        rest = comment.split_once("*/").expect("a comment ends").1;
    }
    code + rest
}

/// What the header defines: structs with their fields, and names that have a value.
#[derive(Default)]
struct HeaderNames {
    structs: BTreeMap<String, Vec<String>>,
    values: BTreeSet<String>,
}

fn header_names() -> HeaderNames {
    let mut names = HeaderNames::default();
    let mut block: Option<(&str, String)> = None;
    let code = without_comments(HEADER);
    for line in code.lines().map(str::trim) {
        let words: Vec<&str> = line.split_whitespace().collect();
        match (&block, words.as_slice()) {
            (_, [] | ["#include", ..] | ["#endif"] | ["#ifndef", _]) => {}
            (_, ["#define", "_UAPI_FARFAULT_H"]) => {}
            (None, ["#define", name, ..]) => {
                names.values.insert((*name).to_owned());
            }
            (None, ["struct", name, "{"]) => block = Some(("struct", (*name).to_owned())),
            (None, ["enum", name, "{"]) => block = Some(("enum", (*name).to_owned())),
            (Some(_), ["};"]) => block = None,
            (Some(("enum", _)), [name, "=", ..]) => {
                names.values.insert((*name).to_owned());
            }
            (Some((_, name)), [_, field]) => {
                let field = field.split(['[', ';']).next().expect("split yields a part");
                let fields = names.structs.entry(name.clone()).or_default();
                fields.push(field.to_owned());
            }
            _ => panic!("this test does not understand the header's line {line:?}"),
        }
    }
    names
}

fn header_facts() -> Facts {
    let names = header_names();
    let mut program = String::from(
        "#include <stddef.h>\n#include <stdio.h>\n#include <uapi/farfault.h>\n\
         #define SAY(key, value) printf(\"%s=%llu\\n\", key, (unsigned long long)(value))\n\
         int main(void)\n{\n",
    );
    let mut say = |key: &str, value: &str| {
        writeln!(program, "SAY(\"{key}\", {value});").expect("a String takes all");
    };
    for (name, fields) in &names.structs {
        say(&format!("struct {name}"), &format!("sizeof(struct {name})"));
        for field in fields {
            let key = format!("{name}.{field}");
            say(
                &format!("{key} @"),
                &format!("offsetof(struct {name}, {field})"),
            );
            say(
                &format!("{key} #"),
                &format!("sizeof(((struct {name} *)0)->{field})"),
            );
        }
    }
    for name in &names.values {
        say(name, name);
    }
    program.push_str("return 0;\n}\n");

    let folder = tempfile::tempdir().expect("a folder for the C program");
    let source = folder.path().join("facts.c");
    let binary = folder.path().join("facts");
    std::fs::write(&source, program).expect("write the C program");
    let include = concat!(env!("CARGO_MANIFEST_DIR"), "/../include");
    let compiler = std::env::var("CC").unwrap_or_else(|_| "cc".to_owned());
    let status = Command::new(&compiler)
        .args(["-Wall", "-Wextra", "-Werror", "-I", include, "-o"])
        .args([&binary, &source])
        .status()
        .unwrap_or_else(|error| panic!("run the C compiler `{compiler}`: {error}"));
    assert!(status.success(), "the header must compile: {status}");
    let output = Command::new(&binary).output().expect("run the C program");
    assert!(output.status.success(), "{}", output.status);
    String::from_utf8(output.stdout)
        .expect("the C program prints ASCII")
        .lines()
        .map(|line| {
            let (key, value) = line.split_once('=').expect("key=value");
            (key.to_owned(), value.parse().expect("a number"))
        })
        .collect()
}

#[test]
fn header_and_mirror_compared_are_equal() {
    let (header, mirror) = (header_facts(), mirror_facts());
    let mut differences = String::new();
    for key in header.keys().chain(mirror.keys()).collect::<BTreeSet<_>>() {
        let (c, rust) = (header.get(key), mirror.get(key));
        if c != rust {
            writeln!(differences, "{key}: C {c:?}, Rust {rust:?}").expect("a String takes all");
        }
    }
    assert!(differences.is_empty(), "\n{differences}");
    assert!(header.len() > 100, "the header was not read: {header:?}");
}

#[test]
fn mirror_items_all_compared() {
    let facts = mirror_facts();
    let prefixes = ["FARFAULT_KERNEL_", "FARFAULT_JOB_", "FARFAULT_ACCESS_"];
    let enums = BTreeSet::from(["Kernel", "JobStatus", "Access", "Place", "Advice"]);
    for prefix in prefixes {
        assert!(facts.keys().any(|key| key.starts_with(prefix)), "{prefix}");
    }
    let mut items = 0;
    for line in MIRROR.lines() {
        let line = line.trim();
        let name = |keyword: &str| {
            let rest = line.strip_prefix(keyword)?;
            rest.split(|c: char| !c.is_alphanumeric() && c != '_')
                .find(|name| !name.is_empty())
        };
        if let Some(name) = name("pub struct ") {
            let key = format!("struct farfault_{}", name.to_lowercase());
            assert!(facts.contains_key(&key), "{name} is not compared");
        } else if let Some(name) = name("pub const ").filter(|name| !["ALL", "fn"].contains(name)) {
            let key = format!("FARFAULT_{name}");
            assert!(facts.contains_key(&key), "{name} is not compared");
        } else if let Some(name) = name("pub enum ").filter(|name| *name != "name") {
            assert!(enums.contains(name), "{name} is not compared");
        } else {
            continue;
        }
        items += 1;
    }
    assert!(items > 25, "the mirror's text was not read: {items} items");
}

#[test]
fn from_raw_of_unknown_number_is_none() {
    assert_eq!(uapi::Kernel::from_raw(0), None);
    assert_eq!(uapi::Kernel::from_raw(8), None);
    assert_eq!(uapi::JobStatus::from_raw(6), None);
    assert_eq!(uapi::Access::from_raw(0), None);
    assert_eq!(uapi::Place::from_raw(3), None);
    assert_eq!(uapi::Advice::from_raw(u32::MAX), None);
}
