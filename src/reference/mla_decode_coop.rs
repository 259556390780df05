//! Twin of `mla_decode_coop`: `mla_decode` with queries that f16 holds.

use half::f16;

/// A query as the matrix units see it.
pub fn query(values: &[f32]) -> Vec<f32> {
    values.iter().map(|value| f16::from_f32(*value).to_f32()).collect()
}

#[cfg(test)]
mod tests {
    use super::query;

    #[test]
    fn queries_are_rounded_to_the_nearest_f16() {
        assert_eq!(query(&[0.5, 1.0 + 1.0 / 4096.0, -2049.0, 6.2e-8]), [0.5, 1.0, -2048.0, 5.960_464_5e-8]);
    }
}
