//! Absorbed decode over shuffled pages in cold caches, each shape held against the f64 twin before it is timed. Where a
//! sequence has several splits, with the combine that writes latents; else the partials are the latents, and with them
//! their log-sum-exps.

use rayon::prelude::*;
use serde::Serialize;

use super::Spread;
use super::ceilings::Ceilings;
use super::clock::Clock;
use super::decode_io::{Io, Set};
use super::pages::Pages;
use super::published::{Published, published};
use super::shape::{Asked, PAGE, Shape, WIDTHS};
use super::way::{Way, decoder};
use crate::gpu::{Caps, Device, Recording};
use crate::kernels::inputs::Inputs;
use crate::kernels::mla_combine::{self, MlaCombine, Output};
use crate::kernels::mla_decode::{self, Spec};
use crate::kernels::mla_decode_coop::Decoder;
use crate::kernels::plan::{self, Borders, Target};
use crate::kernels::weights::WeightFormat;
use crate::kernels::{Kernel, Sequence};
use crate::num::record::RecordFormat;
use crate::{Error, Result, reference};

/// Rows that the twin checks of a shape.
const CHECKED: usize = 8;
/// The most sets of pages that runs rotate among.
const MOST_SETS: u64 = 1024;

/// What is measured.
#[derive(Clone, Debug)]
pub struct Work {
    /// The shapes.
    pub shapes: Vec<Shape>,
    /// The formats of records.
    pub formats: Vec<RecordFormat>,
    /// The kernel.
    pub way: Way,
    /// Timed runs of a shape, at least.
    pub repeat: usize,
    /// Bytes that runs read between two that read the same.
    pub cold_bytes: u64,
}

/// One shape's figures.
#[derive(Clone, Debug, Serialize)]
pub struct Figure {
    /// The shape.
    #[serde(flatten)]
    pub asked: Asked,
    /// The kernel and how it ran, such as `mla_decode portable`.
    pub variant: String,
    /// The keys of the shaders that ran.
    pub keys: Vec<String>,
    /// Splits of all contexts together.
    pub splits: usize,
    /// The time of decode, and of the combine where sequences have several splits.
    #[serde(flatten)]
    pub time: Spread,
    /// Bytes of records, each read once.
    pub bytes: f64,
    /// These over the median, GB/s.
    pub gbs: f64,
    /// Operations over the median, TFLOP/s.
    pub tflops: f64,
    /// The least time that the ceilings allow over the median.
    pub share: f64,
    /// What sets that least time: `memory` or `compute`.
    pub bound: &'static str,
    /// Rows that were held against the twin.
    pub checked: usize,
    /// The worst of them: the root of its normalised mean square error.
    pub error: f64,
    /// What others published for this shape.
    pub published: Option<Published>,
    /// The time with f16 records over this one's, for other formats, where both were measured.
    pub gain_over_f16: Option<f64>,
}

/// A shape without figures.
#[derive(Clone, Debug, Serialize)]
pub struct Left {
    /// The shape.
    #[serde(flatten)]
    pub asked: Asked,
    /// Why there are none.
    pub why: String,
}

/// What was measured.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Results {
    /// Of each shape and format that ran.
    pub decode: Vec<Figure>,
    /// What cannot run here.
    pub skipped: Vec<Left>,
    /// What the twin found wrong.
    pub failed: Vec<Left>,
}

/// Measures each shape with each format. `progress` hears of each before it runs: how many are done, of how
/// many.
///
/// # Errors
/// Faults of the driver. A shape that does not fit the memory is skipped; one that the twin finds wrong has no
/// figures.
pub async fn measure(
    device: &Device,
    clock: &Clock,
    ceilings: &Ceilings,
    work: &Work,
    mut progress: impl FnMut(usize, usize),
) -> Result<Results> {
    let total = work.formats.len() * work.shapes.len();
    let mut outcomes: Vec<Option<Outcome>> = (0..total).map(|_| None).collect();
    let mut done = 0;
    for (f, format) in work.formats.iter().enumerate() {
        // The largest first: its pages serve all others.
        let mut order: Vec<usize> = (0..work.shapes.len()).collect();
        let need = |shape: &Shape| shape.pages() * sets(shape, *format, work, device.caps());
        order.sort_by_key(|i| std::cmp::Reverse(need(&work.shapes[*i])));
        let mut pages: Option<Pages> = None;
        for i in order {
            progress(done, total);
            done += 1;
            let shape = &work.shapes[i];
            let bench = Bench { device, clock, ceilings, shape, format: *format, work };
            outcomes[i * work.formats.len() + f] = Some(match bench.run(&mut pages, need(shape)).await {
                Ok(outcome) => outcome,
                Err(Error::OutOfMemory { asked, offered, .. }) => Outcome::Skipped(format!("{asked}: {offered}")),
                Err(error) => return Err(error),
            });
        }
    }
    let mut results = Results::default();
    for (i, outcome) in outcomes.into_iter().enumerate() {
        let shape = &work.shapes[i / work.formats.len()];
        let left = |why| Left { asked: shape.asked(work.formats[i % work.formats.len()]), why };
        match outcome.expect("each ran") {
            Outcome::Figure(figure) => results.decode.push(*figure),
            Outcome::Skipped(why) => results.skipped.push(left(why)),
            Outcome::Wrong(why) => results.failed.push(left(why)),
        }
    }
    results.compare();
    Ok(results)
}

impl Results {
    /// Sets each other format's gain over f16.
    fn compare(&mut self) {
        let same = |a: &Asked, b: &Asked| {
            (a.heads, &a.contexts, a.batch, a.tokens) == (b.heads, &b.contexts, b.batch, b.tokens)
        };
        let f16: Vec<(Asked, f64)> = self
            .decode
            .iter()
            .filter(|f| f.asked.dtype == "f16")
            .map(|f| (f.asked.clone(), f.time.median_us))
            .collect();
        for figure in self.decode.iter_mut().filter(|figure| figure.asked.dtype != "f16") {
            let found = f16.iter().find(|(asked, _)| same(asked, &figure.asked));
            figure.gain_over_f16 = found.map(|(_, us)| us / figure.time.median_us);
        }
    }
}

/// Where a software driver allocates, the system ends other programs before it says that there is no more.
const MOST_HOST_BYTES: u64 = 8 << 30;

enum Outcome {
    Figure(Box<Figure>),
    Skipped(String),
    Wrong(String),
}

/// How many sets of pages runs rotate among. A software driver has no more than it has runs.
fn sets(shape: &Shape, format: RecordFormat, work: &Work, caps: &Caps) -> u64 {
    let record = format.bytes(WIDTHS.0 as usize, WIDTHS.1 as usize) as u64;
    let bytes = shape.pages() * u64::from(PAGE) * record;
    let most = if caps.is_software() { work.repeat as u64 } else { MOST_SETS };
    work.cold_bytes.div_ceil(bytes).clamp(1, most)
}

struct Bench<'a> {
    device: &'a Device,
    clock: &'a Clock,
    ceilings: &'a Ceilings,
    shape: &'a Shape,
    format: RecordFormat,
    work: &'a Work,
}

impl Bench<'_> {
    async fn run(&self, pages: &mut Option<Pages>, need: u64) -> Result<Outcome> {
        let (shape, device, (r, p)) = (self.shape, self.device, WIDTHS);
        let bytes = need * u64::from(PAGE) * self.format.bytes(r as usize, p as usize) as u64;
        if device.caps().is_software() && bytes > MOST_HOST_BYTES {
            return Ok(Outcome::Skipped(format!("{bytes} bytes of caches, which a software driver takes of the host")));
        }
        let Ok(need) = u32::try_from(need) else {
            return Ok(Outcome::Skipped(format!("{need} pages, more than block tables count")));
        };
        let spec = Spec { latent: r, rope: p, format: self.format, rows: shape.heads * shape.tokens };
        let (decoder, mut variant) = match decoder(device, &spec, self.work.way)? {
            Ok(found) => found,
            Err(why) => return Ok(Outcome::Skipped(why)),
        };
        // Before they are drawn.
        device.caps().check_bound(4 * shape.rows() as u64 * u64::from(r + p), "queries")?;
        if pages.as_ref().is_none_or(|pages| pages.count() < need) {
            *pages = None; // before there are others
            *pages = Some(self.pages(need)?);
        }
        let pages = pages.as_mut().expect("they were made");
        pages.release();
        let count = sets(shape, self.format, self.work, device.caps());
        let sets: Vec<Set> = (0..count).map(|seed| self.set(pages, &decoder, seed)).collect::<Result<_>>()?;
        if decoder.on_matrices() {
            variant = format!("{variant} {}", decoder.blocks(sets[0].plan.rows));
        }
        let io = Io::new(device, shape, &sets)?;
        // Where each sequence has one split, in all sets, nothing is to be merged.
        let merged = !sets.iter().all(|set| set.plan.is_single());
        let combine = merged.then(|| self.combine());
        let recording = |i: usize| self.record(&decoder, combine.as_ref(), pages, &io, i, &sets[i]);
        let recordings: Vec<Recording> = (0..sets.len()).map(recording).collect();
        // The last set, so that a software driver does not find the first in its caches.
        let last = sets.len() - 1;
        let most = if decoder.on_matrices() { ROUNDED } else { EXACT };
        let (checked, error) = match self.check(pages, &io, &sets[last], &recordings[last], merged, most).await? {
            Ok(found) => found,
            Err(why) => return Ok(Outcome::Wrong(format!("{variant}: {why}"))),
        };
        let rounds = self.work.repeat.div_ceil(sets.len());
        let time = Spread::of(self.clock.time(device, &recordings, rounds).await?);
        let seconds = time.median_us * 1e-6;
        let bytes = shape.records() * self.format.bytes(r as usize, p as usize) as f64;
        let (least, by_memory) = self.ceilings.least_seconds(bytes, shape.flops());
        let mut keys: Vec<String> = recordings[0].calls().iter().map(|call| call.shader.key().to_string()).collect();
        keys.dedup();
        let comparable = self.format == RecordFormat::F16;
        Ok(Outcome::Figure(Box::new(Figure {
            asked: shape.asked(self.format),
            variant,
            keys,
            splits: sets[0].plan.splits.len(),
            time,
            bytes,
            gbs: bytes / seconds / 1e9,
            tflops: shape.flops() / seconds / 1e12,
            share: least / seconds,
            bound: if by_memory { "memory" } else { "compute" },
            checked,
            error,
            published: published(shape, time.median_us).filter(|_| comparable),
            gain_over_f16: None,
        })))
    }

    fn pages(&self, count: u32) -> Result<Pages> {
        let (r, p) = (WIDTHS.0 as usize, WIDTHS.1 as usize);
        let table = Inputs::seed(1).flashmla(1 << 14);
        Pages::new(self.device, (PAGE, self.format.bytes(r, p)), count, |inputs| {
            let values: Vec<f32> = inputs.pick(&table, r + p).collect();
            self.format.encode(&values[..r], &values[r..])
        })
    }

    fn combine(&self) -> MlaCombine {
        let (latent, caps) = (WIDTHS.0, self.device.caps());
        let tokens = self.shape.contexts.len() as u32 * self.shape.tokens;
        let (output, format) = (Output::Latent, WeightFormat::F32);
        let spec = mla_combine::Spec { latent, nope: 8, value: 8, format, output, tokens };
        match self.work.way {
            Way::Portable => MlaCombine::new(&spec, &MlaCombine::variants(&spec, caps)[0].tuning),
            _ => MlaCombine::chosen(&spec, caps),
        }
    }

    fn set(&self, pages: &mut Pages, decoder: &Decoder, seed: u64) -> Result<Set> {
        let Shape { heads, contexts, tokens } = self.shape;
        let (mut batch, mut table, mut first_row) = (Vec::new(), Vec::new(), 0);
        for context in contexts {
            table.push(0xFFFF_FFF0); // nobody's
            let of = Sequence { position: context - tokens, tokens: *tokens, first_row, ..Sequence::default() };
            batch.push(Sequence { pages: table.len() as u32, ..of });
            table.extend(pages.take(context.div_ceil(PAGE)));
            first_row += tokens;
        }
        table.push(0xFFFF_FFF0);
        let target = Target {
            page: PAGE,
            chunk_pages: pages.chunk_pages,
            heads: *heads,
            rows: decoder.rows(),
            little: decoder.little(),
            workgroups: decoder.workgroups(self.device.caps()),
            partials: u32::MAX,
            borders: Borders::Balanced,
        };
        let plan = plan::plan(&mut batch, &table, &target)?;
        let mut inputs = Inputs::seed(seed);
        let values = inputs.flashmla(1 << 12);
        let scale = std::f32::consts::LOG2_E;
        let count = self.shape.rows() * (WIDTHS.0 + WIDTHS.1) as usize;
        let queries = inputs.pick(&values, count).map(|value| value * scale).collect();
        Ok(Set { batch, table, plan, queries })
    }

    fn record(
        &self,
        decoder: &Decoder,
        combine: Option<&MlaCombine>,
        pages: &Pages,
        io: &Io,
        i: usize,
        set: &Set,
    ) -> Recording {
        let Shape { heads, tokens, contexts } = self.shape;
        let mut recording = Recording::new();
        let batch = io.batch.view(i);
        decoder.record(
            &mut recording,
            &mla_decode::Args {
                batch: batch.clone(),
                splits: io.splits.view(i),
                block_table: io.table.view(i),
                queries: io.queries.view(i),
                cache: &pages.chunks,
                partials: io.partials.view(),
                plan: &set.plan,
                heads: *heads,
                most_tokens: *tokens,
                page: PAGE,
            },
        );
        let args = mla_combine::Args {
            batch,
            rows: io.rows.view(),
            partials: io.partials.view(),
            kv_b: &[],
            output: io.output.view(),
            lse: io.lse.view(),
            tokens: contexts.len() as u32 * tokens,
            heads: *heads,
        };
        if let Some(combine) = combine {
            combine.record(&mut recording, &args);
        }
        recording
    }

    /// Runs a set and holds some rows against the twin, by an error of at most `most`: how many, and the worst one's.
    async fn check(
        &self,
        pages: &Pages,
        io: &Io,
        set: &Set,
        recording: &Recording,
        merged: bool,
        most: f64,
    ) -> Result<std::result::Result<(usize, f64), String>> {
        let (r, width, heads) = (WIDTHS.0 as usize, (WIDTHS.0 + WIDTHS.1) as usize, self.shape.heads as usize);
        self.device.prepare(recording).await?;
        self.device.submit(recording)?;
        let results = io.found(self.device, self.shape, set, merged).await?;
        let rows = self.shape.rows();
        let count = CHECKED.min(rows);
        // From the first to the last, of all sequences and heads.
        let sampled: Vec<usize> = (0..count).map(|i| i * (rows - 1) / (count - 1).max(1)).collect();
        let of = |row: &usize| row / heads / self.shape.tokens as usize;
        let expected = |rows: &[usize]| {
            // Rows of a sequence share its records: a long context takes much of the host's memory.
            let sequence = &set.batch[of(&rows[0])];
            let seen = |row: &usize| sequence.position + (row / heads) as u32 - sequence.first_row + 1;
            let table = &set.table[sequence.pages as usize..];
            let record = |token| self.format.decode(pages.record(table, token), r, width - r);
            let records: Vec<f32> = (0..rows.iter().map(seen).max().unwrap_or(0)).flat_map(record).collect();
            let attended = rows.par_iter().map(|row| {
                let query = &set.queries[row * width..][..width];
                reference::mla_decode::attend(query, records.chunks_exact(width).take(seen(row) as usize), r)
            });
            attended.collect::<Vec<_>>()
        };
        let sequences: Vec<&[usize]> = sampled.chunk_by(|a, b| of(a) == of(b)).collect();
        let expected: Vec<(Vec<f64>, f64)> = sequences.into_par_iter().flat_map_iter(expected).collect();
        let mut worst: f64 = 0.0;
        for (row, (values, expected_lse)) in sampled.iter().zip(&expected) {
            let (found, lse) = results(*row);
            let error: f64 = values.iter().zip(&found).map(|(e, f)| (e - f64::from(*f)).powi(2)).sum();
            let size: f64 = values.iter().map(|e| e * e).sum();
            let error = (error / size).sqrt();
            let off = (lse - expected_lse).abs() * std::f64::consts::LN_2;
            if !(error <= most && off <= 1e-3) {
                let place = format!("head {} of token {}", row % heads, row / heads);
                return Ok(Err(format!(
                    "{place} is off by a share of {error:.1e} (at most {most:.1e}), its log-sum-exp by {off:.1e}"
                )));
            }
            worst = worst.max(error);
        }
        Ok(Ok((count, worst)))
    }
}

/// The most error of a row of f32 sums, and of one with queries and weights rounded to f16.
const EXACT: f64 = 5e-5;
const ROUNDED: f64 = 2e-3;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::ceilings::Ceilings;
    use crate::bench::clock::By;
    use crate::gpu::Options;

    const CEILINGS: Ceilings = Ceilings {
        bytes: 0,
        read_gbs: 1.0,
        copy_gbs: 1.0,
        f32_tflops: 1.0,
        f16_tflops: None,
        matrix_tflops: None,
        dispatch_us: 1.0,
        round_trip_us: 1.0,
    };

    #[test]
    fn a_kernel_that_is_wrong_anywhere_fails_the_check() {
        let device = crate::check::adapters(&Options::default()).remove(0);
        // With splits that are merged, and with one each.
        for (contexts, single) in [(vec![100, 70], false), (vec![60, 40, 33], true)] {
            let shape = Shape { heads: 3, contexts, tokens: 2 };
            let (format, cold_bytes) = (RecordFormat::F16, 0);
            let work =
                Work { shapes: vec![shape.clone()], formats: vec![format], way: Way::Portable, repeat: 1, cold_bytes };
            let clock = Clock { by: By::Timestamps, overhead_us: 0.0 };
            let bench =
                Bench { device: &device, clock: &clock, ceilings: &CEILINGS, shape: &shape, format, work: &work };
            let mut pages = bench.pages(shape.pages() as u32).unwrap();
            let spec = Spec { latent: 512, rope: 64, format, rows: 6 };
            let (decoder, _) = decoder(&device, &spec, Way::Portable).unwrap().unwrap();
            let sets = [bench.set(&mut pages, &decoder, 0).unwrap()];
            assert_eq!(sets[0].plan.is_single(), single);
            let io = Io::new(&device, &shape, &sets).unwrap();
            let combine = bench.combine();
            let right = bench.record(&decoder, (!single).then_some(&combine), &pages, &io, 0, &sets[0]);
            let check = |recording: &Recording| {
                pollster::block_on(bench.check(&pages, &io, &sets[0], recording, !single, EXACT)).unwrap()
            };
            assert!(check(&Recording::new()).is_err(), "nothing ran");
            let (rows, error) = check(&right).unwrap();
            assert!(rows == 8 && error < 1e-5, "{rows} rows, {error}");
            let edited = right.changed(|call| {
                if call.shader.kernel == "mla_decode" {
                    let broken = "fold_total += weight * 1.001;";
                    call.shader = call.shader.edited("lib/fold", "fold_total += weight;", broken);
                }
            });
            let why = check(&edited).unwrap_err();
            assert!(why.contains("is off by"), "{why}");
        }
    }

    #[test]
    fn other_formats_gain_over_f16_and_named_shapes_have_the_times_of_others() {
        let shapes = Shape::product(&[1], &[2], &[64]);
        let device = crate::check::adapters(&Options::default()).remove(0);
        let formats = vec![RecordFormat::Fp8, RecordFormat::F16];
        let work = Work { shapes, formats, way: Way::Auto, repeat: 2, cold_bytes: 1 << 20 };
        let clock = pollster::block_on(Clock::of(&device)).unwrap();
        let results = pollster::block_on(measure(&device, &clock, &CEILINGS, &work, |_, _| {})).unwrap();
        let [fp8, f16] = &results.decode[..] else { panic!("{results:?}") };
        let gain = f16.time.median_us / fp8.time.median_us;
        assert!((fp8.gain_over_f16.unwrap() - gain).abs() < 1e-9 && f16.gain_over_f16.is_none());
        assert_eq!((fp8.bytes, f16.bytes, f16.asked.contexts.len()), (64.0 * 656.0, 64.0 * 1152.0, 1));
        assert!(f16.keys.len() == 1 && f16.splits == 1 && f16.time.runs >= 2, "{f16:?}");
    }
}
