//! Is latent attention slower than grouped-query attention, and from which context on is it faster? Layers of
//! MHA, GQA and MLA of one model width decode a token on the same device, each held against its twins before it is
//! timed; beside them MLA that expands its latents at every token, which absorption avoids.

use serde::Serialize;

use super::Spread;
use super::ceilings::Ceilings;
use super::clock::Clock;
use super::layer_weights::{Dims, Kind, LayerWeights};
use super::layers::Layers;
use super::pages::Pages;
use super::shape::PAGE;
use crate::engine::run_until;
use crate::gpu::{Device, Recording};
use crate::kernels::inputs::Inputs;
use crate::{Error, Result};

/// The case `seed`: a model of 4096 with 32 heads of 128, and a latent of 512 with a rope key of 64, which stands
/// beside the 128 values of a head's keys as in DeepSeek's models.
pub const SEED: Dims = Dims { hidden: 4096, heads: 32, head: 128, nope: 128, latent: 512, rope: 64 };

/// What is measured.
#[derive(Clone, Debug)]
pub struct Work {
    /// The model.
    pub dims: Dims,
    /// GQA's heads of keys and values.
    pub groups: u32,
    /// Sequences, each with one new token.
    pub batch: u32,
    /// Tokens of each, the new one included.
    pub contexts: Vec<u32>,
    /// Timed runs, at least.
    pub repeat: usize,
    /// Bytes that runs read between two that read the same.
    pub cold_bytes: u64,
}

/// One kind of attention at one context.
#[derive(Clone, Debug, Serialize)]
pub struct Figure {
    /// Tokens of each sequence.
    pub context: u32,
    /// `MHA`, `GQA-8`, `MLA`, or `MLA expanded`.
    pub kind: String,
    /// Bytes of a token in the cache of a layer.
    pub token_bytes: u64,
    /// Bytes of all sequences' in it.
    pub cache_bytes: u64,
    /// Bytes of the layer's weights.
    pub weight_bytes: u64,
    /// Dispatches of the layer.
    pub dispatches: usize,
    /// Decode and combine alone.
    pub attention: Spread,
    /// The layer, with its projections.
    pub layer: Spread,
    /// The cache's bytes over the median of attention, GB/s.
    pub attention_gbs: f64,
    /// Weights and cache at the measured bandwidth over the median of the layer.
    pub layer_share: f64,
    /// The layer's median over GQA's at this context, where there is one.
    pub layer_to_gqa: Option<f64>,
    /// How far the layer's output is from the twins': the root of its normalised mean square error.
    pub error: f64,
}

/// What has no figure.
#[derive(Clone, Debug, Serialize)]
pub struct Left {
    /// Tokens of each sequence.
    pub context: u32,
    /// The kind.
    pub kind: String,
    /// Why there is none.
    pub why: String,
}

impl Left {
    /// Of what did not fit the memory.
    fn new(context: u32, kind: &str, asked: &str, offered: &str) -> Left {
        Left { context, kind: kind.into(), why: format!("{asked}: {offered}") }
    }
}

/// What was measured.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Results {
    /// The model.
    pub dims: Option<Dims>,
    /// Sequences.
    pub batch: u32,
    /// In the order of contexts, then kinds.
    pub attention: Vec<Figure>,
    /// What does not fit.
    pub skipped: Vec<Left>,
    /// What the twins found wrong.
    pub failed: Vec<Left>,
}

/// The most error of a layer of f32 sums, and of one with queries and weights rounded to f16.
const EXACT: f64 = 1e-4;
const ROUNDED: f64 = 2e-3;
/// The most sets of pages that runs rotate among, and layers of them.
const MOST_SETS: u64 = 2048;
const MOST_LAYERS: usize = 64;
/// The most copies of a layer's weights.
const MOST_COPIES: u64 = 8;
/// What the layer of expanded latents is called.
pub const EXPANDED: &str = "MLA expanded";

impl Work {
    fn kinds(&self) -> [(String, Kind); 3] {
        let Work { dims, groups, .. } = self;
        [
            ("MHA".into(), Kind::Grouped(dims.heads)),
            (format!("GQA-{groups}"), Kind::Grouped(*groups)),
            ("MLA".into(), Kind::Latent),
        ]
    }

    /// Sets of pages: a software driver has no more than it has runs.
    fn sets(&self, kind: Kind, context: u32, software: bool) -> u64 {
        let bytes = u64::from(self.batch) * u64::from(context) * kind.record(&self.dims) as u64;
        let most = if software { self.repeat as u64 } else { MOST_SETS };
        self.cold_bytes.div_ceil(bytes).clamp(1, most)
    }
}

/// Measures each kind at each context. `progress` hears of each before it runs: how many are done, of how many.
///
/// # Errors
/// Faults of the driver. What does not fit the memory is skipped; what the twins find wrong has no figures.
pub async fn measure(
    device: &Device,
    clock: &Clock,
    ceilings: &Ceilings,
    work: &Work,
    mut progress: impl FnMut(usize, usize),
) -> Result<Results> {
    let mut results = Results { dims: Some(work.dims), batch: work.batch, ..Results::default() };
    let total = 3 * work.contexts.len();
    let mut done = 0;
    let software = device.caps().is_software();
    for (name, kind) in work.kinds() {
        let weights = match copies(device, kind, work, software) {
            Err(Error::OutOfMemory { asked, offered, .. }) => {
                results
                    .skipped
                    .extend(work.contexts.iter().map(|context| Left::new(*context, &name, &asked, &offered)));
                done += work.contexts.len();
                continue;
            }
            other => other?,
        };
        for context in &work.contexts {
            progress(done, total);
            done += 1;
            let sets = work.sets(kind, *context, software);
            let bench = Bench { device, clock, ceilings, work, name: &name, kind, context: *context };
            match bench.run(&weights, sets, &mut results).await {
                Err(Error::OutOfMemory { asked, offered, .. }) => {
                    results.skipped.push(Left::new(*context, &name, &asked, &offered));
                }
                other => other?,
            }
        }
    }
    results.compare(&format!("GQA-{}", work.groups));
    Ok(results)
}

/// A layer's weights, as often as the caches do not hold them all.
fn copies(device: &Device, kind: Kind, work: &Work, software: bool) -> Result<Vec<LayerWeights>> {
    let mut copies = vec![LayerWeights::new(device, kind, &work.dims)?];
    let count = if software { 1 } else { work.cold_bytes.div_ceil(copies[0].bytes()).clamp(1, MOST_COPIES) };
    for _ in 1..count {
        copies.push(LayerWeights::new(device, kind, &work.dims)?);
    }
    Ok(copies)
}

impl Results {
    /// Sorts by context, and sets each layer's time over GQA's.
    fn compare(&mut self, gqa: &str) {
        self.attention.sort_by_key(|figure| figure.context); // stable: kinds keep their order
        let base: Vec<(u32, f64)> = self
            .attention
            .iter()
            .filter(|figure| figure.kind == gqa)
            .map(|figure| (figure.context, figure.layer.median_us))
            .collect();
        for figure in &mut self.attention {
            let found = base.iter().find(|(context, _)| *context == figure.context);
            figure.layer_to_gqa = found.map(|(_, us)| figure.layer.median_us / us);
        }
    }
}

struct Bench<'a> {
    device: &'a Device,
    clock: &'a Clock,
    ceilings: &'a Ceilings,
    work: &'a Work,
    name: &'a str,
    kind: Kind,
    context: u32,
}

impl Bench<'_> {
    async fn run(&self, weights: &[LayerWeights], sets: u64, results: &mut Results) -> Result<()> {
        let (device, work) = (self.device, self.work);
        let record = self.kind.record(&work.dims);
        let table = Inputs::seed(1).flashmla(1 << 14);
        let count = work.batch * self.context.div_ceil(PAGE) * sets as u32;
        let mut pages = Pages::new(device, (PAGE, record), count, |inputs| {
            inputs.pick(&table, record / 2).flat_map(|value| half::f16::from_f32(value).to_le_bytes()).collect()
        })?;
        let of = (work.batch, self.context);
        let layers = Layers::new(device, (self.kind, &work.dims), of, weights, &mut pages, sets)?;
        let last = layers.count() - 1;
        let most = if layers.on_matrices() { ROUNDED } else { EXACT };
        let found = self.output(&layers, &layers.layer(last)).await?;
        // The same calls on the same memory by the twins, which write it back.
        run_until(device, &layers.layer(last), "").await?;
        let expected = self.read(&layers).await?;
        let range = 0..layers.count().min(MOST_LAYERS);
        let mut judge = |name: &str, found: &[f32]| {
            let error = error(&expected, found);
            let wrong = !(error <= most);
            if wrong {
                let why = format!("its output is off by a share of {error:.1e} (at most {most:.1e})");
                results.failed.push(Left { context: self.context, kind: name.into(), why });
            }
            (!wrong).then_some(error)
        };
        let own = judge(self.name, &found);
        let other = match layers.expanding(last) {
            Some([layer, _]) => judge(EXPANDED, &self.output(&layers, &layer).await?),
            None => None,
        };
        if let Some(error) = own {
            let attention: Vec<Recording> = (0..layers.count()).map(|i| layers.attention(i)).collect();
            let layer: Vec<Recording> = range.clone().map(|i| layers.layer(i)).collect();
            results.attention.push(self.figure(self.name, weights, (&attention, &layer), error).await?);
        }
        if let Some(error) = other {
            let both = |i: usize| layers.expanding(i).expect("it was there for the check");
            let (layer, attention): (Vec<_>, Vec<_>) = range.map(both).map(|[layer, alone]| (layer, alone)).unzip();
            results.attention.push(self.figure(EXPANDED, weights, (&attention, &layer), error).await?);
        }
        Ok(())
    }

    async fn read(&self, layers: &Layers<'_>) -> Result<Vec<f32>> {
        let bytes = self.device.read(std::slice::from_ref(&layers.output.view)).await?.remove(0);
        Ok(bytemuck::pod_collect_to_vec(&bytes))
    }

    /// What a layer gives, where nothing is left of what another gave.
    async fn output(&self, layers: &Layers<'_>, layer: &Recording) -> Result<Vec<f32>> {
        let view = &layers.output.view;
        self.device.write(view, 0, &vec![f32::NAN; view.size() as usize / 4])?;
        self.device.prepare(layer).await?;
        self.device.submit(layer)?;
        self.read(layers).await
    }

    async fn figure(
        &self,
        name: &str,
        weights: &[LayerWeights],
        (attention, layer): (&[Recording], &[Recording]),
        error: f64,
    ) -> Result<Figure> {
        let work = self.work;
        let mut times = Vec::new();
        for recordings in [attention, layer] {
            let rounds = work.repeat.div_ceil(recordings.len());
            times.push(Spread::of(self.clock.time(self.device, recordings, rounds).await?));
        }
        let token_bytes = self.kind.record(&work.dims) as u64;
        let cache_bytes = token_bytes * u64::from(work.batch) * u64::from(self.context);
        let weight_bytes = weights[0].bytes();
        let (least, _) = self.ceilings.least_seconds((cache_bytes + weight_bytes) as f64, 0.0);
        Ok(Figure {
            context: self.context,
            kind: name.into(),
            token_bytes,
            cache_bytes,
            weight_bytes,
            dispatches: layer[0].calls().len(),
            attention: times[0],
            layer: times[1],
            attention_gbs: cache_bytes as f64 / (times[0].median_us * 1e3),
            layer_share: least / (times[1].median_us * 1e-6),
            layer_to_gqa: None,
            error,
        })
    }
}

/// The root of the normalised mean square error.
fn error(expected: &[f32], found: &[f32]) -> f64 {
    let difference = |(e, f): (&f32, &f32)| (f64::from(*e) - f64::from(*f)).powi(2);
    let size: f64 = expected.iter().map(|e| f64::from(*e).powi(2)).sum();
    (expected.iter().zip(found).map(difference).sum::<f64>() / size).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::Options;

    /// A model small enough for any driver.
    pub const SMALL: Dims = Dims { hidden: 64, heads: 4, head: 16, nope: 24, latent: 32, rope: 8 };

    #[test]
    fn a_layer_of_each_kind_agrees_with_its_twins_and_a_broken_one_has_no_figure() {
        let device = crate::check::adapters(&Options::default()).remove(0);
        let clock = pollster::block_on(Clock::of(&device)).unwrap();
        let contexts = vec![1, 200];
        let work = Work { dims: SMALL, groups: 2, batch: 2, contexts, repeat: 2, cold_bytes: 1 << 16 };
        let ceilings = pollster::block_on(super::super::ceilings::measure(&device, &clock, 2 << 20)).unwrap();
        let results = pollster::block_on(measure(&device, &clock, &ceilings, &work, |_, _| {})).unwrap();
        assert!(results.failed.is_empty() && results.skipped.is_empty(), "{results:?}");
        let kinds: Vec<(u32, &str)> = results.attention.iter().map(|f| (f.context, f.kind.as_str())).collect();
        let of = |context| ["MHA", "GQA-2", "MLA", EXPANDED].map(|kind| (context, kind));
        assert_eq!(kinds, [of(1), of(200)].concat());
        let bytes: Vec<u64> = results.attention[4..].iter().map(|f| f.token_bytes).collect();
        assert_eq!(bytes, [256, 128, 80, 80]);
        assert!(results.attention.iter().all(|f| f.error < 1e-4 && f.layer_to_gqa > Some(0.0)), "{results:?}");
        assert_eq!(results.attention[1].layer_to_gqa, Some(1.0));
        let wrong = error(&[1.0, 2.0], &[1.0, f32::NAN]);
        assert!(!(wrong <= ROUNDED), "NaN fails");
    }
}
