// SPDX-License-Identifier: MIT OR Apache-2.0
//! From bytes to commands (manual, chapters 3 to 5): what the guest wrote is checked here as far as
//! it can be without a look at the GPU's state, and nothing else makes a command.
//!
//! A command is checked in this order: framing (`Malformed`), opcode (`UnknownCommand`), its size
//! and reserved fields (`Malformed`), then its values, each as the protocol says.

use super::{
    kernels::Plan,
    settings::Limits,
    work::{Piece, Source},
};
use farfault_protocol::{
    address::{GpuVa, PAGE_SIZE, SystemAddr, VramAddr},
    command::{CommandHeader, Status},
    control::{self, MAX_PTE_RUN, MAX_READ_PTES, PteRun},
    pte::{ENTRIES, ENTRY_SIZE, Location},
    submit::{self, CopyAperture, CopyRun, Kernel},
};
use zerocopy::{FromBytes, Immutable, KnownLayout};

/// A run of pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PageRange {
    pub(crate) context: u32,
    pub(crate) start: GpuVa,
    pub(crate) count: u32,
}

impl PageRange {
    pub(crate) fn length(&self) -> u64 {
        u64::from(self.count) * PAGE_SIZE
    }

    pub(crate) fn end(&self) -> u64 {
        self.start.get() + self.length()
    }
}

/// A command of the control queue.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Control<'a> {
    Nop,
    CreateContext {
        context: u32,
        root: VramAddr,
    },
    DestroyContext {
        context: u32,
    },
    WritePtes(&'a [PteRun]),
    Invalidate {
        context: u32,
        start: GpuVa,
        length: u64,
    },
    Replay {
        context: u32,
        through: u64,
    },
    Cancel {
        context: u32,
        sequence: u64,
    },
    ReadPtes(PageRange),
    HarvestAccessed(PageRange),
    KillJob {
        context: u32,
        fence: u64,
    },
    SetBusMasterWord(Option<SystemAddr>),
}

/// A command of the submit queue.
#[derive(Debug)]
pub(crate) enum Submit {
    Nop,
    Copy(Vec<Piece>),
    Launch {
        context: u32,
        fence: u64,
        plan: Plan,
    },
}

/// A command that is wrong, and which of its runs is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BadSubmit {
    pub(crate) status: Status,
    pub(crate) index: u32,
}

impl From<Status> for BadSubmit {
    fn from(status: Status) -> Self {
        Self { status, index: 0 }
    }
}

/// Splits the first command off: its opcode, its bytes, and the rest.
fn split(bytes: &[u8]) -> Result<(u16, &[u8], &[u8]), Status> {
    let (header, _) = CommandHeader::ref_from_prefix(bytes).map_err(|_| Status::Malformed)?;
    let length = header.length.get() as usize;
    if header.reserved.get() != 0 || length % 8 != 0 || length < size_of::<CommandHeader>() {
        return Err(Status::Malformed);
    }
    let (command, rest) = bytes.split_at_checked(length).ok_or(Status::Malformed)?;
    Ok((header.opcode.get(), command, rest))
}

/// A command of exactly this type.
fn exactly<T: FromBytes + Immutable + KnownLayout>(command: &[u8]) -> Result<&T, Status> {
    T::ref_from_bytes(command).map_err(|_| Status::Malformed)
}

/// The runs after a command's header: one at least.
fn runs<T: FromBytes + Immutable>(command: &[u8]) -> Result<&[T], Status> {
    let runs = command
        .get(size_of::<CommandHeader>()..)
        .ok_or(Status::Malformed)?;
    match <[T]>::ref_from_bytes(runs) {
        Ok(runs) if !runs.is_empty() => Ok(runs),
        _ => Err(Status::Malformed),
    }
}

fn reserved_zero(zero: bool) -> Result<(), Status> {
    if zero { Ok(()) } else { Err(Status::Malformed) }
}

/// The first command of the control queue in `bytes`, with its opcode, and what follows it.
pub(crate) fn parse_control(bytes: &[u8]) -> Result<(control::Opcode, Control<'_>, &[u8]), Status> {
    let (opcode, command, rest) = split(bytes)?;
    let opcode = control::Opcode::from_raw(opcode).ok_or(Status::UnknownCommand)?;
    let parsed = match opcode {
        control::Opcode::Nop => {
            exactly::<CommandHeader>(command)?;
            Control::Nop
        }
        control::Opcode::CreateContext => {
            let c: &control::CreateContext = exactly(command)?;
            reserved_zero(c.reserved.get() == 0)?;
            if !c.root.is_aligned(PAGE_SIZE) {
                return Err(Status::Misaligned);
            }
            Control::CreateContext {
                context: c.context.get(),
                root: c.root,
            }
        }
        control::Opcode::DestroyContext => {
            let c: &control::DestroyContext = exactly(command)?;
            reserved_zero(c.reserved.get() == 0)?;
            Control::DestroyContext {
                context: c.context.get(),
            }
        }
        control::Opcode::WritePtes => {
            let runs: &[PteRun] = runs(command)?;
            runs.iter().try_for_each(check_pte_run)?;
            Control::WritePtes(runs)
        }
        control::Opcode::Invalidate => {
            let c: &control::Invalidate = exactly(command)?;
            reserved_zero(c.reserved.get() == 0)?;
            check_virtual(c.start, c.length.get())?;
            Control::Invalidate {
                context: c.context.get(),
                start: c.start,
                length: c.length.get(),
            }
        }
        control::Opcode::Replay => {
            let c: &control::Replay = exactly(command)?;
            reserved_zero(c.reserved.get() == 0)?;
            Control::Replay {
                context: c.context.get(),
                through: c.through.get(),
            }
        }
        control::Opcode::Cancel => {
            let c: &control::Cancel = exactly(command)?;
            reserved_zero(c.reserved.get() == 0)?;
            Control::Cancel {
                context: c.context.get(),
                sequence: c.sequence.get(),
            }
        }
        control::Opcode::ReadPtes => {
            let c: &control::ReadPtes = exactly(command)?;
            Control::ReadPtes(page_range(c.context.get(), c.start, c.count.get())?)
        }
        control::Opcode::HarvestAccessed => {
            let c: &control::HarvestAccessed = exactly(command)?;
            Control::HarvestAccessed(page_range(c.context.get(), c.start, c.count.get())?)
        }
        control::Opcode::KillJob => {
            let c: &control::KillJob = exactly(command)?;
            reserved_zero(c.reserved.get() == 0)?;
            Control::KillJob {
                context: c.context.get(),
                fence: c.fence.get(),
            }
        }
        control::Opcode::SetBusMasterWord => {
            let c: &control::SetBusMasterWord = exactly(command)?;
            if !c.word.is_aligned(size_of::<u32>() as u64) {
                return Err(Status::Misaligned);
            }
            Control::SetBusMasterWord((c.word.get() != 0).then_some(c.word))
        }
    };
    Ok((opcode, parsed, rest))
}

fn check_pte_run(run: &PteRun) -> Result<(), Status> {
    reserved_zero(run.reserved.get() == 0)?;
    if !run.entry.is_aligned(ENTRY_SIZE) {
        return Err(Status::Misaligned);
    }
    let count = run.count.get();
    let first = run.entry.get() / ENTRY_SIZE % ENTRIES;
    if count == 0 {
        return Err(Status::BadArgument);
    }
    if count > MAX_PTE_RUN || first + u64::from(count) > ENTRIES {
        return Err(Status::LimitExceeded);
    }
    Ok(())
}

/// A range of whole pages that page tables can map, not empty.
fn check_virtual(start: GpuVa, length: u64) -> Result<(), Status> {
    if !start.is_aligned(PAGE_SIZE) || length % PAGE_SIZE != 0 {
        return Err(Status::Misaligned);
    }
    if length == 0 {
        return Err(Status::BadArgument);
    }
    match start.checked_add(length) {
        Some(end) if end.get() <= 1 << GpuVa::BITS => Ok(()),
        _ => Err(Status::BadAddress),
    }
}

fn page_range(context: u32, start: GpuVa, count: u32) -> Result<PageRange, Status> {
    if count > MAX_READ_PTES {
        return Err(Status::LimitExceeded);
    }
    check_virtual(start, u64::from(count) * PAGE_SIZE)?;
    Ok(PageRange {
        context,
        start,
        count,
    })
}

/// The one command of a request on the submit queue.
pub(crate) fn parse_submit(
    bytes: &[u8],
    limits: &Limits,
) -> Result<(submit::Opcode, Submit), BadSubmit> {
    let (opcode, command, rest) = split(bytes)?;
    let opcode = submit::Opcode::from_raw(opcode).ok_or(Status::UnknownCommand)?;
    reserved_zero(rest.is_empty())?;
    let parsed = match opcode {
        submit::Opcode::Nop => {
            exactly::<CommandHeader>(command)?;
            Submit::Nop
        }
        submit::Opcode::Copy => {
            let runs: &[CopyRun] = runs(command)?;
            let pieces = runs
                .iter()
                .zip(0..)
                .map(|(run, index)| {
                    copy_run(run, index, limits).map_err(|status| BadSubmit { status, index })
                })
                .collect::<Result<_, _>>()?;
            Submit::Copy(pieces)
        }
        submit::Opcode::Launch => {
            let c: &submit::Launch = exactly(command)?;
            reserved_zero(c.reserved.get() == 0)?;
            let kernel = Kernel::from_raw(c.kernel.get()).ok_or(Status::BadArgument)?;
            let waves = c.waves.get();
            if waves == 0 {
                return Err(Status::BadArgument.into());
            }
            if waves > limits.max_waves {
                return Err(Status::LimitExceeded.into());
            }
            Submit::Launch {
                context: c.context.get(),
                fence: c.fence.get(),
                plan: Plan::new(kernel, c.arguments.map(|argument| argument.get()), waves)?,
            }
        }
    };
    Ok((opcode, parsed))
}

fn copy_run(run: &CopyRun, index: u32, limits: &Limits) -> Result<Piece, Status> {
    reserved_zero(run.reserved == [0; 10])?;
    let length = run.length.get();
    if length == 0 {
        return Err(Status::BadArgument);
    }
    if length > limits.max_copy_run {
        return Err(Status::LimitExceeded);
    }
    let aperture = |raw| CopyAperture::from_raw(raw).ok_or(Status::BadArgument);
    let from = match aperture(run.source_aperture)? {
        CopyAperture::Pattern => {
            if run.destination.get() % 8 != 0 || length % 8 != 0 {
                return Err(Status::Misaligned);
            }
            Source::Pattern(run.source.get())
        }
        CopyAperture::Vram => Source::Memory(vram(run.source.get())),
        CopyAperture::System => Source::Memory(system(run.source.get())),
    };
    let to = match aperture(run.destination_aperture)? {
        CopyAperture::Pattern => return Err(Status::BadArgument),
        CopyAperture::Vram => vram(run.destination.get()),
        CopyAperture::System => system(run.destination.get()),
    };
    Ok(Piece {
        run: index,
        from,
        to,
        length: u64::from(length),
    })
}

fn vram(address: u64) -> Location {
    Location::Vram(VramAddr::new(address))
}

fn system(address: u64) -> Location {
    Location::System(SystemAddr::new(address))
}
