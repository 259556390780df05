//! Twin of `mla_decode_fused`: a query absorbed and attended. What the kernel does behind that is the twins'
//! of `mla_combine`.

use super::mla_absorb::Absorb;
use super::mla_decode;

/// Attention over `records`, as [`mla_decode::attend`], of a query that is absorbed first.
pub fn attend<'a>(absorb: &Absorb, records: impl Iterator<Item = &'a [f32]> + Clone) -> (Vec<f64>, f64) {
    mla_decode::attend(&absorb.query(), records, absorb.latent)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::num::rope::RopeLayout;

    #[test]
    fn the_query_is_absorbed_before_it_scores() {
        let w_uk: [&[f32]; 1] = [&[0.0, 1.0]];
        let absorb = Absorb {
            query: &[1.0],
            w_uk: w_uk.to_vec(),
            latent: 2,
            position: 0,
            scale: 1.0,
            growth: (0.0, 1),
            table: &[],
            layout: RopeLayout::Interleaved,
        };
        // Scores 0 and 1: weights 1/3 and 2/3.
        let records: [&[f32]; 2] = [&[3.0, 0.0], &[6.0, 1.0]];
        let (output, lse) = attend(&absorb, records.into_iter());
        assert!((output[0] - 5.0).abs() < 1e-12 && (lse - 3f64.log2()).abs() < 1e-12, "{output:?}, {lse}");
    }
}
