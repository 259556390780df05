//! `rms_norm`: root mean square normalisation (arXiv:1910.07467) of rows or of a part of each row (a latent
//! within `[c_kv | k_pe]`).

use std::sync::Arc;

use super::inputs::{Inputs, checks, placed};
use super::{Case, Choice, Data, Field, Job, Kernel, Set, Tensor, Tolerance, Variant};
use crate::gpu::{Caps, Host, Recording, Shader, Source, View, grid_1d};
use crate::{reference, wgsl};

params! {
    /// Sizes of a call. Strides and offsets are in elements and multiples of 4.
    pub struct Params {
        /// Rows.
        pub rows: u32,
        /// Elements that are normalised in each row, any number from 1.
        pub length: u32,
        /// From one row of `x` to the next.
        pub x_stride: u32,
        /// Where the part starts in a row of `x`.
        pub x_offset: u32,
        /// From one row of `y` to the next.
        pub y_stride: u32,
        /// Where the part starts in a row of `y`.
        pub y_offset: u32,
        /// Added to the mean square.
        pub eps: f32,
    }
}

/// A model fixes nothing of it.
#[derive(Clone, Debug, PartialEq)]
pub struct Spec;

/// How it runs.
#[derive(Clone, Debug)]
pub struct Tuning {
    /// Invocations a workgroup, a multiple of 16.
    pub workgroup: u32,
    /// Sums within subgroups first.
    pub subgroups: bool,
}

/// The kernel `rms_norm`.
pub struct RmsNorm {
    shader: Arc<Shader>,
}

impl Kernel for RmsNorm {
    const NAME: &'static str = "rms_norm";
    const SOURCE: Source = wgsl!("rms_norm");
    const PARAMS: &'static [Field] = Params::FIELDS;
    type Spec = Spec;
    type Tuning = Tuning;

    fn variants(_: &Spec, caps: &Caps) -> Vec<Variant<Tuning>> {
        let workgroup = caps.invocations.min(256);
        let mut variants = vec![Variant { name: "portable", tuning: Tuning { workgroup, subgroups: false } }];
        if caps.subgroups.is_some() {
            variants.push(Variant { name: "subgroup", tuning: Tuning { workgroup, subgroups: true } });
        }
        variants
    }

    fn tuning(spec: &Spec, caps: &Caps) -> Choice<Tuning> {
        let variant = Self::variants(spec, caps).pop().expect("the portable variant is always there");
        let why = if variant.tuning.subgroups { "subgroups save a barrier" } else { "no subgroups" };
        Choice { variant, why: why.into() }
    }

    fn new(_: &Spec, tuning: &Tuning) -> RmsNorm {
        let shader = Shader::of(Self::SOURCE).u32("WORKGROUP", tuning.workgroup);
        let shader = match tuning.subgroups {
            true => shader.module(wgsl!("lib/reduce_subgroup")).subgroups().build(),
            false => shader.module(wgsl!("lib/reduce_shared")).build(),
        };
        RmsNorm { shader }
    }

    fn shader(&self) -> &Arc<Shader> {
        &self.shader
    }

    fn cases(set: Set) -> Vec<Case<RmsNorm>> {
        let whole = |rows: usize, length: usize| {
            let stride = length.next_multiple_of(4);
            Shape { rows, length, x: (stride, 0), y: (stride, 0), magnitude: 1.0 }
        };
        if set == Set::Timed {
            return [(1, 7168), (512, 7168), (512, 512)].map(|(rows, length)| whole(rows, length).case()).into();
        }
        let lengths = [1, 2, 3, 4, 5, 63, 512, 1023, 1025, 2560, 8192, 8195, 10_007];
        let rows = [1, 7, 2, 3].into_iter().cycle();
        let mut shapes: Vec<_> = lengths.iter().zip(rows).map(|(length, rows)| whole(rows, *length)).collect();
        // The latent of [c_kv | k_pe], the compressed query before and behind it, and a part that
        // ends within its neighbour's vector.
        let parts = [
            (512, (576, 0), (512, 0)),
            (1536, (2112, 0), (1536, 0)),
            (1536, (2112, 576), (2112, 576)),
            (47, (72, 12), (80, 20)),
        ];
        shapes.extend(parts.map(|(length, x, y)| Shape { rows: 3, length, x, y, magnitude: 1.0 }));
        // Squares far beyond f16, and squares that eps outweighs.
        shapes.extend([1e6, 1e-5].map(|magnitude| Shape { magnitude, ..whole(2, 777) }));
        if set == Set::Full {
            // More rows than a grid dimension holds workgroups: seconds on a software driver.
            shapes.push(whole(65_600, 3));
        }
        shapes.into_iter().map(Shape::case).collect()
    }
}

impl RmsNorm {
    /// Normalises a part of each row. `x`: `[rows, x_stride]` f32; `weight`: `[length]` f32, rounded up to 16
    /// bytes; `y`: `[rows, y_stride]` f32, another buffer than `x`.
    ///
    /// # Panics
    /// When a stride or an offset is no multiple of 4.
    pub fn record(&self, recording: &mut Recording, params: Params, x: View, weight: View, y: View) {
        let Params { x_stride, x_offset, y_stride, y_offset, .. } = params;
        for (name, at) in [("x", x_stride | x_offset), ("y", y_stride | y_offset)] {
            assert!(at.is_multiple_of(4), "rms_norm: a stride or offset of {name} is no multiple of 4: {params:?}");
        }
        let twin = move |host: &Host| {
            let length = params.length as usize;
            for row in 0..params.rows {
                let part = (row * x_stride + x_offset) as usize;
                let x = &host.get::<f32>("x")[part..part + length];
                let y = reference::rms_norm::rms_norm(x, &host.get("weight"), params.eps);
                host.set("y", (row * y_stride + y_offset) as usize, &y);
            }
        };
        let bindings = vec![("x", x), ("weight", weight), ("y", y)];
        recording.call(&self.shader, bindings, bytemuck::bytes_of(&params), grid_1d(params.rows), twin);
    }
}

/// Sizes of a case. `x` and `y` are (stride, offset).
#[derive(Clone, Copy)]
struct Shape {
    rows: usize,
    length: usize,
    x: (usize, usize),
    y: (usize, usize),
    magnitude: f32,
}

impl Shape {
    fn case(self) -> Case<RmsNorm> {
        let Shape { rows, length, x, y, magnitude } = self;
        let name = format!("{rows} rows of {length}, x {x:?}, y {y:?}, magnitude {magnitude}");
        let elements = (rows * length) as f64;
        Case::new(name, Spec, 4.0 * elements, move || self.job()).moving(8.0 * elements)
    }

    fn job(self) -> Job<RmsNorm> {
        let Shape { rows, length, x, y, magnitude } = self;
        let mut inputs = Inputs::seed((rows * length + x.0) as u64);
        let weight: Vec<f32> = (0..length).map(|_| 1.0 + 0.5 * inputs.normal()).collect();
        let poison = vec![f32::NAN; rows * length];
        let tensors = vec![
            Tensor::input("weight", Data::F32(weight)),
            Tensor::checked("y", Data::F32(placed(&poison, length, y)), checks(length, y, Tolerance::f32(length))),
            Tensor::input("x", Data::F32(placed(&inputs.normals(rows * length, magnitude), length, x))),
        ];
        let params = Params {
            rows: rows as u32,
            length: length as u32,
            x_stride: x.0 as u32,
            x_offset: x.1 as u32,
            y_stride: y.0 as u32,
            y_offset: y.1 as u32,
            eps: 1e-6,
        };
        Job::new(tensors, move |kernel: &RmsNorm, t, recording| {
            kernel.record(recording, params, t.get("x"), t.get("weight"), t.get("y"));
        })
    }
}
