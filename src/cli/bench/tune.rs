//! `lamina bench tune`: which variants are the fastest here, kept for every later run.

use std::path::PathBuf;

use pollster::block_on;
use serde::Serialize;

use super::super::{check, print};
use super::tables::rows;
use super::{COLD, Output, Progress, Size, UNCHECKED};
use crate::bench::{clock, tune};
use crate::gpu::tuned::{self, Tuned};
use crate::gpu::{Device, Options, Selector};
use crate::{Error, Result};

#[derive(Debug, clap::Args)]
pub struct TuneBench {
    /// Kernels to measure [default: all that have several variants here]
    #[arg(value_name = "KERNEL")]
    kernels: Vec<String>,
    /// Remove what was measured on this adapter
    #[arg(long, conflicts_with_all = ["kernels", "mib", "json", "markdown"])]
    forget: bool,
    #[command(flatten)]
    size: Size,
    #[command(flatten)]
    output: Output,
}

#[derive(Serialize)]
struct Kept {
    /// Where the choices are; `null` where there are none.
    file: Option<PathBuf>,
    #[serde(flatten)]
    results: tune::Results,
}

impl TuneBench {
    pub fn run(&self, selector: &Selector) -> Result<u8> {
        let kernels = check::named("KERNEL", &self.kernels)?;
        let device = block_on(Device::open(selector, &Options { tuned: false, ..UNCHECKED }))?;
        clock::refuse(&device)?;
        let caps = device.caps();
        if self.forget {
            let (path, was) = tuned::forget(caps)?;
            print(&format!("{} {}\n", if was { "removed" } else { "there was no" }, path.display()))?;
            return Ok(0);
        }
        let (clock, ceilings) = block_on(self.size.measure(&device))?;
        let (progress, cold, today) = (Progress::default(), COLD[usize::from(caps.is_software())], today());
        let measured = tune::measure(&device, &clock, &kernels, cold, &today, |done, total| progress.show(done, total));
        let results = block_on(measured);
        progress.end();
        let results = results?;
        if results.tuned.is_empty() && results.failed.is_empty() {
            let expected = format!("one with several variants on {}", caps.label());
            let found = results.skipped.first().map_or_else(|| self.kernels.join(" "), |left| left.why.clone());
            return Err(Error::Usage { what: "KERNEL".into(), expected, found });
        }
        let file = if results.tuned.is_empty() { None } else { Some(tuned::save(caps, &results.tuned)?) };
        let code = u8::from(!results.failed.is_empty());
        self.output.print(&device, clock, ceilings, Kept { file, results }, text)?;
        Ok(code)
    }
}

fn text(kept: &Kept, markdown: bool) -> String {
    let line = |tuned: &Tuned| {
        let others: Vec<String> = tuned.others().iter().map(|(name, times)| format!("{times:.2}x {name}")).collect();
        let change = if tuned.variant == tuned.untuned { "as before".into() } else { format!("not {}", tuned.untuned) };
        vec![tuned.kernel.clone(), tuned.variant.clone(), others.join(", "), change, tuned.class.clone()]
    };
    let lines: Vec<Vec<String>> = kept.results.tuned.iter().map(line).collect();
    let header = ["kernel", "taken", "the others take", "change", "for"];
    let mut text = if lines.is_empty() { String::new() } else { rows(&header, &lines, markdown) };
    for (what, left) in [("Failed its check", &kept.results.failed), ("Skipped", &kept.results.skipped)] {
        for left in left {
            text += &format!("{what}: {}, {}: {}\n", left.kernel, left.case, left.why);
        }
    }
    if let Some(file) = &kept.file {
        text += &format!("Every later run takes these variants: they are in {}\n", file.display());
    }
    text
}

/// The day by UTC, as year-month-day.
fn today() -> String {
    jiff::Timestamp::now().strftime("%Y-%m-%d").to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_says_what_is_taken_what_it_beat_and_what_failed() {
        let shares = [("portable", 1.0), ("subgroup", 0.4), ("narrow", 0.6)];
        let tuned = |untuned: &str| Tuned {
            kernel: "gemv".into(),
            class: "Spec".into(),
            variant: "subgroup".into(),
            untuned: untuned.into(),
            shares: shares.map(|(name, share)| (name.to_string(), share)).into(),
            date: "2026-11-26".into(),
        };
        let left = tune::Left { kernel: "sample", case: "greedy".into(), why: "one id is off".into() };
        let (tuned, failed) = (vec![tuned("portable"), tuned("subgroup")], vec![left]);
        let results = tune::Results { tuned, failed, ..tune::Results::default() };
        let text = text(&Kept { file: Some("/cache/tuned.json".into()), results }, true);
        assert!(text.contains("| gemv | subgroup | 2.50x portable, 1.50x narrow | not portable | Spec |"), "{text}");
        assert!(text.contains("| as before | Spec |"), "{text}");
        assert!(text.contains("Failed its check: sample, greedy: one id is off\n"), "{text}");
        assert!(text.ends_with("they are in /cache/tuned.json\n"), "{text}");
    }
}
