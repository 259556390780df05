//! Attention layers of one model width, that decode a token of each sequence: with keys and values of all heads
//! (MHA), of groups (GQA) and with latents (MLA), each with its projections, as few dispatches as there are kernels
//! for. And latents that are expanded to keys and values at each token: what absorption avoids.

use std::sync::Arc;

use super::layer_weights::{Dims, Kind, LayerWeights};
use super::pages::Pages;
use super::sets::Sets;
use super::shape::PAGE;
use crate::Result;
use crate::gpu::{Buffer, Device, Recording, View};
use crate::kernels::gqa_append::{self, GqaAppend};
use crate::kernels::gqa_decode::{self, GqaDecode};
use crate::kernels::inputs::Inputs;
use crate::kernels::linear::{Activations, Epilogue, Linear, Product};
use crate::kernels::mla_absorb::{self, MlaAbsorb};
use crate::kernels::mla_append::{self, MlaAppend};
use crate::kernels::mla_combine::{self, MlaCombine, Output};
use crate::kernels::mla_decode;
use crate::kernels::mla_decode_coop::Decoder;
use crate::kernels::mla_gather::{self, MlaGather};
use crate::kernels::mla_prefill::{self, MlaPrefill};
use crate::kernels::pieces::{self, Pieces};
use crate::kernels::plan::{self, Borders, Plan, Target};
use crate::kernels::rope::{self, Rope};
use crate::kernels::up_projection::HeadChunk;
use crate::kernels::weights::WeightFormat;
use crate::kernels::{Kernel, Sequence, Span};
use crate::num::record::RecordFormat;
use crate::num::rope::{Frequencies, RopeLayout};

/// One set of sequences, each with one new token.
struct Set {
    batch: Vec<Sequence>,
    table: Vec<u32>,
    plan: Plan,
    pieces: Pieces,
}

enum Attention {
    Grouped { groups: u32, append: GqaAppend, decode: GqaDecode, combine: MlaCombine },
    Latent(Box<LatentKernels>),
}

struct LatentKernels {
    append: MlaAppend,
    absorb: MlaAbsorb,
    decoder: Decoder,
    /// With W_UV, and without.
    combine: [MlaCombine; 2],
    rope: Rope,
    frequencies: Arc<Frequencies>,
    gather: MlaGather,
    /// A sequence's first piece, and later ones.
    attend: [MlaPrefill; 2],
    norm: Buffer,
    latents: Activations,
    k_pe: Activations,
    expanded: Activations,
}

/// Layers of one kind for sequences of one context, and all memory that they need.
pub struct Layers<'a> {
    dims: Dims,
    batch: u32,
    linear: Linear,
    attention: Attention,
    weights: &'a [LayerWeights],
    pages: &'a Pages,
    sets: Vec<Set>,
    batches: Sets,
    splits: Sets,
    tables: Sets,
    spans: Sets,
    rows: Buffer,
    rope_table: Buffer,
    x: Activations,
    projected: Activations,
    queries: Buffer,
    partials: Buffer,
    values: Activations,
    merged: Buffer,
    lse: Buffer,
    /// `[batch, hidden]` f32: what a layer gives.
    pub output: Activations,
}

impl<'a> Layers<'a> {
    /// `count` sets of `batch` sequences of `context` tokens on their own pages.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`] and other faults of the driver.
    pub fn new(
        device: &Device,
        (kind, dims): (Kind, &Dims),
        (batch, context): (u32, u32),
        weights: &'a [LayerWeights],
        pages: &'a mut Pages,
        count: u64,
    ) -> Result<Layers<'a>> {
        let Dims { hidden, heads, head, nope, latent, rope } = *dims;
        let caps = device.caps();
        let of = |rows: u32, length: u32, label: &str| -> Result<Activations> {
            let bytes = 4 * u64::from(rows) * u64::from(length.next_multiple_of(4));
            Ok(Activations::rows(device.alloc_bound(bytes, label)?.view(), length))
        };
        let expanded = heads * (nope + head);
        let most_keys = pieces::most_keys(4 * u64::from(expanded), caps.bound_bytes());
        let keys = most_keys.min(batch * context);
        let (attention, block, little, workgroups, wide) = match kind {
            Kind::Grouped(groups) => {
                let decode = GqaDecode::chosen(&gqa_decode::Spec { width: head, rows: heads / groups }, caps);
                let block = decode.rows();
                let append = GqaAppend::chosen(&gqa_append::Spec { width: head }, caps);
                let combine = MlaCombine::chosen(&combine(head, (8, 8), Output::Latent, batch), caps);
                let workgroups = gqa_decode::WORKGROUPS_FACTOR * plan::workgroups(caps);
                (Attention::Grouped { groups, append, decode, combine }, block, None, workgroups, head)
            }
            Kind::Latent => {
                let (format, layout) = (RecordFormat::F16, RopeLayout::Interleaved);
                let weights = WeightFormat::F16;
                let decoder = Decoder::new(&mla_decode::Spec { latent, rope, format, rows: heads }, PAGE, device)?;
                let workgroups = decoder.workgroups(caps);
                let absorb =
                    mla_absorb::Spec { nope, rope, value: head, latent, format: weights, layout, tokens: batch };
                let attend =
                    |accumulate| MlaPrefill::chosen(&mla_prefill::Spec { nope, rope, value: head, accumulate }, caps);
                let (block, little) = (decoder.rows(), decoder.little());
                let kernels = LatentKernels {
                    append: MlaAppend::chosen(&mla_append::Spec { latent, rope, page: PAGE, format, layout }, caps),
                    absorb: MlaAbsorb::chosen(&absorb, caps),
                    decoder,
                    combine: [Output::Values, Output::Latent]
                        .map(|output| MlaCombine::chosen(&combine(latent, (nope, head), output, batch), caps)),
                    rope: Rope::chosen(&rope::Spec { layout }, caps),
                    frequencies: Arc::new(Frequencies::plain(rope, 1e4)),
                    gather: MlaGather::chosen(&mla_gather::Spec { latent, rope, page: PAGE, format }, caps),
                    attend: [false, true].map(attend),
                    norm: device.upload(&vec![1f32; latent as usize], "norm")?,
                    latents: of(keys, latent, "gathered latents")?,
                    k_pe: of(keys, rope, "gathered rope keys")?,
                    expanded: of(keys, expanded, "expanded keys and values")?,
                };
                (Attention::Latent(Box::new(kernels)), block, little, workgroups, latent)
            }
        };
        let target = Target {
            page: PAGE,
            chunk_pages: pages.chunk_pages,
            heads,
            rows: block,
            little,
            workgroups,
            partials: u32::MAX,
            borders: Borders::Balanced,
        };
        pages.release();
        let sets = (0..count).map(|_| set(pages, &target, (batch, context), keys)).collect::<Result<Vec<_>>>()?;
        let partials = sets.iter().map(|set| set.plan.partials).max().unwrap_or(1);
        let turning = if kind == Kind::Latent { rope } else { head };
        let x = of(batch, hidden, "hidden states")?;
        device.write(&x.view, 0, &Inputs::seed(3).normals((batch * x.stride) as usize, 1.0))?;
        let width = wide + if kind == Kind::Latent { rope.next_multiple_of(8) } else { 0 };
        Ok(Layers {
            dims: *dims,
            batch,
            linear: Linear::new(caps),
            attention,
            weights,
            batches: Sets::new(device, &sets, |set| &set.batch, "batch")?,
            splits: Sets::new(device, &sets, |set| &set.plan.splits, "splits")?,
            tables: Sets::new(device, &sets, |set| &set.table, "block table")?,
            spans: Sets::new(device, &sets, |set| &set.pieces.spans, "spans")?,
            rows: device.upload(&Sequence::rows(&sets[0].batch), "rows")?,
            rope_table: device.upload(&Frequencies::plain(turning, 1e4).table(context), "rope table")?,
            x,
            projected: of(batch, kind.rows(dims), "projections")?,
            queries: device.alloc_bound(4 * u64::from(batch * heads * width), "queries")?,
            partials: device.alloc_bound(4 * u64::from(partials * heads) * u64::from(wide + 4), "partials")?,
            values: of(batch, heads * head, "values")?,
            merged: device.alloc_bound(4 * u64::from(batch * heads * wide), "merged")?,
            lse: device.alloc_bound(4 * u64::from(batch * heads), "log-sum-exps")?,
            output: of(batch, hidden, "output")?,
            sets,
            pages,
        })
    }

    /// How many sets there are.
    pub fn count(&self) -> usize {
        self.sets.len()
    }

    /// True where f16 rounds what is multiplied.
    pub fn on_matrices(&self) -> bool {
        matches!(&self.attention, Attention::Latent(kernels) if kernels.decoder.on_matrices())
    }

    fn weights(&self, set: usize) -> &LayerWeights {
        &self.weights[set % self.weights.len()]
    }

    /// A layer from hidden states to output.
    pub fn layer(&self, set: usize) -> Recording {
        let (mut recording, weights) = (Recording::new(), self.weights(set));
        self.project(&mut recording, set);
        self.append(&mut recording, set);
        self.decode(&mut recording, set, true);
        self.finish(&mut recording, weights);
        recording
    }

    /// Its attention alone: queries over the cache, and the merging of splits.
    pub fn attention(&self, set: usize) -> Recording {
        let mut recording = Recording::new();
        self.decode(&mut recording, set, false);
        recording
    }

    /// A layer of latents that are expanded, and its attention alone; `None` for other layers.
    pub fn expanding(&self, set: usize) -> Option<[Recording; 2]> {
        let Attention::Latent(kernels) = &self.attention else { return None };
        let Dims { heads, nope, rope, .. } = self.dims;
        let (mut recording, mut alone) = (Recording::new(), Recording::new());
        self.project(&mut recording, set);
        self.append_latents(&mut recording, kernels, set);
        let params = rope::Params {
            tokens: self.batch,
            heads,
            pairs: rope / 2,
            stride: self.projected.stride,
            offset: nope,
            head_stride: nope + rope,
        };
        let (x, rows, table) = (self.projected.view.clone(), self.rows.view(), self.rope_table.view());
        kernels.rope.record(&mut recording, params, x, rows, table, &kernels.frequencies);
        self.expand(&mut alone, kernels, set);
        recording.append(&alone);
        self.finish(&mut recording, self.weights(set));
        Some([recording, alone])
    }

    fn project(&self, recording: &mut Recording, set: usize) {
        let product = Product::new(&self.weights(set).input, &self.x, &self.projected, self.batch);
        self.linear.record(recording, Epilogue::Store, &product);
    }

    fn finish(&self, recording: &mut Recording, weights: &LayerWeights) {
        let product = Product::new(&weights.output, &self.values, &self.output, self.batch);
        self.linear.record(recording, Epilogue::Store, &product);
    }

    fn append(&self, recording: &mut Recording, set: usize) {
        let Dims { heads, head, .. } = self.dims;
        match &self.attention {
            Attention::Grouped { groups, append, .. } => append.record(
                recording,
                &gqa_append::Args {
                    batch: self.batches.view(set),
                    rows: self.rows.view(),
                    block_table: self.tables.view(set),
                    qkv: self.projected.view.clone(),
                    rope_table: self.rope_table.view(),
                    cache: &self.pages.chunks,
                    queries: self.queries.view(),
                    count: self.batch,
                    heads,
                    groups: *groups,
                    stride: self.projected.stride,
                    page: PAGE,
                    scale: 1.0 / (head as f32).sqrt(),
                },
            ),
            Attention::Latent(kernels) => {
                kernels.absorb.record(
                    recording,
                    &mla_absorb::Args {
                        rows: self.rows.view(),
                        q: self.projected.view.clone(),
                        kv_b: &self.up_projections(set),
                        rope_table: self.rope_table.view(),
                        queries: self.queries.view(),
                        tokens: self.batch,
                        heads,
                        q_stride: self.projected.stride,
                        scale: self.scale(),
                        beta: 0.0,
                        length: 1,
                    },
                );
                self.append_latents(recording, kernels, set);
            }
        }
    }

    /// MLA's softmax scale.
    fn scale(&self) -> f32 {
        1.0 / ((self.dims.nope + self.dims.rope) as f32).sqrt()
    }

    fn up_projections(&self, set: usize) -> Vec<HeadChunk> {
        let kv_b = self.weights(set).kv_b.as_ref().expect("latents have them");
        let rows = (self.dims.nope + self.dims.head) as usize;
        let chunk = |chunk: &crate::kernels::weights::WeightChunk| {
            let (first_head, heads) = ((chunk.first_row / rows) as u32, (chunk.rows / rows) as u32);
            HeadChunk { first_head, heads, view: chunk.view.clone() }
        };
        kv_b.chunks.iter().map(chunk).collect()
    }

    fn append_latents(&self, recording: &mut Recording, kernels: &LatentKernels, set: usize) {
        let Dims { heads, nope, rope, .. } = self.dims;
        let args = mla_append::Args {
            batch: self.batches.view(set),
            rows: self.rows.view(),
            block_table: self.tables.view(set),
            kv: self.projected.view.clone(),
            weight: kernels.norm.view(),
            rope_table: self.rope_table.view(),
            cache: &self.pages.chunks,
            count: self.batch,
            kv_stride: self.projected.stride,
            kv_offset: heads * (nope + rope),
            eps: 1e-6,
            scale: 1.0,
        };
        kernels.append.record(recording, &args);
    }

    fn decode(&self, recording: &mut Recording, set: usize, with_values: bool) {
        let heads = self.dims.heads;
        let (batch, splits, block_table) = (self.batches.view(set), self.splits.view(set), self.tables.view(set));
        let (queries, cache, partials) = (self.queries.view(), &self.pages.chunks[..], self.partials.view());
        let (plan, most_tokens, page) = (&self.sets[set].plan, 1, PAGE);
        let (kernel, output, kv_b) = match &self.attention {
            Attention::Grouped { groups, decode, combine, .. } => {
                let groups = *groups;
                let args = gqa_decode::Args {
                    batch: batch.clone(),
                    splits,
                    block_table,
                    queries,
                    cache,
                    partials,
                    plan,
                    heads,
                    groups,
                    most_tokens,
                    page,
                };
                decode.record(recording, &args);
                (combine, self.values.view.clone(), Vec::new())
            }
            Attention::Latent(kernels) => {
                let args = mla_decode::Args {
                    batch: batch.clone(),
                    splits,
                    block_table,
                    queries,
                    cache,
                    partials,
                    plan,
                    heads,
                    most_tokens,
                    page,
                };
                kernels.decoder.record(recording, &args);
                match with_values {
                    true => (&kernels.combine[0], self.values.view.clone(), self.up_projections(set)),
                    false => (&kernels.combine[1], self.merged.view(), Vec::new()),
                }
            }
        };
        let args = mla_combine::Args {
            batch,
            rows: self.rows.view(),
            partials: self.partials.view(),
            kv_b: &kv_b,
            output,
            lse: self.lse.view(),
            tokens: self.batch,
            heads,
        };
        kernel.record(recording, &args);
    }

    fn expand(&self, recording: &mut Recording, kernels: &LatentKernels, set: usize) {
        let kv_b = self.weights(set).kv_b.as_ref().expect("latents have them");
        for piece in &self.sets[set].pieces.pieces {
            let bytes = |spans: u32| u64::from(spans) * size_of::<Span>() as u64;
            let spans: View = self.spans.view(set).part(bytes(piece.first_span), bytes(piece.spans));
            let gather = mla_gather::Args {
                batch: self.batches.view(set),
                spans: spans.clone(),
                block_table: self.tables.view(set),
                cache: &self.pages.chunks,
                latents: kernels.latents.view.clone(),
                k_pe: kernels.k_pe.view.clone(),
                count: piece.spans,
                most_keys: piece.most_keys,
            };
            kernels.gather.record(recording, &gather);
            let product = Product::new(kv_b, &kernels.latents, &kernels.expanded, piece.keys);
            self.linear.record(recording, Epilogue::Store, &product);
            let attend = mla_prefill::Args {
                batch: self.batches.view(set),
                spans,
                q: self.projected.view.clone(),
                kv: kernels.expanded.view.clone(),
                k_pe: kernels.k_pe.view.clone(),
                output: self.values.view.clone(),
                lse: self.lse.view(),
                count: piece.spans,
                most_tokens: 1,
                heads: self.dims.heads,
                q_stride: self.projected.stride,
                k_pe_stride: kernels.k_pe.stride,
                scale: self.scale(),
                beta: 0.0,
                length: 1,
            };
            kernels.attend[usize::from(!piece.first)].record(recording, attend);
        }
    }
}

/// How splits are merged: of values alone, or of latents with W_UV behind.
fn combine(latent: u32, (nope, value): (u32, u32), output: Output, tokens: u32) -> mla_combine::Spec {
    mla_combine::Spec { latent, nope, value, format: WeightFormat::F16, output, tokens }
}

fn set(pages: &mut Pages, target: &Target, (batch, context): (u32, u32), keys: u32) -> Result<Set> {
    let (mut sequences, mut table) = (Vec::new(), Vec::new());
    for first_row in 0..batch {
        let pages_from = table.len() as u32;
        sequences.push(Sequence {
            position: context - 1,
            tokens: 1,
            first_row,
            pages: pages_from,
            ..Sequence::default()
        });
        table.extend(pages.take(context.div_ceil(PAGE)));
    }
    let plan = plan::plan(&mut sequences, &table, target)?;
    let pieces = pieces::cut(&sequences, keys);
    Ok(Set { batch: sequences, table, plan, pieces })
}
