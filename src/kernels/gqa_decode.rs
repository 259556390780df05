//! `gqa_decode`: attention of a step's queries over keys and values that heads share in groups (Ainslie et al.
//! 2023, arXiv:2305.13245), the baseline that latent attention is measured against; with as many groups as heads
//! multi-head attention. One workgroup for a block of (token, head) rows of a group and a split of the context;
//! it writes the partials of `mla_decode`, so that `mla_combine` merges them.

use std::sync::Arc;

use rayon::prelude::*;

use super::batch::page_bits;
use super::gqa_decode_cases::cases;
use super::mla_combine::at_least_nothing;
use super::mla_decode::split_records;
use super::plan::Plan;
use super::{CacheChunk, Case, Choice, Field, Kernel, Sequence, Set, Split, Variant};
use crate::gpu::{Caps, Grid, Host, Recording, Shader, Source, View};
use crate::num::record::RecordFormat;
use crate::{reference, wgsl};

params! {
    /// Sizes of a call for the splits of one cache chunk.
    pub struct Params {
        /// Query heads.
        pub heads: u32,
        /// Heads of keys and values, a divisor of the query heads.
        pub groups: u32,
        /// The chunk's first entry of the splits.
        pub first_split: u32,
        /// The chunk's first page.
        pub first_page: u32,
        /// A page has `1 << page_bits` tokens.
        pub page_bits: u32,
    }
}

/// What the model fixes.
#[derive(Clone, Debug, PartialEq)]
pub struct Spec {
    /// Width of a head, a power of two from 16 to 256.
    pub width: u32,
    /// Query heads of a group times new tokens of a sequence: a hint for the rows of a block; any number runs.
    pub rows: u32,
}

impl Spec {
    /// Lanes that share a head, eight columns each.
    fn band(&self) -> u32 {
        self.width / 8
    }
}

/// How it runs.
#[derive(Clone, Debug, PartialEq)]
pub struct Tuning {
    /// (Token, head) rows that share a read of keys and values: 1, 2, 4 or 8.
    pub rows: u32,
    /// Tokens that a band of lanes takes at once.
    pub step: u32,
    /// Invocations a workgroup.
    pub workgroup: u32,
    /// Sums products by shuffles.
    pub subgroups: bool,
}

/// What a call reads and writes.
pub struct Args<'a> {
    /// `[sequences]` [`Sequence`].
    pub batch: View,
    /// [`Plan::splits`].
    pub splits: View,
    /// Page numbers, u32.
    pub block_table: View,
    /// `[tokens * heads, width]` f32, times softmax scale and log2(e).
    pub queries: View,
    /// The layer's keys and values, `[pages, page tokens, groups, key then value, width]` f16.
    pub cache: &'a [CacheChunk],
    /// `[partial tokens * heads, width + 4]` f32, written: normalised output, log-sum-exp in base 2.
    pub partials: View,
    /// The step's splits.
    pub plan: &'a Plan,
    /// Query heads.
    pub heads: u32,
    /// Heads of keys and values.
    pub groups: u32,
    /// The most new tokens of a sequence.
    pub most_tokens: u32,
    /// Tokens a page.
    pub page: u32,
}

/// Workgroups for each that a plan of `mla_decode` has: these are smaller, and a compute unit runs several.
pub const WORKGROUPS_FACTOR: u32 = 8;
/// Scores of a band at once: what is summed for them takes 8 KiB of workgroup memory.
const SCORES: u32 = 16;
/// The same where shuffles sum them.
const SUBGROUP_SCORES: u32 = 32;
/// The most tokens that a band takes at once; they lie in one page.
const MOST_STEP: u32 = 8;
const MOST_ROWS: u32 = 8;

/// Bytes of a token's keys and values.
pub fn record_bytes(groups: u32, width: u32) -> usize {
    4 * (groups * width) as usize
}

/// The kernel `gqa_decode`.
pub struct GqaDecode {
    spec: Spec,
    tuning: Tuning,
    shader: Arc<Shader>,
}

impl Kernel for GqaDecode {
    const NAME: &'static str = "gqa_decode";
    const SOURCE: Source = wgsl!("gqa_decode");
    const PARAMS: &'static [Field] = Params::FIELDS;
    type Spec = Spec;
    type Tuning = Tuning;

    fn variants(spec: &Spec, caps: &Caps) -> Vec<Variant<Tuning>> {
        let rows = spec.rows.clamp(1, MOST_ROWS).next_power_of_two();
        let tuning = Tuning { rows, step: (SCORES / rows).min(MOST_STEP), workgroup: 128, subgroups: false };
        let mut variants = vec![Variant { name: "portable", tuning: tuning.clone() }];
        if caps.subgroups.is_some_and(|(least, _)| least >= spec.band()) {
            let tuning = Tuning { step: (SUBGROUP_SCORES / rows).min(MOST_STEP), subgroups: true, ..tuning };
            variants.push(Variant { name: "subgroup", tuning });
        }
        variants
    }

    fn tuning(spec: &Spec, caps: &Caps) -> Choice<Tuning> {
        let variant = Self::variants(spec, caps).pop().expect("the portable variant is always there");
        let Tuning { rows, step, subgroups, .. } = variant.tuning;
        let how = if subgroups { "products summed by shuffles" } else { "products summed in workgroup memory" };
        Choice { why: format!("{rows} of {} rows a block, {step} tokens at once, {how}", spec.rows), variant }
    }

    fn new(spec: &Spec, tuning: &Tuning) -> GqaDecode {
        let fits = spec.width.is_power_of_two() && (16..=256).contains(&spec.width);
        assert!(fits, "gqa_decode: heads must be 16, 32, 64, 128 or 256 wide: {spec:?}");
        let shader = Shader::of(Self::SOURCE)
            .u32("D", spec.width)
            .u32("WORKGROUP", tuning.workgroup)
            .u32("ROWS", tuning.rows)
            .u32("STEP", tuning.step)
            .module(wgsl!("lib/batch"))
            .module(wgsl!("lib/rows_paged"))
            .module(wgsl!("lib/score_plain"));
        let shader = match tuning.subgroups {
            true => shader.module(wgsl!("lib/band_subgroup")).subgroups().build(),
            false => shader.module(wgsl!("lib/band_shared")).build(),
        };
        GqaDecode { spec: spec.clone(), tuning: tuning.clone(), shader }
    }

    fn shader(&self) -> &Arc<Shader> {
        &self.shader
    }

    fn cases(set: Set) -> Vec<Case<GqaDecode>> {
        cases(set)
    }
}

impl GqaDecode {
    /// (Token, head) rows of a group that a workgroup folds: what a plan's rows are.
    pub fn rows(&self) -> u32 {
        self.tuning.rows
    }

    /// Folds a step's splits: a dispatch for each cache chunk that has some.
    ///
    /// # Panics
    /// When the groups do not divide the heads, or a page has no multiple of 8 tokens, or no power of two.
    pub fn record(&self, recording: &mut Recording, args: &Args) {
        let Args { heads, groups, .. } = *args;
        assert!(groups > 0 && heads.is_multiple_of(groups), "gqa_decode: {heads} heads in {groups} groups");
        assert!(args.page.is_multiple_of(MOST_STEP), "gqa_decode: pages of {} tokens", args.page);
        let blocks = groups * (args.most_tokens * (heads / groups)).div_ceil(self.tuning.rows);
        for dispatch in &args.plan.dispatches {
            let chunk = &args.cache[dispatch.chunk];
            let params = Params {
                heads,
                groups,
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
            let (width, count) = (self.spec.width as usize, dispatch.splits as usize);
            let twin = move |host: &Host| twin(width, params, count, host);
            recording.call(&self.shader, bindings, bytemuck::bytes_of(&params), grid, twin);
        }
    }
}

/// The keys and values of a group, of records of all groups.
pub(super) fn group_rows(
    records: &[f32],
    (groups, group, width): (usize, usize, usize),
) -> impl Iterator<Item = (&[f32], &[f32])> + Clone {
    records.chunks_exact(2 * groups * width).map(move |record| {
        let (key, value) = record[2 * group * width..].split_at(width);
        (key, &value[..width])
    })
}

fn twin(width: usize, params: Params, count: usize, host: &Host) {
    let (heads, groups) = (params.heads as usize, params.groups as usize);
    let (batch, splits, queries) = (host.get::<Sequence>("batch"), host.get::<Split>("splits"), host.get::<f32>("queries"));
    for split in &splits[params.first_split as usize..][..count] {
        // A record of latents as wide as all keys and values is stored alike.
        let format = (RecordFormat::F16, 2 * groups * width, 0);
        let records = split_records(host, format, (params.first_page, params.page_bits), split);
        let sequence = batch[split.sequence as usize];
        let row = |i: usize| {
            let seen = split.end.min(sequence.position + (i / heads) as u32 + 1).saturating_sub(split.begin);
            let query = &queries[(sequence.first_row as usize * heads + i) * width..][..width];
            let group = i % heads / (heads / groups);
            let rows = group_rows(&records, (groups, group, width)).take(seen as usize);
            let (output, lse) = reference::gqa_decode::attend(query, rows);
            let mut partial: Vec<f32> = output.iter().map(|o| *o as f32).collect();
            partial.extend([at_least_nothing(lse) as f32, 0.0, 0.0, 0.0]);
            partial
        };
        let rows: Vec<Vec<f32>> = (0..sequence.tokens as usize * heads).into_par_iter().map(row).collect();
        host.set("partials", split.partial as usize * heads * (width + 4), &rows.concat());
    }
}
