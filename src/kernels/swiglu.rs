//! `swiglu`: the gated activation of a feed-forward layer, `silu(gate) * up`.
//!
//! Gate and up are two buffers, or two parts of each row of one.

use std::sync::Arc;

use super::inputs::{Inputs, strided};
use super::{Case, Check, Choice, Data, Field, Job, Kernel, Set, Tensor, Tolerance, Variant};
use crate::gpu::{Caps, Host, Recording, Shader, Source, View, grid_1d};
use crate::{reference, wgsl};

params! {
    /// Sizes of a call. Strides and offsets are in elements and multiples of 4.
    pub struct Params {
        /// Rows.
        pub rows: u32,
        /// Elements of a row (the intermediate size), any number.
        pub length: u32,
        /// From one row of `gate` to the next.
        pub gate_stride: u32,
        /// Where the gate starts in its row.
        pub gate_offset: u32,
        /// From one row of `up` to the next.
        pub up_stride: u32,
        /// Where up starts in its row.
        pub up_offset: u32,
        /// From one row of `y` to the next.
        pub y_stride: u32,
    }
}

/// Nothing of it depends on the model: every MLA model gates with silu.
#[derive(Clone, Debug, PartialEq)]
pub struct Spec;

/// How it runs.
#[derive(Clone, Debug)]
pub struct Tuning {
    /// Invocations a workgroup.
    pub workgroup: u32,
}

/// The kernel `swiglu`.
pub struct Swiglu {
    tuning: Tuning,
    shader: Arc<Shader>,
}

impl Kernel for Swiglu {
    const NAME: &'static str = "swiglu";
    const SOURCE: Source = wgsl!("swiglu");
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

    fn new(_: &Spec, tuning: &Tuning) -> Swiglu {
        let shader = Shader::of(Self::SOURCE).u32("WORKGROUP", tuning.workgroup);
        Swiglu { tuning: tuning.clone(), shader: shader.module(wgsl!("lib/activation_silu")).build() }
    }

    fn shader(&self) -> &Arc<Shader> {
        &self.shader
    }

    fn cases(set: Set) -> Vec<Case<Swiglu>> {
        if set == Set::Timed {
            return [(1, 18_432), (512, 18_432), (512, 2048)].map(|(r, n)| case(r, n, true, 1.0)).into();
        }
        let lengths = [1, 2, 3, 4, 5, 63, 64, 1023, 1408, 2050, 6400, 18_432];
        let rows = [1, 3, 2, 5].into_iter().cycle();
        let both = |(length, rows): (&usize, usize)| [false, true].map(|halves| case(rows, *length, halves, 1.0));
        let mut cases: Vec<_> = lengths.iter().zip(rows).flat_map(both).collect();
        // Where silu is all but 0 or x, and where exp(-x) leaves f32.
        cases.extend([1e-3, 30.0, 1000.0].map(|magnitude| case(2, 999, true, magnitude)));
        cases
    }
}

/// `halves`: gate and up are halves of one row, else two buffers.
fn case(rows: usize, length: usize, halves: bool, magnitude: f32) -> Case<Swiglu> {
    let layout = if halves { "halves of a row" } else { "two buffers" };
    let name = format!("{rows} rows of {length}, {layout}, magnitude {magnitude}");
    let elements = (rows * length) as f64;
    let make = move || {
        let mut inputs = Inputs::seed((rows * length) as u64);
        let stride = length.next_multiple_of(4);
        let gate = strided(&inputs.normals(rows * length, magnitude), length, stride);
        let up = strided(&inputs.normals(rows * length, 1.0), length, stride);
        // silu of a row of one element can be 0 in f32 and a few 1e-38 in the twin.
        let tolerance = Tolerance { zero: 1e-30, ..Tolerance::f32(16) };
        let check = Check { stride, first: 0, columns: length, tolerance };
        let mut tensors = vec![Tensor::output("y", Data::poison(rows * stride), check)];
        let row = if halves { 2 * stride } else { stride };
        if halves {
            let rows = gate.chunks(stride).zip(up.chunks(stride));
            tensors.push(Tensor::input("gate_up", Data::F32(rows.flat_map(|(g, u)| [g, u].concat()).collect())));
        } else {
            tensors.push(Tensor::input("gate", Data::F32(gate)));
            tensors.push(Tensor::input("up", Data::F32(up)));
        }
        let params = Params {
            rows: rows as u32,
            length: length as u32,
            gate_stride: row as u32,
            gate_offset: 0,
            up_stride: row as u32,
            up_offset: (row - stride) as u32,
            y_stride: stride as u32,
        };
        Job::new(tensors, move |kernel: &Swiglu, t, recording| {
            let (gate, up) = if halves { ("gate_up", "gate_up") } else { ("gate", "up") };
            kernel.record(recording, params, t.get(gate), t.get(up), t.get("y"));
        })
    };
    Case::new(name, Spec, 5.0 * elements, make).moving(12.0 * elements)
}

impl Swiglu {
    /// `y = silu(gate) * up`. `gate`: `[rows, gate_stride]` f32, `up`: `[rows, up_stride]` f32 (the
    /// same view may serve both); `y`: `[rows, y_stride]` f32, another buffer.
    ///
    /// # Panics
    /// When a stride or an offset is no multiple of 4.
    pub fn record(&self, recording: &mut Recording, params: Params, gate: View, up: View, y: View) {
        let Params { rows, length, gate_stride, gate_offset, up_stride, up_offset, y_stride } = params;
        for at in [gate_stride, gate_offset, up_stride, up_offset, y_stride] {
            assert!(at.is_multiple_of(4), "swiglu: a stride or offset is no multiple of 4: {params:?}");
        }
        let twin = move |host: &Host| {
            let part = |name: &str, at: u32| host.get::<f32>(name)[at as usize..][..length as usize].to_vec();
            for row in 0..rows {
                let gate = part("gate", row * gate_stride + gate_offset);
                let up = part("up", row * up_stride + up_offset);
                host.set("y", (row * y_stride) as usize, &reference::swiglu::swiglu(&gate, &up));
            }
        };
        let groups = (rows * length.div_ceil(4)).div_ceil(self.tuning.workgroup);
        let bindings = vec![("gate", gate), ("up", up), ("y", y)];
        recording.call(&self.shader, bindings, bytemuck::bytes_of(&params), grid_1d(groups), twin);
    }
}
