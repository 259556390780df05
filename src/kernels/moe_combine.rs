//! `moe_combine`: the outputs of a token's experts, which `moe_gemm` wrote apart, summed with their
//! weights, always in the order of the slots. Experts without weights (LongCat-Flash,
//! arXiv:2509.01322, section 2.1) give the token's own input.

use std::sync::Arc;

use super::inputs::{Inputs, strided, words};
use super::moe_route::Route;
use super::moe_sort::draw_routes;
use super::{Case, Check, Choice, Data, Field, Job, Kernel, Set, Tensor, Tolerance, Variant};
use crate::gpu::{Caps, Host, Recording, Shader, Source, View, grid_1d};
use crate::{reference, wgsl};

params! {
    /// Sizes of a call. Strides are in elements and multiples of 4.
    pub struct Params {
        /// Rows of the step.
        pub tokens: u32,
        /// Elements of a row.
        pub length: u32,
        /// From one token's row of `x` to the next.
        pub x_stride: u32,
        /// From one pair's row of `outputs` to the next.
        pub outputs_stride: u32,
        /// From one token's row of `y` to the next.
        pub y_stride: u32,
    }
}

/// What the model fixes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spec {
    /// Experts with weights; those with this number and up give x.
    pub experts: u32,
    /// Experts of a token.
    pub top_k: u32,
    /// The sum is added to what y holds.
    pub accumulate: bool,
}

/// How it runs.
#[derive(Clone, Debug)]
pub struct Tuning {
    /// Invocations a workgroup.
    pub workgroup: u32,
}

/// The kernel `moe_combine`.
pub struct MoeCombine {
    spec: Spec,
    tuning: Tuning,
    shader: Arc<Shader>,
}

impl Kernel for MoeCombine {
    const NAME: &'static str = "moe_combine";
    const SOURCE: Source = wgsl!("moe_combine");
    const PARAMS: &'static [Field] = Params::FIELDS;
    type Spec = Spec;
    type Tuning = Tuning;

    fn variants(_: &Spec, caps: &Caps) -> Vec<Variant<Tuning>> {
        vec![Variant { name: "portable", tuning: Tuning { workgroup: caps.invocations.min(256) } }]
    }

    fn tuning(spec: &Spec, caps: &Caps) -> Choice<Tuning> {
        let variant = Self::variants(spec, caps).remove(0);
        Choice { variant, why: "one way: a vector an invocation".into() }
    }

    fn new(spec: &Spec, tuning: &Tuning) -> MoeCombine {
        let shader = Shader::of(Self::SOURCE)
            .u32("WORKGROUP", tuning.workgroup)
            .u32("EXPERTS", spec.experts)
            .u32("TOP_K", spec.top_k)
            .bool("ACCUMULATE", spec.accumulate)
            .build();
        MoeCombine { spec: *spec, tuning: tuning.clone(), shader }
    }

    fn shader(&self) -> &Arc<Shader> {
        &self.shader
    }

    fn cases(set: Set) -> Vec<Case<MoeCombine>> {
        let spec = |experts, top_k, accumulate| Spec { experts, top_k, accumulate };
        if set == Set::Timed {
            return [(64, 6, 2048), (256, 8, 7168)].map(|(e, k, n)| case(512, n, e, spec(e, k, true))).into();
        }
        let sizes = [(1, 1, 1, 1, 1), (2, 6, 63, 64, 64), (3, 12, 100, 512, 768), (8, 8, 256, 256, 256)];
        let more = [(33, 4, 31, 128, 128), (200, 6, 50, 64, 64), (9, 3, 2049, 6, 9)];
        let both = |(tokens, top_k, length, experts, all): (usize, u32, usize, u32, u32)| {
            [false, true].map(|accumulate| case(tokens, length, all, spec(experts, top_k, accumulate)))
        };
        sizes.into_iter().chain(more).flat_map(both).collect()
    }
}

impl MoeCombine {
    /// Sums the experts' outputs. `routes`: `[tokens, top_k]` [`Route`]; `outputs`: `[tokens, top_k,
    /// outputs_stride]` f32, rows of experts without weights are not read; `x`: `[tokens, x_stride]`
    /// f32; `y`: `[tokens, y_stride]` f32, another buffer, written or added to.
    ///
    /// # Panics
    /// When a stride is no multiple of 4 or less than a row.
    pub fn record(&self, recording: &mut Recording, params: Params, routes: View, outputs: View, x: View, y: View) {
        let Params { tokens, length, x_stride, outputs_stride, y_stride } = params;
        for stride in [x_stride, outputs_stride, y_stride] {
            assert!(stride.is_multiple_of(4) && stride >= length, "moe_combine: the strides of {params:?}");
        }
        let spec = self.spec;
        let twin = move |host: &Host| {
            let (routes, outputs) = (host.get::<Route>("routes"), host.get::<f32>("outputs"));
            let (x, y) = (host.get::<f32>("x"), host.get::<f32>("y"));
            let row = |data: &[f32], row: u32, stride: u32| data[(row * stride) as usize..][..length as usize].to_vec();
            for token in 0..tokens {
                let first = token * spec.top_k;
                let part = |pair: u32| match routes[pair as usize].expert < spec.experts {
                    true => row(&outputs, pair, outputs_stride),
                    false => row(&x, token, x_stride),
                };
                let parts: Vec<Vec<f32>> = (first..first + spec.top_k).map(part).collect();
                let weights = routes[first as usize..].iter().map(|r| r.weight);
                let parts: Vec<(f32, &[f32])> = weights.zip(parts.iter().map(Vec::as_slice)).collect();
                let start = if spec.accumulate { row(&y, token, y_stride) } else { vec![0.0; length as usize] };
                let sum = reference::moe_combine::combine(&start, &parts);
                host.set("y", (token * y_stride) as usize, &sum);
            }
        };
        let groups = (tokens * length.div_ceil(4)).div_ceil(self.tuning.workgroup);
        let bindings = vec![("routes", routes), ("outputs", outputs), ("x", x), ("y", y)];
        recording.call(&self.shader, bindings, bytemuck::bytes_of(&params), grid_1d(groups), twin);
    }
}

/// Routes go to `all` experts, of which the spec's have weights.
fn case(tokens: usize, length: usize, all: u32, spec: Spec) -> Case<MoeCombine> {
    let Spec { experts, top_k, accumulate } = spec;
    let then = if accumulate { ", added" } else { "" };
    let name = format!("{tokens} tokens of {length}, {top_k} of {all} experts, {experts} with weights{then}");
    let pairs = tokens * top_k as usize;
    let elements = (pairs * length) as f64;
    let moved = 4.0 * elements + 8.0 * (tokens * length) as f64;
    let make = move || {
        let mut inputs = Inputs::seed((pairs * length) as u64);
        let routes = draw_routes(&mut inputs, tokens, top_k as usize, all, false);
        let (x_stride, stride) = (length.next_multiple_of(4) + 8, length.next_multiple_of(4));
        let mut outputs = strided(&inputs.normals(pairs * length, 1.0), length, stride);
        for (row, route) in outputs.chunks_mut(stride).zip(&routes) {
            if route.expert >= experts {
                row.fill(f32::NAN);
            }
        }
        let x = strided(&inputs.normals(tokens * length, 1.0), length, x_stride);
        let y = match accumulate {
            true => strided(&inputs.normals(tokens * length, 1.0), length, stride),
            false => vec![f32::NAN; tokens * stride],
        };
        let check = Check { stride, first: 0, columns: length, tolerance: Tolerance::f32(top_k as usize) };
        let tensors = vec![
            Tensor::input("routes", words(&routes)),
            Tensor::input("outputs", Data::F32(outputs)),
            Tensor::input("x", Data::F32(x)),
            Tensor::output("y", Data::F32(y), check),
        ];
        let params = Params {
            tokens: tokens as u32,
            length: length as u32,
            x_stride: x_stride as u32,
            outputs_stride: stride as u32,
            y_stride: stride as u32,
        };
        Job::new(tensors, move |kernel: &MoeCombine, t, recording| {
            kernel.record(recording, params, t.get("routes"), t.get("outputs"), t.get("x"), t.get("y"));
        })
    };
    Case::new(name, spec, 2.0 * elements, make).moving(moved)
}
