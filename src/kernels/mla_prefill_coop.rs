//! `mla_prefill_coop`: `mla_prefill` on matrix units, with queries, keys, values and softmax weights as f16 and all sums
//! in f32. Drivers have returned wrong tiles: [`Attention::new`] runs a case first.

use std::sync::Arc;

use super::mla_prefill::{self, Args, Method, MlaPrefill, Params, Spec};
use super::mla_prefill_cases::{cases, self_test_of};
use super::{Case, Choice, Field, Kernel, Set, Variant, self_test};
use crate::gpu::{Caps, Device, MatrixUnits, Recording, Shader, Source};
use crate::{Result, reference, wgsl};

/// How it runs.
#[derive(Clone, Debug, PartialEq)]
pub struct Tuning {
    /// Keys of a tile: 16 or 32.
    pub keys: u32,
    /// For these matrix units, in 32 KiB and with 16 keys; else for [`MatrixUnits::TUNED`].
    pub any: Option<MatrixUnits>,
}

impl Tuning {
    /// New tokens that a workgroup takes.
    fn rows(&self) -> u32 {
        self.any.map_or(128, |units| units.subgroups(8) * units.size)
    }

    /// Bytes of the shader's workgroup variables.
    fn bytes(&self, spec: &Spec) -> u32 {
        let (row, weight) = (spec.nope + spec.value + spec.rope + 8, self.keys + 8);
        let scratch = if self.any.is_some() { 4 * 16 + 8 } else { 80 };
        let moved = if self.any.is_some() { 16 } else { 0 };
        2 * (self.keys * row + self.rows() * weight) + self.rows() * scratch + moved
    }

    /// Whether what the shader's lanes move of a tile has names there, and its variables fit `limit` bytes.
    fn fits(&self, spec: &Spec, limit: u32) -> bool {
        let (expanded, turned) = (self.keys * (spec.nope + spec.value) / 8, self.keys * spec.rope / 4);
        let named = self.any.is_some() || expanded <= 4 * WORKGROUP && turned <= 2 * WORKGROUP;
        named && self.bytes(spec) <= limit
    }
}

/// The ways under `caps`, the fastest first; none where its matrix units or workgroup memory do not suit.
fn tunings(spec: &Spec, caps: &Caps) -> Vec<Variant<Tuning>> {
    let Ok(units) = caps.matrix_units() else { return Vec::new() };
    let tuned = [("keys32", 32), ("keys16", 16)].map(|(name, keys)| (name, Tuning { keys, any: None }));
    let tuned = tuned.into_iter().filter(|_| units == MatrixUnits::TUNED);
    let all = tuned.chain([("any", Tuning { keys: 16, any: Some(units) })]);
    let fitting = all.filter(|(_, tuning)| tuning.fits(spec, caps.workgroup_bytes));
    fitting.map(|(name, tuning)| Variant { name, tuning }).collect()
}

/// Invocations of a workgroup.
const WORKGROUP: u32 = 256;
/// The largest normalised mean square error of the self-test, which asks whether a driver computes at all what it is
/// told to.
const SELF_TEST: f64 = 1e-6;
/// The widest key, and value, whose fragments have names in the shader.
const MOST_WIDTH: u32 = 256;

/// The kernel `mla_prefill_coop`.
pub struct MlaPrefillCoop {
    spec: Spec,
    rows: u32,
    shader: Arc<Shader>,
}

impl Kernel for MlaPrefillCoop {
    const NAME: &'static str = "mla_prefill_coop";
    const SOURCE: Source = wgsl!("mla_prefill_coop");
    const PARAMS: &'static [Field] = Params::FIELDS;
    type Spec = Spec;
    type Tuning = Tuning;

    fn refusal(spec: &Spec, caps: &Caps) -> Option<String> {
        let Spec { nope, rope, value, .. } = *spec;
        let sixteens = [nope, rope, value].iter().all(|width| width.is_multiple_of(16));
        let why = if let Err(why) = caps.matrix_units() {
            why.to_string()
        } else if !sixteens || nope + rope == 0 || value == 0 || nope + rope > MOST_WIDTH || value > MOST_WIDTH {
            format!("keys of {nope} + {rope} and values of {value}, not multiples of 16 up to {MOST_WIDTH}")
        } else if tunings(spec, caps).is_empty() {
            format!("{} bytes of workgroup memory", caps.workgroup_bytes)
        } else {
            return None;
        };
        Some(why)
    }

    fn variants(spec: &Spec, caps: &Caps) -> Vec<Variant<Tuning>> {
        if Self::refusal(spec, caps).is_some() {
            return Vec::new();
        }
        tunings(spec, caps)
    }

    fn tuning(spec: &Spec, caps: &Caps) -> Choice<Tuning> {
        let variant = Self::variants(spec, caps).into_iter().next();
        let variant = variant.unwrap_or_else(|| panic!("mla_prefill_coop: {:?}", Self::refusal(spec, caps)));
        let Tuning { keys, any } = &variant.tuning;
        let size = any.unwrap_or(MatrixUnits::TUNED).size;
        let why = format!("{} rows over tiles of {keys} keys on matrix units of {size}", variant.tuning.rows());
        Choice { variant, why }
    }

    fn new(spec: &Spec, tuning: &Tuning) -> MlaPrefillCoop {
        let Spec { nope, rope, value, accumulate } = *spec;
        let source = if tuning.any.is_some() { wgsl!("mla_prefill_coop_any") } else { Self::SOURCE };
        let shader = Shader::of(source)
            .u32("N", nope)
            .u32("P", rope)
            .u32("V", value)
            .bool("ACCUMULATE", accumulate)
            .module(wgsl!("lib/batch"))
            .module(wgsl!("lib/halves"));
        let shader = match tuning.any {
            Some(units) => {
                shader.fragments(units).u32("SUBGROUPS", units.subgroups(8)).module(wgsl!("lib/scalar_tile"))
            }
            None => shader
                .u32("KEYS", tuning.keys)
                .module(wgsl!("lib/expanded_f16"))
                .f16()
                .subgroups()
                .cooperative_matrix()
                .rolled(),
        };
        MlaPrefillCoop { spec: spec.clone(), rows: tuning.rows(), shader: shader.build() }
    }

    fn shader(&self) -> &Arc<Shader> {
        &self.shader
    }

    fn cases(set: Set) -> Vec<Case<MlaPrefillCoop>> {
        cases(set)
    }
}

impl MlaPrefillCoop {
    /// As [`MlaPrefill::record`].
    ///
    /// # Panics
    /// As there.
    pub fn record(&self, recording: &mut Recording, args: Args) {
        let method = Method { rows: self.rows, halves: true, attend: reference::mla_prefill_coop::attend };
        mla_prefill::record(&self.shader, &self.spec, method, recording, args);
    }
}

/// Materialised attention of a model, by the kernel that a device runs it best with.
pub enum Attention {
    /// On invocations: a sequence's first piece, and later ones.
    Plain([MlaPrefill; 2]),
    /// On matrix units, likewise.
    Matrices([MlaPrefillCoop; 2]),
}

impl Attention {
    /// For keys of `nope` and `rope` values, and values of `value`. Matrix units where the caller can give keys and
    /// values as f16 (`halves`), the widths suit them, and a case of each kernel agreed with its twin. A failed case is
    /// a warning: something is wrong with that driver.
    ///
    /// # Errors
    /// [`crate::Error::DeviceLost`].
    pub fn new((nope, rope, value): (u32, u32, u32), halves: bool, device: &Device) -> Result<Attention> {
        let caps = device.caps();
        let specs = [false, true].map(|accumulate| Spec { nope, rope, value, accumulate });
        if halves && MlaPrefillCoop::refusal(&specs[0], caps).is_none() {
            let kernels = specs.clone().map(|spec| MlaPrefillCoop::chosen(&spec, caps));
            let mut fault = None;
            for kernel in &kernels {
                let tested = self_test::fault(kernel, &self_test_of(&kernel.spec), device, ("output", SELF_TEST))?;
                fault = fault.or(tested);
            }
            match fault {
                None => return Ok(Attention::Matrices(kernels)),
                Some(fault) => {
                    let label = caps.label();
                    log::warn!("{label}: mla_prefill_coop failed its self-test, {fault}; mla_prefill runs");
                }
            }
        }
        Ok(Attention::Plain(specs.map(|spec| MlaPrefill::chosen(&spec, caps))))
    }

    /// True on matrix units.
    pub fn on_matrices(&self) -> bool {
        matches!(self, Attention::Matrices(_))
    }

    /// Attends over one piece of each span's sequence, `first` of each or a later one.
    ///
    /// # Panics
    /// As [`MlaPrefill::record`].
    pub fn record(&self, recording: &mut Recording, first: bool, args: Args) {
        match self {
            Attention::Plain(kernels) => kernels[usize::from(!first)].record(recording, args),
            Attention::Matrices(kernels) => kernels[usize::from(!first)].record(recording, args),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LITE: Spec = Spec { nope: 128, rope: 64, value: 128, accumulate: false };

    #[test]
    fn what_it_cannot_run_is_refused_with_the_reason() {
        assert_eq!(MlaPrefillCoop::refusal(&LITE, &Caps::matrices()), None);
        let refused = |spec: Spec, caps: Caps, why: &str| {
            let found = MlaPrefillCoop::refusal(&spec, &caps).unwrap_or_default();
            assert!(found.contains(why), "{found:?}, not {why}");
            assert!(MlaPrefillCoop::variants(&spec, &caps).is_empty());
        };
        refused(LITE, Caps::portable(), "no matrix units");
        refused(LITE, Caps { subgroups: Some((32, 64)), ..Caps::matrices() }, "subgroups");
        refused(LITE, Caps { workgroup_bytes: 16 << 10, ..Caps::matrices() }, "workgroup memory");
        refused(Spec { rope: 24, ..LITE }, Caps::matrices(), "128 + 24");
        refused(Spec { value: 512, ..LITE }, Caps::matrices(), "values of 512");
    }

    #[test]
    fn a_tile_has_as_many_keys_as_fit() {
        let wide = Spec { nope: 192, rope: 64, value: 256, accumulate: false };
        let tuning = |spec: &Spec, caps: &Caps| MlaPrefillCoop::tuning(spec, caps).variant.tuning;
        assert_eq!(tuning(&LITE, &Caps::matrices()), Tuning { keys: 32, any: None });
        assert_eq!(tuning(&wide, &Caps::matrices()), Tuning { keys: 16, any: None });
        let units = MatrixUnits { size: 8, width: 32 };
        assert_eq!(tuning(&wide, &Caps::with(units)), Tuning { keys: 16, any: Some(units) });
    }
}
