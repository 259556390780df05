//! `gqa_append`: what `gqa_decode` needs of a step's projections: queries turned to their positions (RoPE, Su et al.
//! 2021, arXiv:2104.09864) and scaled for a softmax in base 2, keys turned, keys and values in their pages. The
//! counterpart of `mla_absorb` and `mla_append`, in one dispatch.

use std::sync::Arc;

use half::f16;

use super::batch::page_bits;
use super::inputs::{Inputs, strided, words};
use super::{CacheChunk, Case, Check, Choice, Data, Field, Job, Kernel, Row, Sequence, Set, Tensor, Tolerance, Variant};
use crate::gpu::{Caps, Grid, Host, Recording, Shader, Source, View};
use crate::num::rope::Frequencies;
use crate::{reference, wgsl};

params! {
    /// Sizes of a call for one chunk of the cache.
    pub struct Params {
        /// Query heads.
        pub heads: u32,
        /// Heads of keys and values.
        pub groups: u32,
        /// Elements from one row of `qkv` to the next.
        pub stride: u32,
        /// The bound cache chunk's first page.
        pub first_page: u32,
        /// Pages of the bound chunk.
        pub pages: u32,
        /// A page has `1 << page_bits` tokens.
        pub page_bits: u32,
        /// Factor of the queries: softmax scale times log2(e).
        pub scale: f32,
    }
}

/// What the model fixes.
#[derive(Clone, Debug, PartialEq)]
pub struct Spec {
    /// Width of a head, a multiple of 8.
    pub width: u32,
}

/// There is nothing to choose.
#[derive(Clone, Debug)]
pub struct Tuning;

const WORKGROUP: u32 = 64;

/// What a call reads and writes.
pub struct Args<'a> {
    /// `[sequences]` [`Sequence`].
    pub batch: View,
    /// `[count]` [`Row`].
    pub rows: View,
    /// Page numbers, u32.
    pub block_table: View,
    /// `[count, stride]` f32: the heads' queries, then the groups' keys, then their values.
    pub qkv: View,
    /// `[256 + blocks, width / 2]` (cos, sin) f32.
    pub rope_table: View,
    /// The layer's keys and values, as `gqa_decode` reads them, written.
    pub cache: &'a [CacheChunk],
    /// `[count * heads, width]` f32, written.
    pub queries: View,
    /// Rows of the step.
    pub count: u32,
    /// Query heads.
    pub heads: u32,
    /// Heads of keys and values.
    pub groups: u32,
    /// Elements from one row of `qkv` to the next.
    pub stride: u32,
    /// Tokens a page.
    pub page: u32,
    /// Softmax scale.
    pub scale: f32,
}

/// The kernel `gqa_append`.
pub struct GqaAppend {
    spec: Spec,
    shader: Arc<Shader>,
}

impl Kernel for GqaAppend {
    const NAME: &'static str = "gqa_append";
    const SOURCE: Source = wgsl!("gqa_append");
    const PARAMS: &'static [Field] = Params::FIELDS;
    type Spec = Spec;
    type Tuning = Tuning;

    fn variants(_: &Spec, _: &Caps) -> Vec<Variant<Tuning>> {
        vec![Variant { name: "portable", tuning: Tuning }]
    }

    fn tuning(spec: &Spec, caps: &Caps) -> Choice<Tuning> {
        Choice { variant: Self::variants(spec, caps).remove(0), why: "there is one".into() }
    }

    fn new(spec: &Spec, _: &Tuning) -> GqaAppend {
        assert!(spec.width > 0 && spec.width.is_multiple_of(8), "gqa_append: heads of {}, no multiple of 8", spec.width);
        let shader = Shader::of(Self::SOURCE).u32("D", spec.width).u32("WORKGROUP", WORKGROUP);
        let shader = shader.module(wgsl!("lib/batch")).module(wgsl!("lib/rope_table")).module(wgsl!("lib/rope_half"));
        let shader = shader.build();
        GqaAppend { spec: spec.clone(), shader }
    }

    fn shader(&self) -> &Arc<Shader> {
        &self.shader
    }

    fn cases(set: Set) -> Vec<Case<GqaAppend>> {
        let shape = |(heads, groups, width), page, sequences: &[(u32, u32)], chunks| Shape {
            heads,
            groups,
            width,
            page,
            sequences: sequences.to_vec(),
            chunks,
        };
        if set == Set::Timed {
            return vec![shape((32, 8, 128), 64, &[(4095, 1)], 1).case()];
        }
        [
            shape((32, 8, 128), 64, &[(4095, 1)], 1),
            shape((32, 32, 128), 16, &[(15, 3)], 2),
            shape((5, 1, 32), 16, &[(15, 38)], 3),
            shape((6, 3, 64), 64, &[(0, 3), (128, 1), (5, 0), (61, 9)], 2),
            shape((1, 1, 8), 64, &[(0, 1)], 1),
            shape((9, 3, 24), 32, &[(0, 1), (255, 2), (300, 4)], 3),
            shape((16, 2, 256), 128, &[(127, 2)], 1),
            shape((3, 3, 16), 16, &[(70_001, 1)], 1),
        ]
        .map(Shape::case)
        .into()
    }
}

impl GqaAppend {
    /// Writes queries, keys and values of a step's rows: a dispatch for each chunk of the cache.
    ///
    /// # Panics
    /// When a row does not hold all heads, or a page has no power of two of tokens.
    pub fn record(&self, recording: &mut Recording, args: &Args) {
        let slots = args.heads + 2 * args.groups;
        assert!(slots * self.spec.width <= args.stride, "gqa_append: {slots} heads leave the stride {}", args.stride);
        for chunk in args.cache {
            let params = Params {
                heads: args.heads,
                groups: args.groups,
                stride: args.stride,
                first_page: chunk.first_page,
                pages: chunk.pages,
                page_bits: page_bits(args.page),
                scale: args.scale * std::f32::consts::LOG2_E,
            };
            let bindings = vec![
                ("batch", args.batch.clone()),
                ("rows", args.rows.clone()),
                ("block_table", args.block_table.clone()),
                ("qkv", args.qkv.clone()),
                ("rope_table", args.rope_table.clone()),
                ("cache", chunk.view.clone()),
                ("queries", args.queries.clone()),
            ];
            let (width, count) = (self.spec.width as usize, args.count as usize);
            let grid = Grid::Direct([(slots * self.spec.width / 4).div_ceil(WORKGROUP), args.count, 1]);
            let twin = move |host: &Host| twin(width, params, count, host);
            recording.call(&self.shader, bindings, bytemuck::bytes_of(&params), grid, twin);
        }
    }
}

fn twin(width: usize, params: Params, count: usize, host: &Host) {
    let (batch, table) = (host.get::<Sequence>("batch"), host.get::<u32>("block_table"));
    let (qkv, turns) = (host.get::<f32>("qkv"), host.get("rope_table"));
    let (heads, groups) = (params.heads as usize, params.groups as usize);
    for (i, row) in host.get::<Row>("rows")[..count].iter().enumerate() {
        let slot = |slot: usize| &qkv[i * params.stride as usize + slot * width..][..width];
        let turned = |at: usize, scale| reference::gqa_append::turned(slot(at), row.position, &turns, scale);
        for head in 0..heads {
            host.set("queries", (i * heads + head) * width, &turned(head, params.scale));
        }
        let page = table[(batch[row.sequence as usize].pages + (row.position >> params.page_bits)) as usize];
        if !(params.first_page..params.first_page + params.pages).contains(&page) {
            continue;
        }
        let record = ((page - params.first_page) << params.page_bits) + row.position % (1 << params.page_bits);
        for group in 0..groups {
            let both = [turned(heads + group, 1.0), slot(heads + groups + group).to_vec()].concat();
            let both: Vec<f16> = both.into_iter().map(f16::from_f32).collect();
            host.set("cache", (record as usize * groups + group) * 2 * width, &both);
        }
    }
}

/// A case. Sequences are (position, new tokens).
#[derive(Clone)]
struct Shape {
    heads: u32,
    groups: u32,
    width: u32,
    page: u32,
    sequences: Vec<(u32, u32)>,
    chunks: u32,
}

/// The tensors of the cache's chunks.
const CHUNKS: [&str; 3] = ["cache 0", "cache 1", "cache 2"];
/// What slots hold that no token was written to: no sum makes it.
const UNTOUCHED: f32 = -65504.0;

impl Shape {
    fn case(self) -> Case<GqaAppend> {
        let Shape { heads, groups, width, page, sequences, chunks } = &self;
        let name = format!(
            "{heads} heads of {width} in {groups} groups, page {page}, (position, tokens) {sequences:?}, {chunks} chunks"
        );
        let values = f64::from(width * sequences.iter().map(|(_, tokens)| tokens).sum::<u32>());
        let moved = values * f64::from(8 * heads + 12 * groups);
        let flops = values * f64::from(4 * heads + 3 * groups);
        Case::new(name, Spec { width: *width }, flops, move || self.job()).moving(moved)
    }

    fn job(&self) -> Job<GqaAppend> {
        let (heads, width) = (self.heads as usize, self.width as usize);
        let mut inputs = Inputs::seed(u64::from(self.page * 1000 + self.heads + self.width + self.chunks));
        let (mut batch, mut table, mut first_row) = (Vec::new(), Vec::new(), 0);
        // Only the pages that new tokens stand on are memory; the others are never looked at.
        let span = |(position, tokens): &(u32, u32)| (position / self.page, (position + tokens).div_ceil(self.page));
        let used = |s: &(u32, u32)| if s.1 == 0 { 0 } else { span(s).1 - span(s).0 };
        let chunk_pages = (self.sequences.iter().map(used).sum::<u32>() + 2).div_ceil(self.chunks);
        let mut free: Vec<u32> = (0..chunk_pages * self.chunks).collect();
        inputs.shuffle(&mut free);
        for sequence in &self.sequences {
            let (position, tokens) = *sequence;
            batch.push(Sequence { position, tokens, first_row, pages: table.len() as u32, ..Sequence::default() });
            first_row += tokens;
            let own = |i| tokens > 0 && i >= span(sequence).0;
            let page = |i| if own(i) { free.pop().expect("enough pages") } else { 0xFFFF_FFF0 };
            table.extend((0..span(sequence).1).map(page));
        }
        let rows = Sequence::rows(&batch);
        let last = rows.iter().map(|row| row.position).max().expect("a case has rows");
        let wide = heads * width + 2 * (self.groups * self.width) as usize;
        let stride = wide.next_multiple_of(4) + 4;
        let record = 2 * (self.groups * self.width) as usize;
        // Room behind a chunk's pages for those of the others: what goes to the wrong chunk shows.
        let values = (chunk_pages * self.chunks * self.page) as usize * record;
        let check = Check::rows(width, Tolerance::f32(16));
        let mut tensors = vec![
            Tensor::input("batch", words(&batch)),
            Tensor::input("rows", words(&rows)),
            Tensor::input("block_table", Data::U32(table)),
            Tensor::input("qkv", Data::F32(strided(&inputs.normals(rows.len() * wide, 2.0), wide, stride))),
            Tensor::input("rope_table", words(&Frequencies::plain(self.width, 1e4).table(last + 1))),
            Tensor::output("queries", Data::poison(rows.len() * heads * width), check),
        ];
        let untouched = || Data::F16(vec![f16::from_f32(UNTOUCHED); values]);
        let cache = |name: &&'static str| Tensor::output(name, untouched(), Check::rows(width, Tolerance::f16()));
        tensors.extend(CHUNKS[..self.chunks as usize].iter().map(cache));
        let case = self.clone();
        Job::new(tensors, move |kernel: &GqaAppend, t, recording| {
            let chunk = |(i, name): (usize, &&'static str)| CacheChunk {
                first_page: i as u32 * chunk_pages,
                pages: chunk_pages,
                view: t.get(name),
            };
            let cache: Vec<CacheChunk> = CHUNKS[..case.chunks as usize].iter().enumerate().map(chunk).collect();
            let args = Args {
                batch: t.get("batch"),
                rows: t.get("rows"),
                block_table: t.get("block_table"),
                qkv: t.get("qkv"),
                rope_table: t.get("rope_table"),
                cache: &cache,
                queries: t.get("queries"),
                count: rows.len() as u32,
                heads: case.heads,
                groups: case.groups,
                stride: stride as u32,
                page: case.page,
                scale: 1.0 / (case.width as f32).sqrt(),
            };
            kernel.record(recording, &args);
        })
    }
}
