//! Twin of `mla_absorb`: one head's query for the latent cache.

use super::mla_append::turned;
use crate::num::rope::RopeLayout;

/// `W_UK^T q_nope` `[r]`: `rows` are the n rows of the head's W_UK, `q_nope` is `[n]`.
pub fn absorb<'a>(q_nope: &[f32], rows: impl Iterator<Item = &'a [f32]>, r: usize) -> Vec<f64> {
    let mut absorbed = vec![0.0; r];
    for (q, row) in q_nope.iter().zip(rows) {
        for (a, w) in absorbed.iter_mut().zip(row) {
            *a += f64::from(*q) * f64::from(*w);
        }
    }
    absorbed
}

/// By how much a query at `position` grows: `1 + beta ln(1 + floor(position / length))`.
pub fn growth(position: u32, beta: f32, length: u32) -> f64 {
    1.0 + f64::from(beta) * f64::from(position / length.max(1)).ln_1p()
}

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
    fn absorbing_is_the_product_with_the_transpose() {
        let rows: [&[f32]; 2] = [&[1.0, 2.0, 3.0, 9.0], &[10.0, 20.0, 30.0, 9.0]];
        assert_eq!(absorb(&[2.0, 0.5], rows.into_iter(), 3), [7.0, 14.0, 21.0]);
    }

    #[test]
    fn absorbed_attention_is_the_materialised_one() {
        use crate::reference::mla_combine::{merge, values};
        use crate::reference::mla_prefill::{Key, attend};
        const N: usize = 3;
        const P: usize = 2;
        const V: usize = 5;
        const R: usize = 4;
        const KEYS: usize = 7;
        let draw = |len: usize, seed: f32| (0..len).map(|i| (i as f32 * 1.37 + seed).sin()).collect::<Vec<f32>>();
        let (w_uk, w_uv, query) = (draw(N * R, 0.1), draw(V * R, 0.2), draw(N + P, 0.3));
        let (latents, ropes) = (draw(KEYS * R, 0.4), draw(KEYS * P, 0.5));
        let product = |w: &[f32], c: &[f32]| -> Vec<f32> {
            w.chunks_exact(R).map(|row| row.iter().zip(c).map(|(w, c)| w * c).sum()).collect()
        };
        let expanded: Vec<_> = latents.chunks_exact(R).map(|c| (product(&w_uk, c), product(&w_uv, c))).collect();
        let both = expanded.iter().zip(ropes.chunks_exact(P));
        let keys: Vec<Key> = both.map(|((nope, value), rope)| Key { nope, rope, value }).collect();
        let (expected, expected_lse) = attend(&query, &keys, V, 0.7);

        let mut absorbed = absorb(&query[..N], w_uk.chunks_exact(R), R);
        absorbed.extend(query[N..].iter().map(|q| f64::from(*q)));
        // Every token is a part of its own, its score the log-sum-exp.
        let score = |c: &[f32], k_pe: &[f32]| -> f64 {
            0.7 * absorbed.iter().zip(c.iter().chain(k_pe)).map(|(q, k)| q * f64::from(*k)).sum::<f64>()
        };
        let records = latents.chunks_exact(R).zip(ropes.chunks_exact(P));
        let parts: Vec<_> = records.map(|(c, k_pe)| (c, score(c, k_pe))).collect();
        let (latent, lse) = merge(&parts, R);
        let found = values(&latent, w_uv.chunks_exact(R));
        assert!((lse - expected_lse).abs() < 1e-6, "{lse}, expected {expected_lse}");
        found
            .iter()
            .zip(&expected)
            .for_each(|(f, e)| assert!((f - e).abs() < 1e-6, "{found:?}, expected {expected:?}"));
    }

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

    #[test]
    fn queries_grow_with_each_length() {
        assert_eq!(growth(8191, 0.1, 8192), 1.0);
        assert!((growth(8192, 0.1, 8192) - (1.0 + 0.1 * 2f64.ln())).abs() < 1e-8);
        assert_eq!(growth(70_000, 0.0, 0), 1.0);
    }
}
