//! A configuration read with its family's row.

use super::config::{Config, Growth, Layer, Mla, Mlp, Moe};
use super::families::{self, Family, Peculiar};
use super::fields::Fields;
use super::rope::{self, Fixed};
use crate::Result;
use crate::kernels::moe_route::{Groups, Scoring};
use crate::kernels::sample::MOST_VOCABULARY;
use crate::num::rope::RopeLayout;

/// Reads a configuration: finds its row and takes the fields with it.
pub(super) fn config(fields: &Fields) -> Result<Config> {
    let Some(wrapper) = families::wrapper(fields)? else { return text_model(fields, "", &[], fields) };
    let text = fields.get("text_config").ok_or_else(|| fields.wrong("text_config", "a JSON object", "none"))?;
    let text = Fields::new(fields.file(), "text_config.", text)?;
    text_model(&text, wrapper.prefix, wrapper.beside, fields)
}

/// Widths and counts that no model comes near.
const MOST: u32 = 1 << 20;

fn text_model(
    fields: &Fields,
    prefix: &'static str,
    beside: &'static [&'static str],
    outer: &Fields,
) -> Result<Config> {
    let family = families::find(fields)?;
    same_everywhere(fields)?;
    let hidden = fields.count("hidden_size", 1, MOST)?;
    let mla = mla(fields, family, hidden)?;
    let layers = layers(fields, family)?;
    let mut config = Config {
        family,
        prefix,
        beside,
        vocab: fields.count("vocab_size", 1, MOST_VOCABULARY)?,
        hidden,
        max_context: fields.count("max_position_embeddings", 1, rope::MOST)?,
        tied: match outer.flag_or_none("tie_word_embeddings")? {
            Some(tied) => tied,
            None => fields.flag_or_none("tie_word_embeddings")?.unwrap_or(family.tied),
        },
        eps: fields.number("rms_norm_eps")? as f32,
        mla,
        mtp_layers: fields.count_or_none("num_nextn_predict_layers", 0, 64)?.unwrap_or(0),
        embedding_scale: 1.0,
        residual_scale: 1.0,
        logits_scale: 1.0,
        bos: fields.ids("bos_token_id")?.first().copied(),
        eos: fields.ids("eos_token_id")?,
        layers,
    };
    if let Some(id) = config.eos.iter().find(|id| **id >= config.vocab) {
        return Err(fields.wrong("eos_token_id", &format!("ids below {}", config.vocab), &id.to_string()));
    }
    if family.peculiar == Peculiar::Scales {
        config.embedding_scale = fields.number("scale_emb")? as f32;
        // Null is no scale; a missing field is a fault.
        if fields.get("scale_depth").is_some() || !fields.names("scale_depth") {
            config.residual_scale = (fields.number("scale_depth")? / (config.layers.len() as f64).sqrt()) as f32;
        }
        if fields.get("dim_model_base").is_some() || !fields.names("dim_model_base") {
            config.logits_scale = (fields.number("dim_model_base")? / f64::from(hidden)) as f32;
        }
    }
    Ok(config)
}

/// Fields that must say one thing in every family.
fn same_everywhere(fields: &Fields) -> Result<()> {
    fields.one_of("hidden_act", &["silu"])?;
    fields.one_of("zero_expert_type", &["identity"])?;
    fields.one_of("attention_method", &["MLA"])?;
    // The published code of LongCat follows these, transformers does not.
    fields.always("mla_scale_q_lora", true)?;
    fields.always("mla_scale_kv_lora", true)?;
    let types = fields.list_or_none("layer_types")?;
    if let Some(other) = types.and_then(|list| list.iter().find(|kind| kind.as_str() != Some("full_attention"))) {
        return Err(fields.wrong("layer_types", "'full_attention' alone", &other.to_string()));
    }
    Ok(())
}

fn mla(fields: &Fields, family: &Family, hidden: u32) -> Result<Mla> {
    let heads = fields.count("num_attention_heads", 1, 1 << 12)?;
    let keys = fields.count_or_none("num_key_value_heads", 1, 1 << 12)?.unwrap_or(heads);
    if keys != heads {
        return Err(fields.wrong(
            "num_key_value_heads",
            &format!("{heads}, as many as query heads"),
            &keys.to_string(),
        ));
    }
    let multiple = |name: &str, of: u32, least: u32| {
        let found = fields.count(name, least, 1 << 16)?;
        match found.is_multiple_of(of) {
            true => Ok(found),
            false => Err(fields.wrong(name, &format!("a multiple of {of}"), &found.to_string())),
        }
    };
    let latent = multiple("kv_lora_rank", 16, 16)?;
    let nope = multiple("qk_nope_head_dim", 8, 8)?;
    let rope = multiple("qk_rope_head_dim", 2, 0)?;
    // MiniCPM3's published file leaves it out.
    let value = match family.peculiar == Peculiar::Scales && fields.get("v_head_dim").is_none() {
        true if hidden >= heads && (hidden / heads).is_multiple_of(8) => hidden / heads,
        true => {
            let expected = "a multiple of 8 (hidden_size / num_attention_heads, where it is left out)";
            return Err(fields.wrong("v_head_dim", expected, &format!("{hidden} / {heads}")));
        }
        false => multiple("v_head_dim", 8, 8)?,
    };
    let shortcut = family.peculiar == Peculiar::Shortcut;
    for (name, right, checked) in [("qk_head_dim", nope + rope, true), ("head_dim", rope, shortcut)] {
        let found = fields.count_or_none(name, 0, MOST)?.unwrap_or(right);
        if checked && found != right {
            return Err(fields.wrong(name, &format!("{right}, as the widths say"), &found.to_string()));
        }
    }
    let q_rank = fields.count_or_none("q_lora_rank", 1, MOST)?;
    if q_rank.is_none() && (!fields.names("q_lora_rank") || shortcut || family.peculiar == Peculiar::MoeNorm) {
        fields.count("q_lora_rank", 1, MOST)?;
    }
    let layout = match (family.layout, fields.flag_or_none("rope_interleave")?) {
        (None, Some(false)) => RopeLayout::Half,
        (None, _) => RopeLayout::Interleaved,
        (Some(layout), flag) => {
            let interleaved = layout == RopeLayout::Interleaved;
            if flag.is_some_and(|flag| flag != interleaved) {
                return Err(fields.wrong("rope_interleave", &interleaved.to_string(), &(!interleaved).to_string()));
            }
            layout
        }
    };
    let growth = family.peculiar == Peculiar::Growth;
    let whole = if growth { nope + rope } else { rope };
    let fixed = Fixed { width: rope, whole, layout, theta: family.theta, growth };
    let read = rope::read(fields, &fixed)?;
    let scale = |rank: u32| if shortcut { (f64::from(hidden) / f64::from(rank)).sqrt() as f32 } else { 1.0 };
    Ok(Mla {
        heads,
        q_rank,
        latent,
        nope,
        rope,
        value,
        eps: 1e-6,
        rotation: read.rope,
        softmax_scale: (f64::from(nope + rope).powf(-0.5) * read.softmax_factor) as f32,
        growth: read.growth.map(|(beta, length)| Growth { beta: beta as f32, length }),
        q_scale: q_rank.map_or(1.0, scale),
        latent_scale: scale(latent),
    })
}

/// Layers that a model may have.
const MOST_LAYERS: u32 = 1 << 10;

fn layers(fields: &Fields, family: &Family) -> Result<Vec<Layer>> {
    if family.peculiar == Peculiar::Shortcut {
        let count = match fields.count_or_none("num_layers", 1, MOST_LAYERS)? {
            None if fields.get("num_hidden_layers").is_some() => {
                fields.count("num_hidden_layers", 2, 2 * MOST_LAYERS)? / 2
            }
            _ => fields.count("num_layers", 1, MOST_LAYERS)?,
        };
        let width = fields.count("ffn_hidden_size", 1, MOST)?;
        let moe = moe(fields, family)?;
        few_experts(fields, &moe, count)?;
        let shortcut = Some(moe);
        let layer = Layer { mlps: vec![Mlp::Dense { width }, Mlp::Dense { width }], shortcut };
        return Ok(vec![layer; count as usize]);
    }
    let count = fields.count("num_hidden_layers", 1, MOST_LAYERS)?;
    let sparse = sparse_layers(fields, family, count)?;
    let moe = match sparse.contains(&true) {
        true => Some(moe(fields, family)?),
        false => None,
    };
    moe.iter().try_for_each(|moe| few_experts(fields, moe, count))?;
    let width = match sparse.contains(&false) {
        true => fields.count("intermediate_size", 1, MOST)?,
        false => 0,
    };
    let mlp = |sparse: bool| match (&moe, sparse) {
        (Some(moe), true) => Mlp::Moe(moe.clone()),
        _ => Mlp::Dense { width },
    };
    Ok(sparse.into_iter().map(|sparse| Layer { mlps: vec![mlp(sparse)], shortcut: None }).collect())
}

/// Refuses a file whose list of tensors alone would fill the memory.
fn few_experts(fields: &Fields, moe: &Moe, layers: u32) -> Result<()> {
    match moe.experts * layers <= MOST_IN_ALL {
        true => Ok(()),
        false => {
            let expected = format!("at most {MOST_IN_ALL} in all layers");
            Err(fields.wrong("n_routed_experts", &expected, &format!("{} in each of {layers}", moe.experts)))
        }
    }
}

/// Which layers have experts: `mlp_layer_types`, or those from `first_k_dense_replace` on whose number is a
/// multiple of `moe_layer_freq`.
fn sparse_layers(fields: &Fields, family: &Family, count: u32) -> Result<Vec<bool>> {
    let Some(routing) = &family.routing else { return Ok(vec![false; count as usize]) };
    if let Some(list) = fields.list_or_none("mlp_layer_types")? {
        let expected = format!("a list of {count} times 'dense' or 'sparse'");
        let sparse = list.iter().map(|kind| match kind.as_str() {
            Some("dense") => Ok(false),
            Some("sparse") => Ok(true),
            _ => Err(fields.wrong("mlp_layer_types", &expected, &kind.to_string())),
        });
        let sparse = sparse.collect::<Result<Vec<bool>>>()?;
        if sparse.len() != count as usize {
            return Err(fields.wrong("mlp_layer_types", &expected, &format!("{} of them", sparse.len())));
        }
        return Ok(sparse);
    }
    let dense = match (fields.count_or_none("first_k_dense_replace", 0, MOST_LAYERS)?, routing.dense) {
        (Some(dense), _) | (None, Some(dense)) => dense,
        (None, None) => fields.count("first_k_dense_replace", 0, MOST_LAYERS)?,
    };
    let every = fields.count_or_none("moe_layer_freq", 1, MOST_LAYERS)?.unwrap_or(1);
    Ok((0..count).map(|layer| layer >= dense && layer.is_multiple_of(every)).collect())
}

/// Experts that a layer may have, and a token take: as `moe_route` holds.
const MOST_EXPERTS: u32 = 1024;
const MOST_TAKEN: u32 = 16;
/// Experts in all layers together.
const MOST_IN_ALL: u32 = 1 << 17;

fn moe(fields: &Fields, family: &Family) -> Result<Moe> {
    let routing = family.routing.as_ref().expect("only families with a routing have experts");
    let shortcut = family.peculiar == Peculiar::Shortcut;
    let method = fields.one_of("topk_method", routing.methods)?;
    fields.one_of("scoring_func", if routing.scoring == Scoring::Softmax { &["softmax"] } else { &["sigmoid"] })?;
    let (width, top_k) = if shortcut { ("expert_ffn_hidden_size", "moe_topk") } else { MOE_FIELDS };
    let width = fields.count(width, 1, MOST)?;
    let experts = fields.count("n_routed_experts", 1, MOST_EXPERTS)?;
    let identity = if shortcut { fields.count("zero_expert_num", 0, MOST_EXPERTS - experts)? } else { 0 };
    let shared = match fields.get("n_shared_experts") {
        None if shortcut || fields.names("n_shared_experts") => 0,
        _ => fields.count("n_shared_experts", 0, 1 << 10)?,
    };
    let grouped = match (routing.methods, method) {
        ([_, _], None) => return Err(fields.wrong("topk_method", &routing.methods.join(" or "), "none")),
        ([plain, _], Some(method)) => method != *plain,
        _ => !shortcut,
    };
    let (groups, kept_groups) = match grouped {
        true => (fields.count("n_group", 1, experts)?, fields.count("topk_group", 1, experts)?),
        false => (1, 1),
    };
    if !experts.is_multiple_of(groups) {
        return Err(fields.wrong("n_group", &format!("a divisor of {experts} experts"), &groups.to_string()));
    }
    if kept_groups > groups {
        return Err(fields.wrong("topk_group", &format!("at most {groups} groups"), &kept_groups.to_string()));
    }
    if groups > 1 && experts == groups && routing.best == 2 {
        return Err(fields.wrong("n_group", "groups of two experts at least", &groups.to_string()));
    }
    let renormalise = match (routing.renormalises, shortcut) {
        (true, _) => fields.flag("norm_topk_prob")?,
        (false, _) => {
            // transformers does not renormalise here, other code does.
            fields.always("norm_topk_prob", false)?;
            false
        }
    };
    let available = experts / groups * kept_groups + identity;
    Ok(Moe {
        experts,
        identity,
        width,
        shared_width: shared
            .checked_mul(width)
            .filter(|width| *width <= MOST)
            .ok_or_else(|| fields.wrong("n_shared_experts", "a sensible number", &shared.to_string()))?,
        top_k: fields.count(top_k, 1, available.min(MOST_TAKEN))?,
        scoring: routing.scoring,
        bias: routing.bias,
        groups: (groups > 1).then_some(Groups {
            count: groups,
            kept: kept_groups,
            best: routing.best,
            masked: routing.masked,
        }),
        renormalise,
        scaling: fields.number("routed_scaling_factor")? as f32,
        norm: family.peculiar == Peculiar::MoeNorm,
    })
}

/// Width and top-k of experts, but for LongCat.
const MOE_FIELDS: (&str, &str) = ("moe_intermediate_size", "num_experts_per_tok");
