// SPDX-License-Identifier: MIT OR Apache-2.0
//! `cargo xtask hmm-tests`: the kernel's own selftests for HMM, unmodified, on our GPUs or on the mock device that they are
//! written for; in one VM, once or many times, with a look into the kernel's log after each.

use std::{process::ExitCode, time::Duration};

use clap::ValueEnum;
use xtask::{
    Options, Prepared,
    build::{Extra, SUITE_PROGRAM},
    ktap::Counts,
    vm::{Attach, Config, Driver, KnownReport, Vm},
};

/// Its largest test moves 256 MiB, in huge pages or in small ones.
const VRAM: &str = "1G";
const MEMORY_MIB: u32 = 4096;
/// Tests of the suite take up to 30 s each before its harness ends them; all of them together are far below this.
const LIMIT: Duration = Duration::from_secs(1200);
const COMMAND_LIMIT: Duration = Duration::from_secs(60);
const HUGETLB_PAGES: u32 = 8;

/// The kernel's own bug that the mock device shows when the suite kills one of its tests; see `docs/kernel-findings.md`.
const KNOWN_WITH_MOCK: &[KnownReport] = &[KnownReport {
    title: "BUG: KASAN: slab-use-after-free in",
    frames: &[
        "rmap_walk_anon",
        "remove_migration_ptes",
        "__migrate_device_finalize",
    ],
}];

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Whose devices the suite gets
    #[arg(long, value_enum, default_value_t)]
    driver: DriverChoice,
    /// How many times the suite runs
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    times: u32,
    /// Only tests of this name, such as `migrate_fault`, or `hmm.hmm_device_private.migrate_fault`
    filter: Vec<String>,
    /// Further arguments for the suite, such as `-- -f hmm2` or `-- -T benchmark_thp_migration`
    #[arg(last = true)]
    more: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
enum DriverChoice {
    /// Ours, on two GPUs
    #[default]
    #[value(name = "farfault")]
    Farfault,
    /// The kernel's mock device
    #[value(name = "test_hmm")]
    TestHmm,
}

pub(crate) fn run(options: &Options, arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let mut config = Config {
        name: SUITE_PROGRAM.to_owned(),
        gpus: 2,
        vram: VRAM.to_owned(),
        memory_mib: MEMORY_MIB,
        driver: Driver::Load(vec!["dmirror=1".to_owned()]),
        repeat: Some("cargo xtask hmm-tests, with the same options".to_owned()),
        ..Config::default()
    };
    if arguments.driver == DriverChoice::TestHmm {
        config.driver = Driver::Mock;
        config.gpus = 0;
        config.known_reports = KNOWN_WITH_MOCK;
    }
    let prepared = Prepared::with(options, Extra::Suite)?;
    let mut vm = Vm::boot(&prepared, &config)?;
    let pool = format!("echo {HUGETLB_PAGES} > /proc/sys/vm/nr_hugepages");
    vm.run(&["sh", "-c", &pool], COMMAND_LIMIT)?
        .expect_success()?;

    let mut argv = vec![SUITE_PROGRAM];
    for name in &arguments.filter {
        argv.extend([if name.contains('.') { "-r" } else { "-t" }, name]);
    }
    argv.extend(arguments.more.iter().map(String::as_str));
    let mut all = Counts::default();
    let mut well = true;
    for time in 1..=arguments.times {
        let output = vm.attach(&argv, Attach::Output(LIMIT))?;
        let counts = Counts::of(&output.stdout_text());
        well &= counts.is_success() && output.success();
        all += counts;
        // Trouble of the kernel goes before the last line.
        if let Err(error) = vm.check() {
            eprintln!("error: {error}");
            well = false;
        }
        if arguments.times > 1 {
            println!("run {time} of {}: {counts}", arguments.times);
        }
    }
    if well {
        vm.shutdown()?;
    } else {
        // Dropped without a shutdown, it leaves its logs and says where they are.
        drop(vm);
    }
    println!("{SUITE_PROGRAM}: {all}");
    Ok(if well {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
