//! `lamina plan`: how much memory a model takes, and how its cache compares with others.

use std::path::{Path, PathBuf};

use bytesize::ByteSize;
use serde::Serialize;

use super::hub::{self, Need};
use super::svg::Plot;
use super::{print, table, write_file};
use crate::gpu::{self, Selector};
use crate::model::Config;
use crate::model::plan::{self, Kind, Plan, Widths, human};
use crate::model::tensors::{ExpertLayout, Tensors};
use crate::num::record::RecordFormat;
use crate::weights::Checkpoint;
use crate::{Error, Result};

const AFTER_HELP: &str = "\
What a token leaves behind decides how long a context and how many sequences fit. Multi-head
attention (MHA) keeps keys and values of all heads, grouped-query attention (GQA) those of a few,
multi-head latent attention (MLA) one latent and one rope key. All three are shown for the same
heads.

For a checkpoint the weights and what the steps compute with are taken off first. Only its
config.json is needed; weights beside it are checked too, and nothing is loaded.

Examples:
  lamina plan DIR --memory 24GB              does it fit, and how long a context
  lamina plan DIR --ctx 65536 --batch 4      the memory that four such sequences take
  lamina plan --hidden 4096 --heads 32 --head-dim 128 --gqa 8 --latent 512 --rope 64 --layers 32 \\
    --memory 80GiB --svg cache.svg           bare numbers, and a plot

Exit codes: 0 done; 1 it does not fit or a file is wrong; 2 the command line cannot be meant.";

/// Plan the memory of a model: weights, cache and scratch, with MHA, GQA and MLA side by side
#[derive(Debug, clap::Args)]
#[command(after_help = AFTER_HELP)]
pub struct Args {
    /// The folder of a checkpoint in Hugging Face layout, or a repo id there, of which the cached
    /// files are taken, else its config.json alone downloaded
    #[arg(value_name = "CHECKPOINT", conflicts_with_all = ["hidden", "heads", "head_dim", "latent", "rope", "layers", "weights"])]
    checkpoint: Option<String>,
    /// Tokens of each sequence [default: the model's longest context, at most 32768]
    #[arg(long, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(1..=1 << 30))]
    ctx: Option<u32>,
    /// Sequences
    #[arg(long, value_name = "COUNT", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
    batch: u32,
    /// How much memory there is, such as 80GiB, 24GB or 500MiB
    #[arg(long, value_name = "SIZE", value_parser = size)]
    memory: Option<u64>,
    /// How the cache is stored
    #[arg(long, value_name = "FORMAT", default_value = "f16")]
    cache: Format,
    /// Key and value heads of the grouped-query attention in the comparison [default: 8, or the
    /// next fewer that divide the heads]
    #[arg(long, value_name = "HEADS", value_parser = clap::value_parser!(u32).range(1..=1 << 16))]
    gqa: Option<u32>,
    /// Bare numbers: width of the hidden state, from which --head-dim follows
    #[arg(long, value_name = "WIDTH", value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
    hidden: Option<u32>,
    /// Bare numbers: query heads
    #[arg(long, value_name = "HEADS", required_unless_present = "checkpoint", value_parser = clap::value_parser!(u32).range(1..=1 << 16))]
    heads: Option<u32>,
    /// Bare numbers: width of a head's key and value [default: --hidden / --heads]
    #[arg(long, value_name = "WIDTH", value_parser = clap::value_parser!(u32).range(1..=1 << 16))]
    head_dim: Option<u32>,
    /// Bare numbers: width of the latent
    #[arg(long, value_name = "WIDTH", required_unless_present = "checkpoint", value_parser = clap::value_parser!(u32).range(1..=1 << 16))]
    latent: Option<u32>,
    /// Bare numbers: width of the rope key [default: 0]
    #[arg(long, value_name = "WIDTH", value_parser = clap::value_parser!(u32).range(0..=1 << 16))]
    rope: Option<u32>,
    /// Bare numbers: layers
    #[arg(long, value_name = "COUNT", required_unless_present = "checkpoint", value_parser = clap::value_parser!(u32).range(1..=1 << 16))]
    layers: Option<u32>,
    /// Bare numbers: size of the weights, to be taken off --memory [default: 0]
    #[arg(long, value_name = "SIZE", value_parser = size)]
    weights: Option<u64>,
    /// Print one JSON object instead of text
    #[arg(long)]
    json: bool,
    /// Write a plot of context against bytes of cache
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
}

/// How a cache is stored.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
pub(super) enum Format {
    F16,
    F32,
    Fp8,
}

impl Format {
    /// The records' format and its name.
    pub(super) fn record(self) -> (RecordFormat, &'static str) {
        match self {
            Format::F16 => (RecordFormat::F16, "f16"),
            Format::F32 => (RecordFormat::F32, "f32"),
            Format::Fp8 => (RecordFormat::Fp8, "fp8"),
        }
    }
}

/// What was planned; `--json` prints it.
#[derive(Serialize)]
struct Report {
    model: Option<Model>,
    cache: &'static str,
    context: u64,
    batch: u64,
    weights_bytes: u64,
    cache_bytes: u64,
    scratch_bytes: u64,
    total_bytes: u64,
    memory_bytes: Option<u64>,
    fits: Option<bool>,
    largest_context: Option<u64>,
    attention: Vec<Attention>,
}

#[derive(Serialize)]
struct Model {
    path: PathBuf,
    model_type: &'static str,
    layers: usize,
    parameters: u64,
    longest_context: u32,
    skipped: usize,
}

#[derive(Serialize)]
struct Attention {
    kind: String,
    bytes_per_token: u64,
    share_of_mha: f64,
    cache_bytes: u64,
    largest_context: Option<u64>,
    largest_batch: Option<u64>,
}

/// Bytes as people write them: 80GiB, 24GB, 500 MiB, 1000000.
pub(super) fn size(text: &str) -> std::result::Result<u64, String> {
    let text = text.trim();
    match text.parse::<ByteSize>() {
        Ok(size) if size.as_u64() > 0 => Ok(size.as_u64()),
        _ => Err("expected a size such as 80GiB, 24GB or 500MiB".into()),
    }
}

impl Args {
    /// Plans, prints, and refuses what does not fit.
    pub fn run(&self, selector: &Selector) -> Result<u8> {
        let (report, plan) = match &self.checkpoint {
            Some(named) => self.checkpoint(&hub::folder(named, Need::Config)?, selector)?,
            None => self.numbers()?,
        };
        if let Some(file) = &self.svg {
            let text = report.plot(&plan).svg();
            write_file(file, text.as_bytes())?;
        }
        if self.json {
            print(&format!("{}\n", serde_json::to_string_pretty(&report).expect("plain data")))?;
        } else {
            print(&report.text())?;
        }
        plan.check("--memory")?;
        Ok(0)
    }

    fn groups(&self, heads: u32) -> Result<u64> {
        let usual = (1..=8.min(heads.div_ceil(2))).rev().find(|groups| heads.is_multiple_of(*groups));
        let groups = self.gqa.or(usual).unwrap_or(1);
        match heads.is_multiple_of(groups) {
            true => Ok(groups.into()),
            false => Err(usage("--gqa", &format!("a divisor of {heads} heads"), &groups.to_string())),
        }
    }

    fn checkpoint(&self, folder: &Path, selector: &Selector) -> Result<(Report, Plan)> {
        let config = Config::open(folder)?;
        let (tensors, checkpoint, skipped) = match has_weights(folder) {
            true => {
                let checkpoint = Checkpoint::open(folder)?;
                let (tensors, skipped) = Tensors::find(&config, &checkpoint)?;
                (tensors, Some(checkpoint), skipped.len())
            }
            false => (Tensors::of(&config, ExpertLayout::Each), None, 0),
        };
        let mut caps = None;
        if self.memory.is_none() {
            // An adapter does not say how much memory it has, only how large a part of it may be.
            let mut adapters = pollster::block_on(gpu::list());
            // Which of several widths kernels on matrix units get, only an open device shows; that they get one is usual.
            adapters.iter_mut().for_each(|caps| caps.matrix_width = caps.matrix_size());
            if let Some(index) = selector.choose(&adapters)? {
                plan::check_bindings(&config, self.cache.record().0, &adapters[index])?;
                caps = Some(adapters.swap_remove(index));
            }
        }
        let context = self.ctx.unwrap_or(config.max_context.min(32768));
        if context > config.max_context {
            let expected = format!("at most {}, the longest context of the model", config.max_context);
            return Err(usage("--ctx", &expected, &context.to_string()));
        }
        let (format, name) = self.cache.record();
        let widths = Widths::of(&config, self.groups(config.mla.heads)?, format);
        let token = widths.token_bytes(Kind::Mla);
        let plan = Plan {
            weights: plan::weight_bytes(&tensors, checkpoint.as_ref()),
            scratch: plan::scratch_bytes(&config, caps.as_ref(), token, (context.into(), self.batch.into())),
            token,
            context: context.into(),
            batch: self.batch.into(),
            memory: self.memory,
        };
        let model = Model {
            path: folder.into(),
            model_type: config.family.labels[0],
            layers: config.layers.len(),
            parameters: config.parameters(),
            longest_context: config.max_context,
            skipped,
        };
        Ok((Report::new(Some(model), name, &widths, &plan), plan))
    }

    fn numbers(&self) -> Result<(Report, Plan)> {
        let given = |value: Option<u32>| value.expect("clap requires it without a checkpoint");
        let (heads, latent, layers) = (given(self.heads), given(self.latent), given(self.layers));
        let head_dim = match (self.head_dim, self.hidden) {
            (Some(width), _) => width,
            (None, Some(hidden)) if hidden.is_multiple_of(heads) => hidden / heads,
            (None, Some(hidden)) => {
                let expected = format!("a multiple of {heads} heads, or --head-dim beside it");
                return Err(usage("--hidden", &expected, &hidden.to_string()));
            }
            (None, None) => return Err(usage("--head-dim", "the width of a head, or --hidden", "neither")),
        };
        let (format, name) = self.cache.record();
        let widths = Widths {
            layers: layers.into(),
            heads: heads.into(),
            groups: self.groups(heads)?,
            key: head_dim.into(),
            value: head_dim.into(),
            latent: latent.into(),
            rope: self.rope.unwrap_or(0).into(),
            format,
        };
        let plan = Plan {
            weights: self.weights.unwrap_or(0),
            scratch: 0,
            token: widths.token_bytes(Kind::Mla),
            context: self.ctx.unwrap_or(32768).into(),
            batch: self.batch.into(),
            memory: self.memory,
        };
        Ok((Report::new(None, name, &widths, &plan), plan))
    }
}

fn usage(what: &str, expected: &str, found: &str) -> Error {
    Error::Usage { what: what.into(), expected: expected.into(), found: found.into() }
}

/// Whether more than the configuration is there.
fn has_weights(folder: &Path) -> bool {
    ["model.safetensors", "model.safetensors.index.json"].iter().any(|name| folder.join(name).exists())
}

impl Report {
    fn new(model: Option<Model>, cache: &'static str, widths: &Widths, plan: &Plan) -> Report {
        let whole = widths.token_bytes(Kind::Mha);
        let attention = |(kind, name): (Kind, String)| {
            let token = widths.token_bytes(kind);
            let plan = Plan { token, ..*plan };
            Attention {
                kind: name,
                bytes_per_token: token,
                share_of_mha: token as f64 / whole as f64,
                cache_bytes: plan.cache(),
                largest_context: plan.largest_context(),
                largest_batch: plan.largest_batch(),
            }
        };
        let grouped = format!("GQA-{}", widths.groups);
        let kinds = [(Kind::Mha, "MHA".into()), (Kind::Gqa, grouped), (Kind::Mla, "MLA".into())];
        Report {
            model,
            cache,
            context: plan.context,
            batch: plan.batch,
            weights_bytes: plan.weights,
            cache_bytes: plan.cache(),
            scratch_bytes: plan.scratch,
            total_bytes: plan.total(),
            memory_bytes: plan.memory,
            fits: plan.fits(),
            largest_context: plan.largest_context(),
            attention: kinds.into_iter().map(attention).collect(),
        }
    }

    fn text(&self) -> String {
        let mut text = String::new();
        let sequences = match self.batch {
            1 => format!("{} tokens", self.context),
            batch => format!("{batch} sequences of {} tokens", self.context),
        };
        if let Some(model) = &self.model {
            let parameters = match model.parameters {
                n @ 1_000_000_000.. => format!("{:.1} billion", n as f64 / 1e9),
                n @ 1_000_000.. => format!("{:.1} million", n as f64 / 1e6),
                n => n.to_string(),
            };
            let (path, layers) = (model.path.display(), model.layers);
            text += &format!("{path}: {}, {layers} layers, {parameters} parameters\n", model.model_type);
            if model.skipped > 0 {
                text += &format!("{} tensors are not needed and skipped\n", model.skipped);
            }
            text += &format!("\n  weights   {}\n", human(self.weights_bytes));
            text += &format!("  cache     {}, {sequences} in {}\n", human(self.cache_bytes), self.cache);
            text += &format!("  scratch   about {}\n", human(self.scratch_bytes));
            text += &format!("  together  {}\n", human(self.total_bytes));
            if let (Some(memory), Some(fits)) = (self.memory_bytes, self.fits) {
                text +=
                    &format!("  memory    {}: {}\n", human(memory), if fits { "it fits" } else { "it does not fit" });
            }
            text.push('\n');
        }
        let context = format!("cache of {sequences}");
        let mut header = vec!["attention", "bytes a token", "of MHA", context.as_str()];
        let many = format!("sequences of {}", self.context);
        if self.memory_bytes.is_some() {
            header.extend(["longest context", many.as_str()]);
        }
        let mut table = table(&header);
        for row in &self.attention {
            let mut cells = vec![
                row.kind.clone(),
                row.bytes_per_token.to_string(),
                format!("{:.1}%", 100.0 * row.share_of_mha),
                human(row.cache_bytes),
            ];
            cells.extend([row.largest_context, row.largest_batch].into_iter().flatten().map(|n| n.to_string()));
            table.add_row(cells);
        }
        text += &format!("{}\n", table.trim_fmt());
        if self.memory_bytes.is_none() {
            text += "\n--memory SIZE tells which contexts and how many sequences fit.\n";
        }
        text
    }

    fn plot(&self, plan: &Plan) -> Plot {
        let name = self.model.as_ref().map_or("", |model| model.model_type);
        let of = if name.is_empty() { String::new() } else { format!(" of {name}") };
        let free = plan.memory.map(|memory| memory.saturating_sub(plan.weights + plan.scratch));
        Plot {
            title: format!("Cache{of} of one sequence, {}", self.cache),
            contexts: (1 << 10, 1 << 20),
            lines: self.attention.iter().map(|row| (row.kind.clone(), row.bytes_per_token)).collect(),
            level: free.filter(|free| *free > 0).map(|free| (format!("{} of memory for the cache", human(free)), free)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_people_write_them() {
        for (text, bytes) in
            [("80GiB", 80 << 30), ("24GB", 24_000_000_000), ("500 MiB", 500 << 20), ("1.5k", 1500), ("64", 64)]
        {
            assert_eq!(size(text), Ok(bytes), "{text}");
        }
        for text in ["", "much", "-3GB", "0", "0GiB", "3 apples"] {
            assert!(size(text).is_err(), "{text}");
        }
    }
}
