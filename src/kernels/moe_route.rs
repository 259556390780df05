//! `moe_route`: which experts each token goes to, and how they weigh.
//!
//! Scores are the softmax or the sigmoid of the router's logits. A bias, where there is one, is added
//! to choose, never to weigh (auxiliary-loss-free balancing, DeepSeek-V3, arXiv:2412.19437, section
//! 2.1.2). Experts may stand in groups of which only some are kept. The rules are those of
//! transformers 5.23.0: `DeepseekV2TopkRouter` (modeling_deepseek_v2.py), `DeepseekV3TopkRouter`
//! (modeling_deepseek_v3.py; the same in glm4_moe_lite and axk1), `AXK2TopkRouter`,
//! `Mistral4TopkRouter`, `LongcatFlashTopkRouter`. Where choices are equal the lower index goes first;
//! `torch.topk`, which those use, promises no order.
//!
//! A row with a logit or a biased score that is not finite is given the experts 0, 1 ... with weights
//! of NaN, so that the step's non-finite flag shows it.

use std::sync::Arc;

use super::inputs::{Inputs, strided};
use super::{Case, Check, Choice, Data, Expected, Field, Job, Kernel, Set, Tensor, Tolerance, Variant};
use crate::gpu::{Caps, Host, Recording, Shader, Source, View, grid_1d};
use crate::{reference, wgsl};

params! {
    /// Sizes of a call.
    pub struct Params {
        /// Rows of the step.
        pub tokens: u32,
        /// Elements from one row of logits to the next.
        pub stride: u32,
        /// Factor of the weights (`routed_scaling_factor`).
        pub scale: f32,
        /// Weight of each shared expert.
        pub shared_weight: f32,
    }
}

/// How logits become scores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scoring {
    /// Over all experts.
    Softmax,
    /// Each by itself.
    Sigmoid,
}

/// What becomes of the experts in groups that are not kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Masked {
    /// They go behind all others (DeepSeek-V3, GLM-4.7, A.X-K1).
    Last,
    /// They are chosen by 0, which goes before negative choices (A.X-K2, Mistral 4).
    ZeroChoice,
    /// As `ZeroChoice`, and they weigh 0 (DeepSeek-V2).
    ZeroScore,
}

/// Group-limited choice: groups of neighbouring experts, of which some are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Groups {
    /// How many (`n_group`); the experts are a multiple.
    pub count: u32,
    /// How many are kept (`topk_group`).
    pub kept: u32,
    /// A group's score is the sum of so many of its greatest choices: 1 (DeepSeek-V2) or 2 (V3).
    pub best: u32,
    /// The experts of the other groups.
    pub masked: Masked,
}

/// What the model fixes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spec {
    /// Experts with a logit, those without weights among them; at most 1024.
    pub experts: u32,
    /// Experts of a token; at most 16.
    pub top_k: u32,
    /// How logits become scores.
    pub scoring: Scoring,
    /// A bias is added to choose (`e_score_correction_bias`).
    pub bias: bool,
    /// Where only experts of some groups are chosen; `None` is the same as one group.
    pub groups: Option<Groups>,
    /// The weights are divided by their sum + 1e-20 (`norm_topk_prob`).
    pub renormalise: bool,
    /// Shared experts that follow those of a row, numbered from `experts` on; 0 where they are computed apart.
    pub shared: u32,
}

impl Spec {
    /// Experts of a row of routes: at most 16.
    pub fn slots(&self) -> u32 {
        self.top_k + self.shared
    }
}

/// One expert of a token: an element of `routes`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]
pub struct Route {
    /// Its number.
    pub expert: u32,
    /// The factor of its output.
    pub weight: f32,
}

/// How it runs.
#[derive(Clone, Debug)]
pub struct Tuning {
    /// Invocations a workgroup, a multiple of 16.
    pub workgroup: u32,
    /// Sums within subgroups first.
    pub subgroups: bool,
}

/// The kernel `moe_route`.
pub struct MoeRoute {
    spec: Spec,
    shader: Arc<Shader>,
}

impl Kernel for MoeRoute {
    const NAME: &'static str = "moe_route";
    const SOURCE: Source = wgsl!("moe_route");
    const PARAMS: &'static [Field] = Params::FIELDS;
    type Spec = Spec;
    type Tuning = Tuning;

    fn class(_: &Spec) -> String {
        "any router".into()
    }

    fn variants(spec: &Spec, caps: &Caps) -> Vec<Variant<Tuning>> {
        let workgroup = spec.experts.max(spec.slots()).next_multiple_of(32).min(caps.invocations).min(256);
        let mut variants = vec![Variant { name: "portable", tuning: Tuning { workgroup, subgroups: false } }];
        if caps.subgroups.is_some() {
            variants.push(Variant { name: "subgroup", tuning: Tuning { workgroup, subgroups: true } });
        }
        variants
    }

    fn tuning(spec: &Spec, caps: &Caps) -> Choice<Tuning> {
        let variant = Self::variants(spec, caps).pop().expect("the portable variant is always there");
        let why = if variant.tuning.subgroups { "subgroups save barriers" } else { "no subgroups" };
        Choice { variant, why: why.into() }
    }

    fn new(spec: &Spec, tuning: &Tuning) -> MoeRoute {
        let Spec { experts, top_k, .. } = *spec;
        let none = Groups { count: 1, kept: 1, best: 1, masked: Masked::Last };
        let groups = spec.groups.unwrap_or(none);
        let sizes = (1..=1024).contains(&experts) && (1..=experts.min(16)).contains(&top_k) && spec.slots() <= 16;
        assert!(sizes, "moe_route: 1 to 1024 experts, of which 1 to 16 are chosen: {spec:?}");
        let even = groups.count > 0 && experts.is_multiple_of(groups.count) && (1..=groups.count).contains(&groups.kept);
        let best = (1..=2.min(experts / groups.count.max(1))).contains(&groups.best);
        assert!(even && best, "moe_route: the groups do not fit: {spec:?}");
        let shader = Shader::of(Self::SOURCE)
            .u32("WORKGROUP", tuning.workgroup)
            .u32("EXPERTS", experts)
            .u32("TOP_K", top_k)
            .bool("SOFTMAX", spec.scoring == Scoring::Softmax)
            .bool("BIAS", spec.bias)
            .u32("GROUPS", groups.count)
            .u32("KEPT", groups.kept)
            .u32("GROUP_BEST", groups.best)
            .bool("ZERO_CHOICE", groups.masked != Masked::Last)
            .bool("ZERO_SCORE", groups.masked == Masked::ZeroScore)
            .bool("RENORMALISE", spec.renormalise)
            .u32("SHARED", spec.shared);
        let shader = match tuning.subgroups {
            true => shader.module(wgsl!("lib/reduce_subgroup")).subgroups().build(),
            false => shader.module(wgsl!("lib/reduce_shared")).build(),
        };
        MoeRoute { spec: *spec, shader }
    }

    fn shader(&self) -> &Arc<Shader> {
        &self.shader
    }

    fn cases(set: Set) -> Vec<Case<MoeRoute>> {
        use Draw::{Apart, Broken, Ties};
        let case = |model, spec, scale, tokens, draw| Shape { model, spec, scale, tokens, draw }.case();
        let (v2_lite, v3) = (softmax(64, 6), Spec { groups: grouped(8, 4, 2, Masked::Last), ..sigmoid(256, 8) });
        let longcat = Spec { bias: true, ..softmax(768, 12) };
        if set == Set::Timed {
            let timed = [("DeepSeek-V2-Lite", v2_lite, 1.0), ("DeepSeek-V3", v3, 2.5), ("LongCat-Flash", longcat, 6.0)];
            let both = |(model, spec, scale)| [1, 512].map(|tokens| case(model, spec, scale, tokens, Apart));
            return timed.into_iter().flat_map(both).collect();
        }
        let v2 = Spec { groups: grouped(8, 3, 1, Masked::ZeroScore), ..softmax(160, 6) };
        let axk2 = Spec { groups: grouped(8, 2, 2, Masked::ZeroChoice), ..sigmoid(64, 12) };
        let mistral = Spec { renormalise: true, groups: grouped(4, 2, 2, Masked::ZeroChoice), ..softmax(128, 4) };
        vec![
            case("DeepSeek-V2-Lite", v2_lite, 1.0, 33, Apart),
            case("DeepSeek-V2", v2, 16.0, 8, Apart),
            case("DeepSeek-V3", v3, 2.5, 33, Apart),
            case("Moonlight", sigmoid(64, 6), 2.446, 3, Apart),
            case("Kimi K2", sigmoid(384, 8), 2.827, 8, Apart),
            case("GLM-4.7-Flash", sigmoid(64, 4), 1.8, 200, Apart),
            case("A.X-K1", Spec { groups: grouped(8, 4, 2, Masked::Last), ..sigmoid(192, 8) }, 2.5, 2, Apart),
            case("A.X-K2", axk2, 2.5, 9, Apart),
            case("Mistral 4", Spec { groups: None, ..mistral }, 1.0, 8, Apart),
            case("Mistral 4 in groups", mistral, 1.0, 8, Apart),
            case("LongCat-Flash", longcat, 6.0, 3, Apart),
            case("one expert", softmax(1, 1), 1.0, 2, Apart),
            case("all of three", sigmoid(3, 3), 1.0, 1, Apart),
            case("most there are", softmax(1024, 16), 1.0, 2, Apart),
            case("groups of one", Spec { groups: grouped(9, 5, 1, Masked::Last), ..sigmoid(9, 4) }, 1.0, 7, Apart),
            // More are chosen than the kept groups hold.
            case("V2 beyond its groups", Spec { groups: grouped(4, 1, 1, Masked::ZeroScore), ..softmax(8, 5) }, 16.0, 5, Apart),
            case("V3 beyond its groups", Spec { groups: grouped(4, 1, 2, Masked::Last), ..sigmoid(8, 5) }, 2.5, 5, Apart),
            case("DeepSeek-V2-Lite", v2_lite, 1.0, 8, Ties),
            case("DeepSeek-V2", v2, 16.0, 8, Ties),
            case("DeepSeek-V3", v3, 2.5, 8, Ties),
            case("LongCat-Flash", longcat, 6.0, 2, Ties),
            case("DeepSeek-V2", v2, 16.0, 9, Broken),
            case("DeepSeek-V3", v3, 2.5, 9, Broken),
            case("LongCat-Flash", longcat, 6.0, 9, Broken),
            case("DeepSeek-V2-Lite with its shared experts", Spec { shared: 2, ..v2_lite }, 1.0, 3, Apart),
            case("DeepSeek-V3 with its shared expert", Spec { shared: 1, ..v3 }, 2.5, 9, Broken),
            case("one expert and fifteen shared", Spec { shared: 15, ..softmax(1, 1) }, 1.0, 2, Apart),
        ]
    }
}

impl MoeRoute {
    /// Chooses and weighs the experts of each token. `logits`: `[tokens, stride]` f32; `bias`: `[experts]`
    /// f32, exactly where the spec has one; `routes`: `[tokens, slots]` [`Route`], written, the greatest
    /// choice first, the shared experts last.
    ///
    /// # Panics
    /// When the stride is less than a row, or the bias does not fit the spec.
    pub fn record(&self, recording: &mut Recording, params: Params, logits: View, bias: Option<View>, routes: View) {
        let spec = self.spec;
        assert!(params.stride >= spec.experts, "moe_route: stride {} for {spec:?}", params.stride);
        assert!(bias.is_some() == spec.bias, "moe_route: a bias was given: {}, for {spec:?}", bias.is_some());
        let twin = move |host: &Host| {
            let (logits, bias) = (host.get::<f32>("logits"), host.get::<f32>("bias"));
            for token in 0..params.tokens as usize {
                let row = &logits[token * params.stride as usize..][..spec.experts as usize];
                let routes = route(&spec, &params, row, &bias);
                host.set("routes", token * spec.slots() as usize, &routes);
            }
        };
        let bindings = vec![("bias", bias.unwrap_or_else(|| logits.clone())), ("logits", logits), ("routes", routes)];
        recording.call(&self.shader, bindings, bytemuck::bytes_of(&params), grid_1d(params.tokens), twin);
    }
}

/// Scores, and what is chosen by: biased, with the groups that are not kept masked.
fn scored(spec: &Spec, logits: &[f32], bias: &[f32]) -> (Vec<f64>, Vec<f64>) {
    let mut scores = reference::moe_route::scores(logits, spec.scoring == Scoring::Softmax);
    let biased = |(i, score): (usize, &f64)| score + if spec.bias { f64::from(bias[i]) } else { 0.0 };
    let mut choices: Vec<f64> = scores.iter().enumerate().map(biased).collect();
    if let Some(groups) = spec.groups {
        let of_groups = reference::moe_route::group_scores(&choices, groups.count as usize, groups.best as usize);
        let kept = reference::moe_route::top(&of_groups, groups.kept as usize);
        for expert in 0..logits.len() {
            if !kept.contains(&(expert / (logits.len() / groups.count as usize))) {
                choices[expert] = if groups.masked == Masked::Last { f64::NEG_INFINITY } else { 0.0 };
                scores[expert] *= if groups.masked == Masked::ZeroScore { 0.0 } else { 1.0 };
            }
        }
    }
    (scores, choices)
}

/// The twin of one row.
fn route(spec: &Spec, params: &Params, logits: &[f32], bias: &[f32]) -> Vec<Route> {
    let shared = (0..spec.shared).map(|i| Route { expert: spec.experts + i, weight: params.shared_weight });
    chosen(spec, params.scale, logits, bias).into_iter().chain(shared).collect()
}

/// The experts that a row's token goes to by its logits.
fn chosen(spec: &Spec, scale: f32, logits: &[f32], bias: &[f32]) -> Vec<Route> {
    let biases = if spec.bias { &bias[..logits.len()] } else { &[] };
    if logits.iter().chain(biases).any(|x| !x.is_finite()) {
        return (0..spec.top_k).map(|expert| Route { expert, weight: f32::NAN }).collect();
    }
    let (scores, choices) = scored(spec, logits, bias);
    let experts = reference::moe_route::top(&choices, spec.top_k as usize);
    let chosen: Vec<f64> = experts.iter().map(|expert| scores[*expert]).collect();
    let weights = reference::moe_route::weights(&chosen, spec.renormalise, scale);
    experts.iter().zip(weights).map(|(expert, weight)| Route { expert: *expert as u32, weight }).collect()
}

fn softmax(experts: u32, top_k: u32) -> Spec {
    Spec { experts, top_k, scoring: Scoring::Softmax, bias: false, groups: None, renormalise: false, shared: 0 }
}

fn sigmoid(experts: u32, top_k: u32) -> Spec {
    Spec { experts, top_k, scoring: Scoring::Sigmoid, bias: true, groups: None, renormalise: true, shared: 0 }
}

fn grouped(count: u32, kept: u32, best: u32, masked: Masked) -> Option<Groups> {
    Some(Groups { count, kept, best, masked })
}

/// How a case's logits are drawn.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Draw {
    /// No two choices nor group scores closer than rounding.
    Apart,
    /// From five values, so that many are equal.
    Ties,
    /// As `Apart`, with NaN and infinities in all rows but every third.
    Broken,
}

#[derive(Clone, Copy)]
struct Shape {
    model: &'static str,
    spec: Spec,
    scale: f32,
    tokens: usize,
    draw: Draw,
}

impl Shape {
    fn case(self) -> Case<MoeRoute> {
        let Shape { model, spec, tokens, draw, .. } = self;
        let name = format!("{model}, {draw:?}: {tokens} tokens, {} of {} experts", spec.top_k, spec.experts);
        let (experts, routes) = ((tokens as u32 * spec.experts) as f64, (tokens as u32 * spec.slots()) as f64);
        let flops = experts * (10.0 + f64::from(spec.experts));
        Case::new(name, spec, flops, move || self.job()).moving(4.0 * experts + 8.0 * routes)
    }

    fn job(self) -> Job<MoeRoute> {
        let Shape { spec, scale, tokens, draw, .. } = self;
        let experts = spec.experts as usize;
        let mut inputs = Inputs::seed(u64::from(spec.experts * 31 + spec.top_k) + tokens as u64);
        let mut bias = inputs.normals(experts, 0.2);
        if draw == Draw::Ties {
            bias = (0..experts).map(|_| inputs.below(3) as f32 * 0.25 - 0.25).collect();
        }
        let logits: Vec<f32> = (0..tokens).flat_map(|token| self.row(&mut inputs, &bias, token)).collect();
        let stride = experts.next_multiple_of(4);
        let part = |first, tolerance| Check { stride: 2, first, columns: 1, tolerance };
        // The experts' numbers count as bits; exp of -x is good to 3 + 2 x units.
        let checks = vec![part(0, Tolerance::EXACT), part(1, Tolerance::nmse(1e-11))];
        let tensors = vec![
            Tensor::input("logits", Data::F32(strided(&logits, experts, stride))),
            Tensor::input("bias", Data::F32(bias.clone())),
            Tensor::checked("routes", Data::poison(2 * tokens * spec.slots() as usize), checks),
        ];
        let params = Params { tokens: tokens as u32, stride: stride as u32, scale, shared_weight: 0.7 };
        let job = Job::new(tensors, move |kernel: &MoeRoute, t, recording| {
            let bias = spec.bias.then(|| t.get("bias"));
            kernel.record(recording, params, t.get("logits"), bias, t.get("routes"));
        });
        if draw != Draw::Broken {
            return job;
        }
        // NaN equals nothing: of a broken row only the experts are compared.
        job.expecting(move |_| {
            let routes = logits.chunks(experts).flat_map(|row| route(&spec, &params, row, &bias));
            let row = |r: Route| match r.weight.is_nan() {
                true => vec![f64::from(f32::from_bits(r.expert))],
                false => vec![f64::from(f32::from_bits(r.expert)), f64::from(r.weight)],
            };
            vec![Expected { tensor: "routes", rows: routes.map(row).enumerate().collect() }]
        })
    }

    fn row(&self, inputs: &mut Inputs, bias: &[f32], token: usize) -> Vec<f32> {
        let experts = bias.len();
        if self.draw == Draw::Ties {
            return (0..experts).map(|_| inputs.below(5) as f32 - 2.0).collect();
        }
        let mut row = inputs.normals(experts, 1.5);
        while !self.apart(&row, bias) {
            row = inputs.normals(experts, 1.5);
        }
        if self.draw == Draw::Broken && !token.is_multiple_of(3) {
            let at = inputs.below(experts as u32) as usize;
            let value = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY][token / 3 % 3];
            if token % 3 == 1 { row[at] = value } else { row.fill(value) }
        }
        row
    }

    /// True where neighbours in the order of choices and of groups are 1e-4 apart, or equal.
    fn apart(&self, logits: &[f32], bias: &[f32]) -> bool {
        let far = |values: &[f64], count: usize| {
            let order = reference::moe_route::top(values, count + 1);
            order.windows(2).all(|w| {
                let (a, b) = (values[w[0]], values[w[1]]);
                a == b || a - b >= 1e-4 * a.abs().max(b.abs())
            })
        };
        let (_, choices) = scored(&self.spec, logits, bias);
        let (_, before) = scored(&Spec { groups: None, ..self.spec }, logits, bias);
        let groups = self.spec.groups.is_none_or(|g| {
            far(&reference::moe_route::group_scores(&before, g.count as usize, g.best as usize), g.kept as usize)
        });
        groups && far(&choices, self.spec.top_k as usize)
    }
}
