//! Twin of `moe_gemv`.

/// The gate and up rows (in turn) of an expert, for one token: `silu(gate) * up`.
pub fn up(rows: &[Vec<f32>], x: &[f32]) -> Vec<f32> {
    let joined = |pair: &[Vec<f32>]| {
        let (gate, up) = (product(&pair[0], x), product(&pair[1], x));
        (gate / (1.0 + (-gate).exp()) * up) as f32
    };
    rows.chunks_exact(2).map(joined).collect()
}

/// Adds the weighted products of an expert's rows with one token.
pub fn down(sums: &mut [f64], weight: f32, rows: &[Vec<f32>], x: &[f32]) {
    for (sum, row) in sums.iter_mut().zip(rows) {
        *sum += f64::from(weight) * product(row, x);
    }
}

fn product(row: &[f32], x: &[f32]) -> f64 {
    row.iter().zip(x).map(|(w, x)| f64::from(*w) * f64::from(*x)).sum()
}

#[cfg(test)]
mod tests {
    use super::{down, up};

    #[test]
    fn rows_are_gates_and_ups_in_turn() {
        let rows = [vec![100.0, 0.0], vec![0.0, 3.0], vec![0.0, -1.0], vec![5.0, 0.0]];
        let found = up(&rows, &[1.0, 2.0]);
        let silu = -2.0 / (1.0 + 2f32.exp());
        assert!(found[0] == 600.0 && (found[1] - 5.0 * silu).abs() < 1e-6, "{found:?}");
        let mut sums = [1.0, 1.0, 1.0, 1.0];
        down(&mut sums, 0.5, &rows, &[1.0, 2.0]);
        assert_eq!(sums, [51.0, 4.0, 0.0, 3.5]);
    }
}
