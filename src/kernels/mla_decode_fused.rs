//! `mla_decode_fused`: `mla_absorb`, `mla_decode` and, for sequences of one split, W_UV in one kernel.
//! W_UK^T q_nope is built in workgroup memory and never written to the device's (absorption as in
//! DeepSeek-V2, arXiv:2405.04434, section 2.1). It is built once for each split, so the kernel wins where
//! there are few splits.

use std::sync::Arc;

use rayon::prelude::*;

use super::batch::page_bits;
use super::mla_append::rope_module;
use super::mla_combine::at_least_nothing;
use super::mla_decode::{self, Tuning, fold_modules, split_records};
use super::mla_decode_fused_cases::cases;
use super::plan::Plan;
use super::up_projection::{self, HeadChunk};
use super::weights::WeightFormat;
use super::{CacheChunk, Case, Choice, Field, Kernel, Sequence, Set, Split, Variant};
use crate::gpu::{Caps, Grid, Host, Recording, Shader, Source, View};
use crate::num::record::RecordFormat;
use crate::num::rope::RopeLayout;
use crate::{reference, wgsl};

params! {
    /// Sizes of a call for one chunk of heads and the splits of one cache chunk.
    pub struct Params {
        /// Query heads.
        pub heads: u32,
        /// The first head of the chunk of `kv_b`.
        pub first_head: u32,
        /// Heads in it.
        pub chunk_heads: u32,
        /// The cache chunk's first entry of the splits.
        pub first_split: u32,
        /// The cache chunk's first page.
        pub first_page: u32,
        /// A page has `1 << page_bits` tokens.
        pub page_bits: u32,
        /// Elements from one token's queries to the next.
        pub q_stride: u32,
        /// Softmax scale times log2(e).
        pub scale: f32,
        /// Growth of the queries with the position: `1 + beta ln(1 + floor(position / length))`.
        pub beta: f32,
        /// Positions of one step of that growth.
        pub length: u32,
    }
}

/// What the model and the cache fix.
#[derive(Clone, Debug, PartialEq)]
pub struct Spec {
    /// Width of a query's part without rope (`qk_nope_head_dim`), a multiple of 8.
    pub nope: u32,
    /// Width of its rope part (`qk_rope_head_dim`), even, 0 for none.
    pub rope: u32,
    /// Width of a value (`v_head_dim`), a multiple of 8.
    pub value: u32,
    /// Width of the latent (`kv_lora_rank`), a multiple of 16.
    pub latent: u32,
    /// The element type of `kv_b`.
    pub weights: WeightFormat,
    /// How a record is stored.
    pub format: RecordFormat,
    /// Which elements of the rope part turn together.
    pub layout: RopeLayout,
    /// Every sequence has one split: W_UV is applied and values are written instead of partials.
    pub values: bool,
}

impl Spec {
    /// Of the attention in its middle.
    fn decode(&self) -> mla_decode::Spec {
        mla_decode::Spec { latent: self.latent, rope: self.rope, format: self.format, rows: ROWS }
    }

    /// Values of workgroup memory for the absorbed queries, and for the products and sums after them.
    fn scratch(&self, tuning: &Tuning) -> u32 {
        let queries = ROWS * self.decode().width();
        let values = if self.values { ROWS * self.latent + tuning.workgroup } else { 0 };
        tuning.scratch().max(queries).max(values)
    }

    /// What fits so many bytes of workgroup memory.
    fn fit(&self, subgroups: bool, bytes: u32) -> Option<Tuning> {
        Tuning::fit(&self.decode(), ROWS, subgroups, |tuning| self.scratch(tuning), bytes)
    }
}

/// (Head, token) rows of a block: their absorbed queries stand in workgroup memory together.
const ROWS: u32 = 4;

/// How a step decodes unless it is told, and why: a tuning. The kernel saves two dispatches a layer and builds
/// the absorbed queries again in each split, which costs more on every device that was measured.
pub const CHOICE: &str = "mla_absorb, mla_decode and mla_combine in turn; mla_decode_fused where asked for (--attention \
    fused). At batch 1 and 16 heads it took 132 us in one split and 62 in two against 44 in turn (H100, Vulkan, context \
    128), and the story model decoded 524 tokens/s fused against 800 (H100), 8.7 against 11.2 (llvmpipe)";

/// What a call reads and writes.
pub struct Args<'a> {
    /// `[sequences]` [`Sequence`].
    pub batch: View,
    /// [`Plan::splits`].
    pub splits: View,
    /// Page numbers, u32.
    pub block_table: View,
    /// `[tokens, q_stride]` f32: heads of n + p, the rope part not turned.
    pub q: View,
    /// The up-projections.
    pub kv_b: &'a [HeadChunk],
    /// `[256 + blocks, rope / 2]` (cos, sin) f32; any buffer where rope is 0.
    pub rope_table: View,
    /// The layer's latent cache.
    pub cache: &'a [CacheChunk],
    /// Written: `[partial tokens * heads, latent + 4]` f32, as `mla_decode` does; with `Spec::values`
    /// `[tokens, heads * v]` f32.
    pub output: View,
    /// The step's splits.
    pub plan: &'a Plan,
    /// Query heads.
    pub heads: u32,
    /// The most new tokens of a sequence.
    pub most_tokens: u32,
    /// Tokens a page.
    pub page: u32,
    /// Elements from one token's queries to the next.
    pub q_stride: u32,
    /// Softmax scale.
    pub scale: f32,
    /// Growth of the queries with the position, `1 + beta ln(1 + floor(position / length))`; 0 for none.
    pub beta: f32,
    /// Positions of one step of that growth.
    pub length: u32,
}

/// The kernel `mla_decode_fused`.
pub struct MlaDecodeFused {
    spec: Spec,
    shader: Arc<Shader>,
}

impl Kernel for MlaDecodeFused {
    const NAME: &'static str = "mla_decode_fused";
    const SOURCE: Source = wgsl!("mla_decode_fused");
    const PARAMS: &'static [Field] = Params::FIELDS;
    type Spec = Spec;
    type Tuning = Tuning;

    fn refusal(spec: &Spec, caps: &Caps) -> Option<String> {
        let bytes = caps.workgroup_bytes.max(Caps::portable().workgroup_bytes);
        let Spec { latent, nope, rope, .. } = spec;
        let widths = format!("a latent of {latent} and keys of {nope} + {rope} do not fit {bytes} bytes of workgroup memory");
        spec.fit(false, bytes).is_none().then_some(widths)
    }

    fn variants(spec: &Spec, caps: &Caps) -> Vec<Variant<Tuning>> {
        let portable = spec.fit(false, Caps::portable().workgroup_bytes).or_else(|| spec.fit(false, caps.workgroup_bytes));
        let Some(tuning) = portable else { return Vec::new() };
        let mut variants = vec![Variant { name: "portable", tuning }];
        if caps.subgroups.is_some_and(|(least, _)| least >= 8) {
            variants.extend(spec.fit(true, caps.workgroup_bytes).map(|tuning| Variant { name: "subgroup", tuning }));
        }
        variants
    }

    fn tuning(spec: &Spec, caps: &Caps) -> Choice<Tuning> {
        let variant = Self::variants(spec, caps).pop();
        let variant = variant.unwrap_or_else(|| panic!("mla_decode_fused: {:?}", Self::refusal(spec, caps)));
        let how = if variant.tuning.subgroups { "shuffles" } else { "workgroup memory" };
        let why = format!("{ROWS} rows a block, {} tokens a tile, products summed by {how}", variant.tuning.tile);
        Choice { why, variant }
    }

    fn new(spec: &Spec, tuning: &Tuning) -> MlaDecodeFused {
        let Spec { nope, rope, value, latent, .. } = *spec;
        let eights = nope > 0 && nope.is_multiple_of(8) && value > 0 && value.is_multiple_of(8);
        let fits = eights && rope.is_multiple_of(2) && latent > 0 && latent.is_multiple_of(16);
        assert!(fits, "mla_decode_fused: n and v must be multiples of 8, p of 2, r of 16: {spec:?}");
        let shader = Shader::of(Self::SOURCE)
            .u32("N", nope)
            .u32("P", rope)
            .u32("V", value)
            .u32("R", latent)
            .u32("W", spec.decode().width())
            .bool("VALUES", spec.values)
            .u32("WORKGROUP", tuning.workgroup)
            .u32("ROWS", tuning.rows)
            .u32("TILE", tuning.tile)
            .u32("SCRATCH", spec.scratch(tuning))
            .module(wgsl!("lib/rope_table"))
            .module(rope_module(spec.layout))
            .module(spec.weights.unpack4());
        let shader = fold_modules(shader, spec.format, tuning.subgroups).build();
        MlaDecodeFused { spec: spec.clone(), shader }
    }

    fn shader(&self) -> &Arc<Shader> {
        &self.shader
    }

    fn cases(set: Set) -> Vec<Case<MlaDecodeFused>> {
        cases(set)
    }
}

impl MlaDecodeFused {
    /// Attends over a step's splits: a dispatch for each cache chunk that has some and each chunk of heads.
    ///
    /// # Panics
    /// When values are asked for, but a sequence has several splits, or a page has no power of two of tokens.
    pub fn record(&self, recording: &mut Recording, args: &Args) {
        assert!(args.plan.is_single() || !self.spec.values, "mla_decode_fused: values of sequences with several splits");
        for (dispatch, heads) in args.plan.dispatches.iter().flat_map(|d| args.kv_b.iter().map(move |h| (d, h))) {
            let chunk = &args.cache[dispatch.chunk];
            let params = Params {
                heads: args.heads,
                first_head: heads.first_head,
                chunk_heads: heads.heads,
                first_split: dispatch.first_split,
                first_page: chunk.first_page,
                page_bits: page_bits(args.page),
                q_stride: args.q_stride,
                scale: args.scale * std::f32::consts::LOG2_E,
                beta: args.beta,
                length: args.length,
            };
            let bindings = vec![
                ("batch", args.batch.clone()),
                ("splits", args.splits.clone()),
                ("block_table", args.block_table.clone()),
                ("q", args.q.clone()),
                ("kv_b", heads.view.clone()),
                ("rope_table", args.rope_table.clone()),
                ("cache", chunk.view.clone()),
                ("output", args.output.clone()),
            ];
            let rows = args.most_tokens * heads.heads;
            let grid = Grid::Direct([rows.div_ceil(ROWS), dispatch.splits, 1]);
            let (spec, count) = (self.spec.clone(), dispatch.splits as usize);
            let twin = move |host: &Host| twin(&spec, params, count, host);
            recording.call(&self.shader, bindings, bytemuck::bytes_of(&params), grid, twin);
        }
    }
}

fn twin(spec: &Spec, params: Params, count: usize, host: &Host) {
    let (n, p, v, r) = (spec.nope as usize, spec.rope as usize, spec.value as usize, spec.latent as usize);
    let (batch, splits, q) = (host.get::<Sequence>("batch"), host.get::<Split>("splits"), host.get::<f32>("q"));
    let table = host.get::<[f32; 2]>("rope_table");
    let kv_b = spec.weights.decode(&host.get::<u8>("kv_b"));
    let (stride, heads) = (up_projection::stride(spec.latent) as usize, params.heads as usize);
    for split in &splits[params.first_split as usize..][..count] {
        let records = split_records(host, (spec.format, r, p), (params.first_page, params.page_bits), split);
        let sequence = batch[split.sequence as usize];
        let row = |i: usize| {
            let (token, head) = (i / params.chunk_heads as usize, i % params.chunk_heads as usize);
            let position = sequence.position + token as u32;
            let at = (sequence.first_row as usize + token) * params.q_stride as usize;
            let mut rows = kv_b[head * (n + v) * stride..].chunks_exact(stride);
            let absorb = reference::mla_absorb::Absorb {
                query: &q[at + (params.first_head as usize + head) * (n + p)..][..n + p],
                w_uk: rows.by_ref().take(n).collect(),
                latent: r,
                position,
                scale: params.scale,
                growth: (params.beta, params.length),
                table: &table,
                layout: spec.layout,
            };
            let seen = split.end.min(position + 1).saturating_sub(split.begin) as usize;
            let seen = records.chunks_exact(r + p).take(seen);
            let (output, lse) = reference::mla_decode_fused::attend(&absorb, seen);
            let head = params.first_head as usize + head;
            if spec.values {
                let values = reference::mla_combine::values(&output, rows.take(v));
                ((sequence.first_row as usize + token) * heads + head, values)
            } else {
                let tail = [at_least_nothing(lse), 0.0, 0.0, 0.0];
                ((split.partial as usize + token) * heads + head, output.into_iter().chain(tail).collect())
            }
        };
        let rows = (0..(sequence.tokens * params.chunk_heads) as usize).into_par_iter().map(row);
        for (row, values) in rows.collect::<Vec<_>>() {
            let values: Vec<f32> = values.iter().map(|x| *x as f32).collect();
            host.set("output", row * values.len(), &values);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn widths_that_do_not_fit_the_workgroup_memory_are_refused_with_its_size() {
        let (weights, layout) = (WeightFormat::F16, RopeLayout::Half);
        let spec = |format| Spec { nope: 128, rope: 64, value: 128, latent: 512, weights, format, layout, values: true };
        let portable = Caps::portable();
        assert_eq!(MlaDecodeFused::refusal(&spec(RecordFormat::F16), &portable), None);
        let why = MlaDecodeFused::refusal(&spec(RecordFormat::F32), &portable).unwrap_or_default();
        assert!(why.contains("16384 bytes of workgroup memory"), "{why:?}");
        assert!(MlaDecodeFused::variants(&spec(RecordFormat::F32), &portable).is_empty());
    }
}
