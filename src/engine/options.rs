//! What an engine is made for.

use crate::model::forward::{Decode, Prefill};
use crate::num::record::RecordFormat;

/// What an engine is allocated for.
#[derive(Clone, Debug)]
pub struct Options {
    /// Tokens of the longest context, prompt and answer together.
    pub context: u32,
    /// Sequences at a time.
    pub sequences: u32,
    /// New tokens of a step, where not as many as suit the device: longer prompts go in several.
    pub step_tokens: Option<u32>,
    /// Tokens of a cache page: 16, 32, 64 or 128.
    pub page: u32,
    /// How the cache stores records.
    pub format: RecordFormat,
    /// How attention over the cache runs.
    pub decode: Decode,
    /// How attention of prompts runs.
    pub prefill: Prefill,
    /// Tokens whose keys and values are expanded at a time, where it is fewer than memory is set aside for.
    pub piece: Option<u32>,
    /// Attention sums in an order that a sequence's own length sets: over the same cache it gives the same bits alone
    /// and in any batch. Products with weights do not promise this, whose kernels follow the tokens of a step.
    pub deterministic: bool,
    /// The stages of a step that run on the CPU twins, up to this one, to find a fault.
    pub reference_until: Option<String>,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            context: 4096,
            sequences: 1,
            step_tokens: None,
            page: 64,
            format: RecordFormat::F16,
            decode: Decode::Auto,
            prefill: Prefill::Auto,
            piece: None,
            deterministic: false,
            reference_until: None,
        }
    }
}
