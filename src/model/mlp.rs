//! The MLPs of a step: dense ones, and mixtures of experts with their router and shared experts.

use super::config::{Mlp, Moe};
use super::forward::{Limits, rows};
use super::load::{GatedWeights, MlpWeights, Model, MoeWeights};
use crate::Result;
use crate::gpu::{Device, Recording, View};
use crate::kernels::Kernel;
use crate::kernels::linear::{Activations, Epilogue, Linear, Product};
use crate::kernels::moe::Experts;
use crate::kernels::moe_layer::{self, MoeLayer, Scratch};
use crate::kernels::rms_norm::{self, RmsNorm};

/// The kernels of MLPs, and the memory between them.
pub(super) struct MlpKernels {
    hidden: u32,
    eps: f32,
    /// One for each kind of expert layer that the model has.
    layers: Vec<MoeLayer>,
    specs: Vec<moe_layer::Spec>,
    norm: RmsNorm,
    inner: Activations,
    router: Option<Activations>,
    /// What goes into the norm behind the experts.
    unnormed: Option<Activations>,
    scratch: Option<Scratch<View>>,
}

/// The mixtures of a model with their weights.
fn mixtures(model: &Model) -> Vec<(&Moe, &MoeWeights)> {
    let mut all = Vec::new();
    for (layer, weights) in model.config.layers.iter().zip(&model.layers) {
        for (mlp, weights) in layer.mlps.iter().zip(&weights.blocks) {
            if let (Mlp::Moe(moe), MlpWeights::Moe(weights)) = (mlp, &weights.mlp) {
                all.push((moe, &**weights));
            }
        }
        all.extend(layer.shortcut.as_ref().zip(weights.shortcut.as_ref()));
    }
    all
}

/// What `moe_layer` needs to know of a mixture.
fn spec(hidden: u32, moe: &Moe, weights: &MoeWeights) -> moe_layer::Spec {
    moe_layer::Spec {
        route: moe.routing(),
        scale: moe.scaling,
        experts: moe.experts,
        hidden,
        width: moe.width,
        gate_up: weights.experts.gate_up.format,
        down: weights.experts.down.format,
        accumulate: weights.shared.is_some(),
    }
}

impl MlpKernels {
    pub fn new(device: &Device, model: &Model, limits: &Limits) -> Result<MlpKernels> {
        let (config, caps) = (&model.config, device.caps());
        let mixtures = mixtures(model);
        let mut specs: Vec<moe_layer::Spec> = Vec::new();
        for (moe, weights) in &mixtures {
            let spec = spec(config.hidden, moe, weights);
            if !specs.contains(&spec) {
                specs.push(spec);
            }
        }
        let layers: Vec<MoeLayer> = specs.iter().map(|spec| MoeLayer::new(spec, caps)).collect();
        // All layers share the scratch of the one that needs most.
        let most = layers.iter().map(|layer| layer.scratch(limits.tokens)).reduce(|a, b| Scratch {
            routes: a.routes.max(b.routes),
            order: a.order.max(b.order),
            tiles: a.tiles.max(b.tiles),
            inner: a.inner.max(b.inner),
            outputs: a.outputs.max(b.outputs),
        });
        let scratch = most.map(|most| most.map(|bytes, label| Ok(device.alloc(*bytes, label)?.view())));
        let dense = config.layers.iter().flat_map(|layer| &layer.mlps).map(|mlp| match mlp {
            Mlp::Dense { width } => *width,
            Mlp::Moe(moe) => moe.shared_width,
        });
        let shortcut = mixtures.iter().map(|(moe, _)| moe.shared_width);
        let inner = dense.chain(shortcut).max().unwrap_or(0).max(1);
        let of = |length, label| rows(device, limits.tokens, length, label);
        let experts = specs.iter().map(|spec| spec.route.experts).max();
        let normed = mixtures.iter().any(|(moe, _)| moe.norm);
        Ok(MlpKernels {
            hidden: config.hidden,
            eps: config.eps,
            layers,
            specs,
            norm: RmsNorm::chosen(&rms_norm::Spec { branch: false }, caps),
            inner: of(inner, "inner MLP")?,
            router: experts.map(|experts| of(experts, "router logits")).transpose()?,
            unnormed: normed.then(|| of(config.hidden, "experts' sum")).transpose()?,
            scratch: scratch.transpose()?,
        })
    }

    /// `y = down(silu(gate x) * up x)`.
    pub fn dense(
        &self,
        recording: &mut Recording,
        linear: &Linear,
        (width, weights): (u32, &GatedWeights),
        (x, y): (&Activations, &Activations),
        tokens: u32,
    ) {
        let inner = Activations::rows(self.inner.view.clone(), width);
        linear.record(recording, Epilogue::Swiglu, &Product { weights: &weights.gate_up, x, y: &inner, tokens });
        linear.record(recording, Epilogue::Store, &Product { weights: &weights.down, x: &inner, y, tokens });
    }

    /// `y` = the sum of the routed and the shared experts, normalised where the model does.
    pub fn moe(
        &self,
        recording: &mut Recording,
        linear: &Linear,
        (moe, weights): (&Moe, &MoeWeights),
        (x, y): (&Activations, &Activations),
        tokens: u32,
    ) {
        let spec = spec(self.hidden, moe, weights);
        let layer = self.specs.iter().position(|other| *other == spec).expect("the model's mixtures were listed");
        let (router, scratch) = (self.router.as_ref(), self.scratch.as_ref());
        let (router, scratch) = router.zip(scratch).expect("a model with mixtures has their scratch");
        let logits = Activations::rows(router.view.clone(), spec.route.experts);
        linear.record(recording, Epilogue::Store, &Product { weights: &weights.router, x, y: &logits, tokens });
        let sum = if weights.norm.is_some() { self.unnormed.as_ref().unwrap_or(y) } else { y };
        if let Some(shared) = &weights.shared {
            self.dense(recording, linear, (moe.shared_width, shared), (x, sum), tokens);
        }
        let args = moe_layer::Args {
            logits: &logits,
            bias: weights.bias.clone(),
            x,
            y: sum,
            gate_up: Experts { weights: &weights.experts.gate_up, count: spec.experts },
            down: Experts { weights: &weights.experts.down, count: spec.experts },
            scratch,
            tokens,
        };
        self.layers[layer].record(recording, &args);
        if let Some(norm) = &weights.norm {
            let params = rms_norm::Params {
                rows: tokens,
                length: self.hidden,
                x_stride: sum.stride,
                x_offset: 0,
                y_stride: y.stride,
                y_offset: 0,
                branch_stride: 0,
                eps: self.eps,
                scale: 0.0,
            };
            self.norm.record(recording, params, sum.view.clone(), None, norm.clone(), y.view.clone());
        }
    }
}
