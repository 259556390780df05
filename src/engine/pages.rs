//! Who holds which page of the latent cache: block tables, a free list, reference counts. It holds no
//! tensors: the pages' numbers are the same for each layer.

use crate::error::{Error, Result};

/// A sequence in the cache. Never given out twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SequenceId {
    slot: u32,
    generation: u32,
}

impl SequenceId {
    /// Its slot in per-sequence state; another sequence may have it once this one is freed.
    pub fn slot(self) -> u32 {
        self.slot
    }
}

/// A page whose records must be copied before the sequence's next ones are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageCopy {
    /// The shared page.
    pub from: u32,
    /// The sequence's own.
    pub to: u32,
}

/// One sequence's pages.
#[derive(Clone, Debug, Default)]
struct Table {
    pages: Vec<u32>,
    tokens: usize,
}

/// The bookkeeping of a paged cache.
#[derive(Debug)]
pub struct Pages {
    page: usize,
    chunk_pages: usize,
    most_tokens: usize,
    /// How many tables hold a page.
    holders: Vec<u32>,
    /// Free pages of each chunk, the lowest last.
    free: Vec<Vec<u32>>,
    /// Slots: the generation that the next sequence in it gets, and the one that is there.
    slots: Vec<(u32, Option<Table>)>,
}

impl Pages {
    /// `total` pages of `page` tokens, `chunk_pages` of them in one buffer, for sequences of at most
    /// `most_tokens` tokens.
    pub fn new(total: usize, page: usize, chunk_pages: usize, most_tokens: usize) -> Pages {
        let chunk = |first: usize| (first..(first + chunk_pages).min(total)).rev().map(|p| p as u32).collect();
        let free = (0..total).step_by(chunk_pages.max(1)).map(chunk).collect();
        Pages { page, chunk_pages, most_tokens, holders: vec![0; total], free, slots: Vec::new() }
    }

    /// Tokens a page.
    pub fn page(&self) -> usize {
        self.page
    }

    /// Pages of the cache.
    pub fn total(&self) -> usize {
        self.holders.len()
    }

    /// Pages that nobody holds.
    pub fn free_pages(&self) -> usize {
        self.free.iter().map(Vec::len).sum()
    }

    /// An empty sequence. It holds no page yet.
    pub fn create(&mut self) -> SequenceId {
        self.put(Table::default())
    }

    fn put(&mut self, table: Table) -> SequenceId {
        let found = self.slots.iter().position(|(_, held)| held.is_none());
        let slot = found.unwrap_or_else(|| {
            self.slots.push((0, None));
            self.slots.len() - 1
        });
        self.slots[slot].1 = Some(table);
        SequenceId { slot: slot as u32, generation: self.slots[slot].0 }
    }

    fn table(&self, id: SequenceId) -> &Table {
        let (generation, table) = &self.slots[id.slot as usize];
        assert!(*generation == id.generation, "{id:?} was freed");
        table.as_ref().expect("a freed slot has another generation")
    }

    fn table_mut(&mut self, id: SequenceId) -> &mut Table {
        self.table(id);
        self.slots[id.slot as usize].1.as_mut().expect("just looked")
    }

    /// The numbers of a sequence's pages, in the order of its tokens.
    ///
    /// # Panics
    /// Here and below, when the sequence was freed: a fault of the caller.
    pub fn pages(&self, id: SequenceId) -> &[u32] {
        &self.table(id).pages
    }

    /// Tokens of a sequence.
    pub fn tokens(&self, id: SequenceId) -> usize {
        self.table(id).tokens
    }

    /// Makes room for `tokens` more tokens. Where the last page is partly used and shared, the sequence
    /// gets one of its own, and the records must be copied to it.
    ///
    /// # Errors
    /// [`Error::Capacity`] beyond the longest context, [`Error::OutOfPages`] where too few are free.
    /// Nothing has changed then.
    pub fn append(&mut self, id: SequenceId, tokens: usize) -> Result<Option<PageCopy>> {
        let Table { pages, tokens: held } = self.table(id);
        let (held, last) = (*held, pages.last().copied());
        let length = held + tokens;
        if length > self.most_tokens {
            let (asked, limit) = (length as u64, self.most_tokens as u64);
            return Err(Error::Capacity { what: "tokens in a context".into(), asked, limit });
        }
        let shared = |page: &u32| tokens > 0 && held % self.page != 0 && self.holders[*page as usize] > 1;
        let copied = last.filter(shared);
        let asked = length.div_ceil(self.page) - pages.len() + usize::from(copied.is_some());
        let free = self.free_pages();
        if asked > free {
            return Err(Error::OutOfPages { asked, free, total: self.total() });
        }
        let mut near = last;
        let copy = copied.map(|from| {
            let to = self.take(near);
            self.release(from);
            *self.table_mut(id).pages.last_mut().expect("it has a last page") = to;
            near = Some(to);
            PageCopy { from, to }
        });
        for _ in usize::from(copy.is_some())..asked {
            let page = self.take(near);
            self.table_mut(id).pages.push(page);
            near = Some(page);
        }
        self.table_mut(id).tokens = length;
        Ok(copy)
    }

    /// A free page: from the chunk of `near`, since no split crosses a chunk, or else from the one with
    /// the most free pages.
    fn take(&mut self, near: Option<u32>) -> u32 {
        let near = near.map(|page| page as usize / self.chunk_pages).filter(|chunk| !self.free[*chunk].is_empty());
        let most = || (0..self.free.len()).rev().max_by_key(|chunk| self.free[*chunk].len());
        let chunk = near.or_else(most).expect("a cache with free pages has a chunk");
        let page = self.free[chunk].pop().expect("the free pages were counted");
        self.holders[page as usize] = 1;
        page
    }

    fn release(&mut self, page: u32) {
        let holders = &mut self.holders[page as usize];
        *holders -= 1;
        if *holders == 0 {
            self.free[page as usize / self.chunk_pages].push(page);
        }
    }

    /// A sequence that starts with the first `tokens` tokens of another and shares their pages.
    ///
    /// # Panics
    /// When the other has fewer tokens.
    pub fn fork(&mut self, id: SequenceId, tokens: usize) -> SequenceId {
        let table = self.table(id);
        assert!(tokens <= table.tokens, "a fork of {tokens} tokens of {}", table.tokens);
        let pages = table.pages[..tokens.div_ceil(self.page)].to_vec();
        pages.iter().for_each(|page| self.holders[*page as usize] += 1);
        self.put(Table { pages, tokens })
    }

    /// Forgets the tokens from `tokens` on, and the pages that held only those.
    ///
    /// # Panics
    /// When the sequence has fewer tokens.
    pub fn truncate(&mut self, id: SequenceId, tokens: usize) {
        let keep = tokens.div_ceil(self.page);
        let table = self.table_mut(id);
        assert!(tokens <= table.tokens, "truncated to {tokens} tokens of {}", table.tokens);
        table.tokens = tokens;
        let freed = table.pages.split_off(keep);
        freed.into_iter().rev().for_each(|page| self.release(page));
    }

    /// Forgets a sequence.
    pub fn free(&mut self, id: SequenceId) {
        self.truncate(id, 0);
        let slot = &mut self.slots[id.slot as usize];
        *slot = (slot.0 + 1, None);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, HashMap};

    use super::*;

    /// The cache's memory and what each sequence should hold.
    struct Model {
        pages: Pages,
        memory: Vec<Vec<u64>>,
        sequences: BTreeMap<SequenceId, Vec<u64>>,
        next: u64,
    }

    impl Model {
        fn new(total: usize, page: usize, chunk_pages: usize, most: usize) -> Model {
            let pages = Pages::new(total, page, chunk_pages, most);
            Model { pages, memory: vec![vec![0; page]; total], sequences: BTreeMap::new(), next: 1 }
        }

        fn append(&mut self, id: SequenceId, tokens: usize) -> Result<()> {
            if let Some(PageCopy { from, to }) = self.pages.append(id, tokens)? {
                self.memory[to as usize] = self.memory[from as usize].clone();
            }
            let held = self.sequences.get_mut(&id).unwrap();
            for _ in 0..tokens {
                let at = held.len();
                let page = self.pages.pages(id)[at / self.pages.page];
                self.memory[page as usize][at % self.pages.page] = self.next;
                held.push(self.next);
                self.next += 1;
            }
            Ok(())
        }

        fn check(&self) {
            let mut holders: HashMap<u32, u32> = HashMap::new();
            for (id, held) in &self.sequences {
                let table = self.pages.pages(*id);
                assert_eq!(self.pages.tokens(*id), held.len());
                assert_eq!(table.len(), held.len().div_ceil(self.pages.page));
                for (at, token) in held.iter().enumerate() {
                    let found = self.memory[table[at / self.pages.page] as usize][at % self.pages.page];
                    assert_eq!(found, *token, "token {at} of {id:?} was overwritten");
                }
                table.iter().for_each(|page| *holders.entry(*page).or_default() += 1);
            }
            for (page, count) in (0..).zip(&self.pages.holders) {
                assert_eq!(holders.get(&page).copied().unwrap_or(0), *count, "holders of page {page}");
            }
            let mut free: Vec<u32> = self.pages.free.concat();
            free.sort();
            let unheld: Vec<u32> = (0..self.pages.total() as u32).filter(|page| !holders.contains_key(page)).collect();
            assert_eq!(free, unheld, "free pages");
        }
    }

    #[test]
    fn drawn_steps_lose_no_page_and_overwrite_no_token() {
        for seed in 0..60 {
            let mut rng = fastrand::Rng::with_seed(seed);
            let page = [4, 16, 64][seed as usize % 3];
            let total = rng.usize(1..40);
            let most = page * rng.usize(1..20);
            let mut model = Model::new(total, page, rng.usize(1..12), most);
            for _ in 0..400 {
                let ids: Vec<SequenceId> = model.sequences.keys().copied().collect();
                let id = (!ids.is_empty()).then(|| ids[rng.usize(..ids.len())]);
                match (rng.u32(..10), id) {
                    (0..=1, _) | (_, None) => {
                        let id = model.pages.create();
                        assert!(model.sequences.insert(id, Vec::new()).is_none(), "{id:?} was given out before");
                    }
                    (2..=5, Some(id)) => {
                        let tokens = rng.usize(..2 * page);
                        let (before, free) = (model.pages.table(id).pages.clone(), model.pages.free_pages());
                        match model.append(id, tokens) {
                            Ok(()) => {}
                            Err(Error::OutOfPages { asked, free: told, total: all }) => {
                                assert!(asked > told && told == free && all == total);
                                assert_eq!(before, model.pages.table(id).pages);
                            }
                            Err(Error::Capacity { asked, limit, .. }) => assert!(asked > limit && limit == most as u64),
                            Err(other) => panic!("{other}"),
                        }
                    }
                    (6, Some(id)) => {
                        let tokens = rng.usize(..=model.sequences[&id].len());
                        let fork = model.pages.fork(id, tokens);
                        let held = model.sequences[&id][..tokens].to_vec();
                        assert!(model.sequences.insert(fork, held).is_none());
                    }
                    (7..=8, Some(id)) => {
                        let held = model.sequences.get_mut(&id).unwrap();
                        let tokens = rng.usize(..=held.len());
                        held.truncate(tokens);
                        model.pages.truncate(id, tokens);
                    }
                    (_, Some(id)) => {
                        model.pages.free(id);
                        model.sequences.remove(&id);
                    }
                }
                model.check();
            }
            std::mem::take(&mut model.sequences).into_keys().for_each(|id| model.pages.free(id));
            assert_eq!(model.pages.free_pages(), total, "pages are lost when all sequences are gone");
        }
    }

    #[test]
    fn a_sequence_stays_in_one_chunk_while_that_has_pages() {
        let mut pages = Pages::new(40, 64, 10, 10_000);
        let (a, b) = (pages.create(), pages.create());
        for _ in 0..10 {
            pages.append(a, 64).unwrap();
            pages.append(b, 64).unwrap();
        }
        let chunks = |pages: &Pages, id| {
            let mut chunks: Vec<u32> = pages.pages(id).iter().map(|page| page / 10).collect();
            chunks.dedup();
            chunks
        };
        assert_eq!((chunks(&pages, a).len(), chunks(&pages, b).len()), (1, 1));
        assert_ne!(chunks(&pages, a), chunks(&pages, b));
        pages.append(a, 640).unwrap();
        assert_eq!(chunks(&pages, a).len(), 2);
    }

    #[test]
    fn errors_say_what_was_asked_and_what_there_is() {
        let mut pages = Pages::new(3, 64, 2, 150);
        let (a, b) = (pages.create(), pages.create());
        pages.append(a, 100).unwrap();
        let error = pages.append(b, 100).unwrap_err().to_string();
        assert!(error.contains("asked for 2") && error.contains("1 of 3"), "{error}");
        let error = pages.append(a, 51).unwrap_err().to_string();
        assert!(error.contains("context") && error.contains("151") && error.contains("150"), "{error}");
        assert_eq!((pages.tokens(a), pages.tokens(b), pages.free_pages()), (100, 0, 1));
    }

    #[test]
    #[should_panic(expected = "was freed")]
    fn a_freed_sequence_is_not_found_by_the_next_in_its_slot() {
        let mut pages = Pages::new(3, 64, 2, 150);
        let old = pages.create();
        pages.free(old);
        assert_eq!(pages.create().slot(), old.slot());
        pages.tokens(old);
    }
}
