//! What a step must read, and compute: the bytes and operations that no kernel can save.

use super::config::{Mla, Mlp, Moe};
use super::load::{GatedWeights, MlpWeights, Model, MoeWeights};
use crate::kernels::weights::Weights;

/// Bytes of weights that one token of text reads, each once; norms and biases, a thousandth of them, are left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Traffic {
    /// Of all layers: of the experts those that a token takes.
    pub layers: u64,
    /// Of the head.
    pub head: u64,
}

/// The traffic of a model.
pub fn of(model: &Model) -> Traffic {
    Traffic { layers: layers(model, &bytes), head: bytes(&model.head) }
}

/// Floating-point operations of a prompt.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Operations {
    /// Of all products with weights: those that a token takes, and the head's for the last token.
    pub products: f64,
    /// Of attention over expanded keys and values: `2 (n + p + v)` for each head, and token that a token sees. That
    /// is the least, and how DeepSeek-V2 (arXiv:2405.04434, section 2.1) counts it, whichever way it is computed.
    pub attention: f64,
}

/// The operations of a prompt of `tokens` tokens behind `depth` others.
pub fn of_prompt(model: &Model, depth: u32, tokens: u32) -> Operations {
    let Mla { heads, nope, rope, value, .. } = model.config.mla;
    let (depth, tokens) = (f64::from(depth), f64::from(tokens));
    let seen = tokens * depth + tokens * (tokens + 1.0) / 2.0;
    let pair = 2.0 * f64::from(heads) * f64::from(nope + rope + value);
    Operations {
        products: 2.0 * (tokens * layers(model, &values) as f64 + values(&model.head) as f64),
        attention: model.config.attentions() as f64 * seen * pair,
    }
}

/// The sum over the matrices of all layers that a token takes.
fn layers(model: &Model, count: &dyn Fn(&Weights) -> u64) -> u64 {
    let mut sum = 0;
    for (layer, weights) in model.config.layers.iter().zip(&model.layers) {
        for (mlp, block) in layer.mlps.iter().zip(&weights.blocks) {
            let attention = &block.attention;
            let query = attention.query.as_ref().map_or(0, |(_, q_b)| count(q_b));
            sum += count(&attention.input) + query + count(&attention.kv_b) + count(&attention.output);
            sum += match (mlp, &block.mlp) {
                (Mlp::Moe(moe), MlpWeights::Moe(weights)) => experts(moe, weights, count),
                (_, MlpWeights::Dense(weights)) => gated(weights, count),
                _ => unreachable!("weights are loaded as the configuration says"),
            };
        }
        sum += layer.shortcut.as_ref().zip(weights.shortcut.as_ref()).map_or(0, |(moe, w)| experts(moe, w, count));
    }
    sum
}

fn bytes(weights: &Weights) -> u64 {
    (weights.rows * weights.format.row_bytes(weights.columns)) as u64
}

fn values(weights: &Weights) -> u64 {
    (weights.rows * weights.columns) as u64
}

fn gated(weights: &GatedWeights, count: &dyn Fn(&Weights) -> u64) -> u64 {
    count(&weights.gate_up) + count(&weights.down)
}

fn experts(moe: &Moe, weights: &MoeWeights, count: &dyn Fn(&Weights) -> u64) -> u64 {
    let each = gated(&weights.experts, count) / u64::from((moe.experts + weights.appended).max(1));
    let shared = weights.shared.as_ref().map_or(0, |shared| gated(shared, count));
    count(&weights.router) + u64::from(moe.top_k) * each + shared
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::gpu::{Device, Options};

    #[test]
    fn a_prompt_takes_the_operations_of_its_tokens_one_after_the_other() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/models/deepseek_v2_lite");
        let model = Model::load(&Device::cpu(&Options::default()), &folder, |_, _| {}).unwrap();
        let Mla { heads, nope, rope, value, .. } = model.config.mla;
        let pair = f64::from(2 * heads * (nope + rope + value));
        let of = |depth, tokens| of_prompt(&model, depth, tokens);
        assert_eq!(of(0, 1).attention, model.config.layers.len() as f64 * pair);
        assert_eq!(of(0, 7).attention, of(0, 3).attention + of(3, 4).attention);
        let head = 2.0 * f64::from(model.config.vocab * model.config.hidden);
        assert_eq!(of(0, 7).products, of(0, 3).products + of(3, 4).products - head);
        // Of the routed experts a token takes some, of all other weights every one.
        let all: u64 = model.config.parameters();
        assert!(of(0, 1).products > head && of(0, 1).products < 2.0 * all as f64, "{:?} of {all}", of(0, 1));
    }
}
