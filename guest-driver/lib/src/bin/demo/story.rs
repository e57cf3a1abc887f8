// SPDX-License-Identifier: MIT OR Apache-2.0
//! The steps of the demo, in the order in which a newcomer understands them.

use crate::{
    Failure, figures,
    map::{self, Census},
    memory::{self, Memory},
    options::Options,
    terminal::Terminal,
};
use farfault::{
    Advice, Gpu, HUGE_PAGE_SIZE, Launch, PAGE_SIZE, PageState, Pages, Place, Stats, pagemap,
    process::{self, Ended},
};
use std::{
    io::{Read, Write},
    os::unix::net::UnixStream,
    time::{Duration, Instant},
};

/// Data of the steps that fit into VRAM.
const SMALL: usize = 8 << 20;

/// Data of the last step where twice the VRAM would be too much.
const LARGE: usize = 64 << 20;
const LARGEST: usize = 512 << 20;

/// How often the map is taken again while driver and pagemap disagree: a page may be on its way.
const LOOKS: u32 = 20;
const LOOK_PAUSE: Duration = Duration::from_millis(10);

/// How long parent and child wait for each other.
const CHILD_TIMEOUT: Duration = Duration::from_secs(60);

/// A pattern that no other step writes.
const PATTERN: u64 = 0xfa12_fa01_7fa1_2fa0;

pub(crate) struct Story<'a> {
    gpu: Gpu,
    terminal: &'a Terminal,
    step: u32,
    /// Counts and time when the step began.
    before: Stats,
    began: Instant,
}

impl<'a> Story<'a> {
    /// Runs all steps, and fails with the first thing that is not as it should be.
    pub(crate) fn tell(options: &Options, terminal: &'a Terminal) -> Result<(), Failure> {
        let gpu = match &options.device {
            Some(path) => Gpu::open(path)?,
            None => Gpu::open_first()?,
        };
        let vram = usize::try_from(gpu.info().vram_size)?;
        let mut story = Self {
            before: gpu.stats()?,
            gpu,
            terminal,
            step: 0,
            began: Instant::now(),
        };
        story.introduce(vram);

        let small = SMALL.min((vram / 2).next_multiple_of(HUGE_PAGE_SIZE));
        let mut memory = story.cpu_writes(small)?;
        story.gpu_sums(&memory)?;
        story.cpu_reads_a_quarter(&memory)?;
        story.gpu_writes(&mut memory)?;
        story.cpu_reads_all(&memory)?;
        story.moves_on_request(&memory)?;
        story.maps_without_moving(&memory)?;
        story.forks(&mut memory)?;
        drop(memory);
        story.overfills(large(options.size_mib, vram), vram)?;
        story.conclude()
    }

    fn introduce(&self, vram: usize) {
        println!(
            "{}",
            self.terminal.bold("Farfault: one memory for CPU and GPU")
        );
        let text = format!(
            "This process has memory from malloc. A GPU with {} of memory of its own (VRAM) will \
             work on it, by the very same pointers. Nobody copies: pages move when somebody \
             touches them. Each map shows where they are now.",
            figures::bytes(vram as u64)
        );
        println!("{}", self.terminal.wrap(&text, 0));
    }

    fn cpu_writes(&mut self, bytes: usize) -> Result<Memory, Failure> {
        self.begin(
            &format!("The CPU writes {}", figures::bytes(bytes as u64)),
            "Fresh memory, a different number in each word. It is in RAM, and the GPU knows \
             nothing of it.",
        )?;
        let memory = Memory::written_by_cpu(bytes);
        let census = self.show(memory.pages())?;
        expect(census.ram == memory.pages().count(), "all of it is in RAM")?;
        self.checked("written once, and once more for the oracle, which the GPU never sees");
        Ok(memory)
    }

    fn gpu_sums(&mut self, memory: &Memory) -> Result<(), Failure> {
        self.begin(
            "The GPU sums it",
            "It gets a pointer. Its first touch of each page faults, the driver moves the page to \
             VRAM, and the GPU goes on where it stopped.",
        )?;
        let sum = self.gpu.sum(&memory.data)?;
        let census = self.show(memory.pages())?;
        self.expect_faults_of_gpu()?;
        expect_mostly_vram(&census, memory.pages())?;
        memory.check_sum(sum)?;
        self.checked(&format!("the sum {sum:#018x} is what the CPU computed"));
        Ok(())
    }

    fn cpu_reads_a_quarter(&mut self, memory: &Memory) -> Result<(), Failure> {
        self.begin(
            "The CPU reads the first quarter",
            "Its page tables say that these pages are not there. It faults, and they come home. \
             The others stay.",
        )?;
        let quarter = memory.data.len() / 4;
        memory::compare(&memory.data[..quarter], &memory.expected[..quarter])?;
        let census = self.show(memory.pages())?;
        let stats = self.since()?;
        expect(stats.cpu_faults > 0, "the CPU faults on pages in VRAM")?;
        let home = census.ram + census.ram_mapped;
        expect(
            home >= memory.pages().count() / 4,
            "a quarter of the pages is home",
        )?;
        expect(
            census.vram > 0,
            "pages that nobody touched are still in VRAM",
        )?;
        self.checked("each word that was read is right");
        Ok(())
    }

    fn gpu_writes(&mut self, memory: &mut Memory) -> Result<(), Failure> {
        self.begin(
            "The GPU writes, two jobs at once",
            "One adds 5 to the first three quarters, the other fills the last quarter. What came \
             home is moved again.",
        )?;
        let split = memory.data.len() / 4 * 3;
        let (first, last) = memory.data.split_at_mut(split);
        self.gpu.scope(|scope| {
            let add = scope.launch(Launch::add(first, 5))?;
            let fill = scope.launch(Launch::fill(last, PATTERN))?;
            add.wait()?;
            fill.wait()
        })?;
        let (first, last) = memory.expected.split_at_mut(split);
        first
            .iter_mut()
            .for_each(|word| *word = word.wrapping_add(5));
        last.fill(PATTERN);
        let census = self.show(memory.pages())?;
        self.expect_faults_of_gpu()?;
        expect_mostly_vram(&census, memory.pages())?;
        memory.check_sum(self.gpu.sum(&memory.data)?)?;
        self.checked("the GPU's sum of it is what the CPU computed; the next step reads each word");
        Ok(())
    }

    fn cpu_reads_all(&mut self, memory: &Memory) -> Result<(), Failure> {
        self.begin("The CPU reads all of it", "Everything comes home.")?;
        memory.check()?;
        let census = self.show(memory.pages())?;
        expect(census.vram == 0, "nothing that was read is in VRAM")?;
        expect(
            self.since()?.cpu_faults > 0,
            "the CPU faults on pages in VRAM",
        )?;
        self.checked("each word is what the GPU should have written");
        Ok(())
    }

    fn moves_on_request(&mut self, memory: &Memory) -> Result<(), Failure> {
        self.begin(
            "Pages move on request, too",
            "A program that knows what comes next need not wait for faults: all of it to VRAM, and \
             the second half back.",
        )?;
        let size = memory.pages().length() as u64;
        let half = &memory.data[memory.data.len() / 2..];
        let up = Instant::now();
        let moved = self.gpu.migrate(memory.pages(), Place::Vram)?;
        let up = up.elapsed();
        let down = Instant::now();
        self.gpu.migrate(half, Place::Ram)?;
        let down = down.elapsed();
        let census = self.show(memory.pages())?;
        let stayed = usize::try_from(moved.stayed)?;
        let half = memory.pages().count() / 2;
        expect(moved.moved > 0, "pages move to VRAM")?;
        expect(census.vram <= half, "the second half is in RAM")?;
        expect(
            census.vram + stayed >= half,
            "the first half is in VRAM, but for pages that stay",
        )?;
        if let (Some(up), Some(down)) = (figures::rate(size, up), figures::rate(size / 2, down)) {
            self.say(
                "request",
                &format!("{up} to VRAM, {down} back, as the program sees it"),
            );
        }
        memory.check_sum(self.gpu.sum(&memory.data)?)?;
        self.checked("the GPU's sum is still right");
        Ok(())
    }

    fn maps_without_moving(&mut self, memory: &Memory) -> Result<(), Failure> {
        self.begin(
            "Or they stay, and the GPU comes to them",
            "For the first half the program says \"map only\": the GPU reads it in RAM, over the \
             bus. The second half moves as before.",
        )?;
        let half = &memory.data[..memory.data.len() / 2];
        self.gpu.migrate(memory.pages(), Place::Ram)?;
        self.gpu.advise(half, Advice::MapOnly)?;
        let sum = self.gpu.sum(&memory.data)?;
        let census = self.show(memory.pages())?;
        self.gpu.advise(half, Advice::Default)?;
        let half = Pages::covering(half).count();
        expect(
            census.ram_mapped >= half,
            "the GPU has the first half mapped in RAM",
        )?;
        expect(census.vram > 0, "the second half moves to VRAM")?;
        memory.check_sum(sum)?;
        self.checked(&format!("the sum {sum:#018x} is what the CPU computed"));
        Ok(())
    }

    fn forks(&mut self, memory: &mut Memory) -> Result<(), Failure> {
        self.begin(
            "The process forks",
            "Pages are in RAM and in VRAM. The child shares them until somebody writes. It \
             overwrites its first half; then the GPU adds 3 to all of the parent's.",
        )?;
        let (mut here, there) = UnixStream::pair()?;
        here.set_read_timeout(Some(CHILD_TIMEOUT))?;
        there.set_read_timeout(Some(CHILD_TIMEOUT))?;
        // What is buffered now would be written by both.
        std::io::stdout().flush()?;
        let child = process::fork(|| child(there, &mut memory.data, &memory.expected))?;
        let mut written = [0];
        let childs_turn = here.read_exact(&mut written);
        if childs_turn.is_ok() {
            memory.check_sum(self.gpu.sum(&memory.data)?)?;
            self.gpu.add(&mut memory.data, 3)?;
            memory
                .expected
                .iter_mut()
                .for_each(|word| *word = word.wrapping_add(3));
            here.write_all(&[1])?;
        }
        // A child that failed early says so by its exit code.
        child_verdict(child.wait()?)?;
        childs_turn?;
        let census = self.show(memory.pages())?;
        // What the child still shared when the GPU wrote was copied, and where to is the driver's.
        expect(census.vram > 0, "what only the parent has is in VRAM")?;
        memory.check()?;
        self.checked("the parent has what its GPU wrote, the child had what it wrote itself");
        Ok(())
    }

    fn overfills(&mut self, bytes: usize, vram: usize) -> Result<(), Failure> {
        let over = bytes > vram;
        let text = if over {
            "The GPU adds 7 to all of it. When VRAM is full, the pages that it has not used for \
             longest go home to make room."
        } else {
            "VRAM holds all of it: give the VM less (--vram 32M) to see pages go home to make room."
        };
        let size = figures::bytes(bytes as u64);
        self.begin(
            &format!("{size} in {} of VRAM", figures::bytes(vram as u64)),
            text,
        )?;
        let mut memory = Memory::written_by_cpu(bytes);
        self.gpu.add(&mut memory.data, 7)?;
        memory
            .expected
            .iter_mut()
            .for_each(|word| *word = word.wrapping_add(7));
        let census = self.show(memory.pages())?;
        let stats = self.since()?;
        expect(census.vram > 0, "pages move to VRAM")?;
        expect(
            census.vram * PAGE_SIZE <= vram,
            "no more is in VRAM than it holds",
        )?;
        if over {
            expect(stats.pages_evicted > 0, "pages go home to make room")?;
        }
        memory.check_sum(self.gpu.sum(&memory.data)?)?;
        memory.check()?;
        self.checked("the GPU's sum is right, and then each word, read by the CPU");
        Ok(())
    }

    fn conclude(&self) -> Result<(), Failure> {
        let stats = self.gpu.stats()?;
        println!("\n{}", self.terminal.bold("In all"));
        self.say_stats(&stats, self.gpu.stats()?.jobs);
        expect(stats.gpu_faults_failed == 0, "no fault of the GPU fails")?;
        println!();
        Ok(())
    }

    /// Heading and text of a step. Counts and time start here.
    fn begin(&mut self, title: &str, text: &str) -> Result<(), Failure> {
        self.step += 1;
        let title = format!("{}. {title}", self.step);
        println!("\n{}", self.terminal.bold(&title));
        println!("{}\n", self.terminal.wrap(text, 2));
        self.before = self.gpu.stats()?;
        self.began = Instant::now();
        Ok(())
    }

    /// The map of a range, and what has happened since the step began.
    fn show(&self, pages: Pages) -> Result<Census, Failure> {
        let took = self.began.elapsed();
        let stats = self.since()?;
        let states = self.look(pages)?;
        for line in map::render(self.terminal, pages, &states) {
            println!("{line}");
        }
        self.say_stats(&stats, stats.jobs);
        self.say("time", &figures::time(took));
        Ok(Census::of(&states))
    }

    fn say_stats(&self, stats: &Stats, jobs: u64) {
        let of_gpu = stats.gpu_faults;
        let of_cpu = stats.cpu_faults;
        let jobs = figures::count(jobs, "job");
        self.say(
            "faults",
            &format!("{of_gpu} of the GPU in {jobs}, {of_cpu} of the CPU"),
        );
        let size = |pages: u64| pages.saturating_mul(PAGE_SIZE as u64);
        let both = size(stats.pages_to_vram.saturating_add(stats.pages_to_ram));
        let rate = figures::rate(both, Duration::from_nanos(stats.migrate_ns));
        let rate = rate.filter(|_| both > 0);
        self.say(
            "moved",
            &format!(
                "{} to VRAM, {} to RAM ({} to make room){}",
                figures::bytes(size(stats.pages_to_vram)),
                figures::bytes(size(stats.pages_to_ram)),
                figures::bytes(size(stats.pages_evicted)),
                rate.map_or(String::new(), |rate| format!(", {rate}")),
            ),
        );
    }

    fn say(&self, what: &str, text: &str) {
        println!("  {what:<10}  {text}");
    }

    fn checked(&self, text: &str) {
        println!("  {:<10}  {} {text}", "data", self.terminal.good("right:"));
    }

    /// Where the pages are, by the driver; pagemap must agree.
    fn look(&self, pages: Pages) -> Result<Vec<PageState>, Failure> {
        let mut problem = String::new();
        for _ in 0..LOOKS {
            let states = self.gpu.query(pages)?;
            let entries = pagemap::read(pages)?;
            match pagemap::disagreement(pages, &states, &entries) {
                None => return Ok(states),
                Some(found) => problem = found,
            }
            std::thread::sleep(LOOK_PAUSE);
        }
        Err(format!("the map is not true: {problem}").into())
    }

    fn since(&self) -> Result<Stats, Failure> {
        Ok(difference(&self.gpu.stats()?, &self.before))
    }

    fn expect_faults_of_gpu(&self) -> Result<(), Failure> {
        expect(
            self.since()?.gpu_faults > 0,
            "the GPU faults on pages that it has not got",
        )
    }
}

/// The life of the child: its exit code says at which point something was wrong.
fn child(mut parent: UnixStream, data: &mut [u64], expected: &[u64]) -> u8 {
    if memory::compare(data, expected).is_err() {
        return 1;
    }
    let half = data.len() / 2;
    data[..half].iter_mut().for_each(|word| *word = !*word);
    let told = parent
        .write_all(&[1])
        .and_then(|()| parent.read_exact(&mut [0]));
    if told.is_err() {
        return 2;
    }
    let own = data[..half]
        .iter()
        .zip(expected)
        .all(|(word, before)| *word == !before);
    if !own {
        return 3;
    }
    if memory::compare(&data[half..], &expected[half..]).is_err() {
        return 4;
    }
    0
}

fn child_verdict(ended: Ended) -> Result<(), Failure> {
    let problem = match ended {
        Ended::Exited(0) => return Ok(()),
        Ended::Exited(1) => "the child did not find the parent's data",
        Ended::Exited(2) => "the child heard nothing from its parent",
        Ended::Exited(3) => "the child's own writes were lost",
        Ended::Exited(4) => "the child saw what the GPU wrote to its parent's memory",
        Ended::Exited(_) => "the child panicked",
        Ended::Signaled(signal) => return Err(format!("signal {signal} killed the child").into()),
    };
    Err(problem.into())
}

fn expect(holds: bool, what: &str) -> Result<(), Failure> {
    if holds {
        return Ok(());
    }
    Err(format!("it should be so that {what}, and it is not").into())
}

/// A few pages may be unable to move; that is no error, but it is not the rule either.
fn expect_mostly_vram(census: &Census, pages: Pages) -> Result<(), Failure> {
    expect(census.vram > pages.count() / 2, "most pages are in VRAM")
}

/// Size of the data for the last step.
fn large(size_mib: Option<usize>, vram: usize) -> usize {
    match size_mib {
        Some(mib) => mib << 20,
        None if vram.saturating_mul(2) <= LARGEST => (vram * 2).max(LARGE),
        None => LARGE,
    }
}

fn difference(now: &Stats, before: &Stats) -> Stats {
    Stats {
        gpu_faults: now.gpu_faults.saturating_sub(before.gpu_faults),
        gpu_faults_failed: now
            .gpu_faults_failed
            .saturating_sub(before.gpu_faults_failed),
        cpu_faults: now.cpu_faults.saturating_sub(before.cpu_faults),
        pages_to_vram: now.pages_to_vram.saturating_sub(before.pages_to_vram),
        pages_to_ram: now.pages_to_ram.saturating_sub(before.pages_to_ram),
        pages_evicted: now.pages_evicted.saturating_sub(before.pages_evicted),
        pages_mapped: now.pages_mapped.saturating_sub(before.pages_mapped),
        invalidations: now.invalidations.saturating_sub(before.invalidations),
        migrate_ns: now.migrate_ns.saturating_sub(before.migrate_ns),
        jobs: now.jobs.saturating_sub(before.jobs),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_by_default_is_twice_the_vram_within_limits() {
        assert_eq!(large(None, 32 << 20), 64 << 20);
        assert_eq!(large(None, 8 << 20), 64 << 20);
        assert_eq!(large(None, 128 << 20), 256 << 20);
        assert_eq!(large(None, 1 << 30), 64 << 20);
        assert_eq!(large(Some(3), 1 << 30), 3 << 20);
    }

    #[test]
    fn child_with_right_data_and_a_parent_that_answers_exits_with_zero() {
        let (mut parent, there) = UnixStream::pair().unwrap();
        parent.write_all(&[1]).unwrap();
        let mut data = [1, 2, 3, 4];
        assert_eq!(child(there, &mut data, &[1, 2, 3, 4]), 0);
        assert_eq!(data, [!1, !2, 3, 4]);
    }

    #[test]
    fn child_with_wrong_data_or_no_parent_says_so() {
        let (parent, there) = UnixStream::pair().unwrap();
        assert_eq!(child(there.try_clone().unwrap(), &mut [1, 2], &[1, 3]), 1);
        drop(parent);
        assert_eq!(child(there, &mut [1, 2], &[1, 2]), 2);
    }

    #[test]
    fn child_verdict_of_each_end_is_its_reason() {
        assert!(child_verdict(Ended::Exited(0)).is_ok());
        let text = |ended| child_verdict(ended).unwrap_err().to_string();
        assert!(text(Ended::Exited(4)).contains("what the GPU wrote"));
        assert!(text(Ended::Signaled(7)).contains("signal 7"));
        assert!(text(Ended::Exited(101)).contains("panicked"));
    }
}
