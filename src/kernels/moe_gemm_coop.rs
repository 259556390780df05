//! `moe_gemm_coop`: `moe_gemm` on matrix units, with f16 weights and packed activations (`pack_rows`), as
//! `gemm_coop`. [`MoeGemmCoop::works`] runs a case of each tile first.

use std::sync::Arc;

use super::gemm_coop::{self, FRAGMENTS, TILE_ROWS, Tuning, tile_tokens};
use super::linear::Activations;
use super::moe::{Experts, Step};
use super::moe_case::{Given, Shape};
use super::moe_gemm::{Method, Params};
use super::pack_rows::Packed;
use super::weights::WeightFormat;
use super::{Case, Choice, Field, Kernel, Set, Variant};
use crate::gpu::{Caps, Device, Recording, Shader, Source, View};
use crate::{Result, reference, wgsl};

/// What the model fixes, and the size of `moe_sort`'s tiles. Weights are f16.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spec {
    /// Which product.
    pub step: Step,
    /// Fragments of 16 pairs that a subgroup takes: one of [`FRAGMENTS`]. A tile has 32 times as many pairs.
    pub fragments: u32,
}

/// The kernel `moe_gemm_coop`.
pub struct MoeGemmCoop {
    spec: Spec,
    shader: Arc<Shader>,
}

impl Kernel for MoeGemmCoop {
    const NAME: &'static str = "moe_gemm_coop";
    const SOURCE: Source = wgsl!("moe_gemm_coop");
    const PARAMS: &'static [Field] = Params::FIELDS;
    type Spec = Spec;
    type Tuning = Tuning;

    fn refusal(spec: &Spec, caps: &Caps) -> Option<String> {
        gemm_coop::refuses(spec.fragments, caps)
    }

    fn variants(spec: &Spec, caps: &Caps) -> Vec<Variant<Tuning>> {
        gemm_coop::tunings(spec.fragments, caps)
    }

    fn tuning(spec: &Spec, caps: &Caps) -> Choice<Tuning> {
        gemm_coop::choice(Self::variants(spec, caps), spec.fragments, "pairs")
    }

    fn new(spec: &Spec, tuning: &Tuning) -> MoeGemmCoop {
        assert!(FRAGMENTS.contains(&spec.fragments), "moe_gemm_coop: fragments of {FRAGMENTS:?}: {spec:?}");
        let products = gemm_coop::products(Self::SOURCE, spec.fragments, tuning).module(wgsl!("lib/put_f32"));
        let shader = spec.step.epilogue().add_to(products).build();
        MoeGemmCoop { spec: *spec, shader }
    }

    fn shader(&self) -> &Arc<Shader> {
        &self.shader
    }

    fn cases(set: Set) -> Vec<Case<MoeGemmCoop>> {
        let make = |shape: Shape, fragments: u32| {
            let spec = Spec { step: shape.step, fragments };
            shape.packed().tiled(tile_tokens(fragments)).case(spec, record)
        };
        if set == Set::Timed {
            let sizes = [(2816, 2048, Step::Up), (2048, 1408, Step::Down)];
            let each = |(rows, columns, step)| {
                let shape = |tokens| Shape { step, ..Shape::new(rows, columns, tokens, 6, 64) };
                [(256, 1), (512, 1), (512, 2), (1024, 2), (2048, 2), (2048, 4)]
                    .map(|(tokens, fragments)| make(shape(tokens), fragments))
            };
            return sizes.into_iter().flat_map(each).collect();
        }
        let shapes = Shape::pairs(&[3, 8, 33, 200]).into_iter().enumerate();
        shapes.map(|(i, shape)| make(shape, FRAGMENTS[i / 2 % 3])).collect()
    }
}

fn record(kernel: &MoeGemmCoop, recording: &mut Recording, t: &Given) {
    kernel.record(recording, t.experts, (t.order(), t.tiles()), (&t.x, &t.packed()), &t.y, (t.tokens, t.top_k));
}

impl MoeGemmCoop {
    /// Whether experts' products run on a device's matrix units: a small case of each tile agrees with its twin.
    ///
    /// # Errors
    /// [`crate::Error::DeviceLost`].
    pub fn works(device: &Device) -> Result<bool> {
        let under = gemm_coop::fragments_under(device.caps());
        // Each tile and each product, in turn.
        let count = under.len().max(2);
        let tiles = under.into_iter().cycle().zip([Step::Up, Step::Down].into_iter().cycle()).take(count);
        let cases = tiles.map(|(fragments, step)| {
            let shape = Shape { step, ..Shape::new(134, 70, 40, 2, 3) };
            (Spec { step, fragments }, shape.packed().tiled(tile_tokens(fragments)).job(record))
        });
        gemm_coop::works(device, cases)
    }

    /// As [`super::moe_gemm::MoeGemm::record`], of f16 weights, with `x` packed, too.
    ///
    /// # Panics
    /// As there.
    pub fn record(
        &self,
        recording: &mut Recording,
        experts: Experts,
        sorted: (View, View),
        (x, packed): (&Activations, &Packed),
        y: &Activations,
        counts: (u32, u32),
    ) {
        let Spec { step, fragments } = self.spec;
        let unpack = reference::moe_gemm_coop::unpacked;
        let (format, tile, rows) = (WeightFormat::F16, tile_tokens(fragments), TILE_ROWS);
        let method = Method { shader: &self.shader, format, step, tile, rows, packed: Some((packed, unpack)) };
        method.record(recording, experts, sorted, x, y, counts);
    }
}
