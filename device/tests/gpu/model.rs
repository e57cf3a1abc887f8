// SPDX-License-Identifier: MIT OR Apache-2.0
//! Random lives of a small driver against a model of what its processes must see, with the TLB and
//! without: data, results, faults, accessed and dirty bits.

use crate::rig::*;
use farfault_device::gpu::Settings;
use farfault_protocol::{
    address::VramAddr,
    command::Status,
    event::JobStatus,
    pte::Location,
    submit::{CopyAperture, CopyRun, Kernel},
};
use proptest::{collection::vec, prelude::*};

const CONTEXTS: u32 = 3;
const PAGES: u64 = 12;
const WORDS: u64 = PAGES * 512;
const VA: u64 = 0x7fff_ffff_0000;

/// What the process allows at a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd)]
enum Allowed {
    Nothing,
    Reads,
    Writes,
}

/// A job over words of the process, some of which mean nothing to some kernels.
#[derive(Clone, Copy, Debug)]
struct Job {
    context: u32,
    kernel: usize,
    start: u64,
    words: u64,
    from: u64,
    value: u64,
    waves: u32,
}

#[derive(Clone, Debug)]
enum Op {
    /// munmap, mprotect, mmap: says what is allowed and drops the mapping.
    Protect {
        context: u32,
        page: u64,
        allowed: Allowed,
    },
    /// Moves the page between VRAM and RAM.
    Migrate {
        context: u32,
        page: u64,
    },
    /// Forgets who used what.
    Harvest {
        context: u32,
    },
    Job(Job),
}

fn op() -> impl Strategy<Value = Op> {
    let allowed = prop_oneof![
        1 => Just(Allowed::Nothing), 2 => Just(Allowed::Reads), 5 => Just(Allowed::Writes)];
    prop_oneof![
        2 => (0..CONTEXTS, 0..PAGES, allowed)
            .prop_map(|(context, page, allowed)| Op::Protect { context, page, allowed }),
        2 => (0..CONTEXTS, 0..PAGES).prop_map(|(context, page)| Op::Migrate { context, page }),
        1 => (0..CONTEXTS).prop_map(|context| Op::Harvest { context }),
        5 => (0..CONTEXTS, 0..6usize, 0..WORDS, 1..1500u64, 0..WORDS, any::<u64>(), 1..9u32)
            .prop_map(|(context, kernel, start, words, from, value, waves)| {
                let words = words.min(WORDS - start).min(WORDS - from);
                Op::Job(Job { context, kernel, start, words, from, value, waves })
            }),
    ]
}

/// The driver's and the model's idea of one page.
#[derive(Clone)]
struct Page {
    allowed: Allowed,
    at: Location,
    /// A free place in the other memory.
    other: Location,
    words: Vec<u64>,
}

struct World {
    rig: Rig,
    spaces: Vec<Vec<Page>>,
    /// All that the guest saw, to be compared between worlds.
    log: Vec<String>,
    next_fence: u64,
}

impl World {
    fn new(tlb: bool) -> Self {
        let mut rig = Rig::with(Settings {
            tlb,
            ..Settings::new(VRAM)
        });
        // Few, for overflow to happen.
        rig.gpu.post_event_buffers(3);
        let spaces = (0..CONTEXTS).map(|context| {
            rig.create_context(context);
            let pages = (0..PAGES).map(|page| {
                let number = u64::from(context) * PAGES + page;
                Page {
                    allowed: Allowed::Writes,
                    at: system(number * PAGE),
                    other: vram(number * PAGE),
                    words: vec![0; 512],
                }
            });
            pages.collect()
        });
        let spaces = spaces.collect();
        Self {
            rig,
            spaces,
            log: Vec::new(),
            next_fence: 0,
        }
    }

    fn page(&mut self, context: u32, page: u64) -> &mut Page {
        &mut self.spaces[context as usize][page as usize]
    }

    fn drop_mapping(&mut self, context: u32, page: u64) {
        self.rig.unmap(context, VA + page * PAGE, 1);
        self.rig
            .control_ok(&invalidate(context, VA + page * PAGE, PAGE));
    }

    fn apply(&mut self, op: &Op) {
        match *op {
            Op::Protect {
                context,
                page,
                allowed,
            } => {
                self.page(context, page).allowed = allowed;
                self.drop_mapping(context, page);
            }
            Op::Migrate { context, page } => {
                self.drop_mapping(context, page);
                let p = self.page(context, page);
                let run = run(p.at, p.other);
                std::mem::swap(&mut p.at, &mut p.other);
                assert_eq!(self.rig.copy(&[run]), (Status::Ok, 0));
            }
            Op::Harvest { context } => {
                let count = self
                    .rig
                    .control_ok(&harvest(context, VA, PAGES as u32))
                    .value;
                self.log.push(format!("harvested {count}"));
            }
            Op::Job(job) => self.job(job),
        }
    }

    fn job(&mut self, job: Job) {
        let Job {
            context,
            kernel,
            start,
            words,
            from,
            value,
            waves,
        } = job;
        let (to_va, from_va) = (VA + start * 8, VA + from * 8);
        let copies = from + words <= start || start + words <= from;
        self.next_fence += 1;
        let fence = self.next_fence;
        let (kernel, arguments, length, waves) = match kernel {
            0 => (Kernel::Fill, vec![to_va, words * 8, value], words, waves),
            1 if copies => (Kernel::Copy, vec![to_va, from_va, words * 8], words, waves),
            2 => (Kernel::Add, vec![to_va, words * 8, value], words, waves),
            3 => (Kernel::AtomicAdd, vec![to_va, value, words], 1, waves),
            4 => (Kernel::CompareAndSwap, vec![to_va, 0, value], 1, 1),
            _ => (Kernel::Sum, vec![to_va, words * 8], words, waves),
        };
        self.rig.launch(context, fence, kernel, &arguments, waves);
        let (status, result, bad_page) = self.serve(fence);
        self.log
            .push(format!("{kernel:?} {status:?} {result} {bad_page:x}"));

        let before: Vec<u64> = self.words(context);
        let mut after = before.clone();
        let range = start as usize..(start + length) as usize;
        let mut expected = 0u64;
        match kernel {
            Kernel::Fill => after[range.clone()].fill(value),
            Kernel::Copy => {
                after.copy_within(from as usize..(from + words) as usize, start as usize);
            }
            Kernel::Add => after[range.clone()]
                .iter_mut()
                .for_each(|w| *w = w.wrapping_add(value)),
            Kernel::AtomicAdd => {
                let times = words.wrapping_mul(u64::from(waves));
                after[start as usize] =
                    before[start as usize].wrapping_add(value.wrapping_mul(times));
            }
            Kernel::CompareAndSwap => {
                expected = before[start as usize];
                if expected == 0 {
                    after[start as usize] = value;
                }
            }
            _ => {
                expected = before[range.clone()]
                    .iter()
                    .fold(0, |a, b| a.wrapping_add(*b))
            }
        }
        let stores = kernel != Kernel::Sum;
        let needs = |page: u64| {
            let touches =
                |start: u64, length: u64| start / 512 <= page && page <= (start + length - 1) / 512;
            if touches(start, length) {
                if stores {
                    Allowed::Writes
                } else {
                    Allowed::Reads
                }
            } else if kernel == Kernel::Copy && touches(from, words) {
                Allowed::Reads
            } else {
                Allowed::Nothing
            }
        };
        let pages = self.spaces[context as usize].iter().zip(0..);
        let denied: Vec<u64> = pages
            .filter(|(own, page)| own.allowed < needs(*page))
            .map(|(_, page)| VA + page * PAGE)
            .collect();
        if denied.is_empty() {
            assert_eq!(status, JobStatus::Ok);
            if kernel != Kernel::AtomicAdd {
                assert_eq!(result, expected, "{kernel:?}");
            } else if waves == 1 {
                assert_eq!(result, after[start as usize].wrapping_sub(value));
            }
            self.set_words(context, &after);
            self.check(context, None);
        } else {
            assert_eq!((status, result), (JobStatus::Fault, 0));
            assert!(denied.contains(&bad_page), "{bad_page:x} is allowed");
            self.check(context, Some((before, after)));
        }
    }

    /// Lets the GPU work and resolves or cancels faults, until the job has ended.
    fn serve(&mut self, fence: u64) -> (JobStatus, u64, u64) {
        for _ in 0..2000 {
            self.rig.run();
            for event in self.rig.take_events() {
                self.rig.gpu.post_event_buffers(1);
                match event {
                    Event::Fence(event) => {
                        assert_eq!(event.fence.get(), fence);
                        let status = JobStatus::from_raw(event.status.get()).unwrap();
                        return (status, event.result.get(), event.page.get());
                    }
                    Event::Error(error) => {
                        self.log.push(format!("lost {}", error.detail.get()));
                        for context in 0..CONTEXTS {
                            self.rig.control_ok(&replay(context, 0));
                        }
                    }
                    Event::Fault(fault) => {
                        let context = fault.header.context.get();
                        let va = fault.page.get();
                        self.log.push(format!("fault {fault:?}"));
                        let page = self.page(context, (va - VA) / PAGE).clone();
                        let wanted = if fault.access == 1 {
                            Allowed::Reads
                        } else {
                            Allowed::Writes
                        };
                        let sequence = fault.sequence.get();
                        if page.allowed < wanted {
                            self.rig.control_ok(&cancel(context, sequence));
                            continue;
                        }
                        let flags = if page.allowed == Allowed::Writes {
                            RW
                        } else {
                            0
                        };
                        self.rig.map(context, va, page.at, 1, flags);
                        self.rig.control_ok(&replay(context, sequence));
                    }
                }
            }
        }
        panic!("the job did not end");
    }

    fn words(&self, context: u32) -> Vec<u64> {
        let pages = &self.spaces[context as usize];
        pages
            .iter()
            .flat_map(|page| page.words.iter().copied())
            .collect()
    }

    fn set_words(&mut self, context: u32, words: &[u64]) {
        for (page, words) in self.spaces[context as usize]
            .iter_mut()
            .zip(words.chunks(512))
        {
            page.words.copy_from_slice(words);
        }
    }

    /// Memory is as the model has it; after a failed job each word is as before or after.
    fn check(&mut self, context: u32, either: Option<(Vec<u64>, Vec<u64>)>) {
        let scratch = 20 * MIB;
        let runs: Vec<_> = (0..PAGES)
            .map(|page| run(self.page(context, page).at, system(scratch + page * PAGE)))
            .collect();
        assert_eq!(self.rig.copy(&runs), (Status::Ok, 0));
        let now = self.rig.ram_words(scratch, WORDS);
        match either {
            None => assert!(now == self.words(context), "memory is not as expected"),
            Some((before, after)) => {
                let torn = now
                    .iter()
                    .zip(before.iter().zip(&after))
                    .any(|(n, (b, a))| n != b && n != a);
                // Additions by several waves may have been done in part.
                assert!(!torn || self.log.last().is_some_and(|l| l.starts_with("AtomicAdd")));
                self.set_words(context, &now);
            }
        }
    }

    /// Everything that a driver can see in the page tables.
    fn leaves(&mut self) -> Vec<Vec<u64>> {
        (0..CONTEXTS)
            .map(|context| {
                self.rig
                    .control_ok(&read_ptes(context, VA, PAGES as u32))
                    .data
            })
            .collect()
    }
}

fn run(from: Location, to: Location) -> CopyRun {
    let parts = |at| match at {
        Location::Vram(a) => (a.get(), CopyAperture::Vram),
        Location::System(a) => (a.get(), CopyAperture::System),
    };
    let (from, to) = (parts(from), parts(to));
    let mut run = CopyRun::fill(from.0, VramAddr::new(to.0), PAGE as u32);
    run.source_aperture = from.1.raw();
    run.destination_aperture = to.1.raw();
    run
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, cases: 96, ..ProptestConfig::default() })]

    #[test]
    fn random_lives_see_what_the_model_sees_with_and_without_tlb(ops in vec(op(), 1..50)) {
        let mut with = World::new(true);
        let mut without = World::new(false);
        for op in &ops {
            with.apply(op);
            without.apply(op);
            prop_assert_eq!(with.leaves(), without.leaves(), "accessed and dirty bits");
        }
        prop_assert_eq!(&with.log, &without.log);
        prop_assert!(with.rig.gpu.is_idle() && without.rig.gpu.is_idle());
        for stats in [without.rig.gpu.stats().compute_mmu, without.rig.gpu.stats().copy_mmu] {
            prop_assert_eq!(stats.hits, 0);
        }
        for context in 0..CONTEXTS {
            with.check(context, None);
            with.rig.control_ok(&destroy_context(context));
        }
        prop_assert!(with.rig.gpu.tlb().is_empty() && with.rig.gpu.jobs().is_empty());
    }
}
