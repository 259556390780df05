//! `lamina bench model`: how fast a model runs.

use pollster::block_on;
use serde::Serialize;

use super::super::session::ModelArgs;
use super::tables::{percent, rows};
use super::{Output, Size, UNCHECKED};
use crate::Result;
use crate::bench::model::{self, Depth, KernelTime, Prompt, Work};
use crate::gpu::{Device, Options, Selector};
use crate::model::plan::human;

#[derive(Debug, clap::Args)]
pub struct ModelBench {
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
    /// Check bounds and clear workgroup memory in shaders, as every browser does
    #[arg(long)]
    checked: bool,
    #[command(flatten)]
    size: Size,
    #[command(flatten)]
    output: Output,
}

#[derive(Serialize)]
struct ModelResults {
    model: String,
    load_s: f64,
    weight_bytes: u64,
    /// The most that the process had in memory, mapped files included; `null` where the system does not say.
    peak_host_bytes: Option<u64>,
    cache_format: String,
    prompt: u32,
    text: u32,
    depths: Vec<Depth>,
}

impl ModelBench {
    pub fn run(&self, selector: &Selector) -> Result<u8> {
        let work = Work { depths: self.depth.clone(), prompt: self.prompt, text: self.text, repeat: self.repeat };
        crate::bench::clock::refuse(&block_on(Device::open(selector, &UNCHECKED))?)?;
        let found = self.model.find(false)?;
        let shaders = Options { checked: self.checked, zeroed: self.checked, ..UNCHECKED };
        let mut session = self.model.open_with(found, (work.context() as usize, 0), selector, &shaders)?;
        let device = session.engine.device().clone();
        let (clock, ceilings) = block_on(self.size.measure(&device))?;
        let depths = block_on(model::measure(&mut session.engine, &clock, &work, &ceilings))?;
        let results = ModelResults {
            model: self.model.name().to_string(),
            load_s: session.load.as_secs_f64(),
            weight_bytes: session.engine.model().bytes,
            peak_host_bytes: peak_host_bytes(),
            cache_format: format!("{:?}", session.engine.options().format).to_lowercase(),
            prompt: work.prompt,
            text: work.text,
            depths,
        };
        self.output.print(&device, clock, ceilings, results, model_text)?;
        Ok(0)
    }
}

fn model_text(results: &ModelResults, markdown: bool) -> String {
    let peak = results.peak_host_bytes.map_or(String::new(), |bytes| format!(", host at most {}", human(bytes)));
    let mut text = format!(
        "{}: loaded in {:.1} s, weights {}{peak}\n\n",
        results.model,
        results.load_s,
        human(results.weight_bytes)
    );
    let mut lines = Vec::new();
    for depth in &results.depths {
        let at = format!("@ d{}", depth.depth);
        lines.push(vec![
            format!("pp{} {at}", results.prompt),
            format!("{:.1}", depth.prefill_tokens_per_s),
            format!("{:.3} TFLOP/s", depth.prefill_tflops),
            percent(depth.prefill_share),
        ]);
        lines.push(vec![
            format!("tg{} {at}", results.text),
            format!("{:.1}", depth.decode_tokens_per_s),
            format!("{} a token", human(depth.bytes_per_token)),
            percent(depth.bandwidth_share),
        ]);
    }
    text += &rows(&["test", "tokens/s", "computed, or read", "of the ceiling"], &lines, markdown);
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
    text += &kernel_rows(&token.kernels, markdown);
    let Prompt { tokens, gpu_us, kernels, .. } = &last.prompt;
    text += &format!("\nA prompt's first step behind it, {tokens} tokens: the GPU {gpu_us:.0} us\n\n");
    text + &kernel_rows(kernels, markdown)
}

/// The kernels of a step and their shares of its time.
fn kernel_rows(kernels: &[KernelTime], markdown: bool) -> String {
    let alone: f64 = kernels.iter().map(|kernel| kernel.us).sum();
    let line = |kernel: &KernelTime| {
        vec![
            kernel.kernel.clone(),
            kernel.part.clone(),
            kernel.dispatches.to_string(),
            format!("{:.1}", kernel.us),
            format!("{:.2}", kernel.us / kernel.dispatches as f64),
            percent(kernel.us / alone),
        ]
    };
    let lines: Vec<_> = kernels.iter().map(line).collect();
    rows(&["kernel, without the others", "part", "dispatches", "us", "us each", "share"], &lines, markdown)
}

/// The largest resident set of this process so far, mapped files included.
fn peak_host_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.split_whitespace().next()?.parse::<u64>().ok()? << 10)
}
