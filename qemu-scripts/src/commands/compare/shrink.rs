// SPDX-License-Identifier: MIT OR Apache-2.0
//! Makes a script that shows a difference shorter: steps are left out, fewer and fewer at a time, as long as the drivers
//! still answer differently. Each round runs all its attempts on one driver, then on the other.

use super::{Machine, Run, Script, Side};

/// No script needs more.
const MAX_ROUNDS: usize = 60;

/// The steps of a transcript that are left.
pub(super) fn shrink(
    machine: &mut Machine,
    transcript: Vec<String>,
) -> anyhow::Result<Vec<String>> {
    let step = |line: &String| line.split(" -> ").next().unwrap_or_default().to_owned();
    let mut steps: Vec<String> = transcript.iter().map(step).collect();
    let mut left_out = steps.len().div_ceil(2);
    for _ in 0..MAX_ROUNDS {
        let attempts: Vec<_> = (0..steps.len())
            .step_by(left_out)
            .map(|first| without(&steps, |index| (first..first + left_out).contains(&index)))
            .collect();
        let differ = differ(machine, &attempts)?;
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
        let works = self::differ(machine, std::slice::from_ref(&together))?;
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
fn differ(machine: &mut Machine, attempts: &[Vec<String>]) -> anyhow::Result<Vec<bool>> {
    let scripts = attempts.iter().enumerate().map(|(number, lines)| Script {
        name: format!("attempt {number}"),
        run: Run::Lines(lines.clone()),
        repeat: String::new(),
    });
    let scripts: Vec<_> = scripts.collect();
    let mock = machine.transcripts(&scripts, Side::Mock)?;
    let ours = machine.transcripts(&scripts, Side::Ours)?;
    let pairs = mock.iter().zip(&ours);
    Ok(pairs.map(|(mock, ours)| mock != ours).collect())
}
