//! A checkpoint's tensors on a device, in the shapes that the kernels read: one matrix after the other, so
//! that the host never holds more than one of them beside what the system caches of the file.

use std::path::Path;

use super::config::{Config, Layer, Mla, Mlp, Moe};
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
    /// `[hidden]` f32, behind the last layer.
    pub norm: View,
    /// The same times the factor of the logits, before the head.
    pub head_norm: View,
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
    /// `[experts * hidden, width]`, cut between experts. One MLP that is as wide as several experts may have its
    /// columns in pieces of an expert's width, one under the other.
    pub down: Weights,
}

/// Experts and their router.
pub struct MoeWeights {
    /// `[experts + identity, hidden]` f32.
    pub router: Weights,
    /// `[experts + identity]` f32; zeros where the checkpoint may leave it out and does.
    pub bias: Option<View>,
    /// The routed experts, and behind them `appended` shared ones.
    pub experts: GatedWeights,
    /// How many of the experts are shared ones: see [`Moe::appended`].
    pub appended: u32,
    /// The shared experts, as one MLP: parts of `experts` where they stand there.
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
        let size = |expected: &&Expected| checkpoint.get(&expected.name).map_or(0, |found| found.size as u64);
        let total = tensors.all().iter().map(size).sum();
        let mut tally = Tally { progress: &mut progress, done: 0, total, bytes: 0 };
        (tally.progress)(0, total);
        // A checkpoint of its own for each part: where files are not mapped, what was read goes with it.
        let embedding = Load::new(device, &checkpoint.again(), &mut tally).plain(&tensors.embedding)?;
        let mut layer = |layer: &super::tensors::LayerTensors, of: &Layer| {
            let checkpoint = checkpoint.again();
            let mut load = Load::new(device, &checkpoint, &mut tally);
            let blocks = layer.blocks.iter().zip(&of.mlps);
            let blocks = blocks.map(|(block, mlp)| load.block(block, &config.mla, mlp)).collect::<Result<_>>()?;
            let shortcut = layer.shortcut.as_ref().zip(of.shortcut.as_ref());
            let shortcut = shortcut.map(|(tensors, moe)| load.moe(tensors, moe)).transpose()?;
            Ok(LayerWeights { blocks, shortcut })
        };
        let layers = tensors.layers.iter().zip(&config.layers);
        let layers = layers.map(|(tensors, of)| layer(tensors, of)).collect::<Result<_>>()?;
        let mut load = Load::new(device, checkpoint, &mut tally);
        let norm = load.vector(&tensors.norm)?;
        let head_norm = match config.logits_scale {
            1.0 => norm.clone(),
            scale => {
                let scaled: Vec<f32> = load.values(&tensors.norm)?.iter().map(|value| scale * value).collect();
                device.upload(&scaled, "norm of the head")?.view()
            }
        };
        let head = match &tensors.head {
            Some(head) => load.plain(head)?,
            None => embedding.clone(),
        };
        Ok(Model { config, embedding, layers, norm, head_norm, head, skipped, bytes: tally.bytes })
    }
}

/// How far a model is on its way.
struct Tally<'a> {
    progress: &'a mut dyn FnMut(u64, u64),
    done: u64,
    total: u64,
    /// Bytes on the device.
    bytes: u64,
}

/// A part of a model on its way to a device.
struct Load<'a, 't, 'p> {
    device: &'a Device,
    checkpoint: &'a Checkpoint,
    tally: &'t mut Tally<'p>,
}

impl<'a, 't, 'p> Load<'a, 't, 'p> {
    fn new(device: &'a Device, checkpoint: &'a Checkpoint, tally: &'t mut Tally<'p>) -> Load<'a, 't, 'p> {
        Load { device, checkpoint, tally }
    }

    /// A tensor that [`Tensors::find`] has found.
    fn view(&self, expected: &Expected) -> TensorView<'a> {
        self.checkpoint.get(&expected.name).expect("the table of tensors was held against the checkpoint")
    }

    /// The tensors are on the device.
    fn done(&mut self, tensors: &[&Expected]) {
        for tensor in tensors {
            self.tally.done += self.view(tensor).size as u64;
            self.checkpoint.release(&tensor.name);
        }
        (self.tally.progress)(self.tally.done, self.tally.total);
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
        self.tally.bytes += bytes.len() as u64;
        Weights::upload(self.device, bytes, shape, format, group, label)
    }

    /// A matrix as it is.
    fn plain(&mut self, expected: &Expected) -> Result<Weights> {
        self.grouped(expected, 1)
    }

    /// A matrix as it is, cut at multiples of `group` rows.
    fn grouped(&mut self, expected: &Expected, group: usize) -> Result<Weights> {
        let rows = rows(self.view(expected))?;
        let [height, columns] = expected.shape[..] else { unreachable!("{} is a matrix", expected.name) };
        let matrix = Matrix { rows: height, columns, row: Box::new(move |i| Some(rows(i))) };
        let weights = self.upload(&matrix, group, &expected.name)?;
        self.done(&[expected]);
        Ok(weights)
    }

    /// A vector's values; zeros where it is missing and may be.
    fn values(&self, expected: &Expected) -> Result<Vec<f32>> {
        let found = self.checkpoint.get(&expected.name);
        let values: Vec<f32> = match found {
            Some(found) => Row { dtype: found.dtype, bytes: found.bytes()? }.values().collect(),
            None => vec![0.0; expected.values()],
        };
        if let Some(at) = values.iter().position(|value| !value.is_finite()) {
            let (file, what) = (self.checkpoint.source().into(), format!("tensor '{}'", expected.name));
            let found = format!("{} at {at}", values[at]);
            return Err(Error::Invalid { file, what, expected: "finite numbers".into(), found });
        }
        Ok(values)
    }

    /// A vector as f32.
    fn vector(&mut self, expected: &Expected) -> Result<View> {
        let values = self.values(expected)?;
        self.tally.bytes += size_of_val(&values[..]) as u64;
        let view = self.device.upload(&values, &expected.name)?.view();
        if self.checkpoint.get(&expected.name).is_some() {
            self.done(&[expected]);
        }
        Ok(view)
    }

    fn block(&mut self, block: &BlockTensors, mla: &Mla, mlp: &Mlp) -> Result<BlockWeights> {
        Ok(BlockWeights {
            attention_norm: self.vector(&block.attention_norm)?,
            attention: self.attention(&block.attention, mla)?,
            mlp_norm: self.vector(&block.mlp_norm)?,
            mlp: match (&block.mlp, mlp) {
                (MlpTensors::Dense(gated), _) => MlpWeights::Dense(self.gated(std::slice::from_ref(gated), None)?),
                (MlpTensors::Moe(tensors), Mlp::Moe(moe)) => MlpWeights::Moe(Box::new(self.moe(tensors, moe)?)),
                _ => unreachable!("the table of tensors follows from the configuration"),
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
        let (q, kv) = (rows(self.view(first))?, rows(self.view(&tensors.kv_a))?);
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

    /// Experts one after the other, or one MLP; behind them the shared experts, in pieces as wide as they are.
    fn gated(&mut self, experts: &[GatedTensors], shared: Option<&GatedTensors>) -> Result<GatedWeights> {
        let [width, hidden] = experts[0].gate.shape[..] else { unreachable!("gate is a matrix") };
        let count = experts.len();
        let of = |load: &Load<'a, '_, '_>, pick: fn(&GatedTensors) -> &Expected| -> Result<Vec<_>> {
            experts.iter().chain(shared).map(|expert| rows(load.view(pick(expert)))).collect()
        };
        let (gate, up) = (of(self, |expert| &expert.gate)?, of(self, |expert| &expert.up)?);
        let pieces = shared.map_or(0, |shared| shared.gate.shape[0] / width);
        let row = move |i: usize| {
            // The shared experts' rows are those of one expert that is `pieces` times as wide.
            let expert = (i / (2 * width)).min(count.min(gate.len() - 1));
            let (gate_row, of) = ((i - expert * 2 * width) / 2, if i.is_multiple_of(2) { &gate } else { &up });
            Some(of[expert](gate_row))
        };
        let all = count + pieces;
        let matrix = Matrix { rows: all * 2 * width, columns: hidden, row: Box::new(row) };
        let gate_up = self.upload(&matrix, 2 * if all > 1 { width } else { 1 }, &experts[0].gate.name)?;
        let both = experts.iter().chain(shared).flat_map(|expert| [&expert.gate, &expert.up]);
        self.done(&both.collect::<Vec<_>>());
        let down = of(self, |expert| &expert.down)?;
        let row = move |i: usize| {
            let expert = i / hidden;
            let row = down[expert.min(down.len() - 1)](i % hidden);
            Some(if expert < count { row } else { row.columns((expert - count) * width, width) })
        };
        let matrix = Matrix { rows: all * hidden, columns: width, row: Box::new(row) };
        let down = self.upload(&matrix, if all > 1 { hidden } else { 1 }, &experts[0].down.name)?;
        self.done(&experts.iter().chain(shared).map(|expert| &expert.down).collect::<Vec<_>>());
        Ok(GatedWeights { gate_up, down })
    }

    fn moe(&mut self, tensors: &MoeTensors, moe: &Moe) -> Result<MoeWeights> {
        let router = self.router(&tensors.router)?;
        let bias = tensors.bias.as_ref().map(|bias| self.vector(bias)).transpose()?;
        let hidden = tensors.router.shape[1];
        let appended = tensors.shared.as_ref().filter(|shared| self.alike(shared, &tensors.experts));
        let appended = appended.filter(|_| moe.appended(hidden as u32) > 0);
        let experts = match &tensors.experts {
            ExpertTensors::Each(experts) => self.gated(experts, appended)?,
            ExpertTensors::Fused { gate_up, down } => self.fused(gate_up, down, appended)?,
        };
        let shared = match (&tensors.shared, appended) {
            (None, _) => None,
            (Some(shared), None) => Some(self.gated(std::slice::from_ref(shared), None)?),
            (Some(_), Some(_)) => {
                let routed = moe.experts as usize;
                let (up, down) = (routed * 2 * moe.width as usize, routed * hidden);
                let (up, down) = (up..experts.gate_up.rows, down..experts.down.rows);
                Some(GatedWeights { gate_up: experts.gate_up.part(up), down: experts.down.part(down) })
            }
        };
        let norm = tensors.norm.as_ref().map(|norm| self.vector(norm)).transpose()?;
        let appended = if appended.is_some() { moe.appended(hidden as u32) } else { 0 };
        Ok(MoeWeights { router, bias, experts, appended, shared, norm })
    }

    /// Whether shared experts are stored as the routed ones are: else one matrix of both would take the wider
    /// format for all.
    fn alike(&self, shared: &GatedTensors, experts: &ExpertTensors) -> bool {
        let dtype = |tensor: &Expected| self.view(tensor).dtype;
        let (gate, up, down) = match experts {
            ExpertTensors::Each(experts) => (&experts[0].gate, &experts[0].up, &experts[0].down),
            ExpertTensors::Fused { gate_up, down } => (gate_up, gate_up, down),
        };
        let pairs = [(&shared.gate, gate), (&shared.up, up), (&shared.down, down)];
        pairs.iter().all(|(shared, routed)| dtype(shared) == dtype(routed))
    }

    /// Always f32: a score that is off by a bit sends a token elsewhere.
    fn router(&mut self, expected: &Expected) -> Result<Weights> {
        let row = rows(self.view(expected))?;
        let (height, columns) = (expected.shape[0], expected.shape[1]);
        let bytes = Matrix { rows: height, columns, row: Box::new(move |i| Some(row(i))) }.pack_f32();
        let weights = self.upload_as(WeightFormat::F32, &bytes, (height, columns), 1, &expected.name)?;
        self.done(&[expected]);
        Ok(weights)
    }

    /// Experts that share two tensors: each expert's gate rows stand before its up rows. Behind them the shared
    /// experts, as in [`Load::gated`].
    fn fused(&mut self, gate_up: &Expected, down: &Expected, shared: Option<&GatedTensors>) -> Result<GatedWeights> {
        let [experts, double, hidden] = gate_up.shape[..] else { unreachable!("{} has three sides", gate_up.name) };
        let width = double / 2;
        let pieces = shared.map_or(0, |shared| shared.gate.shape[0] / width);
        let of = |load: &Load<'a, '_, '_>, pick: fn(&GatedTensors) -> &Expected| {
            shared.map(|s| rows(load.view(pick(s)))).transpose()
        };
        let (all, gate, up) = (rows(self.view(gate_up))?, of(self, |s| &s.gate)?, of(self, |s| &s.up)?);
        let row = move |i: usize| match if i.is_multiple_of(2) { &gate } else { &up } {
            Some(shared) if i >= experts * double => Some(shared((i - experts * double) / 2)),
            _ => Some(all(i / double * double + i % 2 * width + i % double / 2)),
        };
        let matrix = Matrix { rows: (experts + pieces) * double, columns: hidden, row: Box::new(row) };
        let gate_up_weights = self.upload(&matrix, double, &gate_up.name)?;
        let more = shared.map_or(vec![], |shared| vec![&shared.gate, &shared.up]);
        self.done(&[&[gate_up], &more[..]].concat());
        let (all, last) = (rows(self.view(down))?, of(self, |s| &s.down)?);
        let row = move |i: usize| match &last {
            Some(shared) if i >= experts * hidden => {
                Some(shared(i % hidden).columns((i / hidden - experts) * width, width))
            }
            _ => Some(all(i)),
        };
        let matrix = Matrix { rows: (experts + pieces) * hidden, columns: width, row: Box::new(row) };
        let down_weights = self.upload(&matrix, hidden, &down.name)?;
        self.done(&[&[down], &shared.map_or(vec![], |shared| vec![&shared.down])[..]].concat());
        Ok(GatedWeights { gate_up: gate_up_weights, down: down_weights })
    }
}

/// The rows of a tensor: slices along its last side.
fn rows<'a>(tensor: TensorView<'a>) -> Result<impl Fn(usize) -> Row<'a> + Sync + use<'a>> {
    let columns = tensor.shape.last().copied().unwrap_or(1);
    let length = columns * tensor.dtype.bytes().expect("the table of tensors was checked");
    let (dtype, bytes) = (tensor.dtype, tensor.bytes()?);
    Ok(move |i| Row { dtype, bytes: &bytes[i * length..(i + 1) * length] })
}
