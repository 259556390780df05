//! Twin of `gqa_append`: one head of a query, key or value before attention in groups.

use crate::num::rope::{BLOCK, RopeLayout};

/// The slice `[d]` turned to `position` with the table `[256 + blocks, d / 2]` of (cos, sin), element i with
/// element i + d / 2, times `scale`.
pub fn turned(slice: &[f32], position: u32, table: &[[f32; 2]], scale: f32) -> Vec<f32> {
    let pairs = slice.len() / 2;
    let mut out = vec![0.0; slice.len()];
    for pair in 0..pairs {
        let row = |row: u32| table[row as usize * pairs + pair].map(f64::from);
        let ([c, s], [block_c, block_s]) = (row(position % BLOCK), row(BLOCK + position / BLOCK));
        let (cos, sin) = (c * block_c - s * block_s, s * block_c + c * block_s);
        let [i, j] = RopeLayout::Half.elements(pair, pairs);
        let (x, y) = (f64::from(slice[i]), f64::from(slice[j]));
        out[i] = ((x * cos - y * sin) * f64::from(scale)) as f32;
        out[j] = ((x * sin + y * cos) * f64::from(scale)) as f32;
    }
    out
}

#[cfg(test)]
mod tests {
    use super::turned;
    use crate::num::rope::Frequencies;

    #[test]
    fn halves_turn_by_the_position_and_are_scaled() {
        let table = Frequencies::plain(4, 100.0).table(400);
        let found = turned(&[1.0, 2.0, 0.0, 0.0], 300, &table, 2.0);
        // Angles 300 and 300 / 10.
        let expected = [2.0 * 300f64.cos(), 4.0 * 30f64.cos(), 2.0 * 300f64.sin(), 4.0 * 30f64.sin()];
        for (f, e) in found.iter().zip(expected) {
            assert!((f64::from(*f) - e).abs() < 1e-5, "{found:?}, not {expected:?}");
        }
    }
}
