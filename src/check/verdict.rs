//! How far an output is from its twin's.

use crate::kernels::{Data, Expected, Role, Tensor};

/// The worst of what was compared.
#[derive(Clone, Debug)]
pub struct Verdict {
    /// Nothing was over its tolerance.
    pub passed: bool,
    /// The worst row's normalised mean square error.
    pub nmse: f64,
    /// The largest difference of one element.
    pub max_error: f64,
    /// The tolerance of the worst row.
    pub tolerance: f64,
    /// Where it is, with what was expected and found.
    pub place: String,
}

impl Default for Verdict {
    /// Nothing compared yet.
    fn default() -> Verdict {
        Verdict { passed: true, nmse: 0.0, max_error: 0.0, tolerance: 0.0, place: String::new() }
    }
}

impl Verdict {
    /// The worse of two: a failure before a pass, then the larger share of the tolerance.
    pub fn max(self, other: Verdict) -> Verdict {
        let share = |v: &Verdict| if v.tolerance > 0.0 { v.nmse / v.tolerance } else { v.nmse };
        let worse = match (self.passed, other.passed) {
            (true, false) => true,
            (false, true) => false,
            // NaN counts as the largest.
            _ => !(share(&other) <= share(&self)) || self.place.is_empty(),
        };
        let max_error = if self.max_error >= other.max_error { self.max_error } else { other.max_error };
        Verdict { max_error, ..if worse { other } else { self } }
    }
}

/// Holds an output's bytes against the expected rows.
///
/// # Panics
/// When the tensor is no output, or the expected rows do not fit it.
pub fn judge(tensor: &Tensor, bytes: &[u8], expected: &Expected) -> Verdict {
    let Role::Output(checks) = &tensor.role else { panic!("{} is no output", tensor.name) };
    let values = tensor.data.decode(bytes);
    let exact = matches!(tensor.data, Data::U32(_) | Data::U8(_));
    let mut worst = Verdict::default();
    assert!(!expected.rows.is_empty(), "{}: nothing is expected, so nothing would be checked", tensor.name);
    for check in checks {
        for (row, wanted) in &expected.rows {
            let end = (check.first + check.columns).min(wanted.len());
            let found = &values[row * check.stride..][check.first..end];
            let verdict = judge_row(tensor.name, *row, found, &wanted[check.first..end], check.tolerance, exact);
            worst = worst.max(verdict);
        }
    }
    worst
}

fn judge_row(
    name: &str,
    row: usize,
    found: &[f64],
    wanted: &[f64],
    tolerance: crate::kernels::Tolerance,
    exact: bool,
) -> Verdict {
    let (mut error, mut power, mut largest, mut at) = (0.0, 0.0, -1.0, 0);
    for (i, (f, w)) in found.iter().zip(wanted).enumerate() {
        // An expected infinity (a masked score) is met by the same infinity alone.
        let difference = if f == w { 0.0 } else { (f - w).abs() };
        error += difference * difference;
        power += if w.is_finite() { w * w } else { 0.0 };
        // NaN counts as the largest.
        if !(difference <= largest) {
            (largest, at) = (difference, i);
        }
    }
    let mean = (error / found.len().max(1) as f64).sqrt();
    let (nmse, limit) = match power == 0.0 {
        true => (mean, tolerance.zero),
        false => (error / power, tolerance.nmse),
    };
    let limit = if exact { 0.0 } else { limit };
    let cancelled = !exact && !(nmse <= limit) && mean <= tolerance.absolute;
    let (nmse, limit) = if cancelled { (mean, tolerance.absolute) } else { (nmse, limit) };
    let place = match found.get(at) {
        Some(f) => format!("{name}[row {row}, column {at}]: expected {:e}, found {f:e}", wanted[at]),
        None => format!("{name}[row {row}] is empty"),
    };
    Verdict { passed: nmse <= limit, nmse, max_error: largest.max(0.0), tolerance: limit, place }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::{Check, Tolerance};

    fn verdict(found: &[f32], wanted: &[f32]) -> Verdict {
        let check = Check::rows(2, Tolerance::f32(16));
        let tensor = Tensor::output("y", Data::F32(wanted.to_vec()), check);
        let rows = wanted.chunks(2).map(|r| r.iter().map(|v| f64::from(*v)).collect()).enumerate().collect();
        judge(&tensor, bytemuck::cast_slice(found), &Expected { tensor: "y", rows })
    }

    #[test]
    fn the_same_values_pass_and_rounding_passes() {
        assert!(verdict(&[1.0, 2.0, 3.0, 4.0], &[1.0, 2.0, 3.0, 4.0]).passed);
        assert!(verdict(&[1.0 + f32::EPSILON, 2.0, 3.0, 4.0], &[1.0, 2.0, 3.0, 4.0]).passed);
    }

    #[test]
    fn one_wrong_element_fails_and_its_place_is_told() {
        let v = verdict(&[1.0, 2.0, 3.0, 4.001], &[1.0, 2.0, 3.0, 4.0]);
        assert!(!v.passed);
        assert!(v.place.contains("row 1, column 1"), "{}", v.place);
        assert!((v.max_error - 0.001).abs() < 1e-6);
    }

    #[test]
    fn nan_infinity_and_zeros_fail() {
        for wrong in [f32::NAN, f32::INFINITY, 0.0] {
            assert!(!verdict(&[1.0, 2.0, wrong, wrong], &[1.0, 2.0, 3.0, 4.0]).passed, "{wrong}");
        }
        assert!(!verdict(&[0.0, f32::NAN], &[0.0, 0.0]).passed);
        assert!(!verdict(&[0.0, 0.1], &[0.0, 0.0]).passed);
        assert!(verdict(&[0.0, 0.0], &[0.0, 0.0]).passed);
    }

    #[test]
    fn what_is_left_of_a_cancelled_sum_may_be_off_by_its_terms_rounding_and_no_more() {
        let check = Check::rows(1, Tolerance { absolute: 1e-5, ..Tolerance::f32(16) });
        let judged = |found: f32| {
            let tensor = Tensor::output("lse", Data::F32(vec![1e-4]), check);
            judge(&tensor, bytemuck::bytes_of(&found), &Expected { tensor: "lse", rows: vec![(0, vec![1e-4])] })
        };
        assert!(judged(1.09e-4).passed && judged(0.91e-4).passed);
        assert!(!judged(1.2e-4).passed && !judged(0.0).passed && !judged(f32::NAN).passed);
    }

    #[test]
    fn a_small_row_is_not_hidden_by_a_large_one() {
        assert!(!verdict(&[1e-6, 2e-6, 1e6, 1e6], &[2e-6, 2e-6, 1e6, 1e6]).passed);
    }

    #[test]
    fn the_largest_error_is_kept_across_rows() {
        let v = verdict(&[1.0, 2.0, 300.00003, 4.0], &[1.0, 2.0000002, 300.0, 4.0]);
        assert!(v.max_error > 1e-5, "{v:?}");
    }
}
