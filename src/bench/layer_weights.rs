//! What layers of attention are made of: sizes, kinds, drawn weights.

use crate::Result;
use crate::gpu::Device;
use crate::kernels::gqa_decode;
use crate::kernels::inputs::Inputs;
use crate::kernels::weights::{WeightFormat, Weights, pack};
use crate::num::record::RecordFormat;

/// The sizes of a model that its attention depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Dims {
    /// Width of the hidden states.
    pub hidden: u32,
    /// Query heads.
    pub heads: u32,
    /// Width of a head's keys and values; of its values in MLA.
    pub head: u32,
    /// Width of MLA's keys without rope.
    pub nope: u32,
    /// MLA's latent.
    pub latent: u32,
    /// MLA's rope key.
    pub rope: u32,
}

/// Keys and values that a layer leaves in its cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// So many heads of keys and values; all heads for MHA.
    Grouped(u32),
    /// Latents.
    Latent,
}

impl Kind {
    /// Bytes of a token in the cache.
    pub fn record(self, dims: &Dims) -> usize {
        match self {
            Kind::Grouped(groups) => gqa_decode::record_bytes(groups, dims.head),
            Kind::Latent => RecordFormat::F16.bytes(dims.latent as usize, dims.rope as usize),
        }
    }

    /// Rows of the projections of hidden states.
    pub(super) fn rows(self, dims: &Dims) -> u32 {
        match self {
            Kind::Grouped(groups) => (dims.heads + 2 * groups) * dims.head,
            Kind::Latent => dims.heads * (dims.nope + dims.rope) + dims.latent + dims.rope,
        }
    }
}

/// One layer's weights.
pub struct LayerWeights {
    pub(super) input: Weights,
    pub(super) output: Weights,
    /// MLA's up-projections.
    pub(super) kv_b: Option<Weights>,
}

/// A matrix of normal numbers that keep the size of what they are multiplied with; its rows are parts of one
/// table, since drawing millions would take longer than all else.
fn matrix(device: &Device, table: &[f32], (rows, columns): (u32, u32), group: u32, label: &str) -> Result<Weights> {
    let (rows, columns) = (rows as usize, columns as usize);
    let factor = 10.0 / (columns as f32).sqrt();
    let values: Vec<f32> = (0..rows)
        .flat_map(|row| table.iter().cycle().skip(row * 7919 % table.len()).take(columns).map(move |v| v * factor))
        .collect();
    let format = WeightFormat::F16;
    Weights::upload(device, &pack(&values, rows, columns, format), (rows, columns), format, group as usize, label)
}

impl LayerWeights {
    /// Drawn weights.
    ///
    /// # Errors
    /// As [`Weights::upload`].
    pub fn new(device: &Device, kind: Kind, dims: &Dims) -> Result<LayerWeights> {
        let table = Inputs::seed(2).flashmla(65_521);
        let each = dims.nope + dims.head;
        let kv_b = || matrix(device, &table, (dims.heads * each, dims.latent), each, "up-projections");
        Ok(LayerWeights {
            input: matrix(device, &table, (kind.rows(dims), dims.hidden), 1, "projections")?,
            output: matrix(device, &table, (dims.hidden, dims.heads * dims.head), 1, "output projection")?,
            kv_b: if kind == Kind::Latent { Some(kv_b()?) } else { None },
        })
    }

    /// Bytes of all of them.
    pub fn bytes(&self) -> u64 {
        let matrices = [Some(&self.input), Some(&self.output), self.kv_b.as_ref()];
        matrices.into_iter().flatten().flat_map(|weights| &weights.chunks).map(|chunk| chunk.view.size()).sum()
    }
}
