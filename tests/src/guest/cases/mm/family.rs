// SPDX-License-Identifier: MIT OR Apache-2.0
//! A family on one memory: parent, child and grandchild, each with a GPU, which end in any order. Used by
//! groups that fork; what the members do is theirs to say.

use super::start::Start;
use crate::guest::child::code;
use anyhow::{Context, Result, bail, ensure};
use farfault::arena::Region;
use farfault::{
    Gpu,
    process::{Ended, fork},
};
use rustix::pipe::pipe;
use std::{
    fs::File,
    io::{Read, Write},
};

/// Orders in which a family can end: 0 is the parent, 2 the grandchild.
pub(super) const ORDERS: [[usize; 3]; 6] = [
    [0, 1, 2],
    [0, 2, 1],
    [1, 0, 2],
    [1, 2, 0],
    [2, 0, 1],
    [2, 1, 0],
];

/// A member's turn: the members have one after the other, then one of them ends, and so on.
#[derive(Clone, Copy, Debug)]
pub(super) struct Turn {
    pub(super) member: usize,
    /// How many members there are still.
    pub(super) alive: u8,
    /// How many turns this member had before.
    pub(super) before: u64,
}

/// An order to end; each other one is the number of members that are alive.
const END: u8 = 0;

/// A member does what its pipe says, and tells how that went.
fn serve(
    member: usize,
    mut orders: File,
    mut answers: &File,
    mut take: impl FnMut(&Gpu, Turn) -> Result<()>,
) -> Result<()> {
    let gpu = Gpu::open_first()?;
    for before in 0.. {
        let mut order = [END];
        orders.read_exact(&mut order)?;
        let [alive] = order;
        if alive == END {
            break;
        }
        let turn = Turn {
            member,
            alive,
            before,
        };
        let good = take(&gpu, turn).with_context(|| format!("{turn:?}"));
        // Who looks on ends when he is told.
        if let Err(error) = &good {
            eprintln!("{error:?}");
        }
        answers.write_all(&[u8::from(good.is_ok())])?;
        good?;
    }
    Ok(())
}

/// Parent, child and grandchild on a region of a start; they end in this order. The case itself only looks
/// on: it outlives all.
pub(super) fn family(
    start: Start,
    length: usize,
    order: [usize; 3],
    take: impl Fn(&Gpu, Region, Turn) -> Result<()>,
) -> Result<()> {
    let (first, to_first) = pipe()?;
    let (second, to_second) = pipe()?;
    let (third, to_third) = pipe()?;
    let orders = [to_first, to_second, to_third].map(File::from);
    let (answers, answer) = pipe()?;
    let (mut answers, answer) = (File::from(answers), File::from(answer));
    let parent = fork(|| {
        code((|| {
            let gpu = Gpu::open_first()?;
            let region = start.region(&gpu, length)?;
            let take = |gpu: &Gpu, turn: Turn| take(gpu, region, turn);
            let child = fork(|| {
                code((|| {
                    let grandchild = fork(|| code(serve(2, third.into(), &answer, take)))?;
                    serve(1, second.into(), &answer, take)?;
                    // It may live on: whoever ends is not waited for.
                    std::mem::forget(grandchild);
                    Ok(())
                })())
            })?;
            serve(0, first.into(), &answer, take)?;
            std::mem::forget(child);
            Ok(())
        })())
    })?;
    let mut alive = vec![0, 1, 2];
    let mut turns = |alive: &[usize]| -> Result<()> {
        for &member in alive {
            (&orders[member]).write_all(&[u8::try_from(alive.len())?])?;
            let mut good = [0];
            answers.read_exact(&mut good)?;
            ensure!(good == [1], "member {member} of {alive:?}");
        }
        Ok(())
    };
    turns(&alive)?;
    for ends in order {
        turns(&alive)?;
        (&orders[ends]).write_all(&[END])?;
        alive.retain(|&member| member != ends);
    }
    match parent.wait()? {
        Ended::Exited(0) => Ok(()),
        ended => bail!("the parent ended with {ended:?}"),
    }
}
