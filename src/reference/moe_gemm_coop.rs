//! Twin of `moe_gemm_coop`.

use half::f16;

/// A packed row as the matrix units see it.
pub fn unpacked(values: &[f16], scale: f32) -> Vec<f32> {
    values.iter().map(|x| (x.to_f64() * f64::from(scale)) as f32).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_packed_comes_back_as_f16_holds_it() {
        let (values, scale) = crate::reference::pack_rows::pack(&[1.0, -0.333_333_34, 3.0e4, 0.0]);
        assert_eq!(unpacked(&values, scale), [1.0, -0.333_251_95, 3.0e4, 0.0]);
    }
}
