//! A model in a browser: how much memory it takes, loading it, and its text piece by piece.

use std::path::Path;

use futures::StreamExt;
use js_sys::Function;
use serde::{Deserialize, Serialize};
use wasm_bindgen::prelude::*;
use web_time::Instant;

use super::{Thrown, WebDevice, call, json, parse, thrown};
use crate::engine::{Engine, Finish, Options, Request, SequenceId};
use crate::gpu;
use crate::kernels::sample::Sampler;
use crate::model::generation::Generation;
use crate::model::plan::{self, Kind, Plan, Widths};
use crate::model::tensors::{ExpertLayout, Tensors};
use crate::model::{Config, Model};
use crate::num::record::RecordFormat;
use crate::text::{ChatOptions, Message, Text};
use crate::weights::Checkpoint;
use crate::{Error, Result, disk};

/// The context where nobody says how long it is to be, unless the model's own is shorter.
const CONTEXT: u32 = 4096;

/// How a model is loaded.
#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Loading {
    /// Tokens of the context.
    context: Option<u32>,
    /// `f16`, `f32` or `fp8`.
    cache: Option<String>,
    /// Bytes that there are; what takes more is refused.
    memory: Option<u64>,
}

impl Loading {
    fn format(&self) -> Result<RecordFormat> {
        match self.cache.as_deref() {
            None | Some("f16") => Ok(RecordFormat::F16),
            Some("f32") => Ok(RecordFormat::F32),
            Some("fp8") => Ok(RecordFormat::Fp8),
            Some(other) => {
                let (expected, found) = ("f16, f32 or fp8".into(), format!("'{other}'"));
                Err(Error::Usage { what: "cache".into(), expected, found })
            }
        }
    }

    fn context(&self, config: &Config) -> Result<u32> {
        let context = self.context.unwrap_or(CONTEXT.min(config.max_context));
        if context <= config.max_context {
            return Ok(context);
        }
        let (expected, found) = (format!("at most the model's {}", config.max_context), context.to_string());
        Err(Error::Usage { what: "context".into(), expected, found })
    }

    /// What a model will take; `tensors` are those of its checkpoint where that is at hand.
    fn plan(&self, config: &Config, tensors: &Tensors, checkpoint: Option<&Checkpoint>) -> Result<Plan> {
        let token = Widths::of(config, 1, self.format()?).token_bytes(Kind::Mla);
        Ok(Plan {
            weights: plan::weight_bytes(tensors, checkpoint),
            // A browser does not say what kind of device it has: as lamina's defaults are.
            scratch: plan::scratch_bytes(
                config,
                Some(&gpu::Caps::portable()),
                token,
                (self.context(config)?.into(), 1),
            ),
            token,
            context: self.context(config)?.into(),
            batch: 1,
            memory: self.memory,
        })
    }
}

/// Bytes that a token leaves in the cache, beside what other attentions would.
#[derive(Clone, Copy, Serialize)]
struct TokenBytes {
    mla: u64,
    gqa: u64,
    mha: u64,
    /// Key and value heads of the GQA beside it.
    groups: u64,
}

impl TokenBytes {
    fn of(config: &Config, format: RecordFormat) -> TokenBytes {
        let heads = config.mla.heads;
        let groups = (1..=8.min(heads.div_ceil(2))).rev().find(|groups| heads.is_multiple_of(*groups)).unwrap_or(1);
        let widths = Widths::of(config, groups.into(), format);
        let [mla, gqa, mha] = [Kind::Mla, Kind::Gqa, Kind::Mha].map(|kind| widths.token_bytes(kind));
        TokenBytes { mla, gqa, mha, groups: groups.into() }
    }
}

#[derive(Serialize)]
struct Estimate {
    architecture: &'static str,
    parameters: u64,
    layers: usize,
    longest_context: u32,
    context: u64,
    weights: u64,
    cache: u64,
    scratch: u64,
    total: u64,
    token_bytes: TokenBytes,
}

/// The memory that the checkpoint in a folder takes, as JSON: from `config.json` alone, or to the byte where the
/// headers of its weights can be read too.
#[wasm_bindgen]
pub fn estimate(folder: &str, loading: &str) -> Thrown<String> {
    let loading: Loading = parse("options of a model", loading)?;
    estimated(folder.as_ref(), &loading).map(|estimate| json(&estimate)).map_err(thrown)
}

fn estimated(folder: &Path, loading: &Loading) -> Result<Estimate> {
    let config = Config::open(folder)?;
    let weights = ["model.safetensors", "model.safetensors.index.json"];
    let plan = match weights.iter().any(|name| disk::is_file(&folder.join(name))) {
        true => {
            let checkpoint = Checkpoint::open(folder)?;
            loading.plan(&config, &Tensors::find(&config, &checkpoint)?.0, Some(&checkpoint))?
        }
        false => loading.plan(&config, &Tensors::of(&config, ExpertLayout::Each), None)?,
    };
    plan.check("the memory that was given")?;
    Ok(Estimate {
        architecture: config.family.labels[0],
        parameters: config.parameters(),
        layers: config.layers.len(),
        longest_context: config.max_context,
        context: plan.context,
        weights: plan.weights,
        cache: plan.cache(),
        scratch: plan.scratch,
        total: plan.total(),
        token_bytes: TokenBytes::of(&config, loading.format()?),
    })
}

/// A request as JavaScript makes it.
#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Asked {
    /// A text to continue ...
    prompt: Option<String>,
    /// ... or a conversation to answer ...
    messages: Option<Vec<Said>>,
    /// ... or ids.
    tokens: Option<Vec<u32>>,
    max_tokens: Option<usize>,
    temperature: Option<f32>,
    top_k: Option<u32>,
    top_p: Option<f32>,
    min_p: Option<f32>,
    repetition_penalty: Option<f32>,
    seed: u32,
    stop: Vec<String>,
    ignore_eos: bool,
}

#[derive(Deserialize)]
struct Said {
    role: String,
    content: String,
}

#[derive(Serialize)]
struct Answer {
    text: String,
    tokens: Vec<u32>,
    finish_reason: Finish,
    prompt_tokens: usize,
    /// Tokens of the prompt that the cache held already.
    cached_tokens: usize,
    time_to_first_token_s: f64,
    decode_s: f64,
    decode_tokens_per_s: f64,
    /// Tokens that the cache holds.
    context_tokens: usize,
}

#[derive(Serialize)]
struct Info {
    architecture: &'static str,
    /// Whether it has a chat template.
    chat: bool,
    context: u32,
    layers: usize,
    vocabulary: u32,
    parameters: u64,
    /// Bytes of the weights on the device.
    weights: u64,
    /// All bytes that were allocated for it.
    allocated: u64,
    token_bytes: TokenBytes,
    load_s: f64,
    recommended: Recommended,
}

#[derive(Serialize)]
struct Recommended {
    temperature: f32,
    top_k: u32,
    top_p: f32,
    min_p: f32,
    repetition_penalty: f32,
}

impl From<Sampler> for Recommended {
    fn from(sampler: Sampler) -> Recommended {
        let Sampler { temperature, top_k, top_p, min_p, repetition_penalty, .. } = sampler;
        Recommended { temperature, top_k, top_p, min_p, repetition_penalty }
    }
}

/// A model on a device, with one conversation in its cache.
#[wasm_bindgen]
pub struct WebModel {
    engine: Engine,
    text: Option<Text>,
    generation: Generation,
    /// The conversation's sequence, with the sampler it was made with.
    sequence: Option<(SequenceId, Sampler)>,
    /// The ids that the cache holds.
    held: Vec<u32>,
    allocated: u64,
    load_s: f64,
}

#[wasm_bindgen]
impl WebModel {
    /// Loads the checkpoint in a folder of [`super::put_file`]; `progress` hears the bytes that are done and all.
    pub async fn load(device: &WebDevice, folder: &str, loading: &str, progress: Function) -> Thrown<WebModel> {
        let loading: Loading = parse("options of a model", loading)?;
        let heard = move |done: u64, total: u64| {
            // Progress that cannot be shown is not worth stopping for.
            let _ = progress.call2(&JsValue::NULL, &(done as f64).into(), &(total as f64).into());
        };
        load(device, folder.as_ref(), &loading, heard).await.map_err(thrown)
    }

    /// What it is.
    pub fn info(&self) -> String {
        let config = &self.engine.model().config;
        json(&Info {
            architecture: config.family.labels[0],
            chat: self.text.as_ref().is_some_and(|text| text.template().is_some()),
            context: self.engine.options().context,
            layers: config.layers.len(),
            vocabulary: config.vocab,
            parameters: config.parameters(),
            weights: self.engine.model().bytes,
            allocated: self.allocated,
            token_bytes: TokenBytes::of(config, self.engine.options().format),
            load_s: self.load_s,
            recommended: self.sampler(&Asked::default()).into(),
        })
    }

    /// The ids of what is asked for.
    pub fn encode(&self, asked: &str) -> Thrown<Vec<u32>> {
        self.ids(&parse("options of an answer", asked)?).map_err(thrown)
    }

    /// Continues a text or answers a conversation. `each` hears each piece of text, its last token, how many
    /// tokens there are, and how many the cache holds; it ends the answer with true. Gives all of it.
    pub async fn generate(&mut self, asked: &str, each: Function) -> Thrown<String> {
        let asked: Asked = parse("options of an answer", asked)?;
        let ids = self.ids(&asked).map_err(thrown)?;
        let answer = self.answer(&asked, ids, &each).await;
        if answer.is_err() {
            // Nobody knows how far the step came.
            self.forget();
        }
        answer.map(|answer| json(&answer))
    }

    /// Forgets the conversation.
    pub fn forget(&mut self) {
        if let Some((id, _)) = self.sequence.take() {
            self.engine.free(id);
        }
        self.held.clear();
    }
}

async fn load(
    device: &WebDevice,
    folder: &Path,
    loading: &Loading,
    progress: impl FnMut(u64, u64),
) -> Result<WebModel> {
    let started = Instant::now();
    let device = &device.0;
    let config = Config::open(folder)?;
    let text = match disk::is_file(&folder.join("tokenizer.json")) {
        true => Some(Text::load(folder)?),
        false => None,
    };
    if let Some(text) = &text {
        text.check(config.vocab)?;
    }
    let generation = Generation::open(folder, &config, text.as_ref().and_then(Text::end))?;
    let checkpoint = Checkpoint::open(folder)?;
    let tensors = Tensors::find(&config, &checkpoint)?;
    loading.plan(&config, &tensors.0, Some(&checkpoint))?.check("the memory that was given")?;
    let options = Options { context: loading.context(&config)?, format: loading.format()?, ..Options::default() };
    plan::check_bindings(&config, options.format, device.caps())?;
    let before = gpu::allocated();
    let model = Model::load_found(device, config, &checkpoint, tensors, progress)?;
    drop(checkpoint);
    let engine = Engine::new(device, model, &options)?;
    let allocated = gpu::allocated() - before;
    device.settle().await?;
    let load_s = started.elapsed().as_secs_f64();
    let mut model = WebModel { engine, text, generation, sequence: None, held: Vec::new(), allocated, load_s };
    model.rehearse().await?;
    model.load_s = started.elapsed().as_secs_f64();
    Ok(model)
}

impl WebModel {
    /// Two tokens behind one: compiles what a text needs, and tells a fault now.
    async fn rehearse(&mut self) -> Result<()> {
        let id = self.engine.create(&Sampler::default())?;
        let request = Request { max_tokens: 2, ..Request::default() };
        let outcome = {
            let mut stream = std::pin::pin!(self.engine.generate(id, &[0], request));
            let mut outcome = Ok(());
            while let Some(record) = stream.next().await {
                outcome = outcome.and(record.map(drop));
            }
            outcome
        };
        self.engine.free(id);
        outcome
    }

    /// What is asked for, else what the model's makers recommend.
    fn sampler(&self, asked: &Asked) -> Sampler {
        let model = &self.generation;
        let recommended = if model.sample == Some(true) { model.temperature.unwrap_or(1.0) } else { 0.0 };
        Sampler {
            temperature: asked.temperature.unwrap_or(recommended),
            top_k: asked.top_k.or(model.top_k).unwrap_or(0),
            top_p: asked.top_p.or(model.top_p).unwrap_or(1.0),
            min_p: asked.min_p.or(model.min_p).unwrap_or(0.0),
            repetition_penalty: asked.repetition_penalty.or(model.repetition_penalty).unwrap_or(1.0),
            ..Sampler::default()
        }
    }

    fn ids(&self, asked: &Asked) -> Result<Vec<u32>> {
        let usage = |expected: &str, found: &str| Error::Usage {
            what: "what is to be continued".into(),
            expected: expected.into(),
            found: found.into(),
        };
        if let Some(tokens) = &asked.tokens {
            return Ok(tokens.clone());
        }
        let text =
            self.text.as_ref().ok_or_else(|| usage("token ids", "a text, and the model has no tokenizer.json"))?;
        let ids = match (&asked.prompt, &asked.messages) {
            (Some(prompt), None) => text.encode(prompt)?,
            (None, Some(messages)) => {
                let message = |said: &Said| Message::new(said.role.as_str(), said.content.as_str());
                let messages: Vec<Message> = messages.iter().map(message).collect();
                text.chat(&messages, &ChatOptions::default())?
            }
            _ => return Err(usage("a prompt, or messages", "neither or both")),
        };
        let context = self.engine.options().context as usize;
        match ids.len() {
            0 => Err(usage("at least one token", "none")),
            count if count >= context => Err(Error::Capacity {
                what: "tokens of the conversation".into(),
                asked: count as u64,
                limit: context as u64,
            }),
            _ => Ok(ids),
        }
    }

    async fn answer(&mut self, asked: &Asked, ids: Vec<u32>, each: &Function) -> Thrown<Answer> {
        let sampler = self.sampler(asked);
        if self.sequence.is_some_and(|(_, made_with)| made_with != sampler) {
            self.forget();
        }
        let id = match self.sequence {
            Some((id, _)) => id,
            None => self.engine.create(&sampler).map_err(thrown)?,
        };
        self.sequence = Some((id, sampler));
        // At least one token is fed, whose logits give the next.
        let same = self.held.iter().zip(&ids).take_while(|(a, b)| a == b).count().min(ids.len() - 1);
        self.engine.truncate(id, same);
        self.engine.see(id, &ids).map_err(thrown)?;
        let mut text = self.text.as_ref().map(|t| t.stream(&ids, &asked.stop)).transpose().map_err(thrown)?;
        let end = if asked.ignore_eos { Vec::new() } else { self.generation.eos.clone() };
        let max_tokens = asked.max_tokens.unwrap_or(256);
        let request = Request { seed: asked.seed, max_tokens, end: end.clone() };
        let (mut shown, mut tokens, mut finish_reason) = (String::new(), Vec::new(), Finish::Most);
        let started = Instant::now();
        let (mut first, mut last) = (0.0, 0.0);
        {
            let mut stream = std::pin::pin!(self.engine.generate(id, &ids[same..], request));
            while let Some(record) = stream.next().await {
                let record = record.map_err(thrown)?;
                last = started.elapsed().as_secs_f64();
                if tokens.is_empty() {
                    first = last;
                }
                tokens.push(record.token);
                let ended = end.contains(&record.token);
                let mut piece = String::new();
                if let Some(text) = text.as_mut().filter(|_| !ended) {
                    piece = text.push(record.token).map_err(thrown)?;
                    shown.push_str(&piece);
                }
                let context = ids.len() + tokens.len() - 1;
                let heard = [piece.into(), record.token.into(), tokens.len().into(), context.into()];
                let aborted = call(each, &heard).await?;
                if ended || text.as_ref().is_some_and(|text| text.stopped()) {
                    finish_reason = Finish::Stop;
                    break;
                }
                if aborted {
                    finish_reason = Finish::Abort;
                    break;
                }
            }
        }
        if let Some(text) = &mut text {
            let rest = text.finish().map_err(thrown)?;
            if !rest.is_empty() {
                let context = ids.len() + tokens.len().max(1) - 1;
                let last = tokens.last().copied().unwrap_or_default();
                call(each, &[rest.as_str().into(), last.into(), tokens.len().into(), context.into()]).await?;
            }
            shown.push_str(&rest);
        }
        // The step behind the last token that was taken may have run: the cache is cut back to what was taken.
        let (prompt_tokens, context_tokens) = (ids.len(), ids.len() + tokens.len().max(1) - 1);
        self.engine.truncate(id, context_tokens.min(self.engine.tokens(id)));
        self.held = ids;
        self.held.extend(&tokens);
        self.held.truncate(self.engine.tokens(id));
        let decode_s = last - first;
        Ok(Answer {
            text: shown,
            finish_reason,
            prompt_tokens,
            cached_tokens: same,
            time_to_first_token_s: first,
            decode_s,
            decode_tokens_per_s: if decode_s > 0.0 { (tokens.len() - 1) as f64 / decode_s } else { 0.0 },
            context_tokens,
            tokens,
        })
    }
}
