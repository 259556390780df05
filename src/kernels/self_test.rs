//! Self-tests of kernels on matrix units: a small case on the very adapter, since drivers have returned wrong tiles.

use super::{Data, Job, Kernel, Tensors};
use crate::gpu::{Device, Options, Recording};
use crate::{Error, Result};

/// The normalised mean square error of f16 outputs of which some went to the other of two neighbours.
const HALVES: f64 = 1e-6;

/// What `kernel` made wrong of a case's f32 or f16 `tensor` on `device`, if anything: a normalised mean square error
/// over `most`, or what the driver refused.
///
/// # Errors
/// [`Error::DeviceLost`].
pub(super) fn fault<K: Kernel>(
    kernel: &K,
    job: &Job<K>,
    device: &Device,
    (tensor, most): (&'static str, f64),
) -> Result<Option<String>> {
    let data = &job.tensors.iter().find(|t| t.name == tensor).expect("the case has the tensor").data;
    let most = if matches!(data, Data::F16(_)) { most.max(HALVES) } else { most };
    let run = |device: &Device| {
        let tensors = Tensors::upload(device, &job.tensors)?;
        let mut recording = Recording::new();
        (job.record)(kernel, &tensors, &mut recording);
        device.submit(&recording)?;
        let bytes = pollster::block_on(device.read(&[tensors.get(tensor)]))?.remove(0);
        Ok::<Vec<f64>, Error>(data.decode(&bytes))
    };
    let compared = || {
        let (found, expected) = (run(device)?, run(&Device::cpu(&Options::default()))?);
        // What nobody writes, behind the rows' ends, is no number.
        let written = || expected.iter().zip(&found).filter(|(expected, _)| !expected.is_nan());
        let error: f64 = written().map(|(e, f)| (e - f).powi(2)).sum();
        let size: f64 = written().map(|(e, _)| e.powi(2)).sum();
        let wrong = !(error <= most * size);
        Ok(wrong.then(|| format!("its {tensor} is wrong by a share of {:.1e}", (error / size).sqrt())))
    };
    told(compared())
}

/// A self-test's outcome, with what the driver refused told as a fault of the kernel.
///
/// # Errors
/// [`Error::DeviceLost`].
pub(super) fn told(outcome: Result<Option<String>>) -> Result<Option<String>> {
    match outcome {
        Err(error) if !matches!(error, Error::DeviceLost { .. }) => Ok(Some(error.to_string())),
        outcome => outcome,
    }
}
