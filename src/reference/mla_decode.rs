//! Twin of `mla_decode`: attention of one absorbed query over records of the latent cache.

/// Attention of `query` over `records`, `[r + p]` each, whose first `r` values are also what is summed:
/// the output `[r]` and the log-sum-exp of the scores, both in base 2 as the query is scaled for it.
/// Without records the output is zero and the log-sum-exp -inf.
pub fn attend<'a>(query: &[f32], records: impl Iterator<Item = &'a [f32]> + Clone, r: usize) -> (Vec<f64>, f64) {
    let score = |record: &[f32]| -> f64 { query.iter().zip(record).map(|(q, k)| f64::from(*q) * f64::from(*k)).sum() };
    let scores: Vec<f64> = records.clone().map(score).collect();
    let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let (mut output, mut total) = (vec![0.0; r], 0.0);
    for (score, record) in scores.iter().zip(records) {
        let weight = (score - largest).exp2();
        total += weight;
        for (o, c) in output.iter_mut().zip(record) {
            *o += weight * f64::from(*c);
        }
    }
    if total > 0.0 {
        output.iter_mut().for_each(|o| *o /= total);
    }
    (output, largest + total.log2())
}

#[cfg(test)]
mod tests {
    use super::attend;

    #[test]
    fn weights_are_powers_of_two_and_the_rope_key_only_scores() {
        let records: [&[f32]; 2] = [&[1.0, 0.0, 5.0], &[4.0, 8.0, 6.0]];
        // Scores 5 and 6: weights 1/3 and 2/3.
        let (output, lse) = attend(&[0.0, 0.0, 1.0], records.into_iter(), 2);
        assert!((output[0] - 3.0).abs() < 1e-12 && (output[1] - 16.0 / 3.0).abs() < 1e-12, "{output:?}");
        assert!((lse - 96f64.log2()).abs() < 1e-12, "{lse}");
        assert_eq!(attend(&[1.0], std::iter::empty(), 1), (vec![0.0], f64::NEG_INFINITY));
    }
}
