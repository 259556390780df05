//! The plan of `mla_decode`: each context cut into splits, so that all compute units get about the
//! same work (FlashMLA's scheduler metadata is the model).

use std::cmp::Reverse;
use std::fmt;

use super::mla_combine::MOST_SPLITS;
use super::{Sequence, Split};
use crate::error::{Error, Result};
use crate::gpu::{Caps, DeviceType};

/// Rows of partials to have for each workgroup: as many as 128 workgroups of 64 rows need on matrix units, where
/// others would be 264.
pub const MOST_ROWS: u32 = 32;

/// Workgroups that fill a device once, as far as its kind tells: no API says how many units it has.
pub fn workgroups(caps: &Caps) -> u32 {
    match caps.device_type {
        DeviceType::Discrete => 264,
        DeviceType::Cpu => 8,
        _ => 48,
    }
}

/// How contexts are cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Borders {
    /// Into pieces of about the same size over the whole batch.
    Balanced,
    /// From the sequence's own length alone (and the borders of cache chunks that it crosses), so that
    /// a sequence gives the same bits alone and in any batch.
    Own,
}

/// Blocks for steps of little work, where that many fill the device no more than once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Little {
    /// Rows that a workgroup folds.
    pub rows: u32,
    /// The most work: pairs of a (query token, head) row and a token of its context.
    pub most: u64,
}

impl fmt::Display for Little {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "blocks of {} rows for steps of at most {} pairs of a row and a token", self.rows, self.most)
    }
}

/// What a plan is made for.
#[derive(Clone, Debug)]
pub struct Target {
    /// Tokens a page.
    pub page: u32,
    /// Pages of a cache chunk, the last one's may be fewer.
    pub chunk_pages: u32,
    /// Query heads.
    pub heads: u32,
    /// (Query token, head) rows that a workgroup folds.
    pub rows: u32,
    /// In steps of little work, other blocks.
    pub little: Option<Little>,
    /// Workgroups that fill the device once.
    pub workgroups: u32,
    /// The most rows of `partials`, in tokens.
    pub partials: u32,
    /// How contexts are cut.
    pub borders: Borders,
}

/// The splits of one cache chunk: one dispatch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dispatch {
    /// The chunk's index.
    pub chunk: usize,
    /// Its first entry of the splits.
    pub first_split: u32,
    /// How many there are.
    pub splits: u32,
}

/// A step's splits.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// All splits, those of one chunk together, the longest first.
    pub splits: Vec<Split>,
    /// The chunks' ranges of them.
    pub dispatches: Vec<Dispatch>,
    /// Rows of `partials` that are written, in tokens.
    pub partials: u32,
    /// Rows that a workgroup is to fold.
    pub rows: u32,
}

impl Plan {
    /// Every sequence that has new tokens has one split.
    pub fn is_single(&self) -> bool {
        let mut sequences: Vec<u32> = self.splits.iter().map(|split| split.sequence).collect();
        sequences.sort();
        sequences.windows(2).all(|two| two[0] != two[1])
    }
}

/// A split of fewer tokens costs more in its queries and its merging than its tokens do.
const LEAST_TOKENS: u32 = 64;
/// Tokens of a split where a sequence's own length sets the borders.
const OWN_TOKENS: u32 = 256;
/// The most workgroups of a grid's dimension.
const MOST_DISPATCHED: usize = 65_535;

/// Pages of one sequence that follow each other in one chunk.
struct Run {
    chunk: u32,
    begin: u32,
    end: u32,
}

/// One sequence's cut: its index, its runs, and the pages of a split.
struct Cut {
    sequence: usize,
    runs: Vec<Run>,
    step: u32,
}

impl Target {
    /// Rows of `partials`, in tokens, that suffice for every step of at most `tokens` new tokens, `each`
    /// a sequence, in `sequences` sequences whose contexts hold `pages` pages together and at most
    /// `most_pages` each, where a sequence changes chunks no more often than there are chunks.
    pub fn partials_for(&self, tokens: u32, each: u32, sequences: u32, pages: u32, most_pages: u32) -> u32 {
        let runs = pages.div_ceil(self.chunk_pages).min(MOST_SPLITS) + 1;
        match self.borders {
            // A split has tokens * heads rows, and there are about `workgroups` blocks of rows.
            Borders::Balanced => (self.workgroups * self.rows).div_ceil(self.heads) + tokens.saturating_mul(runs),
            Borders::Own => {
                let least = (OWN_TOKENS / self.page).max(1);
                let one = (most_pages.div_ceil(least) + runs).min(MOST_SPLITS);
                let all = pages.div_ceil(least).saturating_add(sequences.saturating_mul(runs));
                tokens.saturating_mul(one).min(each.saturating_mul(all))
            }
        }
    }

    /// Blocks of so many rows of a sequence's new tokens: each reads every one of its pages.
    fn blocks(&self, sequence: &Sequence, rows: u32) -> u64 {
        u64::from((sequence.tokens * self.heads).div_ceil(rows))
    }

    fn pages(&self, sequence: &Sequence) -> u32 {
        (sequence.position + sequence.tokens).div_ceil(self.page)
    }

    /// Rows of a block for a step.
    fn rows_for(&self, batch: &[Sequence]) -> u32 {
        let pairs = |s: &Sequence| u64::from(s.tokens * self.heads) * u64::from(s.position + s.tokens);
        let work: u64 = batch.iter().map(pairs).sum();
        let blocks = |rows: u32| batch.iter().map(|s| self.blocks(s, rows)).sum::<u64>();
        let suits = |little: &Little| work <= little.most && blocks(little.rows) <= u64::from(self.workgroups);
        self.little.filter(suits).map_or(self.rows, |little| little.rows)
    }

    /// The pages of the largest split.
    fn step(&self, batch: &[Sequence]) -> u32 {
        let work = |s: &Sequence| self.blocks(s, self.rows) * u64::from(self.pages(s));
        let share = batch.iter().map(work).sum::<u64>().div_ceil(u64::from(self.workgroups.max(1)));
        (share as u32).max(LEAST_TOKENS.div_ceil(self.page))
    }

    fn own_step(&self, sequence: &Sequence) -> u32 {
        let length = sequence.position + sequence.tokens;
        let tokens = OWN_TOKENS * length.div_ceil(OWN_TOKENS * MOST_SPLITS);
        (tokens / self.page).max(1)
    }

    fn runs(&self, sequence: &Sequence, table: &[u32]) -> Vec<Run> {
        let pages = &table[sequence.pages as usize..][..self.pages(sequence) as usize];
        let mut runs: Vec<Run> = Vec::new();
        for (i, page) in (0..).zip(pages) {
            let chunk = page / self.chunk_pages;
            match runs.last_mut() {
                Some(run) if run.chunk == chunk => run.end = i + 1,
                _ => runs.push(Run { chunk, begin: i, end: i + 1 }),
            }
        }
        runs
    }
}

impl Cut {
    /// The pages where splits begin and end.
    fn pieces(&self, borders: Borders) -> Vec<(u32, u32, u32)> {
        let mut pieces = Vec::new();
        for Run { chunk, begin, end } in &self.runs {
            let (begin, end) = (*begin, *end);
            if borders == Borders::Balanced {
                let (length, count) = (end - begin, (end - begin).div_ceil(self.step));
                let border = |i: u32| begin + (u64::from(i) * u64::from(length) / u64::from(count)) as u32;
                pieces.extend((0..count).map(|i| (*chunk, border(i), border(i + 1))));
            } else {
                let mut at = begin;
                while at < end {
                    let next = ((at / self.step + 1) * self.step).min(end);
                    pieces.push((*chunk, at, next));
                    at = next;
                }
            }
        }
        pieces
    }

    /// How many splits it has.
    fn count(&self, borders: Borders) -> u32 {
        let of_run = |run: &Run| match borders {
            Borders::Balanced => (run.end - run.begin).div_ceil(self.step),
            Borders::Own => (run.end - 1) / self.step - run.begin / self.step + 1,
        };
        self.runs.iter().map(of_run).sum()
    }
}

/// Cuts the contexts of a step, and sets each sequence's `first_partial` and `splits`. The pages of
/// sequence `s` stand in `table` from entry `s.pages` on. A sequence without new tokens has no splits.
///
/// # Errors
/// [`Error::Fragmented`] when a sequence lies in more runs of pages than `mla_combine` merges, and
/// [`Error::Capacity`] when the splits do not fit the partials.
pub fn plan(batch: &mut [Sequence], table: &[u32], target: &Target) -> Result<Plan> {
    let target = &Target { rows: target.rows_for(batch), ..target.clone() };
    let step = target.step(batch);
    let mut cuts = Vec::new();
    for (sequence, s) in batch.iter_mut().enumerate() {
        (s.first_partial, s.splits) = (0, 0);
        if s.tokens == 0 {
            continue;
        }
        let step = if target.borders == Borders::Own { target.own_step(s) } else { step };
        let mut cut = Cut { sequence, runs: target.runs(s, table), step };
        if cut.runs.len() > MOST_SPLITS as usize {
            return Err(Error::Fragmented { sequence, runs: cut.runs.len(), most: MOST_SPLITS as usize });
        }
        while cut.count(target.borders) > MOST_SPLITS {
            cut.step += cut.step.div_ceil(8);
        }
        cuts.push(cut);
    }
    let partials = |cuts: &[Cut], batch: &[Sequence]| -> u64 {
        let rows = |cut: &Cut| u64::from(batch[cut.sequence].tokens) * u64::from(cut.count(target.borders));
        cuts.iter().map(rows).sum()
    };
    let longest = batch.iter().map(|s| target.pages(s)).max().unwrap_or(0);
    while partials(&cuts, batch) > u64::from(target.partials) {
        // Coarser for all; what the sequence's own length set may not depend on the others.
        let coarsest = cuts.iter().all(|cut| cut.step >= longest);
        if coarsest || target.borders == Borders::Own {
            let (asked, limit) = (partials(&cuts, batch), u64::from(target.partials));
            return Err(Error::Capacity { what: "rows of mla_decode's partials".into(), asked, limit });
        }
        cuts.iter_mut().for_each(|cut| cut.step += cut.step.div_ceil(8));
    }
    Ok(lay_out(batch, &cuts, target))
}

/// Numbers the splits' partials and puts those of one chunk together.
fn lay_out(batch: &mut [Sequence], cuts: &[Cut], target: &Target) -> Plan {
    let mut plan = Plan { rows: target.rows, ..Plan::default() };
    let mut splits: Vec<(u32, Split)> = Vec::new();
    for cut in cuts {
        let sequence = &mut batch[cut.sequence];
        sequence.first_partial = plan.partials;
        for (chunk, begin, end) in cut.pieces(target.borders) {
            let end = (end * target.page).min(sequence.position + sequence.tokens);
            let (begin, partial) = (begin * target.page, plan.partials);
            splits.push((chunk, Split { sequence: cut.sequence as u32, begin, end, partial }));
            plan.partials += sequence.tokens;
            sequence.splits += 1;
        }
    }
    // A long workgroup that starts last would keep the others waiting.
    splits.sort_by_key(|(chunk, split)| (*chunk, Reverse(split.end - split.begin)));
    for of_chunk in splits.chunk_by(|a, b| a.0 == b.0) {
        for part in of_chunk.chunks(MOST_DISPATCHED) {
            let first_split = plan.splits.len() as u32;
            plan.dispatches.push(Dispatch { chunk: part[0].0 as usize, first_split, splits: part.len() as u32 });
            plan.splits.extend(part.iter().map(|(_, split)| *split));
        }
    }
    plan
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::inputs::Inputs;

    fn target(page: u32, chunk_pages: u32, borders: Borders) -> Target {
        let (heads, rows, workgroups) = (16, 16, 264);
        Target { page, chunk_pages, heads, rows, little: None, workgroups, partials: 1 << 24, borders }
    }

    /// A batch of (position, tokens) whose pages are as `page_of` says.
    fn batch(
        lengths: &[(u32, u32)],
        page: u32,
        mut page_of: impl FnMut(usize, u32) -> u32,
    ) -> (Vec<Sequence>, Vec<u32>) {
        let (mut batch, mut table, mut first_row) = (Vec::new(), Vec::new(), 0);
        for (i, (position, tokens)) in lengths.iter().enumerate() {
            let pages = table.len() as u32;
            batch.push(Sequence { position: *position, tokens: *tokens, first_row, pages, ..Sequence::default() });
            table.extend((0..(position + tokens).div_ceil(page)).map(|p| page_of(i, p)));
            first_row += tokens;
        }
        (batch, table)
    }

    /// Every visible token is in exactly one split, no split crosses a chunk or starts within a page,
    /// and partials do not overlap.
    fn check(batch: &[Sequence], table: &[u32], target: &Target, plan: &Plan) {
        let mut rows = vec![false; plan.partials as usize];
        for (index, s) in batch.iter().enumerate() {
            let mut splits: Vec<&Split> = plan.splits.iter().filter(|p| p.sequence == index as u32).collect();
            splits.sort_by_key(|split| split.begin);
            assert_eq!(splits.len() as u32, s.splits);
            assert!(s.splits <= MOST_SPLITS);
            let mut at = 0;
            for (i, split) in (0..).zip(&splits) {
                assert_eq!(split.begin, at, "a gap or an overlap in sequence {index}");
                assert!(split.end > split.begin && split.begin % target.page == 0);
                assert_eq!(split.partial, s.first_partial + i * s.tokens);
                for row in split.partial..split.partial + s.tokens {
                    assert!(!std::mem::replace(&mut rows[row as usize], true), "partial row {row} has two writers");
                }
                at = split.end;
            }
            assert_eq!(at, if s.tokens == 0 { 0 } else { s.position + s.tokens });
        }
        assert!(rows.iter().all(|written| *written));
        let mut next = 0;
        for dispatch in &plan.dispatches {
            assert_eq!(dispatch.first_split, next);
            next += dispatch.splits;
            for split in &plan.splits[dispatch.first_split as usize..next as usize] {
                let first = batch[split.sequence as usize].pages;
                for page in split.begin / target.page..split.end.div_ceil(target.page) {
                    assert_eq!((table[(first + page) as usize] / target.chunk_pages) as usize, dispatch.chunk);
                }
            }
        }
        assert_eq!(next as usize, plan.splits.len());
    }

    #[test]
    fn drawn_batches_are_covered_once() {
        let mut inputs = Inputs::seed(5);
        for round in 0..300 {
            let page = [16, 32, 64, 128][round % 4];
            let borders = [Borders::Balanced, Borders::Own][round / 4 % 2];
            let target = target(page, 1 + inputs.below(200), borders);
            let lengths: Vec<(u32, u32)> = (0..1 + inputs.below(12))
                .map(|_| {
                    let most = [1, 100, 5000, 140_000][inputs.below(4) as usize];
                    (inputs.below(most), inputs.below(9))
                })
                .collect();
            // Runs of pages in one chunk, as the allocator gives them.
            let (mut batch, table) = batch(&lengths, page, |i, p| p + i as u32 * 37);
            match plan(&mut batch, &table, &target) {
                Ok(plan) => check(&batch, &table, &target, &plan),
                Err(Error::Fragmented { runs, most, .. }) => assert!(runs > most && target.chunk_pages < 40),
                Err(other) => panic!("{other}"),
            }
        }
    }

    #[test]
    fn splits_are_no_longer_than_an_even_share() {
        let target = target(64, 1 << 20, Borders::Balanced);
        for lengths in [vec![(4095, 1); 128], vec![(131_071, 1)], vec![(100_000, 8), (63, 1), (64, 1), (9000, 2)]] {
            let (mut batch, table) = batch(&lengths, 64, |i, p| p + i as u32 * 3000);
            let plan = plan(&mut batch, &table, &target).unwrap();
            check(&batch, &table, &target, &plan);
            let pages = |s: &Sequence| u64::from((s.position + s.tokens).div_ceil(64));
            let work: u64 = batch.iter().map(|s| u64::from(s.tokens) * pages(s)).sum();
            let longest = plan.splits.iter().map(|s| u64::from((s.end - s.begin).div_ceil(64))).max().unwrap();
            let share = work.div_ceil(264);
            let capped = batch.iter().map(|s| pages(s).div_ceil(256)).max().unwrap();
            assert!(longest <= share.max(capped) * 9 / 8 + 1, "{longest} pages, an even share is {share}");
            // As many workgroups as fill the device, and for each sequence at most one block of rows more.
            let workgroups: u32 = plan.splits.iter().map(|s| batch[s.sequence as usize].tokens).sum();
            let blocks: u32 = batch.iter().map(|s| s.tokens).sum();
            assert!(workgroups <= 264 + blocks && workgroups * 2 >= 264.min(work as u32));
        }
    }

    #[test]
    fn one_token_is_one_split_and_no_token_none() {
        let target = target(64, 10, Borders::Balanced);
        let (mut batch, table) = batch(&[(0, 1), (500, 0), (0, 8)], 64, |i, p| p + i as u32 * 10);
        let plan = plan(&mut batch, &table, &target).unwrap();
        check(&batch, &table, &target, &plan);
        assert_eq!(batch.iter().map(|s| s.splits).collect::<Vec<_>>(), [1, 0, 1]);
        assert!(plan.is_single());
        assert_eq!(plan.partials, 9);
        let none = Plan { rows: target.rows, ..Plan::default() };
        assert_eq!(super::plan(&mut [], &[], &target).unwrap(), none);
    }

    #[test]
    fn own_borders_do_not_depend_on_the_batch() {
        let target = target(64, 1 << 20, Borders::Own);
        let lengths = [(4095, 1), (131_071, 1), (77, 4), (200_000, 2)];
        let borders_of = |lengths: &[(u32, u32)], index: u32| -> Vec<(u32, u32)> {
            let (mut batch, table) = batch(lengths, 64, |i, p| p + i as u32 * 5000);
            let plan = plan(&mut batch, &table, &target).unwrap();
            check(&batch, &table, &target, &plan);
            let mut own: Vec<_> =
                plan.splits.iter().filter(|s| s.sequence == index).map(|s| (s.begin, s.end)).collect();
            own.sort();
            own
        };
        for (i, length) in (0..).zip(lengths) {
            assert_eq!(borders_of(&lengths, i), borders_of(&[length], 0));
        }
    }

    #[test]
    fn pages_all_over_the_chunks_are_refused_and_partials_bounded() {
        let mut target = target(16, 4, Borders::Balanced);
        let (mut batch, table) = batch(&[(16 * 300, 1)], 16, |_, p| p % 2 * 4);
        let error = plan(&mut batch, &table, &target).unwrap_err().to_string();
        assert!(error.contains("301") && error.contains("256"), "{error}");
        let (mut batch, table) = super::tests::batch(&[(16 * 4000, 8)], 16, |_, p| p);
        (target.chunk_pages, target.partials) = (1 << 20, 80);
        let plan = plan(&mut batch, &table, &target).unwrap();
        check(&batch, &table, &target, &plan);
        assert!(plan.partials <= 80 && plan.partials >= 60 && !plan.is_single());
        target.partials = 7;
        let error = super::plan(&mut batch, &table, &target).unwrap_err().to_string();
        assert!(error.contains("asked for 8") && error.contains('7'), "{error}");
    }

    #[test]
    fn the_rows_of_partials_that_are_promised_suffice() {
        for borders in [Borders::Balanced, Borders::Own] {
            for lengths in [vec![(4095, 1); 64], vec![(140_000, 8)], vec![(1, 3), (70_000, 1), (100, 8)]] {
                let mut target = target(64, 500, borders);
                let (mut batch, table) = batch(&lengths, 64, |i, p| p + i as u32 * 2300);
                let pages = |s: &Sequence| (s.position + s.tokens).div_ceil(64);
                let tokens = batch.iter().map(|s| s.tokens).sum();
                let each = batch.iter().map(|s| s.tokens).max().unwrap();
                let (all, most) = (batch.iter().map(pages).sum(), batch.iter().map(pages).max().unwrap());
                target.partials = target.partials_for(tokens, each, batch.len() as u32, all, most);
                let plan = plan(&mut batch, &table, &target).unwrap();
                check(&batch, &table, &target, &plan);
            }
        }
    }
}
