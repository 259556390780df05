//! `mla_decode_coop`: `mla_decode` on matrix units, with queries and softmax weights as f16 and all sums in
//! f32. It writes the same partials, from the same plan, and stands in for `mla_decode` where an adapter and
//! a cache suit it. Drivers have returned wrong tiles: [`MlaDecodeCoop::tried`] runs a case first.

use std::sync::Arc;

use super::mla_decode::{self, Args, MlaDecode, Params, Spec};
use super::mla_decode_cases::{cases, outcome};
use super::plan::{self, Little};
use super::{Case, Choice, Field, Kernel, Set, Variant, self_test};
use crate::gpu::{Caps, Device, MatrixUnits, Recording, Shader, ShaderBuilder, Source};
use crate::num::record::RecordFormat;
use crate::{Result, reference, wgsl};

/// How it runs.
#[derive(Clone, Debug, PartialEq)]
pub struct Tuning {
    /// (Token, head) rows that share a read of a record: 16 or 64.
    pub rows: u32,
    /// For these matrix units, in 32 KiB and with 16 rows; else for [`MatrixUnits::TUNED`].
    pub any: Option<MatrixUnits>,
}

impl Tuning {
    /// Bytes of the shader's workgroup variables.
    fn bytes(&self, spec: &Spec) -> u32 {
        if let Some(units) = self.any {
            let subgroups = units.subgroups(8);
            let pitch = spec.width().next_multiple_of(subgroups * units.size) + 8;
            return 2 * 16 * (pitch + 16 + 8) + 4 * (subgroups * 16 * 16 + 16 + 4);
        }
        let tile = 32 * 8 * (16 * steps(spec) + 2); // of 32 tokens, or two of 16
        tile + match self.rows {
            16 => 16 * 640 + 16 * (2 * (32 + 8) + 4) + 16,
            _ => 16 * 544 + 64 * 2 * (16 + 8),
        }
    }
}

/// The ways under `caps`; none where its matrix units or workgroup memory do not suit. The last one is for any units.
fn tunings(spec: &Spec, caps: &Caps) -> Vec<Variant<Tuning>> {
    let Ok(units) = caps.matrix_units() else { return Vec::new() };
    let tuned = [("rows16", 16), ("rows64", 64)].map(|(name, rows)| (name, Tuning { rows, any: None }));
    let tuned = tuned.into_iter().filter(|_| units == MatrixUnits::TUNED);
    let all = tuned.chain([("any", Tuning { rows: 16, any: Some(units) })]);
    let fitting = all.filter(|(_, tuning)| tuning.bytes(spec) <= caps.workgroup_bytes);
    fitting.map(|(name, tuning)| Variant { name, tuning }).collect()
}

/// Fragments of a row's 16 columns in a quarter of a record.
fn steps(spec: &Spec) -> u32 {
    spec.width().div_ceil(64)
}

/// The widths whose fragments have names in the shader.
const MOST_LATENT: u32 = 512;
const MOST_WIDTH: u32 = 576;
/// Workgroups that fill a large device once: each has the registers of a compute unit to itself.
pub const WORKGROUPS: u32 = 128;
/// What a split costs a workgroup of 16 and of 64 rows, measured on an H100 when blocks of 64 took a sixth more than
/// now. On 2026-11-26 with a batch of 128, 32 rows took 335 us in blocks of 16, and 33 rows 312 in one of 64; but with
/// one sequence of 131,072 tokens 97 and 102, with 32,768 37 and 48. An engine has one sequence: 32 rows keep to 16.
const COSTS: [(u32, u32); 2] = [(16, 3), (64, 7)];

/// Where blocks of 16 rows take less time than one of 64, which [`COSTS`] prefers. On 2026-11-26 one sequence of 64 rows
/// took an H100 19.1 us in blocks of 16 with 4,096 tokens and 23.9 with 8,192, and in one of 64 42.6 with 16,384 and
/// 53.4 with 32,768 (49.8 since), where blocks of 16 took 55; 32 rows with as many pairs as 64 and 16,384 tokens 36.9.
const LITTLE: Little = Little { rows: 16, most: 1 << 20 };

/// The rows of a workgroup for which all workgroups together cost least.
pub(super) fn block_rows(rows: u32) -> u32 {
    let cost = |(block, cost): &(u32, u32)| rows.div_ceil(*block) * cost;
    COSTS.into_iter().min_by_key(cost).expect("there are two").0
}

/// The kernel `mla_decode_coop`.
pub struct MlaDecodeCoop {
    spec: Spec,
    tuning: Tuning,
    shader: Arc<Shader>,
}

impl Kernel for MlaDecodeCoop {
    const NAME: &'static str = "mla_decode_coop";
    const SOURCE: Source = wgsl!("mla_decode_coop");
    const PARAMS: &'static [Field] = Params::FIELDS;
    type Spec = Spec;
    type Tuning = Tuning;

    fn refusal(spec: &Spec, caps: &Caps) -> Option<String> {
        let Spec { latent, format, .. } = *spec;
        let why = if let Err(why) = caps.matrix_units() {
            why.to_string()
        } else if format == RecordFormat::F32 {
            "records are F32, which f16 does not hold".to_string()
        } else if format == RecordFormat::Fp8 && (latent != MOST_LATENT || !spec.rope.is_multiple_of(4)) {
            format!("fp8 records of {latent}+{}, not of {MOST_LATENT} and a multiple of 4", spec.rope)
        } else if !latent.is_multiple_of(16) || latent > MOST_LATENT || spec.width() > MOST_WIDTH {
            format!("a latent of {latent} in {} values, over {MOST_LATENT} in {MOST_WIDTH}", spec.width())
        } else if tunings(spec, caps).is_empty() {
            format!("{} bytes of workgroup memory", caps.workgroup_bytes)
        } else {
            return None;
        };
        Some(why)
    }

    fn class(spec: &Spec) -> String {
        mla_decode::class(spec)
    }

    fn variants(spec: &Spec, caps: &Caps) -> Vec<Variant<Tuning>> {
        if Self::refusal(spec, caps).is_some() {
            return Vec::new();
        }
        tunings(spec, caps)
    }

    fn tuning(spec: &Spec, caps: &Caps) -> Choice<Tuning> {
        let mut variants = Self::variants(spec, caps);
        let takes = |tuning: &Tuning| tuning.any.is_none() && tuning.rows == block_rows(spec.rows);
        variants.sort_by_key(|variant| !takes(&variant.tuning));
        let best = variants.into_iter().next();
        let variant = best.unwrap_or_else(|| panic!("mla_decode_coop: {:?}", Self::refusal(spec, caps)));
        let rows = variant.tuning.rows;
        let which = if rows == 16 { "few" } else { "many" };
        let size = variant.tuning.any.unwrap_or(MatrixUnits::TUNED).size;
        let why = match variant.tuning.any {
            Some(_) => format!("blocks of {rows} rows on matrix units of {size}"),
            None => format!("{which} rows, in blocks of {rows} on matrix units of {size}"),
        };
        Choice { why, variant }
    }

    fn new(spec: &Spec, tuning: &Tuning) -> MlaDecodeCoop {
        let [halves, codes, scalars] = [wgsl!("lib/halves"), wgsl!("lib/e4m3_halves"), wgsl!("lib/scalar_tile")];
        let (cell, record) = match (spec.format, tuning.any) {
            (RecordFormat::F16, None) => ("vec4<f16>", vec![wgsl!("lib/record_f16")]),
            (RecordFormat::Fp8, None) => ("vec4<u32>", vec![halves, codes, wgsl!("lib/record_fp8")]),
            (RecordFormat::F16, Some(_)) => ("vec4<u32>", vec![halves, scalars, wgsl!("lib/staged_f16")]),
            (RecordFormat::Fp8, Some(_)) => ("vec4<u32>", vec![halves, codes, scalars, wgsl!("lib/staged_fp8")]),
            (RecordFormat::F32, _) => panic!("mla_decode_coop: records of f32 are refused"),
        };
        let source = match (tuning.any, tuning.rows) {
            (Some(_), _) => wgsl!("mla_decode_coop_any"),
            (None, 64) => wgsl!("mla_decode_coop_rows64"),
            (None, _) => Self::SOURCE,
        };
        let shader = Shader::of(source)
            .u32("R", spec.latent)
            .u32("P", spec.rope)
            .u32("W", spec.width())
            .alias("Cell", cell)
            .module(wgsl!("lib/batch"))
            .module(wgsl!("lib/rows_paged"))
            .module(wgsl!("lib/score_plain"));
        let shader = record.into_iter().fold(shader, ShaderBuilder::module);
        let shader = match tuning.any {
            Some(units) => shader.fragments(units).u32("SUBGROUPS", units.subgroups(8)),
            None => shader
                .u32("STEPS", steps(spec))
                .u32("COLUMNS", spec.latent.div_ceil(128))
                .u32("ROWS", tuning.rows)
                .module(wgsl!("lib/block_coop"))
                .f16()
                .subgroups()
                .cooperative_matrix()
                .rolled(),
        };
        MlaDecodeCoop { spec: spec.clone(), tuning: tuning.clone(), shader: shader.build() }
    }

    fn shader(&self) -> &Arc<Shader> {
        &self.shader
    }

    fn cases(set: Set) -> Vec<Case<MlaDecodeCoop>> {
        cases(set)
    }
}

impl MlaDecodeCoop {
    /// How it runs.
    pub fn tuned(&self) -> &Tuning {
        &self.tuning
    }

    /// The kernel, once a small case on `device` agreed with the twin; why not, where it is refused or fails.
    ///
    /// # Errors
    /// Faults of the device beyond the kernel's own, such as a lost device.
    pub fn tried(spec: &Spec, device: &Device) -> Result<std::result::Result<MlaDecodeCoop, String>> {
        if let Some(why) = Self::refusal(spec, device.caps()) {
            return Ok(Err(why));
        }
        let kernel = Self::chosen(spec, device.caps());
        let fault = self_test::told(outcome(&kernel, spec, device))?;
        Ok(fault.map_or(Ok(kernel), Err))
    }

    /// Folds a step's splits: a dispatch for each cache chunk that has some.
    ///
    /// # Panics
    /// When a page has no multiple of 16 tokens, or no power of two.
    pub fn record(&self, recording: &mut Recording, args: &Args) {
        assert!(args.page.is_multiple_of(16), "mla_decode_coop: pages of {} tokens", args.page);
        let twin = reference::mla_decode_coop::query;
        mla_decode::record(&self.shader, &self.spec, self.tuning.rows, twin, recording, args);
    }
}

/// `mla_decode`, by the kernel that a device runs it best with.
pub enum Decoder {
    /// On invocations.
    Plain(MlaDecode),
    /// On matrix units.
    Matrices {
        /// For most steps.
        usual: MlaDecodeCoop,
        /// For steps of little work, where another variant takes less time for them.
        little: Option<MlaDecodeCoop>,
    },
}

/// A failed self-test, and what runs instead.
fn warn(fault: &str, device: &Device, instead: &str) {
    log::warn!("{}: mla_decode_coop failed its self-test, {fault}; {instead}", device.caps().label());
}

impl Decoder {
    /// Matrix units where they suit `spec` and pages of `page` tokens, and a case agreed with its twin. A
    /// failed case is a warning: something is wrong with that driver.
    ///
    /// # Errors
    /// As [`MlaDecodeCoop::tried`].
    pub fn new(spec: &Spec, page: u32, device: &Device) -> Result<Decoder> {
        let refused = MlaDecodeCoop::refusal(spec, device.caps()).is_some() || !page.is_multiple_of(16);
        if !refused {
            match Self::matrices(spec, device)? {
                Ok(decoder) => return Ok(decoder),
                Err(fault) => warn(&fault, device, "mla_decode runs"),
            }
        }
        Ok(Decoder::Plain(MlaDecode::chosen(spec, device.caps())))
    }

    /// On matrix units, once a case agreed with its twin; why not, where the kernel is refused or fails.
    ///
    /// # Errors
    /// As [`MlaDecodeCoop::tried`].
    pub fn matrices(spec: &Spec, device: &Device) -> Result<std::result::Result<Decoder, String>> {
        let usual = match MlaDecodeCoop::tried(spec, device)? {
            Ok(usual) => usual,
            Err(why) => return Ok(Err(why)),
        };
        let mut little = None;
        if usual.tuning.rows > LITTLE.rows {
            match MlaDecodeCoop::tried(&Spec { rows: LITTLE.rows, ..spec.clone() }, device)? {
                Ok(kernel) => little = Some(kernel),
                Err(fault) => warn(&fault, device, "larger blocks run"),
            }
        }
        Ok(Ok(Self::of(usual, little)))
    }

    /// Of kernels that were tried: one for most steps, and perhaps one for steps of little work.
    pub fn of(usual: MlaDecodeCoop, little: Option<MlaDecodeCoop>) -> Decoder {
        // What was measured on this adapter may be another.
        let little = little.filter(|kernel| usual.tuning.rows > LITTLE.rows && kernel.tuning.rows == LITTLE.rows);
        Decoder::Matrices { usual, little }
    }

    /// (Token, head) rows that a workgroup folds in most steps.
    pub fn rows(&self) -> u32 {
        match self {
            Decoder::Plain(kernel) => kernel.tuned().rows,
            Decoder::Matrices { usual, .. } => usual.tuned().rows,
        }
    }

    /// And in steps of little work, where they are others.
    pub fn little(&self) -> Option<Little> {
        match self {
            Decoder::Matrices { little: Some(_), .. } => Some(LITTLE),
            _ => None,
        }
    }

    /// Workgroups that fill a device once, as far as its kind tells.
    pub fn workgroups(&self, caps: &Caps) -> u32 {
        match self {
            Decoder::Plain(_) => plan::workgroups(caps),
            Decoder::Matrices { .. } => plan::workgroups(caps).min(WORKGROUPS),
        }
    }

    /// The variant that runs a plan for blocks of `rows` rows.
    pub fn blocks(&self, rows: u32) -> String {
        match self {
            Decoder::Matrices { usual, .. } if usual.tuning.any.is_some() => "any".into(),
            _ => format!("rows{rows}"),
        }
    }

    /// True on matrix units.
    pub fn on_matrices(&self) -> bool {
        matches!(self, Decoder::Matrices { .. })
    }

    /// Folds a step's splits, in blocks of the plan's rows.
    ///
    /// # Panics
    /// When the plan is for other rows than [`Decoder::rows`] and [`Decoder::little`].
    pub fn record(&self, recording: &mut Recording, args: &Args) {
        match self {
            Decoder::Plain(kernel) => kernel.record(recording, args),
            Decoder::Matrices { usual, little } => {
                let fits = |kernel: &&MlaDecodeCoop| kernel.tuned().rows == args.plan.rows;
                let kernel = [Some(usual), little.as_ref()].into_iter().flatten().find(fits);
                kernel.expect("the plan is for one of the kernels").record(recording, args);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::DeviceType;
    use crate::kernels::Sequence;
    use crate::kernels::plan::{Borders, Target, plan};

    fn spec(rows: u32) -> Spec {
        Spec { latent: 512, rope: 64, format: RecordFormat::F16, rows }
    }

    #[test]
    fn what_it_cannot_run_is_refused_with_the_reason() {
        for format in [RecordFormat::F16, RecordFormat::Fp8] {
            assert_eq!(MlaDecodeCoop::refusal(&Spec { format, ..spec(16) }, &Caps::matrices()), None);
        }
        let refused = |spec: Spec, caps: Caps, why: &str| {
            let found = MlaDecodeCoop::refusal(&spec, &caps).unwrap_or_default();
            assert!(found.contains(why), "{found:?}, not {why}");
            assert!(MlaDecodeCoop::variants(&spec, &caps).is_empty());
        };
        refused(spec(16), Caps::portable(), "no matrix units");
        refused(spec(16), Caps { cooperative: vec![Caps::matrices().cooperative[0].clone()], ..Caps::matrices() }, "f16 to f32");
        refused(spec(16), Caps { subgroups: Some((32, 64)), ..Caps::matrices() }, "subgroups");
        refused(spec(16), Caps { workgroup_bytes: 16 << 10, ..Caps::matrices() }, "workgroup memory");
        refused(Spec { format: RecordFormat::F32, ..spec(16) }, Caps::matrices(), "F32");
        refused(Spec { latent: 256, format: RecordFormat::Fp8, ..spec(16) }, Caps::matrices(), "fp8 records of 256+64");
        refused(Spec { latent: 1024, ..spec(16) }, Caps::matrices(), "latent of 1024");
        refused(Spec { rope: 128, ..spec(16) }, Caps::matrices(), "640 values");
    }

    #[test]
    fn steps_of_little_work_run_in_blocks_of_16_and_others_in_the_usual_ones() {
        let device = Device::cpu_as(Caps::matrices());
        let of = |heads: u32| Decoder::new(&spec(heads), 64, &device).unwrap();
        assert_eq!((of(16).rows(), of(16).little()), (16, None));
        let decoder = of(64);
        assert_eq!((decoder.rows(), decoder.little()), (64, Some(LITTLE)));
        let rows = |context: u32| {
            let target = Target {
                page: 64,
                chunk_pages: 4096,
                heads: 64,
                rows: decoder.rows(),
                little: decoder.little(),
                workgroups: WORKGROUPS,
                partials: 1 << 20,
                borders: Borders::Balanced,
            };
            let mut batch = [Sequence { position: context - 1, tokens: 1, ..Sequence::default() }];
            let table: Vec<u32> = (0..context.div_ceil(64)).collect();
            plan(&mut batch, &table, &target).unwrap().rows
        };
        assert_eq!([1, 4096, 16_384, 16_385, 131_072].map(rows), [16, 16, 16, 64, 64]);
        let filled = |device_type| decoder.workgroups(&Caps { device_type, ..Caps::matrices() });
        assert_eq!([DeviceType::Discrete, DeviceType::Integrated].map(filled), [128, 48]);
    }

    #[test]
    fn other_matrix_units_and_less_memory_run_what_suits_any() {
        let variants = |caps: &Caps| {
            let choice = MlaDecodeCoop::tuning(&spec(128), caps);
            let names: Vec<_> = MlaDecodeCoop::variants(&spec(128), caps).iter().map(|variant| variant.name).collect();
            (names, choice.variant.name, choice.variant.tuning.rows)
        };
        assert_eq!(variants(&Caps::matrices()), (vec!["rows16", "rows64", "any"], "rows64", 64));
        let small = Caps { workgroup_bytes: 32 << 10, ..Caps::matrices() };
        assert_eq!(variants(&small), (vec!["any"], "any", 16));
        for (size, width) in [(8, 32), (8, 8), (16, 64), (16, 16)] {
            assert_eq!(variants(&Caps::with(MatrixUnits { size, width })), (vec!["any"], "any", 16), "{size}, {width}");
        }
        // A GPU of Apple's, whose width a device finds when it is opened.
        let apple = Caps { subgroups: Some((4, 64)), ..Caps::with(MatrixUnits { size: 8, width: 32 }) };
        assert!(MlaDecodeCoop::refusal(&spec(128), &apple).is_some_and(|why| why.contains("several widths")));
        assert_eq!(variants(&Caps { matrix_width: Some(32), ..apple }).1, "any");
    }

    #[test]
    fn few_rows_run_in_blocks_of_16_and_many_in_blocks_of_64() {
        for (rows, expected) in [(1, 16), (16, 16), (32, 16), (33, 64), (64, 64), (128, 64), (80, 64)] {
            let choice = MlaDecodeCoop::tuning(&spec(rows), &Caps::matrices());
            assert_eq!(choice.variant.tuning.rows, expected, "{rows} rows: {}", choice.why);
        }
    }
}
