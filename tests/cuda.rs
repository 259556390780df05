//! A third opinion beside the twins and the WGSL kernels: every case of every kernel by a plain CUDA kernel
//! (`tests/cuda/`), compiled by NVRTC when the test runs. A recording says what is computed on which bindings; here
//! CUDA takes the place of each call's twin, so inputs, tolerances and verdicts are those of the parity tests.
//!
//! Where there is no CUDA the tests say what is missing and count as skipped. With `LAMINA_ADAPTER` the same cases
//! run on that adapter, too, and the tests say who is alone where two of the three disagree.

#[path = "cuda/gpu.rs"]
mod gpu;

use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use gpu::{Gpu, Nvrtc, source, text};
use lamina::check::{Outcome, Prepared, adapters};
use lamina::gpu::{Caps, Device, Options};
use lamina::kernels::{ALL, AnyCase, Set};

/// The `cpu` device with every feature that any kernel asks for, so that each has a recording.
fn host() -> Device {
    Device::cpu_as(Caps::matrices())
}

/// Past the capture of test output, so that a run shows what was skipped.
fn say(line: &str) {
    let _ = writeln!(std::io::stdout().lock(), "cuda: {line}");
}

/// The cases of the parity tests, but those that a kernel refuses everywhere.
fn cases(host: &Device) -> Vec<AnyCase> {
    let all = ALL.iter().flat_map(|entry| (entry.cases)(Set::Pairs));
    all.filter(|case| !(case.variants)(host.caps()).is_empty()).collect()
}

/// What became of a case on CUDA.
fn on_cuda(gpu: &Arc<Gpu>, host: &Device, case: &Prepared) -> Result<Outcome, String> {
    let variant = (case.case().variants)(host.caps())[0];
    let run = || case.run_with(host, variant, |recording| recording.changed(|call| gpu.take(call)));
    match catch_unwind(AssertUnwindSafe(run)) {
        Ok(Ok(outcome)) => Ok(outcome),
        Ok(Err(error)) => Err(error.to_string()),
        Err(panic) => Err(panic.downcast_ref::<String>().cloned().unwrap_or_else(|| "a panic".into())),
    }
}

/// Whether every variant on the adapter agrees with the twin; nothing where there is none.
fn on_adapter(device: &Device, case: &Prepared) -> Option<bool> {
    let variants = (case.case().variants)(device.caps());
    let passes = |variant: &&str| case.run(device, variant).is_ok_and(|outcome| outcome.passed);
    (!variants.is_empty()).then(|| variants.iter().all(passes))
}

/// A kernel's line of the report.
#[derive(Default)]
struct Tally {
    cases: usize,
    failed: usize,
    /// The largest share of the tolerance.
    share: f64,
}

#[test]
fn every_kernel_agrees_with_cuda() {
    let started = Instant::now();
    let host = host();
    let cases: Vec<_> = cases(&host).into_iter().map(|case| Mutex::new(Some(case))).collect();
    let gpu = match Gpu::open() {
        Ok(gpu) => Arc::new(gpu),
        Err(why) => {
            say(&format!("{why}: nothing is compared"));
            say(&format!("{} cases, 0 passed, {} skipped", cases.len(), cases.len()));
            return;
        }
    };
    say(&gpu.label());
    let named = std::env::var("LAMINA_ADAPTER").is_ok_and(|name| !name.is_empty());
    let adapter = named.then(|| adapters(&Options::default()).remove(0));
    if let Some(device) = &adapter {
        say(&format!("beside it {}", device.caps().label()));
    }

    let next = AtomicUsize::new(0);
    let tallies: Mutex<Vec<(&str, Tally)>> =
        Mutex::new(ALL.iter().map(|entry| (entry.name, Tally::default())).collect());
    let (wrong, wgsl) = (Mutex::new(Vec::new()), Mutex::new([0, 0]));
    let worker = || {
        while let Some(case) = cases.get(next.fetch_add(1, Ordering::Relaxed)) {
            let case = case.lock().expect("a plain take").take().expect("each index is taken once");
            let case = Prepared::new(case).expect("the cpu device has no faults");
            let found = on_cuda(&gpu, &host, &case);
            let passed = found.as_ref().is_ok_and(|outcome| outcome.passed);
            let mut tallies = tallies.lock().expect("a plain sum");
            let (_, tally) =
                tallies.iter_mut().find(|(name, _)| *name == case.case().kernel).expect("the kernel is listed");
            tally.cases += 1;
            tally.failed += usize::from(!passed);
            if let Ok(outcome) = &found {
                tally.share = tally.share.max(outcome.nmse / outcome.tolerance.max(f64::MIN_POSITIVE));
            }
            drop(tallies);
            let beside = adapter.as_ref().and_then(|device| {
                let mut wgsl = wgsl.lock().expect("a plain count"); // one case at a time on the adapter
                let agrees = on_adapter(device, &case)?;
                wgsl[usize::from(agrees)] += 1;
                Some(agrees)
            });
            let who = match (passed, beside) {
                (true, Some(false)) => "the WGSL kernel is alone",
                (true, _) => continue,
                (false, Some(true)) => "CUDA is alone",
                (false, Some(false)) => "the twin is alone, or all three differ",
                (false, None) => "CUDA and the twin differ",
            };
            let what = found.map_or_else(|fault| fault, |outcome| format!("{outcome:?}"));
            wrong.lock().expect("a plain push").push(format!(
                "{who}: {} {}: {what}",
                case.case().kernel,
                case.case().name
            ));
        }
    };
    // Twins run on all cores themselves; each case under way holds its inputs.
    let workers = std::thread::available_parallelism().map_or(1, usize::from).min(8);
    std::thread::scope(|scope| (0..workers).for_each(|_| drop(scope.spawn(worker))));

    let tallies = tallies.into_inner().expect("no worker holds it");
    for (name, Tally { cases, failed, share }) in &tallies {
        say(&format!("{name}: {cases} cases, {failed} failed, at most {share:.2} of the tolerance"));
    }
    let failed: usize = tallies.iter().map(|(_, tally)| tally.failed).sum();
    if adapter.is_some() {
        let [disagree, agree] = wgsl.into_inner().expect("no worker holds it");
        say(&format!("WGSL beside it: {agree} cases agree, {disagree} do not"));
    }
    let seconds = started.elapsed().as_secs_f64();
    say(&format!("{} cases, {} passed, 0 skipped, {failed} failed, {seconds:.1} s", cases.len(), cases.len() - failed));
    let wrong = wrong.into_inner().expect("no worker holds it");
    assert!(wrong.is_empty(), "{} cases:\n{}", wrong.len(), wrong.join("\n"));
}

/// A kernel, a line of its CUDA text, and what it is changed to: a case must fail then.
const BROKEN: [(&str, &str, &str); 8] = [
    ("rms_norm", "from[i] / root * weight[i]", "from[i] / root"),
    ("rope", "slice, first, rows", "slice, second, rows"),
    ("gemv", "y[to] = put(sum);", "y[to] = put(1.001f * sum);"),
    ("mla_absorb", "n < N; n++", "n < N - 1u; n++"),
    ("mla_append", "values[k] = 0.0f", "values[k] = 1.0f"),
    ("mla_decode", "i < W; i++) score", "i < R; i++) score"),
    ("mla_combine", "(largest + log2f(sum)) * LN_2", "(largest + log2f(sum))"),
    ("moe_route", "* params.scale", "* 1.0f"),
];

#[test]
fn broken_cuda_kernels_are_found() {
    for (kernel, line, _) in BROKEN {
        assert!(text(kernel).contains(line), "{kernel} has no line {line:?}");
    }
    let gpu = match Gpu::open() {
        Ok(gpu) => gpu,
        Err(why) => return say(&format!("{why}: {} broken kernels skipped", BROKEN.len())),
    };
    let host = host();
    for (kernel, line, broken) in BROKEN {
        let gpu = Arc::new(gpu.breaking(kernel, line, broken));
        let entry = ALL.iter().find(|entry| entry.name == kernel).expect("the kernel is in the list");
        let cheap = |case: &AnyCase| case.flops < 2e7;
        let fails = |case| {
            let case = Prepared::new(case).expect("the cpu device has no faults");
            !on_cuda(&gpu, &host, &case).unwrap_or_else(|fault| panic!("{kernel}: {fault}")).passed
        };
        let found = (entry.cases)(Set::Pairs).into_iter().filter(cheap).any(fails);
        assert!(found, "{kernel} passes with {broken:?} for {line:?}");
    }
    say(&format!("{} broken kernels found", BROKEN.len()));
}

#[test]
fn the_cuda_kernels_compile_for_every_case() {
    let caps = host().caps().clone();
    let all = ALL.iter().flat_map(|entry| (entry.shaders)(&caps)).map(|(_, shader)| source(&shader));
    let mut sources: Vec<_> = all.collect();
    sources.sort();
    sources.dedup();
    if Gpu::open().is_ok() {
        return say("the sources are compiled for the device, case by case");
    }
    let nvrtc = match Nvrtc::open() {
        Ok(nvrtc) => nvrtc,
        Err(why) => return say(&format!("{why}: {} sources not compiled", sources.len())),
    };
    for source in &sources {
        nvrtc.compile(source, "sm_80").unwrap_or_else(|log| panic!("{log}\nof:\n{source}"));
    }
    say(&format!("{} sources compiled", sources.len()));
}
