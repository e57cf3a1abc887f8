// SPDX-License-Identifier: MIT OR Apache-2.0
//! Limits how often a message is logged, for what a guest can trigger as often as it likes.
//!
//! A limiter belongs to one place that logs. What it held back is counted and told with the next
//! message that passes.

use parking_lot::Mutex;
use std::time::{Duration, Instant};

/// Messages that pass in one [`PERIOD`].
const BURST: u32 = 5;
/// How long a burst counts.
const PERIOD: Duration = Duration::from_secs(5);

/// What the log names as the source of these messages.
const TARGET: &str = "farfault_device::guest";

/// Decides which messages pass.
#[derive(Debug, Default)]
pub(crate) struct RateLimit(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    since: Option<Instant>,
    passed: u32,
    suppressed: u64,
}

impl RateLimit {
    /// Logs a warning, unless there were too many of late. `message` is only called if it passes.
    pub(crate) fn warn(&self, message: impl FnOnce() -> String) {
        match self.admit(Instant::now()) {
            None => {}
            Some(0) => log::warn!(target: TARGET, "{}", message()),
            Some(n) => {
                log::warn!(target: TARGET, "{} ({n} more like this were not logged)", message());
            }
        }
    }

    /// Whether a message may pass at `now`: if so, how many were held back since the last one.
    fn admit(&self, now: Instant) -> Option<u64> {
        let mut state = self.0.lock();
        if state
            .since
            .is_none_or(|since| now.saturating_duration_since(since) >= PERIOD)
        {
            state.since = Some(now);
            state.passed = 0;
        }
        if state.passed == BURST {
            state.suppressed += 1;
            return None;
        }
        state.passed += 1;
        Some(std::mem::take(&mut state.suppressed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn burst_beyond_the_limit_is_counted_and_told_later() {
        let limit = RateLimit::default();
        let start = Instant::now();
        for _ in 0..BURST {
            assert_eq!(limit.admit(start), Some(0));
        }
        assert_eq!(limit.admit(start), None);
        assert_eq!(limit.admit(start), None);
        assert_eq!(limit.admit(start + PERIOD), Some(2));
        assert_eq!(limit.admit(start + PERIOD), Some(0));
    }
}
