// SPDX-License-Identifier: MIT OR Apache-2.0
//! The configuration space: read and written anywhere. Manual, chapter 2.

use crate::{machine, number::Number};
use arbitrary::{Arbitrary, Unstructured};
use farfault_device::transport::local::Local;
use zerocopy::IntoBytes;

#[derive(Arbitrary, Debug)]
enum Step {
    Read { offset: Number, size: Number },
    Write { offset: Number, bytes: Vec<u8> },
}

/// Runs it.
pub fn run(data: &[u8]) {
    let Ok(steps) = Vec::<Step>::arbitrary_take_rest(Unstructured::new(data)) else {
        return;
    };
    let device = Local::new(machine::new_gpu()).expect("a device can be made");
    let whole = device.look(|gpu| gpu.config_space());
    for step in steps {
        match step {
            Step::Read { offset, size } => {
                let (offset, size) = (offset.0 as u32, size.0 as u32);
                let read = device.read_config(offset, size);
                let range = offset as usize..(offset as usize).saturating_add(size as usize);
                let expected = whole.as_bytes().get(range).unwrap_or_default();
                assert_eq!(read, expected, "{size} bytes at {offset}");
            }
            Step::Write { offset, bytes } => {
                let written = device.write_config(offset.0 as u32, &bytes);
                assert!(written.is_ok(), "an error would end the connection");
            }
        }
    }
    let size = size_of_val(&whole) as u32;
    assert_eq!(device.read_config(0, size), whole.as_bytes());
}
