//! `lamina bench kernel`: absorbed decode, against the ceilings and what others published.

use clap::ValueEnum;
use pollster::block_on;

use super::tables::{digits, percent, rows};
use super::{COLD, Output, Progress, Size, UNCHECKED, untimed};
use crate::Result;
use crate::bench::decode::{self, Figure, Results, Work};
use crate::bench::published::Named;
use crate::bench::shape::{Asked, MOST_CONTEXT, MOST_HEADS, MOST_SEQUENCES, Shape};
use crate::bench::way::Way;
use crate::gpu::{Caps, Device, Selector};
use crate::num::record::RecordFormat;

#[derive(Debug, clap::Args)]
pub struct KernelBench {
    /// Shapes that have a name: FlashMLA's and FlashInfer's benchmarks, ThunderMLA's (four new tokens in each
    /// of four sequences), and what fp8 records gain where memory decides
    #[arg(value_enum, conflicts_with_all = ["batch", "heads", "context"])]
    case: Option<Case>,
    /// Sequences [default: 1,4,16,128; on a CPU driver 1]
    #[arg(long, value_name = "COUNT", value_delimiter = ',', value_parser = clap::value_parser!(u32).range(1..=MOST_SEQUENCES.into()))]
    batch: Vec<u32>,
    /// Query heads [default: 16,20,64,128; on a CPU driver 16,128]
    #[arg(long, value_name = "COUNT", value_delimiter = ',', value_parser = clap::value_parser!(u32).range(1..=MOST_HEADS.into()))]
    heads: Vec<u32>,
    /// Tokens of each sequence [default: 1024,4096,8192,16384,32768,131072; on a CPU driver 1024,4096]
    #[arg(long, value_name = "TOKENS", value_delimiter = ',', value_parser = clap::value_parser!(u32).range(1..=MOST_CONTEXT.into()))]
    context: Vec<u32>,
    /// How records are stored [default: f16,fp8]
    #[arg(long, value_name = "FORMAT", value_delimiter = ',')]
    dtype: Vec<Dtype>,
    /// The kernel: mla_decode as browsers run it (portable) or with subgroups, mla_decode_coop on matrix
    /// units (coop), or the one that the engine takes here
    #[arg(long, value_name = "KERNEL", default_value = "auto")]
    variant: Variant,
    /// Timed runs of each shape, at least [default: 50, on a CPU driver 3]
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(1..=1000))]
    repeat: Option<u32>,
    /// Few shapes and runs: one sequence, 16 and 128 heads, 1024 and 4096 tokens, f16 and fp8, 3 runs,
    /// ceilings with 64 MiB
    #[arg(long, conflicts_with_all = ["case", "batch", "heads", "context", "dtype", "repeat", "mib"])]
    quick: bool,
    #[command(flatten)]
    size: Size,
    #[command(flatten)]
    output: Output,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Case {
    #[value(name = "flashmla")]
    FlashMla,
    #[value(name = "flashinfer-4090")]
    FlashInfer,
    Thunder,
    Fp8,
}

#[derive(Clone, Copy, Debug, PartialEq, ValueEnum)]
enum Dtype {
    F16,
    F32,
    Fp8,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Variant {
    Auto,
    Portable,
    Subgroup,
    Coop,
}

impl From<Case> for Named {
    fn from(case: Case) -> Named {
        match case {
            Case::FlashMla => Named::FlashMla,
            Case::FlashInfer => Named::FlashInfer,
            Case::Thunder => Named::Thunder,
            Case::Fp8 => Named::Fp8,
        }
    }
}

impl KernelBench {
    pub fn run(&self, selector: &Selector) -> Result<u8> {
        let device = block_on(Device::open(selector, &UNCHECKED))?;
        let quick = Size { mib: Some(64) };
        let size = if self.quick { &quick } else { &self.size };
        let (clock, ceilings) = block_on(size.measure(&device))?;
        let work = self.work(device.caps());
        let progress = Progress::default();
        let measured = decode::measure(&device, &clock, &ceilings, &work, |done, total| progress.show(done, total));
        let results = block_on(measured);
        progress.end();
        let results = results?;
        if results.decode.is_empty() && results.failed.is_empty() {
            let expected = format!("something that runs on {}", device.caps().label());
            return Err(untimed(expected, results.skipped.first().map(|left| &left.why)));
        }
        let code = exit_code(&results);
        self.output.print(&device, clock, ceilings, results, text)?;
        Ok(code)
    }

    fn work(&self, caps: &Caps) -> Work {
        let software = caps.is_software();
        let few = self.quick || software;
        let or = |asked: &[u32], few_of: &[u32], all: &[u32]| match asked {
            [] if few => few_of.to_vec(),
            [] => all.to_vec(),
            asked => asked.to_vec(),
        };
        let shapes = match self.case {
            Some(case) => Named::from(case).shapes(),
            None => Shape::product(
                &or(&self.batch, &[1], &[1, 4, 16, 128]),
                &or(&self.heads, &[16, 128], &[16, 20, 64, 128]),
                &or(&self.context, &[1024, 4096], &[1024, 4096, 8192, 16_384, 32_768, 131_072]),
            ),
        };
        let mut formats: Vec<RecordFormat> = Vec::new();
        let usual = [Dtype::F16, Dtype::Fp8];
        for dtype in if self.dtype.is_empty() { &usual } else { &self.dtype[..] } {
            let format = match dtype {
                Dtype::F16 => RecordFormat::F16,
                Dtype::F32 => RecordFormat::F32,
                Dtype::Fp8 => RecordFormat::Fp8,
            };
            if !formats.contains(&format) {
                formats.push(format);
            }
        }
        let way = match self.variant {
            Variant::Auto => Way::Auto,
            Variant::Portable => Way::Portable,
            Variant::Subgroup => Way::Subgroup,
            Variant::Coop => Way::Coop,
        };
        let repeat = self.repeat.unwrap_or(if few { 3 } else { 50 }) as usize;
        Work { shapes, formats, way, repeat, cold_bytes: COLD[usize::from(software)] }
    }
}

/// 1 where the twin found a kernel wrong.
fn exit_code(results: &Results) -> u8 {
    u8::from(!results.failed.is_empty())
}

fn contexts(asked: &Asked) -> String {
    let all: Vec<String> = asked.contexts.iter().map(u32::to_string).collect();
    match asked.tokens {
        1 => all.join(" "),
        tokens => format!("{}, {tokens} new", all.join(" ")),
    }
}

fn text(results: &Results, markdown: bool) -> String {
    let line = |figure: &Figure| {
        let Figure { asked, time, .. } = figure;
        let beside = match (&figure.published, figure.gain_over_f16) {
            (Some(theirs), _) => format!("{}x {}, {} us", digits(theirs.ratio), theirs.by, digits(theirs.us)),
            (None, Some(gain)) => format!("{gain:.2}x f16"),
            (None, None) => String::new(),
        };
        vec![
            asked.batch.to_string(),
            asked.heads.to_string(),
            contexts(asked),
            asked.dtype.clone(),
            figure.variant.clone(),
            digits(time.median_us),
            digits(time.p10_us),
            digits(time.p90_us),
            digits(figure.gbs),
            digits(figure.tflops),
            format!("{} {}", percent(figure.share), figure.bound),
            beside,
        ]
    };
    let header =
        ["batch", "heads", "context", "dtype", "kernel", "us", "p10", "p90", "GB/s", "TFLOP/s", "of ceiling", "beside"];
    let lines: Vec<Vec<String>> = results.decode.iter().map(line).collect();
    let mut text = if lines.is_empty() { String::new() } else { rows(&header, &lines, markdown) };
    for (what, left) in [("Failed its check", &results.failed), ("Skipped", &results.skipped)] {
        for left in left {
            let Asked { batch, heads, dtype, .. } = &left.asked;
            let context = contexts(&left.asked);
            text += &format!("{what}: batch {batch}, {heads} heads, context {context}, {dtype}: {}\n", left.why);
        }
    }
    if let Some(worst) = results.decode.iter().map(|figure| figure.error).reduce(f64::max) {
        let rows: usize = results.decode.iter().map(|figure| figure.checked).sum();
        text += &format!("{rows} rows agreed with the f64 twin within a share of {worst:.1e} before they were timed\n");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::decode::Left;
    use crate::bench::shape::Shape;

    #[test]
    fn a_shape_that_failed_its_check_has_a_reason_and_no_figure() {
        let shape = Shape { heads: 16, contexts: vec![4641, 45_118], tokens: 4 };
        let left = Left { asked: shape.asked(RecordFormat::F16), why: "head 3 of token 0 is off".into() };
        let results = Results { failed: vec![left], ..Results::default() };
        for markdown in [false, true] {
            assert_eq!(
                text(&results, markdown),
                "Failed its check: batch 2, 16 heads, context 4641 45118, 4 new, f16: head 3 of token 0 is off\n"
            );
        }
        assert_eq!(exit_code(&results), 1);
        assert_eq!(exit_code(&Results::default()), 0);
    }
}
