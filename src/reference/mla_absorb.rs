//! Twin of `mla_absorb`: one head's query for the latent cache.

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
    fn queries_grow_with_each_length() {
        assert_eq!(growth(8191, 0.1, 8192), 1.0);
        assert!((growth(8192, 0.1, 8192) - (1.0 + 0.1 * 2f64.ln())).abs() < 1e-8);
        assert_eq!(growth(70_000, 0.0, 0), 1.0);
    }
}
