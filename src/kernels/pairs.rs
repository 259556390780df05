//! Cases that cover every pair of their parameters' values, where the product would be too many.

use std::collections::BTreeSet;

/// Two parameters with a value each: `[a, i, b, j]`, a before b.
type Pair = [usize; 4];

/// Picks combinations, one index for each of `sizes`, such that every pair of values of two parameters
/// is in one of them, where its cheapest combination costs at most `most`. The first value of each
/// parameter is its cheapest. Greedy and deterministic: a pick starts from an open pair and takes the
/// values that cover the most further pairs for their cost.
pub fn covering(sizes: &[usize], cost: impl Fn(&[usize]) -> f64, most: f64) -> Vec<Vec<usize>> {
    let with = |pair: Pair| {
        let mut combination = vec![0; sizes.len()];
        (combination[pair[0]], combination[pair[2]]) = (pair[1], pair[3]);
        combination
    };
    let mut open: BTreeSet<Pair> = BTreeSet::new();
    for b in 0..sizes.len() {
        for a in 0..b {
            let values = (0..sizes[a]).flat_map(|i| (0..sizes[b]).map(move |j| [a, i, b, j]));
            open.extend(values.filter(|pair| cost(&with(*pair)) <= most));
        }
    }
    let least = cost(&vec![0; sizes.len()]).max(1e-9);
    let mut picked = Vec::new();
    // The dearest pairs first: what they need besides comes with them.
    while let Some(pair) = open.iter().copied().max_by(|x, y| cost(&with(*x)).total_cmp(&cost(&with(*y)))) {
        let mut combination = with(pair);
        let mut fixed = vec![pair[0], pair[2]];
        for parameter in (0..sizes.len()).filter(|p| *p != pair[0] && *p != pair[2]) {
            let mut best = (0, -1.0);
            for value in 0..sizes[parameter] {
                combination[parameter] = value;
                let cost = cost(&combination);
                let covers = |other: &usize| {
                    let mut two = [(*other, combination[*other]), (parameter, value)];
                    two.sort();
                    open.contains(&[two[0].0, two[0].1, two[1].0, two[1].1])
                };
                let covered = fixed.iter().filter(|other| covers(other)).count() as f64;
                let gain = covered / (cost / least).powf(2.0);
                if cost <= most && gain > best.1 {
                    best = (value, gain);
                }
            }
            combination[parameter] = best.0;
            fixed.push(parameter);
        }
        for b in 0..sizes.len() {
            (0..b).for_each(|a| {
                open.remove(&[a, combination[a], b, combination[b]]);
            });
        }
        picked.push(combination);
    }
    picked
}

/// Every combination of indices below `sizes`.
pub fn product(sizes: &[usize]) -> Vec<Vec<usize>> {
    sizes.iter().fold(vec![Vec::new()], |all, size| {
        let longer = |c: &Vec<usize>| (0..*size).map(|i| [c.as_slice(), &[i]].concat()).collect::<Vec<_>>();
        all.iter().flat_map(longer).collect()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_pair_that_can_be_paid_for_is_covered_with_few_cases() {
        let sizes = [5, 4, 3, 2];
        let cost = |c: &[usize]| (1 + c[0] * c[1]) as f64;
        let picked = covering(&sizes, cost, 10.0);
        assert!(picked.len() < 30, "{}", picked.len());
        assert!(picked.iter().all(|c| cost(c) <= 10.0));
        for b in 0..4 {
            for a in 0..b {
                for (i, j) in (0..sizes[a]).flat_map(|i| (0..sizes[b]).map(move |j| (i, j))) {
                    let allowed = (a, b) != (0, 1) || i * j <= 9;
                    let found = picked.iter().any(|c| c[a] == i && c[b] == j);
                    assert_eq!(found, allowed, "parameters {a} and {b}, values {i} and {j}");
                }
            }
        }
    }

    #[test]
    fn a_product_is_every_combination_once() {
        let all: BTreeSet<Vec<usize>> = product(&[2, 3, 1]).into_iter().collect();
        assert_eq!(all.len(), 6);
        assert!(all.contains(&vec![1, 2, 0]));
    }
}
