//! Checked timing: a case is held against its twin first, and timed only when it passed.

pub mod ceilings;
pub mod model;

use std::time::{Duration, Instant};

use crate::Result;
use crate::check::Prepared;
use crate::gpu::{Device, Recording};
use crate::kernels::{AnyCase, Tensors};

/// What a timed case gave.
#[derive(Clone, Debug)]
pub struct Timing {
    /// The kernel.
    pub kernel: &'static str,
    /// The variant.
    pub variant: String,
    /// The case.
    pub case: String,
    /// Median, 10th and 90th percentile of one run's GPU time.
    pub median: Duration,
    /// The 10th percentile.
    pub p10: Duration,
    /// The 90th percentile.
    pub p90: Duration,
    /// Bytes that must move, over the median, GB/s.
    pub gigabytes: f64,
    /// Floating-point operations over the median, TFLOP/s.
    pub teraflops: f64,
}

/// How long the device works before anything is timed: idle GPUs run at a fraction of their clock.
/// After seconds of work on the host 120 ms were too few: one kernel read 3064 us where 1400 was true.
const WARM_UP: Duration = Duration::from_millis(600);
/// Timed runs.
const RUNS: u32 = 40;

/// Runs the recordings until the device's clock can be taken for that of steady work. A software driver's
/// processor needs no such time.
///
/// # Errors
/// As [`Device::submit`].
pub fn warm_up(device: &Device, recordings: &[Recording]) -> Result<()> {
    let least = if device.caps().is_software() { Duration::ZERO } else { WARM_UP };
    let started = Instant::now();
    loop {
        for recording in recordings {
            device.submit(recording)?;
        }
        device.wait()?;
        if started.elapsed() >= least {
            return Ok(());
        }
    }
}

/// The middle one.
pub(crate) fn median<T: Ord>(mut values: Vec<T>) -> T {
    values.sort();
    let middle = values.len() / 2;
    values.swap_remove(middle)
}

/// Checks a variant of a case and times it. Runs rotate among copies of the tensors that together
/// exceed `cold_bytes`, so that no run finds its inputs in a cache.
///
/// Returns `None` where the adapter has no timestamps.
///
/// # Errors
/// [`crate::Error::Driver`] when the check fails: a wrong kernel has no time; and the driver's faults.
pub fn time(device: &Device, prepared: &Prepared, variant: &str, cold_bytes: u64) -> Result<Option<Timing>> {
    let AnyCase { kernel, name, flops, bytes, .. } = prepared.case();
    let outcome = prepared.run(device, variant)?;
    if !outcome.passed {
        return Err(crate::Error::Driver {
            adapter: device.caps().label(),
            asked: format!("the check before timing {kernel} {variant}, {name}"),
            found: format!("NMSE {:e} over {:e} at {}", outcome.nmse, outcome.tolerance, outcome.place),
        });
    }
    let job = prepared.job();
    let size: u64 = job.tensors.iter().map(|t| t.data.bytes().len() as u64).sum();
    let copies = cold_bytes.div_ceil(size.max(1)).clamp(1, 64);
    let mut recordings = Vec::new();
    for _ in 0..copies {
        let tensors = Tensors::upload(device, &job.tensors)?;
        let mut recording = Recording::new();
        (job.record)(variant, device.caps(), &tensors, &mut recording);
        recordings.push(recording);
    }
    warm_up(device, &recordings)?;
    let mut spent = Vec::new();
    let rounds = RUNS.div_ceil(copies as u32).max(2);
    for _ in 0..rounds {
        let Some(times) = pollster::block_on(device.time(&recordings, 1))? else { return Ok(None) };
        spent.extend(times);
    }
    spent.sort();
    let at = |share: f64| spent[((spent.len() - 1) as f64 * share) as usize];
    let seconds = at(0.5).as_secs_f64();
    Ok(Some(Timing {
        kernel,
        variant: variant.to_string(),
        case: name.clone(),
        median: at(0.5),
        p10: at(0.1),
        p90: at(0.9),
        gigabytes: bytes / seconds / 1e9,
        teraflops: flops / seconds / 1e12,
    }))
}
