//! Twin of `moe_combine`.

/// `start` plus the sum of `parts`, each times its weight.
pub fn combine(start: &[f32], parts: &[(f32, &[f32])]) -> Vec<f32> {
    let element = |(i, start): (usize, &f32)| {
        let sum: f64 = parts.iter().map(|(weight, part)| f64::from(*weight) * f64::from(part[i])).sum();
        (f64::from(*start) + sum) as f32
    };
    start.iter().enumerate().map(element).collect()
}
