//! The cases of `mla_decode` and `mla_decode_coop`: drawn caches, a plan, the kernel and `mla_combine` behind it, against the
//! twin over whole contexts.

use std::sync::LazyLock;

use rayon::prelude::*;

use super::contexts::{self, Context, Draw, Drawn};
use super::inputs::{Inputs, words};
use super::mla_combine::{self, MlaCombine, NOTHING, Output};
use super::mla_decode::{Args, MlaDecode, Spec, block_rows};
use super::mla_decode_coop::{self, MlaDecodeCoop};
use super::pairs::{covering, product};
use super::plan::{self, Borders, Plan, Target};
use super::weights::WeightFormat;
use super::{CacheChunk, Case, Check, Data, Expected, Job, Kernel, Sequence, Set, Tensor, Tensors, Tolerance};
use crate::Result;
use crate::gpu::{Caps, Device, Recording};
use crate::num::record::RecordFormat;
use crate::reference;

/// The parameters of the cases, the cheapest value of each first.
const HEADS: [u32; 11] = [1, 3, 9, 12, 16, 20, 40, 63, 64, 126, 128];
const WIDTHS: [(u32, u32); 6] = [(32, 8), (48, 16), (256, 32), (256, 64), (512, 0), (512, 64)];
const CONTEXTS: [u32; 8] = [1, 2, 63, 64, 65, 1000, 4096, 70_000];
const TOKENS: [u32; 4] = [1, 2, 4, 8];
const PAGES: [u32; 2] = [64, 16];
/// Heads of the cases that [`Shape::more`] adds, and of no others.
const MORE_HEADS: u32 = 5;
/// What else is in the batch: nothing, or sequences of other lengths.
const BATCHES: [&[(u32, u32)]; 2] = [&[], &[(76, 1), (12, 0), (0, 3), (129, 2)]];
const SIZES: [usize; 6] = [HEADS.len(), WIDTHS.len(), CONTEXTS.len(), TOKENS.len(), PAGES.len(), BATCHES.len()];

/// The dearest case of [`Set::Pairs`], floating-point operations.
const MOST: f64 = 0.16e9;
/// The most NMSE of a row in [`outcome`], which asks whether a driver computes at all what it is told to.
const SELF_TEST: f64 = 1e-3;
/// Rows that the twin checks of a case that costs more than this.
const SAMPLED: usize = 32;
const CHEAP: f64 = 2e7;
/// The largest chunk of a cache: software drivers bind no more than 128 MiB.
const CHUNK_BYTES: usize = 120 << 20;
const CHUNKS: [&str; 4] = ["cache 0", "cache 1", "cache 2", "cache 3"];

/// A kernel of these cases.
pub(super) trait Decode: Kernel<Spec = Spec> {
    /// The formats that its cases take in turn.
    const FORMATS: &'static [RecordFormat];
    /// The NMSE that its rounding to fewer bits than f32's gives, and the factor on that of f32's sums.
    const ROUNDING: (f64, f64);
    /// Workgroups that the plans of timed cases are for.
    const WORKGROUPS: u32;
    /// A query as it takes it.
    const QUERY: fn(&[f32]) -> Vec<f32>;
    /// Rows of a workgroup, for the plan.
    fn block_rows(spec: &Spec) -> u32;
    /// Its `record`.
    fn add(&self, recording: &mut Recording, args: &Args);
}

impl Decode for MlaDecode {
    const FORMATS: &'static [RecordFormat] = &[RecordFormat::F16, RecordFormat::Fp8, RecordFormat::F32];
    const ROUNDING: (f64, f64) = (0.0, 1.0);
    const WORKGROUPS: u32 = 264;
    const QUERY: fn(&[f32]) -> Vec<f32> = <[f32]>::to_vec;

    fn block_rows(spec: &Spec) -> u32 {
        block_rows(spec.rows)
    }

    fn add(&self, recording: &mut Recording, args: &Args) {
        self.record(recording, args);
    }
}

impl Decode for MlaDecodeCoop {
    // Three, so that each meets every draw, of which there are ten.
    const FORMATS: &'static [RecordFormat] = &[RecordFormat::F16, RecordFormat::Fp8, RecordFormat::F16];
    // Weights have 11 bits; matrix units cut the bits of a sum that are far below its largest term.
    const ROUNDING: (f64, f64) = (2.4e-7, 4.0);
    const WORKGROUPS: u32 = mla_decode_coop::WORKGROUPS;
    const QUERY: fn(&[f32]) -> Vec<f32> = reference::mla_decode_coop::query;

    fn block_rows(spec: &Spec) -> u32 {
        mla_decode_coop::block_rows(spec.rows)
    }

    fn add(&self, recording: &mut Recording, args: &Args) {
        self.record(recording, args);
    }
}

/// The cases of a set.
pub(super) fn cases<K: Decode>(set: Set) -> Vec<Case<K>> {
    static PAIRS: LazyLock<Vec<Vec<usize>>> = LazyLock::new(|| covering(&SIZES, |c| Shape::of(0, c).flops(), MOST));
    let all = |picked: &[Vec<usize>]| {
        let picked = picked.iter().enumerate().map(|(i, c)| Shape::of(i, c));
        picked.chain(Shape::more()).enumerate().map(|(i, shape)| shape.taking(K::FORMATS, i).case()).collect()
    };
    match set {
        Set::Timed => Shape::timed().map(|shape| Shape { workgroups: K::WORKGROUPS, ..shape }.case()).into(),
        Set::Pairs => all(&PAIRS),
        Set::Full => all(&full()),
    }
}

/// What `kernel` made wrong of a small case of `spec` on `device`, if anything.
pub(super) fn outcome<K: Decode>(kernel: &K, spec: &Spec, device: &Device) -> Result<Option<String>> {
    let (widths, format) = ((spec.latent, spec.rope), spec.format);
    let shape = |heads, sequences, draw, workgroups| {
        let context = Context { widths, format, page: 16, sequences, chunks: 1, draw };
        Shape { heads, context, workgroups }
    };
    // Maxima that move, a tile that is not whole, rows that leave a block unfilled, two new tokens; and where blocks
    // are large a whole one, of many tiles, in which some rows' maxima move.
    let mut shapes = vec![shape(9, vec![(200, 1), (70, 2)], Draw::Rising, 4)];
    if K::block_rows(spec) > 16 {
        shapes.push(shape(35, vec![(300, 2)], Draw::Peaked, 4));
    }
    for shape in shapes {
        if let Some(fault) = fault(kernel, &shape.job(), device)? {
            return Ok(Some(fault));
        }
    }
    Ok(None)
}

/// The first row that `kernel` made wrong of a case on `device`, if any.
fn fault<K: Decode>(kernel: &K, job: &Job<K>, device: &Device) -> Result<Option<String>> {
    let tensors = Tensors::upload(device, &job.tensors)?;
    let mut recording = Recording::new();
    (job.record)(kernel, &tensors, &mut recording);
    device.submit(&recording)?;
    let expected = job.expected.as_ref().expect("job gives them")(&job.tensors);
    for Expected { tensor, rows } in expected {
        let bytes = pollster::block_on(device.read(&[tensors.get(tensor)]))?.remove(0);
        let found: Vec<f32> = bytemuck::pod_collect_to_vec(&bytes);
        for (row, values) in rows {
            let found = &found[row * values.len()..][..values.len()];
            let error: f64 = values.iter().zip(found).map(|(e, f)| (e - f64::from(*f)).powi(2)).sum();
            let size: f64 = values.iter().map(|e| e * e).sum();
            if !(error <= SELF_TEST * size) {
                return Ok(Some(format!("its {tensor} is wrong by a share of {:.1e}", (error / size).sqrt())));
            }
        }
    }
    Ok(None)
}

/// The product of what shapes a step; batches take turns.
fn full() -> Vec<Vec<usize>> {
    let [sizes @ .., batches] = SIZES;
    let with = |(i, c): (usize, Vec<usize>)| [c.as_slice(), &[(i + i / batches) % batches]].concat();
    product(&sizes).into_iter().enumerate().map(with).collect()
}

/// A case.
#[derive(Clone)]
struct Shape {
    heads: u32,
    context: Context,
    /// Workgroups that the plan is to give.
    workgroups: u32,
}

impl Shape {
    /// The case of a combination. Formats, draws, chunks and splits, which are independent of the rest,
    /// take turns.
    fn of(index: usize, combination: &[usize]) -> Shape {
        let [heads, widths, context, tokens, page, batch] = combination else { panic!("six parameters") };
        let tokens = TOKENS[*tokens];
        let mut sequences = vec![(CONTEXTS[*context].max(tokens) - tokens, tokens)];
        sequences.extend(BATCHES[*batch]);
        let context = Context {
            widths: WIDTHS[*widths],
            format: RecordFormat::F16,
            page: PAGES[*page],
            sequences,
            chunks: 1 + (index as u32 / 3 + index as u32) % 3,
            draw: Draw::ALL[index % Draw::ALL.len()],
        };
        Shape { heads: HEADS[*heads], context, workgroups: [3, 40, 264][index / 2 % 3] }
    }

    /// The same with one of `formats`, by its place among the cases; [`Shape::more`] has formats of its own.
    fn taking(mut self, formats: &[RecordFormat], index: usize) -> Shape {
        if self.heads != MORE_HEADS || !formats.contains(&self.context.format) {
            self.context.format = formats[index % formats.len()];
        }
        self
    }

    /// What the parameters leave out: records that are padded, values of more vec4 than a workgroup has
    /// invocations; and batches so small that `tests/mutants` can try each broken kernel on them.
    fn more() -> [Shape; 4] {
        let batch: &[(u32, u32)] = &[(150, 2), (76, 1), (12, 0), (0, 3), (130, 2)];
        let shape = |widths, format, draw, sequences: &[(u32, u32)]| Shape {
            heads: MORE_HEADS,
            context: Context { widths, format, page: 16, sequences: sequences.to_vec(), chunks: 2, draw },
            workgroups: 3,
        };
        [
            shape((32, 8), RecordFormat::F16, Draw::Even, batch),
            shape((32, 6), RecordFormat::Fp8, Draw::Peaked, batch),
            shape((48, 16), RecordFormat::F32, Draw::Rising, batch),
            shape((1040, 6), RecordFormat::F16, Draw::Even, &[(40, 2)]),
        ]
    }

    /// What benchmarks ask for: FlashMLA's shapes, alone and in a batch of 128.
    fn timed() -> [Shape; 13] {
        let shape = |batch: usize, length: u32, heads| Shape {
            heads,
            context: Context {
                widths: (512, 64),
                format: RecordFormat::F16,
                page: 64,
                sequences: vec![(length - 1, 1); batch],
                chunks: 1,
                draw: Draw::Even,
            },
            workgroups: 264,
        };
        let fp8 = |shape: Shape| Shape { context: Context { format: RecordFormat::Fp8, ..shape.context }, ..shape };
        [
            shape(1, 4096, 16),
            shape(1, 32_768, 16),
            shape(1, 131_072, 16),
            shape(1, 32_768, 20),
            shape(1, 32_768, 128),
            fp8(shape(1, 32_768, 16)),
            fp8(shape(1, 32_768, 20)),
            fp8(shape(1, 32_768, 128)),
            shape(128, 4096, 16),
            shape(128, 4096, 20),
            shape(128, 4096, 40),
            shape(128, 4096, 64),
            shape(128, 4096, 128),
        ]
    }

    fn flops(&self) -> f64 {
        let (r, p) = self.context.widths;
        2.0 * f64::from(self.heads) * f64::from(2 * r + p) * self.context.visible()
    }

    fn most_tokens(&self) -> u32 {
        self.context.sequences.iter().map(|(_, tokens)| *tokens).max().expect("a sequence")
    }

    fn spec(&self) -> Spec {
        let (latent, rope) = self.context.widths;
        Spec { latent, rope, format: self.context.format, rows: self.heads * self.most_tokens() }
    }

    fn plan<K: Decode>(&self, batch: &mut [Sequence], table: &[u32], chunk_pages: u32) -> Plan {
        let target = Target {
            page: self.context.page,
            chunk_pages,
            heads: self.heads,
            rows: K::block_rows(&self.spec()),
            little: None,
            workgroups: self.workgroups,
            partials: u32::MAX,
            borders: Borders::Balanced,
        };
        plan::plan(batch, table, &target).expect("a case's pages lie in few runs")
    }

    fn case<K: Decode>(mut self) -> Case<K> {
        let Shape { heads, context, workgroups } = &mut self;
        let bytes = context.tokens() as usize * context.record();
        context.chunks = context.chunks.max(bytes.div_ceil(CHUNK_BYTES) as u32).min(CHUNKS.len() as u32);
        let Context { widths: (r, p), format, page, sequences, chunks, draw } = context;
        let few = &sequences[..sequences.len().min(6)];
        let name = format!(
            "{heads} heads of {r}+{p}, {} sequences, (position, tokens) {few:?}, page {page}, {format:?}, {draw:?}, \
             {chunks} chunks, plan for {workgroups}",
            sequences.len(),
        );
        let flops = self.flops();
        Case::new(name, self.spec(), flops, move || self.job()).moving(bytes as f64)
    }

    fn job<K: Decode>(&self) -> Job<K> {
        let (r, heads) = (self.context.widths.0 as usize, self.heads as usize);
        let mut inputs = Inputs::seed(u64::from(self.heads * 31 + self.context.page) + r as u64 * 1009);
        let table = contexts::table(&mut inputs);
        let Drawn { plan, batch, rows, table: block_table, chunk_pages, caches } =
            self.context.draw(&mut inputs, &table, |batch, table, pages| self.plan::<K>(batch, table, pages));
        let count = rows.len() * heads;
        let queries: Vec<f32> = (0..count).flat_map(|_| self.context.query(&mut inputs, &table)).collect();
        // Of a row's products; and the sums over a context, rounded once a term.
        let (fewer, sums) = K::ROUNDING;
        let rounding = (2.4e-7 * sums * self.context.draw.magnitude()).powi(2);
        let tolerance = Tolerance::nmse(Tolerance::f32(4096).nmse + rounding + fewer);
        // A log-sum-exp near 0 is the difference of a score and a logarithm: off by the score's rounding.
        let lse = Tolerance { absolute: 2.4e-8 * sums * self.context.draw.magnitude(), ..Tolerance::nmse(1e-7) };
        let mut tensors = vec![
            Tensor::input("batch", words(&batch)),
            Tensor::input("rows", words(&rows)),
            Tensor::input("splits", words(&plan.splits)),
            Tensor::input("block_table", Data::U32(block_table)),
            Tensor::input("queries", Data::F32(queries)),
            Tensor::scratch("partials", plan.partials as usize * heads * (r + 4)),
            Tensor::output("output", Data::poison(count * r), Check::rows(r, tolerance)),
            Tensor::output("lse", Data::poison(count), Check::rows(1, lse)),
        ];
        tensors.extend(CHUNKS.iter().zip(caches).map(|(name, bytes)| Tensor::input(name, Data::U8(bytes))));
        let (case, of) = (self.clone(), self.clone());
        let record = move |kernel: &K, t: &Tensors, recording: &mut Recording| {
            case.record(kernel, &plan, chunk_pages, t, recording);
        };
        Job::new(tensors, record).expecting(move |tensors| of.expected::<K>(&batch, chunk_pages, tensors))
    }

    fn record<K: Decode>(&self, kernel: &K, plan: &Plan, chunk_pages: u32, t: &Tensors, recording: &mut Recording) {
        let chunk = |(i, name): (u32, &&'static str)| CacheChunk {
            first_page: i * chunk_pages,
            pages: chunk_pages,
            view: t.get(name),
        };
        let cache: Vec<CacheChunk> = (0..).zip(&CHUNKS[..self.context.chunks as usize]).map(chunk).collect();
        let (batch, partials) = (t.get("batch"), t.get("partials"));
        let args = Args {
            batch: batch.clone(),
            splits: t.get("splits"),
            block_table: t.get("block_table"),
            queries: t.get("queries"),
            cache: &cache,
            partials: partials.clone(),
            plan,
            heads: self.heads,
            most_tokens: self.most_tokens(),
            page: self.context.page,
        };
        kernel.add(recording, &args);
        let tokens = self.context.sequences.iter().map(|(_, tokens)| tokens).sum();
        let latent = self.context.widths.0;
        let format = WeightFormat::F32;
        let spec = mla_combine::Spec { latent, nope: 8, value: 8, format, output: Output::Latent, tokens };
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
    fn expected<K: Decode>(&self, batch: &[Sequence], chunk_pages: u32, tensors: &[Tensor]) -> Vec<Expected> {
        let (r, width, heads) = (self.context.widths.0 as usize, self.context.width() as usize, self.heads as usize);
        let values = r + self.context.widths.1 as usize;
        let tensor = |name: &str| &tensors.iter().find(|t| t.name == name).expect("the case has it").data;
        let (Data::F32(queries), Data::U32(table)) = (tensor("queries"), tensor("block_table")) else {
            panic!("job made them so")
        };
        let caches: Vec<&[u8]> = CHUNKS[..self.context.chunks as usize].iter().map(|c| tensor(c).bytes()).collect();
        // Rows by sequence, so that its records are decoded once.
        let count = batch.iter().map(|s| s.tokens as usize).sum::<usize>() * heads;
        let step = if self.flops() > CHEAP { count.div_ceil(SAMPLED).max(1) } else { 1 };
        let row = |sequence: &Sequence, records: &[f32], i: usize| {
            let row = sequence.first_row as usize * heads + i;
            let seen = records.chunks_exact(values).take((sequence.position as usize) + i / heads + 1);
            let (output, lse) = reference::mla_decode::attend(&(K::QUERY)(&queries[row * width..][..values]), seen, r);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cases_cover_every_pair_and_stay_affordable() {
        let cases = cases::<MlaDecode>(Set::Pairs);
        let flops: f64 = cases.iter().map(|case| case.flops).sum();
        assert!(cases.len() >= 60, "{} cases", cases.len());
        assert!(flops < 2.5e9, "{} cases, {flops:e} FLOP: CPU drivers do 0.3e9 a second", cases.len());
        for draw in Draw::ALL {
            assert!(cases.iter().any(|case| case.name.contains(&format!("{draw:?}"))), "{draw:?}");
        }
        assert!(cases.iter().any(|case| case.name.contains("(69999, 1)") && case.name.starts_with("3 heads")));
    }
}
