//! A checkpoint's tensors on a device, in the shapes that the kernels read: one matrix after the other, so
//! that the host never holds more than one of them beside what the system caches of the file.

use std::path::Path;

use super::config::{Config, Mla};
use super::pack::{Matrix, Row};
use super::tensors::{
    AttentionTensors, BlockTensors, Expected, ExpertTensors, GatedTensors, MlpTensors, MoeTensors, QueryTensors,
    Skipped, Tensors,
};
use crate::gpu::{Device, View};
use crate::kernels::up_projection::HeadChunk;
use crate::kernels::weights::{WeightFormat, Weights};
use crate::weights::{Checkpoint, TensorView};
use crate::{Error, Result};

/// A model on a device.
pub struct Model {
    /// What it is.
    pub config: Config,
    /// `[vocab, hidden]`.
    pub embedding: Weights,
    /// As [`Config::layers`].
    pub layers: Vec<LayerWeights>,
    /// `[hidden]` f32.
    pub norm: View,
    /// `[vocab, hidden]`; the embedding's own chunks where both are tied.
    pub head: Weights,
    /// What stood in the checkpoint and was not needed.
    pub skipped: Vec<Skipped>,
    /// Bytes on the device.
    pub bytes: u64,
}

/// One layer's weights.
pub struct LayerWeights {
    /// Attention and MLP; two of both in LongCat.
    pub blocks: Vec<BlockWeights>,
    /// LongCat's shortcut.
    pub shortcut: Option<MoeWeights>,
}

/// An attention and the MLP behind it.
pub struct BlockWeights {
    /// `[hidden]` f32, before the attention.
    pub attention_norm: View,
    /// The attention.
    pub attention: AttentionWeights,
    /// `[hidden]` f32, before the MLP.
    pub mlp_norm: View,
    /// The MLP.
    pub mlp: MlpWeights,
}

/// One attention's weights.
pub struct AttentionWeights {
    /// What is applied to the hidden state, in one matrix `[kv_offset + latent + rope, hidden]`: the rows of
    /// `q_a` (or, without a compressed query, `[heads * (nope + rope)]` rows of `q`), zeros up to a
    /// multiple of 4 rows, then those of `kv_a`.
    pub input: Weights,
    /// Where the rows of `kv_a` start, a multiple of 4.
    pub kv_offset: u32,
    /// Norm `[q_rank]` f32 and matrix `[heads * (nope + rope), q_rank]` of a compressed query.
    pub query: Option<(View, Weights)>,
    /// `[latent]` f32.
    pub kv_norm: View,
    /// `[heads * (nope + value), latent]`, cut between heads.
    pub kv_b: Weights,
    /// The chunks of `kv_b`, as `mla_absorb` and `mla_combine` take them.
    pub heads: Vec<HeadChunk>,
    /// `[hidden, heads * value]`.
    pub output: Weights,
}

/// What follows an attention.
pub enum MlpWeights {
    /// One MLP.
    Dense(GatedWeights),
    /// Experts.
    Moe(Box<MoeWeights>),
}

/// `down(silu(gate x) * up x)`, of one MLP or of all experts one after the other.
pub struct GatedWeights {
    /// `[experts * 2 * width, hidden]`: row 2 i is row i of gate, row 2 i + 1 is row i of up. Cut between
    /// experts.
    pub gate_up: Weights,
    /// `[experts * hidden, width]`, cut between experts.
    pub down: Weights,
}

/// Experts and their router.
pub struct MoeWeights {
    /// `[experts + identity, hidden]` f32.
    pub router: Weights,
    /// `[experts + identity]` f32; zeros where the checkpoint may leave it out and does.
    pub bias: Option<View>,
    /// The routed experts.
    pub experts: GatedWeights,
    /// The shared experts, as one.
    pub shared: Option<GatedWeights>,
    /// `[hidden]` f32, behind the sum of both.
    pub norm: Option<View>,
}

impl Model {
    /// Loads the checkpoint in a folder. `progress` is told the bytes of the checkpoint that are done, and
    /// those of all that is needed.
    ///
    /// # Errors
    /// As [`Config::open`], [`Checkpoint::open`], [`Tensors::find`] and [`Device::upload`].
    pub fn load(device: &Device, folder: &Path, progress: impl FnMut(u64, u64)) -> Result<Model> {
        let config = Config::open(folder)?;
        let checkpoint = Checkpoint::open(folder)?;
        let found = Tensors::find(&config, &checkpoint)?;
        Model::load_found(device, config, &checkpoint, found, progress)
    }

    /// Loads the tensors that [`Tensors::find`] gave for a configuration and a checkpoint, as [`Model::load`].
    ///
    /// # Errors
    /// As [`Device::upload`], and [`Error::Invalid`] for a vector that is not finite.
    pub fn load_found(
        device: &Device,
        config: Config,
        checkpoint: &Checkpoint,
        (tensors, skipped): (Tensors, Vec<Skipped>),
        mut progress: impl FnMut(u64, u64),
    ) -> Result<Model> {
        let size = |expected: &&Expected| checkpoint.get(&expected.name).map_or(0, |found| found.bytes.len() as u64);
        let total = tensors.all().iter().map(size).sum();
        let mut load = Load { device, checkpoint, progress: &mut progress, done: 0, total, bytes: 0 };
        (load.progress)(0, total);
        let embedding = load.plain(&tensors.embedding)?;
        let layer = |layer: &super::tensors::LayerTensors, load: &mut Load| {
            let blocks = layer.blocks.iter().map(|block| load.block(block, &config.mla)).collect::<Result<_>>()?;
            let shortcut = layer.shortcut.as_ref().map(|moe| load.moe(moe)).transpose()?;
            Ok(LayerWeights { blocks, shortcut })
        };
        let layers = tensors.layers.iter().map(|tensors| layer(tensors, &mut load)).collect::<Result<_>>()?;
        let norm = load.vector(&tensors.norm)?;
        let head = match &tensors.head {
            Some(head) => load.plain(head)?,
            None => embedding.clone(),
        };
        let bytes = load.bytes;
        Ok(Model { config, embedding, layers, norm, head, skipped, bytes })
    }
}

/// A model on its way to a device.
struct Load<'a> {
    device: &'a Device,
    checkpoint: &'a Checkpoint,
    progress: &'a mut dyn FnMut(u64, u64),
    done: u64,
    total: u64,
    bytes: u64,
}

impl<'a> Load<'a> {
    /// A tensor that [`Tensors::find`] has found.
    fn view(&self, expected: &Expected) -> TensorView<'a> {
        self.checkpoint.get(&expected.name).expect("the table of tensors was held against the checkpoint")
    }

    /// The tensors are on the device.
    fn done(&mut self, tensors: &[&Expected]) {
        for tensor in tensors {
            self.done += self.view(tensor).bytes.len() as u64;
            self.checkpoint.release(&tensor.name);
        }
        (self.progress)(self.done, self.total);
    }

    fn upload(&mut self, matrix: &Matrix, group: usize, label: &str) -> Result<Weights> {
        let (format, bytes) = matrix.pack();
        self.upload_as(format, &bytes, (matrix.rows, matrix.columns), group, label)
    }

    fn upload_as(
        &mut self,
        format: WeightFormat,
        bytes: &[u8],
        shape: (usize, usize),
        group: usize,
        label: &str,
    ) -> Result<Weights> {
        self.bytes += bytes.len() as u64;
        Weights::upload(self.device, bytes, shape, format, group, label)
    }

    /// A matrix as it is.
    fn plain(&mut self, expected: &Expected) -> Result<Weights> {
        self.grouped(expected, 1)
    }

    /// A matrix as it is, cut at multiples of `group` rows.
    fn grouped(&mut self, expected: &Expected, group: usize) -> Result<Weights> {
        let rows = rows(self.view(expected));
        let [height, columns] = expected.shape[..] else { unreachable!("{} is a matrix", expected.name) };
        let matrix = Matrix { rows: height, columns, row: Box::new(move |i| Some(rows(i))) };
        let weights = self.upload(&matrix, group, &expected.name)?;
        self.done(&[expected]);
        Ok(weights)
    }

    /// A vector as f32; zeros where it is missing and may be.
    fn vector(&mut self, expected: &Expected) -> Result<View> {
        let found = self.checkpoint.get(&expected.name);
        let values: Vec<f32> = match found {
            Some(found) => Row { dtype: found.dtype, bytes: found.bytes }.values().collect(),
            None => vec![0.0; expected.values()],
        };
        if let Some(at) = values.iter().position(|value| !value.is_finite()) {
            let (file, what) = (self.checkpoint.source().into(), format!("tensor '{}'", expected.name));
            let found = format!("{} at {at}", values[at]);
            return Err(Error::Invalid { file, what, expected: "finite numbers".into(), found });
        }
        self.bytes += size_of_val(&values[..]) as u64;
        let view = self.device.upload(&values, &expected.name)?.view();
        if found.is_some() {
            self.done(&[expected]);
        }
        Ok(view)
    }

    fn block(&mut self, block: &BlockTensors, mla: &Mla) -> Result<BlockWeights> {
        Ok(BlockWeights {
            attention_norm: self.vector(&block.attention_norm)?,
            attention: self.attention(&block.attention, mla)?,
            mlp_norm: self.vector(&block.mlp_norm)?,
            mlp: match &block.mlp {
                MlpTensors::Dense(gated) => MlpWeights::Dense(self.gated(std::slice::from_ref(gated))?),
                MlpTensors::Moe(moe) => MlpWeights::Moe(Box::new(self.moe(moe)?)),
            },
        })
    }

    fn attention(&mut self, tensors: &AttentionTensors, mla: &Mla) -> Result<AttentionWeights> {
        let first = match &tensors.query {
            QueryTensors::Whole(q) => q,
            QueryTensors::LowRank { q_a, .. } => q_a,
        };
        let (q_rows, kv_rows) = (first.shape[0], tensors.kv_a.shape[0]);
        let kv_offset = q_rows.next_multiple_of(4);
        let (q, kv) = (rows(self.view(first)), rows(self.view(&tensors.kv_a)));
        let row = move |i| match i {
            i if i < q_rows => Some(q(i)),
            i if i < kv_offset => None,
            i => Some(kv(i - kv_offset)),
        };
        let matrix = Matrix { rows: kv_offset + kv_rows, columns: first.shape[1], row: Box::new(row) };
        let input = self.upload(&matrix, 1, &tensors.kv_a.name)?;
        self.done(&[first, &tensors.kv_a]);
        let query = match &tensors.query {
            QueryTensors::Whole(_) => None,
            QueryTensors::LowRank { norm, q_b, .. } => Some((self.vector(norm)?, self.plain(q_b)?)),
        };
        let head = (mla.nope + mla.value) as usize;
        let kv_norm = self.vector(&tensors.kv_a_norm)?;
        let kv_b = self.grouped(&tensors.kv_b, head)?;
        let chunk = |chunk: &crate::kernels::weights::WeightChunk| HeadChunk {
            first_head: (chunk.first_row / head) as u32,
            heads: (chunk.rows / head) as u32,
            view: chunk.view.clone(),
        };
        let heads = kv_b.chunks.iter().map(chunk).collect();
        let output = self.plain(&tensors.output)?;
        Ok(AttentionWeights { input, kv_offset: kv_offset as u32, query, kv_norm, kv_b, heads, output })
    }

    /// Experts one after the other, or one MLP.
    fn gated(&mut self, experts: &[GatedTensors]) -> Result<GatedWeights> {
        let [width, hidden] = experts[0].gate.shape[..] else { unreachable!("gate is a matrix") };
        let of = |load: &Load<'a>, pick: fn(&GatedTensors) -> &Expected| -> Vec<_> {
            experts.iter().map(|expert| rows(load.view(pick(expert)))).collect()
        };
        let (gate, up) = (of(self, |expert| &expert.gate), of(self, |expert| &expert.up));
        let row = move |i: usize| {
            let (expert, i) = (i / (2 * width), i % (2 * width));
            Some(if i.is_multiple_of(2) { gate[expert](i / 2) } else { up[expert](i / 2) })
        };
        let matrix = Matrix { rows: experts.len() * 2 * width, columns: hidden, row: Box::new(row) };
        let gate_up = self.upload(&matrix, 2 * if experts.len() > 1 { width } else { 1 }, &experts[0].gate.name)?;
        self.done(&experts.iter().flat_map(|expert| [&expert.gate, &expert.up]).collect::<Vec<_>>());
        let down = of(self, |expert| &expert.down);
        let row = move |i: usize| Some(down[i / hidden](i % hidden));
        let matrix = Matrix { rows: experts.len() * hidden, columns: width, row: Box::new(row) };
        let down = self.upload(&matrix, if experts.len() > 1 { hidden } else { 1 }, &experts[0].down.name)?;
        self.done(&experts.iter().map(|expert| &expert.down).collect::<Vec<_>>());
        Ok(GatedWeights { gate_up, down })
    }

    fn moe(&mut self, tensors: &MoeTensors) -> Result<MoeWeights> {
        Ok(MoeWeights {
            router: self.router(&tensors.router)?,
            bias: tensors.bias.as_ref().map(|bias| self.vector(bias)).transpose()?,
            experts: match &tensors.experts {
                ExpertTensors::Each(experts) => self.gated(experts)?,
                ExpertTensors::Fused { gate_up, down } => self.fused(gate_up, down)?,
            },
            shared: tensors.shared.as_ref().map(|shared| self.gated(std::slice::from_ref(shared))).transpose()?,
            norm: tensors.norm.as_ref().map(|norm| self.vector(norm)).transpose()?,
        })
    }

    /// Always f32: a score that is off by a bit sends a token elsewhere.
    fn router(&mut self, expected: &Expected) -> Result<Weights> {
        let row = rows(self.view(expected));
        let (height, columns) = (expected.shape[0], expected.shape[1]);
        let bytes = Matrix { rows: height, columns, row: Box::new(move |i| Some(row(i))) }.pack_f32();
        let weights = self.upload_as(WeightFormat::F32, &bytes, (height, columns), 1, &expected.name)?;
        self.done(&[expected]);
        Ok(weights)
    }

    /// Experts that share two tensors: each expert's gate rows stand before its up rows.
    fn fused(&mut self, gate_up: &Expected, down: &Expected) -> Result<GatedWeights> {
        let [experts, double, hidden] = gate_up.shape[..] else { unreachable!("{} has three sides", gate_up.name) };
        let width = double / 2;
        let all = rows(self.view(gate_up));
        let row = move |i: usize| Some(all(i / double * double + i % 2 * width + i % double / 2));
        let matrix = Matrix { rows: experts * double, columns: hidden, row: Box::new(row) };
        let gate_up_weights = self.upload(&matrix, double, &gate_up.name)?;
        self.done(&[gate_up]);
        let all = rows(self.view(down));
        let matrix = Matrix { rows: experts * hidden, columns: width, row: Box::new(move |i| Some(all(i))) };
        let down_weights = self.upload(&matrix, hidden, &down.name)?;
        self.done(&[down]);
        Ok(GatedWeights { gate_up: gate_up_weights, down: down_weights })
    }
}

/// The rows of a tensor: slices along its last side.
fn rows<'a>(tensor: TensorView<'a>) -> impl Fn(usize) -> Row<'a> + Sync + use<'a> {
    let columns = tensor.shape.last().copied().unwrap_or(1);
    let length = columns * tensor.dtype.bytes().expect("the table of tensors was checked");
    move |i| Row { dtype: tensor.dtype, bytes: &tensor.bytes[i * length..(i + 1) * length] }
}
