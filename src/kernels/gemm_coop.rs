//! `gemm_coop`: `gemm` on matrix units, with f16 weights and packed activations (`pack_rows`), summed in f32.
//! Drivers have returned wrong tiles: [`GemmCoop::works`] runs a case of each epilogue, and one of f16 outputs, first.

use std::sync::Arc;

use super::linear::{Epilogue, Method, Params, Product, Reads};
use super::linear_case::Shape;
use super::weights::WeightFormat;
use super::{Case, Choice, Field, Job, Kernel, Set, Variant, self_test};
use crate::gpu::{Caps, Device, MatrixUnits, Recording, Shader, ShaderBuilder, Source};
use crate::{Result, reference, wgsl};

/// What the model fixes, and the size of a tile. Weights are f16.
#[derive(Clone, Debug, PartialEq)]
pub struct Spec {
    /// What becomes of the rows.
    pub epilogue: Epilogue,
    /// Fragments of 16 tokens that a subgroup takes: one of [`FRAGMENTS`]; any number of tokens runs.
    pub fragments: u32,
    /// Outputs are f16, of chunks with rows in fours.
    pub halves: bool,
}

/// How it runs.
#[derive(Clone, Debug, PartialEq)]
pub struct Tuning {
    /// For these matrix units, in 32 KiB; else for [`MatrixUnits::TUNED`].
    pub any: Option<MatrixUnits>,
}

/// The ways under `caps`, the fastest first; none where products do not run on its matrix units.
pub(super) fn tunings(fragments: u32, caps: &Caps) -> Vec<Variant<Tuning>> {
    let Ok(units) = caps.matrix_units() else { return Vec::new() };
    let mut all = Vec::new();
    if units == MatrixUnits::TUNED && bytes(fragments) <= caps.workgroup_bytes {
        all.push(Variant { name: "matrices", tuning: Tuning { any: None } });
    }
    // With tiles of 128 tokens an invocation would have 128 registers of sums.
    if fragments < 4 && any_bytes(units, fragments) <= caps.workgroup_bytes {
        all.push(Variant { name: "any", tuning: Tuning { any: Some(units) } });
    }
    all
}

/// The fragments that products run with under `caps`.
pub(super) fn fragments_under(caps: &Caps) -> Vec<u32> {
    FRAGMENTS.into_iter().filter(|fragments| !tunings(*fragments, caps).is_empty()).collect()
}

/// Fragments that kernels are made for: tiles of 32, 64 and 128 tokens.
pub const FRAGMENTS: [u32; 3] = [1, 2, 4];
/// Rows of a tile.
pub const TILE_ROWS: u32 = 256;
/// Compute units of a large device, each of which takes a tile at a time: an H100 has 132.
const UNITS: u32 = 132;
/// What a tile of each takes a unit, measured there.
const COSTS: [u32; 3] = [8, 9, 13];

/// The fragments for a product: large tiles read less, small ones leave fewer units idle at its end.
/// Of those of `under`, as [`fragments_under`] gives them.
///
/// # Panics
/// Where these are none.
pub(super) fn fragments(rows: u32, tokens: u32, under: &[u32]) -> u32 {
    let turns = |f: u32| (rows.div_ceil(TILE_ROWS) * tokens.div_ceil(tile_tokens(f))).div_ceil(UNITS);
    let cost = |(f, cost): &(u32, u32)| turns(*f) * cost;
    let all = FRAGMENTS.into_iter().zip(COSTS).rev().filter(|(f, _)| under.contains(f));
    all.min_by_key(cost).expect("some run").0
}

/// Tokens of a tile.
pub fn tile_tokens(fragments: u32) -> u32 {
    32 * fragments
}

/// Bytes of workgroup memory: a step of both operands, and two fragments of each subgroup.
fn bytes(fragments: u32) -> u32 {
    80 * (TILE_ROWS + tile_tokens(fragments)) + 8 * 16 * 144
}

/// Likewise, for any matrix units: one fragment of each subgroup.
fn any_bytes(units: MatrixUnits, fragments: u32) -> u32 {
    80 * (TILE_ROWS + tile_tokens(fragments)) + 4 * units.subgroups(256) * units.size * units.size
}

/// Why products do not run on a device's matrix units.
pub fn refusal(caps: &Caps) -> Option<String> {
    let fits = !fragments_under(caps).is_empty();
    let memory = || (!fits).then(|| format!("{} bytes of workgroup memory", caps.workgroup_bytes));
    caps.matrix_units().err().map(String::from).or_else(memory)
}

/// Why products in tiles of so many fragments do not.
pub(super) fn refuses(fragments: u32, caps: &Caps) -> Option<String> {
    let (bytes, tokens) = (caps.workgroup_bytes, tile_tokens(fragments));
    let tiles = || format!("{bytes} bytes of workgroup memory for tiles of {tokens} tokens");
    refusal(caps).or_else(|| tunings(fragments, caps).is_empty().then(tiles))
}

/// The largest normalised mean square error of a self-test: of f32 sums, whatever their order.
const SELF_TEST: f64 = 1e-9;

/// Whether a kernel that takes its products from `lib/product_coop` agrees with its twin on a device. Where it does
/// not, a warning says so: something is wrong with that driver.
///
/// # Errors
/// [`crate::Error::DeviceLost`].
pub(super) fn works<K: Kernel>(device: &Device, cases: impl Iterator<Item = (K::Spec, Job<K>)>) -> Result<bool> {
    if refusal(device.caps()).is_some() {
        return Ok(false);
    }
    for (spec, job) in cases {
        if let Some(fault) = self_test::fault(&K::chosen(&spec, device.caps()), &job, device, ("y", SELF_TEST))? {
            log::warn!("{}: {} failed its self-test, {fault}; others run", device.caps().label(), K::NAME);
            return Ok(false);
        }
    }
    Ok(true)
}

/// A shader with the tile of products.
pub(super) fn products(source: Source, fragments: u32, tuning: &Tuning) -> ShaderBuilder {
    let shader = Shader::of(source).u32("FRAGMENTS", fragments);
    let shader = shader.module(wgsl!("lib/halves")).module(wgsl!("lib/product_parts"));
    match tuning.any {
        Some(units) => shader.fragments(units).module(wgsl!("lib/scalar_tile")).module(wgsl!("lib/product_coop_any")),
        None => shader.module(wgsl!("lib/product_coop")).f16().subgroups().cooperative_matrix().rolled(),
    }
}

/// Which of the ways a device gets, and why.
///
/// # Panics
/// Where there is none.
pub(super) fn choice(variants: Vec<Variant<Tuning>>, fragments: u32, what: &str) -> Choice<Tuning> {
    let variant = variants.into_iter().next().unwrap_or_else(|| panic!("refused: tiles of {fragments} fragments"));
    let units = variant.tuning.any.unwrap_or(MatrixUnits::TUNED);
    let why = format!("tiles of {TILE_ROWS} rows x {} {what} on matrix units of {}", tile_tokens(fragments), units.size);
    Choice { variant, why }
}

/// The kernel `gemm_coop`.
pub struct GemmCoop {
    spec: Spec,
    shader: Arc<Shader>,
}

impl Kernel for GemmCoop {
    const NAME: &'static str = "gemm_coop";
    const SOURCE: Source = wgsl!("gemm_coop");
    const PARAMS: &'static [Field] = Params::FIELDS;
    type Spec = Spec;
    type Tuning = Tuning;

    fn refusal(spec: &Spec, caps: &Caps) -> Option<String> {
        refuses(spec.fragments, caps)
    }

    fn class(spec: &Spec) -> String {
        format!("tiles of {} tokens", tile_tokens(spec.fragments))
    }

    fn variants(spec: &Spec, caps: &Caps) -> Vec<Variant<Tuning>> {
        tunings(spec.fragments, caps)
    }

    fn tuning(spec: &Spec, caps: &Caps) -> Choice<Tuning> {
        choice(Self::variants(spec, caps), spec.fragments, "tokens")
    }

    fn new(spec: &Spec, tuning: &Tuning) -> GemmCoop {
        assert!(FRAGMENTS.contains(&spec.fragments), "gemm_coop: fragments of {FRAGMENTS:?}: {spec:?}");
        assert!(!spec.halves || spec.epilogue == Epilogue::Store, "gemm_coop: only what is stored can be f16: {spec:?}");
        let put = if spec.halves { wgsl!("lib/put_f16") } else { wgsl!("lib/put_f32") };
        let shader = spec.epilogue.add_to(products(Self::SOURCE, spec.fragments, tuning)).module(put).build();
        GemmCoop { spec: spec.clone(), shader }
    }

    fn shader(&self) -> &Arc<Shader> {
        &self.shader
    }

    fn cases(set: Set) -> Vec<Case<GemmCoop>> {
        let make = |shape: Shape, fragments: u32| {
            let spec = Spec { epilogue: shape.epilogue, fragments, halves: shape.halves };
            let record = |kernel: &GemmCoop, recording: &mut Recording, product: &Product| kernel.record(recording, product);
            let case = shape.packed().case(spec, record);
            Case { name: format!("{}, tiles of {} tokens", case.name, tile_tokens(fragments)), ..case }
        };
        if set == Set::Timed {
            let sizes = [(10_944, 2048), (2048, 10_944), (3648, 2048), (2048, 2048), (64, 2048), (7168, 18_432)];
            let tokens = [64, 128, 512, 4096];
            let each = |(rows, columns): (usize, usize)| {
                let of = |tokens: usize| fragments(rows as u32, tokens as u32, &FRAGMENTS);
                tokens.map(|tokens| make(Shape::new(rows, columns, tokens), of(tokens)))
            };
            return sizes.into_iter().flat_map(each).collect();
        }
        use Epilogue::{Add, Store, Swiglu};
        let sizes: [(usize, usize, usize, Epilogue, &'static [usize]); 9] = [
            (2, 1, 9, Store, &[2]),
            (3, 7, 17, Add, &[1, 2]),
            (130, 64, 32, Swiglu, &[62, 68]),
            (257, 130, 65, Store, &[257]),
            (128, 32, 128, Store, &[128]),
            (128, 96, 129, Add, &[128]),
            (300, 1030, 100, Swiglu, &[130, 64, 106]),
            (40, 4098, 12, Store, &[40]),
            (12, 50, 300, Swiglu, &[4, 6, 2]),
        ];
        let mut cases = Vec::new();
        for (rows, columns, tokens, epilogue, chunks) in sizes {
            let shape = Shape { epilogue, chunks: Some(chunks), ..Shape::new(rows, columns, tokens) };
            cases.extend(FRAGMENTS.map(|fragments| make(shape, fragments)));
        }
        let part = Shape { x: (212, 12), y: (96, 20), ..Shape::new(50, 100, 70) };
        cases.extend([make(part, 1), make(Shape { epilogue: Add, ..part }, 2), make(Shape { epilogue: Swiglu, ..part }, 4)]);
        let halves = |rows, columns, tokens| Shape { halves: true, ..Shape::new(rows, columns, tokens) };
        let cut = Shape { chunks: Some(&[132, 64, 104]), ..halves(300, 1030, 100) };
        cases.extend([make(halves(40, 7, 9), 1), make(cut, 2), make(halves(512, 96, 129), 4)]);
        if set == Set::Full {
            cases.extend(FRAGMENTS.map(|fragments| make(Shape::new(2050, 4096, 513), fragments)));
        }
        cases
    }
}

impl GemmCoop {
    /// Whether products run on a device's matrix units: a small case of each epilogue, one with f16 outputs and so each
    /// tile once agree with their twins.
    ///
    /// # Errors
    /// [`crate::Error::DeviceLost`].
    pub fn works(device: &Device) -> Result<bool> {
        let record = |kernel: &GemmCoop, recording: &mut Recording, product: &Product| kernel.record(recording, product);
        let under = fragments_under(device.caps());
        let ways = Epilogue::ALL.map(|epilogue| (epilogue, false)).into_iter().chain([(Epilogue::Store, true)]);
        let cases = ways.zip(under.into_iter().cycle()).map(|((epilogue, halves), fragments)| {
            let shape = Shape { epilogue, halves, ..Shape::new(196, 70, 37) }.packed();
            (Spec { epilogue, fragments, halves }, shape.job(record))
        });
        works(device, cases)
    }

    /// `y = epilogue(W x)`: a dispatch for each chunk of the matrix.
    ///
    /// # Panics
    /// When the matrix is not f16, the activations are not packed or do not fit it, or rows that become f16 are not
    /// in fours.
    pub fn record(&self, recording: &mut Recording, product: &Product) {
        let fours = product.weights.chunks.iter().all(|chunk| chunk.rows.is_multiple_of(4) && chunk.first_row.is_multiple_of(4));
        assert!(!self.spec.halves || fours, "gemm_coop: f16 outputs of chunks that are not cut in fours");
        let (format, epilogue) = (WeightFormat::F16, self.spec.epilogue);
        let block = (TILE_ROWS, tile_tokens(self.spec.fragments));
        let reads = Reads::Packed(reference::gemm_coop::gemm);
        let method = Method { shader: &self.shader, format, epilogue, block, reads, halves: self.spec.halves };
        method.record(recording, product);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_are_those_that_fit_the_matrix_units_and_the_memory() {
        let under = |size, width| fragments_under(&Caps::with(MatrixUnits { size, width }));
        assert_eq!(fragments_under(&Caps::matrices()), FRAGMENTS);
        assert_eq!([under(8, 32), under(16, 64)], [[1, 2], [1, 2]]);
        assert_eq!([under(8, 8), under(16, 32)], [[1], [1]]);
        assert!(under(16, 16).is_empty() && fragments_under(&Caps::everything()).is_empty());
        assert_eq!(fragments(4096, 4096, &FRAGMENTS), 4);
        assert_eq!(fragments(4096, 4096, &under(8, 32)), 2);
        assert_eq!(fragments(64, 32, &FRAGMENTS), 1);
    }
}
