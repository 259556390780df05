//! `mla_combine`: the splits of `mla_decode` merged by log-sum-exp, and behind it W_UV, which turns a
//! head's latent output into its values.

use std::sync::Arc;

use rayon::prelude::*;

use super::inputs::{Inputs, words};
use super::up_projection::{self, HeadChunk};
use super::weights::WeightFormat;
use super::{Case, Check, Choice, Data, Field, Job, Kernel, Row, Sequence, Set, Tensor, Tolerance, Variant};
use crate::gpu::{Caps, Grid, Host, Recording, Shader, Source, View, grid_1d};
use crate::{reference, wgsl};

params! {
    /// Sizes of a call for one chunk of heads.
    pub struct Params {
        /// Rows of the step.
        pub tokens: u32,
        /// Query heads.
        pub heads: u32,
        /// The chunk's first head.
        pub first_head: u32,
        /// Elements from one token's output to the next: heads times r or v.
        pub output_stride: u32,
    }
}

/// What is written for each row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Output {
    /// The merged latent (r).
    Latent,
    /// W_UV applied to it (v).
    Values,
}

/// What the model fixes.
#[derive(Clone, Debug, PartialEq)]
pub struct Spec {
    /// Width of the latent (`kv_lora_rank`), a multiple of 16.
    pub latent: u32,
    /// Rows of W_UK of a head (`qk_nope_head_dim`), which stand before its W_UV.
    pub nope: u32,
    /// Width of a value (`v_head_dim`), a multiple of 8.
    pub value: u32,
    /// The element type of `kv_b`.
    pub format: WeightFormat,
    /// What is written.
    pub output: Output,
    /// Tokens of a step: a hint for how many share a read of W_UV; any number runs.
    pub tokens: u32,
}

impl Spec {
    /// Elements that are written for a row.
    fn width(&self) -> u32 {
        if self.output == Output::Values { self.value } else { self.latent }
    }
}

/// How it runs.
#[derive(Clone, Debug)]
pub struct Tuning {
    /// Invocations a workgroup, a multiple of 16.
    pub workgroup: u32,
    /// Tokens that share a read of W_UV, at most 4.
    pub tokens: u32,
    /// Rows of W_UV that a workgroup takes; each part merges the splits again.
    pub part: u32,
    /// vec4 of a latent that a workgroup merges at once.
    pub columns: u32,
    /// Each invocation merges its column alone, of as many rows as fill the workgroup: for few splits.
    pub serial: bool,
}

/// What a call reads and writes.
pub struct Args<'a> {
    /// `[sequences]` [`Sequence`].
    pub batch: View,
    /// `[tokens]` [`Row`].
    pub rows: View,
    /// `[partial tokens * heads, latent + 4]` f32, of `mla_decode`.
    pub partials: View,
    /// The up-projections; none for [`Output::Latent`].
    pub kv_b: &'a [HeadChunk],
    /// `[tokens, heads * width]` f32, written; the width is r or v.
    pub output: View,
    /// `[tokens, heads]` f32, written: the natural log-sum-exp, -3e38 for a row that saw no token.
    pub lse: View,
    /// Rows of the step.
    pub tokens: u32,
    /// Query heads.
    pub heads: u32,
}

/// The kernel `mla_combine`.
pub struct MlaCombine {
    spec: Spec,
    tuning: Tuning,
    shader: Arc<Shader>,
}

/// The most splits of a sequence.
pub const MOST_SPLITS: u32 = 256;
/// Steps of so many tokens fill a device with few splits each.
const SERIAL_TOKENS: u32 = 16;
/// Invocations a workgroup.
const WORKGROUP: u32 = 256;
/// As in `gemv`, for software drivers: one token of the model of stories takes a fifth of the time.
const NARROW: u32 = super::gemv::NARROW.0;
/// The log-sum-exp of a row that saw no token.
pub const NOTHING: f32 = -3.0e38;

/// A log-sum-exp as twins write it: -inf is [`NOTHING`]; one that is no number stays so, which `f64::max` would hide.
pub(super) fn at_least_nothing(lse: f64) -> f64 {
    lse.clamp(f64::from(NOTHING), f64::INFINITY)
}

impl Kernel for MlaCombine {
    const NAME: &'static str = "mla_combine";
    const SOURCE: Source = wgsl!("mla_combine");
    const PARAMS: &'static [Field] = Params::FIELDS;
    type Spec = Spec;
    type Tuning = Tuning;

    fn variants(spec: &Spec, caps: &Caps) -> Vec<Variant<Tuning>> {
        // Latents of a block of tokens take at most 8 KiB of workgroup memory.
        let most = (2048 / spec.latent).clamp(1, 4);
        let tokens = if spec.output == Output::Values { 1 << spec.tokens.clamp(1, most).ilog2() } else { 1 };
        // A single token gives few workgroups: merging again costs less than idle compute units.
        let all = spec.value.next_multiple_of(16);
        let part = if spec.tokens <= 4 { 16 } else { all };
        let whole = (spec.latent / 4).min(WORKGROUP);
        let latent = spec.output == Output::Latent;
        let serial = latent && spec.tokens >= SERIAL_TOKENS;
        // A single token's latents alone: more workgroups, and more of their lanes for the splits.
        let columns = if latent && !serial { whole.min(16) } else { whole };
        let portable = Tuning { workgroup: WORKGROUP, tokens, part, columns, serial };
        let mut variants = vec![Variant { name: "portable", tuning: portable.clone() }];
        if caps.is_software() && !serial {
            // Groups of lanes share the splits: one long sum would be less exact.
            let tuning = Tuning { workgroup: NARROW, part: all, columns: whole.min(NARROW / 4), ..portable };
            variants.push(Variant { name: "narrow", tuning });
        }
        variants
    }

    fn tuning(spec: &Spec, caps: &Caps) -> Choice<Tuning> {
        let variant = Self::variants(spec, caps).pop().expect("the portable variant is always there");
        let why = match spec.output {
            Output::Latent if variant.tuning.serial => "few splits each, of many rows".to_string(),
            Output::Latent => format!("{} values a workgroup", 4 * variant.tuning.columns),
            Output::Values => format!("{} rows of W_UV for {} tokens", variant.tuning.part, variant.tuning.tokens),
        };
        Choice { variant, why }
    }

    fn new(spec: &Spec, tuning: &Tuning) -> MlaCombine {
        let Spec { latent, nope, value, .. } = *spec;
        let fits = latent > 0 && latent.is_multiple_of(16) && nope.is_multiple_of(8) && value.is_multiple_of(8);
        assert!(fits, "mla_combine: r must be a multiple of 16, n and v of 8: {spec:?}");
        let shader = Shader::of(Self::SOURCE)
            .u32("R", latent)
            .u32("N", nope)
            .u32("V", value)
            .bool("VALUES", spec.output == Output::Values)
            .u32("WORKGROUP", tuning.workgroup)
            .u32("TOKENS", tuning.tokens)
            .u32("PART", tuning.part)
            .u32("COLUMNS", tuning.columns)
            .bool("SERIAL", tuning.serial)
            .module(wgsl!("lib/batch"))
            .module(spec.format.unpack4())
            .build();
        MlaCombine { spec: spec.clone(), tuning: tuning.clone(), shader }
    }

    fn shader(&self) -> &Arc<Shader> {
        &self.shader
    }

    fn cases(set: Set) -> Vec<Case<MlaCombine>> {
        let shape = |widths, heads, sequences: &[(u32, u32)], chunks, format| Shape {
            widths,
            heads,
            sequences: sequences.to_vec(),
            chunks,
            format,
            hint: sequences.iter().map(|(tokens, _)| tokens).sum(),
        };
        let f16 = WeightFormat::F16;
        let lite = (512, 128, 128);
        if set == Set::Timed {
            let batch: Vec<(u32, u32)> = vec![(1, 2); 128];
            let timed = [vec![(1, 1)], vec![(1, 32)], vec![(1, 256)], batch];
            let both = |s: &Vec<(u32, u32)>| [0, 1].map(|chunks| shape(lite, 16, s, chunks, f16).case());
            return timed.iter().flat_map(both).collect();
        }
        let (bf16, f32) = (WeightFormat::Bf16, WeightFormat::F32);
        let mixed: &[(u32, u32)] = &[(1, 1), (3, 5), (0, 0), (2, 31), (1, 2)];
        [
            shape(lite, 3, &[(1, 1)], 1, f16),
            shape(lite, 3, &[(1, 40)], 2, bf16),
            shape(lite, 2, mixed, 1, f16),
            shape((32, 24, 40), 9, mixed, 3, f32),
            shape((48, 8, 24), 20, &[(8, 3)], 5, f16),
            shape((16, 8, 8), 1, &[(1, 256)], 1, f32),
            shape((256, 64, 64), 2, &[(2, 17), (1, 3)], 1, bf16),
            shape((80, 16, 136), 3, &[(5, 2)], 2, f16),
            shape((1040, 8, 16), 1, &[(3, 6)], 1, f16),
            shape((32, 8, 8), 128, &[(1, 3), (2, 2)], 5, f16),
            // Other numbers of tokens than the hint says.
            Shape { hint: 1, ..shape((144, 8, 48), 3, &[(6, 4)], 1, f16) },
            Shape { hint: 64, ..shape((144, 8, 72), 3, &[(1, 9)], 2, f16) },
            // The merged latent alone.
            shape(lite, 3, mixed, 0, f16),
            shape((32, 24, 40), 9, &[(2, 1), (1, 3)], 0, f16),
            shape((16, 8, 8), 1, &[(1, 256), (4, 1)], 0, f16),
            // More splits than the lanes have under way at once.
            shape((512, 8, 8), 1, &[(1, 130)], 0, f16),
            shape((1040, 8, 16), 2, &[(1, 7)], 0, f16),
            shape((32, 24, 40), 3, &[(20, 2), (1, 3), (0, 0), (3, 4)], 0, f16),
            Shape { hint: 64, ..shape((1040, 8, 16), 3, mixed, 0, f16) },
        ]
        .map(Shape::case)
        .into()
    }
}

impl MlaCombine {
    /// Merges a step's splits; for values, a dispatch for each chunk of heads.
    ///
    /// # Panics
    /// When the up-projections do not fit the spec or the heads.
    pub fn record(&self, recording: &mut Recording, args: &Args) {
        let held: u32 = args.kv_b.iter().map(|chunk| chunk.heads).sum();
        if self.spec.output == Output::Values {
            assert!(held == args.heads, "mla_combine: the chunks of kv_b hold {held} of {} heads", args.heads);
            for chunk in args.kv_b {
                self.call(recording, args, chunk.first_head, chunk.heads, chunk.view.clone());
            }
        } else {
            assert!(held == 0, "mla_combine: kv_b was given, but the latent is asked for");
            self.call(recording, args, 0, args.heads, args.partials.clone());
        }
    }

    fn call(&self, recording: &mut Recording, args: &Args, first_head: u32, heads: u32, kv_b: View) {
        let (spec, tuning) = (self.spec.clone(), &self.tuning);
        let output_stride = args.heads * spec.width();
        let params = Params { tokens: args.tokens, heads: args.heads, first_head, output_stride };
        let bindings = vec![
            ("batch", args.batch.clone()),
            ("rows", args.rows.clone()),
            ("partials", args.partials.clone()),
            ("kv_b", kv_b),
            ("output", args.output.clone()),
            ("lse", args.lse.clone()),
        ];
        let parts = match spec.output {
            Output::Values => spec.value.div_ceil(tuning.part),
            Output::Latent => (spec.latent / 4).div_ceil(tuning.columns),
        };
        let grid = match tuning.serial {
            true => grid_1d((args.tokens * heads).div_ceil(tuning.workgroup / tuning.columns)),
            false => Grid::Direct([parts, heads, args.tokens.div_ceil(tuning.tokens)]),
        };
        let twin = move |host: &Host| twin(&spec, params, heads as usize, host);
        recording.call(&self.shader, bindings, bytemuck::bytes_of(&params), grid, twin);
    }
}

fn twin(spec: &Spec, params: Params, heads: usize, host: &Host) {
    let (n, v, r) = (spec.nope as usize, spec.value as usize, spec.latent as usize);
    let (batch, rows) = (host.get::<Sequence>("batch"), host.get::<Row>("rows"));
    let partials = host.get::<f32>("partials");
    let values = spec.output == Output::Values;
    let kv_b = if values { spec.format.decode(&host.get::<u8>("kv_b")) } else { Vec::new() };
    let stride = up_projection::stride(spec.latent) as usize;
    let all = params.heads as usize;
    let of = |i: usize| {
        let (token, head) = (i / heads, i % heads);
        let sequence = batch[rows[token].sequence as usize];
        let first = sequence.first_partial as usize + token - sequence.first_row as usize;
        let part = |split: usize| {
            let row = (first + split * sequence.tokens as usize) * all + params.first_head as usize + head;
            let partial = &partials[row * (r + 4)..][..r + 1];
            (&partial[..r], f64::from(partial[r]) * std::f64::consts::LN_2)
        };
        let parts: Vec<_> = (0..sequence.splits as usize).map(part).collect();
        let (mut output, lse) = reference::mla_combine::merge(&parts, r);
        if values {
            let rows = kv_b[(head * (n + v) + n) * stride..][..v * stride].chunks_exact(stride);
            output = reference::mla_combine::values(&output, rows);
        }
        let output: Vec<f32> = output.iter().map(|o| *o as f32).collect();
        (token * all + params.first_head as usize + head, output, at_least_nothing(lse) as f32)
    };
    let rows: Vec<_> = (0..params.tokens as usize * heads).into_par_iter().map(of).collect();
    for (row, output, lse) in rows {
        host.set("output", row * output.len(), &output);
        host.set("lse", row, &[lse]);
    }
}

/// A case: widths (r, n, v), sequences (tokens, splits), chunks of the up-projections, 0 for the latent.
#[derive(Clone)]
struct Shape {
    widths: (u32, u32, u32),
    heads: u32,
    sequences: Vec<(u32, u32)>,
    chunks: u32,
    format: WeightFormat,
    hint: u32,
}

/// The tensors of the up-projections' chunks.
const CHUNKS: [&str; 5] = ["kv_b 0", "kv_b 1", "kv_b 2", "kv_b 3", "kv_b 4"];

impl Shape {
    fn spec(&self) -> Spec {
        let (latent, nope, value) = self.widths;
        let output = if self.chunks == 0 { Output::Latent } else { Output::Values };
        Spec { latent, nope, value, format: self.format, output, tokens: self.hint }
    }

    fn case(self) -> Case<MlaCombine> {
        let (r, n, v) = self.widths;
        let Shape { heads, sequences, chunks, format, hint, .. } = &self;
        let spec = self.spec();
        let few = &sequences[..sequences.len().min(5)];
        let name = format!(
            "{heads} heads of {n}/{v}, latent {r}, {} sequences, (tokens, splits) {few:?}, {:?}, \
             {format:?}, {chunks} chunks, hint {hint}",
            sequences.len(),
            spec.output,
        );
        let h = f64::from(*heads);
        let partials = h * sequences.iter().map(|(tokens, splits)| f64::from(tokens * splits)).sum::<f64>();
        let rows = h * sequences.iter().map(|(tokens, _)| f64::from(*tokens)).sum::<f64>();
        let (mut flops, mut moved) = (2.0 * partials * f64::from(r), 4.0 * partials * f64::from(r + 4));
        moved += 4.0 * rows * f64::from(spec.width());
        if spec.output == Output::Values {
            flops += 2.0 * rows * f64::from(r * v);
            moved += h * f64::from(r * v) * format.bytes() as f64;
        }
        Case::new(name, spec, flops, move || self.job()).moving(moved)
    }

    fn job(&self) -> Job<MlaCombine> {
        let spec = self.spec();
        let (r, heads) = (spec.latent as usize, self.heads as usize);
        let mut inputs = Inputs::seed(u64::from(spec.latent * 31 + spec.value + self.heads * 7 + self.chunks));
        let (mut batch, mut first_row, mut first_partial) = (Vec::new(), 0, 0);
        let mut partials: Vec<f32> = Vec::new();
        for (tokens, splits) in &self.sequences {
            // A token's row of partials that nobody may read stands before each sequence's.
            partials.extend(vec![f32::NAN; heads * (r + 4)]);
            first_partial += 1;
            let (tokens, splits) = (*tokens, *splits);
            batch.push(Sequence { tokens, first_row, first_partial, splits, ..Sequence::default() });
            for split in 0..splits {
                for token in 0..tokens {
                    // Causal masks leave splits without a token: -inf or the least number, and values
                    // that must not count. One row of a sequence of three sees nothing at all.
                    let blind = tokens == 3 && token == 1;
                    let empty = blind || split > 0 && (split + token) % 3 == 0;
                    for _ in 0..heads {
                        partials.extend((0..r).map(|_| if empty { f32::NAN } else { inputs.normal() }));
                        let lse = if split % 2 == 0 { f32::NEG_INFINITY } else { NOTHING };
                        partials.push(if empty { lse } else { 8.0 + 2.0 * inputs.normal() });
                        partials.extend([f32::NAN; 3]);
                    }
                }
            }
            first_row += tokens;
            first_partial += tokens * splits;
        }
        let tokens = first_row as usize;
        let width = spec.width() as usize;
        let tolerance = Tolerance::f32(r);
        let output = Data::poison(tokens * heads * width);
        let mut tensors = vec![
            Tensor::input("batch", words(&batch)),
            Tensor::input("rows", words(&Sequence::rows(&batch))),
            Tensor::input("partials", Data::F32(partials)),
            Tensor::output("output", output, Check::rows(width, tolerance)),
            Tensor::output("lse", Data::poison(tokens * heads), Check::rows(heads, Tolerance::f32(16))),
        ];
        let cut = if self.chunks == 0 { Vec::new() } else { up_projection::cut(self.heads, self.chunks) };
        for (name, heads) in CHUNKS.iter().zip(&cut) {
            let rows = (heads * (spec.nope + spec.value)) as usize;
            tensors.push(Tensor::input(name, up_projection::draw(&mut inputs, self.format, rows, r)));
        }
        let case = self.clone();
        Job::new(tensors, move |kernel: &MlaCombine, t, recording| {
            let mut kv_b = Vec::new();
            let mut first_head = 0;
            for (name, heads) in CHUNKS.iter().zip(&cut) {
                kv_b.push(HeadChunk { first_head, heads: *heads, view: t.get(name) });
                first_head += heads;
            }
            let args = Args {
                batch: t.get("batch"),
                rows: t.get("rows"),
                partials: t.get("partials"),
                kv_b: &kv_b,
                output: t.get("output"),
                lse: t.get("lse"),
                tokens: first_row,
                heads: case.heads,
            };
            kernel.record(recording, &args);
        })
    }
}
