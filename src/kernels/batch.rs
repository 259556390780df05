//! The facts of a step's sequences, as the kernels read them (`shaders/lib/batch.wgsl`).

/// One sequence of a step. Lives in the storage buffer `batch`, at batch 1 too.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
pub struct Sequence {
    /// Tokens in its cache before this step: the position of its first new token.
    pub position: u32,
    /// New tokens in this step (s_q); may be 0.
    pub tokens: u32,
    /// The row of its first new token in the step's `[tokens, ...]` matrices.
    pub first_row: u32,
    /// Where its block table starts in `block_table`, in entries.
    pub pages: u32,
    /// Its slot in per-sequence state (penalties, recurrent state).
    pub slot: u32,
    /// The sampler's seed.
    pub seed: u32,
    /// The row in `partials`, in tokens, of its first split's first token.
    pub first_partial: u32,
    /// Into how many splits its context is cut.
    pub splits: u32,
}

/// One new token of a step. Lives in the storage buffer `rows`, one entry a row of `[tokens, ...]`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
pub struct Row {
    /// Which sequence it belongs to.
    pub sequence: u32,
    /// Its position in that sequence, from 0.
    pub position: u32,
}

impl Sequence {
    /// The rows of a step, in the order of its sequences.
    pub fn rows(batch: &[Sequence]) -> Vec<Row> {
        let mut rows = Vec::new();
        for (sequence, s) in batch.iter().enumerate() {
            debug_assert_eq!(s.first_row as usize, rows.len(), "rows follow the sequences' order");
            rows.extend((0..s.tokens).map(|i| Row { sequence: sequence as u32, position: s.position + i }));
        }
        rows
    }
}

/// The logarithm of a page's tokens, by which shaders find a token's page.
///
/// # Panics
/// When they are no power of two.
pub(super) fn page_bits(tokens: u32) -> u32 {
    assert!(tokens.is_power_of_two(), "pages of {tokens} tokens, which is no power of two");
    tokens.ilog2()
}

/// A piece of one sequence's context that one workgroup row of `mla_decode` folds. Lives in the
/// storage buffer `splits`. Partial row of token `i` and head `h`: `(partial + i) * heads + h`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
pub struct Split {
    /// The sequence's index in `batch`.
    pub sequence: u32,
    /// Its first token of the context.
    pub begin: u32,
    /// One past its last token; the context ends at `position + tokens`.
    pub end: u32,
    /// Where its result goes: `first_partial + index * tokens`, in tokens.
    pub partial: u32,
}

/// A piece of one sequence's context whose keys and values were expanded for `mla_prefill`. Lives in
/// the storage buffer `spans`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
pub struct Span {
    /// The sequence's index in `batch`.
    pub sequence: u32,
    /// Its first key's position.
    pub begin: u32,
    /// One past its last key's position.
    pub end: u32,
    /// The row of its first key in the expanded keys and values.
    pub row: u32,
}

/// One buffer of a paged latent cache: `pages` pages from page `first_page` on.
#[derive(Clone, Debug)]
pub struct CacheChunk {
    /// Its first page's number in the cache.
    pub first_page: u32,
    /// How many pages it holds.
    pub pages: u32,
    /// `[pages, page tokens, record]`.
    pub view: crate::gpu::View,
}

#[cfg(test)]
mod tests {
    use super::page_bits;

    #[test]
    fn the_logarithm_of_a_page_is_exact() {
        assert_eq!([1, 16, 128].map(page_bits), [0, 4, 7]);
    }

    #[test]
    #[should_panic(expected = "pages of 48 tokens")]
    fn a_page_that_is_no_power_of_two_is_a_fault_of_the_caller() {
        page_bits(48);
    }
}
