//! What sequences decode together.

use serde::Serialize;

use crate::num::record::RecordFormat;

/// DeepSeek's latent and rope key.
pub(super) const WIDTHS: (u32, u32) = (512, 64);
/// Tokens of a page.
pub(super) const PAGE: u32 = 64;
/// The most sequences that are measured.
pub const MOST_SEQUENCES: u32 = 4096;
/// The most query heads.
pub const MOST_HEADS: u32 = 1024;
/// The most tokens of a context.
pub const MOST_CONTEXT: u32 = 1 << 22;

/// Sequences that decode a step together.
#[derive(Clone, Debug, PartialEq)]
pub struct Shape {
    /// Query heads.
    pub heads: u32,
    /// Tokens that each sequence attends to, its new ones included.
    pub contexts: Vec<u32>,
    /// New tokens of each sequence (s_q).
    pub tokens: u32,
}

impl Shape {
    /// Every combination, one new token a sequence.
    pub fn product(batches: &[u32], heads: &[u32], contexts: &[u32]) -> Vec<Shape> {
        let mut shapes = Vec::new();
        for batch in batches {
            for heads in heads {
                let of = |context: &u32| Shape { heads: *heads, contexts: vec![*context; *batch as usize], tokens: 1 };
                shapes.extend(contexts.iter().map(of));
            }
        }
        shapes
    }

    /// Sequences and their context, where all have the same.
    pub fn even(&self) -> Option<(u32, u32)> {
        let context = self.contexts[0];
        self.contexts.iter().all(|c| *c == context).then_some((self.contexts.len() as u32, context))
    }

    /// Pages of all sequences.
    pub(super) fn pages(&self) -> u64 {
        self.contexts.iter().map(|context| u64::from(context.div_ceil(PAGE))).sum()
    }

    /// Records that must be read.
    pub(super) fn records(&self) -> f64 {
        self.contexts.iter().map(|context| f64::from(*context)).sum()
    }

    /// Operations of scores and values, causally.
    pub(super) fn flops(&self) -> f64 {
        let seen = |context: &u32| (0..self.tokens).map(|i| f64::from(context - i)).sum::<f64>();
        let (r, p) = WIDTHS;
        2.0 * f64::from(self.heads) * f64::from(2 * r + p) * self.contexts.iter().map(seen).sum::<f64>()
    }

    /// Rows of queries.
    pub(super) fn rows(&self) -> usize {
        self.contexts.len() * (self.tokens * self.heads) as usize
    }

    /// As the record names it.
    pub(crate) fn asked(&self, format: RecordFormat) -> Asked {
        Asked {
            batch: self.contexts.len(),
            heads: self.heads,
            contexts: self.even().map_or_else(|| self.contexts.clone(), |(_, context)| vec![context]),
            tokens: self.tokens,
            dtype: format!("{format:?}").to_lowercase(),
        }
    }
}

/// What was asked, as the record names it.
#[derive(Clone, Debug, Serialize)]
pub struct Asked {
    /// Sequences.
    pub batch: usize,
    /// Query heads.
    pub heads: u32,
    /// Tokens of each sequence's context; one where all have the same.
    pub contexts: Vec<u32>,
    /// New tokens of each sequence.
    pub tokens: u32,
    /// Format of the records: `f16`, `f32` or `fp8`.
    pub dtype: String,
}
