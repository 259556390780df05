//! `embed`: the tokens' rows of the embedding table, times a factor (MiniCPM3's `scale_emb`).

use std::sync::Arc;

use super::inputs::Inputs;
use super::weights::{WeightFormat, pack};
use super::{Case, Check, Choice, Data, Field, Job, Kernel, Set, Tensor, Tolerance, Variant};
use crate::gpu::{Caps, Host, Recording, Shader, Source, View, grid_1d};
use crate::{reference, wgsl};

params! {
    /// Sizes of a call for one chunk of the table.
    pub struct Params {
        /// Rows of `y`.
        pub tokens: u32,
        /// Elements of a row (the hidden size), any number.
        pub length: u32,
        /// From one row of the table to the next, in its elements; a multiple of 4.
        pub table_stride: u32,
        /// From one row of `y` to the next; a multiple of 4.
        pub y_stride: u32,
        /// Ids in the whole table.
        pub vocabulary: u32,
        /// The chunk's first id.
        pub first: u32,
        /// Ids in the chunk.
        pub count: u32,
        /// Factor of every value.
        pub scale: f32,
    }
}

/// What the model fixes.
#[derive(Clone, Debug, PartialEq)]
pub struct Spec {
    /// The table's element type.
    pub format: WeightFormat,
}

/// How it runs.
#[derive(Clone, Debug)]
pub struct Tuning {
    /// Invocations a workgroup.
    pub workgroup: u32,
}

/// Sizes of a table and of what is made of it.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    /// Rows of `y`.
    pub tokens: u32,
    /// The hidden size.
    pub length: u32,
    /// From one row of the table to the next, in its elements; a multiple of 4.
    pub table_stride: u32,
    /// From one row of `y` to the next; a multiple of 4.
    pub y_stride: u32,
    /// Factor of every value.
    pub scale: f32,
}

/// The kernel `embed`.
pub struct Embed {
    spec: Spec,
    tuning: Tuning,
    shader: Arc<Shader>,
}

impl Kernel for Embed {
    const NAME: &'static str = "embed";
    const SOURCE: Source = wgsl!("embed");
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

    fn new(spec: &Spec, tuning: &Tuning) -> Embed {
        let shader = Shader::of(Self::SOURCE).u32("WORKGROUP", tuning.workgroup).module(spec.format.unpack4()).build();
        Embed { spec: spec.clone(), tuning: tuning.clone(), shader }
    }

    fn shader(&self) -> &Arc<Shader> {
        &self.shader
    }

    fn cases(set: Set) -> Vec<Case<Embed>> {
        let all = |shape: Shape| WeightFormat::ALL.map(|format| shape.case(format));
        let shape = |tokens, length, chunks| Shape { tokens, length, chunks, scale: 1.0 };
        if set == Set::Timed {
            return [1, 512].into_iter().flat_map(|tokens| all(shape(tokens, 7168, &[4096]))).collect();
        }
        let shapes = [
            shape(1, 1, &[1]),
            shape(9, 3, &[7]),
            shape(5, 64, &[33]),
            shape(17, 63, &[10, 1, 22]),
            Shape { scale: 12.0, ..shape(4, 2560, &[20, 21]) },
            Shape { scale: 0.5, ..shape(33, 1030, &[5, 60, 3]) },
            shape(300, 7168, &[100, 29]),
        ];
        shapes.into_iter().flat_map(all).collect()
    }
}

impl Embed {
    /// Writes the tokens' embeddings, zeros for ids outside the table. `tokens`: `[tokens]` u32;
    /// `table`: chunks of whole rows in order, each with its number of ids, `[ids, table_stride]` in
    /// the spec's format; `y`: `[tokens, y_stride]` f32. A dispatch for each chunk.
    ///
    /// # Panics
    /// When a stride is no multiple of 4 or shorter than a row, or a chunk smaller than its rows.
    pub fn record(&self, recording: &mut Recording, sizes: Sizes, tokens: View, table: &[(u32, View)], y: View) {
        let Sizes { tokens: count_tokens, length, table_stride, y_stride, scale } = sizes;
        for stride in [table_stride, y_stride] {
            assert!(stride.is_multiple_of(4) && stride >= length, "embed: a stride does not fit: {sizes:?}");
        }
        let format = self.spec.format;
        let row_bytes = table_stride as usize * format.bytes();
        let vocabulary = table.iter().map(|(count, _)| count).sum();
        let groups = (count_tokens * length.div_ceil(4)).div_ceil(self.tuning.workgroup);
        let mut first = 0;
        for (count, chunk) in table {
            let (count, size) = (*count, chunk.size());
            assert!(size >= u64::from(count) * row_bytes as u64, "embed: a chunk of {count} ids has {size} bytes");
            let params =
                Params { tokens: count_tokens, length, table_stride, y_stride, vocabulary, first, count, scale };
            let twin = move |host: &Host| {
                let table = host.get::<u8>("table");
                for (token, id) in host.get::<u32>("tokens")[..params.tokens as usize].iter().enumerate() {
                    let row = match id.checked_sub(params.first) {
                        Some(at) if at < count => Some(format.decode(&table[at as usize * row_bytes..][..row_bytes])),
                        _ => None,
                    };
                    if row.is_some() || (*id >= vocabulary && params.first == 0) {
                        let embedded = reference::embed::embed(row.as_deref(), length as usize, scale);
                        host.set("y", token * y_stride as usize, &embedded);
                    }
                }
            };
            let bindings = vec![("tokens", tokens.clone()), ("table", chunk.clone()), ("y", y.clone())];
            recording.call(&self.shader, bindings, bytemuck::bytes_of(&params), grid_1d(groups), twin);
            first += count;
        }
    }
}

/// Sizes of a case; `chunks` are the numbers of ids.
#[derive(Clone, Copy)]
struct Shape {
    tokens: usize,
    length: usize,
    chunks: &'static [usize],
    scale: f32,
}

/// The names of a case's chunks.
const CHUNKS: [&str; 3] = ["table 0", "table 1", "table 2"];

impl Shape {
    fn case(self, format: WeightFormat) -> Case<Embed> {
        let Shape { tokens, length, chunks, scale } = self;
        let name = format!("{tokens} tokens of {length}, {format:?}, chunks {chunks:?}, scale {scale}");
        let elements = (tokens * length) as f64;
        let moved = (4.0 + format.bytes() as f64) * elements;
        Case::new(name, Spec { format }, elements, move || self.job(format)).moving(moved)
    }

    fn job(self, format: WeightFormat) -> Job<Embed> {
        let Shape { tokens, length, chunks, scale } = self;
        let mut inputs = Inputs::seed((tokens * length) as u64);
        let vocabulary = chunks.iter().sum::<usize>() as u32;
        // The borders of the vocabulary first, then any id; several tokens share one.
        let borders = [vocabulary - 1, vocabulary, 0, u32::MAX, chunks[0] as u32 - 1, chunks[0] as u32];
        let ids = (0..tokens).map(|t| borders.get(t).copied().unwrap_or_else(|| inputs.below(vocabulary))).collect();
        let (table_stride, y_stride) = (length.next_multiple_of(32), length.next_multiple_of(4));
        let check = Check { stride: y_stride, first: 0, columns: length, tolerance: Tolerance::f32(1) };
        let mut tensors = vec![
            Tensor::input("tokens", Data::U32(ids)),
            Tensor::output("y", Data::poison(tokens * y_stride), check),
        ];
        for (name, ids) in CHUNKS.into_iter().zip(chunks) {
            let values = inputs.normals(ids * length, 1.0);
            let data = Data::U8(pack(&values, *ids, length, format));
            tensors.push(Tensor::input(name, data));
        }
        let sizes = Sizes {
            tokens: tokens as u32,
            length: length as u32,
            table_stride: table_stride as u32,
            y_stride: y_stride as u32,
            scale,
        };
        Job::new(tensors, move |kernel: &Embed, t, recording| {
            let chunk = |(name, ids): (&str, &usize)| (*ids as u32, t.get(name));
            let table: Vec<_> = CHUNKS.into_iter().zip(chunks).map(chunk).collect();
            kernel.record(recording, sizes, t.get("tokens"), &table, t.get("y"));
        })
    }
}
