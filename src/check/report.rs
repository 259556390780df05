//! Every case on one device, with the next twins running meanwhile.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, mpsc};

use serde::Serialize;

use super::{Outcome, Prepared};
use crate::gpu::{Caps, Device, DeviceType};
use crate::kernels::{AnyCase, Entry, Set};
use crate::{Error, Result};

/// The dearest case that runs on a CPU driver unless all are asked for, floating-point operations. In browsers, which
/// check every access and end a device whose dispatch takes long, a case takes at most about two seconds so.
pub const SOFTWARE_FLOPS: f64 = if cfg!(target_arch = "wasm32") { 5e6 } else { 0.5e9 };
/// The most twins that run at once: each holds its case's inputs.
const MOST_TWINS: usize = 8;

/// What a device made of the cases; `lamina check --json` prints it.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The adapter's name.
    pub adapter: String,
    /// Its backend.
    pub backend: String,
    /// What it is.
    pub device_type: DeviceType,
    /// How many cases ran, each variant counted.
    pub cases: usize,
    /// How many of them failed.
    pub failed: usize,
    /// Each, in the order of the kernels, their cases and their variants.
    pub results: Vec<Outcome>,
}

impl Report {
    /// The report of a device's outcomes.
    pub fn new(caps: &Caps, results: Vec<Outcome>) -> Report {
        Report {
            adapter: caps.name.clone(),
            backend: caps.backend.clone(),
            device_type: caps.device_type,
            cases: results.len(),
            failed: results.iter().filter(|r| !r.passed).count(),
            results,
        }
    }

    /// The process's exit code: 1 when a case failed.
    pub fn exit_code(&self) -> u8 {
        u8::from(self.failed > 0)
    }
}

/// The cases of `kernels` for a device, and how many are too dear for its CPU driver.
/// `full` takes the product of the parameters instead of their pairs, and leaves none out.
pub fn select(kernels: &[&Entry], caps: &Caps, full: bool) -> (Vec<AnyCase>, usize) {
    let set = if full { Set::Full } else { Set::Pairs };
    let all = kernels.iter().flat_map(|kernel| (kernel.cases)(set)).filter(|case| !(case.variants)(caps).is_empty());
    let (cases, dear): (Vec<_>, Vec<_>) =
        all.partition(|case| full || !caps.is_software() || case.flops <= SOFTWARE_FLOPS);
    (cases, dear.len())
}

/// Runs every variant of every case on `device`. The twins of the next cases run on other cores
/// meanwhile. `progress` hears of each case before it runs: how many are done, and its kernel.
///
/// A case that the driver refuses has failed, with the driver's message as its place.
///
/// # Errors
/// [`Error::DeviceLost`], since nothing can run after it.
pub fn run(device: &Device, cases: Vec<AnyCase>, mut progress: impl FnMut(usize, &str)) -> Result<Report> {
    let queue: Vec<Mutex<Option<AnyCase>>> = cases.into_iter().map(|case| Mutex::new(Some(case))).collect();
    let next = AtomicUsize::new(0);
    let workers = std::thread::available_parallelism().map_or(1, usize::from).min(MOST_TWINS);
    let mut results: Vec<(usize, Vec<Outcome>)> = Vec::new();
    std::thread::scope(|scope| {
        // Room for none: a prepared case waits in its worker, so that memory stays bounded.
        let (ready, prepared) = mpsc::sync_channel(0);
        for _ in 0..workers {
            let (ready, queue, next) = (ready.clone(), &queue, &next);
            scope.spawn(move || {
                loop {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    let Some(case) = queue.get(index) else { break };
                    let case = case.lock().expect("a plain take").take().expect("each index is taken once");
                    // Nobody listens once the device is lost.
                    if ready.send((index, Prepared::new(case))).is_err() {
                        break;
                    }
                }
            });
        }
        drop(ready);
        for (index, case) in prepared {
            let case = case?;
            progress(results.len(), case.case().kernel);
            results.push((index, pollster::block_on(run_case(device, &case))?));
        }
        Ok(())
    })?;
    results.sort_by_key(|(index, _)| *index);
    Ok(Report::new(device.caps(), results.into_iter().flat_map(|(_, outcomes)| outcomes).collect()))
}

/// Runs every variant of a case; as in [`run`], one that the driver refuses has failed.
///
/// # Errors
/// [`Error::DeviceLost`].
pub async fn run_case(device: &Device, case: &Prepared) -> Result<Vec<Outcome>> {
    let mut outcomes = Vec::new();
    for variant in (case.case().variants)(device.caps()) {
        outcomes.push(match case.run_awaited(device, variant).await {
            Err(error @ Error::DeviceLost { .. }) => return Err(error),
            Err(error) => Outcome {
                kernel: case.case().kernel,
                variant: variant.to_string(),
                case: case.case().name.clone(),
                passed: false,
                nmse: f64::NAN,
                max_error: f64::NAN,
                tolerance: 0.0,
                seconds: None,
                place: error.to_string(),
            },
            Ok(outcome) => outcome,
        });
    }
    Ok(outcomes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::{Options, Recording};
    use crate::kernels::ALL;

    fn cases() -> Vec<AnyCase> {
        let add = ALL.iter().find(|e| e.name == "add").expect("add is a kernel");
        select(&[add], &Caps::cpu(), false).0
    }

    #[test]
    fn a_report_keeps_the_order_of_the_cases_and_exits_with_0_when_all_passed() {
        let names: Vec<String> = cases().iter().map(|c| c.name.clone()).collect();
        let mut heard = 0;
        let report = run(&Device::cpu(&Options::default()), cases(), |_, _| heard += 1).unwrap();
        assert_eq!(report.results.iter().map(|r| r.case.clone()).collect::<Vec<_>>(), names);
        assert_eq!((report.cases, report.failed, report.exit_code(), heard), (names.len(), 0, 0, names.len()));
    }

    #[test]
    fn a_kernel_that_does_nothing_fails_and_exits_with_1() {
        let device = Device::cpu(&Options::default());
        let prepared = Prepared::new(cases().swap_remove(0)).unwrap();
        let broken = prepared.run_with(&device, "portable", |_| Recording::new()).unwrap();
        let report = Report::new(device.caps(), vec![prepared.run(&device, "portable").unwrap(), broken]);
        assert_eq!((report.cases, report.failed, report.exit_code()), (2, 1, 1));
    }

    #[test]
    fn a_cpu_driver_is_spared_dear_cases_unless_all_are_asked_for() {
        let add = ALL.iter().find(|e| e.name == "add").expect("add is a kernel");
        let dear =
            Entry { cases: |_| cases().into_iter().map(|case| AnyCase { flops: 1e9, ..case }).collect(), ..*add };
        let gpu = Caps::portable();
        assert!(select(&[&dear], &Caps::cpu(), false).0.is_empty());
        assert_eq!(select(&[&dear], &Caps::cpu(), true).1, 0);
        assert_eq!(select(&[&dear], &gpu, false).1, 0);
        assert!(!select(&[&dear], &gpu, false).0.is_empty());
    }
}
