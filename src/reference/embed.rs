//! Twin of `embed`.

/// The embedding of one token: its row of the table times `scale`, zeros where the table has none.
pub fn embed(row: Option<&[f32]>, length: usize, scale: f32) -> Vec<f32> {
    match row {
        Some(row) => row[..length].iter().map(|v| (f64::from(*v) * f64::from(scale)) as f32).collect(),
        None => vec![0.0; length],
    }
}
