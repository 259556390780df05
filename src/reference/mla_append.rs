//! Twin of `mla_append`: what one token leaves in the latent cache.

use crate::num::rope::{BLOCK, RopeLayout};

/// A token's compressed key and value before the cache, and what they are changed with.
#[derive(Clone, Copy)]
pub struct Token<'a> {
    /// `[r]`
    pub latent: &'a [f32],
    /// `[p]`
    pub rope: &'a [f32],
    /// Its position in its sequence.
    pub position: u32,
    /// `[r]`, of the norm.
    pub weight: &'a [f32],
    /// Added to the mean square.
    pub eps: f32,
    /// Factor of the latent after its norm.
    pub scale: f32,
    /// `[256 + blocks, p / 2]` of (cos, sin).
    pub table: &'a [[f32; 2]],
    /// Which elements turn together.
    pub layout: RopeLayout,
}

impl Token<'_> {
    /// The normalised latent `[r]` and the turned rope key `[p]`.
    pub fn values(&self) -> (Vec<f32>, Vec<f32>) {
        let squares: f64 = self.latent.iter().map(|x| f64::from(*x) * f64::from(*x)).sum();
        let mean = squares / self.latent.len() as f64;
        let factor = f64::from(self.scale) / (mean + f64::from(self.eps)).sqrt();
        let scaled = |(x, w): (&f32, &f32)| (f64::from(*x) * factor * f64::from(*w)) as f32;
        let latent = self.latent.iter().zip(self.weight).map(scaled).collect();
        let rope = turned(self.rope, self.position, self.table, self.layout);
        (latent, rope.into_iter().map(|v| v as f32).collect())
    }
}

/// The slice `[p]` turned to `position` with the table `[256 + blocks, p / 2]` of (cos, sin).
pub fn turned(slice: &[f32], position: u32, table: &[[f32; 2]], layout: RopeLayout) -> Vec<f64> {
    let pairs = slice.len() / 2;
    let mut turned = vec![0.0; slice.len()];
    for pair in 0..pairs {
        let row = |row: u32| table[row as usize * pairs + pair].map(f64::from);
        let ([c, s], [block_c, block_s]) = (row(position % BLOCK), row(BLOCK + position / BLOCK));
        let (cos, sin) = (c * block_c - s * block_s, s * block_c + c * block_s);
        let [i, j] = layout.elements(pair, pairs);
        let (x, y) = (f64::from(slice[i]), f64::from(slice[j]));
        (turned[i], turned[j]) = (x * cos - y * sin, x * sin + y * cos);
    }
    turned
}
