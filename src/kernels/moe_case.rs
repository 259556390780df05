//! The parity cases of `moe_gemv` and `moe_gemm`: one product of a layer each.

use super::inputs::{Inputs, strided, words};
use super::linear::{Activations, Norm};
use super::linear_case::packed;
use super::moe::{Experts, Step};
use super::moe_sort::{self, Tile, draw_routes};
use super::pack_rows::Packed;
use super::weights::{BLOCK, WeightChunk, WeightFormat, Weights, pack};
use super::{Case, Check, Data, Job, Kernel, Tensor, Tensors, Tolerance};
use crate::gpu::{Recording, View};
use crate::reference;

/// Sizes of a case.
#[derive(Clone, Copy)]
pub struct Shape {
    /// Of an expert.
    pub rows: usize,
    pub columns: usize,
    pub tokens: usize,
    pub top_k: u32,
    /// Experts with weights.
    pub experts: u32,
    /// With those that have none.
    pub all: u32,
    pub format: WeightFormat,
    pub step: Step,
    /// Experts of each chunk but the last.
    pub chunk: u32,
    /// Down adds to what y holds.
    pub accumulate: bool,
    /// Pairs of a tile, where the pairs are sorted and each has a row of y.
    pub tile: Option<u32>,
    /// What goes up passes a norm first.
    pub norm: bool,
    /// The activations are there as f16, too.
    pub packed: bool,
}

/// What a case's kernel is given.
pub struct Given<'a> {
    tensors: &'a Tensors,
    pub experts: Experts<'a>,
    pub x: Activations,
    pub input: Activations,
    pub y: Activations,
    pub tokens: u32,
    pub top_k: u32,
}

impl Given<'_> {
    pub fn routes(&self) -> View {
        self.tensors.get("routes")
    }

    pub fn norm(&self) -> Norm {
        // An eps so large that a kernel without it is wrong.
        Norm { weight: self.tensors.get("norm"), eps: 0.1 }
    }

    pub fn order(&self) -> View {
        self.tensors.get("order")
    }

    pub fn tiles(&self) -> View {
        self.tensors.get("tiles")
    }

    pub fn packed(&self) -> Packed {
        Packed { values: self.tensors.get("packed"), scales: self.tensors.get("scales") }
    }
}

/// The names of a case's chunks.
const CHUNKS: [&str; 4] = ["weights 0", "weights 1", "weights 2", "weights 3"];
/// What stands in rows of y that must stay.
const KEPT: f32 = 7.5;

impl Shape {
    /// f16 in one chunk, up.
    pub fn new(rows: usize, columns: usize, tokens: usize, top_k: u32, experts: u32) -> Shape {
        let (format, step) = (WeightFormat::F16, Step::Up);
        let (all, chunk) = (experts, experts);
        Shape {
            rows,
            columns,
            tokens,
            top_k,
            experts,
            all,
            format,
            step,
            chunk,
            accumulate: false,
            tile: None,
            norm: false,
            packed: false,
        }
    }

    /// The sizes that both kernels are held to, at these numbers of tokens in turn.
    pub fn pairs(tokens: &[usize; 4]) -> Vec<Shape> {
        let [a, b, c, d] = *tokens;
        let more = |shape: Shape, all, chunk| Shape { all, chunk, ..shape };
        let sizes = [
            Shape::new(8, 1, a, 1, 1),
            Shape::new(66, 40, b, 6, 64),
            more(Shape::new(34, 33, c, 2, 7), 7, 2),
            more(Shape::new(20, 97, d, 12, 30), 46, 9),
            more(Shape::new(12, 31, b, 12, 512), 768, 200),
            Shape::new(70, 64, d, 3, 3),
            more(Shape::new(64, 1030, c, 4, 5), 5, 4),
        ];
        let mut shapes = Vec::new();
        for (i, shape) in sizes.into_iter().enumerate() {
            for (k, step) in [Step::Up, Step::Down].into_iter().enumerate() {
                // In down a row of any number, as odd ones.
                let rows = shape.rows - usize::from(step == Step::Down && i % 2 == 0);
                let format = WeightFormat::ALL[(i + 2 * k) % 3];
                shapes.push(Shape { rows, format, step, accumulate: i % 3 != 0, ..shape });
            }
        }
        shapes
    }

    /// With the pairs sorted into tiles.
    pub fn tiled(self, tile: u32) -> Shape {
        Shape { tile: Some(tile), ..self }
    }

    /// With packed activations, and f16 weights.
    pub fn packed(self) -> Shape {
        Shape { packed: true, format: WeightFormat::F16, ..self }
    }

    fn outputs(&self) -> usize {
        self.rows / self.step.epilogue().rows()
    }

    fn pair_count(&self) -> usize {
        self.tokens * self.top_k as usize
    }

    pub fn case<K: Kernel>(
        self,
        spec: K::Spec,
        record: impl Fn(&K, &mut Recording, &Given) + Send + Sync + Copy + 'static,
    ) -> Case<K> {
        let Shape { rows, columns, tokens, top_k, experts, all, format, step, chunk, accumulate, tile, norm, .. } =
            self;
        let added = accumulate && step == Step::Down && tile.is_none();
        let then = if added {
            ", added"
        } else if norm {
            ", behind a norm"
        } else {
            ""
        };
        let tiles = tile.map_or(String::new(), |tile| format!(", tiles of {tile}"));
        let name = format!(
            "{step:?} {rows} x {columns}, {tokens} tokens, {top_k} of {all} experts, {experts} with weights, \
             {format:?}, {} chunks{tiles}{then}",
            experts.div_ceil(chunk),
        );
        let flops = 2.0 * (rows * columns) as f64 * self.pair_count() as f64;
        let read = (experts as usize).min(self.pair_count()) * rows * format.row_bytes(columns);
        let moved = read + 4 * self.pair_count() * self.outputs() + 4 * tokens * columns;
        Case::new(name, spec, flops, move || self.job(record)).moving(moved as f64)
    }

    pub(super) fn job<K>(self, record: impl Fn(&K, &mut Recording, &Given) + Send + Sync + Copy + 'static) -> Job<K> {
        let Shape { rows, columns, tokens, top_k, experts, all, format, step, accumulate, tile, .. } = self;
        let (pairs, outputs) = (self.pair_count(), self.outputs());
        let mut inputs = Inputs::seed((rows * 31 + columns * 7 + tokens) as u64);
        let routes = draw_routes(&mut inputs, tokens, top_k as usize, all, tile.is_some());
        let without = |pair: usize| routes[pair].expert >= experts;

        let x_rows = if step == Step::Up { tokens } else { pairs };
        let x_stride = columns.next_multiple_of(4) + 4;
        let mut x = strided(&inputs.normals(x_rows * columns, 1.0), columns, x_stride);
        let y_stride = outputs.next_multiple_of(4) + 4;
        let summed = step == Step::Down && tile.is_none();
        let y_rows = if summed { tokens } else { pairs };
        let start =
            if summed && accumulate { inputs.normals(tokens * outputs, 1.0) } else { vec![f32::NAN; y_rows * outputs] };
        let mut y = strided(&start, outputs, y_stride);
        for pair in (0..pairs).filter(|pair| without(*pair)) {
            if step == Step::Down {
                x[pair * x_stride..(pair + 1) * x_stride].fill(f32::NAN);
            }
            if !summed {
                y[pair * y_stride..(pair + 1) * y_stride].fill(KEPT);
            }
        }
        let terms = columns * if summed { top_k as usize } else { 1 };
        let check = Check { stride: y_stride, first: 0, columns: outputs, tolerance: Tolerance::f32(terms) };
        let norm = Inputs::seed(5).normals(columns, 0.5).iter().map(|w| 1.0 + w).collect();
        let input = strided(&inputs.normals(tokens * outputs, 1.0), outputs, y_stride);
        let packed = self.packed.then(|| packed(&x, x_stride, columns));
        let mut tensors = vec![
            Tensor::input("routes", words(&routes)),
            Tensor::input("x", Data::F32(x)),
            Tensor::input("input", Data::F32(input)),
            Tensor::input("norm", Data::F32(norm)),
            Tensor::output("y", Data::F32(y), check),
        ];
        tensors.extend(packed.into_iter().flatten());
        if let Some(tile) = tile {
            tensors.extend(sorted(&routes.iter().map(|r| r.expert).collect::<Vec<_>>(), experts, tile));
        }
        let cut: Vec<usize> =
            (0..experts).step_by(self.chunk as usize).map(|e| self.chunk.min(experts - e) as usize).collect();
        let spread = (12.0 / columns as f32).sqrt(); // of uniform weights that give products a variance of 1
        for (name, experts) in CHUNKS.iter().zip(&cut) {
            // Large matrices are drawn for eight experts, and again the same for more.
            let drawn = if rows * columns > 1 << 20 { 8.min(*experts) } else { *experts };
            let values: Vec<f32> = (0..drawn * rows * columns).map(|_| (inputs.uniform() - 0.5) * spread).collect();
            let mut bytes = pack(&values, drawn * rows, columns, format);
            bytes = bytes.repeat(experts.div_ceil(drawn));
            bytes.truncate(experts * rows * format.row_bytes(columns));
            tensors.push(Tensor::input(name, Data::U8(bytes)));
        }
        Job::new(tensors, move |kernel: &K, t, recording| {
            let mut chunks: Vec<WeightChunk> = Vec::new();
            for (name, experts) in CHUNKS.iter().zip(&cut) {
                let first_row = chunks.iter().map(|chunk| chunk.rows).sum();
                chunks.push(WeightChunk { first_row, rows: experts * rows, view: t.get(name) });
            }
            let (all_rows, stride) = (rows * experts as usize, columns.next_multiple_of(BLOCK));
            let weights = Weights { format, rows: all_rows, columns, stride, chunks };
            let part = |name, stride: usize| Activations { view: t.get(name), stride: stride as u32, offset: 0 };
            let given = Given {
                tensors: t,
                experts: Experts { weights: &weights, count: experts },
                x: part("x", x_stride),
                input: part("input", y_stride),
                y: part("y", y_stride),
                tokens: tokens as u32,
                top_k,
            };
            record(kernel, recording, &given);
        })
    }
}

/// What `moe_sort` gives, by its twin.
fn sorted(chosen: &[u32], experts: u32, tile: u32) -> [Tensor; 2] {
    let (mut order, lists) = reference::moe_sort::sort(chosen, experts, tile as usize);
    order.resize(chosen.len(), u32::MAX);
    let tile_of = |(expert, first, count): (u32, usize, usize)| Tile {
        expert,
        first: first as u32,
        count: count as u32,
        unused: 0,
    };
    let mut tiles: Vec<Tile> = lists.into_iter().map(tile_of).collect();
    tiles.resize(moe_sort::Spec { experts, tile }.tiles(chosen.len() as u32) as usize, Tile::default());
    [Tensor::input("order", Data::U32(order)), Tensor::input("tiles", words(&tiles))]
}
