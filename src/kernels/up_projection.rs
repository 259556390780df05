//! The up-projections `kv_b` in their published layout `[heads, n + v, r]`: for each head n rows of
//! W_UK, then v rows of W_UV. The kernels read them in chunks cut between heads.

use super::Data;
use super::inputs::Inputs;
use super::weights::{WeightFormat, pack};
use crate::gpu::View;

/// The up-projections of some heads, in one buffer.
#[derive(Clone, Debug)]
pub struct HeadChunk {
    /// Its first head.
    pub first_head: u32,
    /// How many heads it holds.
    pub heads: u32,
    /// `[heads * (n + v), stride]`, a row of r elements rounded up to 32, the padding zero.
    pub view: View,
}

/// Elements from one row of `kv_b` to the next.
pub fn stride(latent: u32) -> u32 {
    latent.next_multiple_of(32)
}

/// The head counts of `chunks` chunks that hold `heads`, as even as it goes.
pub(super) fn cut(heads: u32, chunks: u32) -> Vec<u32> {
    let step = heads.div_ceil(chunks);
    (0..heads.div_ceil(step)).map(|i| step.min(heads - i * step)).collect()
}

/// Drawn up-projections of one chunk, `rows` rows of `latent` elements.
pub(super) fn draw(inputs: &mut Inputs, format: WeightFormat, rows: usize, latent: usize) -> Data {
    let values = inputs.normals(rows * latent, 1.0 / (latent as f32).sqrt());
    Data::U8(pack(&values, rows, latent, format))
}
