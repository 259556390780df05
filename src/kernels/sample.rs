//! `sample`: the next token of each sequence, chosen on the device, and one small record of the choice.
//!
//! The steps and their order are those of Hugging Face transformers (`_get_logits_processor` in
//! generation/utils.py): repetition penalty (`RepetitionPenaltyLogitsProcessor`: Keskar et al.,
//! arXiv:1909.05858, section 4.1; once for each id of prompt and output), temperature, top-k, top-p
//! (Holtzman et al., arXiv:1904.09751; the probabilities are those within top-k, and the token that
//! crosses the border stays), min-p (Nguyen et al., arXiv:2407.01082). Of equal logits the lower id
//! goes first, so temperature 0 is the argmax with the lowest id.
//!
//! The random number is Philox-2x32-10 of (seed, position), in integers, so it is the same everywhere:
//! the same seed gives the same text on every adapter, but where it falls within rounding (about 1e-6)
//! of the border of two tokens, or a logit that close to the border of a filter. Tokens whose logits
//! differ by less than 6e-8 temperatures count as equal to the filters.
//!
//! The log-probabilities are of the softmax of the raw logits, before penalty and temperature: what the
//! model says. A logit that is NaN or infinite sets the flag of the record and counts as absent, as
//! does one of -3e38 and below (masks); where none is left, the token is 0 and its log-probability -3e38.

use std::sync::Arc;

use super::inputs::{Inputs, strided, words};
use super::{Case, Check, Choice, Data, Field, Job, Kernel, Row, Sequence, Set, Tensor, Tolerance, Variant};
use crate::gpu::{Caps, Host, Recording, Shader, Source, View, grid_1d};
use crate::reference::sample::{Filters, Sampled};
use crate::{Error, Result, reference, wgsl};

params! {
    /// Sizes of a call.
    pub struct Params {
        /// Rows of logits.
        pub rows: u32,
        /// Ids, at most 262,144.
        pub vocabulary: u32,
        /// Elements from one row of logits to the next, a multiple of 4.
        pub stride: u32,
    }
}

/// How a sequence's tokens are chosen. Lives in the storage buffer `samplers`, at the sequence's slot.
/// The default is greedy.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]
pub struct Sampler {
    /// Divides the logits; 0 takes the greatest.
    pub temperature: f32,
    /// Keeps the so many most probable tokens; 0 for all.
    pub top_k: u32,
    /// Keeps the most probable tokens that together have this probability; 1 for all.
    pub top_p: f32,
    /// Keeps the tokens with at least this share of the greatest probability; 0 for all.
    pub min_p: f32,
    /// Divides the positive logits of ids that were seen, multiplies the negative ones; 1 for none.
    pub repetition_penalty: f32,
    /// Rounds it up to 32 bytes.
    pub unused: [u32; 3],
}

impl Default for Sampler {
    fn default() -> Sampler {
        Sampler { temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0, repetition_penalty: 1.0, unused: [0; 3] }
    }
}

impl Sampler {
    /// Holds its numbers against their ranges.
    ///
    /// # Errors
    /// [`Error::Usage`], which names the number.
    pub fn check(&self) -> Result<()> {
        let numbers = [
            ("temperature", self.temperature, self.temperature >= 0.0, "a number from 0 (greedy) on"),
            ("top-p", self.top_p, (0.0..=1.0).contains(&self.top_p), "a probability from 0 to 1 (all)"),
            ("min-p", self.min_p, (0.0..=1.0).contains(&self.min_p), "a share from 0 (all) to 1"),
            ("repeat-penalty", self.repetition_penalty, self.repetition_penalty > 0.0, "a number over 0 (1: none)"),
        ];
        for (what, found, fits, expected) in numbers {
            if !fits || !found.is_finite() {
                let (what, expected) = (what.into(), expected.into());
                return Err(Error::Usage { what, expected, found: found.to_string() });
            }
        }
        Ok(())
    }

    fn filters(&self) -> Filters {
        Filters {
            temperature: f64::from(self.temperature),
            top_k: self.top_k as usize,
            top_p: f64::from(self.top_p),
            min_p: f64::from(self.min_p),
            penalty: f64::from(self.repetition_penalty),
        }
    }
}

/// The most ids of a vocabulary.
pub const MOST_VOCABULARY: u32 = 1 << 18;

/// What is read back of a row: an element of `records`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]
pub struct Record {
    /// The chosen id.
    pub token: u32,
    /// Its log-probability (natural logarithm) by the raw logits.
    pub logprob: f32,
    /// 1 where a logit of the row is NaN or infinite, else 0.
    pub non_finite: u32,
    /// The most probable ids, most probable first; the vocabulary's size where there are fewer.
    pub top_tokens: [u32; 5],
    /// Their log-probabilities; -3e38 where there are fewer.
    pub top_logprobs: [f32; 5],
    /// Rounds it up to 64 bytes.
    pub unused: [u32; 3],
}

/// What stands for the log-probability of no token.
const NOTHING: f32 = -3e38;

/// Nothing of it is fixed by the model.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spec;

/// How it runs.
#[derive(Clone, Debug)]
pub struct Tuning {
    /// Invocations a workgroup: a power of two, 16 to 1024.
    pub workgroup: u32,
}

/// What a call reads and writes.
pub struct Args {
    /// `[sequences]` [`Sequence`].
    pub batch: View,
    /// `[rows]` [`Row`]: whose logits each row has, at which position. Rows of one call are of different slots.
    pub rows: View,
    /// `[slots]` [`Sampler`].
    pub samplers: View,
    /// `[rows, stride]` f32.
    pub logits: View,
    /// `[slots, ceil(vocabulary / 32)]` u32, bit `id % 32` of word `id / 32` for each id of prompt and output
    /// ([`seen`]); the chosen ids are added.
    pub seen: View,
    /// `[rows]` u32, written: the chosen ids, for `embed` of the next step.
    pub tokens: View,
    /// `[rows]` [`Record`], written.
    pub records: View,
}

/// The words of a slot's `seen` after the ids of a prompt; ids outside the vocabulary count nothing.
pub fn seen(vocabulary: u32, ids: &[u32]) -> Vec<u32> {
    let mut words = vec![0; vocabulary.div_ceil(32) as usize];
    for id in ids.iter().filter(|id| **id < vocabulary) {
        words[*id as usize / 32] |= 1 << (id % 32);
    }
    words
}

/// The kernel `sample`.
pub struct Sample {
    shader: Arc<Shader>,
}

impl Kernel for Sample {
    const NAME: &'static str = "sample";
    const SOURCE: Source = wgsl!("sample");
    const PARAMS: &'static [Field] = Params::FIELDS;
    type Spec = Spec;
    type Tuning = Tuning;

    fn variants(_: &Spec, caps: &Caps) -> Vec<Variant<Tuning>> {
        let workgroup = 1 << caps.invocations.min(256).ilog2();
        let mut variants = vec![Variant { name: "portable", tuning: Tuning { workgroup } }];
        // Two arrays of 1024 bins, and three words a lane for sums.
        if caps.invocations >= 1024 && caps.workgroup_bytes >= 24 << 10 {
            variants.push(Variant { name: "wide", tuning: Tuning { workgroup: 1024 } });
        }
        variants
    }

    fn tuning(spec: &Spec, caps: &Caps) -> Choice<Tuning> {
        let mut variants = Self::variants(spec, caps);
        let wide = variants.len() > 1 && !caps.is_software();
        let why = if wide { "a row has one workgroup: more loads are under way" } else { "short barriers" };
        Choice { variant: variants.remove(usize::from(wide)), why: why.into() }
    }

    fn new(_: &Spec, tuning: &Tuning) -> Sample {
        let shader = Shader::of(Self::SOURCE)
            .u32("WORKGROUP", tuning.workgroup)
            .module(wgsl!("lib/batch"))
            .module(wgsl!("lib/sampler"))
            .module(wgsl!("lib/sample_cut"))
            .module(wgsl!("lib/reduce_shared"));
        Sample { shader: shader.build() }
    }

    fn shader(&self) -> &Arc<Shader> {
        &self.shader
    }

    fn cases(set: Set) -> Vec<Case<Sample>> {
        cases(set)
    }
}

impl Sample {
    /// Chooses the next token of each row.
    ///
    /// # Panics
    /// When the stride is no multiple of 4 or less than the vocabulary, or that is 0 or over 262,144.
    pub fn record(&self, recording: &mut Recording, params: Params, args: Args) {
        let Params { rows, vocabulary, stride } = params;
        assert!((1..=MOST_VOCABULARY).contains(&vocabulary), "sample: a vocabulary of {vocabulary}, not 1 to 262,144");
        assert!(stride.is_multiple_of(4) && stride >= vocabulary, "sample: stride {stride} for {vocabulary} ids");
        let bindings = vec![
            ("batch", args.batch),
            ("rows", args.rows),
            ("samplers", args.samplers),
            ("logits", args.logits),
            ("seen", args.seen),
            ("tokens", args.tokens),
            ("records", args.records),
        ];
        let twin = move |host: &Host| twin(params, host);
        recording.call(&self.shader, bindings, bytemuck::bytes_of(&params), grid_1d(rows), twin);
    }
}

fn twin(params: Params, host: &Host) {
    let (batch, samplers) = (host.get::<Sequence>("batch"), host.get::<Sampler>("samplers"));
    let logits = host.get::<f32>("logits");
    let words = params.vocabulary.div_ceil(32) as usize;
    for (i, row) in host.get::<Row>("rows")[..params.rows as usize].iter().enumerate() {
        let Sequence { slot, seed, .. } = batch[row.sequence as usize];
        let seen = &host.get::<u32>("seen")[slot as usize * words..][..words];
        let logits = &logits[i * params.stride as usize..][..params.vocabulary as usize];
        let share = reference::sample::share(seed, row.position);
        let was_seen = |id: usize| seen[id / 32] >> (id % 32) & 1 == 1;
        let sampled = reference::sample::sample(logits, was_seen, &samplers[slot as usize].filters(), share);
        let word = sampled.token / 32;
        host.set("seen", slot as usize * words + word, &[seen[word] | 1 << (sampled.token % 32)]);
        host.set("tokens", i, &[sampled.token as u32]);
        host.set("records", i, &[record_of(&sampled, params.vocabulary)]);
    }
}

fn record_of(sampled: &Sampled, vocabulary: u32) -> Record {
    let top = |i: usize| sampled.top.get(i).map_or((vocabulary, NOTHING), |(id, p)| (*id as u32, *p as f32));
    Record {
        token: sampled.token as u32,
        logprob: sampled.logprob.map_or(NOTHING, |p| p as f32),
        non_finite: sampled.non_finite.into(),
        top_tokens: std::array::from_fn(|i| top(i).0),
        top_logprobs: std::array::from_fn(|i| top(i).1),
        unused: [0; 3],
    }
}

/// How a case's logits are drawn.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Draw {
    /// Normal, with this standard deviation.
    Normal(f32),
    /// From five values, so that many are equal.
    Ties,
    /// All the same.
    Flat,
    /// Rows with NaN, infinities and masks, and one of nothing else.
    Broken,
}

/// A case: the rows take the samplers in turn, each row a sequence of its own.
#[derive(Clone)]
struct Shape {
    vocabulary: usize,
    rows: usize,
    draw: Draw,
    samplers: Vec<Sampler>,
}

fn cases(set: Set) -> Vec<Case<Sample>> {
    use Draw::{Broken, Flat, Normal, Ties};
    let greedy = Sampler::default();
    let plain = Sampler { temperature: 1.0, ..greedy };
    let full = Sampler { temperature: 0.7, top_k: 50, top_p: 0.9, min_p: 0.02, repetition_penalty: 1.1, ..greedy };
    let nucleus = Sampler { temperature: 0.8, top_p: 0.95, ..greedy };
    let case = |vocabulary, rows, draw, samplers: &[Sampler]| {
        Shape { vocabulary, rows, draw, samplers: samplers.to_vec() }.case()
    };
    if set == Set::Timed {
        let timed = [greedy, plain, nucleus, full].map(|sampler| case(129_280, 1, Normal(3.0), &[sampler]));
        return timed.into_iter().chain([case(129_280, 64, Normal(3.0), &[full])]).collect();
    }
    let all = [
        greedy,
        plain,
        Sampler { temperature: 1.5, top_k: 5, ..greedy },
        nucleus,
        Sampler { temperature: 1.2, min_p: 0.1, ..greedy },
        Sampler { repetition_penalty: 1.8, ..greedy },
        Sampler { temperature: 1.0, repetition_penalty: 0.6, ..greedy },
        full,
        Sampler { temperature: 0.9, top_k: 40, top_p: 0.5, ..greedy },
        Sampler { temperature: 1.3, top_p: 0.8, min_p: 0.05, ..greedy },
        Sampler { top_k: 1, repetition_penalty: 1.3, ..plain },
        Sampler { top_p: 0.0, ..plain },
        Sampler { temperature: 1e-6, top_k: 1000, ..greedy },
        Sampler { temperature: 50.0, top_k: 1 << 20, top_p: 0.999, min_p: 1e-4, ..greedy },
    ];
    vec![
        case(1, 14, Normal(2.0), &all),
        case(2, 28, Normal(2.0), &all),
        case(5, 28, Ties, &all),
        case(31, 28, Normal(2.0), &all),
        case(33, 300, Normal(1.0), &all),
        case(8, 260, Flat, &[plain]),
        case(1000, 14, Ties, &all),
        case(257, 28, Broken, &all),
        case(4096, 14, Broken, &all),
        case(32_003, 14, Normal(3.0), &all),
        case(32_000, 6, Flat, &[greedy, plain, nucleus, full, Sampler { top_k: 7, ..plain }]),
        case(129_280, 2, Normal(3.0), &[greedy, plain]),
        case(129_280, 3, Normal(2.0), &[nucleus, full, Sampler { top_k: 100_000, top_p: 0.99, ..plain }]),
        case(262_144, 1, Normal(0.1), &[Sampler { top_p: 0.7, ..plain }]),
        case(151_936, 2, Ties, &[Sampler { top_k: 40_000, ..plain }, Sampler { top_p: 0.3, ..plain }]),
    ]
}

impl Shape {
    fn case(self) -> Case<Sample> {
        let Shape { vocabulary, rows, draw, .. } = &self;
        let samplers = match self.samplers.as_slice() {
            [one] => format!("{one:?}"),
            several => format!("{} samplers", several.len()),
        };
        let name = format!("{rows} rows of {vocabulary}, {draw:?}, {samplers}");
        let (logits, moved) = ((rows * vocabulary) as f64, 4.0 * (rows * vocabulary) as f64);
        Case::new(name, Spec, 50.0 * logits, move || self.job()).moving(moved)
    }

    fn job(&self) -> Job<Sample> {
        let Shape { vocabulary, rows, .. } = *self;
        let mut inputs = Inputs::seed((vocabulary * 31 + rows) as u64);
        let (stride, words_a_slot) = (vocabulary.next_multiple_of(4) + 4, vocabulary.div_ceil(32));
        // The slots are not in the order of the rows, and there is one more that stays as it is.
        let slots = rows + 1;
        let (mut batch, mut of_rows, mut logits) = (Vec::new(), Vec::new(), Vec::new());
        let mut samplers = vec![Sampler::default(); slots];
        let seen: Vec<u32> = (0..slots * words_a_slot)
            .map(|word| {
                let kept = vocabulary - 32 * (word % words_a_slot);
                let bits = inputs.below(u32::MAX) & inputs.below(u32::MAX);
                if kept < 32 { bits & ((1 << kept) - 1) } else { bits }
            })
            .collect();
        for row in 0..rows {
            let slot = (slots - 1 - row) as u32;
            let sampler = self.samplers[row % self.samplers.len()];
            samplers[slot as usize] = sampler;
            let own = self.logits(row, &mut inputs);
            let seen = &seen[slot as usize * words_a_slot..];
            let position = 17 * row as u32;
            let seed = seed(&own, seen, &sampler, position);
            batch.push(Sequence { slot, seed, tokens: 1, first_row: row as u32, position, ..Sequence::default() });
            of_rows.push(Row { sequence: row as u32, position });
            logits.extend(own);
        }
        let params = Params { rows: rows as u32, vocabulary: vocabulary as u32, stride: stride as u32 };
        let tensors = vec![
            Tensor::input("batch", words(&batch)),
            Tensor::input("rows", words(&of_rows)),
            Tensor::input("samplers", words(&samplers)),
            Tensor::input("logits", Data::F32(strided(&logits, vocabulary, stride))),
            Tensor::output("seen", Data::U32(seen), Check::rows(words_a_slot, Tolerance::EXACT)),
            Tensor::output("tokens", Data::poison_u32(rows), Check::rows(1, Tolerance::EXACT)),
            Tensor::checked("records", Data::poison(rows * RECORD), checks(vocabulary)),
        ];
        Job::new(tensors, move |kernel: &Sample, t, recording| {
            let args = Args {
                batch: t.get("batch"),
                rows: t.get("rows"),
                samplers: t.get("samplers"),
                logits: t.get("logits"),
                seen: t.get("seen"),
                tokens: t.get("tokens"),
                records: t.get("records"),
            };
            kernel.record(recording, params, args);
        })
    }

    fn logits(&self, row: usize, inputs: &mut Inputs) -> Vec<f32> {
        let count = self.vocabulary;
        match self.draw {
            Draw::Normal(scale) => inputs.normals(count, scale),
            Draw::Ties => (0..count).map(|_| [-1.0, 0.5, -0.0, 0.0, 2.0][inputs.below(5) as usize]).collect(),
            Draw::Flat => vec![0.25; count],
            Draw::Broken => {
                let mut logits = inputs.normals(count, 2.0);
                let values = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MIN];
                let end = if row == 3 { count } else { row % 7 };
                for i in 0..end {
                    let at = if row == 3 { i } else { inputs.below(count as u32) as usize };
                    logits[at] = values[(row + i) % 4];
                }
                logits
            }
        }
    }
}

/// Words of a record.
const RECORD: usize = size_of::<Record>() / 4;

/// A record's words are ids, compared bit by bit, and log-probabilities, each by itself. Where few ids share
/// all the probability, the logarithm of one near 1 is a difference of larger numbers.
fn checks(vocabulary: usize) -> Vec<Check> {
    let close = Tolerance { zero: 1e-6, ..Tolerance::nmse(if vocabulary < 64 { 1e-7 } else { 1e-11 }) };
    let of = |first| if first == 1 || first >= 8 { close } else { Tolerance::EXACT };
    (0..13).map(|first| Check { stride: RECORD, first, columns: 1, tolerance: of(first) }).collect()
}

/// A seed whose token stays where a little more or less of all that is rounded.
fn seed(logits: &[f32], seen: &[u32], sampler: &Sampler, position: u32) -> u32 {
    const SLACK: f64 = 1e-6;
    let (filters, first) = (sampler.filters(), position.wrapping_mul(0x9E37_79B9));
    let order = reference::sample::order(logits, |id| seen[id / 32] >> (id % 32) & 1 == 1, filters.penalty);
    if filters.temperature == 0.0 || order.is_empty() {
        return first;
    }
    let kept = [1.0, 1.0 - SLACK, 1.0 + SLACK].map(|factor| {
        let top_p = if filters.top_p < 1.0 { filters.top_p * factor } else { 1.0 };
        let min_p = (filters.min_p * factor).min(1.0);
        reference::sample::keep(&order, &Filters { top_p, min_p, ..filters })
    });
    let stays = |seed: &u32| {
        let share = reference::sample::share(*seed, position);
        let token = |kept, slack: f64| reference::sample::draw(kept, (share + slack).max(0.0));
        let wanted = token(&kept[0], 0.0);
        kept.iter().all(|kept| [-SLACK, SLACK].iter().all(|slack| token(kept, *slack) == wanted))
    };
    (first..=u32::MAX).take(200).find(stays).expect("a seed whose token is not on a border")
}
