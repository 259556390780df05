//! Twin of `add`.

/// `x + scale * y`, element by element.
pub fn add(x: &[f32], y: &[f32], scale: f32) -> Vec<f32> {
    let sum = |(x, y): (&f32, &f32)| (f64::from(*x) + f64::from(scale) * f64::from(*y)) as f32;
    x.iter().zip(y).map(sum).collect()
}
