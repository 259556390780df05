//! `rope`: rotary position embedding of slices in place, such as q_pe within `[heads, n + p]` or k_pe
//! within `[c_kv | k_pe]`. Positions come from `rows`, rotations from the table of `num::rope`.

use std::sync::Arc;

use super::inputs::Inputs;
use super::{Case, Check, Choice, Data, Field, Job, Kernel, Row, Set, Tensor, Tolerance, Variant};
use crate::gpu::{Caps, Host, Recording, Shader, Source, View, grid_1d};
use crate::num::rope::{Frequencies, RopeLayout, Yarn};
use crate::{reference, wgsl};

params! {
    /// Sizes of a call, in elements.
    pub struct Params {
        /// Rows of `x`.
        pub tokens: u32,
        /// Slices in each row.
        pub heads: u32,
        /// Pairs of a slice, p / 2.
        pub pairs: u32,
        /// From one row to the next.
        pub stride: u32,
        /// Where the first head's slice starts in a row.
        pub offset: u32,
        /// From one head's slice to the next's.
        pub head_stride: u32,
    }
}

/// What the model fixes.
#[derive(Clone, Debug, PartialEq)]
pub struct Spec {
    /// Which elements turn together.
    pub layout: RopeLayout,
}

/// How it runs.
#[derive(Clone, Debug)]
pub struct Tuning {
    /// Invocations a workgroup.
    pub workgroup: u32,
}

/// The kernel `rope`.
pub struct Rope {
    spec: Spec,
    tuning: Tuning,
    shader: Arc<Shader>,
}

impl Kernel for Rope {
    const NAME: &'static str = "rope";
    const SOURCE: Source = wgsl!("rope");
    const PARAMS: &'static [Field] = Params::FIELDS;
    type Spec = Spec;
    type Tuning = Tuning;

    fn variants(_: &Spec, caps: &Caps) -> Vec<Variant<Tuning>> {
        vec![Variant { name: "portable", tuning: Tuning { workgroup: caps.invocations.min(256) } }]
    }

    fn tuning(spec: &Spec, caps: &Caps) -> Choice<Tuning> {
        let variant = Self::variants(spec, caps).remove(0);
        Choice { variant, why: "bound by memory: one path is enough".into() }
    }

    fn new(spec: &Spec, tuning: &Tuning) -> Rope {
        let elements = match spec.layout {
            RopeLayout::Interleaved => wgsl!("lib/rope_interleaved"),
            RopeLayout::Half => wgsl!("lib/rope_half"),
        };
        let shader = Shader::of(Self::SOURCE).u32("WORKGROUP", tuning.workgroup).module(wgsl!("lib/batch"));
        let shader = shader.module(wgsl!("lib/rope_table")).module(elements).build();
        Rope { spec: spec.clone(), tuning: tuning.clone(), shader }
    }

    fn shader(&self) -> &Arc<Shader> {
        &self.shader
    }

    fn cases(set: Set) -> Vec<Case<Rope>> {
        let both = |shape: Shape| [RopeLayout::Interleaved, RopeLayout::Half].map(|layout| case(shape.clone(), layout));
        let shape = |heads, before, p, after, positions: &[u32], scaling| {
            Shape { heads, before, p, after, positions: positions.to_vec(), scaling }
        };
        if set == Set::Timed {
            let positions: Vec<u32> = (0..512).collect();
            return [&positions[511..], &positions[..]]
                .into_iter()
                .flat_map(|at| both(shape(128, 128, 64, 0, at, Scaling::Yarn)))
                .collect();
        }
        let near = [0, 1, 255, 256, 257, 4095];
        let far = [131_071, 0, 65_536, 131_070];
        let shapes = vec![
            shape(1, 0, 64, 0, &near, Scaling::Plain),
            shape(1, 512, 64, 0, &near, Scaling::Plain),
            shape(16, 128, 64, 0, &near[3..], Scaling::Yarn),
            shape(40, 64, 32, 0, &far[..2], Scaling::Long),
            shape(3, 5, 2, 3, &near, Scaling::Plain),
            shape(9, 16, 6, 1, &near, Scaling::Linear),
            shape(128, 128, 64, 0, &far[..1], Scaling::Yarn),
            shape(7, 0, 64, 512, &far, Scaling::Plain),
            shape(1, 512, 64, 0, &[1_000_000, 999_999, 131_071], Scaling::Plain),
            shape(2, 24, 10, 0, &[1_000_000, 77_777], Scaling::Yarn),
        ];
        shapes.into_iter().flat_map(both).collect()
    }
}

impl Rope {
    /// Rotates the slices of `x` in place. `x`: `[tokens, stride]` f32; `rows`: `[tokens]` of `Row`;
    /// `table`: what `frequencies.table(max_positions)` gave, for more positions than any of `rows`.
    ///
    /// # Panics
    /// When the frequencies are not those of `pairs`, or a slice leaves its row.
    pub fn record(
        &self,
        recording: &mut Recording,
        params: Params,
        x: View,
        rows: View,
        table: View,
        frequencies: &Arc<Frequencies>,
    ) {
        let Params { tokens, heads, pairs, stride, offset, head_stride } = params;
        assert!(pairs == frequencies.pairs(), "rope: {} frequencies for {pairs} pairs", frequencies.pairs());
        let end = offset + heads.saturating_sub(1) * head_stride + 2 * pairs;
        assert!(end <= stride, "rope: the slices end at {end} in a row of {stride}: {params:?}");
        let (frequencies, layout) = (frequencies.clone(), self.spec.layout);
        let twin = move |host: &Host| {
            for (token, row) in host.get::<Row>("rows")[..tokens as usize].iter().enumerate() {
                for head in 0..heads {
                    let start = token * stride as usize + (offset + head * head_stride) as usize;
                    let slice = host.get::<f32>("x")[start..start + 2 * pairs as usize].to_vec();
                    host.set("x", start, &reference::rope::rope(&slice, row.position, &frequencies, layout));
                }
            }
        };
        let groups = (tokens * heads * pairs).div_ceil(self.tuning.workgroup);
        let bindings = vec![("x", x), ("rows", rows), ("rope_table", table)];
        recording.call(&self.shader, bindings, bytemuck::bytes_of(&params), grid_1d(groups), twin);
    }
}

/// The frequencies of a case.
#[derive(Clone, Copy, Debug)]
enum Scaling {
    Plain,
    Linear,
    Yarn,
    Long,
}

impl Scaling {
    fn frequencies(self, p: u32) -> Frequencies {
        match self {
            Scaling::Plain => Frequencies::plain(p, 1e4),
            Scaling::Linear => Frequencies::linear(p, 5e5, 8.0),
            Scaling::Yarn => {
                let (mscale, mscale_all_dim) = (1.0, 0.707);
                let (beta_fast, beta_slow) = (32.0, 1.0);
                let yarn =
                    Yarn { factor: 40.0, original_length: 4096.0, beta_fast, beta_slow, mscale, mscale_all_dim };
                Frequencies::yarn(p, 1e4, &yarn)
            }
            Scaling::Long => {
                let factors: Vec<f64> = (0..p / 2).map(|i| 1.0 + 0.5 * f64::from(i)).collect();
                Frequencies::longrope(p, 1e4, &factors, 131_072.0, 4096.0)
            }
        }
    }
}

/// Heads of `before + p + after` elements, of which p turn; a row for each position.
#[derive(Clone, Debug)]
struct Shape {
    heads: usize,
    before: usize,
    p: usize,
    after: usize,
    positions: Vec<u32>,
    scaling: Scaling,
}

fn case(shape: Shape, layout: RopeLayout) -> Case<Rope> {
    let Shape { heads, before, p, after, ref positions, scaling } = shape;
    let (tokens, last) = (positions.len(), positions.iter().max().expect("a case has a row"));
    let name =
        format!("{tokens} rows up to {last}, {heads} heads of {before} + {p} + {after}, {scaling:?}, {layout:?}");
    let elements = (tokens * heads * p) as f64;
    Case::new(name, Spec { layout }, 3.0 * elements, move || shape.job()).moving(8.0 * elements)
}

impl Shape {
    fn job(&self) -> Job<Rope> {
        let Shape { heads, before, p, after, ref positions, scaling } = *self;
        let (tokens, head) = (positions.len(), before + p + after);
        let stride = (heads * head).next_multiple_of(4);
        let mut inputs = Inputs::seed((heads * head + tokens) as u64);
        let mut checks = Vec::new();
        for first in (0..heads).map(|h| h * head) {
            let part = |first, columns, tolerance| Check { stride, first, columns, tolerance };
            checks.push(part(first, before, Tolerance::EXACT));
            checks.push(part(first + before, p, Tolerance::f32(2)));
            checks.push(part(first + before + p, after, Tolerance::EXACT));
        }
        checks.retain(|check| check.columns > 0);
        let frequencies = Arc::new(scaling.frequencies(p as u32));
        let table = frequencies.table(positions.iter().max().map_or(0, |last| last + 1));
        let rows = positions.iter().flat_map(|position| [0, *position]).collect();
        let tensors = vec![
            Tensor::checked("x", Data::F32(inputs.normals(tokens * stride, 1.0)), checks),
            Tensor::input("rows", Data::U32(rows)),
            Tensor::input("table", Data::F32(table.into_iter().flatten().collect())),
        ];
        let params = Params {
            tokens: tokens as u32,
            heads: heads as u32,
            pairs: p as u32 / 2,
            stride: stride as u32,
            offset: before as u32,
            head_stride: head as u32,
        };
        Job::new(tensors, move |kernel: &Rope, t, recording| {
            kernel.record(recording, params, t.get("x"), t.get("rows"), t.get("table"), &frequencies);
        })
    }
}
