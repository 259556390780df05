//! `mla_append`: what a token leaves in the latent cache. The latent is normalised, the rope key
//! turned to its position, and both written as one record to the token's page.

use std::sync::Arc;

use super::inputs::{Inputs, strided, words};
use super::{
    CacheChunk, Case, Check, Choice, Data, Field, Job, Kernel, Row, Sequence, Set, Tensor, Tolerance, Variant,
};
use crate::gpu::{Caps, Host, Recording, Shader, Source, View, grid_1d};
use crate::num::record::RecordFormat;
use crate::num::rope::{Frequencies, RopeLayout};
use crate::reference::mla_append::Token;
use crate::wgsl;

params! {
    /// Sizes of a call.
    pub struct Params {
        /// Rows of the step.
        pub rows: u32,
        /// Elements from one row of `kv` to the next, a multiple of 4.
        pub kv_stride: u32,
        /// Where the latent starts in a row of `kv`, a multiple of 4.
        pub kv_offset: u32,
        /// The bound cache chunk's first page.
        pub first_page: u32,
        /// Pages of the bound chunk.
        pub pages: u32,
        /// Added to the mean square.
        pub eps: f32,
        /// Factor of the latent after its norm: 1 in most models.
        pub scale: f32,
    }
}

/// What the model and the cache fix.
#[derive(Clone, Debug, PartialEq)]
pub struct Spec {
    /// Width of the latent (`kv_lora_rank`), a multiple of 16.
    pub latent: u32,
    /// Width of the rope key (`qk_rope_head_dim`), even, 0 for none.
    pub rope: u32,
    /// Tokens a page.
    pub page: u32,
    /// How a record is stored.
    pub format: RecordFormat,
    /// Which elements of the rope key turn together.
    pub layout: RopeLayout,
}

impl Spec {
    /// Values of a record: latent and rope key, rounded up to 8.
    pub fn width(&self) -> u32 {
        (self.latent + self.rope).next_multiple_of(8)
    }

    /// Bytes of a record.
    pub fn bytes(&self) -> usize {
        self.format.bytes(self.latent as usize, self.rope as usize)
    }
}

/// How it runs.
#[derive(Clone, Debug)]
pub struct Tuning {
    /// Invocations a workgroup, a multiple of 16.
    pub workgroup: u32,
    /// Sums within subgroups first.
    pub subgroups: bool,
}

/// What a call reads and writes.
pub struct Args<'a> {
    /// `[sequences]` [`Sequence`].
    pub batch: View,
    /// `[count]` [`Row`].
    pub rows: View,
    /// Page numbers, u32.
    pub block_table: View,
    /// `[count, kv_stride]` f32: at `kv_offset` of a row the latent, then the rope key.
    pub kv: View,
    /// `[latent]` f32, the norm's weight.
    pub weight: View,
    /// `[256 + blocks, rope / 2]` (cos, sin) f32; any buffer where rope is 0.
    pub rope_table: View,
    /// The layer's latent cache, written.
    pub cache: &'a [CacheChunk],
    /// Rows of the step.
    pub count: u32,
    /// Elements from one row of `kv` to the next, a multiple of 4.
    pub kv_stride: u32,
    /// Where the latent starts in a row of `kv`, a multiple of 4.
    pub kv_offset: u32,
    /// Added to the mean square.
    pub eps: f32,
    /// Factor of the latent after its norm: 1 in most models.
    pub scale: f32,
}

/// The kernel `mla_append`.
pub struct MlaAppend {
    spec: Spec,
    shader: Arc<Shader>,
}

impl Kernel for MlaAppend {
    const NAME: &'static str = "mla_append";
    const SOURCE: Source = wgsl!("mla_append");
    const PARAMS: &'static [Field] = Params::FIELDS;
    type Spec = Spec;
    type Tuning = Tuning;

    fn class(spec: &Spec) -> String {
        format!("records of {:?}", spec.format)
    }

    fn variants(_: &Spec, caps: &Caps) -> Vec<Variant<Tuning>> {
        let workgroup = caps.invocations.min(128);
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

    fn new(spec: &Spec, tuning: &Tuning) -> MlaAppend {
        assert!(spec.latent > 0 && spec.latent.is_multiple_of(16), "mla_append: latent width {}", spec.latent);
        assert!(spec.rope.is_multiple_of(2), "mla_append: rope width {} is odd", spec.rope);
        let shader = Shader::of(Self::SOURCE)
            .u32("R", spec.latent)
            .u32("P", spec.rope)
            .u32("W", spec.width())
            .u32("PAGE", spec.page)
            .u32("WORKGROUP", tuning.workgroup)
            .module(wgsl!("lib/batch"))
            .module(wgsl!("lib/rope_table"))
            .module(rope_module(spec.layout));
        let shader = match spec.format {
            RecordFormat::F16 => shader.module(wgsl!("lib/pack_f16")).module(wgsl!("lib/append_f16")),
            RecordFormat::F32 => shader.module(wgsl!("lib/append_f32")),
            RecordFormat::Fp8 => shader.module(wgsl!("lib/pack_f16")).module(wgsl!("lib/append_fp8")),
        };
        let shader = match tuning.subgroups {
            true => shader.module(wgsl!("lib/reduce_subgroup")).subgroups().build(),
            false => shader.module(wgsl!("lib/reduce_shared")).build(),
        };
        MlaAppend { spec: spec.clone(), shader }
    }

    fn shader(&self) -> &Arc<Shader> {
        &self.shader
    }

    fn cases(set: Set) -> Vec<Case<MlaAppend>> {
        if set == Set::Timed {
            let timed = |(format, position, tokens)| Shape {
                shape: (512, 64),
                page: 64,
                format,
                layout: RopeLayout::Interleaved,
                sequences: vec![(position, tokens)],
                chunks: 1,
                offset: 0,
                scale: 1.0,
            };
            let formats = [RecordFormat::F16, RecordFormat::Fp8];
            let both = formats.map(|format| [(format, 4095, 1), (format, 0, 512)]);
            return both.into_iter().flatten().map(|s| timed(s).case()).collect();
        }
        let shapes = [(512, 64), (32, 8), (48, 16), (512, 0), (256, 32), (144, 6), (16, 2), (768, 64)];
        let pages = [64, 16, 128, 32];
        let batches: [&[(u32, u32)]; 4] = [
            // From inside a page over two borders.
            &[(15, 38)],
            // A new sequence, one token at a page's first slot, one that sits out, a few near the end.
            &[(0, 3), (128, 1), (5, 0), (61, 9)],
            &[(70_001, 1)],
            &[(0, 1), (255, 2), (300, 4)],
        ];
        let layouts = [RopeLayout::Interleaved, RopeLayout::Half];
        let mut cases = Vec::new();
        for (i, format) in RecordFormat::ALL.into_iter().cycle().take(3 * shapes.len()).enumerate() {
            let turn = i / 3 + i;
            let shape = Shape {
                shape: shapes[i % shapes.len()],
                page: pages[turn % pages.len()],
                format,
                layout: layouts[turn / 3 % 2],
                sequences: batches[(turn / 2) % batches.len()].to_vec(),
                chunks: [1, 3][(i / 2) % 2],
                offset: [0, 12][i % 2],
                scale: [1.0, 3.4641016][(i / 4) % 2],
            };
            cases.push(shape.case());
        }
        cases
    }
}

/// The module that says which elements turn together.
pub(super) fn rope_module(layout: RopeLayout) -> Source {
    match layout {
        RopeLayout::Interleaved => wgsl!("lib/rope_interleaved"),
        RopeLayout::Half => wgsl!("lib/rope_half"),
    }
}

impl MlaAppend {
    /// Writes the records of a step's rows: a dispatch for each chunk of the cache.
    ///
    /// # Panics
    /// When a stride or offset is no multiple of 4, or a row does not hold latent and rope key.
    pub fn record(&self, recording: &mut Recording, args: &Args) {
        let (stride, offset) = (args.kv_stride, args.kv_offset);
        let aligned = stride.is_multiple_of(4) && offset.is_multiple_of(4);
        assert!(aligned, "mla_append: kv stride {stride} and offset {offset} must be multiples of 4");
        let wide = self.spec.latent + self.spec.rope;
        assert!(offset + wide <= stride, "mla_append: {wide} values from {offset} on leave the stride {stride}");
        for chunk in args.cache {
            let params = Params {
                rows: args.count,
                kv_stride: stride,
                kv_offset: offset,
                first_page: chunk.first_page,
                pages: chunk.pages,
                eps: args.eps,
                scale: args.scale,
            };
            let bindings = vec![
                ("batch", args.batch.clone()),
                ("rows", args.rows.clone()),
                ("block_table", args.block_table.clone()),
                ("kv", args.kv.clone()),
                ("weight", args.weight.clone()),
                ("rope_table", args.rope_table.clone()),
                ("cache", chunk.view.clone()),
            ];
            let spec = self.spec.clone();
            let twin = move |host: &Host| twin(&spec, params, host);
            recording.call(&self.shader, bindings, bytemuck::bytes_of(&params), grid_1d(args.count), twin);
        }
    }
}

fn twin(spec: &Spec, params: Params, host: &Host) {
    let (batch, table) = (host.get::<Sequence>("batch"), host.get::<u32>("block_table"));
    let (kv, weight, turns) = (host.get::<f32>("kv"), host.get::<f32>("weight"), host.get("rope_table"));
    let (latent, rope) = (spec.latent as usize, spec.rope as usize);
    for (i, row) in host.get::<Row>("rows")[..params.rows as usize].iter().enumerate() {
        let page = table[(batch[row.sequence as usize].pages + row.position / spec.page) as usize];
        if !(params.first_page..params.first_page + params.pages).contains(&page) {
            continue;
        }
        let kv = &kv[i * params.kv_stride as usize + params.kv_offset as usize..][..latent + rope];
        let token = Token {
            latent: &kv[..latent],
            rope: &kv[latent..],
            position: row.position,
            weight: &weight[..latent],
            eps: params.eps,
            scale: params.scale,
            table: &turns,
            layout: spec.layout,
        };
        let (c_kv, k_pe) = token.values();
        let record = spec.format.encode(&c_kv, &k_pe);
        let slot = (page - params.first_page) * spec.page + row.position % spec.page;
        host.set("cache", slot as usize * record.len(), &record);
    }
}

/// A case. Sequences are (position, new tokens).
#[derive(Clone)]
struct Shape {
    shape: (u32, u32),
    page: u32,
    format: RecordFormat,
    layout: RopeLayout,
    sequences: Vec<(u32, u32)>,
    chunks: u32,
    offset: u32,
    scale: f32,
}

/// The tensors of the cache's chunks.
const CHUNKS: [&str; 3] = ["cache 0", "cache 1", "cache 2"];
const EPS: f32 = 1e-6;
/// What slots hold that no token was written to: no sum makes it.
const UNTOUCHED: f32 = -65504.0;

impl Shape {
    fn spec(&self) -> Spec {
        let (latent, rope) = self.shape;
        Spec { latent, rope, page: self.page, format: self.format, layout: self.layout }
    }

    fn case(self) -> Case<MlaAppend> {
        let Shape { shape: (r, p), page, format, layout, chunks, offset, scale, .. } = &self;
        let sequences = &self.sequences;
        let name = format!(
            "{r}+{p}, page {page}, {format:?}, {layout:?}, (position, tokens) {sequences:?}, {chunks} chunks, \
             offset {offset}, scale {scale}"
        );
        let rows = f64::from(sequences.iter().map(|(_, tokens)| tokens).sum::<u32>());
        let spec = self.spec();
        let moved = rows * (4.0 * f64::from(r + p) + spec.bytes() as f64);
        Case::new(name, spec, rows * f64::from(6 * r + 8 * p), move || self.job()).moving(moved)
    }

    /// Sequences and block table: each sequence's pages lie all over the chunks. Pages a chunk.
    fn pages(&self, inputs: &mut Inputs) -> (Vec<Sequence>, Vec<u32>, u32) {
        let count = |(position, tokens): &(u32, u32)| (position + tokens).div_ceil(self.page);
        // Only the pages that new tokens stand on are memory; the others are never looked at.
        let first = |(position, _): &(u32, u32)| position / self.page;
        let used: u32 = self.sequences.iter().map(|s| count(s) - first(s).min(count(s))).sum();
        let chunk_pages = (used + 2).div_ceil(self.chunks);
        let mut free: Vec<u32> = (0..chunk_pages * self.chunks).collect();
        inputs.shuffle(&mut free);
        let (mut batch, mut table, mut first_row) = (Vec::new(), Vec::new(), 0);
        for sequence in &self.sequences {
            let (position, tokens) = *sequence;
            batch.push(Sequence { position, tokens, first_row, pages: table.len() as u32, ..Sequence::default() });
            first_row += tokens;
            let page = |i| if i < first(sequence) { 0xFFFF_FFF0 } else { free.pop().expect("enough pages") };
            table.extend((0..count(sequence)).map(page));
        }
        (batch, table, chunk_pages)
    }

    fn job(&self) -> Job<MlaAppend> {
        let (r, p) = (self.shape.0 as usize, self.shape.1 as usize);
        let mut inputs = Inputs::seed(u64::from(self.page * 1000 + self.shape.0 + self.shape.1 + self.chunks));
        let (batch, table, chunk_pages) = self.pages(&mut inputs);
        let rows = Sequence::rows(&batch);
        let last = rows.iter().map(|row| row.position).max().expect("a case has rows");
        let turns = Frequencies::plain(p as u32, 1e4).table(last + 1);
        let weight: Vec<f32> = (0..r).map(|_| 1.0 + 0.5 * inputs.normal()).collect();
        let stride = (self.offset as usize + r + p).next_multiple_of(4);
        let mut kv = Vec::new();
        for row in &rows {
            // Where there is a scale, eps outweighs the squares.
            let magnitude = if self.scale == 1.0 { 2.0 } else { 5e-4 };
            let mut draw = || (inputs.normals(r, magnitude), inputs.normals(p, 3.0));
            let (latent, rope) = loop {
                let (latent, rope) = draw();
                let (position, scale, layout) = (row.position, self.scale, self.layout);
                let (latent_in, rope_in) = (&latent[..], &rope[..]);
                let token = Token {
                    latent: latent_in, rope: rope_in, position, weight: &weight, eps: EPS, scale, table: &turns, layout,
                };
                if self.format != RecordFormat::Fp8 || is_firm(self.format, token.values()) {
                    break (latent, rope);
                }
            };
            kv.extend(vec![f32::NAN; self.offset as usize]);
            kv.extend(latent.into_iter().chain(rope));
        }
        let wide = self.offset as usize + r + p;
        let mut tensors = vec![
            Tensor::input("batch", words(&batch)),
            Tensor::input("rows", words(&rows)),
            Tensor::input("block_table", Data::U32(table)),
            Tensor::input("kv", Data::F32(strided(&kv, wide, stride))),
            Tensor::input("weight", Data::F32(weight)),
            Tensor::input("rope_table", words(&turns)),
        ];
        // Each buffer has room behind its chunk's pages for those of the others: a record that goes to
        // the wrong chunk shows.
        let slots = (chunk_pages * self.chunks * self.page) as usize;
        tensors.extend(CHUNKS[..self.chunks as usize].iter().map(|name| self.cache(name, slots)));
        let case = self.clone();
        Job::new(tensors, move |kernel: &MlaAppend, t, recording| {
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
                kv: t.get("kv"),
                weight: t.get("weight"),
                rope_table: t.get("rope_table"),
                cache: &cache,
                count: rows.len() as u32,
                kv_stride: stride as u32,
                kv_offset: case.offset,
                eps: EPS,
                scale: case.scale,
            };
            kernel.record(recording, &args);
        })
    }

    /// One chunk of the cache with what of a record is compared how. An fp8 record must be the same
    /// bits, padding included.
    fn cache(&self, name: &'static str, slots: usize) -> Tensor {
        let (r, p, width) = (self.shape.0 as usize, self.shape.1 as usize, self.spec().width() as usize);
        let part = |first, columns, tolerance| Check { stride: width, first, columns, tolerance };
        let checks = |tolerance| {
            let exact = Tolerance::EXACT;
            let mut checks = vec![part(0, r, tolerance), part(r, p, tolerance), part(r + p, width - r - p, exact)];
            checks.retain(|c| c.columns > 0);
            checks
        };
        match self.format {
            RecordFormat::F16 => {
                let untouched = vec![half::f16::from_f32(UNTOUCHED); slots * width];
                Tensor::checked(name, Data::F16(untouched), checks(Tolerance::f16()))
            }
            RecordFormat::F32 => {
                Tensor::checked(name, Data::F32(vec![UNTOUCHED; slots * width]), checks(Tolerance::f32(r)))
            }
            RecordFormat::Fp8 => {
                let bytes = self.spec().bytes();
                Tensor::output(name, Data::U8(vec![0xFF; slots * bytes]), Check::rows(bytes, Tolerance::EXACT))
            }
        }
    }
}

/// The record stays the same bits when f32 arithmetic moves its values a little.
fn is_firm(format: RecordFormat, (latent, rope): (Vec<f32>, Vec<f32>)) -> bool {
    let largest = rope.iter().fold(0.0f32, |most, v| most.max(v.abs()));
    let moved = |by: f32| {
        let latent: Vec<f32> = latent.iter().map(|v| v * (1.0 + 3.0 * by)).collect();
        let rope: Vec<f32> = rope.iter().map(|v| v + by * largest).collect();
        format.encode(&latent, &rope)
    };
    let record = format.encode(&latent, &rope);
    moved(1e-6) == record && moved(-1e-6) == record
}
