//! `mla_absorb`: queries for the latent cache. A head's W_UK is applied to the query instead of to
//! every cached latent (DeepSeek-V2, arXiv:2405.04434, section 2.1), the rope part is turned to its
//! position, and all is scaled for a softmax in base 2.

use std::sync::Arc;

use rayon::prelude::*;

use super::inputs::{Inputs, strided, words};
use super::mla_append::rope_module;
use super::up_projection::{self, HeadChunk};
use super::weights::WeightFormat;
use super::{Case, Check, Choice, Data, Field, Job, Kernel, Row, Set, Tensor, Tolerance, Variant};
use crate::gpu::{Caps, Grid, Host, Recording, Shader, Source, View};
use crate::num::rope::{Frequencies, RopeLayout};
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
        /// Elements from one token's queries to the next, a multiple of 4.
        pub q_stride: u32,
        /// Softmax scale times log2(e).
        pub scale: f32,
        /// Growth of the queries with the position: `1 + beta ln(1 + floor(position / length))`.
        pub beta: f32,
        /// Positions of one step of that growth.
        pub length: u32,
    }
}

/// What the model fixes.
#[derive(Clone, Debug, PartialEq)]
pub struct Spec {
    /// Width of a query's part without rope (`qk_nope_head_dim`), a multiple of 8.
    pub nope: u32,
    /// Width of its rope part (`qk_rope_head_dim`), even, 0 for none.
    pub rope: u32,
    /// Width of a value (`v_head_dim`): W_UV's rows stand between the heads' W_UK.
    pub value: u32,
    /// Width of the latent (`kv_lora_rank`), a multiple of 16.
    pub latent: u32,
    /// The element type of `kv_b`.
    pub format: WeightFormat,
    /// Which elements of the rope part turn together.
    pub layout: RopeLayout,
    /// Tokens of a step: a hint for how many share a read of W_UK; any number runs.
    pub tokens: u32,
}

impl Spec {
    /// Elements of an absorbed query: latent and rope part, rounded up to 8.
    pub fn width(&self) -> u32 {
        (self.latent + self.rope).next_multiple_of(8)
    }
}

/// How it runs.
#[derive(Clone, Debug)]
pub struct Tuning {
    /// Tokens that share a read of W_UK.
    pub tokens: u32,
}

/// What a call reads and writes.
pub struct Args<'a> {
    /// `[tokens]` [`Row`].
    pub rows: View,
    /// `[tokens, q_stride]` f32: heads of n + p, the rope part not turned.
    pub q: View,
    /// The up-projections.
    pub kv_b: &'a [HeadChunk],
    /// `[256 + blocks, rope / 2]` (cos, sin) f32; any buffer where rope is 0.
    pub rope_table: View,
    /// `[tokens * heads, width]` f32, written.
    pub queries: View,
    /// Rows of the step.
    pub tokens: u32,
    /// Query heads.
    pub heads: u32,
    /// Elements from one token's queries to the next, a multiple of 4.
    pub q_stride: u32,
    /// Softmax scale.
    pub scale: f32,
    /// Growth of the queries with the position, `1 + beta ln(1 + floor(position / length))`; 0 for none.
    pub beta: f32,
    /// Positions of one step of that growth.
    pub length: u32,
}

/// The kernel `mla_absorb`.
pub struct MlaAbsorb {
    spec: Spec,
    tuning: Tuning,
    shader: Arc<Shader>,
}

/// Latent columns of a workgroup.
const COLUMNS: u32 = 64;
/// What the queries of a block of tokens may take of workgroup memory, f32.
const STAGED: u32 = 3072;

impl Kernel for MlaAbsorb {
    const NAME: &'static str = "mla_absorb";
    const SOURCE: Source = wgsl!("mla_absorb");
    const PARAMS: &'static [Field] = Params::FIELDS;
    type Spec = Spec;
    type Tuning = Tuning;

    fn variants(spec: &Spec, _: &Caps) -> Vec<Variant<Tuning>> {
        let each = spec.nope.next_multiple_of(64).max(spec.width() - spec.latent);
        let most = (STAGED / each).clamp(1, 8);
        let tokens = 1 << spec.tokens.clamp(1, most).ilog2();
        vec![Variant { name: "portable", tuning: Tuning { tokens } }]
    }

    fn tuning(spec: &Spec, caps: &Caps) -> Choice<Tuning> {
        let variant = Self::variants(spec, caps).remove(0);
        let why = format!("W_UK is read once for {} of {} tokens", variant.tuning.tokens, spec.tokens);
        Choice { variant, why }
    }

    fn new(spec: &Spec, tuning: &Tuning) -> MlaAbsorb {
        let Spec { nope, rope, value, latent, .. } = *spec;
        let eights = nope > 0 && nope.is_multiple_of(8) && value.is_multiple_of(8);
        let fits = eights && rope.is_multiple_of(2) && latent > 0 && latent.is_multiple_of(16);
        assert!(fits, "mla_absorb: n and v must be multiples of 8, p of 2, r of 16: {spec:?}");
        let shader = Shader::of(Self::SOURCE)
            .u32("N", nope)
            .u32("P", rope)
            .u32("V", value)
            .u32("R", latent)
            .u32("W", spec.width())
            .u32("TOKENS", tuning.tokens)
            .module(wgsl!("lib/batch"))
            .module(wgsl!("lib/rope_table"))
            .module(rope_module(spec.layout))
            .module(spec.format.unpack4())
            .build();
        MlaAbsorb { spec: spec.clone(), tuning: tuning.clone(), shader }
    }

    fn shader(&self) -> &Arc<Shader> {
        &self.shader
    }

    fn cases(set: Set) -> Vec<Case<MlaAbsorb>> {
        let shape = |widths, heads, tokens, chunks, format| Shape {
            widths,
            heads,
            tokens,
            chunks,
            format,
            layout: RopeLayout::Interleaved,
            hint: tokens,
            beta: 0.0,
        };
        let f16 = WeightFormat::F16;
        if set == Set::Timed {
            return [1, 4, 128].map(|tokens| shape((128, 64, 128, 512), 16, tokens, 1, f16).case()).into();
        }
        let (bf16, f32) = (WeightFormat::Bf16, WeightFormat::F32);
        let half = RopeLayout::Half;
        [
            shape((128, 64, 128, 512), 3, 1, 1, f16),
            shape((128, 64, 128, 512), 3, 5, 3, bf16),
            shape((24, 8, 40, 32), 9, 1, 2, f32),
            shape((40, 6, 8, 48), 20, 13, 4, f16),
            Shape { layout: half, ..shape((64, 32, 64, 256), 1, 8, 1, f16) },
            shape((128, 0, 128, 512), 2, 3, 1, f16),
            shape((8, 2, 16, 16), 1, 1, 1, f32),
            Shape { layout: half, ..shape((192, 64, 128, 144), 3, 17, 2, bf16) },
            Shape { beta: 0.1, ..shape((64, 64, 64, 256), 2, 4, 1, f16) },
            Shape { beta: 0.1, ..shape((16, 2, 16, 80), 20, 2, 5, bf16) },
            shape((8, 2, 8, 32), 128, 2, 3, f16),
            // Other numbers of tokens than the hint says.
            Shape { hint: 8, ..shape((72, 10, 24, 64), 5, 1, 2, f16) },
            Shape { hint: 1, ..shape((72, 10, 24, 64), 5, 6, 2, f16) },
        ]
        .map(Shape::case)
        .into()
    }
}

impl MlaAbsorb {
    /// Makes the absorbed queries of a step: a dispatch for each chunk of heads.
    ///
    /// # Panics
    /// When the stride is no multiple of 4 or less than a row.
    pub fn record(&self, recording: &mut Recording, args: &Args) {
        let Args { heads, q_stride, tokens, .. } = *args;
        let fits = q_stride.is_multiple_of(4) && q_stride >= heads * (self.spec.nope + self.spec.rope);
        assert!(fits, "mla_absorb: q stride {q_stride} for {heads} heads of {:?}", self.spec);
        for chunk in args.kv_b {
            let params = Params {
                tokens,
                heads,
                first_head: chunk.first_head,
                q_stride,
                scale: args.scale * std::f32::consts::LOG2_E,
                beta: args.beta,
                length: args.length,
            };
            let bindings = vec![
                ("rows", args.rows.clone()),
                ("q", args.q.clone()),
                ("kv_b", chunk.view.clone()),
                ("rope_table", args.rope_table.clone()),
                ("queries", args.queries.clone()),
            ];
            let (spec, count) = (self.spec.clone(), chunk.heads as usize);
            let twin = move |host: &Host| twin(&spec, params, count, host);
            let blocks = tokens.div_ceil(self.tuning.tokens);
            let grid = Grid::Direct([self.spec.latent.div_ceil(COLUMNS), chunk.heads, blocks]);
            recording.call(&self.shader, bindings, bytemuck::bytes_of(&params), grid, twin);
        }
    }
}

fn twin(spec: &Spec, params: Params, heads: usize, host: &Host) {
    let (n, p, v, r) = (spec.nope as usize, spec.rope as usize, spec.value as usize, spec.latent as usize);
    let (stride, width) = (up_projection::stride(spec.latent) as usize, spec.width() as usize);
    let (rows, q, table) = (host.get::<Row>("rows"), host.get::<f32>("q"), host.get::<[f32; 2]>("rope_table"));
    let kv_b = spec.format.decode(&host.get::<u8>("kv_b"));
    let head_of = |(token, head): (usize, usize)| {
        let position = rows[token].position;
        let at = token * params.q_stride as usize + (params.first_head as usize + head) * (n + p);
        let absorb = reference::mla_absorb::Absorb {
            query: &q[at..at + n + p],
            w_uk: kv_b[head * (n + v) * stride..].chunks_exact(stride).take(n).collect(),
            latent: r,
            position,
            scale: params.scale,
            growth: (params.beta, params.length),
            table: &table,
            layout: spec.layout,
        };
        let mut query = absorb.query();
        query.resize(width, 0.0);
        (token * params.heads as usize + params.first_head as usize + head, query)
    };
    let heads = (0..params.tokens as usize).flat_map(|token| (0..heads).map(move |head| (token, head)));
    let heads: Vec<(usize, usize)> = heads.collect();
    let queries: Vec<(usize, Vec<f32>)> = heads.into_par_iter().map(head_of).collect();
    queries.iter().for_each(|(row, query)| host.set("queries", row * width, query));
}

/// A case; widths are (n, p, v, r).
#[derive(Clone)]
struct Shape {
    widths: (u32, u32, u32, u32),
    heads: u32,
    tokens: u32,
    chunks: u32,
    format: WeightFormat,
    layout: RopeLayout,
    hint: u32,
    beta: f32,
}

/// The tensors of the up-projections' chunks.
const CHUNKS: [&str; 5] = ["kv_b 0", "kv_b 1", "kv_b 2", "kv_b 3", "kv_b 4"];

impl Shape {
    fn spec(&self) -> Spec {
        let (nope, rope, value, latent) = self.widths;
        Spec { nope, rope, value, latent, format: self.format, layout: self.layout, tokens: self.hint }
    }

    fn case(self) -> Case<MlaAbsorb> {
        let (n, p, v, r) = self.widths;
        let Shape { heads, tokens, chunks, format, layout, hint, beta, .. } = &self;
        let name = format!(
            "{tokens} tokens (hint {hint}), {heads} heads of {n}+{p}/{v}, latent {r}, {format:?}, {layout:?}, \
             {chunks} chunks, beta {beta}"
        );
        let (h, t) = (f64::from(*heads), f64::from(*tokens));
        let flops = 2.0 * t * h * f64::from(n) * f64::from(r);
        let moved = h * f64::from(n * r) * format.bytes() as f64 + 4.0 * t * h * f64::from(n + 2 * p + r);
        Case::new(name, self.spec(), flops, move || self.job()).moving(moved)
    }

    fn job(&self) -> Job<MlaAbsorb> {
        let spec = self.spec();
        let (n, p, v, r) = (spec.nope as usize, spec.rope as usize, spec.value as usize, spec.latent as usize);
        let (heads, tokens) = (self.heads as usize, self.tokens as usize);
        let mut inputs = Inputs::seed(u64::from(spec.nope * 7919 + spec.latent * 31 + self.heads + self.tokens));
        let q_stride = (heads * (n + p)).next_multiple_of(4);
        let q = strided(&inputs.normals(tokens * heads * (n + p), 1.0), heads * (n + p), q_stride);
        let row = |i: u32| Row { sequence: i / 3, position: (i * 9_173) % 40_000 + i };
        let rows: Vec<Row> = (0..self.tokens).map(row).collect();
        let last = rows.iter().map(|row| row.position).max().expect("a case has rows");
        let table = Frequencies::plain(spec.rope, 1e4).table(last + 1);
        let width = spec.width() as usize;
        let part = |first, columns, tolerance| Check { stride: width, first, columns, tolerance };
        let tolerance = Tolerance::f32(n);
        let mut checks = vec![
            part(0, r, tolerance),
            part(r, p, tolerance),
            part(r + p, width - r - p, Tolerance::EXACT),
        ];
        checks.retain(|check| check.columns > 0);
        let mut tensors = vec![
            Tensor::input("rows", words(&rows)),
            Tensor::input("q", Data::F32(q)),
            Tensor::input("rope_table", words(&table)),
            Tensor::checked("queries", Data::poison(tokens * heads * width), checks),
        ];
        let cut = up_projection::cut(self.heads, self.chunks);
        for (name, heads) in CHUNKS.iter().zip(&cut) {
            let rows = *heads as usize * (n + v);
            tensors.push(Tensor::input(name, up_projection::draw(&mut inputs, self.format, rows, r)));
        }
        let case = self.clone();
        Job::new(tensors, move |kernel: &MlaAbsorb, t, recording| {
            let mut kv_b = Vec::new();
            let mut first_head = 0;
            for (name, heads) in CHUNKS.iter().zip(&cut) {
                kv_b.push(HeadChunk { first_head, heads: *heads, view: t.get(name) });
                first_head += heads;
            }
            let args = Args {
                rows: t.get("rows"),
                q: t.get("q"),
                kv_b: &kv_b,
                rope_table: t.get("rope_table"),
                queries: t.get("queries"),
                tokens: case.tokens,
                heads: case.heads,
                q_stride: q_stride as u32,
                scale: 1.0 / ((n + p) as f32).sqrt(),
                beta: case.beta,
                length: 8192,
            };
            kernel.record(recording, &args);
        })
    }
}
