//! Products on matrix units, as [`super::linear`] takes them: `pack_rows`, then `gemm_coop` with tiles that suit.

use std::sync::OnceLock;

use super::Kernel;
use super::gemm_coop::{self, GemmCoop};
use super::linear::{Epilogue, Product};
use super::pack_rows::{self, PackRows, Packed};
use super::weights::{BLOCK, WeightFormat};
use crate::Result;
use crate::gpu::{Caps, Device, Recording};

/// Products on matrix units, with the memory for packed activations.
pub(super) struct Matrices {
    pack: PackRows,
    packed: Packed,
    /// The fragments that the device has tiles for.
    under: Vec<u32>,
    /// By epilogue and fragments.
    gemm: Vec<OnceLock<GemmCoop>>,
    /// With outputs as f16, by fragments.
    halves: [OnceLock<GemmCoop>; 3],
}

/// Bytes of packed activations: f16, rows of whole blocks.
pub fn packed_bytes(tokens: u32, columns: u32) -> u64 {
    2 * u64::from(tokens) * u64::from(columns.next_multiple_of(BLOCK as u32))
}

impl Matrices {
    /// With memory for steps of `tokens` tokens and at most `columns` activations each.
    pub fn new(device: &Device, tokens: u32, columns: u32) -> Result<Matrices> {
        Ok(Matrices {
            pack: PackRows::chosen(&pack_rows::Spec, device.caps()),
            under: gemm_coop::fragments_under(device.caps()),
            packed: Packed {
                values: device.alloc(packed_bytes(tokens, columns), "packed activations")?.view(),
                scales: device.alloc(4 * u64::from(tokens), "scales of packed activations")?.view(),
            },
            gemm: (0..Epilogue::ALL.len() * gemm_coop::FRAGMENTS.len()).map(|_| OnceLock::new()).collect(),
            halves: Default::default(),
        })
    }

    /// Whether it takes matrices of that format and so many columns, and the memory holds so many tokens.
    pub fn holds(&self, format: WeightFormat, tokens: u32, columns: u32) -> bool {
        let Packed { values, scales } = &self.packed;
        let fits = packed_bytes(tokens, columns) <= values.size() && 4 * u64::from(tokens) <= scales.size();
        format == WeightFormat::F16 && fits
    }

    /// Whether it takes a product.
    pub fn fits(&self, product: &Product) -> bool {
        self.holds(product.weights.format, product.tokens, product.weights.columns as u32)
    }

    /// Adds a product, with f16 outputs or f32: a dispatch for the activations, and one for each chunk of the matrix.
    pub fn record(&self, recording: &mut Recording, epilogue: Epilogue, product: &Product, halves: bool, caps: &Caps) {
        let Product { weights, x, tokens, .. } = *product;
        let params = pack_rows::Params {
            rows: tokens,
            length: weights.columns as u32,
            blocks: weights.columns.div_ceil(BLOCK) as u32,
            x_stride: x.stride,
            x_offset: x.offset,
        };
        self.pack.record(recording, params, x.view.clone(), &self.packed);
        let fragments = gemm_coop::fragments(weights.rows as u32, tokens, &self.under);
        let class = gemm_coop::FRAGMENTS.iter().position(|f| *f == fragments).expect("it is one of them");
        let spec = gemm_coop::Spec { epilogue, fragments, halves };
        let made = match halves {
            true => &self.halves[class],
            false => &self.gemm[epilogue as usize * gemm_coop::FRAGMENTS.len() + class],
        };
        let made = made.get_or_init(|| GemmCoop::chosen(&spec, caps));
        made.record(recording, &Product { packed: Some(&self.packed), ..*product });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_tokens_are_taken_than_there_are_scales_for_however_short_their_rows() {
        let matrices = Matrices::new(&Device::cpu_as(Caps::matrices()), 64, 4096).unwrap();
        assert!(matrices.holds(WeightFormat::F16, 64, 4096) && matrices.holds(WeightFormat::F16, 64, 1));
        assert!(!matrices.holds(WeightFormat::F16, 65, 32) && !matrices.holds(WeightFormat::F16, 64, 4097));
        assert!(!matrices.holds(WeightFormat::F32, 1, 1));
    }
}
