// SPDX-License-Identifier: GPL-2.0
//! A list of physical copies while it is written (hardware manual, chapter 5).

use super::{batch::REQUEST_BYTES, Request};
use farfault_protocol::{
    command::CommandHeader,
    submit::{Copy, CopyAperture, CopyRun, Opcode, Reply},
};
use kernel::prelude::*;
use zerocopy::{FromBytes, IntoBytes};

/// Runs for [`super::Channel::copy`]; neighbours become one run.
pub(crate) struct CopyList {
    pub(super) request: Request,
    runs: usize,
    longest: u32,
}

impl CopyList {
    /// Room for `runs` runs. `longest` is the device's limit for one.
    pub(crate) fn new(runs: usize, longest: u32) -> Result<Self> {
        let bytes = size_of::<Copy>() + runs * size_of::<CopyRun>();
        if bytes > REQUEST_BYTES {
            return Err(E2BIG);
        }
        let mut list = Self {
            request: Request::new(bytes, size_of::<Reply>())?,
            runs: 0,
            longest,
        };
        let header = CommandHeader::new(Opcode::Copy.raw(), 0);
        let bytes = list.request.bytes()?;
        bytes.extend_from_slice(header.as_bytes(), GFP_KERNEL)?;
        Ok(list)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.runs == 0
    }

    fn last(&mut self) -> Option<CopyRun> {
        if self.runs == 0 {
            return None;
        }
        let bytes = self.request.bytes().ok()?;
        let at = bytes.len() - size_of::<CopyRun>();
        CopyRun::read_from_bytes(bytes.get(at..)?).ok()
    }

    /// Adds a run, or makes the last one longer.
    pub(crate) fn push(&mut self, run: CopyRun) -> Result {
        let longest = self.longest;
        let joined = self.last().and_then(|last| join(&last, &run, longest));
        let bytes = self.request.bytes()?;
        match joined {
            Some(joined) => {
                let at = bytes.len() - size_of::<CopyRun>();
                bytes.truncate(at);
                bytes.extend_from_slice(joined.as_bytes(), GFP_KERNEL)?;
            }
            None => {
                bytes.extend_from_slice(run.as_bytes(), GFP_KERNEL)?;
                self.runs += 1;
            }
        }
        let header = CommandHeader::new(Opcode::Copy.raw(), bytes.len() as u32);
        let slot = bytes.get_mut(..size_of::<CommandHeader>());
        slot.ok_or(EINVAL)?.copy_from_slice(header.as_bytes());
        Ok(())
    }
}

/// Both runs as one, if the second goes on where the first ends.
fn join(first: &CopyRun, second: &CopyRun, longest: u32) -> Option<CopyRun> {
    let length = first.length.get().checked_add(second.length.get())?;
    let pattern = first.source_aperture == CopyAperture::Pattern.raw();
    let source_follows = if pattern {
        first.source == second.source
    } else {
        first.source.get() + u64::from(first.length.get()) == second.source.get()
    };
    let follows = source_follows
        && first.source_aperture == second.source_aperture
        && first.destination_aperture == second.destination_aperture
        && first.destination.get() + u64::from(first.length.get()) == second.destination.get();
    (follows && length <= longest).then(|| CopyRun {
        length: length.into(),
        ..*first
    })
}
