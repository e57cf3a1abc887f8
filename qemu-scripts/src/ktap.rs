// SPDX-License-Identifier: MIT OR Apache-2.0
//! KTAP, the kernel's test output: counting the results of one program of the kernel's selftests.
//!
//! Reads the top level only: the selftests' harness nests nothing.

use std::{fmt, ops::AddAssign};

/// How many tests ended how.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Counts {
    /// `ok`, and failures that the suite expects.
    pub passed: u64,
    /// `not ok`, and tests that were planned and have no result.
    pub failed: u64,
    /// `ok … # SKIP`.
    pub skipped: u64,
}

impl Counts {
    /// Counts the results in a program's output.
    #[must_use]
    pub fn of(output: &str) -> Self {
        let mut counts = Self::default();
        let mut planned = 0;
        for line in output.lines() {
            planned = plan(line).unwrap_or(planned);
            match result(line) {
                Some(Verdict::Passed) => counts.passed += 1,
                Some(Verdict::Failed) => counts.failed += 1,
                Some(Verdict::Skipped) => counts.skipped += 1,
                None => {}
            }
        }
        // A suite that dies says nothing of the tests that it did not get to.
        let results = counts.passed + counts.failed + counts.skipped;
        counts.failed += u64::saturating_sub(planned, results);
        counts
    }

    /// Did something pass, and nothing fail?
    #[must_use]
    pub fn is_success(&self) -> bool {
        self.failed == 0 && self.passed > 0
    }
}

impl AddAssign for Counts {
    fn add_assign(&mut self, more: Self) {
        self.passed += more.passed;
        self.failed += more.failed;
        self.skipped += more.skipped;
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            passed,
            failed,
            skipped,
        } = self;
        write!(f, "{passed} passed, {failed} failed, {skipped} skipped")
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Passed,
    Failed,
    Skipped,
}

/// `1..N`: how many results there will be.
fn plan(line: &str) -> Option<u64> {
    line.trim_end().strip_prefix("1..")?.parse().ok()
}

/// `ok NUMBER NAME # DIRECTIVE …`, or `not ok …`. What a test itself prints goes to the same stream, so a result is only
/// what has a number.
fn result(line: &str) -> Option<Verdict> {
    let (ok, rest) = match line.strip_prefix("not ok ") {
        Some(rest) => (false, rest),
        None => (true, line.strip_prefix("ok ")?),
    };
    let (number, rest) = rest.trim_end().split_once(' ').unwrap_or((rest, ""));
    number.trim_end().parse::<u64>().ok()?;
    let directive = rest
        .split_once(" # ")
        .and_then(|(_, directive)| directive.split_whitespace().next());
    Some(match (directive, ok) {
        (Some("SKIP"), _) => Verdict::Skipped,
        (_, true) => Verdict::Passed,
        (_, false) => Verdict::Failed,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As the suite prints it, cut down.
    const OUTPUT: &str = "\
TAP version 13
1..5
# Starting 5 tests from 3 test cases.
#  RUN           hmm.hmm_device_private.benchmark_thp_migration ...

=== Single THP Size (2.0 MB) ===
ok, this line is the test's own
                     | With THP        | Without THP     | Improvement
#            OK  hmm.hmm_device_private.benchmark_thp_migration
ok 1 hmm.hmm_device_private.benchmark_thp_migration
#  RUN           hmm.hmm_device_private.exclusive ...
# hmm-tests.c:1770:exclusive:Expected ret (-16) == 0 (0)
# exclusive: Test terminated by assertion
#          FAIL  hmm.hmm_device_private.exclusive
not ok 2 hmm.hmm_device_private.exclusive
#      SKIP      Skipping test, could not find gup_test driver
#            OK  hmm.hmm_device_private.hmm_gup_test
ok 3 hmm.hmm_device_private.hmm_gup_test # SKIP Skipping test, could not find gup_test driver
ok 4 hmm.hmm_device_coherent.open_close # SKIP DEVICE_COHERENT not available
ok 5 hmm.hmm_device_private.open_close # XFAIL
# FAILED: 4 / 5 tests passed.
# Totals: pass:2 fail:1 xfail:0 xpass:0 skip:2 error:0
";

    const COUNTS: Counts = Counts {
        passed: 2,
        failed: 1,
        skipped: 2,
    };

    #[test]
    fn counts_of_an_output_are_its_results() {
        assert_eq!(Counts::of(OUTPUT), COUNTS);
        assert_eq!(COUNTS.to_string(), "2 passed, 1 failed, 2 skipped");
    }

    #[test]
    fn counts_of_an_output_by_way_of_a_terminal_are_the_same() {
        assert_eq!(Counts::of(&OUTPUT.replace('\n', "\r\n")), COUNTS);
    }

    #[test]
    fn counts_of_an_output_cut_short_have_the_missing_results_as_failures() {
        let cut = OUTPUT.split_inclusive("gup_test ...").next().unwrap();
        let (cut, _) = cut.split_once("ok 3").unwrap();
        assert_eq!(
            Counts::of(cut),
            Counts {
                passed: 1,
                failed: 4,
                skipped: 0
            }
        );
    }

    #[test]
    fn counts_without_a_passed_test_are_no_success() {
        assert!(!Counts::of("TAP version 13\n1..0\n").is_success());
        assert!(!Counts::of("1..1\nok 1 x # SKIP y\n").is_success());
        assert!(!Counts::of("1..2\nok 1 x\n").is_success());
        assert!(Counts::of("1..1\nok 1 x\n").is_success());
    }
}
