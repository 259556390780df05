//! The parity cases of `gemv` and `gemm`: one product each.

use half::f16;

use super::inputs::{Inputs, checks, placed};
use super::linear::{Activations, Epilogue, Norm, Product};
use super::pack_rows::Packed;
use super::weights::{BLOCK, WeightChunk, WeightFormat, Weights, pack};
use super::{Case, Data, Job, Kernel, Tensor, Tolerance};
use crate::gpu::Recording;
use crate::reference;
use crate::reference::gemm_coop::halves;

/// Sizes of a case. `x` and `y` are (stride, offset).
#[derive(Clone, Copy)]
pub struct Shape {
    pub rows: usize,
    pub columns: usize,
    pub tokens: usize,
    pub format: WeightFormat,
    pub epilogue: Epilogue,
    /// Rows of each chunk; one chunk where not said.
    pub chunks: Option<&'static [usize]>,
    pub x: (usize, usize),
    pub y: (usize, usize),
    /// The spec's hint.
    pub hint: u32,
    /// The activations go through a norm first.
    pub norm: bool,
    /// The activations are there as f16, too.
    pub packed: bool,
    /// Outputs are f16.
    pub halves: bool,
}

/// The names of a case's chunks.
const CHUNKS: [&str; 3] = ["weights 0", "weights 1", "weights 2"];

impl Shape {
    /// One chunk of f16, whole rows of activations.
    pub fn new(rows: usize, columns: usize, tokens: usize) -> Shape {
        let (format, epilogue) = (WeightFormat::F16, Epilogue::Store);
        let (x, y) = ((0, 0), (0, 0));
        Shape {
            rows,
            columns,
            tokens,
            format,
            epilogue,
            chunks: None,
            x,
            y,
            hint: tokens as u32,
            norm: false,
            packed: false,
            halves: false,
        }
    }

    /// With packed activations.
    pub fn packed(self) -> Shape {
        Shape { packed: true, ..self }
    }

    fn outputs(&self) -> usize {
        self.rows / self.epilogue.rows()
    }

    fn strides(&self) -> [(usize, usize); 2] {
        // Whole rows where no stride is said.
        let or_whole =
            |part: (usize, usize), length: usize| if part.0 == 0 { (length.next_multiple_of(4), 0) } else { part };
        [or_whole(self.x, self.columns), or_whole(self.y, self.outputs())]
    }

    pub fn case<K: Kernel>(
        self,
        spec: K::Spec,
        record: impl Fn(&K, &mut Recording, &Product) + Send + Sync + Copy + 'static,
    ) -> Case<K> {
        let Shape { rows, columns, tokens, format, epilogue, chunks, hint, norm, .. } = self;
        let [x, y] = self.strides();
        let name = format!(
            "{rows} x {columns}, {tokens} tokens (hint {hint}), {format:?}, {epilogue:?}, chunks {}, x {x:?}, y {y:?}, \
             norm {norm}",
            chunks.map_or("1".into(), |chunks| format!("{chunks:?}")),
        );
        let flops = 2.0 * rows as f64 * columns as f64 * tokens as f64;
        let moved = rows * format.row_bytes(columns) + 4 * tokens * (columns + self.outputs());
        Case::new(name, spec, flops, move || self.job(record)).moving(moved as f64)
    }

    pub(super) fn job<K>(self, record: impl Fn(&K, &mut Recording, &Product) + Send + Sync + Copy + 'static) -> Job<K> {
        let Shape { rows, columns, tokens, format, epilogue, norm, .. } = self;
        let [x, y] = self.strides();
        let outputs = self.outputs();
        let mut inputs = Inputs::seed((rows * 31 + columns * 7 + tokens) as u64);
        let xs = placed(&inputs.normals(tokens * columns, 1.0), columns, x);
        let before = match epilogue {
            Epilogue::Add => inputs.normals(tokens * outputs, 1.0),
            _ => vec![f32::NAN; tokens * outputs],
        };
        let ys = placed(&before, outputs, y);
        let weight: Vec<f32> = Inputs::seed(5).normals(columns, 0.5).iter().map(|w| 1.0 + w).collect();
        let mut tensors = vec![
            Tensor::input("x", Data::F32(xs.clone())),
            Tensor::input("norm", Data::F32(weight)),
            match self.halves {
                true => Tensor::checked("y", Data::F16(halves(&ys)), checks(outputs, y, Tolerance::f16())),
                false => Tensor::checked("y", Data::F32(ys), checks(outputs, y, Tolerance::f32(columns))),
            },
        ];
        if self.packed {
            let from: Vec<f32> = xs.chunks_exact(x.0).flat_map(|row| row[x.1..x.1 + columns].to_vec()).collect();
            tensors.extend(packed(&from, columns, columns));
        }
        let cut: Vec<usize> = self.chunks.map_or(vec![rows], <[usize]>::to_vec);
        assert_eq!(cut.iter().sum::<usize>(), rows, "the chunks hold all rows");
        let spread = (12.0 / columns as f32).sqrt(); // of uniform weights that give products a variance of 1
        for (name, rows) in CHUNKS.iter().zip(&cut) {
            let values: Vec<f32> = (0..rows * columns).map(|_| (inputs.uniform() - 0.5) * spread).collect();
            tensors.push(Tensor::input(name, Data::U8(pack(&values, *rows, columns, format))));
        }
        Job::new(tensors, move |kernel: &K, t, recording| {
            let mut chunks: Vec<WeightChunk> = Vec::new();
            for (name, rows) in CHUNKS.iter().zip(&cut) {
                let first_row = chunks.iter().map(|chunk| chunk.rows).sum();
                chunks.push(WeightChunk { first_row, rows: *rows, view: t.get(name) });
            }
            let weights = Weights { format, rows, columns, stride: columns.next_multiple_of(BLOCK), chunks };
            let part = |name, (stride, offset)| Activations {
                view: t.get(name),
                stride: stride as u32,
                offset: offset as u32,
            };
            let (x, y) = (part("x", x), part("y", y));
            // So large that a kernel without it is wrong.
            let given = Norm { weight: t.get("norm"), eps: 0.1 };
            let packed = self.packed.then(|| Packed { values: t.get("packed"), scales: t.get("scales") });
            let product = Product::new(&weights, &x, &y, tokens as u32);
            let product = Product { norm: norm.then_some(&given), packed: packed.as_ref(), scale: 0.7, ..product };
            record(kernel, recording, &product);
        })
    }
}

/// Rows of `stride` elements of which `columns` count as `pack_rows` gives them: "packed" and "scales".
pub(super) fn packed(x: &[f32], stride: usize, columns: usize) -> [Tensor; 2] {
    let (mut values, mut scales) = (Vec::new(), Vec::new());
    for row in x.chunks_exact(stride) {
        let (mut packed, scale) = reference::pack_rows::pack(&row[..columns]);
        packed.resize(columns.next_multiple_of(BLOCK), f16::ZERO);
        values.extend(packed);
        scales.push(scale);
    }
    [Tensor::input("packed", Data::F16(values)), Tensor::input("scales", Data::F32(scales))]
}
