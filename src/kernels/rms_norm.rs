//! `rms_norm`: root mean square normalisation of rows or of a part of each row (a latent within
//! `[c_kv | k_pe]`), and before it, where the spec says so, a branch added to the rows.

use std::sync::Arc;

use super::inputs::{Inputs, checks, placed, strided};
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
        /// From one row of `branch` to the next; 0 without a branch.
        pub branch_stride: u32,
        /// Added to the mean square.
        pub eps: f32,
        /// Factor of the branch; 0 without one.
        pub scale: f32,
    }
}

/// What is done besides the norm.
#[derive(Clone, Debug, PartialEq)]
pub struct Spec {
    /// First `x += scale * branch`, written back.
    pub branch: bool,
}

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
    spec: Spec,
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

    fn new(spec: &Spec, tuning: &Tuning) -> RmsNorm {
        let shader = Shader::of(Self::SOURCE).u32("WORKGROUP", tuning.workgroup).bool("BRANCH", spec.branch);
        let shader = match tuning.subgroups {
            true => shader.module(wgsl!("lib/reduce_subgroup")).subgroups().build(),
            false => shader.module(wgsl!("lib/reduce_shared")).build(),
        };
        RmsNorm { spec: spec.clone(), shader }
    }

    fn shader(&self) -> &Arc<Shader> {
        &self.shader
    }

    fn cases(set: Set) -> Vec<Case<RmsNorm>> {
        let whole = |rows: usize, length: usize, branch: bool| {
            let stride = length.next_multiple_of(4);
            Shape { rows, length, x: (stride, 0), y: (stride, 0), branch, magnitude: 1.0 }
        };
        if set == Set::Timed {
            let timed = [(1, 7168), (512, 7168), (512, 512)];
            return timed.iter().flat_map(|(r, n)| [false, true].map(|b| whole(*r, *n, b).case())).collect();
        }
        let lengths = [1, 2, 3, 4, 5, 63, 512, 1023, 1025, 2560, 8192, 8195, 10_007];
        let rows = [1, 7, 2, 3].into_iter().cycle();
        let both = |(length, rows): (&usize, usize)| [false, true].map(|branch| whole(rows, *length, branch));
        let mut shapes: Vec<_> = lengths.iter().zip(rows).flat_map(both).collect();
        // The latent of [c_kv | k_pe], the compressed query before and behind it, and a part that
        // ends within its neighbour's vector.
        let parts = [
            (512, (576, 0), (512, 0)),
            (1536, (2112, 0), (1536, 0)),
            (1536, (2112, 576), (2112, 576)),
            (47, (72, 12), (80, 20)),
        ];
        for (length, x, y) in parts {
            shapes.push(Shape { rows: 3, length, x, y, branch: false, magnitude: 1.0 });
            shapes.push(Shape { rows: 2, length, x, y, branch: true, magnitude: 1.0 });
        }
        // Squares far beyond f16, and squares that eps outweighs.
        shapes.extend([1e6, 1e-5].map(|magnitude| Shape { magnitude, ..whole(2, 777, true) }));
        if set == Set::Full {
            // More rows than a grid dimension holds workgroups: seconds on a software driver.
            shapes.push(whole(65_600, 3, false));
        }
        shapes.iter().map(Shape::case).collect()
    }
}

impl RmsNorm {
    /// Normalises a part of each row. `x`: `[rows, x_stride]` f32; `branch`: `[rows, branch_stride]`
    /// f32, exactly where the spec has one; `weight`: `[length]` f32, rounded up to 16 bytes; `y`:
    /// `[rows, y_stride]` f32, another buffer than `x`.
    ///
    /// # Panics
    /// When a stride or an offset is no multiple of 4, or the branch does not fit the spec.
    pub fn record(
        &self,
        recording: &mut Recording,
        params: Params,
        x: View,
        branch: Option<View>,
        weight: View,
        y: View,
    ) {
        let Params { x_stride, x_offset, y_stride, y_offset, branch_stride, .. } = params;
        for (name, at) in [("x", x_stride | x_offset), ("y", y_stride | y_offset), ("branch", branch_stride)] {
            assert!(at.is_multiple_of(4), "rms_norm: a stride or offset of {name} is no multiple of 4: {params:?}");
        }
        let given = branch.is_some();
        assert!(given == self.spec.branch, "rms_norm: {:?}, but a branch was given: {given}", self.spec);
        let adds = self.spec.branch;
        let twin = move |host: &Host| {
            let length = params.length as usize;
            for row in 0..params.rows {
                let part = (row * x_stride + x_offset) as usize;
                let mut x = host.get::<f32>("x")[part..part + length].to_vec();
                if adds {
                    let from = (row * branch_stride) as usize;
                    x = reference::add::add(&x, &host.get("branch")[from..from + length], params.scale);
                    host.set("x", part, &x);
                }
                let y = reference::rms_norm::rms_norm(&x, &host.get("weight"), params.eps);
                host.set("y", (row * y_stride + y_offset) as usize, &y);
            }
        };
        let branch = branch.unwrap_or_else(|| weight.clone());
        let bindings = vec![("x", x), ("branch", branch), ("weight", weight), ("y", y)];
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
    branch: bool,
    magnitude: f32,
}

impl Shape {
    fn case(&self) -> Case<RmsNorm> {
        let shape = *self;
        let Shape { rows, length, x, y, branch, magnitude } = shape;
        let then = if branch { ", with a branch" } else { "" };
        let name = format!("{rows} rows of {length}, x {x:?}, y {y:?}, magnitude {magnitude}{then}");
        let elements = (rows * length) as f64;
        let moved = if branch { 16.0 } else { 8.0 };
        Case::new(name, Spec { branch }, 4.0 * elements, move || shape.job()).moving(moved * elements)
    }

    fn job(self) -> Job<RmsNorm> {
        let Shape { rows, length, x, y, branch, magnitude } = self;
        let mut inputs = Inputs::seed((rows * length + x.0) as u64);
        let branch_stride = length.next_multiple_of(4);
        let weight: Vec<f32> = (0..length).map(|_| 1.0 + 0.5 * inputs.normal()).collect();
        let branches = strided(&inputs.normals(rows * length, magnitude), length, branch_stride);
        let poison = vec![f32::NAN; rows * length];
        let mut tensors = vec![
            Tensor::input("weight", Data::F32(weight)),
            Tensor::checked("y", Data::F32(placed(&poison, length, y)), checks(length, y, Tolerance::f32(length))),
        ];
        let xs = Data::F32(placed(&inputs.normals(rows * length, magnitude), length, x));
        if branch {
            tensors.push(Tensor::checked("x", xs, checks(length, x, Tolerance::f32(1))));
            tensors.push(Tensor::input("branch", Data::F32(branches)));
        } else {
            tensors.push(Tensor::input("x", xs));
        }
        let params = Params {
            rows: rows as u32,
            length: length as u32,
            x_stride: x.0 as u32,
            x_offset: x.1 as u32,
            y_stride: y.0 as u32,
            y_offset: y.1 as u32,
            branch_stride: if branch { branch_stride as u32 } else { 0 },
            eps: 1e-6,
            scale: if branch { 0.178 } else { 0.0 },
        };
        Job::new(tensors, move |kernel: &RmsNorm, t, recording| {
            let added = branch.then(|| t.get("branch"));
            kernel.record(recording, params, t.get("x"), added, t.get("weight"), t.get("y"));
        })
    }
}
