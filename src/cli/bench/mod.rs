//! `lamina bench`: what a device can do at most, and what kernels and models make of it.

mod attention;
mod kernel;
mod model;
mod tables;
mod tune;

use std::io::{IsTerminal, Write};

use clap::Subcommand;
use pollster::block_on;
use serde::Serialize;

use super::print;
use crate::bench::ceilings::{self, Ceilings};
use crate::bench::clock::Clock;
use crate::bench::report::{Nothing, Report};
use crate::gpu::{Device, Options, Selector};
use crate::{Error, Result};
use tables::ceilings_table;

const AFTER_HELP: &str = "\
Every benchmark measures the device's own ceilings first, in the same process: figures are absolutes
and shares of these. Times are the GPU's own, by timestamps where it has them, as medians, with warm
clocks and cold caches. What a kernel computed is held against its twin before it is timed.

Examples:
  lamina bench ceilings                           bandwidth, arithmetic and latencies of the best adapter
  lamina bench kernel --quick                     decode attention, a few shapes
  lamina bench kernel flashmla --markdown         FlashMLA's shapes, as a table to share
  lamina bench kernel --batch 1 --heads 16,20 --context 4096 --dtype f16,fp8
  lamina bench attention-types --context 128,4096 MHA, GQA and MLA beside each other
  lamina bench model --model DIR --depth 0,4096   prompts and text behind that many tokens of context
  lamina bench model --json > run.json            the small model that comes with lamina, as JSON
  lamina bench tune                               find the fastest variants, and keep them for this adapter

Exit codes: 0 done; 1 a check or the driver failed; 2 the command line cannot be meant.";

/// Measure a device, and kernels and models on it
#[derive(Debug, clap::Args)]
#[command(after_help = AFTER_HELP)]
pub struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Bandwidth, arithmetic and latencies
    Ceilings {
        #[command(flatten)]
        output: Output,
        #[command(flatten)]
        size: Size,
    },
    /// Absorbed decode and, where contexts are split, its combine, over shuffled pages in cold caches
    Kernel(kernel::KernelBench),
    /// MHA, GQA and MLA of one model width: layers that decode a token, with short and long contexts
    AttentionTypes(attention::AttentionBench),
    /// Prompts and text of a model, in tokens a second, and where the time of a token goes
    Model(Box<model::ModelBench>),
    /// Each kernel's variants, of which the fastest is taken from then on
    Tune(tune::TuneBench),
}

#[derive(Debug, clap::Args)]
struct Output {
    /// Print one JSON object (docs/cli.md has its fields)
    #[arg(long, conflicts_with = "markdown")]
    json: bool,
    /// Print tables in Markdown
    #[arg(long)]
    markdown: bool,
}

#[derive(Debug, clap::Args)]
struct Size {
    /// Megabytes that the bandwidth is measured with: more than any cache holds [default: 1024, on a CPU
    /// driver 64]
    #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u64).range(2..=65536))]
    mib: Option<u64>,
}

/// More than the last-level cache of any GPU, and of a processor for its driver.
const COLD: [u64; 2] = [512 << 20, 64 << 20];

/// How far a benchmark is, on a terminal.
struct Progress {
    terminal: bool,
}

impl Default for Progress {
    fn default() -> Progress {
        Progress { terminal: std::io::stderr().is_terminal() }
    }
}

impl Progress {
    fn show(&self, done: usize, total: usize) {
        if self.terminal {
            // Progress that cannot be shown is not worth stopping for.
            let _ = write!(std::io::stderr(), "\r\x1b[K{done}/{total}");
        }
    }

    fn end(&self) {
        if self.terminal {
            let _ = write!(std::io::stderr(), "\r\x1b[K");
        }
    }
}

/// Shaders as release builds have them, in a debug build too.
const UNCHECKED: Options =
    Options { checked: false, binding_bytes: None, zeroed: false, tuned: true, matrix_units: false };

/// What a benchmark says that has no figure: the first reason that something was skipped for.
fn untimed(expected: String, skipped: Option<&String>) -> Error {
    let found = skipped.cloned().unwrap_or_else(|| "nothing".into());
    Error::Usage { what: "what is to be timed".into(), expected, found }
}

impl Args {
    pub fn run(&self, selector: &Selector) -> Result<u8> {
        match &self.what {
            What::Ceilings { output, size } => {
                let device = block_on(Device::open(selector, &UNCHECKED))?;
                let (clock, ceilings) = block_on(size.measure(&device))?;
                output.print(&device, clock, ceilings, Nothing {}, |_, _| String::new())?;
                Ok(0)
            }
            What::Kernel(bench) => bench.run(selector),
            What::AttentionTypes(bench) => bench.run(selector),
            What::Model(bench) => bench.run(selector),
            What::Tune(bench) => bench.run(selector),
        }
    }
}

impl Size {
    async fn measure(&self, device: &Device) -> Result<(Clock, Ceilings)> {
        let clock = Clock::of(device).await?;
        let usual = if device.caps().is_software() { 64 } else { 1024 };
        let ceilings = ceilings::measure(device, &clock, self.mib.unwrap_or(usual) << 20).await?;
        Ok((clock, ceilings))
    }
}

impl Output {
    /// Prints what was measured; `text` makes the tables of the results, of the terminal or of Markdown.
    fn print<T: Serialize>(
        &self,
        device: &Device,
        clock: Clock,
        ceilings: Ceilings,
        results: T,
        text: impl Fn(&T, bool) -> String,
    ) -> Result<()> {
        let command: Vec<String> = std::iter::once("lamina".into()).chain(std::env::args().skip(1)).collect();
        let report = Report::new(device.caps(), command.join(" "), clock, ceilings, results);
        if self.json {
            return print(&report.json());
        }
        let tables = ceilings_table(&report.ceilings, self.markdown) + &text(&report.results, self.markdown);
        print(&(tables::head(&report, self.markdown) + &tables))
    }
}
