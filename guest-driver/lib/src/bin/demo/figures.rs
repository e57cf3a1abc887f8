// SPDX-License-Identifier: MIT OR Apache-2.0
//! Figures as people read them.

use std::time::Duration;

/// `0`, `4 KiB`, `8.0 MiB`.
pub(crate) fn bytes(bytes: u64) -> String {
    const KIB: u64 = 1 << 10;
    const MIB: u64 = 1 << 20;
    match bytes {
        0 => "0".to_owned(),
        1..KIB => format!("{bytes} B"),
        KIB..MIB if bytes % KIB == 0 => format!("{} KiB", bytes / KIB),
        _ => format!("{:.1} MiB", bytes as f64 / MIB as f64),
    }
}

/// `512.0 MiB/s`; nothing if no time has passed.
pub(crate) fn rate(amount: u64, time: Duration) -> Option<String> {
    let seconds = time.as_secs_f64();
    (seconds > 0.0).then(|| format!("{:.1} MiB/s", amount as f64 / f64::from(1 << 20) / seconds))
}

/// `3.2 ms`.
pub(crate) fn time(time: Duration) -> String {
    format!("{:.1} ms", time.as_secs_f64() * 1e3)
}

/// `1 page`, `2 pages`.
pub(crate) fn count(number: u64, thing: &str) -> String {
    let plural = if number == 1 { "" } else { "s" };
    format!("{number} {thing}{plural}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_of_each_size_have_their_unit() {
        assert_eq!(bytes(0), "0");
        assert_eq!(bytes(8), "8 B");
        assert_eq!(bytes(16 << 10), "16 KiB");
        assert_eq!(bytes(8 << 20), "8.0 MiB");
        assert_eq!(bytes((1 << 20) + (1 << 19)), "1.5 MiB");
    }

    #[test]
    fn rate_without_time_is_none() {
        assert_eq!(rate(1 << 20, Duration::ZERO), None);
        assert_eq!(
            rate(1 << 20, Duration::from_millis(500)),
            Some("2.0 MiB/s".to_owned())
        );
    }

    #[test]
    fn count_of_one_is_singular() {
        assert_eq!(
            (count(1, "fault"), count(0, "fault")),
            ("1 fault".into(), "0 faults".into())
        );
    }
}
