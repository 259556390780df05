//! `lamina bench attention-types`: MHA, GQA and MLA of one model width, beside each other.

use pollster::block_on;

use super::tables::{digits, percent, rows};
use super::{Output, Progress, Size, UNCHECKED, untimed};
use crate::bench::attention::{self, Figure, Results, SEED, Work};
use crate::bench::layer_weights::Dims;
use crate::gpu::{Caps, Device, Selector};
use crate::model::plan::human;
use crate::{Error, Result};

#[derive(Debug, clap::Args)]
pub struct AttentionBench {
    /// A model that has a name: seed is a width of 4096 with 32 heads of 128, a latent of 512 and a rope key of 64
    #[arg(value_enum, default_value = "seed", conflicts_with_all = ["hidden", "heads", "head_dim", "nope", "latent", "rope"])]
    case: Case,
    /// Width of the hidden states [default: 4096]
    #[arg(long, value_name = "WIDTH", value_parser = clap::value_parser!(u32).range(8..=65536))]
    hidden: Option<u32>,
    /// Query heads [default: 32]
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(1..=256))]
    heads: Option<u32>,
    /// Width of a head: 16, 32, 64, 128 or 256 [default: 128]
    #[arg(long, value_name = "WIDTH", value_parser = clap::value_parser!(u32).range(16..=256))]
    head_dim: Option<u32>,
    /// Width of MLA's keys without rope, a multiple of 8 [default: that of a head]
    #[arg(long, value_name = "WIDTH", value_parser = clap::value_parser!(u32).range(8..=256))]
    nope: Option<u32>,
    /// MLA's latent, a multiple of 16 [default: 512]
    #[arg(long, value_name = "WIDTH", value_parser = clap::value_parser!(u32).range(16..=1024))]
    latent: Option<u32>,
    /// MLA's rope key, a multiple of 4 [default: 64]
    #[arg(long, value_name = "WIDTH", value_parser = clap::value_parser!(u32).range(4..=256))]
    rope: Option<u32>,
    /// GQA's heads of keys and values, a divisor of the heads
    #[arg(long, value_name = "COUNT", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=256))]
    gqa: u32,
    /// Sequences, each with one new token
    #[arg(long, value_name = "COUNT", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1024))]
    batch: u32,
    /// Tokens of each sequence [default: 128,512,2048,8192,32768; on a CPU driver 128,1024]
    #[arg(long, value_name = "TOKENS", value_delimiter = ',', value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
    context: Vec<u32>,
    /// Timed runs, at least [default: 50, on a CPU driver 3]
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(1..=1000))]
    repeat: Option<u32>,
    #[command(flatten)]
    size: Size,
    #[command(flatten)]
    output: Output,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Case {
    Seed,
}

impl AttentionBench {
    pub fn run(&self, selector: &Selector) -> Result<u8> {
        let dims = self.dims()?;
        let device = block_on(Device::open(selector, &UNCHECKED))?;
        crate::bench::clock::refuse(&device)?;
        let (clock, ceilings) = block_on(self.size.measure(&device))?;
        let work = self.work(dims, device.caps());
        let progress = Progress::default();
        let measured = attention::measure(&device, &clock, &ceilings, &work, |done, total| progress.show(done, total));
        let results = block_on(measured);
        progress.end();
        let results = results?;
        if results.attention.is_empty() && results.failed.is_empty() {
            let expected = format!("sizes that fit {}", device.caps().label());
            return Err(untimed(expected, results.skipped.first().map(|left| &left.why)));
        }
        let code = u8::from(!results.failed.is_empty());
        self.output.print(&device, clock, ceilings, results, text)?;
        Ok(code)
    }

    /// # Errors
    /// [`Error::Usage`] for sizes that no kernel takes.
    fn dims(&self) -> Result<Dims> {
        let Case::Seed = self.case;
        let head = self.head_dim.unwrap_or(SEED.head);
        let dims = Dims {
            hidden: self.hidden.unwrap_or(SEED.hidden),
            heads: self.heads.unwrap_or(SEED.heads),
            head,
            nope: self.nope.unwrap_or(head),
            latent: self.latent.unwrap_or(SEED.latent),
            rope: self.rope.unwrap_or(SEED.rope),
        };
        let wrong = |what: &str, expected: String, found: u32| {
            Err(Error::Usage { what: what.into(), expected, found: found.to_string() })
        };
        if !dims.head.is_power_of_two() {
            return wrong("--head-dim", "16, 32, 64, 128 or 256".into(), dims.head);
        }
        if !dims.nope.is_multiple_of(8) {
            return wrong("--nope", "a multiple of 8".into(), dims.nope);
        }
        if !dims.latent.is_multiple_of(16) {
            return wrong("--latent", "a multiple of 16".into(), dims.latent);
        }
        if !dims.rope.is_multiple_of(4) {
            return wrong("--rope", "a multiple of 4".into(), dims.rope);
        }
        if !dims.heads.is_multiple_of(self.gqa) {
            return wrong("--gqa", format!("a divisor of {} heads", dims.heads), self.gqa);
        }
        Ok(dims)
    }

    fn work(&self, dims: Dims, caps: &Caps) -> Work {
        let software = caps.is_software();
        let usual: &[u32] = if software { &[128, 1024] } else { &[128, 512, 2048, 8192, 32_768] };
        let mut contexts = if self.context.is_empty() { usual.to_vec() } else { self.context.clone() };
        contexts.sort();
        contexts.dedup();
        Work {
            dims,
            groups: self.gqa,
            batch: self.batch,
            contexts,
            repeat: self.repeat.unwrap_or(if software { 3 } else { 50 }) as usize,
            cold_bytes: super::COLD[usize::from(software)],
        }
    }
}

fn text(results: &Results, markdown: bool) -> String {
    let line = |figure: &Figure| {
        vec![
            figure.context.to_string(),
            figure.kind.clone(),
            human(figure.token_bytes),
            human(figure.cache_bytes),
            digits(figure.attention.median_us),
            digits(figure.attention_gbs),
            digits(figure.layer.median_us),
            percent(figure.layer_share),
            figure.layer_to_gqa.map_or(String::new(), |times| format!("{}x", digits(times))),
            figure.dispatches.to_string(),
        ]
    };
    let header = [
        "context",
        "attention",
        "a token",
        "cache",
        "alone, us",
        "GB/s",
        "layer, us",
        "of bandwidth",
        "to GQA",
        "dispatches",
    ];
    let mut text = String::new();
    if let Some(Dims { hidden, heads, head, nope, latent, rope }) = results.dims {
        text += &format!(
            "A token of each of {} sequences in a layer of width {hidden}: {heads} heads of {head}; MLA with a latent of \
             {latent}, keys of {nope} and a rope key of {rope}\n\n",
            results.batch,
        );
    }
    let lines: Vec<Vec<String>> = results.attention.iter().map(line).collect();
    if !lines.is_empty() {
        text += &rows(&header, &lines, markdown);
    }
    for (what, left) in [("Failed its check", &results.failed), ("Skipped", &results.skipped)] {
        for left in left {
            text += &format!("{what}: {} at context {}: {}\n", left.kind, left.context, left.why);
        }
    }
    if let Some(worst) = results.attention.iter().map(|figure| figure.error).reduce(f64::max) {
        text += &format!("Each layer's output agreed with the f64 twins' within a share of {worst:.1e}\n");
    }
    text
}
