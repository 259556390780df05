//! The forward pass: what a step records, from token ids to logits. It submits nothing, holds no device
//! and keeps nothing of a sequence: facts of sequences come in buffers, the cache is the engine's.

use std::ops::Range;

use super::attention::Attention;
use super::config::{Config, Mlp};
use super::load::{MlpWeights, Model};
use super::mlp::{MlpKernels, Target};
use crate::Result;
use crate::gpu::{Device, Recording, View};
use crate::kernels::add::{self, Add};
use crate::kernels::embed::{self, Embed};
use crate::kernels::linear::{Activations, Epilogue, Linear, Norm, Product};
use crate::kernels::mla_decode_coop::Decoder;
use crate::kernels::pieces::{Piece, Pieces};
use crate::kernels::plan::Plan;
use crate::kernels::rms_norm::{self, RmsNorm};
use crate::kernels::weights::{WeightFormat, Weights};
use crate::kernels::{CacheChunk, Kernel, Sequence};
use crate::num::record::RecordFormat;

/// How attention over the latent cache runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Decode {
    /// As the tuning says: see [`CHOICE`](crate::kernels::mla_decode_fused::CHOICE).
    #[default]
    Auto,
    /// `mla_absorb`, then `mla_decode`.
    Separate,
    /// `mla_decode_fused`: absorbed queries are never written to device memory.
    Fused,
}

/// How attention of a prompt's tokens runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Prefill {
    /// Whichever takes less time for the step, as [`crate::kernels::pieces::Crossover`] estimates.
    #[default]
    Auto,
    /// Over the latents, as in decoding.
    Absorbed,
    /// Over expanded keys and values.
    Materialised,
}

/// What steps there are to be, at most.
#[derive(Clone, Debug)]
pub struct Limits {
    /// New tokens of a step.
    pub tokens: u32,
    /// Sequences of a step.
    pub sequences: u32,
    /// New tokens of a sequence in a step that the kernels are tuned for.
    pub usual_tokens: u32,
    /// Rows of logits of a step.
    pub logits: u32,
    /// Rows of the plan's partials, in tokens.
    pub partials: u32,
    /// Tokens of a context.
    pub context: u32,
    /// Tokens of a cache page.
    pub page: u32,
    /// How the cache stores records.
    pub format: RecordFormat,
    /// How attention runs.
    pub decode: Decode,
    /// How attention of prompts runs.
    pub prefill: Prefill,
    /// Keys that are expanded at a time, where it is fewer than memory is set aside for.
    pub piece: Option<u32>,
}

/// The facts of one step, in device memory and on the host.
pub struct Step<'a> {
    /// `[sequences]` `Sequence`.
    pub batch: View,
    /// `[tokens]` `Row`.
    pub rows: View,
    /// `[tokens]` u32, the new tokens' ids.
    pub ids: View,
    /// Page numbers, u32.
    pub block_table: View,
    /// The plan's splits.
    pub splits: View,
    /// `[logits]` u32, the rows of the step that get logits, each once and in order.
    pub picked: View,
    /// The pieces' spans.
    pub spans: View,
    /// The splits of the contexts.
    pub plan: &'a Plan,
    /// The pieces of the contexts where attention is materialised; none where it is absorbed.
    pub pieces: &'a [Piece],
    /// New tokens.
    pub tokens: u32,
    /// The most new tokens of a sequence.
    pub most_tokens: u32,
    /// Rows that get logits.
    pub logits: u32,
    /// The latent cache of each attention.
    pub cache: &'a [&'a [CacheChunk]],
}

/// Rows that products read, and a norm that they go through first: see [`Linear::folds_norm`].
pub(super) struct Input<'a> {
    pub rows: &'a Activations,
    pub norm: Option<Norm>,
}

impl Input<'_> {
    /// `y = W x` of them.
    pub fn product<'a>(&'a self, weights: &'a Weights, y: &'a Activations, tokens: u32) -> Product<'a> {
        Product { norm: self.norm.as_ref(), ..Product::new(weights, self.rows, y, tokens) }
    }
}

/// The kernels and the memory between them, for one model on one device.
pub struct Forward {
    embed: Embed,
    pick: Embed,
    norm: RmsNorm,
    add: Add,
    linear: Linear,
    attention: Attention,
    mlp: MlpKernels,
    hidden: Activations,
    normed: Activations,
    /// What a shortcut gives, until the end of its layer.
    shortcut: Option<Activations>,
    picked: Activations,
    /// `[logits, vocab]` f32, rows rounded up to 4.
    pub logits: Activations,
}

/// Memory for `rows` rows of `length` f32.
pub(super) fn rows(device: &Device, rows: u32, length: u32, label: &str) -> Result<Activations> {
    let size = 4 * u64::from(rows) * u64::from(length.next_multiple_of(4));
    Ok(Activations::rows(device.alloc_bound(size, label)?.view(), length))
}

impl Forward {
    /// Makes the kernels and allocates what stands between them.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`].
    pub fn new(device: &Device, model: &Model, limits: &Limits) -> Result<Forward> {
        let (config, caps) = (&model.config, device.caps());
        let hidden = |label| rows(device, limits.tokens, config.hidden, label);
        let shortcut = config.layers.iter().any(|layer| layer.shortcut.is_some());
        let linear = Linear::on(device, limits.tokens, config.most_columns())?;
        Ok(Forward {
            embed: Embed::chosen(&embed::Spec { format: model.embedding.format }, caps),
            pick: Embed::chosen(&embed::Spec { format: WeightFormat::F32 }, caps),
            norm: RmsNorm::chosen(&rms_norm::Spec, caps),
            add: Add::chosen(&add::Spec, caps),
            attention: Attention::new(device, model, limits, &linear)?,
            linear,
            mlp: MlpKernels::new(device, model, limits)?,
            hidden: hidden("hidden states")?,
            normed: hidden("normalised hidden states")?,
            shortcut: shortcut.then(|| hidden("what a shortcut adds")).transpose()?,
            picked: rows(device, limits.logits, config.hidden, "rows for the head")?,
            logits: rows(device, limits.logits, config.vocab, "logits")?,
        })
    }

    /// What decodes, for the plan of a step.
    pub fn decoder(&self) -> &Decoder {
        self.attention.decoder()
    }

    /// Spans of a step, at most.
    pub fn most_spans(&self, limits: &Limits) -> u32 {
        self.attention.materialised.as_ref().map_or(0, |materialised| materialised.most_spans(limits))
    }

    /// The pieces of a prompt's step, where its attention is to be materialised.
    pub fn pieces(&self, batch: &[Sequence]) -> Option<Pieces> {
        self.attention.materialised.as_ref().and_then(|materialised| materialised.pieces(batch))
    }

    /// The hidden states, `[tokens, hidden]`, as the last recorded layers leave them.
    pub fn hidden(&self) -> &Activations {
        &self.hidden
    }

    /// Records the final norm of all hidden states, and says where it leaves them: `[tokens, hidden]`.
    pub fn final_norm(&self, recording: &mut Recording, model: &Model, tokens: u32) -> &Activations {
        self.normalise(recording, &model.config, tokens, &self.hidden, &model.norm);
        &self.normed
    }

    /// Records a whole step: embeddings, all layers, and the logits of the picked rows.
    pub fn record(&self, recording: &mut Recording, model: &Model, step: &Step) {
        recording.stage("embed");
        self.embed(recording, model, step);
        self.layers(recording, model, step, 0..model.layers.len());
        recording.stage("head");
        self.head(recording, model, step);
    }

    /// Embeddings of the step's ids into the hidden states.
    pub fn embed(&self, recording: &mut Recording, model: &Model, step: &Step) {
        let Weights { stride, chunks, .. } = &model.embedding;
        let sizes = embed::Sizes {
            tokens: step.tokens,
            length: model.config.hidden,
            table_stride: *stride as u32,
            y_stride: self.hidden.stride,
            scale: model.config.embedding_scale,
        };
        let table: Vec<(u32, View)> = chunks.iter().map(|chunk| (chunk.rows as u32, chunk.view.clone())).collect();
        self.embed.record(recording, sizes, step.ids.clone(), &table, self.hidden.view.clone());
    }

    /// Some layers: hidden states in, hidden states out.
    pub fn layers(&self, recording: &mut Recording, model: &Model, step: &Step, range: Range<usize>) {
        let config = &model.config;
        let scale = config.residual_scale;
        let mut attention: usize = config.layers[..range.start].iter().map(|layer| layer.mlps.len()).sum();
        for index in range {
            let (layer, weights) = (&config.layers[index], &model.layers[index]);
            for (block, (mlp, weights)) in layer.mlps.iter().zip(&weights.blocks).enumerate() {
                let part = if layer.mlps.len() > 1 { format!(".{block}") } else { String::new() };
                recording.stage(&format!("layers.{index}{part}.attention"));
                let x = self.input(recording, config, step.tokens, &weights.attention_norm, true);
                let (kernels, cache) = (&self.attention, step.cache[attention]);
                kernels.record(recording, &self.linear, &weights.attention, step, cache, &x, (&self.hidden, scale));
                attention += 1;

                recording.stage(&format!("layers.{index}{part}.mlp"));
                let shortcut = layer.shortcut.as_ref().zip(model.layers[index].shortcut.as_ref());
                let shortcut = shortcut.zip(self.shortcut.as_ref()).filter(|_| block == 0);
                let folds = match (mlp, &weights.mlp) {
                    (Mlp::Moe(moe), MlpWeights::Moe(weights)) => MlpKernels::folds_norm(moe, weights),
                    _ => true,
                };
                let folds = folds && shortcut.is_none_or(|((moe, weights), _)| MlpKernels::folds_norm(moe, weights));
                let x = self.input(recording, config, step.tokens, &weights.mlp_norm, folds);
                if let Some((shortcut, y)) = shortcut {
                    self.mlp.moe(recording, &self.linear, shortcut, (&x, Target::Write(y)), step.tokens);
                }
                let io = (&x, Target::Add(&self.hidden, scale));
                match (mlp, &weights.mlp) {
                    (Mlp::Dense { width }, MlpWeights::Dense(weights)) => {
                        self.mlp.dense(recording, &self.linear, (*width, weights), io, step.tokens);
                    }
                    (Mlp::Moe(moe), MlpWeights::Moe(weights)) => {
                        self.mlp.moe(recording, &self.linear, (moe, weights), io, step.tokens);
                    }
                    _ => unreachable!("weights are loaded as the configuration says"),
                }
            }
            if let (Some(_), Some(shortcut)) = (&layer.shortcut, &self.shortcut) {
                self.add(recording, step.tokens, shortcut, 1.0);
            }
        }
    }

    /// Logits of the picked rows.
    pub fn head(&self, recording: &mut Recording, model: &Model, step: &Step) {
        let config = &model.config;
        // As many rows as there are tokens are all of them, in order.
        let picked = if step.logits == step.tokens {
            &self.hidden
        } else {
            let sizes = embed::Sizes {
                tokens: step.logits,
                length: config.hidden,
                table_stride: self.hidden.stride,
                y_stride: self.picked.stride,
                scale: 1.0,
            };
            let table = [(step.tokens, self.hidden.view.clone())];
            self.pick.record(recording, sizes, step.picked.clone(), &table, self.picked.view.clone());
            &self.picked
        };
        let norm = Norm { weight: model.head_norm.clone(), eps: config.eps };
        let x = if self.linear.folds_norm(step.logits) {
            Input { rows: picked, norm: Some(norm) }
        } else {
            self.normalise(recording, config, step.logits, picked, &model.head_norm);
            Input { rows: &self.normed, norm: None }
        };
        self.linear.record(recording, Epilogue::Store, &x.product(&model.head, &self.logits, step.logits));
    }

    /// What a block reads: the hidden states with a norm that its products fold in, where they do and
    /// `folds` lets them, else normalised.
    fn input(&self, recording: &mut Recording, config: &Config, tokens: u32, weight: &View, folds: bool) -> Input<'_> {
        if folds && self.linear.folds_norm(tokens) {
            return Input { rows: &self.hidden, norm: Some(Norm { weight: weight.clone(), eps: config.eps }) };
        }
        self.normalise(recording, config, tokens, &self.hidden, weight);
        Input { rows: &self.normed, norm: None }
    }

    /// `normed = norm(x)`.
    fn normalise(&self, recording: &mut Recording, config: &Config, rows: u32, x: &Activations, weight: &View) {
        let params = rms_norm::Params {
            rows,
            length: config.hidden,
            x_stride: x.stride,
            x_offset: 0,
            y_stride: self.normed.stride,
            y_offset: 0,
            eps: config.eps,
        };
        self.norm.record(recording, params, x.view.clone(), weight.clone(), self.normed.view.clone());
    }

    /// `hidden += scale * y`. Rows are padded to 4, which may hold anything: so may the sum's padding.
    fn add(&self, recording: &mut Recording, tokens: u32, y: &Activations, scale: f32) {
        let params = add::Params { length: tokens * self.hidden.stride, scale };
        self.add.record(recording, params, self.hidden.view.clone(), y.view.clone());
    }
}
