//! `moe_sort`: what `moe_gemm` needs of the routes of many tokens. For each expert its list of pairs
//! (token, slot), and the lists cut into tiles. Nothing is read back: `moe_gemm` runs over as many tiles
//! as there can be at most, and those without pairs end at once.

use std::sync::Arc;

use super::inputs::{Inputs, words};
use super::moe_route::Route;
use super::{Case, Check, Choice, Data, Field, Job, Kernel, Set, Tensor, Tolerance, Variant};
use crate::gpu::{Caps, Grid, Host, Recording, Shader, Source, View};
use crate::{reference, wgsl};

params! {
    /// Sizes of a call.
    pub struct Params {
        /// Tokens times experts of each.
        pub pairs: u32,
        /// Room for tiles.
        pub tiles: u32,
    }
}

/// What the model fixes, and the size of `moe_gemm`'s tiles.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spec {
    /// Experts with weights, at most 1024; routes to others are in no list.
    pub experts: u32,
    /// Pairs of a tile at most.
    pub tile: u32,
}

impl Spec {
    /// The most tiles that `pairs` pairs can need: each expert that has any may leave one unfilled.
    pub fn tiles(&self, pairs: u32) -> u32 {
        (pairs + pairs.min(self.experts) * (self.tile - 1)) / self.tile
    }
}

/// Pairs of one expert: an element of `tiles`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
pub struct Tile {
    /// Whose.
    pub expert: u32,
    /// The first one's place in `order`.
    pub first: u32,
    /// How many; 0 where there is no more tile.
    pub count: u32,
    /// 0.
    pub unused: u32,
}

/// How it runs.
#[derive(Clone, Debug)]
pub struct Tuning {
    /// Invocations a workgroup, a multiple of 4.
    pub workgroup: u32,
}

/// The kernel `moe_sort`.
pub struct MoeSort {
    spec: Spec,
    shader: Arc<Shader>,
}

impl Kernel for MoeSort {
    const NAME: &'static str = "moe_sort";
    const SOURCE: Source = wgsl!("moe_sort");
    const PARAMS: &'static [Field] = Params::FIELDS;
    type Spec = Spec;
    type Tuning = Tuning;

    fn variants(_: &Spec, caps: &Caps) -> Vec<Variant<Tuning>> {
        vec![Variant { name: "portable", tuning: Tuning { workgroup: caps.invocations.min(256) } }]
    }

    fn tuning(spec: &Spec, caps: &Caps) -> Choice<Tuning> {
        let variant = Self::variants(spec, caps).remove(0);
        Choice { variant, why: "one way: counting in workgroup memory".into() }
    }

    fn new(spec: &Spec, tuning: &Tuning) -> MoeSort {
        let fits = (1..=1024).contains(&spec.experts) && spec.tile > 0;
        assert!(fits, "moe_sort: 1 to 1024 experts, tiles of at least one pair: {spec:?}");
        let shader = Shader::of(Self::SOURCE)
            .u32("WORKGROUP", tuning.workgroup)
            .u32("EXPERTS", spec.experts)
            .u32("TILE", spec.tile)
            .build();
        MoeSort { spec: *spec, shader }
    }

    fn shader(&self) -> &Arc<Shader> {
        &self.shader
    }

    fn cases(set: Set) -> Vec<Case<MoeSort>> {
        use Draw::{Even, One, Skewed};
        if set == Set::Timed {
            return [(512, 6, 64, 64), (512, 8, 256, 64)].map(|(t, k, e, n)| case(t, k, (e, e), n, Even)).into();
        }
        vec![
            case(1, 1, (1, 1), 16, Even),
            case(2, 6, (64, 64), 16, Even),
            case(3, 3, (3, 3), 16, Even),
            case(8, 12, (512, 768), 16, Even),
            case(33, 8, (256, 256), 32, Even),
            case(200, 6, (64, 64), 64, Even),
            case(200, 6, (64, 64), 16, Skewed),
            case(257, 4, (128, 128), 64, Skewed),
            case(96, 1, (7, 7), 16, One),
            case(100, 12, (20, 30), 32, Skewed),
            case(40, 2, (1024, 1024), 16, Even),
        ]
    }
}

impl MoeSort {
    /// Lists the pairs of each expert. `routes`: `[pairs]` [`Route`]; `order`: `[pairs]` u32, written
    /// as far as there are routes to experts with weights; `tiles`: `[tiles]` [`Tile`], written,
    /// [`Spec::tiles`] of them.
    pub fn record(&self, recording: &mut Recording, pairs: u32, routes: View, order: View, tiles: View) {
        let spec = self.spec;
        let params = Params { pairs, tiles: spec.tiles(pairs) };
        let twin = move |host: &Host| {
            let of: Vec<u32> = host.get::<Route>("routes").iter().take(pairs as usize).map(|r| r.expert).collect();
            let (order, lists) = reference::moe_sort::sort(&of, spec.experts, spec.tile as usize);
            let tile = |(expert, first, count): &(u32, usize, usize)| Tile {
                expert: *expert,
                first: *first as u32,
                count: *count as u32,
                unused: 0,
            };
            let mut tiles: Vec<Tile> = lists.iter().map(tile).collect();
            tiles.resize(params.tiles as usize, Tile::default());
            host.set("order", 0, &order);
            host.set("tiles", 0, &tiles);
        };
        let bindings = vec![("routes", routes), ("order", order), ("tiles", tiles)];
        let grid = Grid::Direct([if pairs == 0 { 0 } else { spec.experts }, 1, 1]);
        recording.call(&self.shader, bindings, bytemuck::bytes_of(&params), grid, twin);
    }
}

/// Whom a case's tokens choose.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Draw {
    /// Any experts.
    Even,
    /// Mostly the first ones.
    Skewed,
    /// The last one with weights.
    One,
}

/// Routes of `tokens` tokens to `top_k` different experts of `of`.
pub(super) fn draw_routes(inputs: &mut Inputs, tokens: usize, top_k: usize, of: u32, skewed: bool) -> Vec<Route> {
    let mut routes: Vec<Route> = Vec::with_capacity(tokens * top_k);
    for _ in 0..tokens {
        let first = routes.len();
        while routes.len() < first + top_k {
            let end = if skewed { 1 + inputs.below(of) } else { of };
            let expert = inputs.below(end);
            if routes[first..].iter().all(|r| r.expert != expert) {
                routes.push(Route { expert, weight: 0.05 + inputs.uniform() });
            }
        }
    }
    routes
}

/// `experts` are those with weights, and all.
fn case(tokens: usize, top_k: usize, experts: (u32, u32), tile: u32, draw: Draw) -> Case<MoeSort> {
    let name = format!("{tokens} tokens, {top_k} of {} experts, {} with weights, tiles of {tile}, {draw:?}", experts.1, experts.0);
    let spec = Spec { experts: experts.0, tile };
    let pairs = tokens * top_k;
    let tiles = spec.tiles(pairs as u32) as usize;
    let make = move || {
        let mut inputs = Inputs::seed((tokens * 31 + top_k) as u64);
        let mut routes = draw_routes(&mut inputs, tokens, top_k, experts.1, draw == Draw::Skewed);
        if draw == Draw::One {
            routes.iter_mut().for_each(|r| r.expert = experts.0 - 1);
        }
        let tensors = vec![
            Tensor::input("routes", words(&routes)),
            Tensor::output("order", Data::poison_u32(pairs), Check::rows(pairs, Tolerance::EXACT)),
            Tensor::output("tiles", Data::poison_u32(4 * tiles), Check::rows(4, Tolerance::EXACT)),
        ];
        Job::new(tensors, move |kernel: &MoeSort, t, recording| {
            kernel.record(recording, pairs as u32, t.get("routes"), t.get("order"), t.get("tiles"));
        })
    };
    Case::new(name, spec, (pairs as u32 * experts.0) as f64, make).moving((12 * pairs + 16 * tiles) as f64)
}
