//! Twin of `rms_norm`.

/// `x / sqrt(mean(x^2) + eps) * weight` of one row.
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32) -> Vec<f32> {
    let squares: f64 = x.iter().map(|x| f64::from(*x) * f64::from(*x)).sum();
    let root = (squares / x.len() as f64 + f64::from(eps)).sqrt();
    x.iter().zip(weight).map(|(x, w)| (f64::from(*x) / root * f64::from(*w)) as f32).collect()
}
