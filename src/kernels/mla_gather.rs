//! `mla_gather`: records of the latent cache as rows of f32, for one piece of the context. Keys and values of
//! materialised attention are expanded from them, those of new tokens too: what was rounded for the cache is
//! the same for every token that reads it.

use std::sync::Arc;

use super::mla_decode::cache_module;
use super::contexts::{self, Context, Draw, Drawn};
use super::inputs::{Inputs, words};
use super::plan::Plan;
use super::{
    CacheChunk, Case, Check, Choice, Data, Field, Job, Kernel, Sequence, Set, Span, Tensor, Tolerance, Variant,
};
use crate::gpu::{Caps, Grid, Host, Recording, Shader, Source, View};
use crate::num::record::RecordFormat;
use crate::reference::mla_gather::gather;
use crate::wgsl;

params! {
    /// Sizes of a call for one chunk of the cache.
    pub struct Params {
        /// The chunk's first page.
        pub first_page: u32,
        /// Pages of the chunk.
        pub pages: u32,
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
}

impl Spec {
    /// f32 from one gathered rope key to the next: p rounded up to 4.
    pub fn rope_stride(&self) -> u32 {
        self.rope.next_multiple_of(4)
    }
}

/// How it runs.
#[derive(Clone, Debug)]
pub struct Tuning {
    /// Records of a workgroup.
    pub tile: u32,
    /// Invocations a workgroup.
    pub workgroup: u32,
}

/// The most workgroup memory of a tile, bytes.
const TILE_BYTES: u32 = 12 << 10;

/// What a call reads and writes.
pub struct Args<'a> {
    /// `[sequences]` [`Sequence`].
    pub batch: View,
    /// `[count]` [`Span`].
    pub spans: View,
    /// Page numbers, u32.
    pub block_table: View,
    /// The layer's latent cache.
    pub cache: &'a [CacheChunk],
    /// `[keys, latent]` f32, written.
    pub latents: View,
    /// `[keys, rope_stride]` f32, written; any buffer where p is 0.
    pub k_pe: View,
    /// Entries of `spans`.
    pub count: u32,
    /// Keys of the longest span.
    pub most_keys: u32,
}

/// The kernel `mla_gather`.
pub struct MlaGather {
    spec: Spec,
    tuning: Tuning,
    shader: Arc<Shader>,
}

impl Kernel for MlaGather {
    const NAME: &'static str = "mla_gather";
    const SOURCE: Source = wgsl!("mla_gather");
    const PARAMS: &'static [Field] = Params::FIELDS;
    type Spec = Spec;
    type Tuning = Tuning;

    fn variants(spec: &Spec, caps: &Caps) -> Vec<Variant<Tuning>> {
        let record = 4 * (spec.latent + spec.rope).next_multiple_of(8);
        let tuning = Tuning { tile: (TILE_BYTES / record).clamp(1, 8), workgroup: caps.invocations.min(128) };
        vec![Variant { name: "portable", tuning }]
    }

    fn tuning(spec: &Spec, caps: &Caps) -> Choice<Tuning> {
        let variant = Self::variants(spec, caps).remove(0);
        let why = format!("bound by memory: one path is enough; {} records of a workgroup", variant.tuning.tile);
        Choice { variant, why }
    }

    fn new(spec: &Spec, tuning: &Tuning) -> MlaGather {
        assert!(spec.latent > 0 && spec.latent.is_multiple_of(16), "mla_gather: latent width {}", spec.latent);
        assert!(spec.rope.is_multiple_of(2), "mla_gather: rope width {} is odd", spec.rope);
        let shader = Shader::of(Self::SOURCE)
            .u32("R", spec.latent)
            .u32("P", spec.rope)
            .u32("W", (spec.latent + spec.rope).next_multiple_of(8))
            .u32("PAGE", spec.page)
            .u32("TILE", tuning.tile)
            .u32("WORKGROUP", tuning.workgroup)
            .module(wgsl!("lib/batch"))
            .module(cache_module(spec.format))
            .build();
        MlaGather { spec: spec.clone(), tuning: tuning.clone(), shader }
    }

    fn shader(&self) -> &Arc<Shader> {
        &self.shader
    }

    fn cases(set: Set) -> Vec<Case<MlaGather>> {
        let shape = |widths, format, page, sequences: &[(u32, u32)], chunks, from| {
            let context = Context { widths, format, page, sequences: sequences.to_vec(), chunks, draw: Draw::Even };
            Shape { context, from }
        };
        if set == Set::Timed {
            let timed = |format| shape((512, 64), format, 64, &[(3840, 256)], 1, 0).case();
            return RecordFormat::ALL.map(timed).into();
        }
        let widths = [(512, 64), (32, 8), (48, 16), (512, 0), (144, 6), (16, 2), (768, 64), (256, 32)];
        let batches: [&[(u32, u32)]; 4] =
            [&[(15, 38)], &[(0, 3), (128, 1), (5, 0), (61, 9)], &[(700, 1)], &[(0, 1), (255, 2), (300, 4)]];
        let mut cases = Vec::new();
        for (i, format) in RecordFormat::ALL.into_iter().cycle().take(3 * widths.len()).enumerate() {
            let (page, chunks, from) = ([64, 16, 128, 32][(i / 3 + i) % 4], [1, 3][i / 2 % 2], [0, 1, 17][i % 3]);
            cases.push(shape(widths[i % widths.len()], format, page, batches[i / 2 % 4], chunks, from).case());
        }
        cases
    }
}

impl MlaGather {
    /// Writes the rows of some spans: a dispatch for each chunk of the cache.
    pub fn record(&self, recording: &mut Recording, args: &Args) {
        for chunk in args.cache {
            let params = Params { first_page: chunk.first_page, pages: chunk.pages };
            let bindings = vec![
                ("batch", args.batch.clone()),
                ("spans", args.spans.clone()),
                ("block_table", args.block_table.clone()),
                ("cache", chunk.view.clone()),
                ("latents", args.latents.clone()),
                ("k_pe", args.k_pe.clone()),
            ];
            let (spec, count) = (self.spec.clone(), args.count as usize);
            let twin = move |host: &Host| twin(&spec, params, count, host);
            let grid = Grid::Direct([args.most_keys.div_ceil(self.tuning.tile), args.count, 1]);
            recording.call(&self.shader, bindings, bytemuck::bytes_of(&params), grid, twin);
        }
    }
}

fn twin(spec: &Spec, params: Params, count: usize, host: &Host) {
    let (batch, spans) = (host.get::<Sequence>("batch"), host.get::<Span>("spans"));
    let (table, cache) = (host.get::<u32>("block_table"), host.get::<u8>("cache"));
    let (r, p) = (spec.latent as usize, spec.rope as usize);
    let bytes = spec.format.bytes(r, p);
    for span in &spans[..count] {
        for position in span.begin..span.end {
            let page = table[(batch[span.sequence as usize].pages + position / spec.page) as usize];
            if !(params.first_page..params.first_page + params.pages).contains(&page) {
                continue;
            }
            let slot = ((page - params.first_page) * spec.page + position % spec.page) as usize;
            let (latent, rope) = gather(spec.format, &cache[slot * bytes..][..bytes], r, p);
            let row = (span.row + position - span.begin) as usize;
            host.set("latents", row * r, &latent);
            if p > 0 {
                host.set("k_pe", row * spec.rope_stride() as usize, &rope);
            }
        }
    }
}

/// A case: each sequence's context from `from` on, in the order of the sequences, with rows between them.
#[derive(Clone)]
struct Shape {
    context: Context,
    from: u32,
}

/// The tensors of the cache's chunks.
const CHUNKS: [&str; 3] = ["cache 0", "cache 1", "cache 2"];
/// Rows that no span names, before each sequence's.
const GAP: u32 = 2;

impl Shape {
    fn case(self) -> Case<MlaGather> {
        let Context { widths: (latent, rope), format, page, ref sequences, chunks, .. } = self.context;
        let name = format!(
            "{latent}+{rope}, page {page}, {format:?}, (position, tokens) {sequences:?} from {}, {chunks} chunks",
            self.from
        );
        let keys = f64::from(self.context.tokens());
        let moved = keys * (self.context.record() as f64 + 4.0 * f64::from(latent + rope));
        Case::new(name, Spec { latent, rope, page, format }, 0.0, move || self.job()).moving(moved)
    }

    fn job(&self) -> Job<MlaGather> {
        let (r, p) = self.context.widths;
        let mut inputs = Inputs::seed(u64::from(self.context.page * 1000 + r + p + self.context.chunks));
        let table = contexts::table(&mut inputs);
        let drawn = self.context.draw(&mut inputs, &table, |_, _, _| Plan::default());
        let Drawn { batch, table, chunk_pages, caches, .. } = drawn;
        let (mut spans, mut rows) = (Vec::new(), 0);
        for (sequence, s) in (0..).zip(&batch).filter(|(_, s)| s.position + s.tokens > self.from) {
            let (begin, end) = (self.from, s.position + s.tokens);
            spans.push(Span { sequence, begin, end, row: rows + GAP });
            rows += GAP + end - begin;
        }
        let (count, most_keys) = (spans.len() as u32, spans.iter().map(|s| s.end - s.begin).max().expect("a span"));
        let stride = p.next_multiple_of(4) as usize;
        let values = |columns: usize| Data::F32(vec![-65504.0; rows as usize * columns]);
        // What is gathered is what was stored, to the bit; drivers may flush what is too small for f16.
        let check = |stride, columns| Check { stride, first: 0, columns, tolerance: Tolerance::f32(1) };
        let k_pe = match p {
            0 => Tensor::input("k_pe", Data::F32(vec![0.0; 4])),
            p => Tensor::checked("k_pe", values(stride), vec![check(stride, p as usize)]),
        };
        let mut tensors = vec![
            Tensor::input("batch", words(&batch)),
            Tensor::input("spans", words(&spans)),
            Tensor::input("block_table", Data::U32(table)),
            Tensor::checked("latents", values(r as usize), vec![check(r as usize, r as usize)]),
            k_pe,
        ];
        let chunks = caches.len();
        tensors.extend(CHUNKS.iter().zip(caches).map(|(name, bytes)| Tensor::input(name, Data::U8(bytes))));
        Job::new(tensors, move |kernel: &MlaGather, t, recording| {
            let chunk = |(i, name): (usize, &&'static str)| CacheChunk {
                first_page: i as u32 * chunk_pages,
                pages: chunk_pages,
                view: t.get(name),
            };
            let cache: Vec<CacheChunk> = CHUNKS[..chunks].iter().enumerate().map(chunk).collect();
            let args = Args {
                batch: t.get("batch"),
                spans: t.get("spans"),
                block_table: t.get("block_table"),
                cache: &cache,
                latents: t.get("latents"),
                k_pe: t.get("k_pe"),
                count,
                most_keys,
            };
            kernel.record(recording, &args);
        })
    }
}
