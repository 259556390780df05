//! Twin of `sample`.

/// What makes a token more or less likely.
#[derive(Clone, Copy, Debug)]
pub struct Filters {
    /// 0 takes the most probable.
    pub temperature: f64,
    /// How many are kept; 0 for all.
    pub top_k: usize,
    /// The most probable that together have this probability.
    pub top_p: f64,
    /// The least probability, as a share of the greatest.
    pub min_p: f64,
    /// Divides positive logits of what was seen and multiplies negative ones.
    pub penalty: f64,
}

/// What became of a row.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampled {
    /// The chosen id.
    pub token: usize,
    /// Its log-probability, of the raw logits; `None` where no logit counts.
    pub logprob: Option<f64>,
    /// A logit is NaN or infinite.
    pub non_finite: bool,
    /// The most probable ids of the raw logits, with their log-probabilities; 5, or as many as there are.
    pub top: Vec<(usize, f64)>,
}

/// Chooses the next token. `seen` says which ids were seen; `share` in [0, 1) is the random number.
pub fn sample(logits: &[f32], seen: impl Fn(usize) -> bool, filters: &Filters, share: f64) -> Sampled {
    let non_finite = logits.iter().any(|x| !x.is_finite());
    let raw = order(logits, |_| false, 1.0);
    let Some((_, greatest)) = raw.first().copied() else {
        return Sampled { token: 0, logprob: None, non_finite, top: Vec::new() };
    };
    let sum: f64 = raw.iter().map(|(_, x)| (x - greatest).exp()).sum();
    let logprob = |x: f64| x - greatest - sum.ln();
    let order = order(logits, seen, filters.penalty);
    let greedy = filters.temperature == 0.0 || filters.top_k == 1;
    let token = if greedy { order[0].0 } else { draw(&keep(&order, filters), share) };
    let top = raw.iter().take(5).map(|(id, x)| (*id, logprob(*x))).collect();
    Sampled { token, logprob: Some(logprob(f64::from(logits[token]))), non_finite, top }
}

/// Ids and logits after the penalty, greatest first, of equal ones the lower id; without what is not finite
/// and the numbers that masks are made of.
pub fn order(logits: &[f32], seen: impl Fn(usize) -> bool, penalty: f64) -> Vec<(usize, f64)> {
    let penalised = |(id, x): (usize, &f32)| {
        let x = f64::from(*x);
        (
            id,
            if !seen(id) {
                x
            } else if x > 0.0 {
                x / penalty
            } else {
                x * penalty
            },
        )
    };
    let there = logits.iter().enumerate().filter(|(_, x)| x.is_finite() && **x > -3e38);
    let mut order: Vec<_> = there.map(penalised).collect();
    order.sort_by(|a, b| b.1.partial_cmp(&a.1).expect("finite").then(a.0.cmp(&b.0)));
    order
}

/// The ids that the filters keep of those in `order`, lowest first, with their weights: the probabilities but
/// for a factor.
pub fn keep(order: &[(usize, f64)], filters: &Filters) -> Vec<(usize, f64)> {
    let weigh = |(id, x): &(usize, f64)| (*id, ((x - order[0].1) / filters.temperature).exp());
    let mut kept: Vec<(usize, f64)> = order.iter().map(weigh).collect();
    if filters.top_k > 0 {
        kept.truncate(filters.top_k);
    }
    if filters.top_p < 1.0 {
        let goal = filters.top_p * kept.iter().map(|(_, weight)| weight).sum::<f64>();
        let (mut before, mut count) = (0.0, 0);
        while count < kept.len() && before < goal {
            before += kept[count].1;
            count += 1;
        }
        kept.truncate(count.max(1));
    }
    kept.retain(|(_, weight)| *weight >= filters.min_p);
    kept.sort_by_key(|(id, _)| *id);
    kept
}

/// The id that `share` of the weights falls on, one after the other.
pub fn draw(kept: &[(usize, f64)], share: f64) -> usize {
    let goal = share * kept.iter().map(|(_, weight)| weight).sum::<f64>();
    let (mut before, mut token) = (0.0, kept[0].0);
    for (id, weight) in kept.iter().filter(|(_, weight)| *weight > 0.0) {
        if before <= goal {
            token = *id;
        }
        before += weight;
    }
    token
}

/// The random number of a seed and position in [0, 1): the upper 24 bits of Philox-2x32-10.
pub fn share(seed: u32, position: u32) -> f64 {
    f64::from(philox([position, 0], seed)[0] >> 8) / f64::from(1 << 24)
}

/// Philox-2x32-10 (Salmon, Moraes, Dror and Shaw, Parallel random numbers: as easy as 1, 2, 3, SC 2011).
pub fn philox(counter: [u32; 2], key: u32) -> [u32; 2] {
    let ([mut a, mut b], mut key) = (counter, key);
    for _ in 0..10 {
        let product = 0xD256_D193u64 * u64::from(a);
        (a, b) = ((product >> 32) as u32 ^ key ^ b, product as u32);
        key = key.wrapping_add(0x9E37_79B9);
    }
    [a, b]
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: Filters = Filters { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0, penalty: 1.0 };

    fn kept(logits: &[f64], filters: Filters) -> Vec<usize> {
        let logits: Vec<f32> = logits.iter().map(|x| *x as f32).collect();
        keep(&order(&logits, |_| false, 1.0), &filters).iter().map(|(id, _)| *id).collect()
    }

    #[test]
    fn philox_gives_the_numbers_of_its_authors_tests() {
        // kat_vectors of Random123.
        assert_eq!(philox([0, 0], 0), [0xFF1D_AE59, 0x6CD1_0DF2]);
        assert_eq!(philox([u32::MAX; 2], u32::MAX), [0x2C3F_628B, 0xAB4F_D7AD]);
        assert_eq!(philox([0x243F_6A88, 0x85A3_08D3], 0x1319_8A2E), [0xDD7C_E038, 0xF62A_4C12]);
    }

    #[test]
    fn each_filter_keeps_what_its_rule_says() {
        // Probabilities 0.1, 0.4, 0.2, 0.3.
        let logits = [0.1f64, 0.4, 0.2, 0.3].map(f64::ln);
        assert_eq!(kept(&logits, Filters { top_k: 2, ..PLAIN }), [1, 3]);
        assert_eq!(kept(&logits, Filters { top_p: 0.65, ..PLAIN }), [1, 3]);
        assert_eq!(kept(&logits, Filters { top_p: 0.75, ..PLAIN }), [1, 2, 3]);
        assert_eq!(kept(&logits, Filters { top_p: 0.0, ..PLAIN }), [1]);
        assert_eq!(kept(&logits, Filters { min_p: 0.49, ..PLAIN }), [1, 2, 3]);
        assert_eq!(kept(&logits, Filters { min_p: 1.0, ..PLAIN }), [1]);
        // Of the three that top-k keeps, the first two have 7 / 9.
        assert_eq!(kept(&logits, Filters { top_k: 3, top_p: 0.75, ..PLAIN }), [1, 3]);
        assert_eq!(kept(&[1.0, 2.0, 2.0, 2.0], Filters { top_k: 2, ..PLAIN }), [1, 2]);
    }

    #[test]
    fn the_penalty_is_hugging_faces() {
        let penalty = |logits: &[f32], penalty| {
            sample(logits, |id| id < 2, &Filters { temperature: 0.0, penalty, ..PLAIN }, 0.0).token
        };
        assert_eq!(penalty(&[3.0, -1.0, 2.0], 1.0), 0);
        assert_eq!(penalty(&[3.0, -1.0, 2.0], 2.0), 2);
        assert_eq!(penalty(&[-2.0, -1.0, -1.5], 2.0), 2);
    }

    #[test]
    fn tokens_come_as_often_as_they_are_probable() {
        let weights = [1.0f64, 2.0, 3.0, 4.0, 6.0];
        let logits = weights.map(|w| w.ln() as f32);
        let mut times = [0u32; 5];
        for seed in 0..200 {
            for position in 0..200 {
                times[sample(&logits, |_| false, &PLAIN, share(seed, position)).token] += 1;
            }
        }
        let expected = weights.map(|w| w / 16.0 * 40_000.0);
        let chi: f64 = times.iter().zip(expected).map(|(n, e)| (f64::from(*n) - e).powi(2) / e).sum();
        assert!(chi < 18.5, "chi-square of 4 degrees of freedom {chi}, over the 0.1 % point: {times:?}");
    }
}
