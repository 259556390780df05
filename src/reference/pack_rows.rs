//! Twin of `pack_rows`.

use half::f16;

/// A row divided by a power of two, rounded to f16, and that power: the largest element comes to 2^14 .. 2^15.
/// The power of a row with an infinite number or NaN is NaN.
///
/// The quotient is exact in f32, but where f16 has only zero for it. From f64, `half` without hardware drops the low
/// 32 bits before it rounds, so that in browsers what stands just above a tie went to the even neighbour.
pub fn pack(row: &[f32]) -> (Vec<f16>, f32) {
    let exponent = |x: &f32| x.to_bits() >> 23 & 255;
    let largest = row.iter().map(exponent).max().unwrap_or(0);
    let scale = f64::from(largest.clamp(15, 254) as i32 - 127 - 14).exp2();
    let values = row.iter().map(|x| f16::from_f32((f64::from(*x) / scale) as f32)).collect();
    (values, if largest == 255 { f32::NAN } else { scale as f32 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_stands_just_above_a_tie_goes_up() {
        // Scaled to 16,384 (1 + 2^-11 + 2^-23): one bit of f32 above the middle of 16,384 and the next f16.
        let above = f32::from_bits(1f32.to_bits() | 1 << 12 | 1);
        assert_eq!(pack(&[above]).0[0].to_bits(), f16::from_f32(16_384.0).to_bits() + 1);
        assert_eq!(pack(&[1.0 + f32::exp2(-11.0)]).0[0], f16::from_f32(16_384.0));
    }

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
