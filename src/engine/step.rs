//! One step of a model: which tokens of which sequences, recorded and submitted, with the next tokens
//! sampled behind it. What is read back is one record a sequence.

use std::sync::Arc;

use super::cache::{Cache, CacheShape, check_page};
use super::fact::Fact;
use super::options::Options;
use super::pages::SequenceId;
use super::run_until;
use crate::error::{Error, Result};
use crate::gpu::{Device, Reading, Recording, View};
use crate::kernels::pieces::{Piece, Pieces};
use crate::kernels::plan::{self, Borders, Dispatch, MOST_ROWS, Plan, Target};
use crate::kernels::sample::{self, Record, Sample, Sampler};
use crate::kernels::{CacheChunk, Kernel, Row, Sequence, Span, Split};
use crate::model::Model;
use crate::model::forward::{Forward, Limits, Step};
use crate::model::plan::{check_bindings, halved, logits_rows, step_tokens};

/// Where a step's ids come from.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Ids<'a> {
    Given(&'a [u32]),
    /// The last step sampled them: one a sequence, in the same order.
    Sampled,
}

/// What a recording depends on; all else is in buffers.
#[derive(Clone, PartialEq)]
pub(super) struct Shape {
    pub(super) tokens: u32,
    most_tokens: u32,
    logits: u32,
    sampled_ids: bool,
    samples: Option<usize>,
    dispatches: Vec<Dispatch>,
    /// Of a block of attention.
    block_rows: u32,
    pieces: Vec<Piece>,
    sequences: usize,
}

/// A model with its cache on one device.
pub struct Engine {
    pub(super) device: Device,
    pub(super) model: Model,
    pub(super) options: Options,
    /// New tokens of a step, at most.
    pub(super) step_tokens: u32,
    /// Rows of logits of a step, at most.
    logits: u32,
    pub(super) forward: Forward,
    cache: Cache,
    sampler: Sample,
    target: Target,
    facts: Facts,
    /// The last recording of each turn: the next step of the same shape submits it again.
    recorded: [Option<(Shape, Arc<Recording>)>; 2],
    /// Which of the two buffers of records the next step writes.
    turn: usize,
}

/// The buffers of a step's facts.
struct Facts {
    batch: Fact,
    rows: Fact,
    ids: Fact,
    block_table: Fact,
    splits: Fact,
    spans: Fact,
    picked: Fact,
    /// `[logits]` [`Row`], of the picked rows.
    picked_rows: Fact,
    samplers: View,
    seen: View,
    /// The sampled ids.
    tokens: View,
    /// [`Record`]s, of this step and of the one before it.
    records: [View; 2],
}

impl Engine {
    /// Allocates all memory that steps need.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], and [`Error::Usage`] for numbers that make no sense.
    pub fn new(device: &Device, model: Model, options: &Options) -> Result<Engine> {
        check_bindings(&model.config, options.format, device.caps())?;
        check_page(options.page)?;
        let usual = step_tokens(&model.config, Some(device.caps())).max(options.sequences);
        let step_tokens = options.step_tokens.unwrap_or(usual);
        let numbers = [
            ("the context", options.context, 1),
            ("sequences", options.sequences, 1),
            ("tokens of a step", step_tokens, options.sequences),
        ];
        for (what, found, least) in numbers {
            if found < least {
                let (expected, found) = (format!("at least {least}"), found.to_string());
                return Err(Error::Usage { what: what.into(), expected, found });
            }
        }
        let (mla, heads) = (&model.config.mla, model.config.mla.heads);
        let sequence_pages = options.context.div_ceil(options.page);
        // A page more for each sequence: one that stops sharing its last page holds both for a moment.
        let pages = (sequence_pages + 1) * options.sequences;
        let shape = CacheShape {
            layers: model.config.attentions(),
            latent: mla.latent,
            rope: mla.rope,
            format: options.format,
            page: options.page,
            pages,
            most_tokens: options.context,
        };
        let cache = Cache::new(device, &shape)?;
        let mut target = Target {
            page: options.page,
            chunk_pages: cache.chunk_pages(),
            heads,
            rows: MOST_ROWS,
            little: None,
            workgroups: plan::workgroups(device.caps()),
            partials: 0,
            borders: if options.deterministic { Borders::Own } else { Borders::Balanced },
        };
        let step_tokens = step_tokens.min(options.context * options.sequences);
        let partials = |tokens| target.partials_for(tokens, tokens, options.sequences, pages, sequence_pages);
        // Contexts that their own length alone splits have many splits.
        let row = u64::from(4 * heads * (mla.latent + 4));
        let fit = |tokens| row * u64::from(partials(tokens)) <= device.caps().bound_bytes();
        let step_tokens = halved(step_tokens, options.step_tokens.unwrap_or(options.sequences), fit);
        target.partials = partials(step_tokens);
        // Prompts need logits of their last token alone; more at a time are a matter of `Engine::logits`.
        let affordable = logits_rows(model.config.vocab, Some(device.caps()));
        let logits = affordable.clamp(options.sequences, step_tokens);
        let limits = Limits {
            tokens: step_tokens,
            sequences: options.sequences,
            usual_tokens: 1,
            logits,
            partials: target.partials,
            context: options.context,
            page: options.page,
            format: options.format,
            decode: options.decode,
            prefill: options.prefill,
            piece: options.piece,
        };
        let forward = Forward::new(device, &model, &limits)?;
        target.rows = forward.decoder().rows();
        // Attention's bits are the same in any batch where its kernel is.
        target.little = forward.decoder().little().filter(|_| !options.deterministic);
        target.workgroups = forward.decoder().workgroups(device.caps());
        let alloc = |bytes: u64, label: &str| Ok(device.alloc_bound(bytes, label)?.view());
        let of = |count: u32, size: usize, label: &str| alloc(u64::from(count) * size as u64, label);
        let fact = |count, size, label| Ok::<_, Error>(Fact::new(of(count, size, label)?));
        let records = |label| of(logits, size_of::<Record>(), label);
        let slots = options.sequences;
        let facts = Facts {
            batch: fact(slots, size_of::<Sequence>(), "batch")?,
            rows: fact(step_tokens, size_of::<Row>(), "rows")?,
            ids: fact(step_tokens, 4, "ids")?,
            block_table: fact(pages, 4, "block table")?,
            splits: fact(target.partials, size_of::<Split>(), "splits")?,
            spans: fact(forward.most_spans(&limits).max(1), size_of::<Span>(), "spans")?,
            picked: fact(logits, 4, "picked rows")?,
            picked_rows: fact(logits, size_of::<Row>(), "facts of picked rows")?,
            samplers: of(slots, size_of::<Sampler>(), "samplers")?,
            seen: of(slots, 4 * model.config.vocab.div_ceil(32) as usize, "seen ids")?,
            tokens: of(logits, 4, "sampled ids")?,
            records: [records("records of even steps")?, records("records of odd steps")?],
        };
        let sampler = Sample::chosen(&sample::Spec, device.caps());
        let options = options.clone();
        let device = device.clone();
        Ok(Engine {
            device,
            model,
            options,
            step_tokens,
            logits,
            forward,
            cache,
            sampler,
            target,
            facts,
            recorded: [None, None],
            turn: 0,
        })
    }

    /// The model.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// The device.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// What it was allocated for.
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// Tokens that a sequence has in the cache.
    pub fn tokens(&self, id: SequenceId) -> usize {
        self.cache.pages().tokens(id)
    }

    /// A new sequence, with the sampler of its next tokens.
    ///
    /// # Errors
    /// [`Error::Capacity`] where there are as many as the engine was allocated for; faults of the driver.
    pub fn create(&mut self, sampler: &Sampler) -> Result<SequenceId> {
        sampler.check()?;
        let id = self.cache.create();
        if id.slot() >= self.options.sequences {
            self.cache.free(id);
            let limit = u64::from(self.options.sequences);
            return Err(Error::Capacity { what: "sequences".into(), asked: limit + 1, limit });
        }
        self.device.write(&self.facts.samplers, u64::from(id.slot()) * size_of::<Sampler>() as u64, &[*sampler])?;
        self.see(id, &[])?;
        Ok(id)
    }

    /// Sets the ids that the repetition penalty of a sequence counts; those it samples are added.
    ///
    /// # Errors
    /// Faults of the driver.
    pub fn see(&mut self, id: SequenceId, ids: &[u32]) -> Result<()> {
        let words = sample::seen(self.model.config.vocab, ids);
        self.device.write(&self.facts.seen, u64::from(id.slot()) * size_of_val(&words[..]) as u64, &words)
    }

    /// Forgets a sequence.
    pub fn free(&mut self, id: SequenceId) {
        self.cache.free(id);
    }

    /// Forgets a sequence's tokens from `tokens` on.
    pub fn truncate(&mut self, id: SequenceId, tokens: usize) {
        self.cache.truncate(id, tokens);
    }

    /// Appends `ids` to a sequence, in as many steps as they need, and with `sample` samples its next
    /// token with `seed`. What was read before the last step is awaited.
    ///
    /// # Errors
    /// [`Error::Capacity`] and [`Error::OutOfPages`] where they do not fit, [`Error::Usage`] for an id outside
    /// the vocabulary, and faults of the driver. A step that does not fit leaves every sequence as it was.
    pub async fn feed(&mut self, id: SequenceId, ids: &[u32], seed: u32) -> Result<Reading> {
        self.check(id, ids)?;
        let mut parts = ids.chunks(self.step_tokens as usize).peekable();
        while let Some(part) = parts.next() {
            if parts.peek().is_some() {
                self.submit(&[(id, part.len() as u32, seed)], Ids::Given(part), &[]).await?;
            } else {
                let last = part.len() as u32 - 1;
                return self.sample(&[(id, part.len() as u32, seed)], Ids::Given(part), &[last]).await;
            }
        }
        unreachable!("some ids were checked to be there")
    }

    /// The next token of each sequence, from the one that the last step sampled for it. The sequences are
    /// those of that step, in its order; with the seed of each.
    ///
    /// # Errors
    /// As [`Engine::feed`].
    pub async fn decode(&mut self, sequences: &[(SequenceId, u32)]) -> Result<Reading> {
        let work: Vec<(SequenceId, u32, u32)> = sequences.iter().map(|(id, seed)| (*id, 1, *seed)).collect();
        let picked: Vec<u32> = (0..work.len() as u32).collect();
        self.sample(&work, Ids::Sampled, &picked).await
    }

    /// The records of a step, once it has run.
    ///
    /// # Errors
    /// Faults of the driver.
    pub async fn records(&self, reading: Reading) -> Result<Vec<Record>> {
        let bytes = self.device.finish(reading).await?.remove(0);
        Ok(bytemuck::pod_collect_to_vec(&bytes))
    }

    /// Appends `ids` to a sequence and gives the logits of each, `[ids, vocab]`.
    ///
    /// # Errors
    /// As [`Engine::feed`].
    pub async fn logits(&mut self, id: SequenceId, ids: &[u32]) -> Result<Vec<f32>> {
        self.check(id, ids)?;
        let (vocab, stride) = (self.model.config.vocab as usize, self.forward.logits.stride as usize);
        let mut all = Vec::with_capacity(ids.len() * vocab);
        for part in ids.chunks(self.step_tokens.min(self.logits) as usize) {
            let picked: Vec<u32> = (0..part.len() as u32).collect();
            self.submit(&[(id, part.len() as u32, 0)], Ids::Given(part), &picked).await?;
            let bytes = self.device.read(std::slice::from_ref(&self.forward.logits.view)).await?.remove(0);
            let logits: Vec<f32> = bytemuck::pod_collect_to_vec(&bytes);
            all.extend(logits.chunks(stride).take(part.len()).flat_map(|row| &row[..vocab]));
        }
        Ok(all)
    }

    pub(super) fn check(&self, id: SequenceId, ids: &[u32]) -> Result<()> {
        let (length, context) = (self.tokens(id) + ids.len(), self.options.context as usize);
        if length > context {
            let (asked, limit) = (length as u64, context as u64);
            return Err(Error::Capacity { what: "tokens in a context".into(), asked, limit });
        }
        let vocab = self.model.config.vocab;
        if let Some(id) = ids.iter().find(|id| **id >= vocab) {
            let expected = format!("below the vocabulary's {vocab}");
            return Err(Error::Usage { what: "a token id".into(), expected, found: id.to_string() });
        }
        if ids.is_empty() {
            let (what, expected, found) = ("the tokens".into(), "at least one".into(), "none".into());
            return Err(Error::Usage { what, expected, found });
        }
        Ok(())
    }

    /// Makes room in the cache, writes the step's facts, and submits it. Each of `work` is a sequence, its
    /// new tokens, and its seed.
    async fn submit(&mut self, work: &[(SequenceId, u32, u32)], ids: Ids<'_>, picked: &[u32]) -> Result<()> {
        let (shape, plan) = self.prepare(work, ids, picked, false)?;
        let recording = self.recording(shape, &plan).await?;
        match &self.options.reference_until {
            Some(stage) => run_until(&self.device, &recording, stage).await,
            None => self.device.submit(&recording),
        }
    }

    /// As [`Engine::submit`], with the next token of each sequence sampled from a picked row, in order.
    async fn sample(&mut self, work: &[(SequenceId, u32, u32)], ids: Ids<'_>, picked: &[u32]) -> Result<Reading> {
        let (shape, plan) = self.prepare(work, ids, picked, true)?;
        let records = [self.facts.records[self.turn].part(0, (picked.len() * size_of::<Record>()) as u64)];
        let recording = self.recording(shape, &plan).await?;
        let reading = match &self.options.reference_until {
            Some(stage) => {
                run_until(&self.device, &recording, stage).await?;
                self.device.start_read(&records)?
            }
            None => self.device.submit_reading(&recording, &records)?,
        };
        self.turn = 1 - self.turn;
        Ok(reading)
    }

    /// What a step of that shape submits.
    async fn recording(&mut self, shape: Shape, plan: &Plan) -> Result<Arc<Recording>> {
        let turn = self.turn;
        match &self.recorded[turn] {
            Some((of, recording)) if *of == shape => Ok(recording.clone()),
            _ => {
                let recording = Arc::new(self.record(&shape, plan));
                self.device.prepare(&recording).await?;
                self.recorded[turn] = Some((shape, recording.clone()));
                Ok(recording)
            }
        }
    }

    /// Makes room in the cache and writes the step's facts. Where one of them fails no sequence has new tokens:
    /// nobody would write their records.
    pub(super) fn prepare(
        &mut self,
        work: &[(SequenceId, u32, u32)],
        ids: Ids<'_>,
        picked: &[u32],
        sample: bool,
    ) -> Result<(Shape, Plan)> {
        let held: Vec<usize> = work.iter().map(|(id, ..)| self.tokens(*id)).collect();
        let written = self.write(work, ids, picked, sample);
        if written.is_err() {
            work.iter().zip(held).for_each(|((id, ..), tokens)| self.truncate(*id, tokens));
        }
        written
    }

    fn write(
        &mut self,
        work: &[(SequenceId, u32, u32)],
        ids: Ids<'_>,
        picked: &[u32],
        sample: bool,
    ) -> Result<(Shape, Plan)> {
        for (id, tokens, _) in work {
            self.cache.append(*id, *tokens as usize)?;
        }
        let counts: Vec<(SequenceId, u32)> = work.iter().map(|(id, tokens, _)| (*id, *tokens)).collect();
        let (mut batch, table) = self.cache.batch(&counts);
        batch.iter_mut().zip(work).for_each(|(sequence, (.., seed))| sequence.seed = *seed);
        let pieces = if ids == Ids::Sampled { None } else { self.forward.pieces(&batch) };
        let (plan, pieces) = match pieces {
            Some(pieces) => (Plan::default(), pieces),
            None => (plan::plan(&mut batch, &table, &self.target)?, Pieces::default()),
        };
        let rows = Sequence::rows(&batch);
        let picked_rows: Vec<Row> = picked.iter().map(|row| rows[*row as usize]).collect();
        let (facts, device) = (&mut self.facts, &self.device);
        facts.batch.write(device, &batch)?;
        facts.rows.write(device, &rows)?;
        facts.block_table.write(device, &table)?;
        facts.splits.write(device, &plan.splits)?;
        facts.spans.write(device, &pieces.spans)?;
        if let Ids::Given(ids) = ids {
            facts.ids.write(device, ids)?;
        }
        facts.picked.write(device, picked)?;
        facts.picked_rows.write(device, &picked_rows)?;
        let shape = Shape {
            tokens: rows.len() as u32,
            most_tokens: batch.iter().map(|s| s.tokens).max().unwrap_or(0),
            logits: picked.len() as u32,
            sampled_ids: ids == Ids::Sampled,
            samples: sample.then_some(self.turn),
            dispatches: plan.dispatches.clone(),
            block_rows: plan.rows,
            pieces: pieces.pieces,
            sequences: work.len(),
        };
        Ok((shape, plan))
    }

    /// The latent cache of each attention.
    pub(super) fn caches(&self) -> Vec<&[CacheChunk]> {
        (0..self.model.config.attentions()).map(|i| self.cache.latent(i)).collect()
    }

    /// What the forward pass needs to know of a step.
    pub(super) fn step<'a>(&'a self, shape: &'a Shape, plan: &'a Plan, cache: &'a [&'a [CacheChunk]]) -> Step<'a> {
        let facts = &self.facts;
        Step {
            batch: facts.batch.view.clone(),
            rows: facts.rows.view.clone(),
            ids: if shape.sampled_ids { facts.tokens.clone() } else { facts.ids.view.clone() },
            block_table: facts.block_table.view.clone(),
            splits: facts.splits.view.clone(),
            spans: facts.spans.view.clone(),
            picked: facts.picked.view.clone(),
            plan,
            pieces: &shape.pieces,
            tokens: shape.tokens,
            most_tokens: shape.most_tokens,
            logits: shape.logits,
            cache,
        }
    }

    pub(super) fn record(&self, shape: &Shape, plan: &Plan) -> Recording {
        let facts = &self.facts;
        let cache = self.caches();
        let mut recording = Recording::new();
        self.forward.record(&mut recording, &self.model, &self.step(shape, plan, &cache));
        if let Some(turn) = shape.samples {
            recording.stage("sample");
            let params = sample::Params {
                rows: shape.logits,
                vocabulary: self.model.config.vocab,
                stride: self.forward.logits.stride,
            };
            let args = sample::Args {
                batch: facts.batch.view.clone(),
                rows: facts.picked_rows.view.clone(),
                samplers: facts.samplers.clone(),
                logits: self.forward.logits.view.clone(),
                seen: facts.seen.clone(),
                tokens: facts.tokens.clone(),
                records: facts.records[turn].clone(),
            };
            self.sampler.record(&mut recording, params, args);
        }
        recording
    }
}
