//! Which variant of each kernel is the fastest on a device, over the kernel's timed cases.

use serde::Serialize;

use super::clock::Clock;
use super::time;
use crate::check::Prepared;
use crate::check::report::SOFTWARE_FLOPS;
use crate::gpu::tuned::Tuned;
use crate::gpu::{Caps, Device};
use crate::kernels::{AnyCase, Entry, Set};
use crate::{Error, Result};

/// The dearest case of a GPU, floating-point operations: the twins of dearer ones take minutes.
const FLOPS: f64 = 32e9;
/// The share of its time by which another variant must beat the one of the tables: less may be noise.
const MARGIN: f64 = 0.03;

/// What was measured.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Results {
    /// Each kernel and class of specs.
    pub tuned: Vec<Tuned>,
    /// Cases that a variant got wrong. Their classes are not tuned.
    pub failed: Vec<Left>,
    /// Cases that were not run.
    pub skipped: Vec<Left>,
}

/// A case without times.
#[derive(Clone, Debug, Serialize)]
pub struct Left {
    /// The kernel.
    pub kernel: &'static str,
    /// The case.
    pub case: String,
    /// Why there are none.
    pub why: String,
}

impl Left {
    fn new(case: &AnyCase, why: String) -> Left {
        Left { kernel: case.kernel, case: case.name.clone(), why }
    }
}

/// A kernel with one class of specs, and its variants' times over the untuned one's, summed over the cases so far:
/// large cases count no more than small ones.
struct Sums {
    kernel: &'static str,
    class: String,
    shares: Vec<(&'static str, f64)>,
    cases: usize,
    untuned: &'static str,
    wrong: bool,
}

impl Sums {
    fn new(case: &AnyCase, caps: &Caps) -> Sums {
        let shares = (case.variants)(caps).into_iter().map(|name| (name, 0.0)).collect();
        let (class, untuned) = (case.class.clone(), (case.tuning)(caps));
        Sums { kernel: case.kernel, class, shares, cases: 0, untuned, wrong: false }
    }

    /// Why a case does not count for the class: its variants are others.
    fn refuses(&self, case: &AnyCase, caps: &Caps) -> Option<String> {
        let (of_case, of_class) =
            ((case.variants)(caps), self.shares.iter().map(|(name, _)| *name).collect::<Vec<_>>());
        (of_case != of_class).then(|| format!("its variants are {of_case:?}, not {of_class:?} as its class's"))
    }

    /// Adds a case's times, one for each variant; why not, where the clock shows none.
    fn add(&mut self, times: &[f64]) -> std::result::Result<(), String> {
        let usual = self.shares.iter().zip(times).find(|((name, _), _)| *name == self.untuned);
        let usual = usual.map_or(f64::NAN, |(_, us)| *us);
        if !times.iter().chain([&usual]).all(|us| us.is_finite() && *us > 0.0) {
            return Err(format!("too short for this clock: {times:?} us"));
        }
        self.shares.iter_mut().zip(times).for_each(|((_, sum), us)| *sum += us / usual);
        self.cases += 1;
        Ok(())
    }

    fn measured(&self) -> bool {
        !self.wrong && self.cases > 0
    }

    fn tuned(&self, date: &str) -> Tuned {
        let shares: Vec<_> = self.shares.iter().map(|(name, sum)| (*name, sum / self.cases as f64)).collect();
        Tuned {
            kernel: self.kernel.into(),
            class: self.class.clone(),
            variant: fastest(&shares, self.untuned).into(),
            untuned: self.untuned.into(),
            shares: shares.into_iter().map(|(name, share)| (name.to_string(), share)).collect(),
            date: date.into(),
        }
    }
}

/// The variant of the least time, where it beats the untuned one by more than noise.
fn fastest<'a>(shares: &[(&'a str, f64)], untuned: &'a str) -> &'a str {
    let usual = shares.iter().find(|(name, _)| *name == untuned).map_or(f64::INFINITY, |(_, share)| *share);
    let least = shares.iter().min_by(|a, b| a.1.total_cmp(&b.1));
    least.filter(|(_, share)| *share < usual * (1.0 - MARGIN)).map_or(untuned, |(name, _)| name)
}

/// Times every variant of every timed case of the kernels that have several on the device, each held against its
/// twin first. `date` is the day that the results are kept with; `progress` hears how many cases are done, of how
/// many.
///
/// # Errors
/// [`Error::DeviceLost`], since nothing can run after it.
pub async fn measure(
    device: &Device,
    clock: &Clock,
    kernels: &[&Entry],
    cold_bytes: u64,
    date: &str,
    progress: impl Fn(usize, usize),
) -> Result<Results> {
    let caps = device.caps();
    let most = if caps.is_software() { SOFTWARE_FLOPS } else { FLOPS };
    let all = kernels.iter().flat_map(|kernel| (kernel.cases)(Set::Timed));
    let (cases, dear): (Vec<_>, Vec<_>) =
        all.filter(|case| (case.variants)(caps).len() > 1).partition(|case| case.flops <= most);
    let too_dear =
        |case: &AnyCase| Left::new(case, format!("{:.1} GFLOP, of at most {:.1}", case.flops / 1e9, most / 1e9));
    let mut results = Results { skipped: dear.iter().map(too_dear).collect(), ..Results::default() };
    let mut classes: Vec<Sums> = Vec::new();
    let total = cases.len();
    for (done, case) in cases.into_iter().enumerate() {
        progress(done, total);
        let known = classes.iter().position(|sums| sums.kernel == case.kernel && sums.class == case.class);
        let at = known.unwrap_or_else(|| {
            classes.push(Sums::new(&case, caps));
            classes.len() - 1
        });
        let sums = &mut classes[at];
        if let Some(why) = sums.refuses(&case, caps) {
            results.skipped.push(Left::new(&case, why));
            continue;
        }
        let prepared = Prepared::new(case)?;
        let largest = prepared.job().tensors.iter().map(|tensor| tensor.data.bytes().len() as u64).max();
        if let Some(bytes) = largest.filter(|bytes| *bytes > caps.binding_bytes) {
            let why = format!("a tensor of {bytes} bytes, of at most {}", caps.binding_bytes);
            results.skipped.push(Left::new(prepared.case(), why));
            continue;
        }
        match times(device, clock, &prepared, &sums.shares, cold_bytes).await {
            Ok(times) => {
                if let Err(why) = sums.add(&times) {
                    results.skipped.push(Left::new(prepared.case(), why));
                }
            }
            Err(lost @ Error::DeviceLost { .. }) => return Err(lost),
            Err(memory @ Error::OutOfMemory { .. }) => {
                results.skipped.push(Left::new(prepared.case(), memory.to_string()))
            }
            Err(error) => {
                sums.wrong = true;
                results.failed.push(Left::new(prepared.case(), error.to_string()));
            }
        }
    }
    results.tuned = classes.iter().filter(|sums| sums.measured()).map(|sums| sums.tuned(date)).collect();
    Ok(results)
}

/// Each variant's time of a case, microseconds; an error where one has none, so that means are of the same cases.
/// The variants are timed in turn, twice, and the lesser median counts: what else the machine does only adds.
async fn times(
    device: &Device,
    clock: &Clock,
    prepared: &Prepared,
    variants: &[(&'static str, f64)],
    cold_bytes: u64,
) -> Result<Vec<f64>> {
    let mut times = vec![f64::INFINITY; variants.len()];
    for _ in 0..2 {
        for ((variant, _), least) in variants.iter().zip(&mut times) {
            let timing = time(device, clock, prepared, variant, cold_bytes).await?;
            *least = least.min(timing.time.median_us);
        }
    }
    Ok(times)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::Options;
    use crate::kernels::ALL;

    #[test]
    fn another_variant_is_taken_where_it_wins_by_more_than_noise() {
        let times = |narrow: f64| [("portable", 100.0), ("subgroup", 110.0), ("narrow", narrow)];
        assert_eq!(fastest(&times(96.0), "portable"), "narrow");
        assert_eq!(fastest(&times(98.0), "portable"), "portable");
        assert_eq!(fastest(&times(98.0), "subgroup"), "narrow");
        assert_eq!(fastest(&times(200.0), "portable"), "portable");
        assert_eq!(fastest(&times(f64::NAN), "subgroup"), "portable");
    }

    #[test]
    fn a_large_case_counts_no_more_than_a_small_one() {
        let shares = vec![("portable", 0.0), ("subgroup", 0.0)];
        let (kernel, class) = ("gemv", "one token".to_string());
        let mut sums = Sums { kernel, class, shares, cases: 0, untuned: "portable", wrong: false };
        assert!(!sums.measured());
        for times in [[10.0, 6.0], [20.0, 14.0], [4000.0, 4100.0]] {
            sums.add(&times).unwrap();
        }
        assert!(sums.add(&[0.0, 1.0]).is_err() && sums.add(&[1.0, f64::NAN]).is_err(), "they would leave no numbers");
        let tuned = sums.tuned("2026-11-27");
        assert_eq!((tuned.variant.as_str(), tuned.shares[0].1), ("subgroup", 1.0));
        assert!((tuned.shares[1].1 - (0.6 + 0.7 + 1.025) / 3.0).abs() < 1e-12, "{tuned:?}");
    }

    #[test]
    fn a_class_that_a_variant_gets_wrong_is_told_and_not_tuned() {
        let device = crate::check::adapters(&Options::default()).remove(0);
        let clock = pollster::block_on(Clock::of(&device)).unwrap();
        let wrong = |_| {
            let norm = ALL.iter().find(|entry| entry.name == "rms_norm").expect("in the list");
            let mut cases = (norm.cases)(Set::Timed);
            cases.truncate(2);
            let AnyCase { class, job, .. } = cases.remove(1);
            let another = move || {
                let mut job = job();
                job.expected = Some(Box::new(|_| {
                    vec![crate::kernels::Expected { tensor: "y", rows: vec![(0, vec![1e9; 7168])] }]
                }));
                job
            };
            cases.push(AnyCase {
                class: format!("{class}, wrong"),
                job: Box::new(another),
                ..(norm.cases)(Set::Timed).remove(0)
            });
            cases
        };
        let norm = ALL.iter().find(|entry| entry.name == "rms_norm").expect("in the list");
        let entry = Entry { cases: wrong, ..*norm };
        let Results { tuned, failed, skipped } =
            pollster::block_on(measure(&device, &clock, &[&entry], 0, "2026-11-26", |_, _| {})).unwrap();
        assert!(failed.len() == 1 && failed[0].why.contains("the check before timing rms_norm"), "{failed:?}");
        assert!(tuned.len() == 1 && tuned[0].class == "Spec" && skipped.is_empty(), "{tuned:?} {skipped:?}");
        assert!(tuned[0].shares.len() == 2 && tuned[0].shares.iter().all(|(_, share)| *share > 0.0), "{tuned:?}");
    }
}
