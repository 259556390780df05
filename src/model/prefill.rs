//! Materialised attention of a step with many new tokens: piece by piece of the contexts the latents are
//! gathered from the cache and expanded to keys and values, which the queries attend to; pieces are merged by
//! log-sum-exp (DeepSeek-V2, arXiv:2405.04434, section 2.1).

use std::sync::Arc;

use super::config::{Growth, Mla};
use super::forward::{Limits, Prefill, Step, rows};
use super::load::AttentionWeights;
use crate::Result;
use crate::gpu::{Device, Recording, View};
use crate::kernels::linear::{Activations, Epilogue, Linear, Product};
use crate::kernels::mla_gather::{self, MlaGather};
use crate::kernels::mla_prefill;
use crate::kernels::mla_prefill_coop::Attention;
use crate::kernels::pieces::{self, Crossover, Pieces, Widths};
use crate::kernels::rope::{self, Rope};
use crate::kernels::{CacheChunk, Kernel, Sequence, Span};
use crate::num::rope::Frequencies;

/// The kernels, and the memory for one piece.
pub(super) struct Materialised {
    mla: Mla,
    always: bool,
    crossover: Crossover,
    rope: Rope,
    frequencies: Arc<Frequencies>,
    rope_table: View,
    gather: MlaGather,
    attend: Attention,
    /// The most keys of a piece.
    keys: u32,
    /// `[keys, latent]`
    latents: Activations,
    /// `[keys, rope]`, rows rounded up to 4.
    k_pe: Activations,
    /// `[keys, heads * (nope + value)]`, f16 where attention is on matrix units.
    kv: Activations,
}

/// f32 of the expanded key and value of a token.
fn expanded(mla: &Mla) -> u32 {
    mla.heads * (mla.nope + mla.value)
}

/// Bytes of the memory for one piece of so many tokens of context, at most.
pub(super) fn piece_bytes(mla: &Mla, tokens: u64) -> u64 {
    let key = 4 * u64::from(expanded(mla));
    let keys = u64::from(pieces::most_keys(key, u64::MAX)).min(tokens);
    keys * (key + 4 * u64::from(mla.latent + mla.rope.next_multiple_of(4)))
}

impl Materialised {
    /// For steps within the limits; `None` where prompts are absorbed. `matrices` says that absorbed attention runs on
    /// matrix units, `halves` that products of so many latents with the model's `kv_b` may be f16.
    pub fn new(
        device: &Device,
        mla: &Mla,
        (limits, matrices, halves): (&Limits, bool, &dyn Fn(u32) -> bool),
        frequencies: Frequencies,
        rope_table: View,
    ) -> Result<Option<Materialised>> {
        if limits.prefill == Prefill::Absorbed {
            return Ok(None);
        }
        let caps = device.caps();
        let Mla { latent, nope, rope, value, .. } = *mla;
        let gather = mla_gather::Spec { latent, rope, page: limits.page, format: limits.format };
        let most = pieces::most_keys(4 * u64::from(expanded(mla)), caps.bound_bytes());
        let keys = most.min(limits.piece.unwrap_or(u32::MAX)).min(limits.context.saturating_mul(limits.sequences));
        let keys = keys.max(1);
        // Products of more rows than a step has tokens may be too many for matrix units.
        let fewer = keys.min(limits.tokens);
        let keys = if !halves(keys) && halves(fewer) { fewer } else { keys };
        let attend = Attention::new((nope, rope, value), halves(keys), device)?;
        let values = if attend.on_matrices() { expanded(mla) / 2 } else { expanded(mla) };
        let of = |length, label| rows(device, keys, length, label);
        Ok(Some(Materialised {
            always: limits.prefill == Prefill::Materialised,
            crossover: Crossover::of(caps, matrices, attend.on_matrices()),
            rope: Rope::chosen(&rope::Spec { layout: mla.rotation.layout }, caps),
            frequencies: Arc::new(frequencies),
            rope_table,
            gather: MlaGather::chosen(&gather, caps),
            attend,
            keys,
            latents: of(latent, "gathered latents")?,
            // Where there is no rope it is bound all the same.
            k_pe: of(rope.max(4), "gathered rope keys")?,
            kv: of(values, "expanded keys and values")?,
            mla: mla.clone(),
        }))
    }

    /// Spans of a step, at most.
    pub fn most_spans(&self, limits: &Limits) -> u32 {
        pieces::most_spans(limits.sequences, limits.context, self.keys)
    }

    /// The pieces of a step of these sequences, where it is to be materialised.
    pub fn pieces(&self, batch: &[Sequence]) -> Option<Pieces> {
        let Mla { latent, nope, rope, value, .. } = self.mla;
        let taken = self.always || self.crossover.materialises(batch, &Widths { latent, nope, rope, value });
        taken.then(|| pieces::cut(batch, self.keys))
    }

    /// Values of each head into `output`, from the queries, whose rope parts are turned in place, and the
    /// cache, where the step's own records are already.
    pub fn record(
        &self,
        recording: &mut Recording,
        linear: &Linear,
        weights: &AttentionWeights,
        step: &Step,
        cache: &[CacheChunk],
        (queries, output, lse): (&Activations, &View, &View),
    ) {
        let Mla { heads, nope, rope, softmax_scale, q_scale, growth, .. } = self.mla;
        let Growth { beta, length } = growth.unwrap_or(Growth { beta: 0.0, length: 1 });
        if rope > 0 {
            let params = rope::Params {
                tokens: step.tokens,
                heads,
                pairs: rope / 2,
                stride: queries.stride,
                offset: nope,
                head_stride: nope + rope,
            };
            let (x, table) = (queries.view.clone(), self.rope_table.clone());
            self.rope.record(recording, params, x, step.rows.clone(), table, &self.frequencies);
        }
        for piece in step.pieces {
            let bytes = |spans: u32| u64::from(spans) * size_of::<Span>() as u64;
            let spans = step.spans.part(bytes(piece.first_span), bytes(piece.spans));
            let gather = mla_gather::Args {
                batch: step.batch.clone(),
                spans: spans.clone(),
                block_table: step.block_table.clone(),
                cache,
                latents: self.latents.view.clone(),
                k_pe: self.k_pe.view.clone(),
                count: piece.spans,
                most_keys: piece.most_keys,
            };
            self.gather.record(recording, &gather);
            let kv = Activations::rows(self.kv.view.clone(), expanded(&self.mla));
            let product = Product::new(&weights.kv_b, &self.latents, &kv, piece.keys);
            match self.attend.on_matrices() {
                true => linear.record_halves(recording, &product),
                false => linear.record(recording, Epilogue::Store, &product),
            }
            let attend = mla_prefill::Args {
                batch: step.batch.clone(),
                spans,
                q: queries.view.clone(),
                kv: self.kv.view.clone(),
                k_pe: self.k_pe.view.clone(),
                output: output.clone(),
                lse: lse.clone(),
                count: piece.spans,
                most_tokens: step.most_tokens,
                heads,
                q_stride: queries.stride,
                k_pe_stride: self.k_pe.stride,
                scale: softmax_scale * q_scale,
                beta,
                length,
            };
            self.attend.record(recording, piece.first, attend);
        }
    }
}
