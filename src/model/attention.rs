//! One attention of a step: projections, what it leaves in the latent cache, and absorbed attention over
//! that cache (DeepSeek-V2, arXiv:2405.04434, section 2.1).

use super::config::{Growth, Mla};
use super::forward::{Decode, Input, Limits, Step, rows};
use super::load::{AttentionWeights, Model};
use super::prefill::Materialised;
use crate::gpu::{Device, Recording, View};
use crate::kernels::linear::{Activations, Epilogue, Linear, Norm, Product};
use crate::kernels::mla_absorb::{self, MlaAbsorb};
use crate::kernels::mla_append::{self, MlaAppend};
use crate::kernels::mla_combine::{self, MlaCombine, Output};
use crate::kernels::mla_decode;
use crate::kernels::mla_decode_coop::Decoder;
use crate::kernels::mla_decode_fused::{self, MlaDecodeFused};
use crate::kernels::rms_norm::{self, RmsNorm};
use crate::kernels::weights::WeightFormat;
use crate::kernels::{CacheChunk, Kernel};
use crate::{Error, Result};

/// The kernels of attention, and the memory between them.
pub(super) struct Attention {
    mla: Mla,
    page: u32,
    norm: RmsNorm,
    append: MlaAppend,
    /// By how `kv_b` is stored: the formats that the model's layers have.
    by_format: Vec<(WeightFormat, ByFormat)>,
    decoder: Decoder,
    /// There is none where prompts are absorbed.
    pub(super) materialised: Option<Materialised>,
    rope_table: View,
    /// Queries or their compressed form, and the latent with its rope key.
    input: Activations,
    compressed: Option<Activations>,
    queries: Option<Activations>,
    /// Absorbed; there is none where every step is fused.
    absorbed: Option<View>,
    partials: View,
    heads_out: Activations,
    lse: View,
}

struct ByFormat {
    absorb: MlaAbsorb,
    combine: MlaCombine,
    /// Partials, and values where every sequence has one split; for fused steps alone, since not every device has
    /// the workgroup memory.
    fused: Option<[MlaDecodeFused; 2]>,
}

impl Attention {
    pub fn new(device: &Device, model: &Model, limits: &Limits, linear: &Linear) -> Result<Attention> {
        let (mla, caps) = (model.config.mla.clone(), device.caps());
        let Mla { heads, latent, nope, rope, value, .. } = mla;
        let layout = mla.rotation.layout;
        let blocks = || model.layers.iter().flat_map(|layer| &layer.blocks);
        let mut formats: Vec<WeightFormat> = Vec::new();
        for format in blocks().map(|block| block.attention.kv_b.format) {
            if !formats.contains(&format) {
                formats.push(format);
            }
        }
        let tokens = limits.usual_tokens;
        let fused = |weights: WeightFormat, values| {
            let format = limits.format;
            let spec = mla_decode_fused::Spec { nope, rope, value, latent, weights, format, layout, values };
            match MlaDecodeFused::refusal(&spec, caps) {
                None => Ok(MlaDecodeFused::chosen(&spec, caps)),
                Some(found) => {
                    let (what, expected) =
                        ("fused attention (--attention)".into(), format!("widths that fit {}", caps.label()));
                    Err(Error::Usage { what, expected, found })
                }
            }
        };
        let by_format = |format: WeightFormat| {
            let absorb = mla_absorb::Spec { nope, rope, value, latent, format, layout, tokens };
            let combine = mla_combine::Spec { latent, nope, value, format, output: Output::Values, tokens };
            let kernels = ByFormat {
                absorb: MlaAbsorb::chosen(&absorb, caps),
                combine: MlaCombine::chosen(&combine, caps),
                fused: match limits.decode {
                    Decode::Fused => Some([fused(format, false)?, fused(format, true)?]),
                    _ => None,
                },
            };
            Ok((format, kernels))
        };
        let frequencies = mla.rotation.frequencies(limits.context);
        let table = frequencies.table(limits.context);
        let rope_table = match table.is_empty() {
            true => device.alloc(16, "no rope")?,
            false => device.upload(&table, "rope table")?,
        };
        let input = blocks().map(|block| block.attention.input.rows as u32).max().expect("a model has layers");
        let of = |length, label| rows(device, limits.tokens, length, label);
        let width = (latent + rope).next_multiple_of(8);
        let absorbed = 4 * u64::from(limits.tokens) * u64::from(heads * width);
        let decode = mla_decode::Spec { latent, rope, format: limits.format, rows: heads * tokens };
        let decoder = Decoder::new(&decode, limits.page, device)?;
        let halves = |keys: u32| formats.iter().all(|format| linear.takes_halves(*format, keys, latent));
        let materialised = (limits, decoder.on_matrices(), &halves as &dyn Fn(u32) -> bool);
        let materialised = Materialised::new(device, &mla, materialised, frequencies, rope_table.view())?;
        Ok(Attention {
            page: limits.page,
            norm: RmsNorm::chosen(&rms_norm::Spec, caps),
            append: MlaAppend::chosen(
                &mla_append::Spec { latent, rope, page: limits.page, format: limits.format, layout },
                caps,
            ),
            by_format: formats.iter().map(|format| by_format(*format)).collect::<Result<_>>()?,
            decoder,
            materialised,
            rope_table: rope_table.view(),
            input: of(input, "projections")?,
            compressed: mla.q_rank.map(|rank| of(rank, "compressed queries")).transpose()?,
            queries: mla.q_rank.map(|_| of(heads * (nope + rope), "queries")).transpose()?,
            absorbed: match limits.decode {
                Decode::Fused => None,
                _ => Some(device.alloc_bound(absorbed, "absorbed queries")?.view()),
            },
            partials: {
                let bytes = 4 * u64::from(limits.partials * heads) * u64::from(latent + 4);
                device.alloc_bound(bytes, "partials")?.view()
            },
            heads_out: of(heads * value, "attention output")?,
            lse: device.alloc(4 * u64::from(limits.tokens * heads), "log-sum-exps")?.view(),
            mla,
        })
    }

    /// What decodes.
    pub fn decoder(&self) -> &Decoder {
        &self.decoder
    }

    /// `hidden += residual_scale * attention(x)`, with the new records written to the cache.
    #[allow(clippy::too_many_arguments, reason = "what a step is, what is read, what is written")]
    pub fn record(
        &self,
        recording: &mut Recording,
        linear: &Linear,
        weights: &AttentionWeights,
        step: &Step,
        cache: &[CacheChunk],
        x: &Input,
        (hidden, residual_scale): (&Activations, f32),
    ) {
        let (mla, tokens) = (&self.mla, step.tokens);
        let input = Activations { stride: (weights.input.rows as u32).next_multiple_of(4), ..self.input.clone() };
        linear.record(recording, Epilogue::Store, &x.product(&weights.input, &input, tokens));
        let append = mla_append::Args {
            batch: step.batch.clone(),
            rows: step.rows.clone(),
            block_table: step.block_table.clone(),
            kv: input.view.clone(),
            weight: weights.kv_norm.clone(),
            rope_table: self.rope_table.clone(),
            cache,
            count: tokens,
            kv_stride: input.stride,
            kv_offset: weights.kv_offset,
            eps: mla.eps,
            scale: mla.latent_scale,
        };
        let queries = match (&weights.query, &self.compressed, &self.queries) {
            (Some((weight, q_b)), Some(_), Some(queries)) if linear.folds_norm(tokens) => {
                let norm = Norm { weight: weight.clone(), eps: mla.eps };
                let product = Product { norm: Some(&norm), ..Product::new(q_b, &input, queries, tokens) };
                linear.record(recording, Epilogue::Store, &product);
                queries
            }
            (Some((norm, q_b)), Some(compressed), Some(queries)) => {
                let params = rms_norm::Params {
                    rows: tokens,
                    length: mla.q_rank.unwrap_or_default(),
                    x_stride: input.stride,
                    x_offset: 0,
                    y_stride: compressed.stride,
                    y_offset: 0,
                    eps: mla.eps,
                };
                let (x, y) = (input.view.clone(), compressed.view.clone());
                self.norm.record(recording, params, x, norm.clone(), y);
                linear.record(recording, Epilogue::Store, &Product::new(q_b, compressed, queries, tokens));
                queries
            }
            _ => &input,
        };
        match &self.materialised {
            Some(materialised) if !step.pieces.is_empty() => {
                self.append.record(recording, &append);
                let io = (queries, &self.heads_out.view, &self.lse);
                materialised.record(recording, linear, weights, step, cache, io);
            }
            _ => self.attend(recording, weights, step, &append, queries),
        }
        let product = Product::new(&weights.output, &self.heads_out, hidden, tokens);
        linear.record(recording, Epilogue::Add, &Product { scale: residual_scale, ..product });
    }

    /// The new records written to the cache, and values of each head, from the queries and the cache.
    fn attend(
        &self,
        recording: &mut Recording,
        weights: &AttentionWeights,
        step: &Step,
        append: &mla_append::Args,
        queries: &Activations,
    ) {
        let cache = append.cache;
        let Mla { heads, softmax_scale, q_scale, .. } = self.mla;
        let format = weights.kv_b.format;
        let (_, kernels) = self.by_format.iter().find(|(f, _)| *f == format).expect("the model's formats were listed");
        let Growth { beta, length } = self.mla.growth.unwrap_or(Growth { beta: 0.0, length: 1 });
        let scale = softmax_scale * q_scale;
        let single = step.plan.is_single();
        if self.absorbed.is_none() {
            self.append.record(recording, append);
            let args = mla_decode_fused::Args {
                batch: step.batch.clone(),
                splits: step.splits.clone(),
                block_table: step.block_table.clone(),
                q: queries.view.clone(),
                kv_b: &weights.heads,
                rope_table: self.rope_table.clone(),
                cache,
                output: if single { self.heads_out.view.clone() } else { self.partials.clone() },
                plan: step.plan,
                heads,
                most_tokens: step.most_tokens,
                page: self.page,
                q_stride: queries.stride,
                scale,
                beta,
                length,
            };
            let fused = kernels.fused.as_ref().expect("made where nothing absorbs");
            fused[usize::from(single)].record(recording, &args);
            if single {
                return;
            }
        } else if let Some(absorbed) = &self.absorbed {
            let args = mla_absorb::Args {
                rows: step.rows.clone(),
                q: queries.view.clone(),
                kv_b: &weights.heads,
                rope_table: self.rope_table.clone(),
                queries: absorbed.clone(),
                tokens: step.tokens,
                heads,
                q_stride: queries.stride,
                scale,
                beta,
                length,
            };
            kernels.absorb.record(recording, &args);
            // Behind it: the two wait for the same, and nothing that this writes was bound before in the step, so
            // that no barrier stands between them.
            self.append.record(recording, append);
            let args = mla_decode::Args {
                batch: step.batch.clone(),
                splits: step.splits.clone(),
                block_table: step.block_table.clone(),
                queries: absorbed.clone(),
                cache,
                partials: self.partials.clone(),
                plan: step.plan,
                heads,
                most_tokens: step.most_tokens,
                page: self.page,
            };
            self.decoder.record(recording, &args);
        }
        let args = mla_combine::Args {
            batch: step.batch.clone(),
            rows: step.rows.clone(),
            partials: self.partials.clone(),
            kv_b: &weights.heads,
            output: self.heads_out.view.clone(),
            lse: self.lse.clone(),
            tokens: step.tokens,
            heads,
        };
        kernels.combine.record(recording, &args);
    }
}
