//! `lamina bench`: what a device can do at most, and what a model makes of it.

use clap::Subcommand;
use pollster::block_on;
use serde::Serialize;

use super::session::{ModelArgs, Ran};
use super::{print, table};
use crate::Result;
use crate::bench::ceilings::{self, Ceilings};
use crate::bench::model::{self, Depth, Work};
use crate::gpu::{Caps, Device, Options, Selector};
use crate::model::plan::human;

const AFTER_HELP: &str = "\
Every benchmark measures the device's own ceilings first, in the same process: figures are absolutes
and shares of these. Times are the GPU's own, by timestamps, as medians, with warm clocks.

Examples:
  lamina bench ceilings                           bandwidth, arithmetic and latencies of the best adapter
  lamina bench model --model DIR --depth 0,4096   prompts and text behind that many tokens of context
  lamina bench model --json > run.json            the small model that comes with lamina, as JSON

Exit codes: 0 done; 1 a check or the driver failed; 2 the command line cannot be meant.";

/// Measure a device, and a model on it
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
    /// Prompts and text of a model, in tokens a second, and where the time of a token goes
    Model(Box<ModelBench>),
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

#[derive(Debug, clap::Args)]
struct ModelBench {
    #[command(flatten)]
    model: ModelArgs,
    /// Tokens in the cache before a prompt or a text starts
    #[arg(long, value_name = "TOKENS", value_delimiter = ',', default_value = "0,512",
        value_parser = clap::value_parser!(u32).range(..=1 << 30))]
    depth: Vec<u32>,
    /// Tokens of a prompt
    #[arg(long, value_name = "TOKENS", default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..=1 << 24))]
    prompt: u32,
    /// Tokens of a text
    #[arg(long, value_name = "TOKENS", default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..=1 << 24))]
    text: u32,
    /// Repeats of each figure, of which the median is shown
    #[arg(long, value_name = "COUNT", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1000))]
    repeat: u32,
    #[command(flatten)]
    size: Size,
    #[command(flatten)]
    output: Output,
}

/// What ran where, in `--json`.
#[derive(Serialize)]
struct Report<'a, T: Serialize> {
    version: &'static str,
    device: Ran,
    driver: &'a str,
    ceilings: &'a Ceilings,
    #[serde(flatten)]
    results: T,
}

#[derive(Serialize)]
struct ModelResults<'a> {
    model: String,
    load_s: f64,
    weight_bytes: u64,
    /// The most that the process had in memory, mapped files included; `null` where the system does not say.
    peak_host_bytes: Option<u64>,
    cache_format: String,
    prompt: u32,
    text: u32,
    depths: &'a [Depth],
}

#[derive(Serialize)]
struct Nothing {}

/// Shaders as release builds have them, in a debug build too.
const UNCHECKED: Options = Options { checked: false, binding_bytes: None };

impl Args {
    pub fn run(&self, selector: &Selector) -> Result<u8> {
        match &self.what {
            What::Ceilings { output, size } => {
                let device = block_on(Device::open(selector, &UNCHECKED))?;
                let ceilings = size.measure(&device)?;
                let text = match output.json {
                    true => json(device.caps(), &ceilings, Nothing {}),
                    false => head(device.caps()) + &ceilings_table(&ceilings, output.markdown),
                };
                print(&text)?;
            }
            What::Model(bench) => bench.run(selector)?,
        }
        Ok(0)
    }
}

impl Size {
    fn measure(&self, device: &Device) -> Result<Ceilings> {
        let usual = if device.caps().is_software() { 64 } else { 1024 };
        ceilings::measure(device, self.mib.unwrap_or(usual) << 20)
    }
}

impl ModelBench {
    fn run(&self, selector: &Selector) -> Result<()> {
        let work = Work { depths: self.depth.clone(), prompt: self.prompt, text: self.text, repeat: self.repeat };
        ceilings::refuse(block_on(Device::open(selector, &UNCHECKED))?.caps())?;
        let found = self.model.find(false)?;
        let mut session = self.model.open_with(found, work.context() as usize, selector, &UNCHECKED)?;
        let device = session.engine.device().clone();
        let ceilings = self.size.measure(&device)?;
        let depths = model::measure(&mut session.engine, &work, ceilings.read_gbs)?;
        let results = ModelResults {
            model: self.model.name().to_string(),
            load_s: session.load.as_secs_f64(),
            weight_bytes: session.engine.model().bytes,
            peak_host_bytes: peak_host_bytes(),
            cache_format: format!("{:?}", session.engine.options().format).to_lowercase(),
            prompt: work.prompt,
            text: work.text,
            depths: &depths,
        };
        let text = match self.output.json {
            true => json(device.caps(), &ceilings, results),
            false => {
                let markdown = self.output.markdown;
                head(device.caps()) + &ceilings_table(&ceilings, markdown) + &model_text(&results, markdown)
            }
        };
        print(&text)
    }
}

fn json<T: Serialize>(caps: &Caps, ceilings: &Ceilings, results: T) -> String {
    let (device, driver) = (Ran::of(caps), &*caps.driver);
    let report = Report { version: env!("CARGO_PKG_VERSION"), device, driver, ceilings, results };
    format!("{}\n", serde_json::to_string_pretty(&report).expect("plain data becomes JSON"))
}

fn head(caps: &Caps) -> String {
    format!("lamina {}, {}, {}\n\n", env!("CARGO_PKG_VERSION"), caps.label(), caps.driver)
}

/// Three digits, or all before the point.
fn digits(value: f64) -> String {
    let after =
        [(100.0, 0), (10.0, 1), (1.0, 2)].iter().find(|(least, _)| value >= *least).map_or(3, |(_, after)| *after);
    format!("{value:.after$}")
}

/// Rows as a table of the terminal, or of Markdown.
fn rows(header: &[&str], rows: &[Vec<String>], markdown: bool) -> String {
    if markdown {
        let line = |cells: &[String]| format!("| {} |\n", cells.join(" | "));
        let header: Vec<String> = header.iter().map(|cell| cell.to_string()).collect();
        let rule = vec!["---".to_string(); header.len()];
        return line(&header) + &line(&rule) + &rows.iter().map(|row| line(row)).collect::<String>() + "\n";
    }
    let mut table = table(header);
    for row in rows {
        table.add_row(row.clone());
    }
    table.trim_fmt() + "\n\n"
}

fn ceilings_table(ceilings: &Ceilings, markdown: bool) -> String {
    let row = |name: &str, value: String| vec![name.to_string(), value];
    let mut lines = vec![
        row("read", format!("{} GB/s", digits(ceilings.read_gbs))),
        row("copy, read and written together", format!("{} GB/s", digits(ceilings.copy_gbs))),
        row("f32 multiply-adds", format!("{} TFLOP/s", digits(ceilings.f32_tflops))),
    ];
    lines.extend(ceilings.f16_tflops.map(|f16| row("f16 multiply-adds", format!("{} TFLOP/s", digits(f16)))));
    lines.push(row("a dispatch that waits for the one before", format!("{:.1} us", ceilings.dispatch_us)));
    lines.push(row("from a submission to its result", format!("{:.0} us", ceilings.round_trip_us)));
    rows(&["ceiling", "measured"], &lines, markdown)
}

fn model_text(results: &ModelResults, markdown: bool) -> String {
    let peak = results.peak_host_bytes.map_or(String::new(), |bytes| format!(", host at most {}", human(bytes)));
    let mut text = format!(
        "{}: loaded in {:.1} s, weights {}{peak}\n\n",
        results.model,
        results.load_s,
        human(results.weight_bytes)
    );
    let percent = |share: f64| format!("{:.0} %", 100.0 * share);
    let mut lines = Vec::new();
    for depth in results.depths {
        let at = format!("@ d{}", depth.depth);
        let prefill = format!("{:.1}", depth.prefill_tokens_per_s);
        lines.push(vec![format!("pp{} {at}", results.prompt), prefill, String::new(), String::new()]);
        lines.push(vec![
            format!("tg{} {at}", results.text),
            format!("{:.1}", depth.decode_tokens_per_s),
            human(depth.bytes_per_token),
            percent(depth.bandwidth_share),
        ]);
    }
    text += &rows(&["test", "tokens/s", "bytes a token", "of the bandwidth"], &lines, markdown);
    let Some(last) = results.depths.last() else { return text };
    let token = &last.token;
    text += &format!(
        "A token at depth {}: {:.0} us, the GPU {:.0} us (layers {:.0} us, {} of the bandwidth), encoding {:.0} us, \
         the GPU waits {:.0} us; {} dispatches, {:.1} a layer\n\n",
        last.depth,
        token.wall_us,
        token.gpu_us,
        token.layers_us,
        percent(token.layers_bandwidth_share),
        token.encode_us,
        token.gap_us,
        token.dispatches,
        token.dispatches_per_layer,
    );
    let alone: f64 = token.kernels.iter().map(|kernel| kernel.us).sum();
    let line = |kernel: &model::KernelTime| {
        vec![
            kernel.kernel.clone(),
            kernel.part.clone(),
            kernel.dispatches.to_string(),
            format!("{:.1}", kernel.us),
            format!("{:.2}", kernel.us / kernel.dispatches as f64),
            percent(kernel.us / alone),
        ]
    };
    let lines: Vec<_> = token.kernels.iter().map(line).collect();
    text + &rows(&["kernel, without the others", "part", "dispatches", "us", "us each", "share"], &lines, markdown)
}

/// The largest resident set of this process so far, mapped files included.
fn peak_host_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.split_whitespace().next()?.parse::<u64>().ok()? << 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_three_digits() {
        assert_eq!([2968.4, 63.38, 1.0, 0.0254].map(digits), ["2968", "63.4", "1.00", "0.025"]);
    }

    #[test]
    fn a_table_is_markdown_where_that_is_asked_for() {
        let lines = [vec!["read".to_string(), "3 GB/s".into()]];
        let [plain, markdown] = [false, true].map(|markdown| rows(&["ceiling", "measured"], &lines, markdown));
        assert_eq!(markdown, "| ceiling | measured |\n| --- | --- |\n| read | 3 GB/s |\n\n");
        assert!(plain.contains("read") && !plain.contains('|'), "{plain}");
    }
}
