//! Twin of `mla_decode_fused`: a query absorbed, attended and expanded without leaving f64 but where the
//! kernels that it fuses would store f32.

use super::mla_absorb::{absorb, growth};
use super::mla_append::turned;
use crate::num::rope::RopeLayout;

/// What turns a head's query into one for the latent cache.
pub struct Absorb<'a> {
    /// `[n + p]`, the rope part not turned.
    pub query: &'a [f32],
    /// The n rows of the head's W_UK, each of at least r values.
    pub w_uk: Vec<&'a [f32]>,
    /// Width of the latent.
    pub latent: usize,
    /// The token's position.
    pub position: u32,
    /// Softmax scale times log2(e).
    pub scale: f32,
    /// Growth of the queries with the position.
    pub growth: (f32, u32),
    /// (cos, sin) rows, as `num::rope` makes them.
    pub table: &'a [[f32; 2]],
    /// Which elements of the rope part turn together.
    pub layout: RopeLayout,
}

impl Absorb<'_> {
    /// The absorbed query `[r + p]`.
    pub fn query(&self) -> Vec<f32> {
        let (q_nope, q_pe) = self.query.split_at(self.w_uk.len());
        let mut query = absorb(q_nope, self.w_uk.iter().copied(), self.latent);
        query.extend(turned(q_pe, self.position, self.table, self.layout));
        let factor = f64::from(self.scale) * growth(self.position, self.growth.0, self.growth.1);
        query.iter().map(|x| (x * factor) as f32).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_query_is_absorbed_turned_and_scaled() {
        let rows: [&[f32]; 2] = [&[1.0, 2.0, 9.0], &[10.0, 20.0, 9.0]];
        let table = [[1.0, 0.0], [0.0, 1.0]]; // as rows 0 and 256 would turn by a quarter in all
        let turns: Vec<[f32; 2]> = (0..257).map(|i| if i == 0 { table[0] } else { table[1] }).collect();
        let absorb = Absorb {
            query: &[2.0, 0.5, 3.0, 4.0],
            w_uk: rows.to_vec(),
            latent: 2,
            position: 0,
            scale: 0.5,
            growth: (0.0, 1),
            table: &turns,
            layout: RopeLayout::Interleaved,
        };
        assert_eq!(absorb.query(), [3.5, 7.0, -2.0, 1.5]);
    }
}
