//! `moe_gemv`: the products of few tokens with the matrices of their experts, bound by reading these.
//! Each pair (token, slot) reads its expert's matrix; experts that nobody chose are not read.

use std::sync::Arc;

use rayon::prelude::*;

use super::gemv::NARROW;
use super::linear::{Activations, Norm};
use super::moe::{Experts, Matrices, Step, check};
use super::moe_case::Shape;
use super::moe_route::Route;
use super::weights::WeightFormat;
use super::{Case, Choice, Field, Kernel, Set, Variant};
use crate::gpu::{Caps, Grid, Host, Recording, Shader, Source, View, grid_1d};
use crate::{reference, wgsl};

params! {
    /// Sizes of a call for one chunk of experts. Strides are in elements.
    pub struct Params {
        /// Rows of an expert's matrix.
        pub rows: u32,
        /// Values of a row, any number.
        pub columns: u32,
        /// Blocks from one row to the next.
        pub blocks: u32,
        /// The chunk's first expert.
        pub first_expert: u32,
        /// The chunk's experts.
        pub chunk_experts: u32,
        /// Experts with weights in all chunks.
        pub experts: u32,
        /// Pairs that have the same row of `x`: the slots of a token in up, 1 in down.
        pub share: u32,
        /// From one row of `x` to the next, a multiple of 4.
        pub x_stride: u32,
        /// From one token's `input` to the next.
        pub input_stride: u32,
        /// From one row of `y` to the next.
        pub y_stride: u32,
        /// 1 where down adds to what `y` holds.
        pub add: u32,
        /// 1 where the experts without weights are of this chunk.
        pub identity: u32,
        /// Added to the mean square by the norm.
        pub eps: f32,
    }
}

/// What the model fixes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spec {
    /// How the matrices are stored.
    pub format: WeightFormat,
    /// Which product.
    pub step: Step,
    /// Experts of a token.
    pub top_k: u32,
    /// What goes up passes a norm first.
    pub norm: bool,
}

impl Spec {
    /// Slots that one output joins.
    fn slots(&self) -> u32 {
        if self.step == Step::Down { self.top_k } else { 1 }
    }
}

/// How it runs.
#[derive(Clone, Debug)]
pub struct Tuning {
    /// Invocations a workgroup.
    pub workgroup: u32,
    /// Groups of rows in it; each has a team of lanes for each slot that an output joins.
    pub groups: u32,
    /// Rows of a group: they share a read of the activations.
    pub rows: u32,
    /// Parts of each row that a lane has under way.
    pub unroll: u32,
    /// Teams are subgroups.
    pub subgroups: bool,
}

/// Invocations a workgroup where slots do not ask for more.
const WORKGROUP: u32 = 128;
/// Rows of a group and parts under way: 8 loads of 16 bytes a lane.
const SHARE: (u32, u32) = (4, 2);

/// The kernel `moe_gemv`.
pub struct MoeGemv {
    spec: Spec,
    tuning: Tuning,
    shader: Arc<Shader>,
}

impl Kernel for MoeGemv {
    const NAME: &'static str = "moe_gemv";
    const SOURCE: Source = wgsl!("moe_gemv");
    const PARAMS: &'static [Field] = Params::FIELDS;
    type Spec = Spec;
    type Tuning = Tuning;

    fn class(spec: &Spec) -> String {
        format!("{:?}", spec.step)
    }

    fn variants(spec: &Spec, caps: &Caps) -> Vec<Variant<Tuning>> {
        let (rows, unroll) = SHARE;
        let slots = spec.slots();
        let with = |lanes: u32, subgroups: bool| {
            let groups = (WORKGROUP / lanes / slots).max(1);
            let workgroup = slots * groups * lanes;
            Tuning { workgroup, groups, rows, unroll, subgroups }
        };
        // 512 bytes of a row at a time, or half of it where a token has many slots.
        let lanes = if slots > 8 { 16 } else { 32 };
        let mut variants = vec![Variant { name: "portable", tuning: with(lanes, false) }];
        if let Some((least, _)) = caps.subgroups {
            // As many teams as there may be subgroups: with wider ones, each takes several in turn.
            let tuning = with(least.clamp(4, WORKGROUP), true);
            let workgroup = tuning.workgroup.clamp(WORKGROUP, caps.invocations.min(512));
            variants.push(Variant { name: "subgroup", tuning: Tuning { workgroup, ..tuning } });
        }
        if caps.is_software() {
            let (workgroup, lanes) = NARROW;
            let groups = (workgroup / lanes / slots).max(1);
            let workgroup = slots * groups * lanes;
            variants.push(Variant { name: "narrow", tuning: Tuning { workgroup, groups, rows, unroll, subgroups: false } });
        }
        variants
    }

    fn tuning(spec: &Spec, caps: &Caps) -> Choice<Tuning> {
        let mut variants = Self::variants(spec, caps);
        // H100, DeepSeek-V2-Lite's 8 experts of a token: up 39.1 us portable, 47.1 by subgroups; down the same.
        let at = if caps.is_software() { variants.len() - 1 } else { 0 };
        let variant = variants.swap_remove(at);
        let Tuning { rows, unroll, subgroups, .. } = variant.tuning;
        let sums = match (subgroups, caps.subgroups) {
            _ if caps.is_software() => "a software driver: few lanes sum",
            (true, _) => "a subgroup sums",
            (false, Some(_)) => "a team of lanes, measured faster than a subgroup, sums",
            (false, None) => "no subgroups: a team of lanes sums",
        };
        let why = format!("{sums} {rows} rows of an expert, {} loads a lane under way", rows * unroll);
        Choice { variant, why }
    }

    fn new(spec: &Spec, tuning: &Tuning) -> MoeGemv {
        assert!((1..=16).contains(&spec.top_k), "moe_gemv: 1 to 16 experts a token: {spec:?}");
        assert!(!spec.norm || spec.step == Step::Up, "moe_gemv: a norm is for what goes up: {spec:?}");
        let shader = Shader::of(Self::SOURCE)
            .u32("WORKGROUP", tuning.workgroup)
            .bool("DOWN", spec.step == Step::Down)
            .u32("SLOTS", spec.slots())
            .u32("GROUPS", tuning.groups)
            .u32("TEAMS", tuning.groups * spec.slots())
            .u32("ROWS", tuning.rows)
            .u32("UNROLL", tuning.unroll)
            .bool("NORM", spec.norm)
            .module(spec.format.module());
        let shader = spec.step.epilogue().add_to(shader);
        let shader = match tuning.subgroups {
            true => shader.module(wgsl!("lib/team_subgroup")).subgroups(),
            false => shader.module(wgsl!("lib/team_shared")),
        };
        MoeGemv { spec: *spec, tuning: tuning.clone(), shader: shader.build() }
    }

    fn shader(&self) -> &Arc<Shader> {
        &self.shader
    }

    fn cases(set: Set) -> Vec<Case<MoeGemv>> {
        let make = |shape: Shape| {
            let Shape { format, step, top_k, accumulate, norm, .. } = shape;
            shape.case(Spec { format, step, top_k, norm }, move |kernel: &MoeGemv, recording, t| match step {
                Step::Up => {
                    let given = norm.then(|| t.norm());
                    kernel.record_up(recording, t.experts, t.routes(), (&t.x, given.as_ref()), &t.y, t.tokens);
                }
                Step::Down => {
                    kernel.record_down(recording, t.experts, t.routes(), &t.x, Some(&t.input), &t.y, t.tokens, accumulate);
                }
            })
        };
        if set == Set::Timed {
            let sizes = [(2816, 2048, Step::Up), (2048, 1408, Step::Down)];
            // Of a row's slots two are shared experts, as in DeepSeek-V2-Lite; with one token a norm goes in.
            let each = |(rows, columns, step)| {
                let norm = |tokens| tokens == 1 && step == Step::Up;
                [1, 4, 32, 96].map(|tokens| Shape { step, norm: norm(tokens), ..Shape::new(rows, columns, tokens, 8, 66) })
            };
            return sizes.into_iter().flat_map(each).map(make).collect();
        }
        let norm = |shape: Shape| Shape { norm: true, ..shape };
        let normalised = [Shape::new(66, 40, 1, 6, 64), Shape::new(34, 333, 3, 2, 7)].map(norm);
        Shape::pairs(&[1, 2, 3, 8]).into_iter().chain(normalised).map(make).collect()
    }
}

impl MoeGemv {
    /// `y[pair] = silu(gate x) * up x` of each pair's expert: a dispatch for each chunk of `experts`.
    /// `routes`: `[tokens, top_k]` [`Route`]; `x`: `[tokens, columns]`; `y`: `[tokens * top_k, rows / 2]`,
    /// where rows of experts without weights stay as they are. With a norm, where the spec has one, x goes
    /// through it first.
    ///
    /// # Panics
    /// When the kernel is for the other step, or sizes do not fit.
    pub fn record_up(
        &self,
        recording: &mut Recording,
        experts: Experts,
        routes: View,
        (x, norm): (&Activations, Option<&Norm>),
        y: &Activations,
        tokens: u32,
    ) {
        assert!(self.spec.norm == norm.is_some(), "moe_gemv: {:?}, a norm: {}", self.spec, norm.is_some());
        assert!(self.spec.step == Step::Up, "moe_gemv: {:?} records up", self.spec);
        check("x", x, tokens, experts.weights.columns as u32);
        check("y", y, tokens * self.spec.top_k, experts.rows() / 2);
        self.record(recording, experts, routes, ([x, x, y], norm), tokens * self.spec.top_k, false);
    }

    /// `y[token]` = the sum over the token's slots of weight * (W `x[pair]`), where an expert without
    /// weights gives the token's `input` (none where all experts have weights); added to what `y` holds where `accumulate` says so. `routes`:
    /// `[tokens, top_k]` [`Route`]; `x`: `[tokens * top_k, columns]`; `input` and `y`: `[tokens, rows]`.
    ///
    /// # Panics
    /// When the kernel is for the other step, or sizes do not fit.
    #[allow(clippy::too_many_arguments, reason = "four tensors and their sizes")]
    pub fn record_down(
        &self,
        recording: &mut Recording,
        experts: Experts,
        routes: View,
        x: &Activations,
        input: Option<&Activations>,
        y: &Activations,
        tokens: u32,
        accumulate: bool,
    ) {
        assert!(self.spec.step == Step::Down, "moe_gemv: {:?} records down", self.spec);
        check("x", x, tokens * self.spec.top_k, experts.weights.columns as u32);
        if let Some(input) = input {
            check("input", input, tokens, experts.rows());
        }
        check("y", y, tokens, experts.rows());
        self.record(recording, experts, routes, ([x, input.unwrap_or(x), y], None), tokens, accumulate);
    }

    fn record(
        &self,
        recording: &mut Recording,
        experts: Experts,
        routes: View,
        ([x, input, y], norm): ([&Activations; 3], Option<&Norm>),
        units: u32,
        accumulate: bool,
    ) {
        let spec = self.spec;
        for (i, chunk) in experts.chunks(Self::NAME, spec.format, spec.step).into_iter().enumerate() {
            let params = Params {
                rows: experts.rows(),
                columns: experts.weights.columns as u32,
                blocks: experts.blocks(),
                first_expert: chunk.first_expert,
                chunk_experts: chunk.experts,
                experts: experts.count,
                share: if spec.step == Step::Up { spec.top_k } else { 1 },
                x_stride: x.stride,
                input_stride: input.stride,
                y_stride: y.stride,
                add: u32::from(accumulate || i > 0),
                identity: u32::from(i == 0),
                eps: norm.map_or(0.0, |norm| norm.eps),
            };
            let bindings = vec![
                ("routes", routes.clone()),
                ("weights", chunk.view),
                ("x", x.view.clone()),
                ("input", input.view.clone()),
                ("norm", norm.map_or(&x.view, |norm| &norm.weight).clone()),
                ("y", y.view.clone()),
            ];
            let grid = match grid_1d(params.rows.div_ceil(self.tuning.groups * self.tuning.rows)) {
                Grid::Direct([x, y, _]) => Grid::Direct([units, x, y]),
                indirect => indirect,
            };
            let twin = move |host: &Host| twin(spec, params, units, host);
            recording.call(&self.shader, bindings, bytemuck::bytes_of(&params), grid, twin);
        }
    }
}

fn twin(spec: Spec, params: Params, units: u32, host: &Host) {
    let Params { rows, columns, first_expert, chunk_experts, .. } = params;
    let matrices = Matrices::of(host, spec.format, rows, columns);
    let (routes, x) = (host.get::<Route>("routes"), host.get::<f32>("x"));
    let (input, y) = (host.get::<f32>("input"), host.get::<f32>("y"));
    let here = |route: &Route| (first_expert..first_expert + chunk_experts).contains(&route.expert);
    let row = |row: u32| {
        let x = &x[(row * params.x_stride) as usize..][..columns as usize];
        match spec.norm {
            true => reference::rms_norm::rms_norm(x, &host.get::<f32>("norm")[..columns as usize], params.eps),
            false => x.to_vec(),
        }
    };
    let one = |unit: u32| {
        if spec.step == Step::Up {
            let route = routes[unit as usize];
            let matrix = || matrices.expert(route.expert - first_expert);
            return here(&route).then(|| reference::moe_gemv::up(&matrix(), &row(unit / spec.top_k)));
        }
        let mut sums = vec![0.0; rows as usize];
        if params.add == 1 {
            let start = &y[(unit * params.y_stride) as usize..];
            sums.iter_mut().zip(start).for_each(|(sum, y)| *sum = f64::from(*y));
        }
        for pair in unit * spec.top_k..(unit + 1) * spec.top_k {
            let route = routes[pair as usize];
            if here(&route) {
                let matrix = matrices.expert(route.expert - first_expert);
                reference::moe_gemv::down(&mut sums, route.weight, &matrix, &row(pair));
            } else if params.identity == 1 && route.expert >= params.experts {
                let input = &input[(unit * params.input_stride) as usize..];
                sums.iter_mut().zip(input).for_each(|(sum, x)| *sum += f64::from(route.weight) * f64::from(*x));
            }
        }
        Some(sums.into_iter().map(|sum| sum as f32).collect::<Vec<f32>>())
    };
    let outputs: Vec<Option<Vec<f32>>> = (0..units).into_par_iter().map(one).collect();
    for (unit, output) in outputs.iter().enumerate() {
        if let Some(output) = output {
            host.set("y", unit * params.y_stride as usize, output);
        }
    }
}
