// SPDX-License-Identifier: MIT OR Apache-2.0
//! `farfault-profile COMMAND…`: runs a command and shows where the guest's kernel spends its time meanwhile,
//! on all CPUs: the driver, mm, and all else.
//!
//! It samples the CPUs' clocks with their kernel's call chains (`perf_event_open(2)`), which needs no hardware
//! counters, and so works in emulated VMs. It takes root, and a kernel with `PERF_EVENTS`.

mod symbols;

use perf_event::{Builder, SampleFlag, Sampler, events::Software};
use std::{
    io,
    process::{Child, Command, ExitCode, ExitStatus},
    thread,
    time::Duration,
};
use symbols::Symbols;

const USAGE: &str =
    "farfault-profile COMMAND [ARGUMENT…]: where the kernel spends its time while COMMAND runs";
/// Samples a second, of each CPU.
const FREQUENCY: u64 = 1000;
/// Bytes of the buffer of each CPU.
const BUFFER: usize = 1 << 20;
const PAUSE: Duration = Duration::from_millis(20);
/// The kernel's half of the addresses.
const KERNEL: u64 = 1 << 63;
/// Markers in a call chain, that are no addresses: `PERF_CONTEXT_*`.
const FIRST_MARKER: u64 = 0u64.wrapping_sub(4095);
/// Records with one sample: its address, and its call chain with the length before it.
const SAMPLE: u32 = 9;
/// Records that tell how many did not fit into the buffer: a number, and that.
const LOST: u32 = 2;
/// What an idle CPU runs.
const IDLE: &str = "do_idle";
const SELF_LINES: usize = 20;
const WITH_CALLEES_LINES: usize = 60;

/// Why it failed, for the last line.
type Failure = Box<dyn std::error::Error>;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let Some((program, arguments)) = arguments.split_first() else {
        eprintln!("{USAGE}");
        return ExitCode::from(2);
    };
    match profile(Command::new(program).args(arguments)) {
        Ok(code) => code,
        Err(why) => {
            eprintln!("farfault-profile: {why}");
            ExitCode::FAILURE
        }
    }
}

/// Samples while the command runs, then prints. Ends as the command did.
fn profile(command: &mut Command) -> Result<ExitCode, Failure> {
    let symbols = Symbols::of_the_kernel()?;
    let mut samplers = samplers()?;
    let mut profile = Profile::new(&symbols);
    let mut child = command
        .spawn()
        .map_err(|error| format!("{}: {error}", command.get_program().to_string_lossy()))?;
    let watched = profile.watch(&mut child, &mut samplers);
    if watched.is_err() {
        // It would go on without anyone.
        let _ = child.kill();
    }
    let status = watched?;
    profile.print();
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    Ok(code.map_or(ExitCode::FAILURE, ExitCode::from))
}

/// One for each CPU, under way.
fn samplers() -> Result<Vec<Sampler>, Failure> {
    let cpus = thread::available_parallelism()?.get();
    let sampler = |cpu| -> io::Result<Sampler> {
        let mut counter = Builder::new(Software::CPU_CLOCK)
            .any_pid()
            .one_cpu(cpu)
            .include_kernel()
            .exclude_callchain_user(true)
            .sample_frequency(FREQUENCY)
            .sample(SampleFlag::IP | SampleFlag::CALLCHAIN)
            .build()?;
        counter.enable()?;
        counter.sampled(BUFFER)
    };
    let samplers: io::Result<Vec<_>> = (0..cpus).map(sampler).collect();
    samplers.map_err(|error| {
        format!("the CPUs' clocks cannot be sampled: {error}; it takes root and a kernel with PERF_EVENTS").into()
    })
}

/// Samples, counted.
struct Profile<'a> {
    symbols: &'a Symbols,
    counts: Vec<Count>,
    samples: u64,
    idle: u64,
    user: u64,
    lost: u64,
}

/// Of one function.
#[derive(Clone, Default)]
struct Count {
    /// Samples of the function itself.
    alone: u64,
    /// And of what it called.
    with_callees: u64,
    /// The last sample that was counted: one that recurses counts once.
    last: u64,
}

impl<'a> Profile<'a> {
    fn new(symbols: &'a Symbols) -> Self {
        Self {
            symbols,
            counts: vec![Count::default(); symbols.len()],
            samples: 0,
            idle: 0,
            user: 0,
            lost: 0,
        }
    }

    /// Takes samples until the process ends.
    fn watch(
        &mut self,
        child: &mut Child,
        samplers: &mut [Sampler],
    ) -> Result<ExitStatus, Failure> {
        loop {
            let status = child.try_wait()?;
            for sampler in samplers.iter_mut() {
                self.drain(sampler);
            }
            match status {
                Some(status) => return Ok(status),
                None => thread::sleep(PAUSE),
            }
        }
    }

    fn drain(&mut self, sampler: &mut Sampler) {
        while let Some(record) = sampler.next_record() {
            let bytes = record.to_contiguous();
            let words = bytes
                .chunks_exact(8)
                .filter_map(|word| word.try_into().ok());
            let words: Vec<u64> = words.map(u64::from_ne_bytes).collect();
            match (record.ty(), words.as_slice()) {
                (SAMPLE, [at, count, chain @ ..]) => {
                    let count = usize::try_from(*count).unwrap_or(usize::MAX);
                    self.take(*at, chain.get(..count).unwrap_or(chain));
                }
                (LOST, [_, lost, ..]) => self.lost += lost,
                _ => {}
            }
        }
    }

    /// Counts one sample: where it was, and who had called that.
    fn take(&mut self, at: u64, chain: &[u64]) {
        self.samples += 1;
        if at < KERNEL {
            self.user += 1;
            return;
        }
        let callers = chain
            .iter()
            .filter(|&&a| (KERNEL..FIRST_MARKER).contains(&a));
        let functions: Vec<usize> = std::iter::once(&at)
            .chain(callers)
            .filter_map(|&address| self.symbols.index(address))
            .collect();
        if functions.iter().any(|&f| self.symbols.name(f) == IDLE) {
            self.idle += 1;
            return;
        }
        for (depth, &function) in functions.iter().enumerate() {
            let count = &mut self.counts[function];
            count.alone += u64::from(depth == 0);
            count.with_callees += u64::from(count.last != self.samples);
            count.last = self.samples;
        }
    }

    fn print(&self) {
        let busy = self.samples - self.idle;
        println!(
            "{} samples: {} of idle CPUs, {} of programs, {} of the kernel; {} lost",
            self.samples,
            self.idle,
            self.user,
            busy - self.user,
            self.lost
        );
        println!("percent of those that were not idle:");
        self.table("by itself", busy, SELF_LINES, |count| count.alone);
        self.table("with what it calls", busy, WITH_CALLEES_LINES, |count| {
            count.with_callees
        });
    }

    fn table(&self, title: &str, busy: u64, lines: usize, of: impl Fn(&Count) -> u64) {
        println!("\n{title}");
        let mut functions: Vec<usize> = (0..self.counts.len()).collect();
        functions.sort_by_key(|&function| std::cmp::Reverse(of(&self.counts[function])));
        for function in functions.into_iter().take(lines) {
            let samples = of(&self.counts[function]);
            if samples != 0 {
                let percent = samples as f64 * 100.0 / busy as f64;
                println!("{percent:7.2}  {}", self.symbols.shown(function));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIST: &str = "\
ffffffff81000000 T first
ffffffff81000100 t second
ffffffff81000200 t do_idle
ffffffffc0000000 t third\t[farfault]
";

    #[test]
    fn take_counts_callers_once_and_leaves_idle_cpus_and_programs_out() {
        let symbols = Symbols::parse(LIST);
        let mut profile = Profile::new(&symbols);
        // Called by itself, and by `first`; markers are no functions.
        profile.take(
            0xffff_ffff_c000_0010,
            &[
                FIRST_MARKER + 5,
                0xffff_ffff_c000_0020,
                0xffff_ffff_8100_0001,
            ],
        );
        profile.take(0xffff_ffff_8100_0110, &[0xffff_ffff_8100_0201]);
        profile.take(0x40_0000, &[]);
        assert_eq!((profile.samples, profile.idle, profile.user), (3, 1, 1));
        let of = |name| {
            let function = (0..symbols.len())
                .find(|&f| symbols.name(f) == name)
                .unwrap();
            let count = &profile.counts[function];
            (count.alone, count.with_callees)
        };
        assert_eq!(of("third"), (1, 1));
        assert_eq!(of("first"), (0, 1));
        assert_eq!(of("second"), (0, 0));
    }
}
