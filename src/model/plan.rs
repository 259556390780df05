//! How much memory a model takes, before anything is loaded.

use bytesize::ByteSize;

use super::config::{Config, Mla, Mlp, Moe};
use super::prefill::piece_bytes;
use super::tensors::{Expected, MlpTensors, MoeTensors, QueryTensors, Tensors};
use crate::gpu::Caps;
use crate::kernels::mla_decode::{self, MlaDecode};
use crate::kernels::plan::{MOST_ROWS, workgroups};
use crate::kernels::weights::WeightFormat;
use crate::kernels::{Kernel, gemm_coop, matrices};
use crate::num::record::RecordFormat;
use crate::weights::{Checkpoint, Dtype};
use crate::{Error, Result};

/// Tokens of a page of the latent cache.
pub const PAGE: u64 = 64;

/// Tokens of a prompt that one step takes without matrix units.
const LEAST_STEP: u32 = 256;
/// And at most with them, which want tiles that are full: each expert's share of a step's tokens fills some.
const MOST_STEP: u32 = 4096;
/// The memory of a step's activations, where it takes more than [`LEAST_STEP`]: a sixteenth of the weights in f16,
/// within these bounds.
const STEP_BYTES: (u64, u64) = (256 << 20, 3 << 29);

/// Tokens of a prompt that one step takes, as the engine does by default. Without a device it is that of the largest.
pub fn step_tokens(config: &Config, caps: Option<&Caps>) -> u32 {
    if caps.is_some_and(|caps| gemm_coop::refusal(caps).is_some()) {
        return LEAST_STEP;
    }
    let Row { all, widest } = row(config);
    let most = (config.parameters() / 8).clamp(STEP_BYTES.0, STEP_BYTES.1);
    let binding = caps.map_or(u64::MAX, Caps::bound_bytes);
    let bytes = |tokens: u32, values: u64| 4 * u64::from(tokens) * values;
    halved(MOST_STEP, LEAST_STEP, |tokens| bytes(tokens, all) <= most && bytes(tokens, widest) <= binding)
}

/// `tokens`, halved until they fit or are the least.
pub(crate) fn halved(mut tokens: u32, least: u32, fit: impl Fn(u32) -> bool) -> u32 {
    while tokens > least && !fit(tokens) {
        tokens = (tokens / 2).max(least);
    }
    tokens
}

/// What of the tokens before an attention keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Keys and values of every head.
    Mha,
    /// Keys and values that groups of heads share.
    Gqa,
    /// One latent and one rope key.
    Mla,
}

/// The widths that the size of a cache follows from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Widths {
    /// Attentions that keep something: the layers, in LongCat twice as many.
    pub layers: u64,
    /// Query heads.
    pub heads: u64,
    /// Key and value heads of grouped-query attention.
    pub groups: u64,
    /// Width of a key.
    pub key: u64,
    /// Width of a value.
    pub value: u64,
    /// Width of the latent.
    pub latent: u64,
    /// Width of the rope key.
    pub rope: u64,
    /// How the latent cache is stored; keys and values take 2, 4 or 1 bytes a number.
    pub format: RecordFormat,
}

impl Widths {
    /// The widths of a model; `groups` are those of a grouped-query attention beside it.
    pub fn of(config: &Config, groups: u64, format: RecordFormat) -> Widths {
        let mla = &config.mla;
        Widths {
            layers: config.attentions() as u64,
            heads: mla.heads.into(),
            groups,
            key: (mla.nope + mla.rope).into(),
            value: mla.value.into(),
            latent: mla.latent.into(),
            rope: mla.rope.into(),
            format,
        }
    }

    /// Bytes that a token leaves, in all layers.
    pub fn token_bytes(&self, kind: Kind) -> u64 {
        let number = match self.format {
            RecordFormat::F16 => 2,
            RecordFormat::F32 => 4,
            RecordFormat::Fp8 => 1,
        };
        self.layers
            * match kind {
                Kind::Mha => self.heads * (self.key + self.value) * number,
                Kind::Gqa => self.groups * (self.key + self.value) * number,
                Kind::Mla => self.format.bytes(self.latent as usize, self.rope as usize) as u64,
            }
    }
}

/// Memory that is asked for, and how much there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Bytes of the weights on the device.
    pub weights: u64,
    /// Bytes of what the steps compute with.
    pub scratch: u64,
    /// Bytes of the cache a token.
    pub token: u64,
    /// Tokens of each sequence.
    pub context: u64,
    /// Sequences.
    pub batch: u64,
    /// Bytes that there are, where that is known.
    pub memory: Option<u64>,
}

impl Plan {
    /// Bytes of the cache.
    pub fn cache(&self) -> u64 {
        let tokens = self.context.next_multiple_of(PAGE).saturating_mul(self.batch);
        self.token.saturating_mul(tokens)
    }

    /// All bytes.
    pub fn total(&self) -> u64 {
        self.weights.saturating_add(self.scratch).saturating_add(self.cache())
    }

    /// Tokens that there is memory for, in whole pages.
    fn tokens(&self) -> Option<u64> {
        let free = self.memory?.saturating_sub(self.weights.saturating_add(self.scratch));
        Some(free / (self.token * PAGE).max(1) * PAGE)
    }

    /// The longest context that fits for each of the sequences.
    pub fn largest_context(&self) -> Option<u64> {
        Some(self.tokens()? / (self.batch.max(1) * PAGE) * PAGE)
    }

    /// How many sequences of this context fit.
    pub fn largest_batch(&self) -> Option<u64> {
        Some(self.tokens()? / self.context.next_multiple_of(PAGE).max(PAGE))
    }

    /// Whether all fits; `None` where the memory is not known.
    pub fn fits(&self) -> Option<bool> {
        Some(self.total() <= self.memory?)
    }

    /// Refuses what does not fit; `whose` memory it is.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] with the numbers and the longest context that fits.
    pub fn check(&self, whose: &str) -> Result<()> {
        let (Some(memory), Some(false)) = (self.memory, self.fits()) else { return Ok(()) };
        let parts = [("weights", self.weights), ("cache", self.cache()), ("scratch", self.scratch)];
        let parts = parts.map(|(name, bytes)| format!("{} of {name}", human(bytes))).join(", ");
        let rest = match self.largest_context() {
            Some(0) | None => "weights and scratch leave no room for a context".into(),
            Some(tokens) => format!("the longest context that fits is {tokens} tokens"),
        };
        Err(Error::OutOfMemory {
            adapter: whose.into(),
            asked: format!("{} ({parts})", human(self.total())),
            offered: format!("of {}; {rest}", human(memory)),
        })
    }
}

/// Bytes as people write them, such as `1.5 GiB`.
pub fn human(bytes: u64) -> String {
    ByteSize::b(bytes).display().iec().to_string()
}

/// Bytes of a model's weights on a device, at most: bf16 and f16 tensors take two bytes a number there, f32
/// tensors four, as do norms, biases and routers. Without a checkpoint all others are taken for bf16.
pub fn weight_bytes(tensors: &Tensors, checkpoint: Option<&Checkpoint>) -> u64 {
    let found = |tensor: &Expected| checkpoint?.get(&tensor.name).map(|found| found.dtype);
    let format = |tensor: &Expected| match found(tensor) {
        Some(Dtype::F32) => WeightFormat::F32,
        _ => WeightFormat::Bf16,
    };
    let mut bytes: u64 = tensors.all().into_iter().map(|tensor| tensor_bytes(tensor, format(tensor))).sum();
    for layer in &tensors.layers {
        let moes = layer.blocks.iter().filter_map(|block| match &block.mlp {
            MlpTensors::Moe(moe) => Some(&**moe),
            MlpTensors::Dense(_) => None,
        });
        for MoeTensors { router, .. } in moes.chain(&layer.shortcut) {
            bytes += tensor_bytes(router, WeightFormat::F32) - tensor_bytes(router, format(router));
        }
        for block in &layer.blocks {
            // Rows of zeros between those of q_a and kv_a.
            let (QueryTensors::Whole(first) | QueryTensors::LowRank { q_a: first, .. }) = &block.attention.query;
            let rows = first.shape[0].next_multiple_of(4) - first.shape[0];
            bytes += (rows * format(first).row_bytes(first.shape[1])) as u64;
        }
    }
    bytes
}

fn tensor_bytes(tensor: &Expected, format: WeightFormat) -> u64 {
    match tensor.shape[..] {
        [.., _, columns] => (tensor.values() / columns * format.row_bytes(columns)) as u64,
        _ => 4 * tensor.values() as u64,
    }
}

/// The f32 that a token of a step takes between the kernels.
struct Row {
    /// Together.
    all: u64,
    /// Of the buffer that has most.
    widest: u64,
}

fn row(config: &Config) -> Row {
    let Mla { heads, latent, nope, rope, value, .. } = config.mla;
    let [heads, latent, nope, rope, value] = [heads, latent, nope, rope, value].map(u64::from);
    let hidden = u64::from(config.hidden);
    let query = heads * (nope + rope);
    let projections = match config.mla.q_rank.map(u64::from) {
        Some(rank) => 2 * rank + query,
        None => query,
    } + latent
        + rope;
    let (queries, partials) = (heads * (latent + rope + 8), 2 * heads * (latent + 4));
    let attention = projections + queries + partials + heads * value + heads;
    let dense = config.layers.iter().flat_map(|layer| &layer.mlps).map(|mlp| u64::from(mlp.width())).max().unwrap_or(0);
    let experts = moes(config).map(|moe| {
        let each = u64::from(moe.width) + hidden + 4;
        u64::from(moe.top_k) * each + u64::from(moe.experts + moe.identity) + hidden
    });
    let outputs = moes(config).map(|moe| u64::from(moe.top_k) * hidden.max(u64::from(moe.width)));
    let all = 5 * hidden + attention + dense + experts.max().unwrap_or(0);
    let widest =
        [query + latent + rope, queries, partials, dense, hidden].into_iter().chain(outputs).max().unwrap_or(0);
    Row { all, widest }
}

/// About how many bytes an engine computes with: the f32 activations between the kernels for [`step_tokens`], some of
/// them as f16 for matrix units, the parts that split contexts are merged from, the keys and values of a piece of a
/// prompt, the logits, and the pages that sequences hold for a moment when they stop sharing one. `token` are the
/// bytes of the cache a token, `context` the tokens of each of the `sequences`; without a device it is counted for
/// the largest.
pub fn scratch_bytes(config: &Config, caps: Option<&Caps>, token: u64, (context, sequences): (u64, u64)) -> u64 {
    let matrices = caps.is_none_or(|caps| gemm_coop::refusal(caps).is_none());
    let step = u64::from(step_tokens(config, caps));
    let tokens = step.max(sequences).min(context.saturating_mul(sequences)) as u32;
    let (latent, vocab) = (u64::from(config.mla.latent), u64::from(config.vocab));
    let logits = u64::from(tokens).min(logits_rows(config.vocab, caps).into()).max(sequences);
    let workgroups = caps.map_or(264, workgroups);
    let partials = u64::from(workgroups * MOST_ROWS) * (latent + 4);
    let pages = token * PAGE * (sequences + 1);
    let piece = piece_bytes(&config.mla, context.saturating_mul(sequences));
    let pairs = |moe: &Moe| {
        matrices::packed_bytes(tokens * moe.top_k, moe.width).max(matrices::packed_bytes(tokens, config.hidden))
    };
    let packed = match matrices {
        false => 0,
        true => matrices::packed_bytes(tokens, config.most_columns()) + moes(config).map(pairs).max().unwrap_or(0),
    };
    4 * (u64::from(tokens) * row(config).all + partials + logits * vocab) + packed + piece + pages
}

/// The most bytes of a step's logits, where one sequence does not need more.
const LOGITS_BYTES: u64 = 32 << 20;

/// Rows of logits that a step keeps at most, where its sequences do not need more: of so many bytes, and as one binding
/// of the device shows.
pub fn logits_rows(vocab: u32, caps: Option<&Caps>) -> u32 {
    let bytes = LOGITS_BYTES.min(caps.map_or(u64::MAX, Caps::bound_bytes));
    bytes as u32 / (4 * vocab.next_multiple_of(4))
}

/// Every mixture of experts.
fn moes(config: &Config) -> impl Iterator<Item = &Moe> {
    config.layers.iter().flat_map(|layer| {
        let inner = layer.mlps.iter().filter_map(|mlp| if let Mlp::Moe(moe) = mlp { Some(moe) } else { None });
        inner.chain(&layer.shortcut)
    })
}

/// Refuses a model of which a part that must stay in one binding is larger than bindings may be, or whose records,
/// stored in `format`, are larger than workgroup memory.
///
/// # Errors
/// [`Error::OutOfMemory`] naming the part.
pub fn check_bindings(config: &Config, format: RecordFormat, caps: &Caps) -> Result<()> {
    let Mla { heads, latent, rope, .. } = config.mla;
    if let Some(why) = MlaDecode::refusal(&mla_decode::Spec { latent, rope, format, rows: heads }, caps) {
        return Err(Error::OutOfMemory {
            adapter: caps.label(),
            asked: format!("records of {format:?} with kv_lora_rank {latent} and qk_rope_head_dim {rope}"),
            offered: format!("less than {why}"),
        });
    }
    let bytes = |rows: u32, columns: u32| (rows as usize * WeightFormat::Bf16.row_bytes(columns as usize)) as u64;
    let experts = moes(config).map(|moe| bytes(2 * moe.width, config.hidden).max(bytes(config.hidden, moe.width)));
    let head = bytes(config.mla.nope + config.mla.value, config.mla.latent);
    let limit = caps.bound_bytes();
    for (what, bytes) in [("an expert's matrix", experts.max().unwrap_or(0)), ("a head's up-projections", head)] {
        if bytes > limit {
            return Err(Error::OutOfMemory {
                adapter: caps.label(),
                asked: format!("{} for {what}", human(bytes)),
                offered: format!("its largest binding is {}", human(limit)),
            });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const WIDTHS: Widths = Widths {
        layers: 32,
        heads: 32,
        groups: 8,
        key: 128,
        value: 128,
        latent: 512,
        rope: 64,
        format: RecordFormat::F16,
    };
    const GIB: u64 = 1 << 30;

    #[test]
    fn a_step_has_as_many_tokens_as_memory_and_bindings_allow() {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/models/deepseek_v2_lite");
        let mut config = Config::open(&folder).unwrap();
        assert_eq!(step_tokens(&config, Some(&Caps::portable())), 256);
        assert_eq!(step_tokens(&config, Some(&Caps::matrices())), 4096);
        let widest = row(&config).widest;
        let cramped = Caps { binding_bytes: 4 * widest * 1024, ..Caps::matrices() };
        assert_eq!(step_tokens(&config, Some(&cramped)), 1024);
        let least = Caps { binding_bytes: 1 << 10, ..Caps::matrices() };
        assert_eq!(step_tokens(&config, Some(&least)), 256);
        // As wide as DeepSeek-V3, with few parameters.
        (config.hidden, config.mla.heads, config.mla.latent) = (7168, 128, 512);
        let tokens = step_tokens(&config, None);
        assert!((256..2048).contains(&tokens), "{tokens}");
        assert!(tokens == 256 || 4 * u64::from(tokens) * row(&config).all <= STEP_BYTES.0, "{tokens}");
        assert_eq!([100, 99, 25, 24].map(|most| halved(100, 25, |tokens| tokens <= most)), [100, 50, 25, 25]);
    }

    #[test]
    fn bytes_a_token_follow_from_the_widths() {
        let bytes = |widths: Widths| [Kind::Mha, Kind::Gqa, Kind::Mla].map(|kind| widths.token_bytes(kind));
        assert_eq!(bytes(WIDTHS), [32 * 16384, 32 * 4096, 32 * 1152]);
        assert_eq!(bytes(Widths { format: RecordFormat::F32, ..WIDTHS }), [32 * 32768, 32 * 8192, 32 * 2304]);
        assert_eq!(bytes(Widths { format: RecordFormat::Fp8, ..WIDTHS }), [32 * 8192, 32 * 2048, 32 * 656]);
    }

    #[test]
    fn what_fits_is_counted_in_whole_pages() {
        let token = WIDTHS.token_bytes(Kind::Mla);
        let plan = Plan { weights: 30 * GIB, scratch: GIB, token, context: 1000, batch: 2, memory: Some(40 * GIB) };
        // 1000 tokens take 16 pages of 64.
        assert_eq!((plan.cache(), plan.fits()), (token * 2048, Some(true)));
        let pages = 9 * GIB / (token * 64);
        assert_eq!(plan.largest_context(), Some(pages / 2 * 64));
        assert_eq!(plan.largest_batch(), Some(pages * 64 / 1024));
        assert!(plan.check("this").is_ok());
        let exact = Plan { context: pages / 2 * 64, ..plan };
        assert_eq!((exact.fits(), Plan { context: exact.context + 64, ..exact }.fits()), (Some(true), Some(false)));
        assert_eq!(Plan { memory: None, ..plan }.largest_context(), None);
    }

    #[test]
    fn records_that_workgroup_memory_does_not_hold_are_refused_before_loading() {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/models/deepseek_v2_lite");
        let mut config = Config::open(&folder).unwrap();
        let caps = Caps::portable();
        for format in RecordFormat::ALL {
            assert!(check_bindings(&config, format, &caps).is_ok());
        }
        config.mla.latent = 8192;
        let message = check_bindings(&config, RecordFormat::F16, &caps).unwrap_err().to_string();
        assert!(message.contains("kv_lora_rank 8192") && message.contains("workgroup memory"), "{message}");
    }

    #[test]
    fn what_does_not_fit_is_refused_with_the_numbers() {
        let plan = Plan { weights: 30 * GIB, scratch: GIB, token: 1 << 20, context: 4096, batch: 1, memory: None };
        let refused =
            |memory: u64| Plan { memory: Some(memory), ..plan }.check("--memory").expect_err("it is too much");
        let message = refused(32 * GIB).to_string();
        assert_eq!(
            message,
            "--memory: out of memory: asked for 35.0 GiB (30.0 GiB of weights, 4.0 GiB of cache, 1.0 GiB of scratch), \
             of 32.0 GiB; the longest context that fits is 1024 tokens"
        );
        assert!(refused(20 * GIB).to_string().ends_with("weights and scratch leave no room for a context"));
    }
}
