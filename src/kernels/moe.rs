//! Products of tokens with the matrices of their experts: what `moe_gemv` and `moe_gemm` have in common.

use super::linear::{Activations, Epilogue};
use super::weights::{WeightFormat, Weights};
use crate::gpu::{Host, Snapshot, View};

/// The two products of an expert.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// `silu(gate x) * up x` for each pair (token, slot): row 2i of the matrix is a gate, 2i + 1 its up.
    Up,
    /// The product with what `Up` gave of the same pair.
    Down,
}

impl Step {
    /// What becomes of the matrix's rows.
    pub fn epilogue(self) -> Epilogue {
        if self == Step::Up { Epilogue::Swiglu } else { Epilogue::Store }
    }
}

/// The matrices of a layer's experts, one under the other: `[experts * rows, columns]`. The chunks
/// are cut between experts (`group` of [`Weights::upload`] is `rows`).
#[derive(Clone, Copy, Debug)]
pub struct Experts<'a> {
    /// All rows.
    pub weights: &'a Weights,
    /// Experts with weights.
    pub count: u32,
}

/// The experts of one chunk.
pub(super) struct ExpertChunk {
    pub first_expert: u32,
    pub experts: u32,
    pub view: View,
}

impl Experts<'_> {
    /// Rows of an expert.
    pub fn rows(&self) -> u32 {
        self.weights.rows as u32 / self.count.max(1)
    }

    /// The chunks of experts.
    ///
    /// # Panics
    /// When the matrix is not of `format`, its rows are no multiple of the experts, or a chunk is not
    /// cut between experts.
    pub(super) fn chunks(&self, kernel: &str, format: WeightFormat, step: Step) -> Vec<ExpertChunk> {
        let Experts { weights, count } = *self;
        let rows = self.rows() as usize;
        assert!(weights.format == format, "{kernel} for {format:?} got matrices of {:?}", weights.format);
        let whole = rows > 0 && rows * count as usize == weights.rows && rows.is_multiple_of(step.epilogue().rows());
        assert!(whole, "{kernel} {step:?}: {} rows for {count} experts", weights.rows);
        let part = |chunk: &super::weights::WeightChunk| {
            let whole = chunk.first_row.is_multiple_of(rows) && chunk.rows.is_multiple_of(rows);
            let (first, count) = (chunk.first_row, chunk.rows);
            assert!(whole, "{kernel}: a chunk of {count} rows from {first} cuts an expert of {rows}");
            let bytes = (chunk.rows * format.row_bytes(weights.columns)) as u64;
            assert!(chunk.view.size() >= bytes, "{kernel}: a chunk of {bytes} bytes has {}", chunk.view.size());
            ExpertChunk {
                first_expert: (chunk.first_row / rows) as u32,
                experts: (chunk.rows / rows) as u32,
                view: chunk.view.clone(),
            }
        };
        weights.chunks.iter().map(part).collect()
    }

    /// Blocks from one row to the next.
    pub(super) fn blocks(&self) -> u32 {
        (self.weights.format.row_bytes(self.weights.columns) / self.weights.format.block_bytes()) as u32
    }
}

/// # Panics
/// When `rows` whole rows of `length` elements do not stand in `part`.
pub(super) fn check(what: &str, part: &Activations, rows: u32, length: u32) {
    let Activations { view, stride, offset } = part;
    let fits = stride.is_multiple_of(4) && *stride >= length && *offset == 0;
    assert!(fits, "{what}: rows of {length} elements from 0, not stride {stride} and offset {offset}");
    let bytes = 4 * (u64::from(rows.saturating_sub(1)) * u64::from(*stride) + u64::from(length));
    assert!(view.size() >= bytes, "{what}: {rows} rows take {bytes} bytes, not {}", view.size());
}

/// A chunk's matrices in host memory, for the twins.
pub(super) struct Matrices {
    bytes: Snapshot<u8>,
    format: WeightFormat,
    rows: usize,
    columns: usize,
}

impl Matrices {
    pub fn of(host: &Host, format: WeightFormat, rows: u32, columns: u32) -> Matrices {
        Matrices { bytes: host.get("weights"), format, rows: rows as usize, columns: columns as usize }
    }

    /// The rows of the chunk's expert `at`.
    pub fn expert(&self, at: u32) -> Vec<Vec<f32>> {
        let row = self.format.row_bytes(self.columns);
        let rows = self.bytes[at as usize * self.rows * row..].chunks_exact(row).take(self.rows);
        rows.map(|row| self.format.decode(row)[..self.columns].to_vec()).collect()
    }
}
