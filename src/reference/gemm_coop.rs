//! Twin of `gemm_coop`.

use half::f16;

/// Outputs as f16; what it does not hold becomes its largest number.
pub fn halves(outputs: &[f32]) -> Vec<f16> {
    let largest = f16::MAX.to_f32();
    // Not `clamp`: NaN stays.
    let held = |x: &f32| if x.abs() > largest { largest.copysign(*x) } else { *x };
    outputs.iter().map(|x| f16::from_f32(held(x))).collect()
}

/// The products of a matrix row with each token's packed activations.
pub fn gemm(row: &[f32], tokens: &[(Vec<f16>, f32)]) -> Vec<f64> {
    let of = |(values, scale): &(Vec<f16>, f32)| {
        let sum: f64 = row.iter().zip(values).map(|(w, x)| f64::from(*w) * x.to_f64()).sum();
        sum * f64::from(*scale)
    };
    tokens.iter().map(of).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_f16_does_not_hold_becomes_its_largest_number_and_nan_stays() {
        assert_eq!(halves(&[1.5, 70_000.0, -1e30]), [f16::from_f32(1.5), f16::MAX, -f16::MAX]);
        assert!(halves(&[f32::NAN])[0].is_nan());
    }
}
