//! `mla_prefill`: materialised attention of many new tokens, over one piece of the context whose keys
//! and values were expanded from the latents (DeepSeek-V2, arXiv:2405.04434, section 2.1). A key tile
//! is read once for a block of 64 rows, by online softmax (Dao 2023, arXiv:2307.08691).

use std::sync::Arc;

use rayon::prelude::*;

use super::inputs::{Inputs, strided, words};
use super::mla_combine::NOTHING;
use super::{Case, Check, Choice, Data, Field, Job, Kernel, Sequence, Set, Span, Tensor, Tolerance, Variant};
use crate::gpu::{Caps, Grid, Host, Recording, Shader, Source, View};
use crate::reference::mla_absorb::growth;
use crate::reference::mla_prefill::{Key, attend};
use crate::{reference, wgsl};

params! {
    /// Sizes of a call. Strides are in f32.
    pub struct Params {
        /// Query heads.
        pub heads: u32,
        /// From one token's queries to the next, a multiple of 4.
        pub q_stride: u32,
        /// From one key's row to the next: heads (n + v).
        pub kv_stride: u32,
        /// From one rope key to the next, a multiple of 4.
        pub k_pe_stride: u32,
        /// From one token's output to the next: heads v.
        pub output_stride: u32,
        /// Softmax scale times log2(e).
        pub scale: f32,
        /// Queries grow by 1 + beta ln(1 + floor(position / length)); 0 for none.
        pub beta: f32,
        /// The length of that growth, at least 1.
        pub length: u32,
    }
}

/// What the model fixes.
#[derive(Clone, Debug, PartialEq)]
pub struct Spec {
    /// Width of a key's part without rope (`qk_nope_head_dim`), a multiple of 8.
    pub nope: u32,
    /// Width of the rope key (`qk_rope_head_dim`), even, 0 for none.
    pub rope: u32,
    /// Width of a value (`v_head_dim`), a multiple of 8.
    pub value: u32,
    /// Merge with what the output and its log-sum-exp hold of earlier pieces of the context.
    pub accumulate: bool,
}

/// There is nothing to choose.
#[derive(Clone, Debug)]
pub struct Tuning;

/// New tokens that a workgroup takes.
const ROWS: u32 = 64;

/// What a call reads and writes.
pub struct Args {
    /// `[sequences]` [`Sequence`].
    pub batch: View,
    /// `[spans]` [`Span`], at most one for a sequence.
    pub spans: View,
    /// `[tokens, q_stride]` f32: heads of n + p, the rope part turned.
    pub q: View,
    /// `[keys, heads * (n + v)]` f32: for each head the key's part without rope, then the value.
    pub kv: View,
    /// `[keys, k_pe_stride]` f32, turned; any buffer where p is 0.
    pub k_pe: View,
    /// `[tokens, heads * v]` f32, written.
    pub output: View,
    /// `[tokens, heads]` f32, written: the natural log-sum-exp, -3e38 for a row that saw no key.
    pub lse: View,
    /// Entries of `spans`.
    pub count: u32,
    /// The most new tokens of a sequence.
    pub most_tokens: u32,
    /// Query heads.
    pub heads: u32,
    /// From one token's queries to the next, a multiple of 4.
    pub q_stride: u32,
    /// From one rope key to the next, a multiple of 4.
    pub k_pe_stride: u32,
    /// Softmax scale.
    pub scale: f32,
    /// Queries grow by 1 + beta ln(1 + floor(position / length)); 0 for none.
    pub beta: f32,
    /// The length of that growth, at least 1.
    pub length: u32,
}

/// The kernel `mla_prefill`.
pub struct MlaPrefill {
    spec: Spec,
    shader: Arc<Shader>,
}

impl Kernel for MlaPrefill {
    const NAME: &'static str = "mla_prefill";
    const SOURCE: Source = wgsl!("mla_prefill");
    const PARAMS: &'static [Field] = Params::FIELDS;
    type Spec = Spec;
    type Tuning = Tuning;

    fn variants(_: &Spec, _: &Caps) -> Vec<Variant<Tuning>> {
        vec![Variant { name: "portable", tuning: Tuning }]
    }

    fn tuning(spec: &Spec, caps: &Caps) -> Choice<Tuning> {
        let variant = Self::variants(spec, caps).remove(0);
        Choice { variant, why: "64 rows over each key tile, f32 arithmetic alone".into() }
    }

    fn new(spec: &Spec, _: &Tuning) -> MlaPrefill {
        let Spec { nope, rope, value, accumulate } = *spec;
        let fits = nope.is_multiple_of(8) && value.is_multiple_of(8) && value > 0 && rope.is_multiple_of(2);
        assert!(fits && nope + rope > 0, "mla_prefill: widths must be n and v of 8 k and p of 2 k: {spec:?}");
        let shader = Shader::of(Self::SOURCE)
            .u32("N", nope)
            .u32("P", rope)
            .u32("V", value)
            .bool("ACCUMULATE", accumulate)
            .module(wgsl!("lib/batch"))
            .build();
        MlaPrefill { spec: spec.clone(), shader }
    }

    fn shader(&self) -> &Arc<Shader> {
        &self.shader
    }

    fn cases(set: Set) -> Vec<Case<MlaPrefill>> {
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
            let lite = |position, tokens| shape((128, 64, 128), 16, &[(position, tokens)], 0, 1 << 20).case();
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
            Shape { sharp: 40.0, ..shape((16, 2, 24), 4, &[(64, 40)], 0, 30) },
        ];
        let pieces = pieces.into_iter().map(|s| Shape { accumulate: true, ..s });
        shapes.into_iter().chain(pieces).map(Shape::case).collect()
    }
}

impl MlaPrefill {
    /// Attends over one piece of each span's sequence.
    ///
    /// # Panics
    /// When a stride is no multiple of 4 or less than a row.
    pub fn record(&self, recording: &mut Recording, args: Args) {
        let Args { heads, q_stride, k_pe_stride, .. } = args;
        let Spec { nope, rope, value, .. } = self.spec;
        let fits = q_stride.is_multiple_of(4) && q_stride >= heads * (nope + rope);
        assert!(fits, "mla_prefill: q stride {q_stride} for {heads} heads of {nope} + {rope}");
        let fits = k_pe_stride.is_multiple_of(4) && k_pe_stride >= rope;
        assert!(fits, "mla_prefill: k_pe stride {k_pe_stride} for {rope}");
        let params = Params {
            heads,
            q_stride,
            kv_stride: heads * (nope + value),
            k_pe_stride,
            output_stride: heads * value,
            scale: args.scale * std::f32::consts::LOG2_E,
            beta: args.beta,
            length: args.length,
        };
        let bindings = vec![
            ("batch", args.batch),
            ("spans", args.spans),
            ("q", args.q),
            ("kv", args.kv),
            ("k_pe", args.k_pe),
            ("output", args.output),
            ("lse", args.lse),
        ];
        let (spec, count, scale) = (self.spec.clone(), args.count as usize, args.scale);
        let twin = move |host: &Host| twin(&spec, params, count, scale, host);
        let grid = Grid::Direct([args.most_tokens.div_ceil(ROWS), heads, args.count]);
        recording.call(&self.shader, bindings, bytemuck::bytes_of(&params), grid, twin);
    }
}

fn twin(spec: &Spec, params: Params, count: usize, scale: f32, host: &Host) {
    let (n, p, v) = (spec.nope as usize, spec.rope as usize, spec.value as usize);
    let heads = params.heads as usize;
    let (batch, spans) = (host.get::<Sequence>("batch"), host.get::<Span>("spans"));
    let (q, kv, k_pe) = (host.get::<f32>("q"), host.get::<f32>("kv"), host.get::<f32>("k_pe"));
    let (earlier, earlier_lse) = (host.get::<f32>("output"), host.get::<f32>("lse"));
    for span in &spans[..count] {
        let sequence = batch[span.sequence as usize];
        let row = |i: usize| {
            let (token, head) = (i / heads, i % heads);
            let position = sequence.position as usize + token;
            let seen = (span.end as usize).min(position + 1).saturating_sub(span.begin as usize);
            let key = |k: usize| {
                let at = (span.row as usize + k) * params.kv_stride as usize + head * (n + v);
                let rope = &k_pe[(span.row as usize + k) * params.k_pe_stride as usize..][..p];
                Key { nope: &kv[at..at + n], rope, value: &kv[at + n..at + n + v] }
            };
            let keys: Vec<Key> = (0..seen).map(key).collect();
            let token = sequence.first_row as usize + token;
            let query = &q[token * params.q_stride as usize + head * (n + p)..][..n + p];
            let scale = f64::from(scale) * growth(position as u32, params.beta, params.length);
            let (mut output, mut lse) = attend(query, &keys, v, scale);
            if spec.accumulate {
                let at = token * heads + head;
                let here: Vec<f32> = output.iter().map(|o| *o as f32).collect();
                let before = (&earlier[at * v..][..v], f64::from(earlier_lse[at]));
                (output, lse) = reference::mla_combine::merge(&[before, (&here, lse)], v);
            }
            (output, lse.max(f64::from(NOTHING)))
        };
        let rows: Vec<_> = (0..sequence.tokens as usize * heads).into_par_iter().map(row).collect();
        let output: Vec<f32> = rows.iter().flat_map(|(o, _)| o).map(|o| *o as f32).collect();
        let lse: Vec<f32> = rows.iter().map(|(_, lse)| *lse as f32).collect();
        let first = sequence.first_row as usize * heads;
        host.set("output", first * v, &output);
        host.set("lse", first, &lse);
    }
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

    fn case(self) -> Case<MlaPrefill> {
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

    fn job(&self) -> Job<MlaPrefill> {
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
        let tolerance = Tolerance::f32(4 * (n + p) * self.sharp as usize);
        let mut tensors = vec![
            Tensor::input("batch", words(&batch)),
            Tensor::input("q", Data::F32(q)),
            Tensor::input("kv", Data::F32(kv)),
            Tensor::input("k_pe", Data::F32(k_pe)),
            Tensor::output("output", Data::F32(output), Check::rows(v, tolerance)),
            Tensor::output("lse", Data::F32(lse), Check::rows(heads, tolerance)),
        ];
        tensors.extend(SPANS.iter().zip(&calls).map(|(name, spans)| Tensor::input(name, words(spans))));
        let most_tokens = self.sequences.iter().map(|(_, tokens)| *tokens).max().expect("a sequence");
        let scale = self.sharp / ((n + p) as f32).sqrt();
        let beta = self.beta;
        let counts: Vec<u32> = calls.iter().map(|spans| spans.len() as u32).collect();
        Job::new(tensors, move |kernel: &MlaPrefill, t, recording| {
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
                kernel.record(recording, args);
            }
        })
    }
}

/// The tensors of the calls' spans, as many as a case has pieces.
const SPANS: [&str; 16] = [
    "spans 0", "spans 1", "spans 2", "spans 3", "spans 4", "spans 5", "spans 6", "spans 7", "spans 8", "spans 9",
    "spans 10", "spans 11", "spans 12", "spans 13", "spans 14", "spans 15",
];
