//! `lamina bench kernel` in a browser.

use js_sys::Function;
use serde::Deserialize;
use wasm_bindgen::prelude::*;

use super::{Thrown, WebDevice, parse, thrown};
use crate::bench::ceilings;
use crate::bench::clock::Clock;
use crate::bench::decode::{self, Work};
use crate::bench::report::Report;
use crate::bench::shape::{MOST_CONTEXT, MOST_HEADS, MOST_SEQUENCES, Shape};
use crate::bench::way::Way;
use crate::num::record::RecordFormat;
use crate::{Error, Result};

/// What is measured; each list's combinations are the shapes.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Asked {
    batch: Vec<u32>,
    heads: Vec<u32>,
    context: Vec<u32>,
    /// `f16`, `f32`, `fp8`.
    dtype: Vec<Dtype>,
    repeat: usize,
    /// Megabytes that the bandwidth is measured with.
    mib: u64,
}

impl Asked {
    /// Refuses numbers that no shape can have.
    fn check(&self) -> Result<()> {
        for (what, list, most) in [
            ("batch", &self.batch, MOST_SEQUENCES),
            ("heads", &self.heads, MOST_HEADS),
            ("context", &self.context, MOST_CONTEXT),
        ] {
            if let Some(found) = list.iter().find(|number| !(1..=most).contains(*number)) {
                let (expected, found) = (format!("1 to {most}"), found.to_string());
                return Err(Error::Usage { what: what.into(), expected, found });
            }
        }
        Ok(())
    }
}

#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Dtype {
    F16,
    F32,
    Fp8,
}

impl From<Dtype> for RecordFormat {
    fn from(dtype: Dtype) -> RecordFormat {
        match dtype {
            Dtype::F16 => RecordFormat::F16,
            Dtype::F32 => RecordFormat::F32,
            Dtype::Fp8 => RecordFormat::Fp8,
        }
    }
}

/// Runs between two that read the same records read so much: more than the caches of GPUs, or of the processor for
/// a software driver.
const COLD: [u64; 2] = [512 << 20, 64 << 20];

#[wasm_bindgen]
impl WebDevice {
    /// Measures the device's ceilings, then decode attention. `command` is what the record says was asked for;
    /// `progress` hears how many shapes are done, of how many. Gives the record of `lamina bench kernel --json`.
    pub async fn bench(&self, asked: &str, command: String, progress: Function) -> Thrown<String> {
        let asked: Asked = parse("options of a benchmark", asked)?;
        asked.check().map_err(thrown)?;
        let Asked { batch, heads, context, dtype, repeat, mib } = asked;
        let device = &self.0;
        let measured = async {
            let clock = Clock::of(device).await?;
            let ceilings = ceilings::measure(device, &clock, mib.clamp(2, 65_536) << 20).await?;
            let work = Work {
                shapes: Shape::product(&batch, &heads, &context),
                formats: dtype.into_iter().map(RecordFormat::from).collect(),
                way: Way::Auto,
                repeat: repeat.max(1),
                cold_bytes: COLD[usize::from(device.caps().is_software())],
            };
            let show = |done: usize, total: usize| {
                // Progress that cannot be shown is not worth stopping for.
                let _ = progress.call2(&JsValue::NULL, &done.into(), &total.into());
            };
            let results = decode::measure(device, &clock, &ceilings, &work, show).await?;
            Ok(Report::new(device.caps(), command, clock, ceilings, results).json())
        };
        measured.await.map_err(thrown)
    }
}
