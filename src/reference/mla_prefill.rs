//! Twin of `mla_prefill`: attention of one query over expanded keys and values.

/// A key in its two parts, and its value.
#[derive(Clone, Copy)]
pub struct Key<'a> {
    /// `[n]`
    pub nope: &'a [f32],
    /// `[p]`, turned; all heads share it.
    pub rope: &'a [f32],
    /// `[v]`
    pub value: &'a [f32],
}

/// Attention of `query` `[n + p]` over `keys`: the output `[v]` and the natural log-sum-exp of the
/// scaled scores. Without keys the output is zero and the log-sum-exp -inf.
pub fn attend(query: &[f32], keys: &[Key], v: usize, scale: f64) -> (Vec<f64>, f64) {
    let score = |key: &Key| -> f64 {
        let parts = key.nope.iter().chain(key.rope);
        scale * query.iter().zip(parts).map(|(q, k)| f64::from(*q) * f64::from(*k)).sum::<f64>()
    };
    let scores: Vec<f64> = keys.iter().map(score).collect();
    let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let (mut output, mut total) = (vec![0.0; v], 0.0);
    for (score, key) in scores.iter().zip(keys) {
        let weight = (score - largest).exp();
        total += weight;
        for (o, x) in output.iter_mut().zip(key.value) {
            *o += weight * f64::from(*x);
        }
    }
    if total > 0.0 {
        output.iter_mut().for_each(|o| *o /= total);
    }
    (output, largest + total.ln())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_scores_give_the_mean_and_the_log_of_their_number() {
        let key = |x: &'static [f32]| Key { nope: &x[..1], rope: &x[1..2], value: &x[2..] };
        let keys = [key(&[1.0, 3.0, 2.0, 0.0]), key(&[3.0, 2.0, 6.0, 1.0])];
        let (output, lse) = attend(&[2.0, 4.0], &keys, 2, 0.5);
        assert_eq!(output, [4.0, 0.5]);
        assert!((lse - (7.0 + 2f64.ln())).abs() < 1e-12, "{lse}");
        assert_eq!(attend(&[2.0, 4.0], &[], 2, 0.5), (vec![0.0; 2], f64::NEG_INFINITY));
    }
}
