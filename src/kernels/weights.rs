//! Weight matrices on a device: `[rows, stride]`, cut into chunks that each fit one binding.

use half::{bf16, f16};

use crate::gpu::{Device, Source, View};
use crate::{Result, wgsl};

/// Values that the shaders' `weights_*` modules decode at a time; rows are padded to it.
pub const BLOCK: usize = 32;

/// How a weight is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WeightFormat {
    /// IEEE half precision.
    F16,
    /// The upper half of f32.
    Bf16,
    /// f32.
    F32,
}

impl WeightFormat {
    /// Every format.
    pub const ALL: [WeightFormat; 3] = [WeightFormat::F16, WeightFormat::Bf16, WeightFormat::F32];

    /// Bytes of a value.
    pub fn bytes(self) -> usize {
        if self == WeightFormat::F32 { 4 } else { 2 }
    }

    /// Bytes of a block of [`BLOCK`] values.
    pub fn block_bytes(self) -> usize {
        self.bytes() * BLOCK
    }

    /// Bytes of a row of `columns` values with its padding.
    pub fn row_bytes(self, columns: usize) -> usize {
        columns.div_ceil(BLOCK) * self.block_bytes()
    }

    /// The values that whole blocks hold.
    pub fn decode(self, bytes: &[u8]) -> Vec<f32> {
        match self {
            WeightFormat::F16 => bytemuck::pod_collect_to_vec::<u8, f16>(bytes).iter().map(|v| v.to_f32()).collect(),
            WeightFormat::Bf16 => bytemuck::pod_collect_to_vec::<u8, bf16>(bytes).iter().map(|v| v.to_f32()).collect(),
            WeightFormat::F32 => bytemuck::pod_collect_to_vec(bytes),
        }
    }

    /// The module that reads and decodes parts of a row, for products.
    pub(super) fn module(self) -> Source {
        match self {
            WeightFormat::F16 => wgsl!("lib/weights_f16"),
            WeightFormat::Bf16 => wgsl!("lib/weights_bf16"),
            WeightFormat::F32 => wgsl!("lib/weights_f32"),
        }
    }

    /// The module that reads four values.
    pub(super) fn unpack4(self) -> Source {
        match self {
            WeightFormat::F16 => wgsl!("lib/unpack4_f16"),
            WeightFormat::Bf16 => wgsl!("lib/unpack4_bf16"),
            WeightFormat::F32 => wgsl!("lib/unpack4_f32"),
        }
    }
}

/// `values` `[rows, columns]` in `format`, each row padded with zeros to whole blocks.
///
/// # Panics
/// When the values are not `rows * columns`.
pub fn pack(values: &[f32], rows: usize, columns: usize, format: WeightFormat) -> Vec<u8> {
    assert_eq!(values.len(), rows * columns, "a matrix [{rows}, {columns}]");
    let mut bytes = Vec::with_capacity(rows * format.row_bytes(columns));
    for row in 0..rows {
        for v in &values[row * columns..(row + 1) * columns] {
            match format {
                WeightFormat::F16 => bytes.extend_from_slice(&f16::from_f32(*v).to_le_bytes()),
                WeightFormat::Bf16 => bytes.extend_from_slice(&bf16::from_f32(*v).to_le_bytes()),
                WeightFormat::F32 => bytes.extend_from_slice(&v.to_le_bytes()),
            }
        }
        bytes.resize((row + 1) * format.row_bytes(columns), 0);
    }
    bytes
}

/// The chunks of a matrix as `(first row, rows)`: each at most `limit` bytes, cut at multiples of
/// `group` rows (an expert's, a head's); `None` where one group is over the limit.
pub fn split(rows: usize, row_bytes: usize, group: usize, limit: u64) -> Option<Vec<(usize, usize)>> {
    let groups = usize::try_from(limit / (group * row_bytes).max(1) as u64).unwrap_or(usize::MAX);
    let most = groups.saturating_mul(group);
    (most > 0).then(|| (0..rows).step_by(most).map(|first| (first, most.min(rows - first))).collect())
}

/// Rows of a matrix within one binding.
#[derive(Clone, Debug)]
pub struct WeightChunk {
    /// Its first row's number in the matrix.
    pub first_row: usize,
    /// How many rows it holds.
    pub rows: usize,
    /// `[rows, stride]`.
    pub view: View,
}

/// A matrix on a device.
#[derive(Clone, Debug)]
pub struct Weights {
    /// How it is stored.
    pub format: WeightFormat,
    /// Rows in all chunks.
    pub rows: usize,
    /// Values of a row, without its padding.
    pub columns: usize,
    /// `columns` rounded up to [`BLOCK`].
    pub stride: usize,
    /// In the order of their rows, with none left out.
    pub chunks: Vec<WeightChunk>,
}

impl Weights {
    /// Some of its rows, on the same memory; they start where a binding may, at a multiple of 256 bytes of a
    /// chunk.
    ///
    /// # Panics
    /// When the rows are not all there, or do not start so.
    pub fn part(&self, rows: std::ops::Range<usize>) -> Weights {
        assert!(rows.end <= self.rows, "rows {rows:?} of {}", self.rows);
        let row = self.format.row_bytes(self.columns);
        let cut = |chunk: &WeightChunk| {
            let (from, to) = (rows.start.max(chunk.first_row), rows.end.min(chunk.first_row + chunk.rows));
            let offset = ((from.max(chunk.first_row) - chunk.first_row) * row) as u64;
            (from < to).then(|| {
                assert!(offset.is_multiple_of(256), "rows from {} on start at {offset} bytes of a chunk", rows.start);
                let view = chunk.view.part(offset, ((to - from) * row) as u64);
                WeightChunk { first_row: from - rows.start, rows: to - from, view }
            })
        };
        Weights { rows: rows.len(), chunks: self.chunks.iter().filter_map(cut).collect(), ..self.clone() }
    }

    /// Uploads what [`pack`] gives. Chunks end at multiples of `group` rows.
    ///
    /// # Errors
    /// [`crate::Error::Usage`] when `group` rows are over the device's largest binding; else as
    /// [`Device::upload`].
    ///
    /// # Panics
    /// When the bytes are not those of `rows` packed rows.
    pub fn upload(
        device: &Device,
        bytes: &[u8],
        (rows, columns): (usize, usize),
        format: WeightFormat,
        group: usize,
        label: &str,
    ) -> Result<Weights> {
        let row = format.row_bytes(columns);
        assert_eq!(bytes.len(), rows * row, "{label}: bytes of a packed matrix [{rows}, {columns}]");
        let limit = device.caps().binding_bytes;
        let Some(cuts) = split(rows, row, group, limit) else {
            return Err(crate::Error::Usage {
                what: format!("{label}: {group} rows that must stay in one binding"),
                expected: format!("at most {limit} bytes on {}", device.caps().label()),
                found: format!("{} bytes", group * row),
            });
        };
        let chunk = |(first_row, rows): (usize, usize)| {
            let part = &bytes[first_row * row..(first_row + rows) * row];
            Ok(WeightChunk { first_row, rows, view: device.upload(part, label)?.view() })
        };
        let chunks = cuts.into_iter().map(chunk).collect::<Result<_>>()?;
        Ok(Weights { format, rows, columns, stride: columns.next_multiple_of(BLOCK), chunks })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_padded_with_zeros_to_whole_blocks() {
        for format in WeightFormat::ALL {
            let values: Vec<f32> = (1..=66).map(|v| v as f32).collect();
            let decoded = format.decode(&pack(&values, 2, 33, format));
            assert_eq!(decoded.len(), 128);
            assert_eq!((&decoded[..33], &decoded[64..97]), (&values[..33], &values[33..]));
            assert!(decoded[33..64].iter().chain(&decoded[97..]).all(|v| *v == 0.0));
        }
    }

    #[test]
    fn chunks_fit_the_limit_and_end_at_group_borders() {
        assert_eq!(split(10, 64, 1, 64 * 4), Some(vec![(0, 4), (4, 4), (8, 2)]));
        assert_eq!(split(12, 64, 3, 64 * 4), Some(vec![(0, 3), (3, 3), (6, 3), (9, 3)]));
        assert_eq!(split(6, 64, 3, 64 * 3 - 1), None);
        assert_eq!(split(5, 64, 1, 1 << 20), Some(vec![(0, 5)]));
    }
}
