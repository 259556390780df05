//! The up-projections `kv_b` in their published layout `[heads, n + v, r]`: for each head n rows of
//! W_UK, then v rows of W_UV. The kernels read them in chunks cut between heads.

use half::{bf16, f16};

use super::Data;
use super::embed::Format;
use super::inputs::Inputs;
use crate::gpu::{Source, View};
use crate::wgsl;

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

/// The module that reads four elements of a row.
pub(super) fn unpack_module(format: Format) -> Source {
    match format {
        Format::F16 => wgsl!("lib/unpack4_f16"),
        Format::Bf16 => wgsl!("lib/unpack4_bf16"),
        Format::F32 => wgsl!("lib/unpack4_f32"),
    }
}

/// The head counts of `chunks` chunks that hold `heads`, as even as it goes.
pub(super) fn cut(heads: u32, chunks: u32) -> Vec<u32> {
    let step = heads.div_ceil(chunks);
    (0..heads.div_ceil(step)).map(|i| step.min(heads - i * step)).collect()
}

/// Drawn up-projections of one chunk, `rows` rows of `latent` elements.
pub(super) fn draw(inputs: &mut Inputs, format: Format, rows: usize, latent: usize) -> Data {
    let stride = stride(latent as u32) as usize;
    let mut values = Vec::with_capacity(rows * stride);
    for _ in 0..rows {
        values.extend(inputs.normals(latent, 1.0 / (latent as f32).sqrt()));
        values.resize(values.len() + stride - latent, 0.0);
    }
    match format {
        Format::F16 => Data::F16(values.into_iter().map(f16::from_f32).collect()),
        Format::F32 => Data::F32(values),
        Format::Bf16 => {
            let bits: Vec<u16> = values.into_iter().map(|v| bf16::from_f32(v).to_bits()).collect();
            Data::U8(bytemuck::cast_slice(&bits).to_vec())
        }
    }
}
