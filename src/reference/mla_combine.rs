//! Twin of `mla_combine`: attention over parts of a context merged into attention over all of it.

/// Merges `(output, natural log-sum-exp)` of disjoint parts. A part whose log-sum-exp is at most
/// `NOTHING` had no key: its output counts nothing, whatever it holds. One that is no number makes all none.
pub fn merge(parts: &[(&[f32], f64)], width: usize) -> (Vec<f64>, f64) {
    let seen = || parts.iter().filter(|(_, lse)| !(*lse <= NOTHING));
    let largest = seen().map(|(_, lse)| *lse).fold(f64::NEG_INFINITY, f64::max);
    let (mut merged, mut total) = (vec![0.0; width], 0.0);
    for (output, lse) in seen() {
        let weight = (lse - largest).exp();
        total += weight;
        for (m, o) in merged.iter_mut().zip(*output) {
            *m += weight * f64::from(*o);
        }
    }
    if total > 0.0 {
        merged.iter_mut().for_each(|m| *m /= total);
    }
    (merged, largest + total.ln())
}

/// `W_UV` of a head applied to its merged latent: `rows` are the v rows of W_UV.
pub fn values<'a>(latent: &[f64], rows: impl Iterator<Item = &'a [f32]>) -> Vec<f64> {
    rows.map(|row| latent.iter().zip(row).map(|(x, w)| x * f64::from(*w)).sum()).collect()
}

/// No log-sum-exp of scores is as low.
const NOTHING: f64 = -1e38;

#[cfg(test)]
mod tests {
    use super::{merge, values};

    #[test]
    fn parts_weigh_as_their_sums_of_exponentials() {
        let (merged, lse) =
            merge(&[(&[1.0, 0.0], 0.0), (&[5.0, 4.0], 3f64.ln()), (&[f32::NAN, 9.0], f64::NEG_INFINITY)], 2);
        assert!((merged[0] - 4.0).abs() < 1e-12 && (merged[1] - 3.0).abs() < 1e-12, "{merged:?}");
        assert!((lse - 4f64.ln()).abs() < 1e-12, "{lse}");
        assert_eq!(merge(&[(&[1.0], f64::NEG_INFINITY)], 1), (vec![0.0], f64::NEG_INFINITY));
        let (merged, lse) = merge(&[(&[1.0], 0.0), (&[f32::NAN], f64::NAN)], 1);
        assert!(merged[0].is_nan() && lse.is_nan(), "a part that is no number was left out");
    }

    #[test]
    fn values_are_the_rows_products() {
        let rows: [&[f32]; 2] = [&[1.0, 2.0, 9.0], &[3.0, -1.0, 9.0]];
        assert_eq!(values(&[2.0, 4.0], rows.into_iter()), [10.0, 2.0]);
    }
}
