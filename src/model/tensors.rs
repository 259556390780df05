//! The tensors of a model: their names and shapes in a checkpoint, arranged as the layers are.

use super::config::{Bias, Config, Mlp, Moe};
use crate::weights::Checkpoint;
use crate::{Error, Result};

/// A tensor that belongs in the checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Expected {
    /// Its whole name.
    pub name: String,
    /// Its shape; a matrix is `[out, in]`.
    pub shape: Vec<usize>,
    /// Whether it may be missing, which means zeros.
    pub optional: bool,
}

impl Expected {
    /// How many numbers it holds.
    pub fn values(&self) -> usize {
        self.shape.iter().product()
    }
}

/// All tensors of a model.
#[derive(Clone, Debug)]
pub struct Tensors {
    /// `[vocab, hidden]`.
    pub embedding: Expected,
    /// As [`Config::layers`].
    pub layers: Vec<LayerTensors>,
    /// `[hidden]`.
    pub norm: Expected,
    /// `[vocab, hidden]`; `None` where it is the embedding.
    pub head: Option<Expected>,
}

/// The tensors of one layer.
#[derive(Clone, Debug)]
pub struct LayerTensors {
    /// Attention and MLP; two of both in LongCat.
    pub blocks: Vec<BlockTensors>,
    /// LongCat's shortcut.
    pub shortcut: Option<MoeTensors>,
}

/// An attention and the MLP behind it.
#[derive(Clone, Debug)]
pub struct BlockTensors {
    /// `[hidden]`, before the attention.
    pub attention_norm: Expected,
    /// The attention.
    pub attention: AttentionTensors,
    /// `[hidden]`, before the MLP.
    pub mlp_norm: Expected,
    /// The MLP.
    pub mlp: MlpTensors,
}

/// One attention. Its widths are those of [`super::config::Mla`].
#[derive(Clone, Debug)]
pub struct AttentionTensors {
    /// The queries.
    pub query: QueryTensors,
    /// `[latent + rope, hidden]`.
    pub kv_a: Expected,
    /// `[latent]`.
    pub kv_a_norm: Expected,
    /// `[heads * (nope + value), latent]`.
    pub kv_b: Expected,
    /// `[hidden, heads * value]`.
    pub output: Expected,
}

/// From the hidden state to queries.
#[derive(Clone, Debug)]
pub enum QueryTensors {
    /// `[heads * (nope + rope), hidden]`.
    Whole(Expected),
    /// By way of a compressed query.
    LowRank {
        /// `[q_rank, hidden]`.
        q_a: Expected,
        /// `[q_rank]`.
        norm: Expected,
        /// `[heads * (nope + rope), q_rank]`.
        q_b: Expected,
    },
}

/// What follows an attention.
#[derive(Clone, Debug)]
pub enum MlpTensors {
    /// One MLP.
    Dense(GatedTensors),
    /// Experts.
    Moe(Box<MoeTensors>),
}

/// `down(silu(gate x) * up x)`.
#[derive(Clone, Debug)]
pub struct GatedTensors {
    /// `[width, hidden]`.
    pub gate: Expected,
    /// `[width, hidden]`.
    pub up: Expected,
    /// `[hidden, width]`.
    pub down: Expected,
}

/// Experts and their router.
#[derive(Clone, Debug)]
pub struct MoeTensors {
    /// `[experts + identity, hidden]`.
    pub router: Expected,
    /// `[experts + identity]`.
    pub bias: Option<Expected>,
    /// The routed experts.
    pub experts: ExpertTensors,
    /// The shared experts, as one.
    pub shared: Option<GatedTensors>,
    /// `[hidden]`, behind the sum of both.
    pub norm: Option<Expected>,
}

/// How a checkpoint arranges the routed experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExpertLayout {
    /// Three matrices for each expert, as most are published.
    Each,
    /// Two tensors for all experts of a layer (Mistral 4).
    Fused,
}

/// The routed experts of one layer.
#[derive(Clone, Debug)]
pub enum ExpertTensors {
    /// Each for itself.
    Each(Vec<GatedTensors>),
    /// All in one.
    Fused {
        /// `[experts, 2 * width, hidden]`: for each expert the rows of gate, then those of up.
        gate_up: Expected,
        /// `[experts, hidden, width]`.
        down: Expected,
    },
}

/// A tensor that is in the checkpoint and not needed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Skipped {
    /// Its name.
    pub name: String,
    /// Why it is not needed.
    pub why: &'static str,
}

impl Tensors {
    /// The tensors that belong to a model whose experts are arranged so.
    pub fn of(config: &Config, experts: ExpertLayout) -> Tensors {
        let of = Of { config, experts };
        Tensors {
            embedding: of.tensor("model.embed_tokens.weight", &[config.vocab, config.hidden]),
            layers: (0..config.layers.len()).map(|layer| of.layer(layer)).collect(),
            norm: of.tensor("model.norm.weight", &[config.hidden]),
            head: (!config.tied).then(|| of.tensor(HEAD, &[config.vocab, config.hidden])),
        }
    }

    /// Every tensor, in the order of the forward pass.
    pub fn all(&self) -> Vec<&Expected> {
        let mut all = vec![&self.embedding];
        for layer in &self.layers {
            layer.add_to(&mut all);
        }
        all.push(&self.norm);
        all.extend(&self.head);
        all
    }

    /// The tensors that belong to a model, all of them found in a checkpoint; and what else is in it, which
    /// is not needed.
    ///
    /// # Errors
    /// [`Error::Invalid`] names a tensor that is missing, has another shape, or belongs to nothing;
    /// [`Error::Unsupported`] one whose format lamina does not read.
    pub fn find(config: &Config, checkpoint: &Checkpoint) -> Result<(Tensors, Vec<Skipped>)> {
        let fused = checkpoint.tensors().any(|tensor| tensor.name.ends_with(FUSED));
        let tensors = Tensors::of(config, if fused { ExpertLayout::Fused } else { ExpertLayout::Each });
        let skipped = tensors.check(config, checkpoint)?;
        Ok((tensors, skipped))
    }

    fn check(&self, config: &Config, checkpoint: &Checkpoint) -> Result<Vec<Skipped>> {
        let all = self.all();
        for expected in &all {
            let Some(found) = checkpoint.get(&expected.name) else {
                if expected.optional {
                    continue;
                }
                return Err(invalid(checkpoint.source(), &expected.name, shape(&expected.shape), "no such tensor"));
            };
            if found.dtype.bytes().is_none() {
                let feature = format!("{}: {} weights", found.name, found.dtype);
                return Err(Error::Unsupported { file: found.file.into(), feature });
            }
            if found.shape != expected.shape {
                return Err(invalid(found.file, &expected.name, shape(&expected.shape), &shape(found.shape)));
            }
        }
        let known: std::collections::HashSet<&str> = all.iter().map(|tensor| tensor.name.as_str()).collect();
        let mut skipped = Vec::new();
        for tensor in checkpoint.tensors().filter(|tensor| !known.contains(tensor.name)) {
            let Some(why) = not_needed(config, tensor.name) else {
                let expected = format!("no such tensor in a model of type {}", config.family.labels[0]);
                return Err(invalid(tensor.file, tensor.name, expected, &shape(tensor.shape)));
            };
            skipped.push(Skipped { name: tensor.name.into(), why });
        }
        Ok(skipped)
    }
}

fn invalid(file: &std::path::Path, tensor: &str, expected: String, found: &str) -> Error {
    Error::Invalid { file: file.into(), what: format!("tensor '{tensor}'"), expected, found: found.into() }
}

fn shape(shape: &[usize]) -> String {
    format!("shape {shape:?}")
}

const HEAD: &str = "lm_head.weight";
/// How the names of fused experts' gate and up rows end.
const FUSED: &str = ".mlp.experts.gate_up_proj";

/// Why a tensor that belongs to no layer is not needed; `None` for one that nobody knows.
fn not_needed(config: &Config, name: &str) -> Option<&'static str> {
    if config.beside.iter().any(|start| name.starts_with(start)) {
        return Some("no part of the text model");
    }
    let name = name.strip_prefix(config.prefix)?;
    if name == HEAD && config.tied {
        return Some("the embedding serves as the head");
    }
    if name.ends_with("rotary_emb.inv_freq") {
        return Some("computed from the configuration");
    }
    if name.starts_with("model.mtp.") {
        return Some("multi-token prediction");
    }
    let (layer, rest) = name.strip_prefix("model.layers.")?.split_once('.')?;
    let (layer, layers) = (layer.parse::<usize>().ok()?, config.layers.len());
    if (layers..layers + config.mtp_layers as usize).contains(&layer) {
        return Some("multi-token prediction");
    }
    let kind = config.layers.get(layer)?;
    if let (Some(moe), Some(expert)) = (&kind.shortcut, rest.strip_prefix("mlp.experts.")) {
        let expert: u32 = expert.split_once('.')?.0.parse().ok()?;
        let identity = (moe.experts..moe.experts + moe.identity).contains(&expert);
        return identity.then_some("of an expert that gives back its input");
    }
    // A.X-K1's dense layers have the experts' norm in the checkpoint, and do not use it.
    let dense = matches!(kind.mlps[..], [Mlp::Dense { .. }]);
    let norm = config.layers.iter().flat_map(|layer| &layer.mlps).any(|mlp| matches!(mlp, Mlp::Moe(moe) if moe.norm));
    (dense && norm && rest == "post_mlp_layernorm.weight").then_some("of no use in a dense layer")
}

/// Makes the names.
struct Of<'a> {
    config: &'a Config,
    experts: ExpertLayout,
}

impl Of<'_> {
    fn tensor(&self, name: &str, shape: &[u32]) -> Expected {
        let shape = shape.iter().map(|length| *length as usize).collect();
        Expected { name: format!("{}{name}", self.config.prefix), shape, optional: false }
    }

    fn layer(&self, layer: usize) -> LayerTensors {
        let kind = &self.config.layers[layer];
        let at = format!("model.layers.{layer}.");
        let several = kind.mlps.len() > 1;
        let blocks = kind.mlps.iter().enumerate().map(|(i, mlp)| {
            let place = if several { format!(".{i}") } else { String::new() };
            let norm = |name: &str| self.tensor(&format!("{at}{name}{place}.weight"), &[self.config.hidden]);
            let mlps = if several { format!("{at}mlps.{i}.") } else { format!("{at}mlp.") };
            BlockTensors {
                attention_norm: norm("input_layernorm"),
                attention: self.attention(&format!("{at}self_attn{place}.")),
                mlp_norm: norm("post_attention_layernorm"),
                mlp: match mlp {
                    Mlp::Dense { width } => MlpTensors::Dense(self.gated(&mlps, *width)),
                    Mlp::Moe(moe) => MlpTensors::Moe(Box::new(self.moe(&at, moe, "gate"))),
                },
            }
        });
        LayerTensors {
            blocks: blocks.collect(),
            shortcut: kind.shortcut.as_ref().map(|moe| self.moe(&at, moe, "router")),
        }
    }

    fn attention(&self, at: &str) -> AttentionTensors {
        let (mla, hidden) = (&self.config.mla, self.config.hidden);
        let tensor = |name: &str, shape: &[u32]| self.tensor(&format!("{at}{name}.weight"), shape);
        let queries = mla.heads * (mla.nope + mla.rope);
        AttentionTensors {
            query: match mla.q_rank {
                None => QueryTensors::Whole(tensor("q_proj", &[queries, hidden])),
                Some(rank) => QueryTensors::LowRank {
                    q_a: tensor("q_a_proj", &[rank, hidden]),
                    norm: tensor("q_a_layernorm", &[rank]),
                    q_b: tensor("q_b_proj", &[queries, rank]),
                },
            },
            kv_a: tensor("kv_a_proj_with_mqa", &[mla.latent + mla.rope, hidden]),
            kv_a_norm: tensor("kv_a_layernorm", &[mla.latent]),
            kv_b: tensor("kv_b_proj", &[mla.heads * (mla.nope + mla.value), mla.latent]),
            output: tensor("o_proj", &[hidden, mla.heads * mla.value]),
        }
    }

    fn gated(&self, at: &str, width: u32) -> GatedTensors {
        let hidden = self.config.hidden;
        let tensor = |name: &str, shape: &[u32]| self.tensor(&format!("{at}{name}_proj.weight"), shape);
        GatedTensors {
            gate: tensor("gate", &[width, hidden]),
            up: tensor("up", &[width, hidden]),
            down: tensor("down", &[hidden, width]),
        }
    }

    /// `at` is the layer; `router` what its router is called.
    fn moe(&self, at: &str, moe: &Moe, router: &str) -> MoeTensors {
        let rows = moe.experts + moe.identity;
        let matrix = if router == "router" { "router.classifier.weight" } else { "gate.weight" };
        let bias = self.tensor(&format!("{at}mlp.{router}.e_score_correction_bias"), &[rows]);
        let expert = |i: u32| self.gated(&format!("{at}mlp.experts.{i}."), moe.width);
        let (experts, hidden, width) = (moe.experts, self.config.hidden, moe.width);
        MoeTensors {
            router: self.tensor(&format!("{at}mlp.{matrix}"), &[rows, hidden]),
            bias: match moe.bias {
                Bias::None => None,
                Bias::Always => Some(bias),
                Bias::Optional => Some(Expected { optional: true, ..bias }),
            },
            experts: match self.experts {
                ExpertLayout::Each => ExpertTensors::Each((0..experts).map(expert).collect()),
                ExpertLayout::Fused => ExpertTensors::Fused {
                    gate_up: self.tensor(&format!("{at}mlp.experts.gate_up_proj"), &[experts, 2 * width, hidden]),
                    down: self.tensor(&format!("{at}mlp.experts.down_proj"), &[experts, hidden, width]),
                },
            },
            shared: (moe.shared_width > 0).then(|| self.gated(&format!("{at}mlp.shared_experts."), moe.shared_width)),
            norm: moe.norm.then(|| self.tensor(&format!("{at}post_mlp_layernorm.weight"), &[hidden])),
        }
    }
}

impl LayerTensors {
    /// Every tensor of the layer.
    pub fn all(&self) -> Vec<&Expected> {
        let mut all = Vec::new();
        self.add_to(&mut all);
        all
    }

    fn add_to<'a>(&'a self, all: &mut Vec<&'a Expected>) {
        for block in &self.blocks {
            all.push(&block.attention_norm);
            match &block.attention.query {
                QueryTensors::Whole(q) => all.push(q),
                QueryTensors::LowRank { q_a, norm, q_b } => all.extend([q_a, norm, q_b]),
            }
            let AttentionTensors { kv_a, kv_a_norm, kv_b, output, .. } = &block.attention;
            all.extend([kv_a, kv_a_norm, kv_b, output, &block.mlp_norm]);
            match &block.mlp {
                MlpTensors::Dense(gated) => all.extend(gated.all()),
                MlpTensors::Moe(moe) => moe.add_to(all),
            }
        }
        if let Some(moe) = &self.shortcut {
            moe.add_to(all);
        }
    }
}

impl GatedTensors {
    /// Gate, up, down.
    pub fn all(&self) -> [&Expected; 3] {
        [&self.gate, &self.up, &self.down]
    }
}

impl MoeTensors {
    fn add_to<'a>(&'a self, all: &mut Vec<&'a Expected>) {
        all.push(&self.router);
        all.extend(&self.bias);
        match &self.experts {
            ExpertTensors::Each(experts) => all.extend(experts.iter().flat_map(GatedTensors::all)),
            ExpertTensors::Fused { gate_up, down } => all.extend([gate_up, down]),
        }
        all.extend(self.shared.iter().flat_map(GatedTensors::all));
        all.extend(&self.norm);
    }
}
