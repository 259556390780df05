//! Twin of `mla_gather`: one record of the latent cache as numbers.

use crate::num::record::RecordFormat;

/// The latent `[r]` and the rope key `[p]` of a record.
pub fn gather(format: RecordFormat, record: &[u8], r: usize, p: usize) -> (Vec<f32>, Vec<f32>) {
    let mut latent = format.decode(record, r, p);
    let rope = latent.split_off(r);
    (latent, rope)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_a_latent_and_a_rope_key() {
        for format in RecordFormat::ALL {
            let record = format.encode(&[1.0; 16], &[-2.0, 0.5]);
            assert_eq!(gather(format, &record, 16, 2), (vec![1.0; 16], vec![-2.0, 0.5]), "{format:?}");
        }
    }
}
