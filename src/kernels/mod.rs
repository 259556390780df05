//! The kernels, one file each, and what all of them offer.
//!
//! Three kinds of number never mix: `Params` (sizes, passed per call), `Spec` (fixed by the
//! model) and `Tuning` (chosen for speed on a device; never changes the answer beyond rounding).

mod batch;
mod case;
mod contexts;
mod gqa_decode_cases;
pub mod inputs;
pub mod linear;
mod linear_case;
pub mod matrices;
mod mla_decode_cases;
mod mla_decode_fused_cases;
mod mla_prefill_cases;
pub mod moe;
mod moe_case;
pub mod moe_layer;
mod pairs;
pub mod pieces;
pub mod plan;
mod self_test;
pub mod up_projection;
pub mod weights;

use std::fmt::Debug;
use std::sync::Arc;

pub use batch::{CacheChunk, Row, Sequence, Span, Split};
pub use case::{AnyCase, AnyJob, Case, Check, Data, Expected, Job, Role, Set, Tensor, Tensors, Tolerance};

use crate::gpu::{Caps, Shader, Source};

/// One way of running a kernel on a device.
#[derive(Clone, Debug)]
pub struct Variant<T> {
    /// Its name, such as `portable`, `f16`, `subgroup`.
    pub name: &'static str,
    /// Its numbers.
    pub tuning: T,
}

/// The variant that a device gets, and why.
#[derive(Clone, Debug)]
pub struct Choice<T> {
    /// What was chosen.
    pub variant: Variant<T>,
    /// The reason, for `lamina info`.
    pub why: String,
}

/// What every kernel's file offers; `check`, `bench` and `info` drive kernels through it.
/// Each kernel has besides a `record` of its own, which adds its dispatches to a recording.
pub trait Kernel: Sized + Send + Sync + 'static {
    /// The name of its four files.
    const NAME: &'static str;
    /// Its shader file.
    const SOURCE: Source;
    /// The fields of its WGSL `Params`, empty where it has none.
    const PARAMS: &'static [Field];
    /// What the model fixes.
    type Spec: Clone + Debug + PartialEq + Send + Sync + 'static;
    /// What is chosen for speed.
    type Tuning: Clone + Debug + Send + Sync + 'static;

    /// Why it cannot run `spec` under `caps` at all, for a kernel in whose place another serves, or whose
    /// widths workgroup memory does not hold; the others run everywhere.
    fn refusal(_spec: &Self::Spec, _caps: &Caps) -> Option<String> {
        None
    }

    /// Every way of running `spec` that `caps` allow, the portable one first; none where it is refused.
    fn variants(spec: &Self::Spec, caps: &Caps) -> Vec<Variant<Self::Tuning>>;

    /// The variant for a device by the kernel's own tables: a pure choice among [`Kernel::variants`].
    ///
    /// # Panics
    /// Where the kernel is refused.
    fn tuning(spec: &Self::Spec, caps: &Caps) -> Choice<Self::Tuning>;

    /// Which specs one choice of a variant serves, by a name: `lamina bench tune` measures a class by the timed cases
    /// that are of it. A spec is a class of its own unless a kernel says which of its parts make no difference.
    fn class(spec: &Self::Spec) -> String {
        format!("{spec:?}")
    }

    /// The kernel with its shader composed.
    fn new(spec: &Self::Spec, tuning: &Self::Tuning) -> Self;

    /// The variant for a device: the one that was measured there ([`Caps::tuned`]), else that of [`Kernel::tuning`].
    ///
    /// # Panics
    /// Where the kernel is refused.
    fn choice(spec: &Self::Spec, caps: &Caps) -> Choice<Self::Tuning> {
        let class = Self::class(spec);
        let measured = caps.tuned.iter().find(|tuned| tuned.kernel == Self::NAME && tuned.class == class);
        let choice = measured.and_then(|tuned| {
            let variant = Self::variants(spec, caps).into_iter().find(|variant| variant.name == tuned.variant)?;
            Some(Choice { variant, why: tuned.why() })
        });
        choice.unwrap_or_else(|| Self::tuning(spec, caps))
    }

    /// The kernel with the variant for a device.
    fn chosen(spec: &Self::Spec, caps: &Caps) -> Self {
        Self::new(spec, &Self::choice(spec, caps).variant.tuning)
    }

    /// The specialised shader.
    fn shader(&self) -> &Arc<Shader>;

    /// The parity cases.
    fn cases(set: Set) -> Vec<Case<Self>>;
}

/// A member of a `Params` struct, for the test that holds it against the WGSL.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Field {
    /// Its name.
    pub name: &'static str,
    /// Its offset, bytes.
    pub offset: usize,
    /// `u32`, `i32` or `f32`.
    pub kind: &'static str,
}

/// Declares a kernel's `Params`: a plain struct of 4-byte numbers, with its fields listed in `FIELDS`.
#[macro_export]
macro_rules! params {
    ($(#[$meta:meta])* pub struct $name:ident { $($(#[$doc:meta])* pub $field:ident: $kind:ident,)* }) => {
        $(#[$meta])*
        #[repr(C)]
        #[derive(Clone, Copy, Debug, Default, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]
        pub struct $name { $($(#[$doc])* pub $field: $kind,)* }

        impl $name {
            /// Name, offset and type of each member.
            pub const FIELDS: &'static [$crate::kernels::Field] = &[$($crate::kernels::Field {
                name: stringify!($field),
                offset: std::mem::offset_of!($name, $field),
                kind: stringify!($kind),
            },)*];
        }
    };
}

/// A kernel without its types: what the list holds.
pub struct Entry {
    /// The kernel's name.
    pub name: &'static str,
    /// Its shader file.
    pub source: Source,
    /// Its `Params`.
    pub params: &'static [Field],
    /// Its parity cases.
    pub cases: fn(Set) -> Vec<AnyCase>,
    /// Every shader that its cases' specs and the variants under `caps` give, with the variant's name.
    pub shaders: fn(&Caps) -> Vec<(&'static str, Arc<Shader>)>,
    /// The distinct choices under `caps`: spec, variant, why.
    pub choices: fn(&Caps) -> Vec<(String, &'static str, String)>,
}

fn entry<K: Kernel>() -> Entry {
    Entry {
        name: K::NAME,
        source: K::SOURCE,
        params: K::PARAMS,
        cases: |set| K::cases(set).into_iter().map(Case::erase).collect(),
        shaders: |caps| {
            let mut shaders: Vec<(&'static str, Arc<Shader>)> = Vec::new();
            for spec in specs::<K>(&[Set::Pairs]) {
                for variant in K::variants(&spec, caps) {
                    let shader = K::new(&spec, &variant.tuning).shader().clone();
                    if shaders.iter().all(|(_, s)| s.key() != shader.key()) {
                        shaders.push((variant.name, shader));
                    }
                }
            }
            shaders
        },
        choices: |caps| {
            let mut choices: Vec<(String, &'static str, String)> = Vec::new();
            // Timed ones are what `lamina bench tune` measures.
            for spec in specs::<K>(&[Set::Pairs, Set::Timed]) {
                let (name, why) = match K::refusal(&spec, caps) {
                    Some(why) => ("none", why),
                    None => {
                        let choice = K::choice(&spec, caps);
                        (choice.variant.name, choice.why)
                    }
                };
                if choices.iter().all(|(_, n, w)| (*n, w) != (name, &why)) {
                    choices.push((format!("{spec:?}"), name, why));
                }
            }
            choices
        },
    }
}

/// The distinct specs of a kernel's cases.
fn specs<K: Kernel>(sets: &[Set]) -> Vec<K::Spec> {
    let mut specs: Vec<K::Spec> = Vec::new();
    for case in sets.iter().flat_map(|set| K::cases(*set)) {
        if !specs.contains(&case.spec) {
            specs.push(case.spec);
        }
    }
    specs
}

/// Lists the kernels: their modules, and [`ALL`].
macro_rules! kernels {
    ($($module:ident :: $kernel:ident,)*) => {
        $(pub mod $module;)*

        /// Every kernel.
        pub static ALL: std::sync::LazyLock<Vec<Entry>> =
            std::sync::LazyLock::new(|| vec![$(entry::<$module::$kernel>(),)*]);
    };
}

kernels![
    add::Add,
    embed::Embed,
    gemm::Gemm,
    gemm_coop::GemmCoop,
    gemv::Gemv,
    gqa_append::GqaAppend,
    gqa_decode::GqaDecode,
    mla_absorb::MlaAbsorb,
    mla_combine::MlaCombine,
    mla_decode::MlaDecode,
    mla_decode_coop::MlaDecodeCoop,
    mla_decode_fused::MlaDecodeFused,
    mla_append::MlaAppend,
    mla_gather::MlaGather,
    mla_prefill::MlaPrefill,
    mla_prefill_coop::MlaPrefillCoop,
    moe_combine::MoeCombine,
    moe_gemm::MoeGemm,
    moe_gemm_coop::MoeGemmCoop,
    moe_gemv::MoeGemv,
    moe_route::MoeRoute,
    moe_sort::MoeSort,
    pack_rows::PackRows,
    rms_norm::RmsNorm,
    rope::Rope,
    sample::Sample,
    swiglu::Swiglu,
];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::tuned::Tuned;

    #[test]
    fn a_measured_variant_is_taken_for_its_kernel_and_class_while_there_is_one_of_that_name() {
        let tuned = |kernel: &str, class: &str, variant: &str| Tuned {
            kernel: kernel.into(),
            class: class.into(),
            variant: variant.into(),
            untuned: "subgroup".into(),
            shares: vec![("portable".into(), 0.5), ("subgroup".into(), 1.0)],
            date: "2026-11-26".into(),
        };
        let choice = |tuned: Tuned| {
            let caps = Caps { tuned: vec![tuned], ..Caps::everything() };
            let Choice { variant, why } = rms_norm::RmsNorm::choice(&rms_norm::Spec, &caps);
            (variant.name, why.contains("by lamina bench tune, 2026-11-26: subgroup takes 2.00 times as long"))
        };
        assert_eq!(choice(tuned("rms_norm", "Spec", "portable")), ("portable", true));
        for other in
            [("pack_rows", "Spec", "portable"), ("rms_norm", "Spec { a: 1 }", "portable"), ("rms_norm", "Spec", "gone")]
        {
            assert_eq!(choice(tuned(other.0, other.1, other.2)), ("subgroup", false), "{other:?}");
        }
        // `lamina info` shows it.
        let caps = Caps { tuned: vec![tuned("rms_norm", "Spec", "portable")], ..Caps::everything() };
        let entry = ALL.iter().find(|entry| entry.name == "rms_norm").expect("in the list");
        assert_eq!((entry.choices)(&caps)[0].1, "portable");
    }

    #[test]
    fn classes_of_products_experts_and_routers_are_timed() {
        for name in ["gemv", "moe_gemv", "moe_route"] {
            let entry = ALL.iter().find(|entry| entry.name == name).expect("in the list");
            let classes = |set| (entry.cases)(set).into_iter().map(|case| case.class).collect::<Vec<_>>();
            let timed = classes(Set::Timed);
            let others: Vec<String> = classes(Set::Pairs).into_iter().filter(|class| !timed.contains(class)).collect();
            assert!(others.is_empty(), "{name}: {others:?}");
        }
    }
}
