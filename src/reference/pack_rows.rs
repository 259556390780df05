//! Twin of `pack_rows`.

use half::f16;

/// A row divided by a power of two, rounded to f16, and that power: the largest element comes to 2^14 .. 2^15.
/// The power of a row with an infinite number or NaN is NaN.
pub fn pack(row: &[f32]) -> (Vec<f16>, f32) {
    let exponent = |x: &f32| x.to_bits() >> 23 & 255;
    let largest = row.iter().map(exponent).max().unwrap_or(0);
    let scale = f64::from(largest.clamp(15, 254) as i32 - 127 - 14).exp2();
    let values = row.iter().map(|x| f16::from_f64(f64::from(*x) / scale)).collect();
    (values, if largest == 255 { f32::NAN } else { scale as f32 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_element_comes_to_between_2_14_and_2_15_and_the_scale_undoes_it() {
        for largest in [1.0f32, -3.5, 6.1e-5, 1e30, -1e-30, f32::MAX] {
            let (values, scale) = pack(&[largest, largest / 1024.0, 0.0]);
            let top = values[0].to_f32().abs();
            assert!((16_384.0..=32_768.0).contains(&top), "{largest}: {top}");
            let share = |value: f16| value.to_f64() * f64::from(scale) / f64::from(largest);
            assert!((share(values[0]) - 1.0).abs() < 5e-4, "{largest}: {scale}");
            assert!((share(values[1]) * 1024.0 - 1.0).abs() < 5e-4);
        }
        assert_eq!(pack(&[0.0, 0.0]).0, [f16::ZERO; 2]);
        assert!(pack(&[1.0, f32::NAN]).1.is_nan() && pack(&[f32::INFINITY]).1.is_nan());
    }
}
