//! How fast a model runs: prompts and text at some depths of the context, in tokens a second and as a share
//! of what the memory's bandwidth allows; and where the time of a step goes.

use std::time::Duration;

use futures::StreamExt;
use serde::Serialize;
use web_time::Instant;

use super::ceilings::Ceilings;
use super::clock::Clock;
use super::median;
use crate::Result;
use crate::engine::{Engine, Request, SequenceId};
use crate::gpu::{Device, Recording};
use crate::kernels::sample::Sampler;
use crate::model::traffic;

/// What is measured.
#[derive(Clone, Debug)]
pub struct Work {
    /// Tokens in the cache before a prompt or a text starts.
    pub depths: Vec<u32>,
    /// Tokens of a prompt.
    pub prompt: u32,
    /// Tokens of a text.
    pub text: u32,
    /// Times that each is repeated.
    pub repeat: u32,
}

impl Work {
    /// Tokens that the longest context needs.
    pub fn context(&self) -> u32 {
        self.depths.iter().max().copied().unwrap_or(0) + self.prompt.max(self.text + 2)
    }
}

/// One depth's figures.
#[derive(Clone, Debug, Serialize)]
pub struct Depth {
    /// Tokens in the cache before.
    pub depth: u32,
    /// Prompt tokens a second, the median of the repeats.
    pub prefill_tokens_per_s: f64,
    /// The prompt's operations in that time, TFLOP/s.
    pub prefill_tflops: f64,
    /// That over what the device computes at most.
    pub prefill_share: f64,
    /// Text tokens a second, the median of the repeats.
    pub decode_tokens_per_s: f64,
    /// Bytes of weights and cache that a token of text must read, on average.
    pub bytes_per_token: u64,
    /// These bytes at the measured bandwidth, over the time that a token took.
    pub bandwidth_share: f64,
    /// Where the time of a token goes.
    pub token: Token,
    /// Where the time of a prompt's first step goes.
    pub prompt: Prompt,
}

/// A prompt's first step.
#[derive(Clone, Debug, Serialize)]
pub struct Prompt {
    /// Its tokens.
    pub tokens: u32,
    /// Microseconds that the GPU works on it.
    pub gpu_us: f64,
    /// Operations of its attention, in all layers: [`traffic::Operations`].
    pub attention_flops: f64,
    /// Each kernel's dispatches, as of a [`Token`].
    pub kernels: Vec<KernelTime>,
}

/// One token of text.
#[derive(Clone, Debug, Serialize)]
pub struct Token {
    /// Dispatches of the step.
    pub dispatches: usize,
    /// Dispatches of a layer, on average.
    pub dispatches_per_layer: f64,
    /// Microseconds from one token to the next.
    pub wall_us: f64,
    /// Microseconds that the GPU works on the step.
    pub gpu_us: f64,
    /// Of these, without the head and the sampler.
    pub layers_us: f64,
    /// The bytes of the layers at the measured bandwidth, over their time.
    pub layers_bandwidth_share: f64,
    /// Microseconds that the host takes to encode and submit the step.
    pub encode_us: f64,
    /// Microseconds in which the GPU waits for the next step.
    pub gap_us: f64,
    /// Each kernel's dispatches and their time when they run without the others, the dearest first.
    pub kernels: Vec<KernelTime>,
}

/// The dispatches of one kernel in a step.
#[derive(Clone, Debug, Serialize)]
pub struct KernelTime {
    /// The kernel.
    pub kernel: String,
    /// `layers`, `head`, ...
    pub part: String,
    /// How many.
    pub dispatches: usize,
    /// Microseconds of all of them.
    pub us: f64,
}

/// Measures an engine whose context holds [`Work::context`] tokens.
///
/// # Errors
/// As [`Engine::feed`].
pub async fn measure(engine: &mut Engine, clock: &Clock, work: &Work, ceilings: &Ceilings) -> Result<Vec<Depth>> {
    let mut depths = Vec::new();
    for depth in &work.depths {
        depths.push(at_depth(engine, clock, work, *depth, ceilings).await?);
    }
    Ok(depths)
}

/// Ids that a model may find anywhere; the same each time.
fn ids(vocab: u32, count: u32) -> Vec<u32> {
    let mut random = fastrand::Rng::with_seed(u64::from(count));
    (0..count).map(|_| random.u32(..vocab)).collect()
}

async fn at_depth(engine: &mut Engine, clock: &Clock, work: &Work, depth: u32, ceilings: &Ceilings) -> Result<Depth> {
    let read_gbs = ceilings.read_gbs;
    let vocab = engine.model().config.vocab;
    let id = engine.create(&Sampler::default())?;
    if depth > 0 {
        let reading = engine.feed(id, &ids(vocab, depth), 0).await?;
        engine.records(reading).await?;
    }
    let (mut prefill, mut decode) = (Vec::new(), Vec::new());
    // The first turn compiles pipelines and warms the clock up.
    for turn in 0..=work.repeat {
        let prompt = prompt(engine, id, &ids(vocab, work.prompt)).await?;
        engine.truncate(id, depth as usize);
        let text = text(engine, id, work.text).await?;
        engine.truncate(id, depth as usize);
        if turn > 0 {
            prefill.push(prompt);
            decode.push(text);
        }
    }
    let (prompt, text) = (median(prefill).as_secs_f64(), median(decode).as_secs_f64());
    let traffic = traffic::of(engine.model());
    let cache = engine.cache_bytes(depth + work.text / 2);
    let bytes = traffic.layers + traffic.head + cache;
    let per_token = text / f64::from(work.text);
    let token = token(engine, clock, id, (traffic.layers + cache, per_token, read_gbs)).await?;
    let tokens = work.prompt.min(engine.step_tokens());
    let step = engine.rehearse(id, Some(&ids(vocab, tokens)))?;
    let device = engine.device();
    let gpu_us = time(device, clock, std::slice::from_ref(&step)).await?[0];
    let attention_flops = traffic::of_prompt(engine.model(), depth, tokens).attention;
    let prompt_step = Prompt { tokens, gpu_us, attention_flops, kernels: kernels(device, clock, &step).await? };
    let flops = traffic::of_prompt(engine.model(), depth, work.prompt);
    let prefill_tflops = (flops.products + flops.attention) / prompt / 1e12;
    engine.free(id);
    Ok(Depth {
        depth,
        prefill_tokens_per_s: f64::from(work.prompt) / prompt,
        prefill_tflops,
        prefill_share: prefill_tflops / ceilings.tflops(),
        decode_tokens_per_s: 1.0 / per_token,
        bytes_per_token: bytes,
        bandwidth_share: bytes as f64 / (read_gbs * 1e9) / per_token,
        token,
        prompt: prompt_step,
    })
}

/// A prompt and the first token behind it.
async fn prompt(engine: &mut Engine, id: SequenceId, ids: &[u32]) -> Result<Duration> {
    let started = Instant::now();
    let reading = engine.feed(id, ids, 0).await?;
    engine.records(reading).await?;
    Ok(started.elapsed())
}

/// The time of `count` tokens behind a first one.
async fn text(engine: &mut Engine, id: SequenceId, count: u32) -> Result<Duration> {
    let request = Request { max_tokens: count as usize + 1, ..Request::default() };
    let mut stream = std::pin::pin!(engine.generate(id, &[1], request));
    let (mut first, mut last) = (None, Duration::ZERO);
    let started = Instant::now();
    while let Some(record) = stream.next().await {
        record?;
        last = started.elapsed();
        first.get_or_insert(last);
    }
    Ok(last - first.unwrap_or(last))
}

/// The part of a step that a stage belongs to.
fn part(stage: &str) -> &str {
    stage.split('.').next().unwrap_or(stage)
}

async fn token(
    engine: &mut Engine,
    clock: &Clock,
    id: SequenceId,
    (layers_bytes, wall, read_gbs): (u64, f64, f64),
) -> Result<Token> {
    let (device, layers) = (engine.device().clone(), engine.model().config.layers.len());
    let step = engine.rehearse(id, None)?;
    let whole = time(&device, clock, std::slice::from_ref(&step)).await?;
    let end = step.calls().iter().rposition(|call| part(&call.stage) == "layers").map_or(0, |at| at + 1);
    let layers_us = time(&device, clock, &[step.split_at(end).0]).await?[0];
    let mut encode = Vec::new();
    for _ in 0..20 {
        let started = Instant::now();
        device.submit(&step)?;
        encode.push(started.elapsed());
        device.finished().await?;
    }
    let encode = median(encode);
    let in_layers = step.calls().iter().filter(|call| part(&call.stage) == "layers").count();
    Ok(Token {
        dispatches: step.calls().len(),
        dispatches_per_layer: in_layers as f64 / layers as f64,
        wall_us: wall * 1e6,
        gpu_us: whole[0],
        layers_us,
        layers_bandwidth_share: layers_bytes as f64 / (read_gbs * 1e3) / layers_us,
        encode_us: encode.as_secs_f64() * 1e6,
        gap_us: wall * 1e6 - whole[0],
        kernels: kernels(&device, clock, &step).await?,
    })
}

/// The time of each kernel's dispatches in a step, when they run without the others.
async fn kernels(device: &Device, clock: &Clock, step: &Recording) -> Result<Vec<KernelTime>> {
    let mut groups: Vec<(KernelTime, Recording)> = Vec::new();
    for call in step.calls() {
        let (kernel, part) = (call.shader.kernel, part(&call.stage));
        let known = groups.iter().position(|(row, _)| row.kernel == kernel && row.part == part);
        let at = known.unwrap_or_else(|| {
            let row = KernelTime { kernel: kernel.into(), part: part.into(), dispatches: 0, us: 0.0 };
            groups.push((row, Recording::new()));
            groups.len() - 1
        });
        groups[at].0.dispatches += 1;
        groups[at].1.append(&Recording::from(call.clone()));
    }
    let (mut kernels, recordings): (Vec<KernelTime>, Vec<Recording>) = groups.into_iter().unzip();
    let alone = time(device, clock, &recordings).await?;
    kernels.iter_mut().zip(alone).for_each(|(row, us)| row.us = us);
    kernels.sort_by(|a, b| b.us.total_cmp(&a.us));
    Ok(kernels)
}

/// The median time of each recording, microseconds; each runs behind the others.
async fn time(device: &Device, clock: &Clock, recordings: &[Recording]) -> Result<Vec<f64>> {
    let mut medians = Vec::new();
    for recording in recordings {
        let times = clock.time(device, std::slice::from_ref(recording), 10).await?;
        medians.push(median(times).as_secs_f64() * 1e6);
    }
    Ok(medians)
}
