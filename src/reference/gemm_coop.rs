//! Twin of `gemm_coop`.

use half::f16;

/// The products of a matrix row with each token's packed activations.
pub fn gemm(row: &[f32], tokens: &[(Vec<f16>, f32)]) -> Vec<f64> {
    let of = |(values, scale): &(Vec<f16>, f32)| {
        let sum: f64 = row.iter().zip(values).map(|(w, x)| f64::from(*w) * x.to_f64()).sum();
        sum * f64::from(*scale)
    };
    tokens.iter().map(of).collect()
}
