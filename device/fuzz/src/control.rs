// SPDX-License-Identifier: MIT OR Apache-2.0
//! The control queue: any requests, while jobs run and accesses are in flight. Manual, chapter 4.

use crate::{
    command::{Control, Job},
    machine::Machine,
};
use arbitrary::{Arbitrary, Unstructured};

#[derive(Arbitrary, Debug)]
enum Step {
    Request(Vec<Control>),
    Raw(Vec<u8>),
    /// A job, for there to be something that requests meet.
    Launch(Job),
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
    for step in steps {
        match step {
            Step::Request(commands) => {
                let bytes: Vec<Vec<u8>> = commands.iter().map(Control::bytes).collect();
                machine.control(&bytes.concat());
            }
            Step::Raw(bytes) => machine.control(&bytes),
            Step::Launch(job) => machine.submit(&job.bytes()),
            Step::Post(count) => machine.post(count.into()),
            Step::Take => machine.take(),
            Step::Finish(which) => machine.finish(which.into()),
            Step::Reset => machine.reset(),
        }
    }
    machine.settle();
}
