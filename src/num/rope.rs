//! Rotary position embedding: frequencies, and the table of rotations that the kernels read.
//!
//! A slice of `p` elements is `p / 2` pairs; pair `i` at position `t` turns by `t * inverse[i]`.
//! The scalings follow transformers' `modeling_rope_utils.py`, in f64.

use std::f64::consts::TAU;

/// Positions of the table's fine rows; each coarse row covers as many.
pub const BLOCK: u32 = 256;

/// Which two elements of a slice turn together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RopeLayout {
    /// Neighbours: elements 2 i and 2 i + 1 (DeepSeek).
    Interleaved,
    /// Across the halves: elements i and i + p / 2 (GPT-NeoX, Llama in transformers).
    Half,
}

impl RopeLayout {
    /// The two elements of pair `pair` in a slice of `pairs` pairs.
    pub fn elements(self, pair: usize, pairs: usize) -> [usize; 2] {
        match self {
            RopeLayout::Interleaved => [2 * pair, 2 * pair + 1],
            RopeLayout::Half => [pair, pair + pairs],
        }
    }
}

/// What a model's configuration says about scaling by YaRN (Peng et al. 2023).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Yarn {
    /// By how much the context grew.
    pub factor: f64,
    /// The context before that.
    pub original_length: f64,
    /// Pairs with more rotations than this over the original context keep their frequency.
    pub beta_fast: f64,
    /// Pairs with fewer rotations than this are slowed by the whole factor.
    pub beta_slow: f64,
    /// Weight of the attention factor's numerator; 1 where the configuration names none.
    pub mscale: f64,
    /// Weight of its denominator; 0 where the configuration names none.
    pub mscale_all_dim: f64,
}

impl Yarn {
    /// `0.1 * weight * ln(factor) + 1`. Its square for `mscale_all_dim` goes into the softmax scale.
    pub fn magnitude(&self, weight: f64) -> f64 {
        if self.factor <= 1.0 { 1.0 } else { 0.1 * weight * self.factor.ln() + 1.0 }
    }

    /// The pair that makes `rotations` turns over the original context.
    fn pair_of(&self, rotations: f64, p: u32, theta: f64) -> f64 {
        f64::from(p) * (self.original_length / (rotations * TAU)).ln() / (2.0 * theta.ln())
    }
}

/// The frequencies of a model's pairs.
#[derive(Clone, Debug, PartialEq)]
pub struct Frequencies {
    /// Radians a position, `[p / 2]`.
    pub inverse: Vec<f64>,
    /// Factor of each cosine and sine.
    pub attention: f64,
}

impl Frequencies {
    /// `theta^(-2 i / p)`, for slices of `p` elements.
    ///
    /// # Panics
    /// When `p` is odd.
    pub fn plain(p: u32, theta: f64) -> Frequencies {
        assert!(p.is_multiple_of(2), "a rope slice is made of pairs, but p is {p}");
        let inverse = (0..p / 2).map(|i| theta.powf(-f64::from(2 * i) / f64::from(p))).collect();
        Frequencies { inverse, attention: 1.0 }
    }

    /// Plain, with positions divided by `factor`.
    pub fn linear(p: u32, theta: f64, factor: f64) -> Frequencies {
        let mut plain = Frequencies::plain(p, theta);
        plain.inverse.iter_mut().for_each(|f| *f /= factor);
        plain
    }

    /// YaRN: fast pairs keep their frequency, slow ones are divided by the factor, with a ramp between.
    pub fn yarn(p: u32, theta: f64, yarn: &Yarn) -> Frequencies {
        let mut scaled = Frequencies::plain(p, theta);
        let low = yarn.pair_of(yarn.beta_fast, p, theta).floor().max(0.0);
        let high = yarn.pair_of(yarn.beta_slow, p, theta).ceil().min(f64::from(p) - 1.0);
        let width = if low == high { 0.001 } else { high - low };
        for (i, f) in scaled.inverse.iter_mut().enumerate() {
            let slowed = ((i as f64 - low) / width).clamp(0.0, 1.0);
            *f *= slowed / yarn.factor + (1.0 - slowed);
        }
        scaled.attention = yarn.magnitude(yarn.mscale) / yarn.magnitude(yarn.mscale_all_dim);
        scaled
    }

    /// Longrope (Ding et al. 2024): the frequency of pair `i` divided by `factors[i]`. A model has two
    /// lists, `short_factor` for contexts up to `original_length` and `long_factor` beyond; the caller
    /// passes the one for the context that it serves. `max_length` sets the attention factor alone.
    ///
    /// # Panics
    /// When `factors` are not `p / 2`.
    pub fn longrope(p: u32, theta: f64, factors: &[f64], max_length: f64, original_length: f64) -> Frequencies {
        let mut scaled = Frequencies::plain(p, theta);
        assert!(factors.len() == scaled.inverse.len(), "{} longrope factors for {} pairs", factors.len(), p / 2);
        scaled.inverse.iter_mut().zip(factors).for_each(|(f, by)| *f /= by);
        let growth = max_length / original_length;
        if growth > 1.0 {
            scaled.attention = (1.0 + growth.ln() / original_length.ln()).sqrt();
        }
        scaled
    }

    /// Pairs of a slice.
    pub fn pairs(&self) -> u32 {
        self.inverse.len() as u32
    }

    /// `(cos, sin)` of a pair at a position, times the attention factor.
    pub fn rotation(&self, position: u32, pair: u32) -> (f64, f64) {
        let (sin, cos) = (f64::from(position) * self.inverse[pair as usize]).sin_cos();
        (cos * self.attention, sin * self.attention)
    }

    /// The table that `shaders/lib/rope_table.wgsl` reads, for positions below `max_positions`:
    /// `[256 + ceil(max_positions / 256), p / 2]` of (cos, sin). Row `t < 256` turns by `t`, row
    /// `256 + b` by `256 b`; the product of two rows turns by `256 b + t`. The attention factor
    /// stands in the rows behind 256 alone, so that the product holds it once.
    pub fn table(&self, max_positions: u32) -> Vec<[f32; 2]> {
        let coarse = (0..max_positions.div_ceil(BLOCK)).map(|b| (f64::from(b * BLOCK), self.attention));
        let rows = (0..BLOCK).map(|t| (f64::from(t), 1.0)).chain(coarse);
        let row = |(position, scale): (f64, f64)| {
            self.inverse.iter().map(move |f| {
                let (sin, cos) = (position * f).sin_cos();
                [(cos * scale) as f32, (sin * scale) as f32]
            })
        };
        rows.flat_map(row).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(found: f64, expected: f64) {
        assert!((found - expected).abs() <= 1e-12 * expected.abs(), "expected {expected:e}, found {found:e}");
    }

    /// The scaling of DeepSeek-V2 and V3.
    const DEEPSEEK: Yarn = Yarn {
        factor: 40.0,
        original_length: 4096.0,
        beta_fast: 32.0,
        beta_slow: 1.0,
        mscale: 0.707,
        mscale_all_dim: 0.707,
    };

    #[test]
    fn plain_and_linear_frequencies_have_the_published_values() {
        close(Frequencies::plain(64, 1e4).inverse[1], 0.7498942093324559);
        close(Frequencies::plain(32, 1e6).inverse[5], 0.01333521432163324);
        close(Frequencies::linear(64, 1e4, 4.0).inverse[1], 0.7498942093324559 / 4.0);
        assert_eq!(Frequencies::plain(0, 1e4).pairs(), 0);
        assert_eq!(Frequencies::plain(0, 1e4).table(1000), Vec::<[f32; 2]>::new());
    }

    #[test]
    fn yarn_keeps_fast_pairs_and_slows_slow_ones() {
        let yarn = Frequencies::yarn(64, 1e4, &DEEPSEEK);
        // Ramp from pair 10 to pair 23, from the formula in another language.
        let expected = [
            (0, 1.0),
            (10, 0.056234132519034905),
            (11, 0.03900692656714386),
            (15, 0.008334508951020777),
            (20, 0.0007905694150420945),
            (22, 0.0001778279410038922),
            (23, 3.33380358040831e-05),
            (31, 3.33380358040831e-06),
        ];
        expected.iter().for_each(|(i, f)| close(yarn.inverse[*i], *f));
        close(yarn.attention, 1.0);
    }

    #[test]
    fn yarn_with_another_theta_has_another_ramp() {
        let yarn = Frequencies::yarn(64, 5e4, &Yarn { factor: 64.0, ..DEEPSEEK });
        let expected = [
            (9, 0.04377665595133869),
            (15, 0.002670203390997384),
            (19, 0.00015837499102694852),
            (20, 1.8070233867863153e-05),
        ];
        expected.iter().for_each(|(i, f)| close(yarn.inverse[*i], *f));
    }

    #[test]
    fn the_attention_factor_is_the_quotient_of_the_magnitudes() {
        close(DEEPSEEK.magnitude(0.707), 1.2608037774058554);
        close(DEEPSEEK.magnitude(1.0), 1.3688879454113936);
        let named = |mscale, mscale_all_dim| Yarn { mscale, mscale_all_dim, ..DEEPSEEK };
        close(Frequencies::yarn(64, 1e4, &named(1.0, 0.707)).attention, 1.3688879454113936 / 1.2608037774058554);
        close(Frequencies::yarn(64, 1e4, &named(1.0, 0.0)).attention, 1.3688879454113936);
        assert_eq!(Yarn { factor: 1.0, ..DEEPSEEK }.magnitude(1.0), 1.0);
    }

    #[test]
    fn longrope_divides_each_frequency_by_its_factor() {
        let long = Frequencies::longrope(4, 1e4, &[2.0, 5.0], 131072.0, 4096.0);
        close(long.inverse[0], 0.5);
        close(long.inverse[1], 0.002);
        close(long.attention, 1.1902380714238083);
        assert_eq!(Frequencies::longrope(4, 1e4, &[2.0, 5.0], 4096.0, 4096.0).attention, 1.0);
    }

    #[test]
    fn two_rows_of_the_table_give_the_rotation_at_any_position() {
        let yarn = Frequencies::yarn(64, 1e4, &Yarn { mscale: 1.0, ..DEEPSEEK });
        let pairs = yarn.pairs();
        let table = yarn.table(1_000_001);
        assert_eq!(table.len(), (256 + 3907) * pairs as usize);
        for position in [0, 1, 255, 256, 257, 4095, 131_071, 1_000_000] {
            for pair in 0..pairs {
                let at = |row: u32| table[(row * pairs + pair) as usize].map(f64::from);
                let ([c, s], [cc, cs]) = (at(position % BLOCK), at(BLOCK + position / BLOCK));
                let (cos, sin) = yarn.rotation(position, pair);
                assert!((c * cc - s * cs - cos).abs() < 2e-7, "cos of pair {pair} at {position}");
                assert!((s * cc + c * cs - sin).abs() < 2e-7, "sin of pair {pair} at {position}");
            }
        }
    }

    #[test]
    fn rotations_are_exact_at_long_positions() {
        // Cosines to 50 digits with decimal arithmetic.
        let plain = Frequencies::plain(64, 1e4);
        assert!((plain.rotation(131_071, 0).0 - -0.8179834993879491).abs() < 1e-11);
        assert!((plain.rotation(131_071, 1).0 - 0.0546179309379251).abs() < 1e-10);
        assert!((plain.rotation(1_000_000, 0).0 - 0.9367521275331448).abs() < 1e-10);
        assert!((plain.rotation(1_000_000, 0).1 - -0.349_993_502_171_293).abs() < 1e-10);
    }
}
