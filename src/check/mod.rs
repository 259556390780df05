//! Parity: every case of every kernel and variant on a device, against its twin.

pub mod report;
mod verdict;

use serde::Serialize;

use crate::Result;
use crate::gpu::{Caps, Device, Options, Recording};
use crate::kernels::{AnyCase, AnyJob, Expected, Role, Tensor, Tensors};

pub use verdict::Verdict;

/// The outcome of one case of one variant.
#[derive(Clone, Debug, Serialize)]
pub struct Outcome {
    /// The kernel.
    pub kernel: &'static str,
    /// The variant.
    pub variant: String,
    /// The case.
    pub case: String,
    /// Within the tolerance.
    pub passed: bool,
    /// The worst row's normalised mean square error.
    pub nmse: f64,
    /// The largest difference of one element.
    pub max_error: f64,
    /// The largest NMSE allowed.
    pub tolerance: f64,
    /// Of all its dispatches, by the device's clock; `None` where it has none.
    pub seconds: Option<f64>,
    /// Where the largest difference or the worst row is, and what was expected and found.
    #[serde(skip)]
    pub place: String,
}

/// A case with its inputs made and its twin run, for any number of variants and devices.
pub struct Prepared {
    case: AnyCase,
    job: AnyJob,
    expected: Vec<Expected>,
}

impl Prepared {
    /// Makes the inputs and runs the twin.
    ///
    /// # Errors
    /// Only what the `cpu` device gives: none today.
    pub fn new(case: AnyCase) -> Result<Prepared> {
        let job = (case.job)();
        let expected = match &job.expected {
            Some(expected) => expected(&job.tensors),
            None => {
                let cpu = match (case.variants)(&Caps::cpu()).is_empty() {
                    true => Device::cpu_as(Caps::matrices()),
                    false => Device::cpu(&Options::default()),
                };
                let (outputs, _) = pollster::block_on(run(&case, &job, &cpu, None, |r| r))?;
                let whole = |(t, bytes): (&Tensor, &Vec<u8>)| {
                    let Role::Output(checks) = &t.role else { unreachable!("outputs lists outputs") };
                    let values = t.data.decode(bytes);
                    let rows = values.chunks(checks[0].stride).map(<[f64]>::to_vec).enumerate().collect();
                    Expected { tensor: t.name, rows }
                };
                outputs_of(&job).zip(&outputs).map(whole).collect()
            }
        };
        Ok(Prepared { case, job, expected })
    }

    /// Runs one variant on a device and holds it against the twin.
    ///
    /// # Errors
    /// Faults of the driver; a wrong answer is an [`Outcome`] that did not pass.
    pub fn run(&self, device: &Device, variant: &str) -> Result<Outcome> {
        self.run_with(device, variant, |recording| recording)
    }

    /// As [`Prepared::run`], with the recording changed before it runs: how the harness is itself
    /// tested with broken kernels.
    ///
    /// # Errors
    /// As [`Prepared::run`].
    pub fn run_with(&self, device: &Device, variant: &str, change: impl Fn(Recording) -> Recording) -> Result<Outcome> {
        pollster::block_on(self.run_changed(device, variant, change))
    }

    /// As [`Prepared::run`], awaited: in a browser nothing may wait otherwise.
    ///
    /// # Errors
    /// As [`Prepared::run`].
    pub async fn run_awaited(&self, device: &Device, variant: &str) -> Result<Outcome> {
        self.run_changed(device, variant, |recording| recording).await
    }

    async fn run_changed(
        &self,
        device: &Device,
        variant: &str,
        change: impl Fn(Recording) -> Recording,
    ) -> Result<Outcome> {
        let (outputs, seconds) = run(&self.case, &self.job, device, Some(variant), change).await?;
        let mut worst = Verdict::default();
        for (tensor, bytes) in outputs_of(&self.job).zip(&outputs) {
            let expected = self.expected.iter().find(|e| e.tensor == tensor.name);
            let expected = expected.unwrap_or_else(|| panic!("{}: no expected {}", self.case.kernel, tensor.name));
            worst = worst.max(verdict::judge(tensor, bytes, expected));
        }
        Ok(Outcome {
            kernel: self.case.kernel,
            variant: variant.to_string(),
            case: self.case.name.clone(),
            passed: worst.passed,
            nmse: worst.nmse,
            max_error: worst.max_error,
            tolerance: worst.tolerance,
            seconds,
            place: worst.place,
        })
    }

    /// Its inputs and work.
    pub fn job(&self) -> &AnyJob {
        &self.job
    }

    /// The case.
    pub fn case(&self) -> &AnyCase {
        &self.case
    }
}

fn outputs_of(job: &AnyJob) -> impl Iterator<Item = &Tensor> {
    job.tensors.iter().filter(|t| matches!(t.role, Role::Output(_)))
}

/// Runs a variant, the portable one where none is named; its outputs, and the seconds that it took.
async fn run(
    case: &AnyCase,
    job: &AnyJob,
    device: &Device,
    variant: Option<&str>,
    change: impl Fn(Recording) -> Recording,
) -> Result<(Vec<Vec<u8>>, Option<f64>)> {
    let tensors = Tensors::upload(device, &job.tensors)?;
    let portable = (case.variants)(device.caps())[0];
    let mut recording = Recording::new();
    (job.record)(variant.unwrap_or(portable), device.caps(), &tensors, &mut recording);
    let recording = change(recording);
    if cfg!(target_arch = "wasm32") {
        device.prepare(&recording).await?;
    }
    let times = device.time(std::slice::from_ref(&recording), 1).await?;
    if times.is_none() {
        device.submit(&recording)?;
    }
    let views: Vec<_> = outputs_of(job).map(|t| tensors.get(t.name)).collect();
    Ok((device.read(&views).await?, times.map(|times| times[0].as_secs_f64())))
}

/// Opens every adapter of this system that `LAMINA_ADAPTER` allows; for tests.
///
/// # Panics
/// When there is none: no adapter is a failure of the machine's set-up, not a pass.
pub fn adapters(options: &Options) -> Vec<Device> {
    use crate::gpu::{Selector, list};
    let options = Options { tuned: false, matrix_units: true, ..options.clone() };
    let open = |selector: &Selector| pollster::block_on(Device::open(selector, &options)).expect("the adapter opens");
    let named = std::env::var("LAMINA_ADAPTER").unwrap_or_default();
    if !named.is_empty() {
        return vec![open(&named.parse().expect("LAMINA_ADAPTER names an adapter"))];
    }
    let count = pollster::block_on(list()).len();
    assert!(count > 0, "no GPU adapter on this machine: tests/run installs software ones");
    (0..count).map(|i| open(&Selector::Index(i))).collect()
}

/// Every case of `kernel` and every variant on every adapter of this system; for tests.
///
/// # Panics
/// When one fails, with all that failed.
pub fn assert_parity(kernel: &str) {
    let entry = crate::kernels::ALL.iter().find(|e| e.name == kernel).expect("the kernel is in the list");
    let devices = adapters(&Options { checked: true, ..Options::default() });
    let (mut run, mut refused, mut failed) = (0, 0, Vec::new());
    for case in (entry.cases)(crate::kernels::Set::Pairs) {
        if devices.iter().all(|device| (case.variants)(device.caps()).is_empty()) {
            refused += 1;
            continue;
        }
        let prepared = Prepared::new(case).expect("the cpu device has no faults");
        for device in &devices {
            for variant in (prepared.case().variants)(device.caps()) {
                run += 1;
                match prepared.run(device, variant) {
                    Ok(outcome) if outcome.passed => {}
                    Ok(outcome) => failed.push(format!("{}: {outcome:?}", device.caps().label())),
                    Err(error) => failed.push(format!("{} {variant}: {error}", prepared.case().name)),
                }
            }
        }
    }
    assert!(failed.is_empty(), "{} of {run} failed:\n{}", failed.len(), failed.join("\n"));
    assert!(run + refused > 0, "{kernel} has no case");
    if refused > 0 {
        println!("{kernel}: {refused} cases not run, since no adapter here can");
    }
}
