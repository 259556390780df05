//! Caches of paged records that are far larger than what is drawn for them: the same drawn pages stand in many
//! places of a device's memory, so that filling gigabytes takes no time and no run finds another's in a cache.

use rayon::prelude::*;

use crate::Result;
use crate::gpu::Device;
use crate::kernels::CacheChunk;
use crate::kernels::inputs::Inputs;

/// Bytes that are drawn; larger caches repeat them.
const DRAWN: usize = 48 << 20;

/// Pages of records on a device.
pub struct Pages {
    /// The pages, in buffers of the same size.
    pub chunks: Vec<CacheChunk>,
    /// Pages of a chunk.
    pub chunk_pages: u32,
    /// Tokens of a page.
    pub page: u32,
    record: usize,
    /// The drawn pages; page i of the cache is page i modulo their number.
    drawn: Vec<u8>,
    /// Pages that no sequence has, of each chunk, in no order.
    free: Vec<Vec<u32>>,
    inputs: Inputs,
}

impl Pages {
    /// Room for `count` pages of `page` tokens with records of `record` bytes, as `draw` draws them.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`].
    pub fn new(
        device: &Device,
        (page, record): (u32, usize),
        count: u32,
        draw: impl Fn(&mut Inputs) -> Vec<u8> + Sync,
    ) -> Result<Pages> {
        let bytes = page as usize * record;
        let most = device.caps().bound_bytes() / bytes as u64;
        // A page in each chunk is nobody's, and holds NaN.
        let chunk_pages = (most.min(u64::from(count) + 1) as u32).max(2);
        let chunks = count.div_ceil(chunk_pages - 1);
        let drawn = (DRAWN / bytes).clamp(1, (chunks * chunk_pages) as usize);
        let pages: Vec<Vec<u8>> = (0..drawn as u64)
            .into_par_iter()
            .map(|seed| {
                let mut inputs = Inputs::seed(seed);
                (0..page).flat_map(|_| draw(&mut inputs)).collect()
            })
            .collect();
        let source = device.upload(&pages.concat(), "drawn pages")?;
        let nobodys = vec![0xFFu8; bytes];
        let mut of_device = Vec::new();
        for chunk in 0..chunks {
            let first_page = chunk * chunk_pages;
            let buffer = device.alloc(u64::from(chunk_pages) * bytes as u64, "cache")?;
            let (mut copies, mut at) = (Vec::new(), 0);
            while at < chunk_pages {
                let from = (first_page + at) as usize % drawn;
                let run = (drawn - from).min((chunk_pages - at) as usize);
                let part = |buffer: &crate::gpu::Buffer, page: usize| {
                    buffer.slice((page * bytes) as u64, (run * bytes) as u64)
                };
                copies.push((part(&source, from), part(&buffer, at as usize)));
                at += run as u32;
            }
            device.copy(&copies)?;
            device.write(&buffer.view(), u64::from(chunk_pages - 1) * bytes as u64, &nobodys)?;
            of_device.push(CacheChunk { first_page, pages: chunk_pages, view: buffer.view() });
        }
        let mut all = Pages {
            chunks: of_device,
            chunk_pages,
            page,
            record,
            drawn: pages.concat(),
            free: Vec::new(),
            inputs: Inputs::seed(u64::from(count)),
        };
        all.release();
        Ok(all)
    }

    /// How many pages sequences can have.
    pub fn count(&self) -> u32 {
        self.chunks.len() as u32 * (self.chunk_pages - 1)
    }

    /// Takes all pages back.
    pub fn release(&mut self) {
        self.free = (0..self.chunks.len() as u32)
            .map(|chunk| {
                let first = chunk * self.chunk_pages;
                let mut pages: Vec<u32> = (first..first + self.chunk_pages - 1).collect();
                self.inputs.shuffle(&mut pages);
                pages
            })
            .collect();
    }

    /// The pages of a sequence, in no order but that of the chunks.
    ///
    /// # Panics
    /// When there are no more.
    pub fn take(&mut self, count: u32) -> Vec<u32> {
        let mut taken = Vec::new();
        for free in &mut self.free {
            let part = free.len().min(count as usize - taken.len());
            taken.extend(free.drain(free.len() - part..));
        }
        assert!(taken.len() == count as usize, "{count} pages asked for, {} left", taken.len());
        taken
    }

    /// The bytes of the record of token `token`, of a sequence with these pages.
    pub fn record(&self, pages: &[u32], token: u32) -> &[u8] {
        let bytes = self.page as usize * self.record;
        let page = pages[(token / self.page) as usize] as usize % (self.drawn.len() / bytes);
        &self.drawn[page * bytes + (token % self.page) as usize * self.record..][..self.record]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::Options;

    #[test]
    fn a_page_of_the_device_is_the_host_s_and_no_page_has_two_owners() {
        let options = Options { binding_bytes: Some(5 * 64 * 16), ..Options::default() };
        let device = Device::cpu(&options);
        let draw = |inputs: &mut Inputs| (0..4).flat_map(|_| inputs.normal().to_le_bytes()).collect();
        let mut pages = Pages::new(&device, (64, 16), 11, draw).unwrap();
        assert_eq!((pages.chunks.len(), pages.chunk_pages, pages.count()), (3, 5, 12));
        let mut taken = [pages.take(7), pages.take(5)].concat();
        let bytes = pollster::block_on(device.read(&[pages.chunks[1].view.clone()])).unwrap().remove(0);
        for (i, page) in taken.iter().enumerate().filter(|(_, page)| **page / 5 == 1) {
            let here = &bytes[(*page as usize % 5 * 64 + 3) * 16..][..16];
            assert_eq!(here, pages.record(&taken, i as u32 * 64 + 3));
        }
        assert!(bytes[4 * 64 * 16..].iter().all(|byte| *byte == 0xFF), "the last page is nobody's");
        taken.sort();
        taken.dedup();
        assert!(taken.len() == 12 && taken.iter().all(|page| page % 5 != 4));
        pages.release();
        assert_eq!(pages.take(12).len(), 12);
    }
}
