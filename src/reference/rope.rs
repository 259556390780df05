//! Twin of `rope`: cosines and sines straight from the frequencies, so that it proves the table too.

use crate::num::rope::{Frequencies, RopeLayout};

/// Rotates a slice of `p` elements, a token's at `position`.
pub fn rope(slice: &[f32], position: u32, frequencies: &Frequencies, layout: RopeLayout) -> Vec<f32> {
    let mut out = slice.to_vec();
    for pair in 0..frequencies.pairs() {
        let [one, two] = layout.elements(pair as usize, slice.len() / 2);
        let (cos, sin) = frequencies.rotation(position, pair);
        let (a, b) = (f64::from(slice[one]), f64::from(slice[two]));
        out[one] = (a * cos - b * sin) as f32;
        out[two] = (b * cos + a * sin) as f32;
    }
    out
}
