// SPDX-License-Identifier: MIT OR Apache-2.0
//! Makes a script that shows a difference shorter: steps are left out, fewer and fewer at a time, as long as the drivers
//! still answer differently. Each round runs all its attempts on one driver, then on the other.

use xtask::vm::Vm;

use super::{Script, Side, put_script, transcripts_of};

/// No script needs more.
const MAX_ROUNDS: usize = 60;

/// The steps of a transcript that are left.
pub(super) fn shrink(
    vm: &mut Vm,
    transcript: Vec<String>,
    faults: bool,
) -> anyhow::Result<Vec<String>> {
    let step = |line: &String| line.split(" -> ").next().unwrap_or_default().to_owned();
    let mut steps: Vec<String> = transcript.iter().map(step).collect();
    let mut left_out = steps.len().div_ceil(2);
    for _ in 0..MAX_ROUNDS {
        let attempts: Vec<_> = (0..steps.len())
            .step_by(left_out)
            .map(|first| without(&steps, |index| (first..first + left_out).contains(&index)))
            .collect();
        let differ = differ(vm, &attempts, faults)?;
        let needed = |index: usize| !differ.get(index / left_out).copied().unwrap_or_default();
        let Some(first) = differ.iter().position(|differ| *differ) else {
            if left_out == 1 {
                break;
            }
            left_out = left_out.div_ceil(2);
            continue;
        };
        // Often all that can be left out alone can be left out together.
        let together = without(&steps, |index| !needed(index));
        let works = self::differ(vm, std::slice::from_ref(&together), faults)?;
        steps = match (works.first(), attempts.into_iter().nth(first)) {
            (Some(false), Some(attempt)) => attempt,
            _ => together,
        };
        left_out = left_out.min(steps.len().max(1));
    }
    Ok(steps)
}

fn without(steps: &[String], left_out: impl Fn(usize) -> bool) -> Vec<String> {
    let steps = steps.iter().enumerate();
    let kept = steps.filter(|(index, _)| !left_out(*index));
    kept.map(|(_, step)| step.clone()).collect()
}

/// Which of these scripts show a difference.
fn differ(vm: &mut Vm, attempts: &[Vec<String>], faults: bool) -> anyhow::Result<Vec<bool>> {
    let mut scripts = Vec::new();
    for (number, attempt) in attempts.iter().enumerate() {
        scripts.push(Script {
            name: format!("attempt {number}"),
            command: put_script(vm, number, attempt)?,
            repeat: String::new(),
        });
    }
    let mock = transcripts_of(vm, &scripts, Side::Mock, faults)?;
    let ours = transcripts_of(vm, &scripts, Side::Ours, faults)?;
    Ok(mock
        .iter()
        .zip(&ours)
        .map(|(mock, ours)| mock != ours)
        .collect())
}
