// SPDX-License-Identifier: MIT OR Apache-2.0
//! The command line: what may be typed, and how its values are read.
//!
//! Knows neither sockets nor the GPU; `main.rs` hands the parsed options on.

use clap::{Args, Parser, Subcommand, ValueEnum};
use std::path::PathBuf;

/// VRAM comes in steps of a huge page, so that no huge leaf can reach beyond its end.
const VRAM_STEP: u64 = farfault_protocol::address::HUGE_PAGE_SIZE;
/// More than any guest can put to use, and far from where byte counts overflow.
const MAX_VRAM: u64 = 1 << 44;
/// Threads that execute jobs and copies: more than this would only wait for each other.
const MAX_THREADS: u32 = 64;

/// A virtual GPU whose page faults are real, for QEMU's generic vhost-user device.
#[derive(Debug, Parser)]
#[command(
    version,
    args_conflicts_with_subcommands = true,
    arg_required_else_help = true
)]
pub struct Cli {
    /// What to do with a device that runs already.
    #[command(subcommand)]
    pub command: Option<Command>,
    /// Options of the device itself.
    #[command(flatten)]
    pub serve: Option<Serve>,
}

/// Runs a GPU.
#[derive(Clone, Debug, Args)]
pub struct Serve {
    /// Where QEMU finds the GPU: its vhost-user socket, created with mode 0600
    #[arg(long, value_name = "PATH")]
    pub socket: PathBuf,
    /// Where `stats` and `inspect` find the GPU, created with mode 0600
    #[arg(long, value_name = "PATH")]
    pub control: Option<PathBuf>,
    /// Device memory, in steps of 2M; it costs host memory only where it is used
    #[arg(long, value_name = "SIZE", default_value = "1G", value_parser = parse_vram)]
    pub vram: u64,
    /// Threads that execute jobs and copies [default: one for each core, at most 4]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_THREADS)))]
    pub threads: Option<u32>,
    /// Number that tells this GPU from the others of one machine
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub serial: u64,
    /// End when the VM that the GPU served is gone, instead of waiting for the next one
    #[arg(long)]
    pub once: bool,
    /// Take guest memory whose file can be made shorter, as a file of a file system: whoever does that
    /// ends the device
    #[arg(long)]
    pub unsealed_memory: bool,
    /// Keep all rights: without this, the running device can open no file, run no program and connect to
    /// nobody
    #[arg(long)]
    pub no_sandbox: bool,
    /// Log more; twice for everything (RUST_LOG overrides it)
    #[arg(short, long, action = clap::ArgAction::Count)]
    pub verbose: u8,
}

/// What looks into a running device.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Show the counters of a running GPU
    Stats(Client),
    /// Look inside a running GPU
    Inspect {
        /// How to reach it, and how to print.
        #[command(flatten)]
        client: Client,
        /// What to look at
        #[arg(value_enum, default_value = "contexts")]
        topic: Topic,
        /// Of `page-table`: the number of the context
        #[arg(required_if_eq("topic", "page-table"))]
        context: Option<u32>,
    },
    /// For benchmarks only, as data is lost: whether a driver's copies move anything
    ///
    /// While they are off, physical copy lists are checked and answered, and move nothing: what is
    /// in their destinations is undefined. Jobs are not concerned. A reset switches them on.
    Copies {
        /// How to reach it, and how to print.
        #[command(flatten)]
        client: Client,
        /// `off`, or `on` again
        #[arg(value_enum)]
        state: Switch,
    },
    /// For tests of drivers only, as data is lost: a page of device memory fails
    ///
    /// Its contents are lost, the driver is told, and each access to it ends with a memory error, until
    /// the GPU is reset.
    Poison {
        /// How to reach it, and how to print.
        #[command(flatten)]
        client: Client,
        /// An address of device memory, as `inspect page-table` shows it
        #[arg(value_parser = parse_address)]
        address: u64,
    },
}

/// How to reach a running device.
#[derive(Clone, Debug, Args)]
pub struct Client {
    /// The control socket that the device was started with
    #[arg(long, value_name = "PATH")]
    pub control: PathBuf,
    /// Print JSON instead of tables
    #[arg(long)]
    pub json: bool,
}

/// What a switch is turned to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Switch {
    /// As always.
    On,
    /// Not at all.
    Off,
}

/// Parts of the GPU that can be looked at.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Topic {
    /// Address spaces, and what runs in them
    Contexts,
    /// What the page tables of one context map
    PageTable,
    /// Translations that the TLBs hold
    Tlb,
    /// Device memory in use
    Vram,
    /// Faults that wait for the driver
    Faults,
    /// Jobs, and where their waves are
    Jobs,
}

/// Reads a size such as `256M`; the suffixes are powers of 1024.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
    let shift = match text[digits.len()..].to_ascii_uppercase().as_str() {
        "" | "B" => 0,
        "K" | "KB" | "KIB" => 10,
        "M" | "MB" | "MIB" => 20,
        "G" | "GB" | "GIB" => 30,
        "T" | "TB" | "TIB" => 40,
        suffix => {
            return Err(format!(
                "unknown unit `{suffix}`: use K, M, G or T, as in 256M"
            ));
        }
    };
    let number: u64 = digits
        .parse()
        .map_err(|_| format!("`{text}` is no size: write a whole number and a unit, as in 256M"))?;
    number
        .checked_mul(1 << shift)
        .ok_or_else(|| format!("`{text}` is too large"))
}

fn parse_address(text: &str) -> Result<u64, String> {
    let parsed = match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16),
        None => text.parse(),
    };
    parsed.map_err(|_| format!("`{text}` is no address: write a number, as in 0x200000"))
}

fn parse_vram(text: &str) -> Result<u64, String> {
    let size = parse_size(text)?;
    if size == 0 || size % VRAM_STEP != 0 {
        return Err(format!(
            "{size} bytes are not a multiple of 2M: use 2M, 4M, … as in 256M"
        ));
    }
    if size > MAX_VRAM {
        return Err("more than 16T are not supported".into());
    }
    Ok(size)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn size_with_each_unit_is_read() {
        for (text, size) in [
            ("4096", 4096),
            ("64K", 64 << 10),
            ("256M", 256 << 20),
            ("1g", 1 << 30),
            ("2GiB", 2 << 30),
        ] {
            assert_eq!(parse_size(text), Ok(size), "{text}");
        }
    }

    #[test]
    fn size_that_is_none_is_refused() {
        for text in ["", "M", "-1", "1.5G", "12Q", "99999999999T"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn vram_that_no_huge_page_fills_is_refused() {
        for text in ["0", "3M", "2049K", "32T"] {
            assert!(parse_vram(text).is_err(), "{text}");
        }
        assert_eq!(parse_vram("32M"), Ok(32 << 20));
    }

    #[test]
    fn command_line_of_each_mode_is_accepted() {
        for line in [
            "farfault-device --socket /tmp/g --vram 64M --threads 2 --once -vv",
            "farfault-device stats --control /tmp/c --json",
            "farfault-device inspect --control /tmp/c page-table 3",
            "farfault-device inspect tlb --control /tmp/c",
            "farfault-device copies off --control /tmp/c",
            "farfault-device poison 0x201000 --control /tmp/c",
        ] {
            Cli::try_parse_from(line.split(' ')).unwrap_or_else(|e| panic!("{line}: {e}"));
        }
    }

    #[test]
    fn command_line_without_a_socket_is_refused() {
        for line in [
            "farfault-device",
            "farfault-device --vram 1G",
            "farfault-device stats",
            "farfault-device inspect --control c page-table",
            "farfault-device copies --control c",
            "farfault-device poison page --control c",
            "farfault-device --socket s --threads 0",
        ] {
            assert!(Cli::try_parse_from(line.split(' ')).is_err(), "{line}");
        }
    }
}
