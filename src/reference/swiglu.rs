//! Twin of `swiglu`.

/// `silu(gate) * up`, element by element.
pub fn swiglu(gate: &[f32], up: &[f32]) -> Vec<f32> {
    let one = |(g, u): (&f32, &f32)| {
        let g = f64::from(*g);
        (g / (1.0 + (-g).exp()) * f64::from(*u)) as f32
    };
    gate.iter().zip(up).map(one).collect()
}
