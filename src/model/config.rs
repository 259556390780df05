//! A model's configuration as plain numbers, read from `config.json` in either of the two styles that
//! are about: the hub's (`rope_theta`, `rope_scaling`) and transformers 5's (`rope_parameters`).
//!
//! Defaults are those of transformers 5.23.0 where published files leave a field out. Where a field
//! would change the mathematics and lamina does not follow, reading fails and names it.

use std::path::Path;

use serde_json::Value;

use super::families::Family;
use super::fields::Fields;
use super::read;
use super::rope::Rope;
use super::tensors::{ExpertLayout, Tensors};
use crate::kernels::moe_route::{self, Groups, Scoring};
use crate::kernels::weights::WeightFormat;
use crate::{Error, Result};

/// All that the forward pass needs to know of a model.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// The row of the table of families that it was read with.
    pub family: &'static Family,
    /// What stands before each tensor's name: empty, or `language_model.`.
    pub prefix: &'static str,
    /// Tensors of a wrapper that are no part of the text model, by how their names start.
    pub beside: &'static [&'static str],
    /// Token ids (`vocab_size`).
    pub vocab: u32,
    /// Width of the hidden state (`hidden_size`).
    pub hidden: u32,
    /// The longest context that it was made for (`max_position_embeddings`).
    pub max_context: u32,
    /// Whether the head's weights are the embedding's (`tie_word_embeddings`).
    pub tied: bool,
    /// Added to the mean square by the norms of the hidden state (`rms_norm_eps`).
    pub eps: f32,
    /// The attention, the same in every layer.
    pub mla: Mla,
    /// The layers, in order.
    pub layers: Vec<Layer>,
    /// Layers for multi-token prediction that follow in the checkpoint; they are skipped.
    pub mtp_layers: u32,
    /// Factor of the embeddings (MiniCPM3's `scale_emb`); 1 elsewhere.
    pub embedding_scale: f32,
    /// Factor of what attention and MLP add to the hidden state (MiniCPM3's `scale_depth / sqrt(layers)`);
    /// 1 elsewhere.
    pub residual_scale: f32,
    /// Factor of the logits (MiniCPM3's `dim_model_base / hidden`); 1 elsewhere.
    pub logits_scale: f32,
    /// The id that starts a text.
    pub bos: Option<u32>,
    /// The ids that end a text, as far as `config.json` says.
    pub eos: Vec<u32>,
}

/// Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1).
#[derive(Clone, Debug, PartialEq)]
pub struct Mla {
    /// Query heads (`num_attention_heads`).
    pub heads: u32,
    /// Width of the compressed query (`q_lora_rank`); `None` where queries are projected at once.
    pub q_rank: Option<u32>,
    /// Width of the latent (`kv_lora_rank`), a multiple of 16.
    pub latent: u32,
    /// Width of a query's part without rope (`qk_nope_head_dim`), a multiple of 8.
    pub nope: u32,
    /// Width of its rope part (`qk_rope_head_dim`), even.
    pub rope: u32,
    /// Width of a value (`v_head_dim`), a multiple of 8.
    pub value: u32,
    /// Added to the mean square by the norms of compressed query and latent: 1e-6 in transformers,
    /// whatever `rms_norm_eps` is.
    pub eps: f32,
    /// How the rope parts turn.
    pub rotation: Rope,
    /// `(nope + rope)^-1/2`, times the square of `0.1 mscale_all_dim ln(factor) + 1` where the rope scaling
    /// names `mscale_all_dim`.
    pub softmax_scale: f32,
    /// Growth of the queries with the position.
    pub growth: Option<Growth>,
    /// Factor of the projected query (LongCat: `sqrt(hidden / q_rank)`); 1 elsewhere.
    pub q_scale: f32,
    /// Factor of the normalised latent (LongCat: `sqrt(hidden / latent)`); 1 elsewhere.
    pub latent_scale: f32,
}

/// A query at a position is multiplied by `1 + beta ln(1 + floor(position / length))` (Llama 4, Mistral 4).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Growth {
    /// `llama_4_scaling_beta`.
    pub beta: f32,
    /// `original_max_position_embeddings`.
    pub length: u32,
}

/// One layer: attention and MLP, each behind a norm; in LongCat two of both.
#[derive(Clone, Debug, PartialEq)]
pub struct Layer {
    /// The MLP behind each attention. Each attention has a latent cache of its own.
    pub mlps: Vec<Mlp>,
    /// LongCat's shortcut: it reads what the first MLP reads, and is added behind the last.
    pub shortcut: Option<Moe>,
}

/// What follows an attention.
#[derive(Clone, Debug, PartialEq)]
pub enum Mlp {
    /// `down(silu(gate x) * up x)`.
    Dense {
        /// Rows of gate and of up.
        width: u32,
    },
    /// Experts.
    Moe(Moe),
}

/// A mixture of experts.
#[derive(Clone, Debug, PartialEq)]
pub struct Moe {
    /// Experts with weights.
    pub experts: u32,
    /// Experts that give back their input; they follow the others in the router's rows.
    pub identity: u32,
    /// Rows of gate and of up in each expert.
    pub width: u32,
    /// Rows of gate and of up in the shared experts together; 0 for none.
    pub shared_width: u32,
    /// Experts that a token takes.
    pub top_k: u32,
    /// From logits to scores.
    pub scoring: Scoring,
    /// Whether a bias is added to the scores for the choice; the weights are the scores without it.
    pub bias: Bias,
    /// Groups of experts, of which some are kept; `None` for one group.
    pub groups: Option<Groups>,
    /// Whether the weights of a token's experts are divided by their sum (`norm_topk_prob`).
    pub renormalise: bool,
    /// Factor of the weights after that.
    pub scaling: f32,
    /// Whether the sum of routed and shared experts goes through a norm (A.X-K1).
    pub norm: bool,
}

/// Whether a router has a bias.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bias {
    /// It has none.
    None,
    /// It has one.
    Always,
    /// It may be left out of the checkpoint, which means zeros (A.X-K1).
    Optional,
}

impl Moe {
    /// What `moe_route` needs to know.
    pub fn routing(&self) -> moe_route::Spec {
        moe_route::Spec {
            experts: self.experts + self.identity,
            top_k: self.top_k,
            scoring: self.scoring,
            bias: self.bias != Bias::None,
            groups: self.groups,
            renormalise: self.renormalise,
            shared: 0,
        }
    }

    /// Shared experts that can stand behind the routed ones, as experts more: they are as wide, all experts
    /// have weights, and no row of routes gets too long. `hidden` is the width of a token.
    pub fn appended(&self, hidden: u32) -> u32 {
        let count = self.shared_width / self.width.max(1);
        let whole = self.shared_width.is_multiple_of(self.width.max(1)) && self.width.is_multiple_of(4);
        // Parts of a binding start at multiples of 256 bytes, also where a number takes only two.
        let row = |columns: u32| WeightFormat::F16.row_bytes(columns as usize);
        let experts = [2 * self.width as usize * row(hidden), hidden as usize * row(self.width)];
        let aligned = experts.iter().all(|bytes| bytes.is_multiple_of(256));
        if whole && aligned && self.identity == 0 && self.top_k + count <= 16 { count } else { 0 }
    }
}

impl Mlp {
    /// Inner activations of a token: of a mixture those of its shared experts.
    pub fn width(&self) -> u32 {
        match self {
            Mlp::Dense { width } => *width,
            Mlp::Moe(moe) => moe.shared_width,
        }
    }
}

impl Config {
    /// Reads `config.json` of a checkpoint's folder.
    ///
    /// # Errors
    /// As [`Config::parse`]; [`Error::Io`] when the file cannot be read.
    pub fn open(folder: &Path) -> Result<Config> {
        let file = folder.join("config.json");
        let text = crate::disk::read(&file).map_err(|source| Error::Io { path: file.clone(), source })?;
        Config::parse(&text, &file)
    }

    /// Reads the text of a `config.json`; `file` is for errors.
    ///
    /// # Errors
    /// [`Error::Invalid`] names a field that is missing or no sense; [`Error::Unsupported`] names what the
    /// model has and lamina does not compute.
    pub fn parse(text: &[u8], file: &Path) -> Result<Config> {
        let value: Value = serde_json::from_slice(text).map_err(|fault| Error::Invalid {
            file: file.into(),
            what: "the whole".into(),
            expected: "a JSON object".into(),
            found: format!("a fault: {fault}"),
        })?;
        read::config(&Fields::new(file, "", &value)?)
    }

    /// The most activations of a token that a product takes, experts' own aside.
    pub fn most_columns(&self) -> u32 {
        let inner = self.layers.iter().flat_map(|layer| layer.mlps.iter().map(Mlp::width));
        let shortcut = self.layers.iter().filter_map(|layer| layer.shortcut.as_ref()).map(|moe| moe.shared_width);
        let attention = [self.hidden, self.mla.heads * self.mla.value, self.mla.q_rank.unwrap_or(0)];
        attention.into_iter().chain(inner).chain(shortcut).max().unwrap_or(0)
    }

    /// Latents that a token leaves: one for each attention.
    pub fn attentions(&self) -> usize {
        self.layers.iter().map(|layer| layer.mlps.len()).sum()
    }

    /// Numbers that a checkpoint of it holds, without what is skipped.
    pub fn parameters(&self) -> u64 {
        Tensors::of(self, ExpertLayout::Each).all().iter().map(|tensor| tensor.values() as u64).sum()
    }
}
