//! Seeded test inputs, the same on every platform.

use half::f16;

use super::Data;

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

/// Structs as the words that a kernel reads.
pub fn words<T: bytemuck::Pod>(values: &[T]) -> Data {
    Data::U32(bytemuck::pod_collect_to_vec(values))
}
