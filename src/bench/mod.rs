//! Checked timing: what is timed is held against its twin first, and a wrong result has no time. Everything here
//! is awaited and prints nothing, so that a page in a browser runs the same.

pub mod attention;
pub mod ceilings;
pub mod clock;
pub mod decode;
mod decode_io;
pub mod layer_weights;
mod layers;
pub mod model;
mod pages;
pub mod published;
pub mod report;
mod sets;
pub mod shape;
pub mod tune;
pub mod way;

use std::time::Duration;

use serde::Serialize;

use crate::Result;
use crate::check::Prepared;
use crate::gpu::{Device, Recording};
use crate::kernels::{AnyCase, Tensors};
use clock::Clock;

/// The times of some runs.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Spread {
    /// The median, microseconds.
    pub median_us: f64,
    /// The 10th percentile.
    pub p10_us: f64,
    /// The 90th percentile.
    pub p90_us: f64,
    /// How many times there are.
    pub runs: usize,
}

impl Spread {
    /// Of times in any order.
    ///
    /// # Panics
    /// Without one.
    pub fn of(mut times: Vec<Duration>) -> Spread {
        times.sort();
        let at = |share: f64| times[((times.len() - 1) as f64 * share).round() as usize].as_secs_f64() * 1e6;
        Spread { median_us: at(0.5), p10_us: at(0.1), p90_us: at(0.9), runs: times.len() }
    }
}

/// What a timed case gave.
#[derive(Clone, Debug, Serialize)]
pub struct Timing {
    /// The kernel.
    pub kernel: &'static str,
    /// The variant.
    pub variant: String,
    /// The case.
    pub case: String,
    /// One run's GPU time.
    pub time: Spread,
    /// Bytes that must move, over the median, GB/s.
    pub gbs: f64,
    /// Floating-point operations over the median, TFLOP/s.
    pub tflops: f64,
}

/// Timed runs of a case, at least; on a CPU driver, whose runs take long.
const RUNS: [usize; 2] = [40, 5];

/// The middle one.
pub(crate) fn median<T: Ord>(mut values: Vec<T>) -> T {
    values.sort();
    let middle = values.len() / 2;
    values.swap_remove(middle)
}

/// Checks a variant of a case and times it. Runs rotate among copies of the tensors that together
/// exceed `cold_bytes`, so that no run finds its inputs in a cache.
///
/// # Errors
/// [`crate::Error::Driver`] when the check fails: a wrong kernel has no time; and the driver's faults.
pub async fn time(
    device: &Device,
    clock: &Clock,
    prepared: &Prepared,
    variant: &str,
    cold_bytes: u64,
) -> Result<Timing> {
    let AnyCase { kernel, name, flops, bytes, .. } = prepared.case();
    let outcome = prepared.run_awaited(device, variant).await?;
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
    let runs = RUNS[usize::from(device.caps().is_software())];
    let time = Spread::of(clock.time(device, &recordings, runs.div_ceil(copies as usize).max(2)).await?);
    let seconds = time.median_us * 1e-6;
    Ok(Timing {
        kernel,
        variant: variant.to_string(),
        case: name.clone(),
        time,
        gbs: bytes / seconds / 1e9,
        tflops: flops / seconds / 1e12,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spread_is_of_sorted_times() {
        let times = (1..=11).rev().map(Duration::from_micros).collect();
        let Spread { median_us, p10_us, p90_us, runs } = Spread::of(times);
        assert_eq!((median_us.round(), p10_us.round(), p90_us.round(), runs), (6.0, 2.0, 10.0, 11));
    }
}
