//! A mixture-of-experts layer, from the router's logits to the sum of the experts' outputs: which
//! kernels, in which order, with which scratch memory.
//!
//! Few tokens: `moe_route`, `moe_gemv` up, `moe_gemv` down. Many: `moe_route`, `moe_sort`, `moe_gemm` up,
//! `moe_gemm` down, `moe_combine`; on matrix units `moe_gemm_coop` behind `pack_rows`. The router's logits come from a product in f32 before. The shared experts
//! are a dense layer besides, whose result the sum can be added to; those that stand behind the routed ones
//! are for one token two experts more, which saves their dispatches.

use std::fmt;

use super::Kernel;
use super::gemm_coop::{fragments_under, tile_tokens};
use super::linear::{Activations, Norm};
use super::matrices;
use super::moe::{Experts, Step};
use super::moe_combine::{self, MoeCombine};
use super::moe_gemm::{self, MoeGemm, TILES};
use super::moe_gemm_coop::{self, MoeGemmCoop};
use super::moe_gemv::{self, MoeGemv};
use super::moe_route::{self, MoeRoute, Route};
use super::moe_sort::{self, MoeSort, Tile};
use super::pack_rows::{self, PackRows, Packed};
use super::weights::{BLOCK, WeightFormat};
use crate::gpu::{Caps, Recording, View};

/// What the model fixes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spec {
    /// How experts are chosen, of those with weights and those without.
    pub route: moe_route::Spec,
    /// Factor of the weights (`routed_scaling_factor`).
    pub scale: f32,
    /// Experts with weights: the first ones.
    pub experts: u32,
    /// Shared experts whose matrices follow those of the experts.
    pub shared: u32,
    /// Weight of the shared experts.
    pub shared_scale: f32,
    /// Width of a token.
    pub hidden: u32,
    /// Width of an expert (`moe_intermediate_size`).
    pub width: u32,
    /// How the experts' gates and ups are stored.
    pub gate_up: WeightFormat,
    /// How their down projections are stored.
    pub down: WeightFormat,
    /// The sum is added to what `y` holds, else written. Where shared experts follow the others, the sum for
    /// more than one token is added to theirs in any case.
    pub accumulate: bool,
}

impl Spec {
    /// Bytes of the packed rows of so many tokens, or of their pairs' inner rows.
    pub fn packed_bytes(&self, tokens: u32) -> u64 {
        matrices::packed_bytes(tokens, self.hidden).max(matrices::packed_bytes(tokens * self.route.top_k, self.width))
    }
}

/// What a call reads and writes.
pub struct Args<'a> {
    /// The router's logits: `[tokens, experts of the route]` f32.
    pub logits: &'a Activations,
    /// `[experts of the route]` f32, exactly where the route has one.
    pub bias: Option<View>,
    /// `[tokens, hidden]`.
    pub x: &'a Activations,
    /// The norm that x goes through first: of a single token, where every expert has weights.
    pub norm: Option<&'a Norm>,
    /// `[tokens, hidden]`, of another buffer.
    pub y: &'a Activations,
    /// `[(experts + shared) * 2 * width, hidden]`: gate and up rows in turn.
    pub gate_up: Experts<'a>,
    /// `[(experts + shared) * hidden, width]`.
    pub down: Experts<'a>,
    /// Room for [`MoeLayer::scratch`] of as many tokens.
    pub scratch: &'a Scratch<View>,
    /// Tokens, any number.
    pub tokens: u32,
}

/// The tensors between the kernels; all layers of a step can share them. `T` is a size in bytes or a view.
#[derive(Clone, Debug, PartialEq)]
pub struct Scratch<T> {
    /// `[tokens, slots]` [`Route`].
    pub routes: T,
    /// `[pairs]` u32.
    pub order: T,
    /// `[tiles]` [`Tile`].
    pub tiles: T,
    /// `[pairs, width]` f32, rows rounded up to 4.
    pub inner: T,
    /// `[pairs, hidden]` f32, rows rounded up to 4.
    pub outputs: T,
    /// `[tokens, hidden]` or `[pairs, width]` f16, rows of whole blocks: what goes to matrix units.
    pub packed: T,
    /// `[pairs]` f32, of the packed rows.
    pub scales: T,
}

impl<T> Scratch<T> {
    /// The same of another kind, such as views of sizes.
    ///
    /// # Errors
    /// The first that `of` gives.
    pub fn map<U, E>(&self, mut of: impl FnMut(&T, &'static str) -> Result<U, E>) -> Result<Scratch<U>, E> {
        Ok(Scratch {
            routes: of(&self.routes, "moe routes")?,
            order: of(&self.order, "moe order")?,
            tiles: of(&self.tiles, "moe tiles")?,
            inner: of(&self.inner, "moe inner")?,
            outputs: of(&self.outputs, "moe outputs")?,
            packed: of(&self.packed, "moe packed rows")?,
            scales: of(&self.scales, "moe scales")?,
        })
    }
}

/// Where the kernels for many tokens take over: a tuning.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Crossover {
    /// From so many pairs for each expert on (on average), `moe_gemm`.
    pub gemm_from: f32,
    /// From so many on, with tiles of 64 pairs instead of 16.
    pub wide_from: f32,
    /// The reason.
    pub why: &'static str,
}

impl Crossover {
    /// The one of a device.
    pub fn of(caps: &Caps) -> Crossover {
        let why = "a tile costs the same for one pair as for 16; moe_gemv reads an expert again from the cache";
        match caps.is_software() {
            true => Crossover { gemm_from: 12.0, wide_from: 48.0, why },
            false => Crossover { gemm_from: 8.0, wide_from: 32.0, why },
        }
    }
}

impl fmt::Display for Crossover {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let Crossover { gemm_from, wide_from, why } = self;
        write!(f, "moe_gemv below {gemm_from} pairs an expert, tiles of 64 from {wide_from}: {why}")
    }
}

/// The kernels of a layer; layers of one spec can share them.
pub struct MoeLayer {
    spec: Spec,
    crossover: Crossover,
    binding_bytes: u64,
    /// For one token: with the shared experts.
    one: Few,
    few: Few,
    tiled: [Tiled; 2],
    /// On matrix units.
    matrices: Option<Matrices>,
    combine: MoeCombine,
}

struct Few {
    route: MoeRoute,
    up: MoeGemv,
    normed_up: MoeGemv,
    down: MoeGemv,
}

struct Tiled {
    sort: MoeSort,
    gemm: [MoeGemm; 2],
}

struct Matrices {
    pack: PackRows,
    /// By the fragments of a tile.
    tiled: Vec<(MoeSort, [MoeGemmCoop; 2])>,
}

/// From so many pairs for each expert on, matrix units: a tile reads an expert's matrices once.
const MATRICES_FROM: f32 = 2.0;
/// From so many on, tiles of 64 pairs instead of 32, and of 128.
const MATRICES_WIDE: [f32; 2] = [24.0, 96.0];

/// The rule on matrix units, for `lamina info`.
pub fn on_matrices() -> String {
    let [wide, wider] = MATRICES_WIDE;
    format!(
        "moe_gemv below {MATRICES_FROM} pairs an expert, moe_gemm_coop in tiles of 32, from {wide} of 64, from {wider} of 128"
    )
}

impl MoeLayer {
    /// For a device; `matrices` says that `moe_gemm_coop` works there.
    ///
    /// # Panics
    /// When the route has fewer experts than there are with weights, or as the kernels.
    pub fn new(spec: &Spec, caps: &Caps, matrices: bool) -> MoeLayer {
        let Spec { experts, shared, route: moe_route::Spec { top_k, .. }, .. } = *spec;
        assert!(experts <= spec.route.experts, "a MoE layer routes to all its experts: {spec:?}");
        assert!(
            shared == 0 || experts == spec.route.experts,
            "shared experts are numbered behind all others: {spec:?}"
        );
        let steps = [(Step::Up, spec.gate_up), (Step::Down, spec.down)];
        // The products run over as many tiles as all experts of the matrices may need: the sort writes so many.
        let listed = experts + shared;
        let tiled = |tile| Tiled {
            sort: MoeSort::chosen(&moe_sort::Spec { experts: listed, tile }, caps),
            gemm: steps.map(|(step, format)| MoeGemm::chosen(&moe_gemm::Spec { format, step, tile }, caps)),
        };
        let few = |shared: u32| {
            let route = moe_route::Spec { shared, ..spec.route };
            let [up, normed_up, down] = [(steps[0], false), (steps[0], true), (steps[1], false)]
                .map(|((step, format), norm)| moe_gemv::Spec { format, step, top_k: route.slots(), norm })
                .map(|spec| MoeGemv::chosen(&spec, caps));
            Few { route: MoeRoute::chosen(&route, caps), up, normed_up, down }
        };
        let on_matrices = |fragments| {
            let sort = moe_sort::Spec { experts: listed, tile: tile_tokens(fragments) };
            let gemm = [Step::Up, Step::Down].map(|step| moe_gemm_coop::Spec { step, fragments });
            (MoeSort::chosen(&sort, caps), gemm.map(|spec| MoeGemmCoop::chosen(&spec, caps)))
        };
        let f16 = [spec.gate_up, spec.down] == [WeightFormat::F16; 2];
        let matrices = (matrices && f16).then(|| Matrices {
            pack: PackRows::chosen(&pack_rows::Spec, caps),
            tiled: fragments_under(caps).into_iter().map(on_matrices).collect(),
        });
        let accumulate = spec.accumulate || shared > 0;
        MoeLayer {
            spec: *spec,
            crossover: Crossover::of(caps),
            binding_bytes: caps.binding_bytes,
            one: few(shared),
            few: few(0),
            tiled: TILES.map(tiled),
            matrices,
            combine: MoeCombine::chosen(&moe_combine::Spec { experts, top_k, accumulate }, caps),
        }
    }

    /// Which kernels run for how many tokens, for `lamina info`.
    pub fn crossover(&self) -> &Crossover {
        &self.crossover
    }

    /// Bytes of scratch for steps of at most `tokens` tokens. More tokens than fit the device's largest
    /// binding go in turns, so that no size exceeds it.
    pub fn scratch(&self, tokens: u32) -> Scratch<u64> {
        let pairs = tokens.min(self.turn()) * self.spec.route.top_k;
        let pairs = u64::from(pairs.max(self.spec.route.top_k + self.spec.shared));
        let listed = self.spec.experts + self.spec.shared;
        let tiles = |tile| moe_sort::Spec { experts: listed, tile }.tiles(pairs as u32);
        let [inner, outputs] = [self.spec.width, self.spec.hidden].map(|n| u64::from(n.next_multiple_of(4)));
        Scratch {
            routes: pairs * size_of::<Route>() as u64,
            order: 4 * pairs,
            tiles: u64::from(TILES.map(tiles)[0].max(TILES.map(tiles)[1])) * size_of::<Tile>() as u64,
            inner: 4 * pairs * inner,
            outputs: 4 * pairs * outputs,
            packed: self.matrices.as_ref().map_or(16, |_| self.spec.packed_bytes(tokens.min(self.turn()))),
            scales: 4 * pairs,
        }
    }

    /// Tokens at a time: a multiple of 16, so that views of rows start where bindings may.
    fn turn(&self) -> u32 {
        let row = 4 * self.spec.route.top_k * self.spec.hidden.max(self.spec.width).next_multiple_of(4);
        let tiles = 65_535 * TILES[0] / self.spec.route.top_k / 2;
        let most = u32::try_from(self.binding_bytes / u64::from(row)).unwrap_or(u32::MAX).min(tiles);
        (most / 16 * 16).max(16)
    }

    /// Whether the sum for so many tokens holds the shared experts: then nobody else computes them.
    pub fn takes_shared(&self, tokens: u32) -> bool {
        tokens == 1 && self.spec.shared > 0
    }

    /// Adds the layer's dispatches.
    ///
    /// # Panics
    /// When tensors or scratch do not fit the spec or the tokens.
    pub fn record(&self, recording: &mut Recording, args: &Args) {
        let turn = self.turn();
        for first in (0..args.tokens).step_by(turn as usize) {
            let tokens = turn.min(args.tokens - first);
            let part = |rows: &Activations| {
                let from = 4 * u64::from(first * rows.stride);
                Activations { view: rows.view.part(from, rows.view.size() - from), ..rows.clone() }
            };
            let (logits, x, y) = (part(args.logits), part(args.x), part(args.y));
            self.record_turn(recording, args, [&logits, &x, &y], tokens);
        }
    }

    fn record_turn(&self, recording: &mut Recording, args: &Args, rows: [&Activations; 3], tokens: u32) {
        let [logits, x, y] = rows;
        let Spec { scale, experts, shared, shared_scale, hidden, width, accumulate, .. } = self.spec;
        let top_k = self.spec.route.top_k;
        let pairs = tokens * top_k;
        let scratch = args.scratch;
        let fits = [(args.gate_up, [2 * width, hidden]), (args.down, [hidden, width])];
        for (matrices, [rows, columns]) in fits {
            let found = [matrices.count, matrices.rows(), matrices.weights.columns as u32];
            assert!(
                found == [experts + shared, rows, columns],
                "a MoE layer of {:?} got matrices {found:?}",
                self.spec
            );
        }
        let Few { route, up, normed_up, down } = if args.tokens == 1 { &self.one } else { &self.few };
        let params = moe_route::Params { tokens, stride: logits.stride, scale, shared_weight: shared_scale };
        route.record(recording, params, logits.view.clone(), args.bias.clone(), scratch.routes.clone());

        let inner = Activations::rows(scratch.inner.clone(), width);
        let each = pairs as f32 / experts as f32;
        if args.norm.is_some() {
            let plain = args.tokens == 1 && experts == self.spec.route.experts;
            assert!(plain, "a MoE layer takes a norm for one token and experts with weights: {:?}", self.spec);
        }
        let matrices = self.matrices.as_ref().filter(|_| each >= MATRICES_FROM);
        if args.tokens == 1 || (matrices.is_none() && each < self.crossover.gemm_from) {
            let up = if args.norm.is_some() { normed_up } else { up };
            up.record_up(recording, args.gate_up, scratch.routes.clone(), (x, args.norm), &inner, tokens);
            let identity = (experts < self.spec.route.experts).then_some(x);
            let accumulate = accumulate || (shared > 0 && args.tokens > 1);
            down.record_down(recording, args.down, scratch.routes.clone(), &inner, identity, y, tokens, accumulate);
            return;
        }
        let (order, tiles) = (scratch.order.clone(), scratch.tiles.clone());
        let outputs = Activations::rows(scratch.outputs.clone(), hidden);
        if let Some(Matrices { pack, tiled }) = matrices {
            let wide = MATRICES_WIDE.iter().filter(|from| each >= **from).count();
            let (sort, [up, down]) = &tiled[wide.min(tiled.len() - 1)];
            let packed = Packed { values: scratch.packed.clone(), scales: scratch.scales.clone() };
            let put = |recording: &mut Recording, rows: u32, length: u32, x: &Activations| {
                let blocks = length.div_ceil(BLOCK as u32);
                let params = pack_rows::Params { rows, length, blocks, x_stride: x.stride, x_offset: x.offset };
                pack.record(recording, params, x.view.clone(), &packed);
            };
            let sorted = (order.clone(), tiles.clone());
            sort.record(recording, pairs, scratch.routes.clone(), order, tiles);
            put(recording, tokens, hidden, x);
            up.record(recording, args.gate_up, sorted.clone(), (x, &packed), &inner, (tokens, top_k));
            put(recording, pairs, width, &inner);
            down.record(recording, args.down, sorted, (&inner, &packed), &outputs, (tokens, top_k));
            self.combine(recording, [x, &outputs, y], scratch, tokens);
            return;
        }
        let Tiled { sort, gemm: [up, down] } = &self.tiled[usize::from(each >= self.crossover.wide_from)];
        sort.record(recording, pairs, scratch.routes.clone(), order.clone(), tiles.clone());
        up.record(recording, args.gate_up, order.clone(), tiles.clone(), x, &inner, (tokens, top_k));
        down.record(recording, args.down, order, tiles, &inner, &outputs, (tokens, top_k));
        self.combine(recording, [x, &outputs, y], scratch, tokens);
    }

    /// The sum of each token's rows.
    fn combine(&self, recording: &mut Recording, rows: [&Activations; 3], scratch: &Scratch<View>, tokens: u32) {
        let [x, outputs, y] = rows;
        let params = moe_combine::Params {
            tokens,
            length: self.spec.hidden,
            x_stride: x.stride,
            outputs_stride: outputs.stride,
            y_stride: y.stride,
        };
        let (routes, outputs) = (scratch.routes.clone(), outputs.view.clone());
        self.combine.record(recording, params, routes, outputs, x.view.clone(), y.view.clone());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::{Device, Grid};
    use crate::kernels::moe_route::Scoring;
    use crate::kernels::weights::Weights;

    #[test]
    fn the_sort_writes_every_tile_that_the_products_read_with_shared_experts_behind_the_others() {
        let route = moe_route::Spec {
            experts: 5,
            top_k: 2,
            scoring: Scoring::Softmax,
            bias: false,
            groups: None,
            renormalise: false,
            shared: 0,
        };
        let format = WeightFormat::F16;
        let spec = Spec {
            route,
            scale: 1.0,
            experts: 5,
            shared: 2,
            shared_scale: 1.0,
            hidden: 32,
            width: 32,
            gate_up: format,
            down: format,
            accumulate: true,
        };
        let caps = Caps::matrices();
        let device = Device::cpu_as(caps.clone());
        for (tokens, matrices) in [(40, false), (400, false), (20, true), (80, true), (400, true)] {
            let layer = MoeLayer::new(&spec, &caps, matrices);
            let scratch =
                layer.scratch(tokens).map(|bytes, label| device.alloc(*bytes, label).map(|b| b.view())).unwrap();
            let rows = |length: u32, count: u32| {
                Activations::rows(device.alloc(4 * u64::from(length * count), "rows").unwrap().view(), length)
            };
            let weights = |rows: usize| {
                let bytes = vec![0; rows * format.row_bytes(32)];
                Weights::upload(&device, &bytes, (rows, 32), format, 2, "w").unwrap()
            };
            let (gate_up, down) = (weights(7 * 64), weights(7 * 32));
            let mut recording = Recording::new();
            layer.record(
                &mut recording,
                &Args {
                    logits: &rows(8, tokens),
                    bias: None,
                    x: &rows(32, tokens),
                    norm: None,
                    y: &rows(32, tokens),
                    gate_up: Experts { weights: &gate_up, count: 7 },
                    down: Experts { weights: &down, count: 7 },
                    scratch: &scratch,
                    tokens,
                },
            );
            let calls = recording.calls();
            let sort = calls.iter().find(|call| call.shader.kernel == "moe_sort").expect("many tokens are sorted");
            let written = bytemuck::pod_read_unaligned::<moe_sort::Params>(&sort.params).tiles;
            let products = calls.iter().filter(|call| call.shader.kernel.starts_with("moe_gemm"));
            let read: Vec<u32> =
                products.map(|call| if let Grid::Direct([x, ..]) = call.grid { x } else { 0 }).collect();
            assert_eq!(read, [written; 2], "{tokens} tokens");
        }
    }
}
