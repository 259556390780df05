//! Twin of `gemm`.

/// The products of a matrix row with each token's activations.
pub fn gemm(row: &[f32], tokens: &[&[f32]]) -> Vec<f64> {
    let mut sums = vec![0.0; tokens.len()];
    for (sum, x) in sums.iter_mut().zip(tokens) {
        for (w, x) in row.iter().zip(*x) {
            *sum += f64::from(*w) * f64::from(*x);
        }
    }
    sums
}
