//! `gemm`: a weight matrix times the activations of many tokens, in tiles of workgroup memory. Rows
//! are joined by the epilogue, as in `gemv`.

use std::sync::Arc;

use super::linear::{Crossover, Epilogue, Method, Params, Product, Reads};
use super::linear_case::Shape;
use super::weights::WeightFormat;
use super::{Case, Choice, Field, Kernel, Set, Variant};
use crate::gpu::{Caps, Recording, Shader, Source};
use crate::{reference, wgsl};

/// What the model fixes.
#[derive(Clone, Debug, PartialEq)]
pub struct Spec {
    /// How the matrix is stored.
    pub format: WeightFormat,
    /// What becomes of its rows.
    pub epilogue: Epilogue,
    /// Tokens of a call: a hint for the tile; any number runs.
    pub tokens: u32,
}

/// How it runs.
#[derive(Clone, Debug)]
pub struct Tuning {
    /// Rows and tokens of a workgroup's tile.
    pub tile: (u32, u32),
    /// Rows and tokens of an invocation, whose sums stay in registers.
    pub lane: (u32, u32),
}

/// Numbers of tokens that kernels are made for.
pub const TOKENS: [u32; 2] = [32, 64];
/// Rows of a tile. Small tiles: 64 invocations wait for each other, and the matrices of small models
/// still make enough workgroups. Both operands take 10 KiB of workgroup memory.
const TILE_ROWS: u32 = 64;
/// Rows and tokens of an invocation: 64 sums read 4 vectors for 64 multiply-adds, but where subgroups
/// may be narrow (Intel), an invocation has registers for half of them.
const LANE: (u32, u32) = (8, 8);
const LANE_NARROW: (u32, u32) = (8, 4);

/// Tiles of a product.
pub(super) fn tiles(rows: u32, tokens: u32) -> u32 {
    rows.div_ceil(TILE_ROWS) * tokens.div_ceil(TOKENS[1])
}

/// The kernel `gemm`.
pub struct Gemm {
    spec: Spec,
    tuning: Tuning,
    shader: Arc<Shader>,
}

impl Kernel for Gemm {
    const NAME: &'static str = "gemm";
    const SOURCE: Source = wgsl!("gemm");
    const PARAMS: &'static [Field] = Params::FIELDS;
    type Spec = Spec;
    type Tuning = Tuning;

    fn variants(spec: &Spec, caps: &Caps) -> Vec<Variant<Tuning>> {
        let tokens = if spec.tokens <= TOKENS[0] { TOKENS[0] } else { TOKENS[1] };
        let wide = caps.subgroups.is_none_or(|(least, _)| least >= 32) && tokens == TOKENS[1];
        let lane = if wide { LANE } else { LANE_NARROW };
        vec![Variant { name: "portable", tuning: Tuning { tile: (TILE_ROWS, tokens), lane } }]
    }

    fn tuning(spec: &Spec, caps: &Caps) -> Choice<Tuning> {
        let variant = Self::variants(spec, caps).remove(0);
        let Tuning { tile, lane } = &variant.tuning;
        let Crossover { gemm_from, why, .. } = Crossover::of(caps);
        let tiles = format!("tiles of {} rows x {} tokens, {} x {} an invocation", tile.0, tile.1, lane.0, lane.1);
        let why = format!("{tiles}; from {gemm_from} tokens on, since {why}");
        Choice { variant, why }
    }

    fn new(spec: &Spec, tuning: &Tuning) -> Gemm {
        let Tuning { tile, lane } = *tuning;
        let shader = Shader::of(Self::SOURCE)
            .u32("TILE_ROWS", tile.0)
            .u32("TILE_TOKENS", tile.1)
            .u32("LANE_ROWS", lane.0)
            .u32("LANE_TOKENS", lane.1)
            .module(spec.format.module());
        let shader = spec.epilogue.add_to(shader).build();
        Gemm { spec: spec.clone(), tuning: tuning.clone(), shader }
    }

    fn shader(&self) -> &Arc<Shader> {
        &self.shader
    }

    fn cases(set: Set) -> Vec<Case<Gemm>> {
        let make = |shape: Shape| {
            let Shape { format, epilogue, hint, .. } = shape;
            shape.case(Spec { format, epilogue, tokens: hint }, |kernel: &Gemm, recording, product| {
                kernel.record(recording, product);
            })
        };
        if set == Set::Timed {
            let tokens = [16, 32, 64, 128, 512];
            return [(10_944, 2048), (2048, 10_944), (576, 2048)]
                .into_iter()
                .flat_map(|(rows, columns)| tokens.map(|tokens| make(Shape::new(rows, columns, tokens))))
                .collect();
        }
        let sizes: [(usize, usize, usize, &'static [usize]); 10] = [
            (2, 1, 9, &[2]),
            (3, 7, 17, &[1, 2]),
            (66, 33, 64, &[66]),
            (128, 64, 32, &[62, 66]),
            (130, 257, 65, &[130]),
            (65, 15, 33, &[65]),
            (200, 1030, 100, &[70, 64, 66]),
            (40, 4098, 12, &[40]),
            (64, 16, 1, &[64]),
            (12, 50, 300, &[4, 6, 2]),
        ];
        let mut shapes: Vec<Shape> = Vec::new();
        for (i, (rows, columns, tokens, chunks)) in sizes.into_iter().enumerate() {
            for format in WeightFormat::ALL {
                let shape = Shape { format, chunks: Some(chunks), ..Shape::new(rows, columns, tokens) };
                let even = chunks.iter().all(|rows| rows % 2 == 0);
                let shape = if i % 3 == 0 { Shape { epilogue: Epilogue::Add, ..shape } } else { shape };
                if even && i % 2 == format as usize % 2 {
                    shapes.push(Shape { epilogue: Epilogue::Swiglu, ..shape });
                } else {
                    shapes.push(shape);
                }
            }
        }
        let part = Shape { x: (212, 12), y: (96, 20), ..Shape::new(50, 100, 70) };
        let odd = Shape { x: (212, 12), y: (96, 20), ..Shape::new(51, 99, 11) };
        let swiglu = Shape { epilogue: Epilogue::Swiglu, format: WeightFormat::Bf16, ..part };
        // Other numbers of tokens than the hint says.
        let hinted = [(512, 9), (9, 130)].map(|(hint, tokens)| Shape { hint, ..Shape::new(70, 130, tokens) });
        shapes.extend([part, odd, swiglu].into_iter().chain(hinted));
        if set == Set::Full {
            shapes.extend([9, 64, 513].map(|tokens| Shape::new(2050, 4096, tokens)));
        }
        shapes.into_iter().map(make).collect()
    }
}

impl Gemm {
    /// `y = epilogue(W x)`: a dispatch for each chunk of the matrix.
    ///
    /// # Panics
    /// When the matrix is not of the spec's format, or the activations do not fit it.
    pub fn record(&self, recording: &mut Recording, product: &Product) {
        let Spec { format, epilogue, .. } = self.spec;
        let twin = reference::gemm::gemm;
        let method = Method { shader: &self.shader, format, epilogue, block: self.tuning.tile, reads: Reads::Plain(twin), halves: false };
        method.record(recording, product);
    }
}
