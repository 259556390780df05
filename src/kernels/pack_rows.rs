//! `pack_rows`: activations as f16, for matrix units. Each row is divided by a power of two of its own, so that
//! whatever its range, nothing overflows.

use std::sync::Arc;

use super::inputs::{Inputs, checks, placed};
use super::weights::BLOCK;
use super::{Case, Check, Choice, Data, Field, Job, Kernel, Set, Tensor, Tolerance, Variant};
use crate::gpu::{Caps, Host, Recording, Shader, Source, View, grid_1d};
use crate::{reference, wgsl};

params! {
    /// Sizes of a call. Strides and offsets are in elements and multiples of 4.
    pub struct Params {
        /// Rows.
        pub rows: u32,
        /// Elements that are packed of each row, any number from 1.
        pub length: u32,
        /// Blocks of [`BLOCK`] values from one packed row to the next.
        pub blocks: u32,
        /// From one row of `x` to the next.
        pub x_stride: u32,
        /// Where the part starts in a row of `x`.
        pub x_offset: u32,
    }
}

/// Packed rows: what `pack_rows` writes, and kernels on matrix units read.
#[derive(Clone, Debug)]
pub struct Packed {
    /// `[rows, stride]` f16; the stride is the length rounded up to [`BLOCK`].
    pub values: View,
    /// `[rows]` f32: what the values were divided by.
    pub scales: View,
}

/// A model fixes nothing of it.
#[derive(Clone, Debug, PartialEq)]
pub struct Spec;

/// How it runs.
#[derive(Clone, Debug)]
pub struct Tuning {
    /// Invocations a workgroup, a multiple of 16.
    pub workgroup: u32,
    /// The maximum within subgroups first.
    pub subgroups: bool,
}

/// The kernel `pack_rows`.
pub struct PackRows {
    shader: Arc<Shader>,
}

impl Kernel for PackRows {
    const NAME: &'static str = "pack_rows";
    const SOURCE: Source = wgsl!("pack_rows");
    const PARAMS: &'static [Field] = Params::FIELDS;
    type Spec = Spec;
    type Tuning = Tuning;

    fn variants(_: &Spec, caps: &Caps) -> Vec<Variant<Tuning>> {
        // Few: each lane has several loads under way, and a barrier waits for two subgroups.
        let workgroup = caps.invocations.min(64);
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

    fn new(_: &Spec, tuning: &Tuning) -> PackRows {
        let shader = Shader::of(Self::SOURCE).u32("WORKGROUP", tuning.workgroup).module(wgsl!("lib/pack_f16"));
        let shader = match tuning.subgroups {
            true => shader.module(wgsl!("lib/reduce_subgroup")).subgroups().build(),
            false => shader.module(wgsl!("lib/reduce_shared")).build(),
        };
        PackRows { shader }
    }

    fn shader(&self) -> &Arc<Shader> {
        &self.shader
    }

    fn cases(set: Set) -> Vec<Case<PackRows>> {
        let case = |rows: usize, length: usize, magnitude: f32, x: (usize, usize)| {
            let name = format!("{rows} rows of {length}, magnitude {magnitude}, x {x:?}");
            let elements = (rows * length) as f64;
            let job = move || {
                let mut inputs = Inputs::seed((rows * length) as u64);
                let mut values = inputs.normals(rows * length, magnitude);
                values[0] *= 1000.0; // a row unlike the others
                let stride = length.next_multiple_of(BLOCK);
                let packed = vec![half::f16::NAN; rows * stride];
                let tensors = vec![
                    Tensor::input("x", Data::F32(placed(&values, length, x))),
                    Tensor::checked("y", Data::F16(packed), checks(stride, (stride, 0), Tolerance::EXACT)),
                    Tensor::output("scales", Data::poison(rows), Check::rows(rows, Tolerance::EXACT)),
                ];
                let params = Params {
                    rows: rows as u32,
                    length: length as u32,
                    blocks: (stride / BLOCK) as u32,
                    x_stride: x.0 as u32,
                    x_offset: x.1 as u32,
                };
                Job::new(tensors, move |kernel: &PackRows, t, recording| {
                    kernel.record(recording, params, t.get("x"), &Packed { values: t.get("y"), scales: t.get("scales") });
                })
            };
            Case::new(name, Spec, 4.0 * elements, job).moving(6.0 * elements)
        };
        let whole = |rows: usize, length: usize, magnitude| case(rows, length, magnitude, (length.next_multiple_of(4), 0));
        if set == Set::Timed {
            return [(512, 2048), (4096, 2048), (4096, 10_944)].map(|(rows, length)| whole(rows, length, 1.0)).into();
        }
        let mut cases: Vec<_> = [1, 2, 3, 5, 31, 32, 33, 576, 1023, 8195, 10_007].map(|length| whole(3, length, 1.0)).into();
        cases.extend([1e-28, 1e-5, 1e6, 1e34].map(|magnitude| whole(2, 70, magnitude)));
        cases.extend([case(5, 47, 1.0, (72, 12)), case(4, 1536, 1.0, (2112, 576))]);
        cases
    }
}

impl PackRows {
    /// Packs a part of each row. `x`: `[rows, x_stride]` f32.
    ///
    /// # Panics
    /// When a stride or an offset is no multiple of 4, or the blocks do not hold the length.
    pub fn record(&self, recording: &mut Recording, params: Params, x: View, to: &Packed) {
        let Params { rows, length, blocks, x_stride, x_offset } = params;
        assert!((x_stride | x_offset).is_multiple_of(4), "pack_rows: no multiple of 4: {params:?}");
        let stride = blocks as usize * BLOCK;
        assert!(length as usize <= stride, "pack_rows: {params:?}");
        let twin = move |host: &Host| {
            let x = host.get::<f32>("x");
            for row in 0..rows as usize {
                let part = row * x_stride as usize + x_offset as usize;
                let mut padded = x[part..part + length as usize].to_vec();
                padded.resize(stride, 0.0);
                let (values, scale) = reference::pack_rows::pack(&padded);
                host.set("y", row * stride, &values);
                host.set("scales", row, &[scale]);
            }
        };
        let bindings = vec![("x", x), ("y", to.values.clone()), ("scales", to.scales.clone())];
        recording.call(&self.shader, bindings, bytemuck::bytes_of(&params), grid_1d(rows), twin);
    }
}
