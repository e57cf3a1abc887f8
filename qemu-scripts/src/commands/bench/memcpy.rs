// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the host's CPU needs to copy memory: one thread, memory that is there already.

use std::{
    hint::black_box,
    time::{Duration, Instant},
};

const SAMPLES: usize = 3;

pub(super) fn samples(bytes: usize) -> Vec<Duration> {
    let source = vec![1u8; bytes];
    let mut destination = vec![2u8; bytes];
    let sample = |_| {
        let start = Instant::now();
        black_box(&mut destination).copy_from_slice(black_box(&source));
        start.elapsed()
    };
    (0..SAMPLES).map(sample).collect()
}
