//! `lamina info`: the adapters, and the path each kernel takes.

use serde::Serialize;

use super::{drivers, print, table};
use crate::gpu::{self, Caps, Device, DeviceType, Options, Selector};
use crate::kernels::linear::Linear;
use crate::kernels::mla_decode_coop::{Decoder, MlaDecodeCoop};
use crate::kernels::{ALL, Kernel, gemm_coop, mla_decode, mla_decode_fused, moe_layer, pieces};
use crate::num::record::RecordFormat;
use crate::{Error, Result};

const AFTER_HELP: &str = "\
Examples:
  lamina info                            what this machine has
  lamina --adapter gl:llvmpipe info      the paths that the kernels would take there
  lamina info --json                     the same as JSON (docs/cli.md has its fields)";

/// Show the adapters, which one is used, and the path each kernel takes on it
#[derive(Debug, clap::Args)]
#[command(after_help = AFTER_HELP)]
pub struct Args {
    /// Print one JSON object instead of text
    #[arg(long)]
    json: bool,
}

/// What `info` found; `--json` prints it.
#[derive(Serialize)]
struct Info {
    version: &'static str,
    adapters: Vec<Caps>,
    chosen: Chosen,
    kernels: Vec<Entry>,
    /// Choices between kernels.
    steps: Vec<(&'static str, String)>,
}

#[derive(Serialize)]
struct Chosen {
    /// The place in `adapters`; `null` is the `cpu` device.
    index: Option<usize>,
    adapter: String,
    backend: String,
    why: String,
}

#[derive(Serialize)]
struct Entry {
    kernel: &'static str,
    choices: Vec<Choice>,
}

#[derive(Serialize)]
struct Choice {
    spec: String,
    variant: &'static str,
    why: String,
}

impl Args {
    /// Prints what there is.
    pub fn run(&self, selector: &Selector) -> Result<u8> {
        let mut adapters = pollster::block_on(gpu::list());
        let index = selector.choose(&adapters)?;
        let options = Options::default();
        let opened = match index {
            Some(_) => pollster::block_on(Device::open(selector, &options)),
            None => Ok(Device::cpu(&options)),
        };
        let caps = match (&opened, index) {
            (Ok(device), _) => device.caps().clone(),
            // What the adapter says stands all the same.
            (Err(Error::Driver { .. } | Error::DeviceLost { .. }), Some(i)) => adapters[i].clone(),
            _ => return opened.map(|_| 0),
        };
        if let Some(i) = index {
            adapters[i] = caps.clone(); // with what only an open device shows
        }
        let kernel = |entry: &crate::kernels::Entry| {
            let choices = (entry.choices)(&caps).into_iter().map(|(spec, variant, why)| Choice { spec, variant, why });
            Entry { kernel: entry.name, choices: choices.collect() }
        };
        let (decoder, matrices) = match &opened {
            Ok(device) => decoder(device)?,
            Err(fault) => (format!("unknown: {fault}"), false),
        };
        let info = Info {
            version: env!("CARGO_PKG_VERSION"),
            kernels: ALL.iter().map(kernel).collect(),
            steps: vec![
                ("products", products(&caps)),
                ("experts", experts(&caps)),
                ("prompts", prompts(&caps, matrices)),
                ("decode", mla_decode_fused::CHOICE.to_string()),
                ("mla_decode", decoder),
            ],
            chosen: Chosen { index, why: why(selector, &adapters, index), adapter: caps.name, backend: caps.backend },
            adapters,
        };
        if self.json {
            print(&format!("{}\n", serde_json::to_string_pretty(&info).expect("plain data")))?;
        } else {
            print(&info.text())?;
        }
        Ok(0)
    }
}

/// How prompts are attended to; `matrices` says that decoding runs on matrix units.
fn prompts(caps: &Caps, matrices: bool) -> String {
    let rule = |prefill| pieces::Crossover::of(caps, matrices, prefill).to_string();
    match matrices {
        true => format!("{}; where W_UK and W_UV are not f16, {}", rule(true), rule(false)),
        false => rule(false),
    }
}

/// Which kernels multiply with the weights.
fn products(caps: &Caps) -> String {
    let linear = Linear::new(caps);
    let rule = linear.crossover();
    match gemm_coop::refusal(caps) {
        Some(why) => format!("{rule}; on invocations: {why}"),
        None => {
            let from = rule.gemm_from;
            format!("{rule}; for f16 weights, where self-tests pass, gemm_coop on matrix units from {from} tokens on")
        }
    }
}

/// Which kernels multiply with the weights of experts.
fn experts(caps: &Caps) -> String {
    let few = moe_layer::Crossover::of(caps).to_string();
    match gemm_coop::refusal(caps) {
        Some(_) => few,
        None => format!("{few}; on matrix units, for f16 weights where self-tests pass, {}", moe_layer::on_matrices()),
    }
}

/// Which kernel decodes and whether on matrix units, after the self-test of the one on them where the adapter has
/// some. Each model is tested again as it is loaded.
fn decoder(device: &Device) -> Result<(String, bool)> {
    let spec = |rows, format| mla_decode::Spec { latent: 512, rope: 64, format, rows };
    if let Some(why) = MlaDecodeCoop::refusal(&spec(16, RecordFormat::F16), device.caps()) {
        return Ok((format!("on invocations: {why}"), false));
    }
    let (mut passed, mut faults) = (Vec::new(), String::new());
    for (format, name) in [(RecordFormat::F16, "f16"), (RecordFormat::Fp8, "fp8")] {
        let tried = |rows| MlaDecodeCoop::tried(&spec(rows, format), device);
        match (tried(16)?, tried(128)?) {
            (Ok(few), Ok(many)) => passed.push((name, Decoder::of(many, Some(few)))),
            (few, many) => {
                for fault in [few.err(), many.err()].into_iter().flatten() {
                    faults += &format!("; the self-test of mla_decode_coop with {name} failed, {fault}");
                }
            }
        }
    }
    let Some((_, many)) = passed.first() else { return Ok((format!("on invocations{faults}"), false)) };
    let formats = passed.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(" or ");
    let little = many.little().map_or_else(String::new, |little| format!(", in {little}"));
    let how = format!("on matrix units (mla_decode_coop, its self-test passed) where the cache is {formats}");
    Ok((format!("{how}, in blocks of {} rows for 128 heads{little}{faults}", many.rows()), true))
}

/// Why that adapter.
fn why(selector: &Selector, adapters: &[Caps], index: Option<usize>) -> String {
    match (selector, index) {
        (Selector::Best, None) => "there is no GPU adapter: the kernels' CPU twins serve".into(),
        (Selector::Best, Some(_)) if adapters.len() == 1 => "it is the only one".into(),
        (Selector::Best, Some(i)) => {
            let kind = match adapters[i].device_type {
                DeviceType::Discrete => "a discrete GPU goes before all others",
                DeviceType::Integrated => "an integrated GPU goes before virtual ones and CPU drivers",
                DeviceType::Virtual => "a virtual GPU goes before CPU drivers",
                DeviceType::Other => "its driver names no kind, which goes before CPU drivers",
                DeviceType::Cpu => "there are only CPU drivers",
            };
            let equals = adapters.iter().filter(|a| a.device_type == adapters[i].device_type).count();
            let among = if equals > 1 { "; of equals the first, GL last" } else { "" };
            format!("{kind}{among}")
        }
        _ => "--adapter or LAMINA_ADAPTER names it".into(),
    }
}

impl Info {
    fn text(&self) -> String {
        let mut text = format!("lamina {}\n\n", self.version);
        for (i, caps) in self.adapters.iter().enumerate() {
            let mark = if self.chosen.index == Some(i) { "  <- used" } else { "" };
            text += &format!("adapter {i}: {}:{}{mark}\n", caps.backend, caps.name);
            for (name, value) in facts(caps) {
                text += &format!("  {name:<17} {value}\n");
            }
            text.push('\n');
        }
        if self.adapters.is_empty() {
            text += &format!("No GPU adapter on this system. To get one:\n{}\n\n", drivers::advice());
        }
        text += &format!("used: {}:{}, since {}\n\n", self.chosen.backend, self.chosen.adapter, self.chosen.why);
        let mut table = table(&["kernel", "variant", "why", "for example"]);
        for kernel in &self.kernels {
            for choice in &kernel.choices {
                table.add_row([kernel.kernel, choice.variant, &choice.why, &choice.spec]);
            }
        }
        text += &(table.trim_fmt() + "\n\nWhich kernels a step takes:\n");
        for (what, choice) in &self.steps {
            text += &format!("  {what:<9} {choice}\n");
        }
        text
    }
}

fn facts(caps: &Caps) -> Vec<(&'static str, String)> {
    let yes = |b: bool| if b { "yes" } else { "no" }.to_string();
    let shape = |s: &gpu::CooperativeShape| format!("{}x{}x{} {} to {}", s.m, s.n, s.k, s.operands, s.result);
    let shapes: Vec<_> = caps.cooperative.iter().map(shape).collect();
    vec![
        ("type", format!("{:?}", caps.device_type).to_lowercase()),
        ("driver", caps.driver.clone()),
        ("largest buffer", bytes(caps.buffer_bytes)),
        ("largest binding", bytes(caps.binding_bytes)),
        ("storage buffers", format!("{} a kernel", caps.storage_buffers)),
        ("workgroup", format!("{} invocations, {}", caps.invocations, bytes(caps.workgroup_bytes.into()))),
        ("f16", yes(caps.f16)),
        (
            "subgroups",
            caps.subgroups.map_or("no".into(), |(min, max)| match min == max {
                true => format!("{min} wide"),
                false => format!("{min} to {max} wide"),
            }),
        ),
        ("matrix units", if shapes.is_empty() { "no".into() } else { shapes.join(", ") }),
        ("timestamps", yes(caps.timestamps)),
        ("pipelines on disk", yes(caps.pipeline_cache)),
    ]
}

/// A size in the largest binary unit that it has at least one of.
fn bytes(size: u64) -> String {
    let units = [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")];
    let Some((shift, unit)) = units.into_iter().find(|(shift, _)| size >> shift > 0) else {
        return format!("{size} B");
    };
    let value = size as f64 / (1u64 << shift) as f64;
    if value.fract() == 0.0 { format!("{value} {unit}") } else { format!("{value:.1} {unit}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_read_as_people_write_them() {
        let sizes = [(0, "0 B"), (1023, "1023 B"), (16 << 10, "16 KiB"), (128 << 20, "128 MiB"), (3 << 29, "1.5 GiB")];
        for (size, text) in sizes {
            assert_eq!(bytes(size), text);
        }
    }

    #[test]
    fn the_choice_of_an_adapter_is_explained() {
        let of = |device_type| Caps { device_type, ..Caps::portable() };
        let list = [of(DeviceType::Cpu), of(DeviceType::Discrete), of(DeviceType::Discrete)];
        assert!(why(&Selector::Best, &list, Some(1)).contains("discrete GPU goes before all others; of equals"));
        assert!(why(&Selector::Best, &list[..2], Some(1)).ends_with("all others"));
        assert!(why(&Selector::Best, &list[..1], Some(0)).contains("only one"));
        assert!(why(&Selector::Best, &[], None).contains("no GPU adapter"));
        assert!(why(&Selector::Index(0), &list, Some(0)).contains("--adapter"));
    }

    #[test]
    fn rules_of_matrix_units_are_told_where_there_are_some() {
        let part = "moe_gemm_coop in tiles of 32, from 24 of 64, from 96 of 128";
        assert!(experts(&Caps::matrices()).contains(part), "{}", experts(&Caps::matrices()));
        assert!(!experts(&Caps::portable()).contains("matrix units"));
        assert!(
            products(&Caps::matrices()).contains("gemm_coop") && products(&Caps::portable()).contains("on invocations")
        );
    }
}
