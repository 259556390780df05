//! Drawn latent caches for the cases of the kernels that decode: records in shuffled pages, NaN in the
//! slots and poison in the table entries that nobody may read.

use rayon::prelude::*;

use super::inputs::Inputs;
use super::plan::Plan;
use super::{Row, Sequence};
use crate::num::record::RecordFormat;

/// How queries and records are drawn. Queries are in units of log2.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Draw {
    /// FlashMLA's: normal / 10, clamped to [-1, 1]: an almost even softmax.
    Even,
    /// The same with queries times 40: a peaked softmax.
    Peaked,
    /// Scores rise from each token to the next by more than the maximum's margin a tile, over the last 4,096.
    Rising,
    /// One token outweighs all others: the one at this place of [`Draw::places`].
    Dominant(usize),
    /// Scores beyond +-200, latents near 6e4.
    Extreme,
}

impl Draw {
    /// All of them.
    pub const ALL: [Draw; 10] = [
        Draw::Even,
        Draw::Peaked,
        Draw::Rising,
        Draw::Extreme,
        Draw::Dominant(0),
        Draw::Dominant(1),
        Draw::Dominant(2),
        Draw::Dominant(3),
        Draw::Dominant(4),
        Draw::Dominant(5),
    ];

    /// The sum of |q k| over a record, about: what the rounding of a score is measured by.
    pub fn magnitude(self) -> f64 {
        match self {
            Draw::Even => 6.0,
            Draw::Peaked => 300.0,
            Draw::Rising => 1.2e4,
            Draw::Dominant(_) => 80.0,
            Draw::Extreme => 900.0,
        }
    }

    /// Where the dominant token may stand: first, last, on either side of a page's border in the middle,
    /// and on either side of the border `split` of a split.
    fn places(length: u32, page: u32, split: u32) -> [u32; 6] {
        let middle = length / 2 / page * page;
        [
            0,
            length - 1,
            middle.saturating_sub(1),
            middle.min(length - 1),
            split.saturating_sub(1),
            split.min(length - 1),
        ]
    }
}

/// Columns that the special draws use: of the latent, and one of the rope key where there is one.
const COLUMNS: [usize; 3] = [0, 5, 11];

/// What a drawn cache looks like.
#[derive(Clone, Debug)]
pub(super) struct Context {
    /// Widths of latent and rope key.
    pub widths: (u32, u32),
    pub format: RecordFormat,
    pub page: u32,
    /// Position and new tokens of each sequence.
    pub sequences: Vec<(u32, u32)>,
    /// In how many buffers the pages lie.
    pub chunks: u32,
    pub draw: Draw,
}

/// A drawn cache.
pub(super) struct Drawn {
    pub plan: Plan,
    pub batch: Vec<Sequence>,
    pub rows: Vec<Row>,
    pub table: Vec<u32>,
    pub chunk_pages: u32,
    /// The chunks' bytes.
    pub caches: Vec<Vec<u8>>,
}

impl Context {
    /// Values of a record with its padding.
    pub fn width(&self) -> u32 {
        (self.widths.0 + self.widths.1).next_multiple_of(8)
    }

    /// Bytes of a record.
    pub fn record(&self) -> usize {
        self.format.bytes(self.widths.0 as usize, self.widths.1 as usize)
    }

    /// Tokens that new tokens attend to, over all sequences that have new tokens.
    pub fn tokens(&self) -> u32 {
        self.sequences.iter().filter(|(_, tokens)| *tokens > 0).map(|(position, tokens)| position + tokens).sum()
    }

    /// Pairs of a new token and a token that it sees.
    pub fn visible(&self) -> f64 {
        let of = |(position, tokens): &(u32, u32)| (1..=*tokens).map(|i| f64::from(position + i)).sum::<f64>();
        self.sequences.iter().map(of).sum()
    }

    /// A query of `width` values, zeros behind those of a record.
    pub fn query(&self, inputs: &mut Inputs, table: &[f32]) -> Vec<f32> {
        let (r, p) = (self.widths.0 as usize, self.widths.1 as usize);
        let factor = std::f32::consts::LOG2_E * if self.draw == Draw::Peaked { 40.0 } else { 1.0 };
        let mut query: Vec<f32> = inputs.pick(table, r + p).map(|v| v * factor).collect();
        match self.draw {
            Draw::Rising => query[COLUMNS[0]] = 3.0,
            Draw::Dominant(_) => query[COLUMNS[0]] = 2.0,
            Draw::Extreme => COLUMNS.iter().for_each(|c| query[*c] = 0.0042 * (0.8 + 0.2 * inputs.uniform())),
            Draw::Even | Draw::Peaked => {}
        }
        query.resize(self.width() as usize, 0.0);
        query
    }

    /// The latent and rope key of token `token` of a sequence of `length` tokens.
    fn values(&self, inputs: &mut Inputs, table: &[f32], token: u32, length: u32, split: u32) -> Vec<f32> {
        let (r, p) = (self.widths.0 as usize, self.widths.1 as usize);
        let mut values: Vec<f32> = inputs.pick(table, r + p).collect();
        match self.draw {
            Draw::Rising => values[COLUMNS[0]] = (token + 4096).saturating_sub(length) as f32 * 0.75,
            Draw::Dominant(place) => {
                let dominates = Draw::places(length, self.page, split)[place] == token;
                values[COLUMNS[0]] = if dominates { 20.0 } else { -2.0 };
            }
            Draw::Extreme => {
                // The first token's score is far below zero: with it alone a maximum must not start at 0.
                let sign = |i: usize| if (token >> i).is_multiple_of(2) { -1.0 } else { 1.0 };
                COLUMNS.iter().enumerate().for_each(|(i, c)| values[*c] = sign(i) * (6e4 - 100.0 * inputs.uniform()));
            }
            Draw::Even | Draw::Peaked => {}
        }
        values
    }

    /// Draws the cache. A sequence's pages lie in one chunk after the other, shuffled in each. `plan` cuts
    /// the batch, of chunks of so many pages, into splits.
    pub fn draw(
        &self,
        inputs: &mut Inputs,
        table: &[f32],
        plan: impl Fn(&mut [Sequence], &[u32], u32) -> Plan,
    ) -> Drawn {
        let pages_of = |(position, tokens): &(u32, u32)| (position + tokens).div_ceil(self.page);
        // Each chunk gets a share of every sequence's pages, and one page that nobody has.
        let share = |pages: u32, chunk: u32| pages * (chunk + 1) / self.chunks - pages * chunk / self.chunks;
        let in_chunk = |chunk: u32| 1 + self.sequences.iter().map(|s| share(pages_of(s), chunk)).sum::<u32>();
        let chunk_pages = (0..self.chunks).map(in_chunk).max().expect("a chunk");
        let mut free: Vec<Vec<u32>> =
            (0..self.chunks).map(|c| (c * chunk_pages..(c + 1) * chunk_pages).collect()).collect();
        free.iter_mut().for_each(|pages| inputs.shuffle(pages));
        let record = self.record();
        let bytes = (chunk_pages * self.page) as usize * record;
        let mut caches = vec![vec![0xFF; bytes]; self.chunks as usize];
        let (mut batch, mut block_table, mut first_row) = (Vec::new(), Vec::new(), 0);
        for sequence in &self.sequences {
            let (position, tokens) = *sequence;
            block_table.push(0xFFFF_FFF0); // nobody's
            let pages = block_table.len() as u32;
            batch.push(Sequence { position, tokens, first_row, pages, ..Sequence::default() });
            first_row += tokens;
            for (chunk, free) in (0..).zip(&mut free) {
                let count = share(pages_of(sequence), chunk) as usize;
                block_table.extend(free.drain(free.len() - count..));
            }
        }
        block_table.push(0xFFFF_FFF0);
        let plan = plan(&mut batch, &block_table, chunk_pages);
        let seeds: Vec<(u32, &Sequence, u64)> = (0..).zip(&batch).map(|(i, s)| (i, s, inputs.any())).collect();
        let records = seeds.into_par_iter().map(|(i, sequence, seed)| {
            let length = sequence.position + sequence.tokens;
            let borders = plan.splits.iter().filter(|split| split.sequence == i && split.begin > 0);
            let split = borders.map(|split| split.begin).min().unwrap_or(length / 2);
            let mut inputs = Inputs::seed(seed);
            let mut bytes = Vec::with_capacity(length as usize * record);
            for token in 0..length {
                let values = self.values(&mut inputs, table, token, length, split);
                let (latent, rope) = values.split_at(self.widths.0 as usize);
                bytes.extend(self.format.encode(latent, rope));
            }
            bytes
        });
        for (sequence, bytes) in batch.iter().zip(records.collect::<Vec<_>>()) {
            for (i, part) in (0..).zip(bytes.chunks(self.page as usize * record)) {
                let page = block_table[sequence.pages as usize + i];
                let start = (page % chunk_pages * self.page) as usize * record;
                caches[(page / chunk_pages) as usize][start..][..part.len()].copy_from_slice(part);
            }
        }
        let rows = Sequence::rows(&batch);
        Drawn { plan, batch, rows, table: block_table, chunk_pages, caches }
    }

    /// The values of the first `tokens` records of a sequence, `[tokens, r + p]`, from the chunks' bytes.
    pub fn records(&self, caches: &[&[u8]], chunk_pages: u32, pages: &[u32], tokens: u32) -> Vec<f32> {
        let (r, p, record) = (self.widths.0 as usize, self.widths.1 as usize, self.record());
        let mut values = Vec::with_capacity(tokens as usize * (r + p));
        for token in 0..tokens {
            let page = pages[(token / self.page) as usize];
            let slot = (page % chunk_pages * self.page + token % self.page) as usize;
            let bytes = &caches[(page / chunk_pages) as usize][slot * record..][..record];
            values.extend(self.format.decode(bytes, r, p));
        }
        values
    }
}

/// Values as FlashMLA's, to be picked from: drawing each afresh would take longer than the kernels do.
pub(super) fn table(inputs: &mut Inputs) -> Vec<f32> {
    inputs.flashmla(1 << 14)
}
