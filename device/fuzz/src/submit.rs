// SPDX-License-Identifier: MIT OR Apache-2.0
//! The submit queue: any copies and launches. Manual, chapters 5 and 9.

use crate::{command::Submit, machine::Machine};
use arbitrary::{Arbitrary, Unstructured};

#[derive(Arbitrary, Debug)]
enum Step {
    Request(Submit),
    Raw(Vec<u8>),
    /// All faults are cancelled, so that jobs come to an end.
    Cancel,
    Post(u8),
    Take,
    Finish(u8),
    Reset,
}

/// Runs it.
pub fn run(data: &[u8]) {
    let Ok(steps) = Vec::<Step>::arbitrary_take_rest(Unstructured::new(data)) else {
        return;
    };
    let mut machine = Machine::new();
    machine.post(16);
    for step in steps {
        match step {
            Step::Request(command) => machine.submit(&command.bytes()),
            Step::Raw(bytes) => machine.submit(&bytes),
            Step::Cancel => machine.cancel_all(),
            Step::Post(count) => machine.post(count.into()),
            Step::Take => machine.take(),
            Step::Finish(which) => machine.finish(which.into()),
            Step::Reset => machine.reset(),
        }
    }
    machine.settle();
}
