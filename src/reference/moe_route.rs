//! Twin of `moe_route`.

/// The scores of a row of router logits.
pub fn scores(logits: &[f32], softmax: bool) -> Vec<f64> {
    let logits = || logits.iter().map(|x| f64::from(*x));
    if !softmax {
        return logits().map(|x| 1.0 / (1.0 + (-x).exp())).collect();
    }
    let largest = logits().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = logits().map(|x| (x - largest).exp()).sum();
    logits().map(|x| (x - largest).exp() / sum).collect()
}

/// A group's score: the sum of its `best` greatest choices.
pub fn group_scores(choices: &[f64], groups: usize, best: usize) -> Vec<f64> {
    let score = |group: &[f64]| top(group, best).iter().map(|i| group[*i]).sum();
    choices.chunks(choices.len() / groups).map(score).collect()
}

/// The indices of the `count` greatest values, greatest first, of equal ones the lower index first.
pub fn top(values: &[f64], count: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|a, b| values[*b].total_cmp(&values[*a])); // a stable sort
    order.truncate(count);
    order
}

/// The weights of the chosen experts' scores.
pub fn weights(scores: &[f64], renormalise: bool, scale: f32) -> Vec<f32> {
    let sum: f64 = if renormalise { scores.iter().sum::<f64>() + 1e-20 } else { 1.0 };
    scores.iter().map(|score| (score / sum * f64::from(scale)) as f32).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_values_go_by_their_index() {
        assert_eq!(top(&[1.0, 3.0, 2.0, 3.0, 3.0], 4), [1, 3, 4, 2]);
    }

    #[test]
    fn a_group_counts_its_greatest_choices() {
        let choices = [0.1, 0.9, 0.5, 0.6, 0.7, 0.2];
        assert_eq!(group_scores(&choices, 3, 1), [0.9, 0.6, 0.7]);
        assert_eq!(group_scores(&choices, 3, 2), [1.0, 1.1, 0.7 + 0.2]);
    }
}
