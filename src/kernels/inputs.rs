//! Seeded test inputs, the same on every platform.

use half::f16;

use super::{Check, Data, Tolerance};

/// A seeded stream of numbers.
pub struct Inputs(fastrand::Rng);

impl Inputs {
    /// The stream of a seed.
    pub fn seed(seed: u64) -> Inputs {
        Inputs(fastrand::Rng::with_seed(seed))
    }

    /// Any number: the seed of another stream.
    pub fn any(&mut self) -> u64 {
        self.0.u64(..)
    }

    /// Below `end`.
    pub fn below(&mut self, end: u32) -> u32 {
        self.0.u32(..end)
    }

    /// Uniform in [0, 1).
    pub fn uniform(&mut self) -> f32 {
        self.0.f32()
    }

    /// A standard normal number (Box and Muller 1958).
    pub fn normal(&mut self) -> f32 {
        let (u, v) = (1.0 - self.0.f64(), self.0.f64());
        ((-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()) as f32
    }

    /// `len` normal numbers times `scale`.
    pub fn normals(&mut self, len: usize, scale: f32) -> Vec<f32> {
        (0..len).map(|_| self.normal() * scale).collect()
    }

    /// `len` normal numbers times `scale`, rounded to f16.
    pub fn normals_f16(&mut self, len: usize, scale: f32) -> Vec<f16> {
        (0..len).map(|_| f16::from_f32(self.normal() * scale)).collect()
    }

    /// FlashMLA's test values: normal / 10, clamped to [-1, 1].
    pub fn flashmla(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| (self.normal() / 10.0).clamp(-1.0, 1.0)).collect()
    }

    /// `len` values at random places of `table`.
    pub fn pick<'a>(&'a mut self, table: &'a [f32], len: usize) -> impl Iterator<Item = f32> + 'a {
        (0..len).map(move |_| table[self.0.usize(..table.len())])
    }

    /// Shuffles in place.
    pub fn shuffle<T>(&mut self, values: &mut [T]) {
        self.0.shuffle(values);
    }
}

/// `rows` rows of `columns` values, laid out at `stride` with NaN in the padding: a kernel that
/// reads padding shows.
pub fn strided(values: &[f32], columns: usize, stride: usize) -> Vec<f32> {
    let mut out = Vec::with_capacity(values.len() / columns.max(1) * stride);
    for row in values.chunks_exact(columns) {
        out.extend_from_slice(row);
        out.resize(out.len() + stride - columns, f32::NAN);
    }
    out
}

/// What stands in the rest of a row: it shows when read into a sum and when written over.
const NEIGHBOUR: f32 = 1e30;

/// Rows of `length` values at (stride, offset); neighbours around them, NaN where only padding is.
pub fn placed(values: &[f32], length: usize, (stride, offset): (usize, usize)) -> Vec<f32> {
    if stride == length.next_multiple_of(4) {
        return strided(values, length, stride);
    }
    let mut out = vec![NEIGHBOUR; values.len() / length * stride];
    for (row, values) in out.chunks_exact_mut(stride).zip(values.chunks_exact(length)) {
        row[offset..offset + length].copy_from_slice(values);
    }
    out
}

/// The part of [`placed`] rows within its tolerance, and its neighbours unchanged.
pub fn checks(length: usize, (stride, offset): (usize, usize), tolerance: Tolerance) -> Vec<Check> {
    let part = |first, columns, tolerance| Check { stride, first, columns, tolerance };
    let mut checks = vec![part(offset, length, tolerance)];
    if stride != length.next_multiple_of(4) {
        checks.push(part(0, offset, Tolerance::EXACT));
        checks.push(part(offset + length, stride - offset - length, Tolerance::EXACT));
    }
    checks.retain(|c| c.columns > 0);
    checks
}

/// Structs as the words that a kernel reads.
pub fn words<T: bytemuck::Pod>(values: &[T]) -> Data {
    Data::U32(bytemuck::pod_collect_to_vec(values))
}
