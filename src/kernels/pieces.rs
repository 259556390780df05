//! Materialised or absorbed attention for a step, and the pieces of the contexts that keys and values are
//! expanded from, one after the other, so that the memory for them is bounded.
//!
//! Absorbed attention (`mla_absorb`, `mla_decode`, `mla_combine`) multiplies each query with whole latents:
//! `2 r + p` multiply-adds for each pair of a new token and a token that it sees, against `n + p + v` of
//! materialised attention (`mla_prefill`), which expands every token of the context first: `r (n + v)`. So
//! many new tokens favour the latter, few over a long context the former (DeepSeek-V2, arXiv:2405.04434,
//! section 2.1).

use std::fmt;

use super::{Sequence, Span};
use crate::gpu::Caps;

/// What one call of `mla_prefill` attends to: the spans of some sequences.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Its first entry of the spans, a multiple of [`ALIGNED`].
    pub first_span: u32,
    /// How many there are.
    pub spans: u32,
    /// Keys of all spans.
    pub keys: u32,
    /// Keys of the longest span.
    pub most_keys: u32,
    /// Whether it is its sequences' first: later ones are merged with what is there.
    pub first: bool,
}

/// A step's pieces, in the order in which they run.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pieces {
    /// All spans; between those of two pieces there may be unused ones.
    pub spans: Vec<Span>,
    /// The pieces' ranges of them.
    pub pieces: Vec<Piece>,
}

/// Each piece's spans are a binding, which starts at a multiple of 256 bytes.
pub const ALIGNED: u32 = 256 / size_of::<Span>() as u32;
/// The most memory for the expanded keys and values of a piece. More only saves dispatches.
const BYTES: u64 = 64 << 20;
/// The most keys of a piece.
const KEYS: u64 = 4096;

/// The most keys of a piece, at `key` bytes of expanded keys and values each, where a binding holds `binding`
/// bytes.
pub fn most_keys(key: u64, binding: u64) -> u32 {
    (BYTES.min(binding) / key.max(1)).clamp(1, KEYS) as u32
}

/// Spans, unused ones counted, that suffice for every step of so many sequences with contexts of at most
/// `context` tokens, in pieces of at most `keys` keys.
pub fn most_spans(sequences: u32, context: u32, keys: u32) -> u32 {
    sequences.saturating_mul(context.div_ceil(keys)).saturating_mul(ALIGNED)
}

/// Cuts the contexts of the sequences that have new tokens into pieces of at most `keys` keys: first all
/// sequences' first spans, then their second ones, and so on.
pub fn cut(batch: &[Sequence], keys: u32) -> Pieces {
    let mut all = Pieces::default();
    let length = |s: &Sequence| if s.tokens == 0 { 0 } else { s.position + s.tokens };
    let longest = batch.iter().map(length).max().unwrap_or(0);
    for begin in (0..longest).step_by(keys as usize) {
        let mut room = 0;
        for (sequence, s) in (0..).zip(batch).filter(|(_, s)| length(s) > begin) {
            let end = length(s).min(begin.saturating_add(keys));
            let count = end - begin;
            if count > room {
                all.spans.resize((all.spans.len() as u32).next_multiple_of(ALIGNED) as usize, Span::default());
                let first_span = all.spans.len() as u32;
                all.pieces.push(Piece { first_span, spans: 0, keys: 0, most_keys: 0, first: begin == 0 });
                room = keys;
            }
            let piece = all.pieces.last_mut().expect("there is no room before the first");
            all.spans.push(Span { sequence, begin, end, row: piece.keys });
            piece.spans += 1;
            piece.keys += count;
            piece.most_keys = piece.most_keys.max(count);
            room -= count;
        }
    }
    all
}

/// The widths of a model's attention.
#[derive(Clone, Copy, Debug)]
pub struct Widths {
    /// Of the latent.
    pub latent: u32,
    /// Of a key's part without rope.
    pub nope: u32,
    /// Of the rope key.
    pub rope: u32,
    /// Of a value.
    pub value: u32,
}

/// When attention is materialised: a Tuning of the device.
#[derive(Clone, Debug)]
pub struct Crossover {
    /// What a multiply-add of `mla_prefill` takes, that of `mla_decode` being 1; on matrix units of their kernels there.
    pub attend: f64,
    /// New tokens, and keys, of a workgroup's tile in it.
    pub tile: (u32, u32),
    /// What a multiply-add of the expansion takes (`gemm`), likewise.
    pub expand: f64,
    /// What one of the up-projections of new tokens takes (`mla_absorb`, `mla_combine`), likewise.
    pub absorb: f64,
    /// The reason.
    pub why: &'static str,
}

impl Crossover {
    /// The one of a device; `decode` and `prefill` say that absorbed and that materialised attention run on matrix
    /// units.
    pub fn of(caps: &Caps, decode: bool, prefill: bool) -> Crossover {
        let tile = if prefill { (128, 32) } else { (64, 32) };
        match (caps.is_software(), decode, prefill) {
            // lavapipe, prompts of 960 tokens: mla_decode 0.13 GFLOP/s, mla_prefill and gemm 0.29; the
            // up-projections, with a workgroup a token and head, cost more than their arithmetic.
            (true, ..) => Crossover { attend: 0.5, tile, expand: 0.5, absorb: 4.0, why: "as measured on a CPU driver" },
            // H100, DeepSeek-V2-Lite's layers, prompts of 512 tokens: the 4096 tokens before them took 94 ms
            // absorbed (21 TFLOP/s) and 142 ms materialised (11); without them, absorbed took 10 ms more.
            (false, false, _) => {
                Crossover { attend: 1.9, tile, expand: 1.9, absorb: 5.0, why: "as measured on an H100" }
            }
            // There, with all products on matrix units but those of mla_prefill, prompts of 1,024 tokens took 111.9
            // ms absorbed and 97.9 materialised; 7.6 and 18.7 ms more for each 1,024 tokens before them.
            (false, true, false) => {
                let why = "as measured on an H100, where only mla_prefill runs on invocations";
                Crossover { attend: 7.6, tile, expand: 2.0, absorb: 23.0, why }
            }
            // There, too, prompts of 1,024 tokens, 9 layers: 25.6 ms absorbed, of which the up-projections 8.5, and
            // 14.7 materialised; 2.8 and 0.8 ms more for each 1,024 tokens before them.
            (false, true, true) => {
                let why = "as measured on an H100, on matrix units but for the up-projections of queries and outputs";
                Crossover { attend: 0.7, tile, expand: 0.65, absorb: 26.0, why }
            }
        }
    }

    /// Whether materialised attention takes less time than absorbed attention for a step.
    pub fn materialises(&self, batch: &[Sequence], widths: &Widths) -> bool {
        let costs = batch.iter().map(|s| (self.materialised(s, widths), self.absorbed(s, widths)));
        let (materialised, absorbed) = costs.fold((0.0, 0.0), |a, b| (a.0 + b.0, a.1 + b.1));
        materialised < absorbed
    }

    /// Multiply-adds of a head, those of a workgroup's empty rows and keys included.
    fn materialised(&self, s: &Sequence, widths: &Widths) -> f64 {
        let Widths { latent, nope, rope, value } = *widths;
        if s.tokens == 0 {
            return 0.0;
        }
        let (rows, keys) = self.tile;
        let blocks = (0..s.tokens).step_by(rows as usize).map(|first| {
            let seen = s.position + (first + rows).min(s.tokens);
            f64::from(rows) * f64::from(seen.next_multiple_of(keys))
        });
        let expanded = f64::from(s.position + s.tokens) * f64::from(latent) * f64::from(nope + value);
        self.attend * blocks.sum::<f64>() * f64::from(nope + rope + value) + self.expand * expanded
    }

    /// Multiply-adds of a head, both up-projections of the new tokens included.
    fn absorbed(&self, s: &Sequence, widths: &Widths) -> f64 {
        let Widths { latent, nope, rope, value } = *widths;
        let (position, tokens) = (f64::from(s.position), f64::from(s.tokens));
        let pairs = tokens * position + tokens * (tokens + 1.0) / 2.0;
        let projected = tokens * f64::from(latent) * f64::from(nope + value);
        pairs * f64::from(2 * latent + rope) + self.absorb * projected
    }
}

impl fmt::Display for Crossover {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let Crossover { attend, expand, absorb, why, .. } = self;
        write!(
            f,
            "materialised in steps where keys x r (n + v) x {expand} + tokens x keys x (n + p + v) x {attend} is \
             less than tokens x keys x (2 r + p) + tokens x r (n + v) x {absorb}: {why}"
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::inputs::Inputs;

    fn batch(lengths: &[(u32, u32)]) -> Vec<Sequence> {
        lengths
            .iter()
            .map(|(position, tokens)| Sequence { position: *position, tokens: *tokens, ..Sequence::default() })
            .collect()
    }

    #[test]
    fn every_key_is_in_one_span_and_a_sequence_s_spans_follow_each_other() {
        let mut inputs = Inputs::seed(9);
        for _ in 0..300 {
            let most = [1, 50, 700][inputs.below(3) as usize];
            let lengths: Vec<_> = (0..1 + inputs.below(40)).map(|_| (inputs.below(most), inputs.below(9))).collect();
            let (batch, keys) = (batch(&lengths), 1 + inputs.below(200));
            let Pieces { spans, pieces } = cut(&batch, keys);
            let mut next = vec![0; batch.len()];
            for piece in &pieces {
                assert!(piece.first_span % ALIGNED == 0 && piece.keys <= keys && piece.spans > 0);
                let spans = &spans[piece.first_span as usize..][..piece.spans as usize];
                let mut row = 0;
                for span in spans {
                    let next = &mut next[span.sequence as usize];
                    assert_eq!((span.begin, span.row), (*next, row));
                    assert!(span.end > span.begin && (span.begin == 0) == piece.first);
                    row += span.end - span.begin;
                    *next = span.end;
                }
                assert_eq!(row, piece.keys);
                assert_eq!(spans.iter().map(|s| s.end - s.begin).max(), Some(piece.most_keys));
            }
            for (end, (position, tokens)) in next.iter().zip(&lengths) {
                assert_eq!(*end, if *tokens == 0 { 0 } else { position + tokens });
            }
            let longest = lengths.iter().map(|(position, tokens)| position + tokens).max().expect("one");
            assert!(spans.len() as u32 <= most_spans(batch.len() as u32, longest, keys));
        }
        assert_eq!(cut(&[], 5), Pieces::default());
    }

    #[test]
    fn on_a_gpu_prompts_are_materialised_and_what_follows_a_long_context_is_absorbed() {
        let widths = Widths { latent: 512, nope: 128, rope: 64, value: 128 };
        for matrices in [false, true] {
            let gpu = Crossover::of(&Caps::portable(), matrices, false);
            assert!(gpu.materialises(&batch(&[(0, 256)]), &widths));
            assert!(!gpu.materialises(&batch(&[(4096, 256)]), &widths), "measured: 317 ms absorbed, 355 materialised");
        }
        // Measured, ms: 119.7 absorbed and 112.6 materialised, 126.1 and 132.2.
        let matrices = Crossover::of(&Caps::matrices(), true, false);
        assert!(matrices.materialises(&batch(&[(1024, 1024)]), &widths));
        assert!(!matrices.materialises(&batch(&[(2048, 1024)]), &widths));
    }

    #[test]
    fn prompts_are_materialised_and_few_tokens_over_a_long_context_are_absorbed() {
        let widths = Widths { latent: 512, nope: 128, rope: 64, value: 128 };
        let even = Crossover { attend: 1.0, tile: (64, 32), expand: 1.0, absorb: 1.0, why: "" };
        let materialises = |lengths: &[(u32, u32)]| even.materialises(&batch(lengths), &widths);
        assert!(materialises(&[(0, 256)]) && materialises(&[(4096, 512)]) && materialises(&[(0, 4096)]));
        assert!(!materialises(&[(4096, 1)]) && !materialises(&[(100_000, 64)]) && !materialises(&[(0, 1)]));
        assert!(!materialises(&[(4096, 1); 64]));
        // One long prompt decides for the step.
        assert!(materialises(&[(0, 1024), (300, 1)]) && !materialises(&[]));
        let slow = Crossover { attend: 8.0, ..even.clone() };
        assert!(!slow.materialises(&batch(&[(4096, 512)]), &widths));
        let dear = Crossover { absorb: 4.0, ..even };
        assert!(!dear.materialises(&batch(&[(0, 1)]), &widths) && dear.materialises(&batch(&[(0, 32)]), &widths));
    }

    #[test]
    fn a_piece_is_bounded_by_memory_and_bindings() {
        assert_eq!(most_keys(4 * 128 * 256, 128 << 20), 512);
        assert_eq!(most_keys(4 * 128 * 256, 16 << 20), 128);
        assert_eq!(most_keys(512, 128 << 20), 4096);
        assert_eq!(most_keys(1 << 30, 128 << 20), 1);
    }
}
