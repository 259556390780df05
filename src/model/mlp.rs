//! The MLPs of a step: dense ones, and mixtures of experts with their router and shared experts.

use super::config::{Mlp, Moe};
use super::forward::{Input, Limits, rows};
use super::load::{GatedWeights, MlpWeights, Model, MoeWeights};
use crate::Result;
use crate::gpu::{Device, Recording, View};
use crate::kernels::Kernel;
use crate::kernels::add::{self, Add};
use crate::kernels::linear::{Activations, Epilogue, Linear, Product};
use crate::kernels::moe::Experts;
use crate::kernels::moe_gemm_coop::MoeGemmCoop;
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
    add: Add,
    inner: Activations,
    router: Option<Activations>,
    /// What goes into the norm behind the experts, and what comes out.
    normed: Option<[Activations; 2]>,
    scratch: Option<Scratch<View>>,
}

/// Where an MLP's output goes.
#[derive(Clone, Copy)]
pub(super) enum Target<'a> {
    /// `y = output`.
    Write(&'a Activations),
    /// `y += scale * output`.
    Add(&'a Activations, f32),
}

impl Target<'_> {
    /// The factor of what is added.
    fn added(self) -> Option<f32> {
        if let Target::Add(_, scale) = self { Some(scale) } else { None }
    }
}

/// The mixtures of a model with their weights, and the factor with which each is added to the hidden states:
/// a shortcut is written apart.
fn mixtures(model: &Model) -> Vec<(&Moe, &MoeWeights, Option<f32>)> {
    let mut all = Vec::new();
    for (layer, weights) in model.config.layers.iter().zip(&model.layers) {
        for (mlp, weights) in layer.mlps.iter().zip(&weights.blocks) {
            if let (Mlp::Moe(moe), MlpWeights::Moe(weights)) = (mlp, &weights.mlp) {
                all.push((moe, &**weights, Some(model.config.residual_scale)));
            }
        }
        all.extend(layer.shortcut.as_ref().zip(weights.shortcut.as_ref()).map(|(moe, weights)| (moe, weights, None)));
    }
    all
}

/// What `moe_layer` needs to know of a mixture whose sum is `added` with some factor, or written.
fn spec(hidden: u32, moe: &Moe, weights: &MoeWeights, added: Option<f32>) -> moe_layer::Spec {
    let added = added.filter(|_| weights.norm.is_none());
    let apart = weights.shared.is_some() && weights.appended == 0;
    moe_layer::Spec {
        route: moe.routing(),
        scale: moe.scaling * added.unwrap_or(1.0),
        experts: moe.experts,
        shared: weights.appended,
        shared_scale: added.unwrap_or(1.0),
        hidden,
        width: moe.width,
        gate_up: weights.experts.gate_up.format,
        down: weights.experts.down.format,
        accumulate: added.is_some() || apart,
    }
}

impl MlpKernels {
    pub fn new(device: &Device, model: &Model, limits: &Limits) -> Result<MlpKernels> {
        let (config, caps) = (&model.config, device.caps());
        let mixtures = mixtures(model);
        let mut specs: Vec<moe_layer::Spec> = Vec::new();
        for (moe, weights, added) in &mixtures {
            let spec = spec(config.hidden, moe, weights, *added);
            if !specs.contains(&spec) {
                specs.push(spec);
            }
        }
        let matrices = !specs.is_empty() && limits.tokens > 1 && MoeGemmCoop::works(device)?;
        let layers: Vec<MoeLayer> = specs.iter().map(|spec| MoeLayer::new(spec, caps, matrices)).collect();
        // All layers share the scratch of the one that needs most.
        let most = layers.iter().map(|layer| layer.scratch(limits.tokens)).reduce(|a, b| Scratch {
            routes: a.routes.max(b.routes),
            order: a.order.max(b.order),
            tiles: a.tiles.max(b.tiles),
            inner: a.inner.max(b.inner),
            outputs: a.outputs.max(b.outputs),
            packed: a.packed.max(b.packed),
            scales: a.scales.max(b.scales),
        });
        let scratch = most.map(|most| most.map(|bytes, label| Ok(device.alloc_bound(*bytes, label)?.view())));
        let dense = config.layers.iter().flat_map(|layer| &layer.mlps).map(Mlp::width);
        let shortcut = mixtures.iter().map(|(moe, ..)| moe.shared_width);
        let inner = dense.chain(shortcut).max().unwrap_or(0).max(1);
        let of = |length, label| rows(device, limits.tokens, length, label);
        let experts = specs.iter().map(|spec| spec.route.experts).max();
        let normed = mixtures.iter().any(|(moe, ..)| moe.norm);
        let normed_rows = || Ok([of(config.hidden, "experts' sum")?, of(config.hidden, "experts' normalised sum")?]);
        Ok(MlpKernels {
            hidden: config.hidden,
            eps: config.eps,
            layers,
            specs,
            norm: RmsNorm::chosen(&rms_norm::Spec, caps),
            add: Add::chosen(&add::Spec, caps),
            inner: of(inner, "inner MLP")?,
            router: experts.map(|experts| of(experts, "router logits")).transpose()?,
            normed: normed.then(normed_rows).transpose()?,
            scratch: scratch.transpose()?,
        })
    }

    /// Whether a mixture's products can fold in the norm of what it reads, where the linear kernels do: shared
    /// experts apart from the others would change the hidden states before those are read, and experts without
    /// weights give back what they read, which must be normalised.
    pub fn folds_norm(moe: &Moe, weights: &MoeWeights) -> bool {
        moe.identity == 0 && (weights.shared.is_none() || weights.appended > 0)
    }

    /// `down(silu(gate x) * up x)` to the target.
    pub fn dense(
        &self,
        recording: &mut Recording,
        linear: &Linear,
        (width, weights): (u32, &GatedWeights),
        (x, target): (&Input, Target),
        tokens: u32,
    ) {
        let inner = Activations::rows(self.inner.view.clone(), width);
        linear.record(recording, Epilogue::Swiglu, &x.product(&weights.gate_up, &inner, tokens));
        let (mut epilogue, y, scale) = match target {
            Target::Write(y) => (Epilogue::Store, y, 1.0),
            Target::Add(y, scale) => (Epilogue::Add, y, scale),
        };
        let hidden = self.hidden as usize;
        for piece in 0..weights.down.rows / hidden {
            let down = weights.down.part(piece * hidden..(piece + 1) * hidden);
            let x = Activations { offset: (piece * down.columns) as u32, ..inner.clone() };
            let product = Product::new(&down, &x, y, tokens);
            linear.record(recording, epilogue, &Product { scale, ..product });
            epilogue = Epilogue::Add;
        }
    }

    /// The sum of the routed and the shared experts, normalised where the model does, to the target.
    pub fn moe(
        &self,
        recording: &mut Recording,
        linear: &Linear,
        (moe, weights): (&Moe, &MoeWeights),
        (x, target): (&Input, Target),
        tokens: u32,
    ) {
        let spec = spec(self.hidden, moe, weights, target.added());
        let layer = self.specs.iter().position(|other| *other == spec).expect("the model's mixtures were listed");
        let (router, scratch) = (self.router.as_ref(), self.scratch.as_ref());
        let (router, scratch) = router.zip(scratch).expect("a model with mixtures has their scratch");
        let logits = Activations::rows(router.view.clone(), spec.route.experts);
        linear.record(recording, Epilogue::Store, &x.product(&weights.router, &logits, tokens));
        let sum = match (&weights.norm, &self.normed) {
            (Some(_), Some([sum, _])) => Target::Write(sum),
            _ => target,
        };
        if let Some(shared) = weights.shared.as_ref().filter(|_| !self.layers[layer].takes_shared(tokens)) {
            self.dense(recording, linear, (moe.shared_width, shared), (x, sum), tokens);
        }
        let (Target::Write(y) | Target::Add(y, _)) = sum;
        let count = spec.experts + spec.shared;
        let args = moe_layer::Args {
            logits: &logits,
            bias: weights.bias.clone(),
            x: x.rows,
            norm: x.norm.as_ref(),
            y,
            gate_up: Experts { weights: &weights.experts.gate_up, count },
            down: Experts { weights: &weights.experts.down, count },
            scratch,
            tokens,
        };
        self.layers[layer].record(recording, &args);
        if let (Some(norm), Some([sum, normed])) = (&weights.norm, &self.normed) {
            let y = if let Target::Write(y) = target { y } else { normed };
            let params = rms_norm::Params {
                rows: tokens,
                length: self.hidden,
                x_stride: sum.stride,
                x_offset: 0,
                y_stride: y.stride,
                y_offset: 0,
                eps: self.eps,
            };
            self.norm.record(recording, params, sum.view.clone(), norm.clone(), y.view.clone());
            if let Target::Add(hidden, scale) = target {
                let params = add::Params { length: tokens * hidden.stride, scale };
                self.add.record(recording, params, hidden.view.clone(), y.view.clone());
            }
        }
    }
}
