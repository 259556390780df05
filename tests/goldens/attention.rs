//! Absorbed attention: outputs and log-sum-exps.

use lamina::gpu::{Device, Recording};
use lamina::kernels::mla_combine::{self, MlaCombine, Output};
use lamina::kernels::mla_decode::{self, MlaDecode};
use lamina::kernels::mla_decode_coop::{self, MlaDecodeCoop};
use lamina::kernels::plan::{Borders, Target, plan};
use lamina::kernels::weights::WeightFormat;
use lamina::kernels::{CacheChunk, Kernel, Sequence};
use lamina::num::record::RecordFormat;

use super::{Golden, devices, hold, nmse, stream};

/// As in make_goldens.py: format, heads, r, p, tokens before, new tokens, factor of the queries.
struct Shape {
    name: &'static str,
    format: Format,
    heads: usize,
    widths: (usize, usize),
    position: usize,
    tokens: usize,
    sharp: f32,
}

#[derive(Clone, Copy, PartialEq)]
enum Format {
    F16,
    /// Its values are f16's, too.
    Bf16,
    Fp8,
}
use Format::{Bf16, F16, Fp8};

#[rustfmt::skip]
const CASES: [Shape; 16] = [
    Shape { name: "f16-first", format: F16, heads: 16, widths: (512, 64), position: 0, tokens: 1, sharp: 1.0 },
    Shape { name: "f16-peaked", format: F16, heads: 16, widths: (512, 64), position: 62, tokens: 1, sharp: 8.0 },
    Shape { name: "f16-heads", format: F16, heads: 128, widths: (512, 64), position: 129, tokens: 1, sharp: 1.0 },
    Shape { name: "f16-two", format: F16, heads: 20, widths: (512, 64), position: 998, tokens: 2, sharp: 1.0 },
    Shape { name: "f16-narrow", format: F16, heads: 40, widths: (256, 32), position: 256, tokens: 1, sharp: 4.0 },
    Shape { name: "f16-no-rope", format: F16, heads: 12, widths: (512, 0), position: 196, tokens: 4, sharp: 1.0 },
    Shape { name: "f16-small", format: F16, heads: 3, widths: (48, 16), position: 1495, tokens: 5, sharp: 1.0 },
    Shape { name: "bf16-one", format: Bf16, heads: 16, widths: (512, 64), position: 699, tokens: 1, sharp: 1.0 },
    Shape { name: "bf16-heads", format: Bf16, heads: 64, widths: (512, 64), position: 128, tokens: 1, sharp: 4.0 },
    Shape { name: "bf16-three", format: Bf16, heads: 32, widths: (256, 64), position: 297, tokens: 3, sharp: 1.0 },
    Shape { name: "bf16-long", format: Bf16, heads: 1, widths: (512, 64), position: 4095, tokens: 1, sharp: 1.0 },
    Shape { name: "fp8-page", format: Fp8, heads: 16, widths: (512, 64), position: 64, tokens: 1, sharp: 1.0 },
    Shape { name: "fp8-long", format: Fp8, heads: 16, widths: (512, 64), position: 2047, tokens: 1, sharp: 4.0 },
    Shape { name: "fp8-heads", format: Fp8, heads: 128, widths: (512, 64), position: 63, tokens: 1, sharp: 1.0 },
    Shape { name: "fp8-eight", format: Fp8, heads: 9, widths: (512, 64), position: 313, tokens: 8, sharp: 1.0 },
    Shape { name: "fp8-small", format: Fp8, heads: 3, widths: (32, 8), position: 499, tokens: 1, sharp: 1.0 },
];

const PAGE: usize = 64;

/// What decodes.
enum Decoder {
    Plain(MlaDecode),
    Matrices(MlaDecodeCoop),
}

/// A case with its inputs.
struct Inputs<'a> {
    shape: &'a Shape,
    /// `[tokens, heads, width]`, in units of log2.
    queries: Vec<f32>,
    /// Latent and rope key of each token.
    records: Vec<(Vec<f32>, Vec<f32>)>,
}

impl Shape {
    fn inputs(&self, number: u32) -> Inputs<'_> {
        let (r, p) = self.widths;
        let bits = if self.format == Bf16 { 8 } else { 11 };
        let length = self.position + self.tokens;
        let scale = self.sharp / (192f32).sqrt() * std::f32::consts::LOG2_E;
        let queries = stream(2 * number + 100, 0, self.tokens * self.heads * (r + p), bits, scale);
        let pad = |query: &[f32]| [query, &vec![0.0; (r + p).next_multiple_of(8) - r - p]].concat();
        let queries = queries.chunks(r + p).flat_map(pad).collect();
        let values = stream(2 * number + 101, 0, length * (r + p), bits, 1.0);
        let record = |(token, values): (usize, &[f32])| {
            let shift = |(i, v): (usize, &f32)| v * 0.5f32.powi(((token + 3 * (i / 128)) % 8) as i32);
            let (latent, rope) = values.split_at(r);
            let latent = match self.format {
                Fp8 => latent.iter().enumerate().map(shift).collect(),
                _ => latent.to_vec(),
            };
            (latent, rope.to_vec())
        };
        Inputs { shape: self, queries, records: values.chunks(r + p).enumerate().map(record).collect() }
    }
}

impl Inputs<'_> {
    /// Outputs `[tokens, heads, r]` and log-sum-exps `[tokens, heads]`. Pages stand in reverse.
    fn run(&self, device: &Device, decoder: &Decoder, format: RecordFormat) -> (Vec<f32>, Vec<f32>) {
        let Shape { heads, widths: (r, p), position, tokens, .. } = *self.shape;
        let pages = self.records.len().div_ceil(PAGE);
        let bytes = format.bytes(r, p);
        let mut cache = vec![0xFF; pages * PAGE * bytes];
        for (token, (latent, rope)) in self.records.iter().enumerate() {
            let slot = (pages - 1 - token / PAGE) * PAGE + token % PAGE;
            cache[slot * bytes..][..bytes].copy_from_slice(&format.encode(latent, rope));
        }
        let table: Vec<u32> = (0..pages as u32).rev().collect();
        let sequence = Sequence { position: position as u32, tokens: tokens as u32, ..Sequence::default() };
        let mut batch = [sequence];
        let rows = match decoder {
            Decoder::Plain(kernel) => kernel.tuned().rows,
            Decoder::Matrices(kernel) => kernel.tuned().rows,
        };
        let target = Target {
            page: PAGE as u32,
            chunk_pages: pages as u32,
            heads: heads as u32,
            rows,
            little: None,
            workgroups: 8,
            partials: u32::MAX,
            borders: Borders::Balanced,
        };
        let plan = plan(&mut batch, &table, &target).expect("the pages lie in one run");
        let view = |bytes: &[u8], name| device.upload(bytes, name).expect("room for it").view();
        let scratch = |values: usize, name| device.alloc(4 * values as u64, name).expect("room for it").view();
        let (output, lse) = (scratch(tokens * heads * r, "output"), scratch(tokens * heads, "lse"));
        let partials = scratch(plan.partials as usize * heads * (r + 4), "partials");
        let args = mla_decode::Args {
            batch: view(bytemuck::cast_slice(&batch), "batch"),
            splits: view(bytemuck::cast_slice(&plan.splits), "splits"),
            block_table: view(bytemuck::cast_slice(&table), "block_table"),
            queries: view(bytemuck::cast_slice(&self.queries), "queries"),
            cache: &[CacheChunk { first_page: 0, pages: pages as u32, view: view(&cache, "cache") }],
            partials: partials.clone(),
            plan: &plan,
            heads: heads as u32,
            most_tokens: tokens as u32,
            page: PAGE as u32,
        };
        let mut recording = Recording::new();
        match decoder {
            Decoder::Plain(kernel) => kernel.record(&mut recording, &args),
            Decoder::Matrices(kernel) => kernel.record(&mut recording, &args),
        }
        let (latent, format) = (r as u32, WeightFormat::F32);
        let spec =
            mla_combine::Spec { latent, nope: 8, value: 8, format, output: Output::Latent, tokens: tokens as u32 };
        let args = mla_combine::Args {
            batch: args.batch,
            rows: view(bytemuck::cast_slice(&Sequence::rows(&batch)), "rows"),
            partials,
            kv_b: &[],
            output: output.clone(),
            lse: lse.clone(),
            tokens: tokens as u32,
            heads: heads as u32,
        };
        MlaCombine::chosen(&spec, device.caps()).record(&mut recording, &args);
        device.submit(&recording).expect("the driver does its part");
        let bytes = pollster::block_on(device.read(&[output, lse])).expect("the device answers");
        let values = |i: usize, count: usize| bytemuck::pod_collect_to_vec::<u8, f32>(&bytes[i])[..count].to_vec();
        (values(0, tokens * heads * r), values(1, tokens * heads))
    }
}

/// The decoders for a case on a device, with the NMSE that each may have against float64 arithmetic: sums of up to
/// 4,096 terms in other orders; matrix units take queries and weights as f16.
fn decoders(shape: &Shape, format: RecordFormat, device: &Device) -> Vec<(&'static str, Decoder, f64)> {
    let (latent, rope) = (shape.widths.0 as u32, shape.widths.1 as u32);
    let spec = mla_decode::Spec { latent, rope, format, rows: (shape.heads * shape.tokens) as u32 };
    let mut all = vec![("mla_decode", Decoder::Plain(MlaDecode::chosen(&spec, device.caps())), 1e-10)];
    if mla_decode_coop::MlaDecodeCoop::refusal(&spec, device.caps()).is_none() {
        all.push(("mla_decode_coop", Decoder::Matrices(MlaDecodeCoop::chosen(&spec, device.caps())), 1e-5));
    }
    all
}

#[test]
fn outputs_and_log_sum_exps_are_pytorchs_on_cuda() {
    let golden = Golden::open("attention.safetensors");
    let devices = devices();
    let mut wrong = Vec::new();
    for (number, shape) in (0..).zip(&CASES) {
        let inputs = shape.inputs(number);
        let tensor = |kind: &str| format!("{}.{kind}", shape.name);
        let (output, lse) = (golden.get(&tensor("output")), golden.get(&tensor("lse")));
        // What 16-bit attention of PyTorch rounds, mostly the softmax's weights and the outputs: at most 4.8e-6 and
        // 8.1e-8 in these files.
        let native = match shape.format {
            Fp8 => None,
            Bf16 => Some((golden.get(&tensor("native")), 1e-5)),
            F16 => Some((golden.get(&tensor("native")), 2e-7)),
        };
        assert_eq!(golden.has(&tensor("native")), native.is_some());
        let formats: &[RecordFormat] = match shape.format {
            F16 => &[RecordFormat::F16],
            Bf16 => &[RecordFormat::F16, RecordFormat::F32],
            Fp8 => &[RecordFormat::Fp8],
        };
        for device in &devices {
            for format in formats {
                for (kernel, decoder, tolerance) in decoders(shape, *format, device) {
                    let (found, found_lse) = inputs.run(device, &decoder, *format);
                    let what = format!("{}, {format:?} records, {kernel} on {}", shape.name, device.caps().label());
                    hold(&mut wrong, format!("{what}: output"), nmse(&found, &output), tolerance);
                    if let Some((native, rounding)) = &native {
                        hold(&mut wrong, format!("{what}: native"), nmse(&found, native), rounding + tolerance);
                    }
                    // Scores are f32: off by their rounding, 576 terms each.
                    let off = found_lse.iter().zip(&lse).map(|(f, e)| (f64::from(*f) - e).abs() / (1.0 + e.abs()));
                    let off = off.fold(0.0, |most, off| if off <= most { most } else { off });
                    let most = if tolerance > 1e-6 { 1e-3 } else { 1e-5 };
                    if !(off <= most) {
                        wrong.push(format!("{what}: lse off by {off:e}, over {most:e}"));
                    }
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{} wrong:\n{}", wrong.len(), wrong.join("\n"));
}
