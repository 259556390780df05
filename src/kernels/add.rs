//! `add`: a branch's output added to the residual stream, `x += scale * y`.
//!
//! `scale` is 1 in most models; MiniCPM3 scales each branch by `scale_depth / sqrt(layers)`.

use std::sync::Arc;

use super::inputs::Inputs;
use super::{Case, Check, Choice, Data, Field, Job, Kernel, Set, Tensor, Tolerance, Variant};
use crate::gpu::{Caps, Host, Recording, Shader, Source, View, grid_1d};
use crate::{reference, wgsl};

params! {
    /// Sizes of a call.
    pub struct Params {
        /// Elements, a multiple of 4.
        pub length: u32,
        /// Factor of the branch.
        pub scale: f32,
    }
}

/// Nothing of it depends on the model.
#[derive(Clone, Debug, PartialEq)]
pub struct Spec;

/// How it runs.
#[derive(Clone, Debug)]
pub struct Tuning {
    /// Invocations a workgroup.
    pub workgroup: u32,
}

/// The kernel `add`.
pub struct Add {
    tuning: Tuning,
    shader: Arc<Shader>,
}

impl Kernel for Add {
    const NAME: &'static str = "add";
    const SOURCE: Source = wgsl!("add");
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

    fn new(_: &Spec, tuning: &Tuning) -> Add {
        let shader = Shader::of(Self::SOURCE).u32("WORKGROUP", tuning.workgroup).build();
        Add { tuning: tuning.clone(), shader }
    }

    fn shader(&self) -> &Arc<Shader> {
        &self.shader
    }

    fn cases(set: Set) -> Vec<Case<Add>> {
        let case = |length: usize, scale: f32| {
            Case::new(format!("length {length}, scale {scale}"), Spec, 2.0 * length as f64, move || {
                let mut inputs = Inputs::seed(length as u64);
                let check = Check::rows(length, Tolerance::f32(1));
                let tensors = vec![
                    Tensor::input("y", Data::F32(inputs.normals(length, 1.0))),
                    Tensor::output("x", Data::F32(inputs.normals(length, 3.0)), check),
                ];
                Job::new(tensors, move |kernel: &Add, t, recording| {
                    let params = Params { length: length as u32, scale };
                    kernel.record(recording, params, t.get("x"), t.get("y"));
                })
            })
            .moving(12.0 * length as f64)
        };
        if set == Set::Timed {
            return vec![case(7168 * 512, 1.0)];
        }
        let lengths = [4, 8, 252, 256, 1020, 1024, 1028, 7168 * 9];
        lengths.iter().flat_map(|l| [case(*l, 1.0), case(*l, 0.178)]).collect()
    }
}

impl Add {
    /// Adds `x += scale * y`. `x`, `y`: `[length]` f32.
    pub fn record(&self, recording: &mut Recording, params: Params, x: View, y: View) {
        let groups = params.length.div_ceil(4 * self.tuning.workgroup);
        let twin = move |host: &Host| {
            let length = params.length as usize;
            let sum = reference::add::add(&host.get("x")[..length], &host.get("y")[..length], params.scale);
            host.set("x", 0, &sum);
        };
        let bindings = vec![("x", x), ("y", y)];
        recording.call(&self.shader, bindings, bytemuck::bytes_of(&params), grid_1d(groups), twin);
    }
}
