//! `lamina check`: every kernel on an adapter, against its twin.

use std::io::{IsTerminal, Write};

use super::{print, table};
use crate::check::Outcome;
use crate::check::report::{self, Report};
use crate::gpu::{Device, Options, Selector};
use crate::kernels::{ALL, Entry};
use crate::{Error, Result};

const AFTER_HELP: &str = "\
Each case makes seeded inputs, runs a kernel's variant on the adapter and its plain f64 twin on the
CPU, and compares row by row: NMSE, sum((found - expected)^2) / sum(expected^2), at most the
tolerance that follows from the dtype and the length of the sums. NaN fails.

Examples:
  lamina check                           all kernels on the best adapter
  lamina check --kernel add --json       one kernel, as JSON (docs/cli.md has its fields)
  lamina check --adapter 1 --full        all shapes there are, on adapter 1; for real GPUs

Exit codes: 0 all passed; 1 one failed; 2 the command line cannot be meant.";

/// Run every kernel on the adapter and compare it with its CPU twin
#[derive(Debug, clap::Args)]
#[command(after_help = AFTER_HELP)]
pub struct Args {
    /// Print one JSON object instead of a table
    #[arg(long)]
    json: bool,
    /// All combinations of the cases' parameters instead of all pairs; minutes on a GPU, hours on a
    /// CPU driver
    #[arg(long)]
    full: bool,
    /// Only this kernel; may be given several times [default: all]
    #[arg(long = "kernel", value_name = "NAME")]
    kernels: Vec<String>,
}

impl Args {
    /// Runs the cases and prints the report; 1 when one failed.
    pub fn run(&self, selector: &Selector) -> Result<u8> {
        let kernels = named("--kernel", &self.kernels)?;
        let device = pollster::block_on(Device::open(selector, &Options { matrix_units: true, ..Options::default() }))?;
        let (cases, dear) = report::select(&kernels, device.caps(), self.full);
        let (label, total, terminal) = (device.caps().label(), cases.len(), std::io::stderr().is_terminal());
        let mut stderr = std::io::stderr();
        let report = report::run(&device, cases, |done, kernel| {
            if terminal {
                // Progress that cannot be shown is not worth stopping for.
                let _ = write!(stderr, "\r\x1b[K{done}/{total} {kernel} on {label}");
            }
        });
        if terminal {
            let _ = write!(std::io::stderr(), "\r\x1b[K");
        }
        let report = report?;
        if self.json {
            print(&format!("{}\n", serde_json::to_string_pretty(&report).expect("plain data")))?;
        } else {
            print(&text(&report, dear))?;
        }
        Ok(report.exit_code())
    }
}

/// The kernels of those names, all of them when none is named. `what` is where they were named.
pub fn named(what: &str, names: &[String]) -> Result<Vec<&'static Entry>> {
    if names.is_empty() {
        return Ok(ALL.iter().collect());
    }
    let find = |name: &String| {
        ALL.iter().find(|entry| entry.name == name).ok_or_else(|| {
            let known: Vec<_> = ALL.iter().map(|entry| entry.name).collect();
            let expected = format!("one of {}", known.join(", "));
            Error::Usage { what: what.into(), expected, found: format!("'{name}'") }
        })
    };
    names.iter().map(find).collect()
}

fn text(report: &Report, dear: usize) -> String {
    let mut rows: Vec<(&str, &str, Vec<&Outcome>)> = Vec::new();
    for outcome in &report.results {
        match rows.iter_mut().find(|(k, v, _)| (*k, *v) == (outcome.kernel, &outcome.variant)) {
            Some((.., outcomes)) => outcomes.push(outcome),
            None => rows.push((outcome.kernel, &outcome.variant, vec![outcome])),
        }
    }
    let mut table = table(&["kernel", "variant", "passed", "failed", "worst NMSE", "max error", "where"]);
    for (kernel, variant, outcomes) in rows {
        let failed = outcomes.iter().filter(|o| !o.passed).count();
        let worst = outcomes.iter().map(|o| share(o)).fold(0.0, worse);
        let largest = outcomes.iter().copied().reduce(|a, b| if a.max_error >= b.max_error { a } else { b });
        let largest = largest.expect("a row has an outcome");
        // Where alone: what was expected and found stands with each failed case.
        let place = largest.place.split(": expected").next().unwrap_or_default();
        let place = if largest.max_error == 0.0 { String::new() } else { format!("{}: {place}", largest.case) };
        table.add_row([
            kernel.to_string(),
            variant.to_string(),
            (outcomes.len() - failed).to_string(),
            failed.to_string(),
            format!("{:.2}% of tolerance", 100.0 * worst),
            format!("{:.1e}", largest.max_error),
            place,
        ]);
    }
    let mut text = format!("{} ({})\n\n{}\n\n", report.adapter, report.backend, table.trim_fmt());
    for o in report.results.iter().filter(|o| !o.passed) {
        text += &format!(
            "FAILED {} {}, {}\n  NMSE {:e}, tolerance {:e}, max error {:e}\n  {}\n",
            o.kernel, o.variant, o.case, o.nmse, o.tolerance, o.max_error, o.place
        );
    }
    let (cases, failed) = (report.cases, report.failed);
    text += &format!("{cases} cases: {} passed, {failed} failed\n", cases - failed);
    if dear > 0 {
        text += &format!("{dear} more cost over 0.5 GFLOP each and run on a CPU driver only with --full\n");
    }
    text
}

/// The outcome's NMSE as a share of its tolerance; of an exact case, 0 or infinity.
fn share(outcome: &Outcome) -> f64 {
    if outcome.nmse == 0.0 { 0.0 } else { outcome.nmse / outcome.tolerance }
}

/// The larger one; NaN counts as the largest.
fn worse(a: f64, b: f64) -> f64 {
    if a.is_nan() || a >= b { a } else { b }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::Caps;

    fn outcome(case: &str, passed: bool, nmse: f64) -> Outcome {
        Outcome {
            kernel: "add",
            variant: "portable".into(),
            case: case.into(),
            passed,
            nmse,
            max_error: nmse.sqrt(),
            tolerance: 1e-8,
            seconds: None,
            place: format!("x of {case}"),
        }
    }

    #[test]
    fn the_text_counts_a_kernels_cases_and_tells_each_failed_one_in_full() {
        let results = vec![outcome("good", true, 1e-9), outcome("bad", false, 1e-2), outcome("nan", false, f64::NAN)];
        let text = text(&Report::new(&Caps::cpu(), results), 3);
        assert!(text.contains("FAILED add portable, bad\n  NMSE 1e-2, tolerance 1e-8"), "{text}");
        assert!(text.contains("FAILED add portable, nan") && text.contains("NaN% of tolerance"), "{text}");
        assert!(!text.contains("FAILED add portable, good"), "{text}");
        assert!(text.contains("3 cases: 1 passed, 2 failed\n3 more cost"), "{text}");
    }

    #[test]
    fn an_unknown_kernel_is_a_usage_error_that_lists_the_known_ones() {
        let error = named("--kernel", &["nope".into()]).err().expect("no such kernel");
        assert_eq!(error.exit_code(), 2);
        assert!(error.to_string().contains("add") && error.to_string().contains("'nope'"), "{error}");
        assert_eq!(named("--kernel", &[]).unwrap().len(), ALL.len());
        assert_eq!(named("--kernel", &["add".into()]).unwrap()[0].name, "add");
    }
}
