//! `mla_prefill`: materialised attention of many new tokens, over one piece of the context whose keys
//! and values were expanded from the latents (DeepSeek-V2, arXiv:2405.04434, section 2.1). A key tile
//! is read once for a block of 64 rows, by online softmax (Dao 2023, arXiv:2307.08691).

use std::sync::Arc;

use half::f16;
use rayon::prelude::*;

use super::mla_combine::at_least_nothing;
use super::mla_prefill_cases::cases;
use super::{Case, Choice, Field, Kernel, Sequence, Set, Span, Variant};
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
    /// `[keys, heads * (n + v)]` f32, for `mla_prefill_coop` f16: for each head the key's part without rope, then the
    /// value.
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
        cases(set)
    }
}

impl MlaPrefill {
    /// Attends over one piece of each span's sequence.
    ///
    /// # Panics
    /// When a stride is no multiple of 4 or less than a row.
    pub fn record(&self, recording: &mut Recording, args: Args) {
        let method = Method { rows: ROWS, halves: false, attend };
        record(&self.shader, &self.spec, method, recording, args);
    }
}

/// A kernel's part in recording a call.
#[derive(Clone, Copy)]
pub(super) struct Method {
    /// New tokens of a workgroup.
    pub rows: u32,
    /// Expanded keys and values are f16.
    pub halves: bool,
    /// Its twin's output and log-sum-exp of a row: its query, keys, the width of a value, the scale of the scores.
    pub attend: fn(&[f32], &[Key], usize, f64) -> (Vec<f64>, f64),
}

/// Records the call of a kernel.
pub(super) fn record(shader: &Arc<Shader>, spec: &Spec, method: Method, recording: &mut Recording, args: Args) {
    let kernel = shader.kernel;
    let Args { heads, q_stride, k_pe_stride, .. } = args;
    let Spec { nope, rope, value, .. } = *spec;
    let fits = q_stride.is_multiple_of(4) && q_stride >= heads * (nope + rope);
    assert!(fits, "{kernel}: q stride {q_stride} for {heads} heads of {nope} + {rope}");
    let fits = k_pe_stride.is_multiple_of(4) && k_pe_stride >= rope;
    assert!(fits, "{kernel}: k_pe stride {k_pe_stride} for {rope}");
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
    let (spec, count, scale) = (spec.clone(), args.count as usize, args.scale);
    let twin = move |host: &Host| twin(&spec, params, count, (scale, method), host);
    let grid = Grid::Direct([args.most_tokens.div_ceil(method.rows), heads, args.count]);
    recording.call(shader, bindings, bytemuck::bytes_of(&params), grid, twin);
}

fn twin(spec: &Spec, params: Params, count: usize, (scale, method): (f32, Method), host: &Host) {
    let (n, p, v) = (spec.nope as usize, spec.rope as usize, spec.value as usize);
    let heads = params.heads as usize;
    let (batch, spans) = (host.get::<Sequence>("batch"), host.get::<Span>("spans"));
    let (q, k_pe) = (host.get::<f32>("q"), host.get::<f32>("k_pe"));
    let kv: Vec<f32> = match method.halves {
        true => host.get::<f16>("kv").iter().map(|x| x.to_f32()).collect(),
        false => host.get::<f32>("kv").to_vec(),
    };
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
            let (mut output, mut lse) = (method.attend)(query, &keys, v, scale);
            if spec.accumulate {
                let at = token * heads + head;
                let here: Vec<f32> = output.iter().map(|o| *o as f32).collect();
                let before = (&earlier[at * v..][..v], f64::from(earlier_lse[at]));
                (output, lse) = reference::mla_combine::merge(&[before, (&here, lse)], v);
            }
            (output, at_least_nothing(lse))
        };
        let rows: Vec<_> = (0..sequence.tokens as usize * heads).into_par_iter().map(row).collect();
        let output: Vec<f32> = rows.iter().flat_map(|(o, _)| o).map(|o| *o as f32).collect();
        let lse: Vec<f32> = rows.iter().map(|(_, lse)| *lse as f32).collect();
        let first = sequence.first_row as usize * heads;
        host.set("output", first * v, &output);
        host.set("lse", first, &lse);
    }
}
