// SPDX-License-Identifier: MIT OR Apache-2.0
//! Scripts by hand. A file has a group of them; each begins with a line `= NAME`.

/// A script with a name.
#[derive(Clone, Copy, Debug)]
pub(super) struct Case {
    /// `group::what_it_looks_at`.
    pub(super) name: &'static str,
    pub(super) script: &'static str,
}

const GROUPS: [&str; 8] = [
    include_str!("arguments.txt"),
    include_str!("memory.txt"),
    include_str!("middle.txt"),
    include_str!("exclusive.txt"),
    include_str!("process.txt"),
    include_str!("devices.txt"),
    include_str!("huge.txt"),
    include_str!("vmalloc.txt"),
];

/// All of them.
pub(super) fn all() -> impl Iterator<Item = Case> {
    GROUPS.iter().flat_map(|group| {
        let cases = group.split("\n= ").skip(1);
        cases
            .filter_map(|case| case.split_once('\n'))
            .map(|(name, script)| Case { name, script })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compare::script::{Step, parse};
    use std::collections::HashSet;

    #[test]
    fn names_of_cases_are_unique_and_their_steps_can_be_parsed() {
        let mut names = HashSet::new();
        for case in all() {
            assert!(names.insert(case.name), "{} is there twice", case.name);
            assert!(case.name.contains("::") && !case.name.contains(' '));
            for line in case.script.lines() {
                // What follows `c: ` is a step, too; places of the kernel are not the same here.
                let mut line = line.to_owned();
                while let Ok(Some(parsed)) = parse(&line) {
                    match parsed.step {
                        Step::In { line: of_child, .. } => line = of_child,
                        _ => break,
                    }
                }
                parse(&line).unwrap_or_else(|error| panic!("{}: {error:#}", case.name));
            }
        }
        assert!(names.len() > 10);
    }
}
