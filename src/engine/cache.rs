//! The paged latent cache: the bookkeeping of its pages, and for each layer the memory they stand for.
//! All memory is allocated once; decoding allocates nothing.

use super::pages::{PageCopy, Pages, SequenceId};
use crate::error::{Error, Result};
use crate::gpu::{Device, View};
use crate::kernels::{CacheChunk, Sequence};
use crate::num::record::RecordFormat;

/// Sizes of a cache.
#[derive(Clone, Debug)]
pub struct CacheShape {
    /// Layers that keep latents.
    pub layers: usize,
    /// Width of the latent.
    pub latent: u32,
    /// Width of the rope key.
    pub rope: u32,
    /// How a record is stored.
    pub format: RecordFormat,
    /// Tokens a page: 16, 32, 64 or 128.
    pub page: u32,
    /// Pages, shared by all sequences.
    pub pages: u32,
    /// The longest context.
    pub most_tokens: u32,
}

/// A kind of state that a layer keeps of the tokens before. Sequences share what they have in common;
/// the cache tells each kind when a sequence grows, forgets or is copied.
#[derive(Debug)]
pub enum State {
    /// Records of latents, in pages.
    Latent(LatentPages),
}

/// One layer's records.
#[derive(Debug)]
pub struct LatentPages {
    /// The buffers, each of whole pages.
    pub chunks: Vec<CacheChunk>,
    page_bytes: u64,
}

impl LatentPages {
    fn view(&self, page: u32) -> View {
        let found = self.chunks.iter().rfind(|chunk| chunk.first_page <= page);
        let chunk = found.expect("the first chunk starts at page 0");
        chunk.view.part(u64::from(page - chunk.first_page) * self.page_bytes, self.page_bytes)
    }
}

impl State {
    /// A sequence grows; `copy` is the page that it stops sharing.
    fn append(&self, device: &Device, copy: Option<PageCopy>, spare: &View) -> Result<()> {
        let (State::Latent(pages), Some(PageCopy { from, to })) = (self, copy) else { return Ok(()) };
        // By way of a third buffer: both pages may stand in one, and a copy is between two.
        device.copy(&[(pages.view(from), spare.clone()), (spare.clone(), pages.view(to))])
    }

    /// A sequence forgets its tokens from `_tokens` on. Latents need nothing: the block table alone says
    /// which records are read.
    fn truncate(&self, _sequence: SequenceId, _tokens: usize) {
        let State::Latent(_) = self;
    }

    /// `_to` starts as `_from` is. Latents need nothing: the pages are shared.
    fn snapshot(&self, _from: SequenceId, _to: SequenceId) {
        let State::Latent(_) = self;
    }
}

/// A paged cache on one device.
pub struct Cache {
    device: Device,
    pages: Pages,
    chunk_pages: u32,
    layers: Vec<Vec<State>>,
    spare: View,
}

/// How many tokens a page may have.
pub const PAGES: [u32; 4] = [16, 32, 64, 128];

/// Refuses other pages.
///
/// # Errors
/// [`Error::Usage`].
pub(super) fn check_page(tokens: u32) -> Result<()> {
    if PAGES.contains(&tokens) {
        return Ok(());
    }
    let (expected, found) = ("16, 32, 64 or 128".into(), tokens.to_string());
    Err(Error::Usage { what: "tokens a page".into(), expected, found })
}

impl Cache {
    /// Allocates the whole cache.
    ///
    /// # Errors
    /// [`Error::Usage`] for another page size, [`Error::Capacity`] where a page is larger than a binding
    /// may be, and [`Error::OutOfMemory`].
    pub fn new(device: &Device, shape: &CacheShape) -> Result<Cache> {
        check_page(shape.page)?;
        // A record is a multiple of 16 bytes, so that a page starts at a multiple of 256.
        let page_bytes = shape.format.bytes(shape.latent as usize, shape.rope as usize) as u64 * u64::from(shape.page);
        let caps = device.caps();
        let limit = caps.bound_bytes();
        if page_bytes > limit {
            return Err(Error::Capacity { what: "bytes in a page of the cache".into(), asked: page_bytes, limit });
        }
        let most = (limit / page_bytes).min(u64::from(shape.pages)).max(1) as u32;
        let chunk_pages = shape.pages.div_ceil(shape.pages.div_ceil(most).max(1)).max(1);
        let chunk = |layer: usize, first_page: u32| {
            let pages = chunk_pages.min(shape.pages - first_page);
            let label = format!("layer {layer}, pages from {first_page} on");
            let view = device.alloc(u64::from(pages) * page_bytes, &label)?.view();
            Ok(CacheChunk { first_page, pages, view })
        };
        let layer = |layer: usize| {
            let starts = (0..shape.pages).step_by(chunk_pages as usize);
            let chunks = starts.map(|first| chunk(layer, first)).collect::<Result<_>>()?;
            Ok(vec![State::Latent(LatentPages { chunks, page_bytes })])
        };
        Ok(Cache {
            device: device.clone(),
            pages: Pages::new(
                shape.pages as usize,
                shape.page as usize,
                chunk_pages as usize,
                shape.most_tokens as usize,
            ),
            chunk_pages,
            layers: (0..shape.layers).map(layer).collect::<Result<_>>()?,
            spare: device.alloc(page_bytes, "a page on its way")?.view(),
        })
    }

    /// The pages' bookkeeping.
    pub fn pages(&self) -> &Pages {
        &self.pages
    }

    /// Pages of a chunk; the last one's may be fewer.
    pub fn chunk_pages(&self) -> u32 {
        self.chunk_pages
    }

    /// What a layer keeps.
    pub fn layer(&self, layer: usize) -> &[State] {
        &self.layers[layer]
    }

    /// The layer's latents, in chunks.
    pub fn latent(&self, layer: usize) -> &[CacheChunk] {
        let State::Latent(pages) = &self.layers[layer][0];
        &pages.chunks
    }

    fn states(&self) -> impl Iterator<Item = &State> {
        self.layers.iter().flatten()
    }

    /// An empty sequence.
    pub fn create(&mut self) -> SequenceId {
        self.pages.create()
    }

    /// Makes room for `tokens` more tokens of a sequence, whose records the next step writes.
    ///
    /// # Errors
    /// As [`Pages::append`], and faults of the driver.
    pub fn append(&mut self, id: SequenceId, tokens: usize) -> Result<()> {
        let copy = self.pages.append(id, tokens)?;
        self.states().try_for_each(|state| state.append(&self.device, copy, &self.spare))
    }

    /// Forgets a sequence's tokens from `tokens` on.
    pub fn truncate(&mut self, id: SequenceId, tokens: usize) {
        self.pages.truncate(id, tokens);
        self.states().for_each(|state| state.truncate(id, tokens));
    }

    /// A sequence that starts with the first `tokens` tokens of another and shares their pages until it
    /// writes.
    pub fn fork(&mut self, id: SequenceId, tokens: usize) -> SequenceId {
        let fork = self.pages.fork(id, tokens);
        self.states().for_each(|state| state.snapshot(id, fork));
        fork
    }

    /// Forgets a sequence.
    pub fn free(&mut self, id: SequenceId) {
        self.pages.free(id);
    }

    /// The batch and the block table of a step: each sequence with its number of new tokens, for which
    /// [`Cache::append`] has made room. The rows follow the order of the list.
    pub fn batch(&self, sequences: &[(SequenceId, u32)]) -> (Vec<Sequence>, Vec<u32>) {
        let (mut batch, mut table, mut first_row) = (Vec::new(), Vec::new(), 0);
        for (id, tokens) in sequences {
            let position = self.pages.tokens(*id) as u32 - tokens;
            let pages = table.len() as u32;
            batch.push(Sequence {
                position,
                tokens: *tokens,
                first_row,
                pages,
                slot: id.slot(),
                ..Sequence::default()
            });
            table.extend_from_slice(self.pages.pages(*id));
            first_row += tokens;
        }
        (batch, table)
    }
}
