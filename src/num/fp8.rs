//! The 8-bit float e4m3 (Micikevicius et al. 2022, "FP8 formats for deep learning"): sign, 4 exponent
//! bits with bias 7, 3 mantissa bits; no infinities, and NaN where all bits but the sign are 1.

/// The largest value.
pub const E4M3_MAX: f32 = 448.0;

/// The code nearest to `value`, ties to even; beyond 448 and at infinity the largest code of that sign.
pub fn e4m3_encode(value: f32) -> u8 {
    let sign = ((value.to_bits() >> 24) & 0x80) as u8;
    let magnitude = value.abs();
    if magnitude.is_nan() {
        return sign | 0x7f;
    }
    if magnitude < 2f32.powi(-6) {
        // Subnormal codes count 2^-9; the eighth is the smallest normal one.
        return sign | (magnitude * 512.0).round_ties_even() as u8;
    }
    let bits = magnitude.min(E4M3_MAX).to_bits();
    // Twenty mantissa bits go. Adding all but their half, and one more where the last kept bit is
    // odd, carries exactly where rounding goes up.
    let rounded = bits + 0x7_ffff + ((bits >> 20) & 1);
    sign | ((rounded >> 20) - (120 << 3)) as u8
}

/// The value of a code.
pub fn e4m3_decode(code: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(code >> 3 & 0xf), f32::from(code & 7));
    let magnitude = match (exponent, code & 0x7f) {
        (_, 0x7f) => f32::NAN,
        (0, _) => mantissa * 2f32.powi(-9),
        _ => (1.0 + mantissa / 8.0) * 2f32.powi(exponent - 7),
    };
    if code & 0x80 == 0 { magnitude } else { -magnitude }
}

/// The least power of two `s` with `largest <= 448 s`, at least 2^-64, so that neither it nor its
/// inverse comes near f32's subnormals.
pub fn e4m3_scale(largest: f32) -> f32 {
    // 448 is 1.75 * 2^8: the exponent goes up by one where the mantissa is over 1.75.
    let exponent = (largest.abs().to_bits() + 0x1f_ffff) >> 23;
    f32::from_bits((exponent.max(63 + 8) - 8) << 23)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The codes in order of value, without NaN.
    fn positive() -> impl Iterator<Item = (u8, f32)> {
        (0..0x7f).map(|code| (code, e4m3_decode(code)))
    }

    #[test]
    fn codes_have_the_published_values() {
        let expected = [(0x00, 0.0), (0x01, 2f32.powi(-9)), (0x07, 0.875 * 2f32.powi(-6)), (0x08, 2f32.powi(-6))];
        for (code, value) in expected.into_iter().chain([(0x38, 1.0), (0x7e, 448.0), (0xb8, -1.0), (0xfe, -448.0)]) {
            assert_eq!(e4m3_decode(code), value, "{code:#x}");
        }
        assert!(e4m3_decode(0x7f).is_nan() && e4m3_decode(0xff).is_nan());
        assert!(positive().zip(positive().skip(1)).all(|((_, a), (_, b))| a < b));
    }

    #[test]
    fn every_code_comes_back() {
        for code in (0..=0xff).filter(|code| code & 0x7f != 0x7f) {
            assert_eq!(e4m3_encode(e4m3_decode(code)), code);
        }
        assert_eq!((e4m3_encode(f32::NAN) & 0x7f, e4m3_encode(-0.0)), (0x7f, 0x80));
    }

    #[test]
    fn a_value_between_two_codes_goes_to_the_nearer_and_a_tie_to_the_even_one() {
        for ((low, a), (high, b)) in positive().zip(positive().skip(1)) {
            let middle = (a + b) / 2.0;
            let even = if low % 2 == 0 { low } else { high };
            for (value, code) in [(middle, even), (middle.next_down(), low), (middle.next_up(), high)] {
                assert_eq!(e4m3_encode(value), code, "{value:e}");
                assert_eq!(e4m3_encode(-value), code | 0x80, "-{value:e}");
            }
        }
    }

    #[test]
    fn values_beyond_the_largest_saturate() {
        for value in [448.0, 449.0, 464.0, 480.0, 1e30, f32::INFINITY] {
            assert_eq!((e4m3_encode(value), e4m3_encode(-value)), (0x7e, 0xfe), "{value}");
        }
    }

    #[test]
    fn the_scale_is_the_least_power_of_two_that_holds_the_largest_value() {
        let expected =
            [(448.0, 1.0), (448.00003, 2.0), (1.0, 2f32.powi(-8)), (1.75, 2f32.powi(-8)), (1.76, 2f32.powi(-7))];
        for (largest, scale) in
            expected.into_iter().chain([(6e4, 256.0), (0.0, 2f32.powi(-64)), (1e-30, 2f32.powi(-64))])
        {
            assert_eq!(e4m3_scale(largest), scale, "{largest}");
        }
        for i in 0..10_000 {
            let largest = 1e-12 * 1.005_f32.powi(i);
            let scale = e4m3_scale(largest);
            assert!(largest <= 448.0 * scale && largest > 224.0 * scale, "{largest:e}: {scale:e}");
        }
    }
}
