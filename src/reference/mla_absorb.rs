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
    fn queries_grow_with_each_length() {
        assert_eq!(growth(8191, 0.1, 8192), 1.0);
        assert!((growth(8192, 0.1, 8192) - (1.0 + 0.1 * 2f64.ln())).abs() < 1e-8);
        assert_eq!(growth(70_000, 0.0, 0), 1.0);
    }
}
