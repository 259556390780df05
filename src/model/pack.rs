//! From a checkpoint's rows to the rows that kernels read: which format a matrix gets, and its bytes.
//!
//! A matrix takes the first format that keeps it:
//! 1. f16, where every row fits: no value is too large, those of bf16 tensors that are too small for f16
//!    lose at most 1e-6 of their row's norm together, and all others are exact;
//! 2. bf16, where every value is exact (packed, at the same size);
//! 3. f32.
//!
//! So f16 tensors stay f16, bf16 tensors become f16 or stay bf16, and f32 tensors shrink only where nothing
//! is lost. All matrices that are stacked into one get one format.

use std::sync::LazyLock;

use half::{bf16, f16};
use rayon::prelude::*;

use crate::kernels::weights::WeightFormat;
use crate::weights::Dtype;

/// A row of a tensor in a checkpoint.
#[derive(Clone, Copy)]
pub(super) struct Row<'a> {
    pub(super) dtype: Dtype,
    pub(super) bytes: &'a [u8],
}

/// A matrix as the kernels want its rows; `None` is a row of zeros.
pub(super) struct Matrix<'a> {
    pub(super) rows: usize,
    pub(super) columns: usize,
    pub(super) row: Box<dyn Fn(usize) -> Option<Row<'a>> + Sync + 'a>,
}

/// What the values of a row that are too small for f16 may lose together, of the row's norm.
const LOSS: f64 = 1e-6;

impl Matrix<'_> {
    /// Its format, and its bytes with rows padded to whole blocks.
    pub(super) fn pack(&self) -> (WeightFormat, Vec<u8>) {
        for format in [WeightFormat::F16, WeightFormat::Bf16] {
            let stride = format.row_bytes(self.columns);
            let mut bytes = vec![0; self.rows * stride];
            let fill = if format == WeightFormat::F16 { Row::fill_f16 } else { Row::fill_bf16 };
            let rows = bytes.par_chunks_mut(stride.max(1)).enumerate();
            if rows.all(|(i, out)| (self.row)(i).is_none_or(|row| fill(row, out))) {
                return (format, bytes);
            }
        }
        (WeightFormat::F32, self.pack_f32())
    }

    /// Its values as f32, with rows padded to whole blocks.
    pub(super) fn pack_f32(&self) -> Vec<u8> {
        let stride = WeightFormat::F32.row_bytes(self.columns);
        let mut bytes = vec![0; self.rows * stride];
        bytes.par_chunks_mut(stride.max(1)).enumerate().for_each(|(i, out)| {
            let Some(row) = (self.row)(i) else { return };
            bytemuck::cast_slice_mut::<u8, [u8; 4]>(out)
                .iter_mut()
                .zip(row.values())
                .for_each(|(out, v)| *out = v.to_le_bytes());
        });
        bytes
    }
}

impl Row<'_> {
    /// Some of its columns.
    pub(super) fn columns(self, from: usize, count: usize) -> Self {
        let size = self.dtype.bytes().expect("the table of tensors was checked");
        Row { bytes: &self.bytes[from * size..(from + count) * size], ..self }
    }

    /// Its 16-bit patterns.
    fn halves(&self) -> impl Iterator<Item = u16> {
        bytemuck::cast_slice::<u8, [u8; 2]>(self.bytes).iter().map(|bytes| u16::from_le_bytes(*bytes))
    }

    /// Its values.
    pub(super) fn values(&self) -> Box<dyn Iterator<Item = f32> + '_> {
        match self.dtype {
            Dtype::F16 => Box::new(self.halves().map(|bits| f16::from_bits(bits).to_f32())),
            Dtype::Bf16 => Box::new(self.halves().map(|bits| bf16::from_bits(bits).to_f32())),
            Dtype::F32 => {
                Box::new(bytemuck::cast_slice::<u8, [u8; 4]>(self.bytes).iter().map(|bytes| f32::from_le_bytes(*bytes)))
            }
            Dtype::Other(dtype) => unreachable!("{dtype:?} was refused when the table of tensors was checked"),
        }
    }

    /// Writes f16; whether the row fits.
    fn fill_f16(self, out: &mut [u8]) -> bool {
        let out = bytemuck::cast_slice_mut::<u8, [u8; 2]>(out);
        match self.dtype {
            Dtype::F16 => {
                out.iter_mut().zip(self.halves()).for_each(|(out, bits)| *out = bits.to_le_bytes());
                true
            }
            Dtype::Bf16 => {
                let mut fit = Fit::default();
                for (out, bits) in out.iter_mut().zip(self.halves()) {
                    *out = TO_F16[usize::from(bits)].to_le_bytes();
                    fit.add(bits);
                }
                fit.is_kept()
            }
            _ => {
                let mut fit = Fit::default();
                out.iter_mut().zip(self.values()).all(|(out, v)| {
                    let half = f16::from_f32(v);
                    *out = half.to_le_bytes();
                    let exact = half.to_f32() == v;
                    if let Some(bits) = upper(v) {
                        fit.add(bits);
                    }
                    exact || upper(v).is_some()
                }) && fit.is_kept()
            }
        }
    }

    /// Writes bf16; whether every value is exact.
    fn fill_bf16(self, out: &mut [u8]) -> bool {
        let out = bytemuck::cast_slice_mut::<u8, [u8; 2]>(out);
        if self.dtype == Dtype::Bf16 {
            out.iter_mut().zip(self.halves()).for_each(|(out, bits)| *out = bits.to_le_bytes());
            return true;
        }
        out.iter_mut().zip(self.values()).all(|(out, v)| {
            upper(v).is_some_and(|bits| {
                *out = bits.to_le_bytes();
                true
            })
        })
    }
}

/// The bf16 with a value, if there is one.
fn upper(value: f32) -> Option<u16> {
    let bits = value.to_bits();
    (bits & 0xffff == 0).then_some((bits >> 16) as u16)
}

/// The f16 nearest to each bf16.
static TO_F16: LazyLock<Vec<u16>> =
    LazyLock::new(|| (0..=u16::MAX).map(|bits| f16::from_f32(bf16::from_bits(bits).to_f32()).to_bits()).collect());

/// What a row of bf16 values loses as f16.
#[derive(Default)]
struct Fit {
    overflow: bool,
    /// Sum of the squares.
    norm: f64,
    /// Sum of the squares of what is lost.
    loss: f64,
}

impl Fit {
    /// The bf16 of 65536: f16 ends below it.
    const TOO_LARGE: u16 = 0x4780;
    /// The bf16 of 2^-17: from here on f16 holds the eight bits of a bf16.
    const EXACT: u16 = 0x3700;

    fn add(&mut self, bits: u16) {
        let (magnitude, value) = (bits & 0x7fff, f64::from(bf16::from_bits(bits).to_f32()));
        self.overflow |= magnitude >= Fit::TOO_LARGE;
        self.norm += value * value;
        if magnitude < Fit::EXACT {
            let half = f64::from(f16::from_bits(TO_F16[usize::from(bits)]).to_f32());
            self.loss += (half - value) * (half - value);
        }
    }

    fn is_kept(&self) -> bool {
        !self.overflow && self.loss <= LOSS * LOSS * self.norm
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One row of values in a dtype, packed.
    fn packed(dtype: Dtype, values: &[f32]) -> (WeightFormat, Vec<f32>) {
        let bytes: Vec<u8> = match dtype {
            Dtype::Bf16 => values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect(),
            Dtype::F16 => values.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect(),
            _ => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        };
        let row = Row { dtype, bytes: &bytes };
        let matrix = Matrix { rows: 1, columns: values.len(), row: Box::new(move |_| Some(row)) };
        let (format, bytes) = matrix.pack();
        (format, format.decode(&bytes)[..values.len()].to_vec())
    }

    #[test]
    fn every_bf16_from_2_to_the_minus_17_to_65280_is_exact_in_f16() {
        for bits in Fit::EXACT..Fit::TOO_LARGE {
            let value = bf16::from_bits(bits).to_f32();
            assert_eq!(f16::from_bits(TO_F16[usize::from(bits)]).to_f32(), value);
            assert_eq!(f16::from_bits(TO_F16[usize::from(bits | 0x8000)]).to_f32(), -value);
        }
        let below = bf16::from_bits(Fit::EXACT - 1).to_f32();
        assert_ne!(f16::from_f32(below).to_f32(), below);
        assert_eq!(bf16::from_bits(Fit::TOO_LARGE).to_f32(), 65536.0);
    }

    #[test]
    fn bf16_becomes_f16_where_its_values_fit_and_stays_where_they_do_not() {
        let (bf16, f16) = (Dtype::Bf16, WeightFormat::F16);
        assert_eq!(
            packed(bf16, &[0.0, -1.5, 65280.0, 2f32.powi(-17)]),
            (f16, vec![0.0, -1.5, 65280.0, 2f32.powi(-17)])
        );
        assert_eq!(packed(bf16, &[65536.0, 1.0]), (WeightFormat::Bf16, vec![65536.0, 1.0]));
        // Next to a value of common size a tiny one may vanish; alone it may not.
        assert_eq!(packed(bf16, &[0.5, 2f32.powi(-26)]), (f16, vec![0.5, 0.0]));
        assert_eq!(packed(bf16, &[2f32.powi(-26); 2]), (WeightFormat::Bf16, vec![2f32.powi(-26); 2]));
        let infinite = packed(bf16, &[f32::INFINITY, 1.0]);
        assert_eq!(infinite, (WeightFormat::Bf16, vec![f32::INFINITY, 1.0]));
        assert!(packed(bf16, &[f32::NAN]).1[0].is_nan());
    }

    #[test]
    fn f16_stays_and_f32_shrinks_only_without_loss() {
        assert_eq!(packed(Dtype::F16, &[6.1e-8, 65504.0]).0, WeightFormat::F16);
        assert_eq!(packed(Dtype::F32, &[0.1, 1.0]), (WeightFormat::F32, vec![0.1, 1.0]));
        assert_eq!(packed(Dtype::F32, &[1.0 + 2f32.powi(-10), 3.0]).0, WeightFormat::F16);
        assert_eq!(packed(Dtype::F32, &[65536.0, 3.0]).0, WeightFormat::Bf16);
        assert_eq!(packed(Dtype::F32, &[65536.0, 1.0 + 2f32.powi(-10)]).0, WeightFormat::F32);
    }

    #[test]
    fn rows_are_padded_and_missing_rows_are_zero() {
        let bytes = bf16::from_f32(1.0).to_le_bytes().repeat(40);
        let row = Row { dtype: Dtype::Bf16, bytes: &bytes };
        let matrix = Matrix { rows: 2, columns: 40, row: Box::new(move |i| (i == 1).then_some(row)) };
        let (format, bytes) = matrix.pack();
        let values = format.decode(&bytes);
        assert_eq!(values.len(), 128);
        assert!(values[..64].iter().chain(&values[104..]).all(|v| *v == 0.0));
        assert!(values[64..104].iter().all(|v| *v == 1.0));
    }
}
