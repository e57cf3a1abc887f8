// SPDX-License-Identifier: MIT OR Apache-2.0
//! The event queue: faults, ends of jobs and errors, with more or fewer buffers than they need, and
//! all answers to faults. Manual, chapters 6 and 8.

use crate::{
    command::{Control, Job},
    machine::Machine,
    number::Small,
};
use arbitrary::{Arbitrary, Unstructured};

#[derive(Arbitrary, Debug)]
enum Step {
    Launch(Job),
    /// A request that answers faults, ends jobs or contexts, or changes the tables.
    Answer(Control),
    CancelAll,
    /// As many buffers as a driver might post, or absurdly many.
    Post(Small),
    /// A broken chain of this queue.
    Broken(u16),
    Work(u8),
    Take,
    Finish(u8),
}

/// Runs it.
pub fn run(data: &[u8]) {
    let Ok(steps) = Vec::<Step>::arbitrary_take_rest(Unstructured::new(data)) else {
        return;
    };
    let mut machine = Machine::new();
    for step in steps {
        match step {
            Step::Launch(job) => machine.submit(&job.bytes()),
            Step::Answer(command) => machine.control(&command.bytes()),
            Step::CancelAll => machine.cancel_all(),
            Step::Post(count) => machine.post(count.0),
            Step::Broken(queue) => machine.report_broken(queue),
            Step::Work(count) => {
                for _ in 0..count % 32 {
                    machine.take();
                    machine.finish(0);
                }
            }
            Step::Take => machine.take(),
            Step::Finish(which) => machine.finish(which.into()),
        }
    }
    machine.settle();
}
