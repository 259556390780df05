//! The cases of `gqa_decode`: drawn caches, a plan, the kernel and `mla_combine` behind it, against the twin over
//! whole contexts.

use rayon::prelude::*;

use super::contexts::{self, Context, Draw, Drawn};
use super::gqa_decode::{Args, GqaDecode, Spec, WORKGROUPS_FACTOR, group_rows};
use super::inputs::{Inputs, words};
use super::mla_combine::{self, MlaCombine, NOTHING, Output};
use super::plan::{self, Borders, Plan, Target};
use super::weights::WeightFormat;
use super::{CacheChunk, Case, Check, Data, Expected, Job, Kernel, Sequence, Set, Tensor, Tensors, Tolerance};
use crate::gpu::{Caps, Recording};
use crate::num::record::RecordFormat;
use crate::reference;

const CHUNKS: [&str; 4] = ["cache 0", "cache 1", "cache 2", "cache 3"];
/// The largest chunk: software drivers bind no more than 128 MiB.
const CHUNK_BYTES: usize = 120 << 20;
/// Rows that the twin checks of a case that costs more than this.
const SAMPLED: usize = 32;
const CHEAP: f64 = 2e7;

/// A case.
#[derive(Clone)]
struct Shape {
    heads: u32,
    groups: u32,
    width: u32,
    /// Its records are the keys and values of all groups.
    context: Context,
    /// Workgroups that the plan is to give.
    workgroups: u32,
    /// Rows of a group that the spec hints at.
    hint: u32,
}

/// The cases of a set.
pub(super) fn cases(set: Set) -> Vec<Case<GqaDecode>> {
    let shape = |(heads, groups, width), sequences: &[(u32, u32)], page, chunks, draw| Shape {
        heads,
        groups,
        width,
        context: Context {
            widths: (2 * groups * width, 0),
            format: RecordFormat::F16,
            page,
            sequences: sequences.to_vec(),
            chunks,
            draw,
        },
        workgroups: 24,
        hint: heads / groups * sequences.iter().map(|(_, tokens)| *tokens).max().expect("a sequence"),
    };
    if set == Set::Timed {
        let shapes = [
            ((32, 8, 128), vec![(4095, 1); 128]),
            ((32, 8, 128), vec![(4095, 1)]),
            ((32, 32, 128), vec![(4095, 1); 32]),
            ((32, 32, 128), vec![(4095, 1)]),
        ];
        let timed = |(of, sequences): &(_, Vec<_>)| {
            let workgroups = 264 * WORKGROUPS_FACTOR;
            Shape { workgroups, ..shape(*of, sequences, 64, 1, Draw::Even) }.case()
        };
        return shapes.iter().map(timed).collect();
    }
    let mixed: &[(u32, u32)] = &[(76, 1), (12, 0), (0, 3), (129, 2)];
    let (wide, draws) = ((32, 8, 128), Draw::ALL);
    let mut shapes = vec![
        shape(wide, &[(0, 1)], 64, 1, Draw::Even),
        shape(wide, &[(999, 1)], 64, 1, Draw::Even),
        shape(wide, mixed, 16, 2, Draw::Peaked),
        shape((8, 8, 128), mixed, 64, 1, Draw::Rising),
        shape((8, 8, 128), &[(4095, 1)], 64, 3, Draw::Even),
        shape((6, 3, 64), mixed, 16, 2, Draw::Rising),
        Shape { hint: 2, ..shape((9, 3, 64), &[(300, 1), (63, 1), (64, 1)], 64, 1, Draw::Peaked) },
        shape((5, 1, 32), mixed, 16, 2, Draw::Even),
        shape((16, 1, 16), mixed, 16, 3, Draw::Peaked),
        shape((16, 2, 256), &[(130, 1), (20, 4)], 64, 2, Draw::Rising),
        shape((24, 2, 128), &[(200, 2)], 64, 1, Draw::Peaked),
        // Other numbers of rows than the hint says.
        Shape { hint: 2, ..shape((12, 2, 64), mixed, 16, 1, Draw::Even) },
        Shape { hint: 8, ..shape((4, 4, 128), mixed, 64, 2, Draw::Even) },
        // A long context in few splits.
        Shape { workgroups: 3, hint: 8, ..shape((4, 1, 64), &[(20_000, 1)], 64, 1, Draw::Even) },
    ];
    let drawn = |draw: &Draw| Shape { hint: 8, ..shape((4, 2, 32), &[(400, 1), (90, 2)], 16, 2, *draw) };
    shapes.extend(draws.iter().skip(3).map(drawn));
    shapes.into_iter().map(Shape::case).collect()
}

impl Shape {
    fn flops(&self) -> f64 {
        4.0 * f64::from(self.heads * self.width) * self.context.visible()
    }

    fn plan(&self, rows: u32, batch: &mut [Sequence], table: &[u32], chunk_pages: u32) -> Plan {
        let target = Target {
            page: self.context.page,
            chunk_pages,
            heads: self.heads,
            rows,
            little: None,
            workgroups: self.workgroups,
            partials: u32::MAX,
            borders: Borders::Balanced,
        };
        plan::plan(batch, table, &target).expect("a case's pages lie in few runs")
    }

    fn case(mut self) -> Case<GqaDecode> {
        let Shape { heads, groups, width, context, workgroups, hint } = &mut self;
        let bytes = context.tokens() as usize * context.record();
        context.chunks = context.chunks.max(bytes.div_ceil(CHUNK_BYTES) as u32).min(CHUNKS.len() as u32);
        let few = &context.sequences[..context.sequences.len().min(6)];
        let name = format!(
            "{heads} heads of {width} in {groups} groups, {} sequences, (position, tokens) {few:?}, page {}, {:?}, {} \
             chunks, plan for {workgroups}, hint {hint}",
            context.sequences.len(),
            context.page,
            context.draw,
            context.chunks,
        );
        let spec = Spec { width: *width, rows: *hint };
        let flops = self.flops();
        Case::new(name, spec, flops, move || self.job()).moving(bytes as f64)
    }

    /// A query; the special draws speak to the first group's keys.
    fn query(&self, inputs: &mut Inputs, table: &[f32], head: u32) -> Vec<f32> {
        let draw = if head < self.heads / self.groups { self.context.draw } else { Draw::Even };
        let one = Context { widths: (self.width, 0), draw, ..self.context.clone() };
        one.query(inputs, table)
    }

    fn job(&self) -> Job<GqaDecode> {
        let (d, heads) = (self.width as usize, self.heads as usize);
        let mut inputs = Inputs::seed(u64::from(self.heads * 31 + self.context.page + self.width));
        let table = contexts::table(&mut inputs);
        // Blocks of as many rows as a group's heads have: one for each group.
        let rows = self.heads / self.groups;
        let Drawn { plan, batch, rows, table: block_table, chunk_pages, caches } =
            self.context.draw(&mut inputs, &table, |batch, table, pages| self.plan(rows, batch, table, pages));
        let count = rows.len() * heads;
        let queries: Vec<f32> =
            (0..count as u32).flat_map(|i| self.query(&mut inputs, &table, i % self.heads)).collect();
        let rounding = (2.4e-7 * self.context.draw.magnitude()).powi(2);
        let tolerance = Tolerance::nmse(Tolerance::f32(4096).nmse + rounding);
        // A log-sum-exp near 0 is the difference of a score and a logarithm: off by the score's rounding.
        let lse = Tolerance { absolute: 2.4e-8 * self.context.draw.magnitude(), ..Tolerance::nmse(1e-7) };
        let mut tensors = vec![
            Tensor::input("batch", words(&batch)),
            Tensor::input("rows", words(&rows)),
            Tensor::input("splits", words(&plan.splits)),
            Tensor::input("block_table", Data::U32(block_table)),
            Tensor::input("queries", Data::F32(queries)),
            Tensor::scratch("partials", plan.partials as usize * heads * (d + 4)),
            Tensor::output("output", Data::poison(count * d), Check::rows(d, tolerance)),
            Tensor::output("lse", Data::poison(count), Check::rows(1, lse)),
        ];
        tensors.extend(CHUNKS.iter().zip(caches).map(|(name, bytes)| Tensor::input(name, Data::U8(bytes))));
        let (case, of) = (self.clone(), self.clone());
        let record = move |kernel: &GqaDecode, t: &Tensors, recording: &mut Recording| {
            case.record(kernel, &plan, chunk_pages, t, recording);
        };
        Job::new(tensors, record).expecting(move |tensors| of.expected(&batch, chunk_pages, tensors))
    }

    fn record(&self, kernel: &GqaDecode, plan: &Plan, chunk_pages: u32, t: &Tensors, recording: &mut Recording) {
        let chunk = |(i, name): (u32, &&'static str)| CacheChunk {
            first_page: i * chunk_pages,
            pages: chunk_pages,
            view: t.get(name),
        };
        let cache: Vec<CacheChunk> = (0..).zip(&CHUNKS[..self.context.chunks as usize]).map(chunk).collect();
        let (batch, partials) = (t.get("batch"), t.get("partials"));
        let sequences = &self.context.sequences;
        let args = Args {
            batch: batch.clone(),
            splits: t.get("splits"),
            block_table: t.get("block_table"),
            queries: t.get("queries"),
            cache: &cache,
            partials: partials.clone(),
            plan,
            heads: self.heads,
            groups: self.groups,
            most_tokens: sequences.iter().map(|(_, tokens)| *tokens).max().expect("a sequence"),
            page: self.context.page,
        };
        kernel.record(recording, &args);
        let tokens = sequences.iter().map(|(_, tokens)| tokens).sum();
        let (output, format) = (Output::Latent, WeightFormat::F32);
        let spec = mla_combine::Spec { latent: self.width, nope: 8, value: 8, format, output, tokens };
        let portable = MlaCombine::variants(&spec, &Caps::portable()).remove(0);
        let args = mla_combine::Args {
            batch,
            rows: t.get("rows"),
            partials,
            kv_b: &[],
            output: t.get("output"),
            lse: t.get("lse"),
            tokens,
            heads: self.heads,
        };
        MlaCombine::new(&spec, &portable.tuning).record(recording, &args);
    }

    /// The twin over whole contexts: all rows of a cheap case, a sample of a dear one.
    fn expected(&self, batch: &[Sequence], chunk_pages: u32, tensors: &[Tensor]) -> Vec<Expected> {
        let (d, heads, groups) = (self.width as usize, self.heads as usize, self.groups as usize);
        let tensor = |name: &str| &tensors.iter().find(|t| t.name == name).expect("the case has it").data;
        let (Data::F32(queries), Data::U32(table)) = (tensor("queries"), tensor("block_table")) else {
            panic!("job made them so")
        };
        let caches: Vec<&[u8]> = CHUNKS[..self.context.chunks as usize].iter().map(|c| tensor(c).bytes()).collect();
        let count = batch.iter().map(|s| s.tokens as usize).sum::<usize>() * heads;
        let step = if self.flops() > CHEAP { count.div_ceil(SAMPLED).max(1) } else { 1 };
        let row = |sequence: &Sequence, records: &[f32], i: usize| {
            let row = sequence.first_row as usize * heads + i;
            let group = i % heads / (heads / groups);
            let seen = sequence.position as usize + i / heads + 1;
            let rows = group_rows(records, (groups, group, d)).take(seen);
            let (output, lse) = reference::gqa_decode::attend(&queries[row * d..][..d], rows);
            (row, output, (lse * std::f64::consts::LN_2).max(f64::from(NOTHING)))
        };
        let mut found = Vec::new();
        for sequence in batch {
            let first = sequence.first_row as usize * heads;
            let sampled: Vec<usize> =
                (0..sequence.tokens as usize * heads).filter(|i| ((first + i) * 7).is_multiple_of(step)).collect();
            if !sampled.is_empty() {
                let length = sequence.position + sequence.tokens;
                let records = self.context.records(&caches, chunk_pages, &table[sequence.pages as usize..], length);
                found.par_extend(sampled.into_par_iter().map(|i| row(sequence, &records, i)));
            }
        }
        let lse = found.iter().map(|(row, _, lse)| (*row, vec![*lse])).collect();
        let output = found.into_iter().map(|(row, output, _)| (row, output)).collect();
        vec![Expected { tensor: "output", rows: output }, Expected { tensor: "lse", rows: lse }]
    }
}
