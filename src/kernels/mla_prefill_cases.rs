//! The cases of `mla_prefill` and `mla_prefill_coop`: new tokens of some sequences over expanded keys and values, in one
//! piece or several.

use super::inputs::{Inputs, strided, words};
use super::mla_combine::NOTHING;
use super::mla_prefill::{Args, MlaPrefill, Spec};
use super::mla_prefill_coop::MlaPrefillCoop;
use super::{Case, Check, Data, Job, Kernel, Sequence, Set, Span, Tensor, Tolerance};
use crate::gpu::Recording;
use crate::reference::gemm_coop::halves;

/// A kernel of these cases.
pub(super) trait Prefill: Kernel<Spec = Spec> {
    /// What the widths of its cases are multiples of.
    const WIDTH: u32;
    /// The NMSE that its rounding to fewer bits than f32's gives, and the factor on that of f32's sums.
    const ROUNDING: (f64, f64);
    /// Expanded keys and values are f16.
    const HALVES: bool;
    /// Its `record`.
    fn add(&self, recording: &mut Recording, args: Args);
}

impl Prefill for MlaPrefill {
    const WIDTH: u32 = 2;
    const ROUNDING: (f64, f64) = (0.0, 1.0);
    const HALVES: bool = false;

    fn add(&self, recording: &mut Recording, args: Args) {
        self.record(recording, args);
    }
}

impl Prefill for MlaPrefillCoop {
    const WIDTH: u32 = 16;
    // Weights have 11 bits; matrix units cut the bits of a sum that are far below its largest term.
    const ROUNDING: (f64, f64) = (2.4e-7, 4.0);
    const HALVES: bool = true;

    fn add(&self, recording: &mut Recording, args: Args) {
        self.record(recording, args);
    }
}

/// The cases of a kernel.
pub(super) fn cases<K: Prefill>(set: Set) -> Vec<Case<K>> {
    let shape = |widths, heads, sequences: &[(u32, u32)], from, piece| Shape {
        widths,
        heads,
        sequences: sequences.to_vec(),
        from,
        piece,
        sharp: 1.0,
        accumulate: false,
        beta: 0.0,
    };
    if set == Set::Timed {
        let lite = |position, tokens| shape((128, 64, 128), 16, &[(position, tokens)], 0, 1 << 20).case::<K>();
        return vec![lite(0, 512), lite(3584, 512), lite(0, 2048)];
    }
    const ALL: u32 = 1 << 20;
    let mixed: &[(u32, u32)] = &[(0, 5), (7, 1), (3, 0), (40, 66)];
    let shapes = [
        shape((128, 64, 128), 2, &[(0, 70)], 0, ALL),
        shape((32, 8, 32), 3, mixed, 0, ALL),
        shape((24, 6, 40), 9, &[(33, 65)], 0, ALL),
        shape((64, 0, 64), 1, &[(0, 64)], 0, ALL),
        shape((8, 2, 8), 20, &[(100, 3), (0, 1)], 0, ALL),
        shape((128, 0, 192), 1, &[(0, 33)], 0, ALL),
        shape((16, 10, 264), 3, &[(5, 64)], 0, ALL),
        shape((0, 64, 128), 1, &[(0, 129)], 0, ALL),
        shape((192, 64, 256), 2, &[(17, 140)], 0, ALL),
        shape((64, 32, 64), 3, &[(0, 200), (250, 17)], 0, ALL),
        shape((8, 2, 8), 128, &[(3, 5)], 0, ALL),
        // A later piece alone: the first rows see none of it.
        shape((48, 16, 48), 2, &[(9, 40), (30, 2)], 12, ALL),
        Shape { sharp: 40.0, ..shape((128, 64, 128), 1, &[(64, 40)], 0, ALL) },
        Shape { beta: 0.3, ..shape((16, 8, 16), 3, &[(30, 70), (0, 9)], 0, ALL) },
    ];
    let pieces = [
        shape((128, 64, 128), 1, &[(0, 70)], 0, 32),
        shape((32, 8, 32), 3, mixed, 0, 17),
        shape((24, 6, 40), 3, &[(33, 65)], 0, 64),
        Shape { beta: 0.1, ..shape((64, 0, 64), 9, &[(10, 4)], 0, 1) },
        shape((48, 16, 48), 2, &[(9, 40), (30, 2)], 12, ALL),
        Shape { sharp: 40.0, ..shape((16, 16, 32), 2, &[(64, 150)], 0, 48) },
        Shape { sharp: 40.0, ..shape((16, 2, 24), 4, &[(64, 40)], 0, 30) },
    ];
    let pieces = pieces.into_iter().map(|s| Shape { accumulate: true, ..s });
    let fits = |s: &Shape| [s.widths.0, s.widths.1, s.widths.2].iter().all(|width| width.is_multiple_of(K::WIDTH));
    shapes.into_iter().chain(pieces).filter(fits).map(Shape::case).collect()
}

/// A case of a kernel's widths for its self-test.
pub(super) fn self_test_of<K: Prefill>(spec: &Spec) -> Job<K> {
    // Blocks and tiles that are not whole, one row that sees little, and with pieces before, some that weigh nothing.
    let shape = Shape {
        widths: (spec.nope, spec.rope, spec.value),
        heads: 2,
        sequences: vec![(37, 150), (0, 3)],
        from: 0,
        piece: 1 << 20,
        sharp: 1.0,
        accumulate: spec.accumulate,
        beta: 0.0,
    };
    shape.job()
}

/// A case: widths (n, p, v), sequences (position, tokens), the context from `from` on in pieces.
#[derive(Clone)]
struct Shape {
    widths: (u32, u32, u32),
    heads: u32,
    sequences: Vec<(u32, u32)>,
    from: u32,
    piece: u32,
    /// Factor of the scores: a large one makes a peaked softmax.
    sharp: f32,
    accumulate: bool,
    /// Growth of the queries, with every [`LENGTH`] positions.
    beta: f32,
}

/// The length of the queries' growth.
const LENGTH: u32 = 16;

/// Rows of the keys that no span names, before each sequence's.
const GAP: u32 = 3;

impl Shape {
    /// Pairs of query and key that see each other.
    fn visible(&self) -> f64 {
        let seen = |position: u32| f64::from((position + 1).saturating_sub(self.from));
        let of = |(position, tokens): &(u32, u32)| (0..*tokens).map(|i| seen(position + i)).sum::<f64>();
        self.sequences.iter().map(of).sum()
    }

    fn case<K: Prefill>(self) -> Case<K> {
        let (nope, rope, value) = self.widths;
        let Shape { heads, sequences, from, piece, sharp, accumulate, beta, .. } = &self;
        let name = format!(
            "{heads} heads of {nope}+{rope}/{value}, (position, tokens) {sequences:?}, context from {from} in pieces \
             of {piece}, scores x {sharp}, accumulate {accumulate}, beta {beta}"
        );
        let h = f64::from(*heads);
        let flops = 2.0 * h * self.visible() * f64::from(nope + rope + value);
        let keys = f64::from(sequences.iter().map(|(position, tokens)| position + tokens).sum::<u32>());
        let tokens = f64::from(sequences.iter().map(|(_, tokens)| tokens).sum::<u32>());
        let moved = 4.0 * (keys * (h * f64::from(nope + value) + f64::from(rope)))
            + 4.0 * tokens * h * f64::from(nope + rope + value + 1);
        let spec = Spec { nope, rope, value, accumulate: *accumulate };
        Case::new(name, spec, flops, move || self.job()).moving(moved)
    }

    fn job<K: Prefill>(&self) -> Job<K> {
        let (n, p, v) = (self.widths.0 as usize, self.widths.1 as usize, self.widths.2 as usize);
        let heads = self.heads as usize;
        let mut inputs = Inputs::seed(u64::from(self.widths.0 * 7919 + self.widths.1 * 31 + self.heads + self.piece));
        let (mut batch, mut first_row, mut keys) = (Vec::new(), 0, Vec::new());
        let (mut kv, mut k_pe): (Vec<f32>, Vec<f32>) = (Vec::new(), Vec::new());
        let pe_stride = p.next_multiple_of(4).max(4);
        for (position, tokens) in &self.sequences {
            batch.push(Sequence { position: *position, tokens: *tokens, first_row, ..Sequence::default() });
            first_row += tokens;
            keys.push(kv.len() as u32 / (self.heads * (self.widths.0 + self.widths.2)) + GAP);
            kv.extend(vec![f32::NAN; GAP as usize * heads * (n + v)]);
            k_pe.extend(vec![f32::NAN; GAP as usize * pe_stride]);
            for _ in 0..position + tokens {
                kv.extend(inputs.normals(heads * (n + v), 1.0));
                k_pe.extend(inputs.normals(p, 1.0));
                k_pe.resize(k_pe.len() + pe_stride - p, f32::NAN);
            }
        }
        let tokens = first_row as usize;
        let q_stride = (heads * (n + p)).next_multiple_of(4);
        let q = strided(&inputs.normals(tokens * heads * (n + p), 1.0), heads * (n + p), q_stride);
        // Of earlier pieces: every other token saw none.
        let (mut output, mut lse) = (vec![f32::NAN; tokens * heads * v], vec![f32::NAN; tokens * heads]);
        if self.accumulate {
            for token in 0..tokens {
                let saw = token % 2 == 1;
                for i in token * heads..(token + 1) * heads {
                    lse[i] = if saw { 2.0 + inputs.normal() } else { NOTHING };
                    output[i * v..][..v].fill_with(|| if saw { inputs.normal() } else { f32::NAN });
                }
            }
        }
        let longest = self.sequences.iter().map(|(position, tokens)| position + tokens).max().expect("a sequence");
        // Every piece is a call with a span for each sequence that reaches it.
        let span = |begin: u32, (i, s): (usize, &Sequence)| {
            let end = (s.position + s.tokens).min(begin.saturating_add(self.piece));
            (s.tokens > 0 && begin < end).then(|| Span { sequence: i as u32, begin, end, row: keys[i] + begin })
        };
        let mut calls: Vec<Vec<Span>> = Vec::new();
        let mut begin = self.from;
        while begin < longest {
            calls.push(batch.iter().enumerate().filter_map(|s| span(begin, s)).collect());
            begin = begin.saturating_add(self.piece);
        }
        assert!(calls.len() <= SPANS.len() && (self.accumulate || calls.len() == 1), "{} pieces", calls.len());
        let sums = Tolerance::f32(4 * (n + p) * self.sharp as usize);
        let tolerance = Tolerance { nmse: K::ROUNDING.0 + K::ROUNDING.1 * sums.nmse, ..sums };
        let mut tensors = vec![
            Tensor::input("batch", words(&batch)),
            Tensor::input("q", Data::F32(q)),
            Tensor::input("kv", if K::HALVES { Data::F16(halves(&kv)) } else { Data::F32(kv) }),
            Tensor::input("k_pe", Data::F32(k_pe)),
            Tensor::output("output", Data::F32(output), Check::rows(v, tolerance)),
            Tensor::output("lse", Data::F32(lse), Check::rows(heads, tolerance)),
        ];
        tensors.extend(SPANS.iter().zip(&calls).map(|(name, spans)| Tensor::input(name, words(spans))));
        let most_tokens = self.sequences.iter().map(|(_, tokens)| *tokens).max().expect("a sequence");
        let scale = self.sharp / ((n + p) as f32).sqrt();
        let beta = self.beta;
        let counts: Vec<u32> = calls.iter().map(|spans| spans.len() as u32).collect();
        Job::new(tensors, move |kernel: &K, t, recording| {
            for (name, count) in SPANS.iter().zip(&counts) {
                let args = Args {
                    batch: t.get("batch"),
                    spans: t.get(name),
                    q: t.get("q"),
                    kv: t.get("kv"),
                    k_pe: t.get("k_pe"),
                    output: t.get("output"),
                    lse: t.get("lse"),
                    count: *count,
                    most_tokens,
                    heads: heads as u32,
                    q_stride: q_stride as u32,
                    k_pe_stride: pe_stride as u32,
                    scale,
                    beta,
                    length: LENGTH,
                };
                kernel.add(recording, args);
            }
        })
    }
}

/// The tensors of the calls' spans, as many as a case has pieces.
const SPANS: [&str; 16] = [
    "spans 0", "spans 1", "spans 2", "spans 3", "spans 4", "spans 5", "spans 6", "spans 7", "spans 8", "spans 9",
    "spans 10", "spans 11", "spans 12", "spans 13", "spans 14", "spans 15",
];
