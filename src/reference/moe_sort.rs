//! Twin of `moe_sort`.

/// The pairs of the experts below `experts`, expert after expert, each expert's in order; and tiles of
/// at most `tile` of them that no two experts share, as (expert, first in the order, count).
pub fn sort(of: &[u32], experts: u32, tile: usize) -> (Vec<u32>, Vec<(u32, usize, usize)>) {
    let (mut order, mut tiles) = (Vec::new(), Vec::new());
    for expert in 0..experts {
        let first = order.len();
        order.extend((0..of.len() as u32).filter(|pair| of[*pair as usize] == expert));
        for at in (first..order.len()).step_by(tile) {
            tiles.push((expert, at, tile.min(order.len() - at)));
        }
    }
    (order, tiles)
}

#[cfg(test)]
mod tests {
    use super::sort;

    #[test]
    fn pairs_stand_by_expert_and_in_order() {
        let (order, tiles) = sort(&[2, 0, 7, 2, 0, 2], 3, 2);
        assert_eq!(order, [1, 4, 0, 3, 5]);
        assert_eq!(tiles, [(0, 0, 2), (2, 2, 2), (2, 4, 1)]);
    }
}
