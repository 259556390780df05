//! What a step of one token must read: the bytes that no kernel can save.

use super::config::{Mlp, Moe};
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
    let mut layers = 0;
    for (layer, weights) in model.config.layers.iter().zip(&model.layers) {
        for (mlp, block) in layer.mlps.iter().zip(&weights.blocks) {
            let attention = &block.attention;
            let query = attention.query.as_ref().map_or(0, |(_, q_b)| bytes(q_b));
            layers += bytes(&attention.input) + query + bytes(&attention.kv_b) + bytes(&attention.output);
            layers += match (mlp, &block.mlp) {
                (Mlp::Moe(moe), MlpWeights::Moe(weights)) => experts(moe, weights),
                (_, MlpWeights::Dense(weights)) => gated(weights),
                _ => unreachable!("weights are loaded as the configuration says"),
            };
        }
        layers += layer.shortcut.as_ref().zip(weights.shortcut.as_ref()).map_or(0, |(moe, w)| experts(moe, w));
    }
    Traffic { layers, head: bytes(&model.head) }
}

fn bytes(weights: &Weights) -> u64 {
    (weights.rows * weights.format.row_bytes(weights.columns)) as u64
}

fn gated(weights: &GatedWeights) -> u64 {
    bytes(&weights.gate_up) + bytes(&weights.down)
}

fn experts(moe: &Moe, weights: &MoeWeights) -> u64 {
    let each = gated(&weights.experts) / u64::from((moe.experts + weights.appended).max(1));
    bytes(&weights.router) + u64::from(moe.top_k) * each + weights.shared.as_ref().map_or(0, gated)
}
