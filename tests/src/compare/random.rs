// SPDX-License-Identifier: MIT OR Apache-2.0
//! Scripts from a seed: two descriptors, a few areas of different kinds, and steps at random. The
//! same seed gives the same script, whatever the driver answers.

use rand_chacha::{
    ChaCha8Rng,
    rand_core::{RngCore, SeedableRng},
};

/// An area: its name, its pages, how it is mapped.
const AREAS: [(&str, u64, &str); 8] = [
    ("a", 24, "anon rw"),
    ("b", 1024, "anon rw"),
    ("c", 520, "anon rw"),
    ("d", 24, "anon r"),
    ("e", 16, "file-private rw"),
    ("f", 16, "file rw"),
    ("g", 16, "shared rw"),
    // Where others are moved to; there is nothing at first.
    ("h", 1024, ""),
];
/// How often each is chosen: most often the private ones, whose pages move.
const CHOICES: [usize; 14] = [0, 0, 0, 1, 1, 1, 1, 2, 2, 3, 4, 5, 6, 7];
/// Areas that may have huge pages.
const HUGE: [&str; 2] = ["b", "h"];
const BLOCK: u64 = 512;

/// Makes steps.
pub(super) struct Random {
    rng: ChaCha8Rng,
    started: bool,
    tag: u16,
    child: bool,
}

impl Random {
    pub(super) fn new(seed: u64) -> Self {
        Self {
            rng: ChaCha8Rng::seed_from_u64(seed),
            started: false,
            tag: 0,
            child: false,
        }
    }

    /// A number below a bound.
    fn below(&mut self, bound: u64) -> u64 {
        self.rng.next_u64() % bound
    }

    fn one_of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len() as u64) as usize]
    }

    fn tag(&mut self) -> u16 {
        self.tag = self.tag % 900 + 1;
        self.tag
    }

    /// Pages of an area: a few, or a block with its begin and end or nearly so, or any.
    fn range(&mut self, area: &str, pages: u64) -> String {
        let (first, count) = match self.below(4) {
            0 if pages >= BLOCK => (self.below(pages / BLOCK) * BLOCK, BLOCK),
            1 if pages >= BLOCK => {
                let first = self.below(pages / BLOCK) * BLOCK;
                (first + self.below(3), BLOCK - 4 + self.below(8))
            }
            2 => {
                let first = self.below(pages);
                (first, 1 + self.below(pages - first))
            }
            _ => (self.below(pages), 1 + self.below(8)),
        };
        format!("{area}+{first}:{count}")
    }

    fn any_range(&mut self) -> String {
        let (area, pages, _) = self.area();
        self.range(area, pages)
    }

    fn area(&mut self) -> (&'static str, u64, &'static str) {
        AREAS[self.one_of(&CHOICES)]
    }

    /// The next step, with what belongs to it.
    pub(super) fn step(&mut self) -> Vec<String> {
        if !std::mem::replace(&mut self.started, true) {
            return Self::start();
        }
        let range = self.any_range();
        let steps = match self.below(100) {
            0..50 => self.call(&range),
            50..62 => vec![format!("write {range} {}", self.tag())],
            62..70 => vec![format!("read {range}")],
            70..73 => vec![format!("kernel-write {range} {}", self.tag())],
            73..76 => vec![format!("kernel-read {range}")],
            76..80 => {
                let protection = self.one_of(&["none", "r", "rw", "rw"]);
                vec![format!("protect {range} {protection}")]
            }
            80..84 => {
                let advice = [
                    "dontneed",
                    "free",
                    "hugepage",
                    "nohugepage",
                    "populate-read",
                    "populate-write",
                ];
                vec![format!("advise {range} {}", self.one_of(&advice))]
            }
            84..88 => self.map_again(),
            88..91 => self.move_pages(),
            91..93 => vec![format!("d{} flags 0:1", self.below(2))],
            93..96 => self.with_child(),
            96..98 => vec![format!("lock {range}"), format!("unlock {range}")],
            98 => {
                let node = self.below(2);
                vec![format!("close d{node}"), format!("open d{node} {node}")]
            }
            _ => vec![format!("d{} release a:1", self.below(2))],
        };
        if self.below(8) == 0 {
            let range = self.any_range();
            let look = format!("d{} snapshot {range}", self.below(2));
            return [steps, vec![look]].concat();
        }
        steps
    }

    fn start() -> Vec<String> {
        let open = (0..2).map(|node| format!("open d{node} {node}"));
        let mapped = AREAS.iter().filter(|area| !area.2.is_empty());
        let map = mapped.map(|(area, pages, how)| format!("map {area}:{pages} {how}"));
        let advise = AREAS
            .iter()
            .filter(|(area, _, how)| HUGE.contains(area) && !how.is_empty())
            .map(|(area, pages, _)| format!("advise {area}:{pages} hugepage"));
        open.chain(map).chain(advise).collect()
    }

    fn call(&mut self, range: &str) -> Vec<String> {
        let node = self.below(2);
        let mut steps = Vec::new();
        let call = match self.below(100) {
            0..20 => "read".to_owned(),
            20..40 => format!("write {}", self.tag()),
            40..65 => "to-dev".to_owned(),
            65..77 => "to-sys".to_owned(),
            77..87 => "snapshot".to_owned(),
            87..95 => "exclusive".to_owned(),
            _ => "check".to_owned(),
        };
        // What is read or written is often brought home first: then there is nothing to skip.
        if (call == "read" || call.starts_with("write")) && self.below(2) == 0 {
            steps.push(format!("d{node} to-sys {range}"));
        }
        let mut words = call.split(' ');
        let verb = words.next().unwrap_or_default();
        let tag = words
            .next()
            .map_or_else(String::new, |tag| format!(" {tag}"));
        steps.push(format!("d{node} {verb} {range}{tag}"));
        // What was just moved is used.
        if verb == "to-dev" && self.below(2) == 0 {
            steps.push(format!("d{node} read {range}"));
        }
        if verb == "to-dev" && self.below(3) == 0 {
            steps.push(format!("d{node} write {range} {}", self.tag()));
        }
        steps
    }

    fn map_again(&mut self) -> Vec<String> {
        let (area, pages, how) = self.area();
        let range = self.range(area, pages);
        let mut steps = vec![format!("unmap {range}")];
        if self.below(3) != 0 {
            let how = if how.is_empty() { "anon rw" } else { how };
            steps.push(format!("map {range} {how}"));
            if HUGE.contains(&area) {
                steps.push(format!("advise {range} hugepage"));
            }
        }
        steps
    }

    /// Between the big areas, at the same place in 2 MiB or not.
    fn move_pages(&mut self) -> Vec<String> {
        let (from, to) = self.one_of(&[("b", "h"), ("h", "b"), ("c", "h"), ("a", "c")]);
        let first = self.below(2) * BLOCK * u64::from(from != "a" && from != "c");
        let count = self.one_of(&[1, 3, 8, 20, BLOCK]);
        let at = self.below(2) * BLOCK * u64::from(to != "c") + self.one_of(&[0, 0, 1, 4]);
        let verb = self.one_of(&["move", "move", "move-keep"]);
        vec![format!("{verb} {from}+{first}:{count} {to}+{at}")]
    }

    /// A child that looks, writes, perhaps has a descriptor of its own, and stays for a while.
    fn with_child(&mut self) -> Vec<String> {
        self.child = !self.child;
        if !self.child {
            let range = self.any_range();
            return vec![format!("c: read {range}"), "end c".to_owned()];
        }
        let mut steps = vec!["fork c".to_owned()];
        for _ in 0..self.below(4) {
            let range = self.any_range();
            let node = self.below(2);
            steps.push(match self.below(6) {
                0 | 1 => format!("c: write {range} {}", self.tag()),
                2 => format!("c: read {range}"),
                3 => format!("c: d{node} snapshot {range}"),
                4 => format!("c: unmap {range}"),
                _ => format!("c: kernel-read {range}"),
            });
        }
        if self.below(2) == 0 {
            let (node, range) = (self.below(2), self.any_range());
            let call = self.one_of(&["read", "to-dev", "exclusive", "snapshot"]);
            steps.push(format!("c: open n{node} {node}"));
            steps.push(format!("c: n{node} {call} {range}"));
        }
        steps
    }

    /// Shows everything, at the end.
    pub(super) fn end(&mut self) -> Vec<String> {
        let mut steps = Vec::new();
        if self.child {
            steps.push("end c".to_owned());
        }
        for (area, pages, _) in AREAS {
            for node in 0..2 {
                steps.push(format!("d{node} snapshot {area}:{pages}"));
            }
        }
        for (area, pages, _) in AREAS {
            steps.push(format!("kernel-read {area}:{pages}"));
        }
        steps
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compare::script::parse;

    #[test]
    fn steps_of_a_seed_are_always_the_same_and_can_be_parsed() {
        let script = |seed| {
            let mut random = Random::new(seed);
            let mut lines: Vec<String> = (0..500).flat_map(|_| random.step()).collect();
            lines.extend(random.end());
            lines
        };
        assert_eq!(script(7), script(7));
        assert_ne!(script(7), script(8));
        for line in script(7) {
            parse(&line).unwrap().unwrap();
        }
    }
}
