//! `mla_decode`: absorbed attention over the latent cache (DeepSeek-V2, arXiv:2405.04434, section
//! 2.1), one workgroup for a block of (token, head) rows and a split of the context, by online softmax
//! in base 2 (Dao 2023, arXiv:2307.08691). `mla_combine` merges the splits.

use std::sync::Arc;

use rayon::prelude::*;

use super::batch::page_bits;
use super::mla_combine::at_least_nothing;
use super::mla_decode_cases::cases;
use super::plan::Plan;
use super::{CacheChunk, Case, Choice, Field, Kernel, Sequence, Set, Split, Variant};
use crate::gpu::{Caps, Grid, Host, Recording, Shader, ShaderBuilder, Source, View};
use crate::num::record::RecordFormat;
use crate::{reference, wgsl};

params! {
    /// Sizes of a call for the splits of one cache chunk.
    pub struct Params {
        /// Query heads.
        pub heads: u32,
        /// The chunk's first entry of the splits.
        pub first_split: u32,
        /// The chunk's first page.
        pub first_page: u32,
        /// A page has `1 << page_bits` tokens.
        pub page_bits: u32,
    }
}

/// What the model and the cache fix.
#[derive(Clone, Debug, PartialEq)]
pub struct Spec {
    /// Width of the latent (`kv_lora_rank`), a multiple of 16.
    pub latent: u32,
    /// Width of the rope key (`qk_rope_head_dim`), even, 0 for none.
    pub rope: u32,
    /// How a record is stored.
    pub format: RecordFormat,
    /// Query heads times new tokens of a sequence: a hint for the rows of a block; any number runs.
    pub rows: u32,
}

impl Spec {
    /// Values of a record or an absorbed query: latent and rope part, rounded up to 8.
    pub fn width(&self) -> u32 {
        (self.latent + self.rope).next_multiple_of(8)
    }
}

/// How it runs.
#[derive(Clone, Debug, PartialEq)]
pub struct Tuning {
    /// (Token, head) rows that share a read of a record, a multiple of 4.
    pub rows: u32,
    /// Tokens in workgroup memory at a time, a multiple of 4.
    pub tile: u32,
    /// Invocations a workgroup.
    pub workgroup: u32,
    /// Sums products by shuffles.
    pub subgroups: bool,
}

impl Tuning {
    /// Values that products are summed through.
    pub fn scratch(&self) -> u32 {
        if self.subgroups { 4 } else { 8 * (self.workgroup + 1) }
    }

    /// Bytes of workgroup memory with `scratch` values: the arrays of `lib/fold` and `lib/cache_*`.
    pub fn bytes(&self, spec: &Spec, scratch: u32) -> u32 {
        let Tuning { rows, tile, workgroup, .. } = *self;
        let (width, pairs) = (spec.width(), rows / 2);
        let lanes = (workgroup / pairs).min(width / 4 + 7) / 8 * 8;
        let scales = (tile * spec.latent.div_ceil(128)).next_multiple_of(4);
        let record = match spec.format {
            RecordFormat::F16 => 2 * width * tile,
            RecordFormat::F32 => 4 * width * tile,
            RecordFormat::Fp8 => 2 * width * tile + 4 * scales,
        };
        record + 4 * scratch + 4 * rows * tile * (lanes / 8) + 8 * tile * pairs + 8 * pairs + 16
    }

    /// The largest workgroup and tile that fit `bytes` of workgroup memory, with the values of scratch
    /// that `scratch` asks for.
    pub(super) fn fit(
        spec: &Spec,
        rows: u32,
        subgroups: bool,
        scratch: impl Fn(&Tuning) -> u32,
        bytes: u32,
    ) -> Option<Tuning> {
        let workgroups = [256, 128, 64].into_iter().filter(|workgroup| workgroup / (rows / 2) >= 8);
        let tilings = workgroups.flat_map(|workgroup| [8, 4].map(|tile| Tuning { rows, tile, workgroup, subgroups }));
        let mut fitting = tilings.filter(|tuning| tuning.bytes(spec, scratch(tuning)) <= bytes);
        fitting.next()
    }
}

/// Invocations whose sums leave room for 8 tokens in 16 KiB, where so many share a record: 205 us for one sequence of
/// 131,072 and 16 rows on an H100, where 256 invocations with 4 tokens take 234.
const FEW: u32 = 128;
const FEW_LANES: u32 = 16;
/// Rows of a block that are tried; each is a pipeline of its own.
const ROWS: [u32; 4] = [4, 8, 16, 20];
/// What a block costs beside its rows, in rows: its records are loaded and staged whatever it folds.
const BLOCK_COST: u32 = 4;

/// The rows of a block for which all blocks together cost least.
pub(super) fn block_rows(rows: u32) -> u32 {
    let cost = |block: &u32| rows.div_ceil(*block) * (block + BLOCK_COST);
    ROWS.into_iter().min_by_key(cost).expect("there are some")
}

/// The portable tuning: in WebGPU's workgroup memory where that holds it, else in the adapter's.
fn portable(spec: &Spec, caps: &Caps) -> Option<Tuning> {
    // The widest records of f32 leave room for fewer rows.
    let within = |bytes| {
        let fit = |rows| {
            let few = Tuning { rows, tile: 8, workgroup: FEW, subgroups: false };
            let fits = FEW / (rows / 2) >= FEW_LANES && few.bytes(spec, few.scratch()) <= bytes;
            if fits { Some(few) } else { Tuning::fit(spec, rows, false, Tuning::scratch, bytes) }
        };
        [block_rows(spec.rows), 16, 8, 4].into_iter().find_map(fit)
    };
    within(Caps::portable().workgroup_bytes).or_else(|| within(caps.workgroup_bytes))
}

/// What a call reads and writes.
pub struct Args<'a> {
    /// `[sequences]` [`Sequence`].
    pub batch: View,
    /// [`Plan::splits`].
    pub splits: View,
    /// Page numbers, u32.
    pub block_table: View,
    /// `[tokens * heads, width]` f32, of `mla_absorb`.
    pub queries: View,
    /// The layer's latent cache.
    pub cache: &'a [CacheChunk],
    /// `[partial tokens * heads, latent + 4]` f32, written: normalised output, log-sum-exp in base 2.
    pub partials: View,
    /// The step's splits.
    pub plan: &'a Plan,
    /// Query heads.
    pub heads: u32,
    /// The most new tokens of a sequence.
    pub most_tokens: u32,
    /// Tokens a page.
    pub page: u32,
}

/// The kernel `mla_decode`.
pub struct MlaDecode {
    spec: Spec,
    tuning: Tuning,
    shader: Arc<Shader>,
}

/// The module that reads records of a format.
pub(super) fn cache_module(format: RecordFormat) -> Source {
    match format {
        RecordFormat::F16 => wgsl!("lib/cache_f16"),
        RecordFormat::F32 => wgsl!("lib/cache_f32"),
        RecordFormat::Fp8 => wgsl!("lib/cache_fp8"),
    }
}

/// The modules of `lib/fold` for a record format and a tuning.
pub(super) fn fold_modules(shader: ShaderBuilder, format: RecordFormat, subgroups: bool) -> ShaderBuilder {
    let shader = shader
        .module(wgsl!("lib/batch"))
        .module(wgsl!("lib/rows_paged"))
        .module(wgsl!("lib/score_plain"))
        .module(cache_module(format))
        .module(wgsl!("lib/fold"));
    match subgroups {
        true => shader.module(wgsl!("lib/transpose8_subgroup")).subgroups(),
        false => shader.module(wgsl!("lib/transpose8_shared")),
    }
}

/// A class of specs: by their records, and rows up to a power of two.
pub(super) fn class(spec: &Spec) -> String {
    format!("records of {:?}, up to {} rows", spec.format, spec.rows.next_power_of_two())
}

impl Kernel for MlaDecode {
    const NAME: &'static str = "mla_decode";
    const SOURCE: Source = wgsl!("mla_decode");
    const PARAMS: &'static [Field] = Params::FIELDS;
    type Spec = Spec;
    type Tuning = Tuning;

    fn refusal(spec: &Spec, caps: &Caps) -> Option<String> {
        let why = || format!("4 records of {} values in {} bytes of workgroup memory", spec.width(), caps.workgroup_bytes);
        portable(spec, caps).is_none().then(why)
    }

    fn class(spec: &Spec) -> String {
        class(spec)
    }

    fn variants(spec: &Spec, caps: &Caps) -> Vec<Variant<Tuning>> {
        let Some(tuning) = portable(spec, caps) else { return Vec::new() };
        let mut variants = vec![Variant { name: "portable", tuning }];
        if caps.subgroups.is_some_and(|(least, _)| least >= 8) {
            let tuning = Tuning::fit(spec, block_rows(spec.rows), true, Tuning::scratch, caps.workgroup_bytes);
            variants.extend(tuning.map(|tuning| Variant { name: "subgroup", tuning }));
        }
        variants
    }

    fn tuning(spec: &Spec, caps: &Caps) -> Choice<Tuning> {
        let variant = Self::variants(spec, caps).pop();
        let variant = variant.unwrap_or_else(|| panic!("mla_decode: {:?}", Self::refusal(spec, caps)));
        let Tuning { rows, tile, subgroups, .. } = variant.tuning;
        let how = if subgroups { "products summed by shuffles" } else { "products summed in workgroup memory" };
        Choice { why: format!("{rows} of {} rows a block, {tile} tokens a tile, {how}", spec.rows), variant }
    }

    fn new(spec: &Spec, tuning: &Tuning) -> MlaDecode {
        let fits = spec.latent > 0 && spec.latent.is_multiple_of(16) && spec.rope.is_multiple_of(2);
        assert!(fits, "mla_decode: r must be a multiple of 16 and p of 2: {spec:?}");
        let shader = Shader::of(Self::SOURCE)
            .u32("R", spec.latent)
            .u32("P", spec.rope)
            .u32("W", spec.width())
            .u32("WORKGROUP", tuning.workgroup)
            .u32("ROWS", tuning.rows)
            .u32("TILE", tuning.tile)
            .u32("SCRATCH", tuning.scratch());
        let shader = fold_modules(shader, spec.format, tuning.subgroups).build();
        MlaDecode { spec: spec.clone(), tuning: tuning.clone(), shader }
    }

    fn shader(&self) -> &Arc<Shader> {
        &self.shader
    }

    fn cases(set: Set) -> Vec<Case<MlaDecode>> {
        cases(set)
    }
}

impl MlaDecode {
    /// How it runs.
    pub fn tuned(&self) -> &Tuning {
        &self.tuning
    }

    /// Folds a step's splits: a dispatch for each cache chunk that has some.
    ///
    /// # Panics
    /// When a page has no whole tiles, or no power of two of tokens.
    pub fn record(&self, recording: &mut Recording, args: &Args) {
        assert!(args.page.is_multiple_of(self.tuning.tile), "mla_decode: pages of {} tokens", args.page);
        record(&self.shader, &self.spec, self.tuning.rows, <[f32]>::to_vec, recording, args);
    }
}

/// Records a shader with the bindings of `mla_decode`, for blocks of `rows` rows. `query` is a query as the
/// twin takes it.
pub(super) fn record(
    shader: &Arc<Shader>,
    spec: &Spec,
    rows: u32,
    query: fn(&[f32]) -> Vec<f32>,
    recording: &mut Recording,
    args: &Args,
) {
    let blocks = (args.most_tokens * args.heads).div_ceil(rows);
    for dispatch in &args.plan.dispatches {
        let chunk = &args.cache[dispatch.chunk];
        let params = Params {
            heads: args.heads,
            first_split: dispatch.first_split,
            first_page: chunk.first_page,
            page_bits: page_bits(args.page),
        };
        let bindings = vec![
            ("batch", args.batch.clone()),
            ("splits", args.splits.clone()),
            ("block_table", args.block_table.clone()),
            ("queries", args.queries.clone()),
            ("cache", chunk.view.clone()),
            ("partials", args.partials.clone()),
        ];
        let grid = Grid::Direct([blocks, dispatch.splits, 1]);
        let (spec, count) = (spec.clone(), dispatch.splits as usize);
        let twin = move |host: &Host| twin(&spec, params, count, query, host);
        recording.call(shader, bindings, bytemuck::bytes_of(&params), grid, twin);
    }
}

/// The values of a split's records, `[tokens, r + p]`, from the bindings of a call.
pub(super) fn split_records(
    host: &Host,
    (format, r, p): (RecordFormat, usize, usize),
    (first_page, page_bits): (u32, u32),
    split: &Split,
) -> Vec<f32> {
    let (batch, table, cache) = (host.get::<Sequence>("batch"), host.get::<u32>("block_table"), host.get::<u8>("cache"));
    let (pages, bytes) = (batch[split.sequence as usize].pages, format.bytes(r, p));
    let record = |token: u32| {
        let page = table[(pages + (token >> page_bits)) as usize] - first_page;
        let slot = ((page << page_bits) + token % (1 << page_bits)) as usize;
        format.decode(&cache[slot * bytes..][..bytes], r, p)
    };
    (split.begin..split.end).flat_map(record).collect()
}

fn twin(spec: &Spec, params: Params, count: usize, query: fn(&[f32]) -> Vec<f32>, host: &Host) {
    let (r, p, width) = (spec.latent as usize, spec.rope as usize, spec.width() as usize);
    let heads = params.heads as usize;
    let (batch, splits, queries) = (host.get::<Sequence>("batch"), host.get::<Split>("splits"), host.get::<f32>("queries"));
    for split in &splits[params.first_split as usize..][..count] {
        let records = split_records(host, (spec.format, r, p), (params.first_page, params.page_bits), split);
        let sequence = batch[split.sequence as usize];
        let row = |i: usize| {
            let seen = split.end.min(sequence.position + (i / heads) as u32 + 1).saturating_sub(split.begin);
            let query = query(&queries[(sequence.first_row as usize * heads + i) * width..][..r + p]);
            let seen = records.chunks_exact(r + p).take(seen as usize);
            let (output, lse) = reference::mla_decode::attend(&query, seen, r);
            let mut partial: Vec<f32> = output.iter().map(|o| *o as f32).collect();
            partial.extend([at_least_nothing(lse) as f32, 0.0, 0.0, 0.0]);
            partial
        };
        let rows: Vec<Vec<f32>> = (0..sequence.tokens as usize * heads).into_par_iter().map(row).collect();
        host.set("partials", split.partial as usize * heads * (r + 4), &rows.concat());
    }
}
