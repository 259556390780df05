//! Twin of `gemv`.

/// The product of a matrix row with one token's activations.
pub fn gemv(row: &[f32], x: &[f32]) -> f64 {
    row.iter().zip(x).map(|(w, x)| f64::from(*w) * f64::from(*x)).sum()
}
