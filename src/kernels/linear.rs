//! Products with weight matrices: what `gemv` and `gemm` have in common, and the choice between them.

use std::fmt;
use std::sync::{Arc, OnceLock};

use half::f16;
use rayon::prelude::*;

use super::Kernel;
use super::gemm::{self, Gemm};
use super::gemm_coop::GemmCoop;
use super::gemv::{self, Gemv};
use super::matrices::Matrices;
use super::pack_rows::Packed;
use super::weights::{BLOCK, WeightFormat, Weights};
use crate::gpu::{Caps, Device, DeviceType, Grid, Host, Recording, Shader, ShaderBuilder, View, grid_1d};
use crate::{Result, reference, wgsl};

crate::params! {
    /// Sizes of a call for one chunk of a matrix. Strides and offsets are in elements.
    pub struct Params {
        /// Rows of the chunk.
        pub rows: u32,
        /// Values of a row, any number.
        pub columns: u32,
        /// Blocks from one row to the next.
        pub blocks: u32,
        /// The chunk's first row in the matrix.
        pub first_row: u32,
        /// Tokens.
        pub tokens: u32,
        /// From one token's `x` to the next, a multiple of 4.
        pub x_stride: u32,
        /// Where `x` starts in a token's, a multiple of 4.
        pub x_offset: u32,
        /// From one token's `y` to the next.
        pub y_stride: u32,
        /// Where `y` starts in a token's.
        pub y_offset: u32,
        /// Factor of what is added to `y`.
        pub scale: f32,
        /// Added to the mean square by the norm.
        pub eps: f32,
    }
}

/// What becomes of the rows of a product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Epilogue {
    /// Each is an output.
    Store,
    /// `silu(gate) * up`: row 2i of the matrix is a gate, row 2i + 1 its up, which gives output i.
    /// The matrix's chunks are cut at even rows (`group` of [`Weights::upload`]).
    Swiglu,
    /// Each, times [`Product::scale`], is added to what the output holds.
    Add,
}

impl Epilogue {
    /// Every epilogue.
    pub const ALL: [Epilogue; 3] = [Epilogue::Store, Epilogue::Swiglu, Epilogue::Add];

    /// Rows that make one output.
    pub fn rows(self) -> usize {
        if self == Epilogue::Swiglu { 2 } else { 1 }
    }

    /// Adds its modules to a kernel's.
    pub(super) fn add_to(self, shader: ShaderBuilder) -> ShaderBuilder {
        match self {
            Epilogue::Store => shader.module(wgsl!("lib/epilogue_store")),
            Epilogue::Add => shader.module(wgsl!("lib/epilogue_add")),
            Epilogue::Swiglu => shader.module(wgsl!("lib/activation_silu")).module(wgsl!("lib/epilogue_swiglu")),
        }
    }
}

/// Rows of f32, one a token, or the same part of each row.
#[derive(Clone, Debug)]
pub struct Activations {
    /// `[tokens, stride]` f32.
    pub view: View,
    /// Elements from one row to the next, a multiple of 4.
    pub stride: u32,
    /// Where the part starts in a row, a multiple of 4.
    pub offset: u32,
}

impl Activations {
    /// Whole rows of `length` elements, rounded up to 4.
    pub fn rows(view: View, length: u32) -> Activations {
        Activations { view, stride: length.next_multiple_of(4), offset: 0 }
    }

    /// # Panics
    /// When `length` elements of so many bytes of each of `tokens` rows do not fit.
    fn check(&self, name: &str, tokens: u32, length: usize, element: u64) {
        let Activations { view, stride, offset } = self;
        let fits = stride.is_multiple_of(4) && offset.is_multiple_of(4);
        assert!(fits, "{name}: stride {stride} and offset {offset} must be multiples of 4");
        let end = *offset as usize + length.next_multiple_of(4);
        assert!(*stride as usize >= end || tokens <= 1, "{name}: {length} elements from {offset} of rows of {stride}");
        let bytes = element * (u64::from(tokens.saturating_sub(1)) * u64::from(*stride) + end as u64);
        assert!(view.size() >= bytes, "{name}: {tokens} rows take {bytes} bytes, not {}", view.size());
    }
}

/// A norm of activations: `x / sqrt(mean(x^2) + eps) * weight` (RMSNorm, arXiv:1910.07467).
#[derive(Clone, Debug)]
pub struct Norm {
    /// `[columns]` f32, rounded up to 16 bytes.
    pub weight: View,
    /// Added to the mean square.
    pub eps: f32,
}

/// `y = epilogue(W x)` for some tokens.
#[derive(Clone, Copy)]
pub struct Product<'a> {
    /// W.
    pub weights: &'a Weights,
    /// `W.columns` elements a token. What stands behind them is not read into a sum.
    pub x: &'a Activations,
    /// `W.rows / epilogue.rows()` elements a token, of another buffer. What stands behind them stays.
    pub y: &'a Activations,
    /// Tokens, any number.
    pub tokens: u32,
    /// The norm that x goes through first, where [`Linear::folds_norm`] says that the product takes it.
    pub norm: Option<&'a Norm>,
    /// x as f16, for kernels on matrix units; they read nothing else of x.
    pub packed: Option<&'a Packed>,
    /// Factor of what [`Epilogue::Add`] adds.
    pub scale: f32,
}

impl<'a> Product<'a> {
    /// A product with no norm and the factor 1.
    pub fn new(weights: &'a Weights, x: &'a Activations, y: &'a Activations, tokens: u32) -> Product<'a> {
        Product { weights, x, y, tokens, norm: None, packed: None, scale: 1.0 }
    }
}

/// A kernel's part in recording a [`Product`].
pub(super) struct Method<'a> {
    pub shader: &'a Arc<Shader>,
    pub format: WeightFormat,
    pub epilogue: Epilogue,
    /// Rows and tokens of a workgroup.
    pub block: (u32, u32),
    /// What it reads of the activations.
    pub reads: Reads,
    /// Outputs are f16.
    pub halves: bool,
}

/// What a kernel reads of the activations, with its twin: the products of a row with all tokens.
#[derive(Clone, Copy)]
pub(super) enum Reads {
    /// f32, by a shader with no binding for a norm.
    Plain(fn(&[f32], &[&[f32]]) -> Vec<f64>),
    /// f32, by a shader with a binding for a norm, which it uses or not.
    Normed(bool, fn(&[f32], &[&[f32]]) -> Vec<f64>),
    /// Packed rows.
    Packed(fn(&[f32], &[(Vec<f16>, f32)]) -> Vec<f64>),
}

impl Method<'_> {
    /// A dispatch for each chunk.
    ///
    /// # Panics
    /// When the matrix does not fit the kernel's spec, or the activations do not fit the matrix.
    pub fn record(&self, recording: &mut Recording, product: &Product) {
        let Product { weights, x, y, tokens, norm, packed, scale } = *product;
        let kernel = self.shader.kernel;
        let (format, epilogue) = (self.format, self.epilogue);
        assert!(weights.format == format, "{kernel} for {format:?} got a matrix of {:?}", weights.format);
        let uses = matches!(self.reads, Reads::Normed(true, _));
        assert!(uses == norm.is_some(), "{kernel} takes a norm: {uses}, and one was given: {}", norm.is_some());
        x.check("x", tokens, weights.columns, 4);
        y.check("y", tokens, weights.rows / epilogue.rows(), if self.halves { 2 } else { 4 });
        let row_bytes = format.row_bytes(weights.columns);
        for chunk in &weights.chunks {
            let even = chunk.rows.is_multiple_of(epilogue.rows()) && chunk.first_row.is_multiple_of(epilogue.rows());
            assert!(
                even,
                "{kernel}: {epilogue:?} needs chunks cut at even rows, not {} from {}",
                chunk.rows, chunk.first_row
            );
            let size = chunk.view.size();
            assert!(
                size >= (chunk.rows * row_bytes) as u64,
                "{kernel}: a chunk of {} rows has {size} bytes",
                chunk.rows
            );
            let params = Params {
                rows: chunk.rows as u32,
                columns: weights.columns as u32,
                blocks: (row_bytes / format.block_bytes()) as u32,
                first_row: chunk.first_row as u32,
                tokens,
                x_stride: x.stride,
                x_offset: x.offset,
                y_stride: y.stride,
                y_offset: y.offset,
                scale,
                eps: norm.map_or(0.0, |norm| norm.eps),
            };
            let mut bindings = vec![("weights", chunk.view.clone()), ("y", y.view.clone())];
            match (self.reads, packed) {
                (Reads::Packed(_), Some(Packed { values, scales })) => {
                    let fits = values.size() >= u64::from(tokens * params.blocks) * 2 * BLOCK as u64;
                    assert!(fits, "{kernel}: {tokens} packed rows of {} blocks", params.blocks);
                    bindings.extend([("x", values.clone()), ("scales", scales.clone())]);
                }
                (Reads::Packed(_), None) => panic!("{kernel}: no packed activations"),
                (Reads::Plain(_), _) => bindings.push(("x", x.view.clone())),
                (Reads::Normed(..), _) => {
                    let norm = norm.map_or(&x.view, |norm| &norm.weight).clone();
                    bindings.extend([("x", x.view.clone()), ("norm", norm)]);
                }
            }
            let (reads, halves) = (self.reads, self.halves);
            let twin = move |host: &Host| twin(params, (format, epilogue), (reads, halves), host);
            let blocks = tokens.div_ceil(self.block.1);
            let grid = match grid_1d(params.rows.div_ceil(self.block.0)) {
                Grid::Direct([x, y, _]) => Grid::Direct([blocks, x, y]),
                indirect => indirect,
            };
            recording.call(self.shader, bindings, bytemuck::bytes_of(&params), grid, twin);
        }
    }
}

fn twin(params: Params, (format, epilogue): (WeightFormat, Epilogue), (reads, halves): (Reads, bool), host: &Host) {
    let weights = host.get::<u8>("weights");
    let columns = params.columns as usize;
    let tokens = 0..params.tokens as usize;
    let x = |normed: bool| {
        let x = host.get::<f32>("x");
        let of = |token: usize| {
            let at = token * params.x_stride as usize + params.x_offset as usize;
            let x = &x[at..at + columns];
            match normed {
                true => reference::rms_norm::rms_norm(x, &host.get::<f32>("norm")[..columns], params.eps),
                false => x.to_vec(),
            }
        };
        tokens.clone().map(of).collect::<Vec<Vec<f32>>>()
    };
    let weights = weights.par_chunks_exact(format.row_bytes(columns)).take(params.rows as usize);
    let weights = weights.map(|row| format.decode(row)[..columns].to_vec());
    let plain = |normed: bool, products: fn(&[f32], &[&[f32]]) -> Vec<f64>| {
        let tokens = x(normed);
        let tokens: Vec<&[f32]> = tokens.iter().map(|x| &x[..]).collect();
        weights.clone().map(|row| products(&row, &tokens)).collect()
    };
    let rows: Vec<Vec<f64>> = match reads {
        Reads::Plain(products) => plain(false, products),
        Reads::Normed(normed, products) => plain(normed, products),
        Reads::Packed(products) => {
            let (x, scales) = (host.get::<f16>("x"), host.get::<f32>("scales"));
            let stride = params.blocks as usize * BLOCK;
            let of = |token: usize| (x[token * stride..][..columns].to_vec(), scales[token]);
            let tokens: Vec<(Vec<f16>, f32)> = tokens.map(of).collect();
            weights.map(|row| products(&row, &tokens)).collect()
        }
    };
    for token in 0..params.tokens {
        let values: Vec<f32> = rows.iter().map(|row| row[token as usize] as f32).collect();
        let outputs = match epilogue {
            Epilogue::Store => values,
            Epilogue::Add => {
                let first = (token * params.y_stride + params.y_offset + params.first_row) as usize;
                reference::add::add(&host.get::<f32>("y")[first..first + values.len()], &values, params.scale)
            }
            Epilogue::Swiglu => {
                let every_second = |from: usize| values.iter().skip(from).step_by(2).copied().collect::<Vec<f32>>();
                reference::swiglu::swiglu(&every_second(0), &every_second(1))
            }
        };
        let first = params.first_row as usize / epilogue.rows();
        let to = (token * params.y_stride + params.y_offset) as usize + first;
        match halves {
            true => host.set("y", to, &reference::gemm_coop::halves(&outputs)),
            false => host.set("y", to, &outputs),
        }
    }
}

/// From how many tokens on `gemm` is taken: a Tuning of the device.
#[derive(Clone, Debug)]
pub struct Crossover {
    /// The least number of tokens for `gemm`.
    pub gemm_from: u32,
    /// The least number of its tiles: fewer leave most of the device idle.
    pub tiles_from: u32,
    /// The reason.
    pub why: &'static str,
}

impl Crossover {
    /// The one of a device. `gemv` reads the matrix again for every 8 tokens, but from the cache.
    pub fn of(caps: &Caps) -> Crossover {
        match caps.is_software() {
            true => Crossover {
                gemm_from: 9,
                tiles_from: 1,
                why: "a software driver is bound by arithmetic, and a tile shares the decoding of weights",
            },
            false => Crossover {
                gemm_from: 33,
                // A product with 64 rows by 4,096 tokens takes an H100 371 us in 64 tiles of `gemm`, and 109 by `gemv`.
                tiles_from: if caps.device_type == DeviceType::Discrete { 128 } else { 64 },
                why: "fewer leave most of a tile or of the device unused, and gemv's further reads come from the cache",
            },
        }
    }
}

impl fmt::Display for Crossover {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let Crossover { gemm_from, tiles_from, why } = self;
        write!(f, "gemv below {gemm_from} tokens or {tiles_from} tiles, gemm from there on: {why}")
    }
}

/// Products with matrices of any format on one device: `gemv`, `gemm`, or `gemm_coop` where there are matrix units,
/// each made once for a format, an epilogue and a class of token counts.
pub struct Linear {
    caps: Caps,
    crossover: Crossover,
    gemv: Vec<OnceLock<Gemv>>,
    gemm: Vec<OnceLock<Gemm>>,
    matrices: Option<Matrices>,
}

impl Linear {
    /// For a device. Makes no kernel yet.
    pub fn new(caps: &Caps) -> Linear {
        let slots = WeightFormat::ALL.len() * Epilogue::ALL.len();
        Linear {
            caps: caps.clone(),
            crossover: Crossover::of(caps),
            gemv: (0..2 * slots * gemv::TOKENS.len()).map(|_| OnceLock::new()).collect(),
            gemm: (0..slots * gemm::TOKENS.len()).map(|_| OnceLock::new()).collect(),
            matrices: None,
        }
    }

    /// As [`Linear::new`], on matrix units where the device has such that pass `gemm_coop`'s self-test: with memory
    /// for [`packed_bytes`](super::matrices::packed_bytes) of steps of `tokens` tokens and at most `columns` activations each.
    ///
    /// # Errors
    /// As [`Device::alloc`], and a lost device.
    pub fn on(device: &Device, tokens: u32, columns: u32) -> Result<Linear> {
        let linear = Linear::new(device.caps());
        if tokens < linear.crossover.gemm_from || !GemmCoop::works(device)? {
            return Ok(linear);
        }
        Ok(Linear { matrices: Some(Matrices::new(device, tokens, columns)?), ..linear })
    }

    /// Where `gemm` takes over, for `lamina info`.
    pub fn crossover(&self) -> &Crossover {
        &self.crossover
    }

    /// Whether products of so many tokens take a norm of their activations: it saves the dispatch of
    /// `rms_norm`, and costs the square of each activation again in every workgroup.
    pub fn folds_norm(&self, tokens: u32) -> bool {
        tokens <= gemv::NORM_TOKENS
    }

    /// Adds a product: a dispatch for each chunk of the matrix, and on matrix units one for the activations.
    ///
    /// # Panics
    /// When the activations do not fit the matrix, its rows the epilogue, or a norm the number of tokens.
    pub fn record(&self, recording: &mut Recording, epilogue: Epilogue, product: &Product) {
        let (format, tokens) = (product.weights.format, product.tokens);
        let of = format as usize * Epilogue::ALL.len() + epilogue as usize;
        let class = |classes: &[u32]| classes.iter().position(|c| tokens <= *c).unwrap_or(classes.len() - 1);
        let matrices = self.matrices.as_ref().filter(|matrices| matrices.fits(product));
        let tiles = gemm::tiles(product.weights.rows as u32, tokens);
        if tokens < self.crossover.gemm_from || (matrices.is_none() && tiles < self.crossover.tiles_from) {
            let class = class(&gemv::TOKENS);
            let norm = product.norm.is_some();
            let spec = gemv::Spec { format, epilogue, tokens: gemv::TOKENS[class], norm };
            let slot = 2 * (of * gemv::TOKENS.len() + class) + usize::from(norm);
            let made = self.gemv[slot].get_or_init(|| Gemv::chosen(&spec, &self.caps));
            made.record(recording, product);
        } else if let Some(matrices) = matrices {
            matrices.record(recording, epilogue, product, false, &self.caps);
        } else {
            let class = class(&gemm::TOKENS);
            let spec = gemm::Spec { format, epilogue, tokens: gemm::TOKENS[class] };
            let made = self.gemm[of * gemm::TOKENS.len() + class].get_or_init(|| Gemm::chosen(&spec, &self.caps));
            made.record(recording, product);
        }
    }

    /// Whether [`Linear::record_halves`] takes so many tokens and matrices of that format and so many columns.
    pub fn takes_halves(&self, format: WeightFormat, tokens: u32, columns: u32) -> bool {
        self.matrices.as_ref().is_some_and(|matrices| matrices.holds(format, tokens, columns))
    }

    /// Adds a product on matrix units whose outputs are f16, `[tokens, rows]` at `y`; what f16 does not hold becomes
    /// its largest number.
    ///
    /// # Panics
    /// When [`Linear::takes_halves`] says no, or a chunk's rows are no multiple of 4.
    pub fn record_halves(&self, recording: &mut Recording, product: &Product) {
        let matrices = self.matrices.as_ref().filter(|matrices| matrices.fits(product));
        let matrices = matrices.expect("the caller asked whether products run on matrix units");
        matrices.record(recording, Epilogue::Store, product, true, &self.caps);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::{Device, Options};
    use crate::kernels::weights::pack;

    #[test]
    fn few_tokens_go_to_gemv_and_many_to_gemm_and_shaders_are_made_once() {
        let device = Device::cpu(&Options::default());
        let values: Vec<f32> = (0..6 * 5).map(|v| v as f32).collect();
        let bytes = pack(&values, 6, 5, WeightFormat::F16);
        let weights = Weights::upload(&device, &bytes, (6, 5), WeightFormat::F16, 2, "w").unwrap();
        let x = Activations::rows(device.upload(&[1.0f32; 8 * 64], "x").unwrap().view(), 5);
        let y = Activations::rows(device.upload(&[f32::NAN; 8 * 64], "y").unwrap().view(), 6);
        let linear = Linear::new(device.caps());
        let mut recording = Recording::new();
        let from = linear.crossover().gemm_from;
        for tokens in [1, 3, 4, from - 1, from, 64, 64] {
            linear.record(&mut recording, Epilogue::Store, &Product::new(&weights, &x, &y, tokens));
        }
        let kernels: Vec<_> = recording.calls().iter().map(|call| call.shader.kernel).collect();
        assert_eq!(kernels, ["gemv", "gemv", "gemv", "gemv", "gemm", "gemm", "gemm"]);
        let shader = |i: usize| &recording.calls()[i].shader;
        assert!(Arc::ptr_eq(shader(1), shader(2)), "3 and 4 tokens are one class");
        assert!(Arc::ptr_eq(shader(5), shader(6)));
        assert!(!Arc::ptr_eq(shader(0), shader(1)), "one token has a shader of its own");
        device.submit(&recording).unwrap();
        let found = pollster::block_on(device.read(&[y.view])).unwrap();
        let row: Vec<f32> = bytemuck::pod_collect_to_vec(&found[0][63 * 32..][..24]);
        assert_eq!(row, [10.0, 35.0, 60.0, 85.0, 110.0, 135.0]);
    }
}
