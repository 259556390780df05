//! The cases of `mla_decode_fused`: drawn caches and up-projections; partials go through `mla_combine`.

use super::contexts::{self, Context, Draw, Drawn};
use super::inputs::{Inputs, strided, words};
use super::mla_combine::{self, MlaCombine, Output};
use super::mla_decode_fused::{Args, MlaDecodeFused, Spec};
use super::plan::{self, Borders, Plan, Target};
use super::up_projection::{self, HeadChunk};
use super::weights::WeightFormat;
use super::{CacheChunk, Case, Check, Data, Job, Kernel, Sequence, Set, Tensor, Tensors, Tolerance};
use crate::gpu::{Caps, Recording};
use crate::num::record::RecordFormat;
use crate::num::rope::{Frequencies, RopeLayout};

const CACHES: [&str; 3] = ["cache 0", "cache 1", "cache 2"];
const KV_B: [&str; 3] = ["kv_b 0", "kv_b 1", "kv_b 2"];
/// Positions of one step of the queries' growth.
const LENGTH: u32 = 64;

/// A case: widths (n, p, v, r).
#[derive(Clone)]
struct Shape {
    widths: (u32, u32, u32, u32),
    heads: u32,
    /// Chunks of the up-projections.
    chunks: u32,
    weights: WeightFormat,
    layout: RopeLayout,
    beta: f32,
    context: Context,
    /// Workgroups that the plan is to give; 0 for one split a sequence, and values.
    workgroups: u32,
}

const LITE: (u32, u32, u32, u32) = (128, 64, 128, 512);

/// The cases of a set.
pub(super) fn cases(set: Set) -> Vec<Case<MlaDecodeFused>> {
    let shape = |widths: (u32, u32, u32, u32), heads, sequences: &[(u32, u32)], workgroups| Shape {
        widths,
        heads,
        chunks: 1,
        weights: WeightFormat::F16,
        layout: RopeLayout::Interleaved,
        beta: 0.0,
        context: Context {
            widths: (widths.3, widths.1),
            format: RecordFormat::F16,
            page: 64,
            sequences: sequences.to_vec(),
            chunks: 1,
            draw: Draw::Even,
        },
        workgroups,
    };
    if set == Set::Timed {
        let one = |length: u32| [0, 16, 64].map(|workgroups| shape(LITE, 16, &[(length - 1, 1)], workgroups).case());
        return [128, 512, 2048, 8192].into_iter().flat_map(one).collect();
    }
    let (bf16, f32) = (WeightFormat::Bf16, WeightFormat::F32);
    let mixed: &[(u32, u32)] = &[(70, 1), (0, 3), (12, 0), (200, 2)];
    let in_chunks = |cache: u32, heads: u32, shape: Shape| Shape {
        chunks: heads,
        context: Context { chunks: cache, ..shape.context },
        ..shape
    };
    let stored =
        |format, draw, page, shape: Shape| Shape { context: Context { format, draw, page, ..shape.context }, ..shape };
    let (full, f16, fp8) = (RecordFormat::F32, RecordFormat::F16, RecordFormat::Fp8);
    let mut shapes = Vec::new();
    for workgroups in [0, 9] {
        let small = |heads, sequences| shape((24, 8, 40, 32), heads, sequences, workgroups);
        let odd = |heads, sequences| shape((40, 6, 8, 48), heads, sequences, workgroups);
        shapes.extend([
            shape(LITE, 3, &[(0, 1)], workgroups),
            shape(LITE, 4, &[(129, 1)], workgroups),
            in_chunks(1, 3, shape(LITE, 9, &[(64, 2)], workgroups)),
            Shape { weights: bf16, ..shape((192, 64, 256, 512), 5, &[(65, 1)], workgroups) },
            Shape { layout: RopeLayout::Half, ..shape((64, 32, 64, 256), 10, mixed, workgroups) },
            Shape { weights: f32, ..stored(full, Draw::Rising, 16, small(20, mixed)) },
            stored(fp8, Draw::Peaked, 16, shape(LITE, 2, &[(100, 3)], workgroups)),
            stored(f16, Draw::Dominant(1), 64, small(128, &[(63, 1)])),
            Shape { weights: bf16, beta: 0.1, ..in_chunks(1, 2, odd(63, &[(500, 4)])) },
            stored(fp8, Draw::Extreme, 32, Shape { layout: RopeLayout::Half, ..odd(1, &[(1000, 8)]) }),
            shape((128, 0, 64, 512), 6, mixed, workgroups),
            stored(full, Draw::Even, 128, shape((16, 2, 16, 80), 7, &[(1, 1), (2, 1)], workgroups)),
        ]);
    }
    // Splits of several cache chunks, which values cannot have.
    shapes.push(in_chunks(3, 2, shape(LITE, 5, &[(700, 1)], 9)));
    shapes.push(in_chunks(2, 3, shape((24, 8, 40, 32), 16, &[(4095, 1), (300, 8)], 40)));
    shapes.into_iter().map(Shape::case).collect()
}

impl Shape {
    fn spec(&self) -> Spec {
        let (nope, rope, value, latent) = self.widths;
        let Shape { weights, layout, workgroups, context: Context { format, .. }, .. } = *self;
        Spec { nope, rope, value, latent, weights, format, layout, values: workgroups == 0 }
    }

    fn most_tokens(&self) -> u32 {
        self.context.sequences.iter().map(|(_, tokens)| *tokens).max().expect("a sequence")
    }

    fn tokens(&self) -> u32 {
        self.context.sequences.iter().map(|(_, tokens)| tokens).sum()
    }

    fn case(self) -> Case<MlaDecodeFused> {
        let (n, p, v, r) = self.widths;
        let Shape { heads, chunks, weights, layout, beta, context, workgroups, .. } = &self;
        let Context { format, page, sequences, draw, .. } = context;
        let name = format!(
            "{heads} heads of {n}+{p}/{v}, latent {r}, (position, tokens) {sequences:?}, {weights:?}, {layout:?}, \
             page {page}, {format:?}, {draw:?}, {chunks} and {} chunks, beta {beta}, plan for {workgroups}",
            context.chunks,
        );
        let h = f64::from(*heads);
        let attended = 2.0 * h * f64::from(2 * r + p) * context.visible();
        let flops = attended + 2.0 * h * f64::from(self.tokens()) * f64::from(r * (n + v));
        let bytes = context.tokens() as usize * context.record() + (heads * (n + v) * r) as usize * weights.bytes();
        Case::new(name, self.spec(), flops, move || self.job()).moving(bytes as f64)
    }

    fn plan(&self, batch: &mut [Sequence], table: &[u32], chunk_pages: u32) -> Plan {
        let target = Target {
            page: self.context.page,
            chunk_pages,
            heads: self.heads,
            rows: 4,
            little: None,
            workgroups: self.workgroups.max(1),
            partials: u32::MAX,
            borders: Borders::Balanced,
        };
        plan::plan(batch, table, &target).expect("a case's pages lie in few runs")
    }

    fn job(&self) -> Job<MlaDecodeFused> {
        let (n, p, v, r) =
            (self.widths.0 as usize, self.widths.1 as usize, self.widths.2 as usize, self.widths.3 as usize);
        let (heads, tokens) = (self.heads as usize, self.tokens() as usize);
        let mut inputs = Inputs::seed(u64::from(self.heads * 131 + self.context.page + self.workgroups) + r as u64 * 7);
        let drawn = contexts::table(&mut inputs);
        let Drawn { plan, batch, rows, table, chunk_pages, caches } =
            self.context.draw(&mut inputs, &drawn, |batch, table, pages| self.plan(batch, table, pages));
        let q_stride = heads * (n + p) + 3;
        // Latents near 6e4 meet small queries.
        let size = if self.context.draw == Draw::Extreme { 2e-3 } else { 1.0 };
        let q = strided(&inputs.normals(tokens * heads * (n + p), size), heads * (n + p), q_stride);
        let last = rows.iter().map(|row| row.position).max().expect("a case has rows");
        let turns = Frequencies::plain(p as u32, 1e4).table(last + 1);
        let spread = self.context.draw.magnitude();
        let tolerance = Tolerance::nmse(Tolerance::f32(4096).nmse + (2.4e-7 * spread.max(30.0)).powi(2));
        let mut tensors = vec![
            Tensor::input("batch", words(&batch)),
            Tensor::input("rows", words(&rows)),
            Tensor::input("splits", words(&plan.splits)),
            Tensor::input("block_table", Data::U32(table)),
            Tensor::input("q", Data::F32(q)),
            Tensor::input("rope_table", words(&turns)),
            Tensor::scratch("partials", plan.partials as usize * heads * (r + 4)),
            Tensor::scratch("lse", tokens * heads),
            Tensor::output("output", Data::poison(tokens * heads * v), Check::rows(v, tolerance)),
        ];
        tensors.extend(CACHES.iter().zip(caches).map(|(name, bytes)| Tensor::input(name, Data::U8(bytes))));
        let cut = up_projection::cut(self.heads, self.chunks);
        for (name, heads) in KV_B.iter().zip(&cut) {
            let rows = *heads as usize * (n + v);
            tensors.push(Tensor::input(name, up_projection::draw(&mut inputs, self.weights, rows, r)));
        }
        let case = self.clone();
        Job::new(tensors, move |kernel: &MlaDecodeFused, t, recording| {
            case.record(kernel, &plan, (chunk_pages, q_stride as u32), t, recording);
        })
    }

    fn record(
        &self,
        kernel: &MlaDecodeFused,
        plan: &Plan,
        (chunk_pages, q_stride): (u32, u32),
        t: &Tensors,
        recording: &mut Recording,
    ) {
        let cache = |(i, name): (u32, &&'static str)| CacheChunk {
            first_page: i * chunk_pages,
            pages: chunk_pages,
            view: t.get(name),
        };
        let cache: Vec<CacheChunk> = (0..).zip(&CACHES[..self.context.chunks as usize]).map(cache).collect();
        let mut kv_b = Vec::new();
        let mut first_head = 0;
        for (name, heads) in KV_B.iter().zip(up_projection::cut(self.heads, self.chunks)) {
            kv_b.push(HeadChunk { first_head, heads, view: t.get(name) });
            first_head += heads;
        }
        let spec = self.spec();
        let partials = t.get("partials");
        let args = Args {
            batch: t.get("batch"),
            splits: t.get("splits"),
            block_table: t.get("block_table"),
            q: t.get("q"),
            kv_b: &kv_b,
            rope_table: t.get("rope_table"),
            cache: &cache,
            output: if spec.values { t.get("output") } else { partials.clone() },
            plan,
            heads: self.heads,
            most_tokens: self.most_tokens(),
            page: self.context.page,
            q_stride,
            scale: 1.0 / ((spec.nope + spec.rope) as f32).sqrt(),
            beta: self.beta,
            length: LENGTH,
        };
        kernel.record(recording, &args);
        if spec.values {
            return;
        }
        let Spec { nope, value, latent, weights: format, .. } = spec;
        let tokens = self.tokens();
        let combine = mla_combine::Spec { latent, nope, value, format, output: Output::Values, tokens };
        let portable = MlaCombine::variants(&combine, &Caps::portable()).remove(0);
        let args = mla_combine::Args {
            batch: t.get("batch"),
            rows: t.get("rows"),
            partials,
            kv_b: &kv_b,
            output: t.get("output"),
            lse: t.get("lse"),
            tokens,
            heads: self.heads,
        };
        MlaCombine::new(&combine, &portable.tuning).record(recording, &args);
    }
}
