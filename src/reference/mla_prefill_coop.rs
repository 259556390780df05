//! Twin of `mla_prefill_coop`: `mla_prefill` with queries, keys and values that f16 holds.

use half::f16;

use super::mla_prefill::{self, Key};

fn rounded(values: &[f32], scale: f32) -> Vec<f32> {
    values.iter().map(|value| f16::from_f32(value * scale).to_f32()).collect()
}

/// As [`mla_prefill::attend`]. Queries are rounded with the scale of the scores, in units of log2, in them.
pub fn attend(query: &[f32], keys: &[Key], v: usize, scale: f64) -> (Vec<f64>, f64) {
    let query = rounded(query, (scale * std::f64::consts::LOG2_E) as f32);
    let keys: Vec<[Vec<f32>; 3]> =
        keys.iter().map(|k| [k.nope, k.rope, k.value].map(|part| rounded(part, 1.0))).collect();
    let keys: Vec<Key> = keys.iter().map(|[nope, rope, value]| Key { nope, rope, value }).collect();
    mla_prefill::attend(&query, &keys, v, std::f64::consts::LN_2)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_f16_holds_is_as_in_f32_and_what_it_does_not_is_rounded() {
        let attend = |nope: &[f32], value: &[f32]| {
            super::attend(&[2.0], &[Key { nope, rope: &[], value }], 1, std::f64::consts::LN_2)
        };
        let (output, lse) = attend(&[0.5], &[3.0]);
        assert!(output == [3.0] && (lse - std::f64::consts::LN_2).abs() < 1e-7, "{output:?} {lse}");
        assert_eq!(attend(&[0.5], &[2049.0]).0, [2048.0]);
    }
}
