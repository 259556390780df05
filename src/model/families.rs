//! The model families, as rows of one table; and what is known and not computed.
//!
//! Sources: the modeling files of transformers 5.23.0; where the published code of a model and
//! transformers disagree, the value that brings it up is refused.

use super::config::Bias;
use super::fields::Fields;
use crate::Result;
use crate::kernels::moe_route::{Masked, Scoring};
use crate::num::rope::RopeLayout;

/// What sets a family apart.
#[derive(Debug, PartialEq)]
pub struct Family {
    /// Its labels in `model_type`, the usual one first.
    pub labels: &'static [&'static str],
    /// Its name in `architectures`, for files without a label.
    pub architecture: &'static str,
    /// `None` where `rope_interleave` says it; interleaved where the file does not.
    pub layout: Option<RopeLayout>,
    /// `rope_theta` where the file names none.
    pub theta: f64,
    /// `tie_word_embeddings` where the file names none.
    pub tied: bool,
    /// How tokens find experts; `None` where every MLP is dense.
    pub routing: Option<Routing>,
    /// What else.
    pub peculiar: Peculiar,
}

/// How tokens find experts.
#[derive(Debug, PartialEq)]
pub struct Routing {
    /// From logits to scores.
    pub scoring: Scoring,
    /// A group's score is the sum of so many of its greatest.
    pub best: u32,
    /// What becomes of the experts in groups that are not kept.
    pub masked: Masked,
    /// Whether there is a bias.
    pub bias: Bias,
    /// What `topk_method` may say; the first of two knows no groups.
    pub methods: &'static [&'static str],
    /// Whether `norm_topk_prob` is followed; otherwise weights are not renormalised.
    pub renormalises: bool,
    /// `first_k_dense_replace` where the file names none.
    pub dense: Option<u32>,
}

/// What one family alone has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peculiar {
    /// Nothing.
    Nothing,
    /// MiniCPM3: embeddings, branches and logits are scaled.
    Scales,
    /// A.X-K1: a norm behind the experts.
    MoeNorm,
    /// Mistral 4: queries grow with the position.
    Growth,
    /// LongCat-Flash: two attentions and MLPs a layer, a shortcut, identity experts, scaled latents.
    Shortcut,
}

const V3: Routing = Routing {
    scoring: Scoring::Sigmoid,
    best: 2,
    masked: Masked::Last,
    bias: Bias::Always,
    methods: &["noaux_tc"],
    renormalises: true,
    dense: None,
};

const PLAIN: Family = Family {
    labels: &[],
    architecture: "",
    layout: None,
    theta: 1e4,
    tied: false,
    routing: Some(V3),
    peculiar: Peculiar::Nothing,
};

/// Every family that lamina runs.
pub static FAMILIES: [Family; 8] = [
    Family {
        labels: &["deepseek_v2"],
        architecture: "DeepseekV2ForCausalLM",
        layout: Some(RopeLayout::Interleaved),
        routing: Some(Routing {
            scoring: Scoring::Softmax,
            best: 1,
            masked: Masked::ZeroScore,
            bias: Bias::None,
            methods: &["greedy", "group_limited_greedy"],
            renormalises: false,
            dense: None,
        }),
        ..PLAIN
    },
    Family { labels: &["deepseek_v3", "kimi_k2"], architecture: "DeepseekV3ForCausalLM", ..PLAIN },
    Family {
        labels: &["glm4_moe_lite"],
        architecture: "Glm4MoeLiteForCausalLM",
        routing: Some(Routing { dense: Some(1), ..V3 }),
        ..PLAIN
    },
    Family { labels: &["youtu", "youtu_llm"], architecture: "YoutuForCausalLM", tied: true, routing: None, ..PLAIN },
    Family {
        labels: &["minicpm3"],
        architecture: "MiniCPM3ForCausalLM",
        layout: Some(RopeLayout::Half),
        tied: true,
        routing: None,
        peculiar: Peculiar::Scales,
        ..PLAIN
    },
    Family {
        labels: &["axk1", "AXK1"],
        architecture: "AXK1ForCausalLM",
        routing: Some(Routing { bias: Bias::Optional, dense: Some(1), ..V3 }),
        peculiar: Peculiar::MoeNorm,
        ..PLAIN
    },
    Family {
        labels: &["mistral4"],
        architecture: "Mistral4ForCausalLM",
        routing: Some(Routing {
            scoring: Scoring::Softmax,
            masked: Masked::ZeroChoice,
            bias: Bias::None,
            dense: Some(0),
            ..V3
        }),
        peculiar: Peculiar::Growth,
        ..PLAIN
    },
    Family {
        labels: &["longcat_flash"],
        architecture: "LongcatFlashForCausalLM",
        layout: Some(RopeLayout::Interleaved),
        theta: 1e7,
        routing: Some(Routing { scoring: Scoring::Softmax, renormalises: false, ..V3 }),
        peculiar: Peculiar::Shortcut,
        ..PLAIN
    },
];

/// A model around a text model, whose configuration is `text_config` and whose tensors have a prefix.
pub(super) struct Wrapper {
    labels: &'static [&'static str],
    architecture: &'static str,
    /// What stands before the names of the text model's tensors.
    pub(super) prefix: &'static str,
    /// How the names of all other tensors start.
    pub(super) beside: &'static [&'static str],
}

static WRAPPERS: [Wrapper; 2] = [
    Wrapper {
        labels: &["kimi_k25"],
        architecture: "KimiK25ForConditionalGeneration",
        prefix: "language_model.",
        beside: &["vision_tower.", "mm_projector."],
    },
    Wrapper {
        labels: &["kimi_vl"],
        architecture: "KimiVLForConditionalGeneration",
        prefix: "language_model.",
        beside: &["vision_tower.", "multi_modal_projector."],
    },
];

/// Models that are known, with the part that lamina does not compute.
static REFUSED: [(&[&str], &str, &str); 10] = [
    (&["deepseek_v32"], "DeepseekV32ForCausalLM", "sparse attention by an indexer"),
    (&["glm_moe_dsa"], "GlmMoeDsaForCausalLM", "sparse attention by an indexer"),
    (&["axk2"], "AXK2ForCausalLM", "sparse attention by an indexer, output gates and gated norms"),
    (&["kimi_linear"], "KimiLinearForCausalLM", "linear attention (KDA)"),
    (&["bailing_hybrid"], "BailingHybridForCausalLM", "linear attention (KDA) and head-wise gates"),
    (
        &["glm5_next", "glm5_next_text"],
        "Glm5NextForConditionalGeneration",
        "linear attention (KDA), a pooled indexer and hyper-connections",
    ),
    (&["hy_v4"], "HYV4ForCausalLM", "attention sinks, an indexer, gates and hyper-connections"),
    (&["dots3_note", "dots3_note_text"], "Dots3NoteForCausalLM", "sliding-window attention, an indexer and gates"),
    (
        &["mistral_large4", "mistral_large4_text"],
        "MistralLarge4ForConditionalGeneration",
        "an indexer, latents shared across layers, layers without rope and a soft cap of the logits",
    ),
    (&["deepseek_v4"], "DeepseekV4ForCausalLM", "compressed attention whose keys are its values"),
];

/// Fields that stand for a part of the model, with its name. Missing, null, false, 0 and empty are none.
const FEATURES: [(&str, &str); 25] = [
    ("quantization_config", "quantised weights"),
    ("compression_config", "quantised weights"),
    ("index_topk", "sparse attention by an indexer"),
    ("index_head_dim", "sparse attention by an indexer"),
    ("index_n_heads", "sparse attention by an indexer"),
    ("indexer_types", "sparse attention by an indexer"),
    ("linear_attn_config", "linear attention (KDA)"),
    ("linear_num_heads", "linear attention (KDA)"),
    ("mla_use_nope", "attention without rope"),
    ("no_rope_layers", "layers without rope"),
    ("kv_source_layers", "latents shared across layers"),
    ("sliding_window", "sliding-window attention"),
    ("sliding_window_size", "sliding-window attention"),
    ("use_sliding_window", "sliding-window attention"),
    ("compress_ratios", "compressed attention"),
    ("final_logit_softcapping", "a soft cap of the logits"),
    ("attn_logit_softcapping", "a soft cap of the attention's scores"),
    ("swiglu_limit", "clamped SwiGLU"),
    ("hc_mult", "hyper-connections"),
    ("gated_norm_rank", "gated norms"),
    ("use_qk_norm", "norms of queries and keys"),
    ("router_bias", "a bias of the router's logits"),
    ("mlp_bias", "a bias of the MLP"),
    ("attention_bias", "a bias of the attention"),
    ("learnable_sink_init", "attention sinks"),
];

/// The wrapper that a configuration names, if it is one.
pub(super) fn wrapper(fields: &Fields) -> Result<Option<&'static Wrapper>> {
    let (label, architecture) = labels(fields)?;
    refuse(fields, label, architecture)?;
    Ok(WRAPPERS.iter().find(|row| match label {
        Some(label) => row.labels.contains(&label),
        None => architecture == Some(row.architecture),
    }))
}

/// `model_type` and the first of `architectures`.
fn labels<'a>(fields: &Fields<'a>) -> Result<(Option<&'a str>, Option<&'a str>)> {
    let list = fields.list_or_none("architectures")?;
    let first = list.and_then(|list| list.first()).and_then(serde_json::Value::as_str);
    Ok((fields.text_or_none("model_type")?, first))
}

/// Refuses models and parts that are known and not computed.
fn refuse(fields: &Fields, label: Option<&str>, architecture: Option<&str>) -> Result<()> {
    for (labels, name, feature) in &REFUSED {
        if label.is_some_and(|label| labels.contains(&label)) || architecture == Some(name) {
            let label = label.or(architecture).unwrap_or_default();
            return Err(fields.unsupported(format!("{feature}, of {label}")));
        }
    }
    for (name, feature) in FEATURES {
        let Some(value) = fields.get(name) else { continue };
        let none = matches!(value.as_f64(), Some(0.0)) || value.as_bool() == Some(false);
        if none || value.as_array().is_some_and(Vec::is_empty) {
            continue;
        }
        let method = value.get("quant_method").and_then(serde_json::Value::as_str);
        let method = method.map(|method| format!(", {method}")).unwrap_or_default();
        return Err(fields.unsupported(format!("{feature} ({name}{method})")));
    }
    Ok(())
}

/// The row of a label, or of an architecture where there is no label.
pub(super) fn find(fields: &Fields) -> Result<&'static Family> {
    let (label, architecture) = labels(fields)?;
    refuse(fields, label, architecture)?;
    let found = FAMILIES.iter().find(|family| match label {
        Some(label) => family.labels.contains(&label),
        None => architecture == Some(family.architecture),
    });
    found.ok_or_else(|| {
        let rows = FAMILIES.iter().map(|row| row.labels).chain(WRAPPERS.iter().map(|row| row.labels));
        let known = rows.flatten().copied().collect::<Vec<_>>().join(", ");
        let found = label.or(architecture).map_or("none".into(), |found| format!("'{found}'"));
        fields.wrong("model_type", &format!("one of {known}"), &found)
    })
}
