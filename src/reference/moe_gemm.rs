//! Twin of `moe_gemm`.

/// The products of an expert's rows with some tokens, `[tokens][rows]`.
pub fn products(rows: &[Vec<f32>], tokens: &[&[f32]]) -> Vec<Vec<f64>> {
    let mut outputs = vec![vec![0.0; rows.len()]; tokens.len()];
    for (r, row) in rows.iter().enumerate() {
        for (output, x) in outputs.iter_mut().zip(tokens) {
            for (w, x) in row.iter().zip(*x) {
                output[r] += f64::from(*w) * f64::from(*x);
            }
        }
    }
    outputs
}

/// Gates and ups in turn: `silu(gate) * up`.
pub fn joined(rows: &[f64]) -> Vec<f64> {
    rows.chunks_exact(2).map(|r| r[0] / (1.0 + (-r[0]).exp()) * r[1]).collect()
}
