//! `moe_gemm`: the products of many tokens with the matrices of their experts, in tiles of workgroup
//! memory: `moe_sort` lists each expert's pairs (token, slot), and a tile of them shares a read of the
//! matrix. Each pair gets a row; `moe_combine` sums those of a token.

use std::sync::Arc;

use half::f16;
use rayon::prelude::*;

use super::linear::Activations;
use super::moe::{Experts, Matrices, Step, check};
use super::moe_case::Shape;
use super::moe_sort::{self, Tile};
use super::pack_rows::Packed;
use super::weights::{BLOCK, WeightFormat};
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
        /// Pairs that have the same row of `x`: the slots of a token in up, 1 in down.
        pub share: u32,
        /// From one row of `x` to the next, a multiple of 4.
        pub x_stride: u32,
        /// From one row of `y` to the next.
        pub y_stride: u32,
    }
}

/// What the model fixes, and the size of `moe_sort`'s tiles.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spec {
    /// How the matrices are stored.
    pub format: WeightFormat,
    /// Which product.
    pub step: Step,
    /// Pairs of a tile: one of [`TILES`].
    pub tile: u32,
}

/// Pairs of a tile that kernels are made for: for experts with few and with many pairs.
pub const TILES: [u32; 2] = [16, 64];
/// Rows of a tile. Both operands take 10 KiB of workgroup memory at most.
const TILE_ROWS: u32 = 64;

/// How it runs.
#[derive(Clone, Debug)]
pub struct Tuning {
    /// Rows and pairs of an invocation, whose sums stay in registers.
    pub lane: (u32, u32),
}

/// The kernel `moe_gemm`.
pub struct MoeGemm {
    spec: Spec,
    shader: Arc<Shader>,
}

impl Kernel for MoeGemm {
    const NAME: &'static str = "moe_gemm";
    const SOURCE: Source = wgsl!("moe_gemm");
    const PARAMS: &'static [Field] = Params::FIELDS;
    type Spec = Spec;
    type Tuning = Tuning;

    fn variants(spec: &Spec, caps: &Caps) -> Vec<Variant<Tuning>> {
        // 64 invocations; where subgroups may be narrow (Intel), one has registers for half the sums.
        let narrow = caps.subgroups.is_some_and(|(least, _)| least < 32);
        let pairs = (spec.tile / 8).min(if narrow { 4 } else { 8 });
        vec![Variant { name: "portable", tuning: Tuning { lane: (8, pairs) } }]
    }

    fn tuning(spec: &Spec, caps: &Caps) -> Choice<Tuning> {
        let variant = Self::variants(spec, caps).remove(0);
        let (rows, pairs) = variant.tuning.lane;
        let why = format!("tiles of {TILE_ROWS} rows x {} pairs, {rows} x {pairs} an invocation", spec.tile);
        Choice { variant, why }
    }

    fn new(spec: &Spec, tuning: &Tuning) -> MoeGemm {
        assert!(TILES.contains(&spec.tile), "moe_gemm: tiles of {TILES:?} pairs: {spec:?}");
        let shader = Shader::of(Self::SOURCE)
            .u32("TILE_ROWS", TILE_ROWS)
            .u32("TILE_PAIRS", spec.tile)
            .u32("LANE_ROWS", tuning.lane.0)
            .u32("LANE_PAIRS", tuning.lane.1)
            .module(spec.format.module());
        MoeGemm { spec: *spec, shader: spec.step.epilogue().add_to(shader).build() }
    }

    fn shader(&self) -> &Arc<Shader> {
        &self.shader
    }

    fn cases(set: Set) -> Vec<Case<MoeGemm>> {
        let make = |shape: Shape, tile: u32| {
            let Shape { format, step, .. } = shape;
            shape.tiled(tile).case(Spec { format, step, tile }, |kernel: &MoeGemm, recording, t| {
                kernel.record(recording, t.experts, t.order(), t.tiles(), &t.x, &t.y, (t.tokens, t.top_k));
            })
        };
        if set == Set::Timed {
            let sizes = [(2816, 2048, Step::Up), (2048, 1408, Step::Down)];
            let each = |(rows, columns, step)| {
                let shape = |tokens| Shape { step, ..Shape::new(rows, columns, tokens, 6, 64) };
                [(32, 16), (96, 16), (256, 16), (256, 64), (512, 64)].map(|(tokens, tile)| make(shape(tokens), tile))
            };
            return sizes.into_iter().flat_map(each).collect();
        }
        let tile = |(i, shape): (usize, Shape)| make(shape, TILES[i / 2 % 2]);
        Shape::pairs(&[3, 8, 33, 200]).into_iter().enumerate().map(tile).collect()
    }
}

impl MoeGemm {
    /// The product of each pair's expert with the pair's row (up: the token's) of `x`: a dispatch for
    /// each chunk of `experts`. `order` and `tiles` are what `moe_sort` wrote with the same tile for
    /// `tokens * top_k` pairs; `x`: `[tokens, columns]` in up, `[tokens * top_k, columns]` in down; `y`:
    /// `[tokens * top_k, rows / 2]` in up, `[tokens * top_k, rows]` in down, where rows of experts
    /// without weights stay as they are.
    ///
    /// # Panics
    /// When sizes do not fit, or there are more than 65,535 tiles.
    #[allow(clippy::too_many_arguments, reason = "five tensors and their sizes")]
    pub fn record(
        &self,
        recording: &mut Recording,
        experts: Experts,
        order: View,
        tiles: View,
        x: &Activations,
        y: &Activations,
        (tokens, top_k): (u32, u32),
    ) {
        let Spec { format, step, tile } = self.spec;
        let method = Method { shader: &self.shader, format, step, tile, rows: TILE_ROWS, packed: None };
        method.record(recording, experts, (order, tiles), x, y, (tokens, top_k));
    }
}

/// A packed row as a kernel sees it.
pub(super) type Unpack = fn(&[f16], f32) -> Vec<f32>;

/// A kernel's part in recording the products.
pub(super) struct Method<'a> {
    pub shader: &'a Arc<Shader>,
    pub format: WeightFormat,
    pub step: Step,
    /// Pairs and rows of a tile.
    pub tile: u32,
    pub rows: u32,
    /// x as f16, for matrix units, and the twin's view of a row of it.
    pub packed: Option<(&'a Packed, Unpack)>,
}

impl Method<'_> {
    /// A dispatch for each chunk.
    ///
    /// # Panics
    /// As [`MoeGemm::record`].
    pub fn record(
        &self,
        recording: &mut Recording,
        experts: Experts,
        (order, tiles): (View, View),
        x: &Activations,
        y: &Activations,
        (tokens, top_k): (u32, u32),
    ) {
        let Method { shader, format, step, tile, rows, packed } = *self;
        let kernel = shader.kernel;
        let pairs = tokens * top_k;
        let share = if step == Step::Up { top_k } else { 1 };
        check("x", x, pairs / share, experts.weights.columns as u32);
        check("y", y, pairs, experts.rows() / step.epilogue().rows() as u32);
        let most = moe_sort::Spec { experts: experts.count, tile }.tiles(pairs);
        assert!(most <= 65_535, "{kernel}: {most} tiles of {pairs} pairs; take fewer tokens at a time");
        for chunk in experts.chunks(kernel, format, step) {
            let params = Params {
                rows: experts.rows(),
                columns: experts.weights.columns as u32,
                blocks: experts.blocks(),
                first_expert: chunk.first_expert,
                chunk_experts: chunk.experts,
                share,
                x_stride: x.stride,
                y_stride: y.stride,
            };
            let mut bindings = vec![
                ("order", order.clone()),
                ("tiles", tiles.clone()),
                ("weights", chunk.view),
                ("x", packed.map_or(&x.view, |(packed, _)| &packed.values).clone()),
                ("y", y.view.clone()),
            ];
            bindings.extend(packed.map(|(packed, _)| ("scales", packed.scales.clone())));
            let grid = match grid_1d(params.rows.div_ceil(rows)) {
                Grid::Direct([x, y, _]) => Grid::Direct([most, x, y]),
                indirect => indirect,
            };
            let unpack = packed.map(|(_, unpack)| unpack);
            let twin = move |host: &Host| twin((format, step, unpack), params, host);
            recording.call(shader, bindings, bytemuck::bytes_of(&params), grid, twin);
        }
    }
}

fn twin((format, step, unpack): (WeightFormat, Step, Option<Unpack>), params: Params, host: &Host) {
    let Params { rows, columns, blocks, first_expert, chunk_experts, .. } = params;
    let matrices = Matrices::of(host, format, rows, columns);
    let (order, tiles) = (host.get::<u32>("order"), host.get::<Tile>("tiles"));
    let row_of = |row: u32| match unpack {
        Some(unpack) => {
            let from = (row * blocks) as usize * BLOCK;
            let values = &host.get::<f16>("x")[from..from + columns as usize];
            unpack(values, host.get::<f32>("scales")[row as usize])
        }
        None => host.get::<f32>("x")[(row * params.x_stride) as usize..][..columns as usize].to_vec(),
    };
    let here = |tile: &&Tile| tile.count > 0 && (first_expert..first_expert + chunk_experts).contains(&tile.expert);
    let one = |tile: &Tile| {
        let pairs = &order[tile.first as usize..][..tile.count as usize];
        let rows: Vec<Vec<f32>> = pairs.iter().map(|pair| row_of(pair / params.share)).collect();
        let tokens: Vec<&[f32]> = rows.iter().map(|row| &row[..]).collect();
        let products = reference::moe_gemm::products(&matrices.expert(tile.expert - first_expert), &tokens);
        let output = |products: &Vec<f64>| match step {
            Step::Up => reference::moe_gemm::joined(products),
            Step::Down => products.clone(),
        };
        let outputs = products.iter().map(|p| output(p).iter().map(|v| *v as f32).collect::<Vec<f32>>());
        pairs.iter().copied().zip(outputs).collect::<Vec<_>>()
    };
    let mine: Vec<&Tile> = tiles.iter().filter(here).collect();
    let outputs: Vec<(u32, Vec<f32>)> = mine.into_par_iter().flat_map_iter(one).collect();
    for (pair, output) in outputs {
        host.set("y", (pair * params.y_stride) as usize, &output);
    }
}
