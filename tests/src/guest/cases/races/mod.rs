// SPDX-License-Identifier: MIT OR Apache-2.0
//! Suite `races`: everything at the same time. A file for each of its parts; the first is made of the
//! oracle (`written`), the memory (`field`), the threads (`workers`, `torn`, `recycle`, `held`) and the
//! cases (`engine`).

mod beside;
mod engine;
mod field;
mod gpus;
mod held;
mod hostile;
mod kill;
mod oversubscription;
mod recheck;
mod recycle;
mod torn;
mod workers;
mod written;
mod zap;

use crate::guest::Case;

/// All groups of the suite.
pub(super) const GROUPS: &[&[Case]] = &[
    engine::CASES,
    gpus::two::CASES,
    gpus::eight::CASES,
    kill::CASES,
    hostile::one_gpu::CASES,
    hostile::mirrors::CASES,
    oversubscription::CASES,
    recheck::CASES,
    zap::CASES,
];
