//! Twin of `gqa_decode`: attention of one query over keys and values of its group.

/// Attention of `query` over `(key, value)` rows of its width, in base 2 as the query is scaled for it: the
/// output and the log-sum-exp of the scores. Without rows the output is zero and the log-sum-exp -inf.
pub fn attend<'a>(query: &[f32], rows: impl Iterator<Item = (&'a [f32], &'a [f32])> + Clone) -> (Vec<f64>, f64) {
    let product = |key: &[f32]| -> f64 { query.iter().zip(key).map(|(q, k)| f64::from(*q) * f64::from(*k)).sum() };
    let scores: Vec<f64> = rows.clone().map(|(key, _)| product(key)).collect();
    let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let (mut output, mut total) = (vec![0.0; query.len()], 0.0);
    for (score, (_, value)) in scores.iter().zip(rows) {
        let weight = (score - largest).exp2();
        total += weight;
        for (o, v) in output.iter_mut().zip(value) {
            *o += weight * f64::from(*v);
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
    fn weights_are_powers_of_two_of_keys_and_values_are_summed() {
        let rows: [(&[f32], &[f32]); 2] = [(&[5.0, 9.0], &[1.0, 0.0]), (&[6.0, 9.0], &[4.0, 8.0])];
        // Scores 5 and 6: weights 1/3 and 2/3.
        let (output, lse) = attend(&[1.0, 0.0], rows.into_iter());
        assert!((output[0] - 3.0).abs() < 1e-12 && (output[1] - 16.0 / 3.0).abs() < 1e-12, "{output:?}");
        assert!((lse - 96f64.log2()).abs() < 1e-12, "{lse}");
        assert_eq!(attend(&[1.0], std::iter::empty()), (vec![0.0], f64::NEG_INFINITY));
    }
}
