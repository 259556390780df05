//! Times the kernels' timed cases on the adapter that `LAMINA_ADAPTER` names, each held against its twin first.
//! `cargo bench --bench kernels -- add gemv` times some kernels.

use std::process::ExitCode;

use lamina::bench::{self, clock::Clock};
use lamina::check::Prepared;
use lamina::gpu::{Device, Options};
use lamina::kernels::{ALL, Set};
use pollster::block_on;

/// More than the last-level cache of any GPU.
const COLD: u64 = 512 << 20;

fn main() -> ExitCode {
    let wanted: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
    let unknown: Vec<&String> = wanted.iter().filter(|name| ALL.iter().all(|entry| entry.name != **name)).collect();
    assert!(unknown.is_empty(), "no kernels: {unknown:?}");
    let selector =
        std::env::var("LAMINA_ADAPTER").unwrap_or_default().parse().expect("LAMINA_ADAPTER names an adapter");
    let options = Options { checked: false, ..Options::default() };
    let device = block_on(Device::open(&selector, &options)).expect("the adapter opens");
    let clock = block_on(Clock::of(&device)).expect("the adapter runs");
    let (label, cold) = (device.caps().label(), if device.caps().is_software() { 0 } else { COLD });
    println!(
        "{label}\n{:<16} {:<10} {:>10} {:>10} {:>10} {:>8} {:>8}  case",
        "kernel", "variant", "median us", "p10 us", "p90 us", "GB/s", "TFLOP/s"
    );
    let mut failed = false;
    let all = ALL.iter().filter(|entry| wanted.is_empty() || wanted.iter().any(|name| name == entry.name));
    for case in all.flat_map(|entry| (entry.cases)(Set::Timed)) {
        let (kernel, variants) = (case.kernel, (case.variants)(device.caps()));
        if variants.is_empty() {
            println!("{kernel}: {label} cannot run {}", case.name);
            continue;
        }
        let prepared = Prepared::new(case).expect("the cpu device has no faults");
        for variant in variants {
            match block_on(bench::time(&device, &clock, &prepared, variant, cold)) {
                Ok(t) => println!(
                    "{kernel:<16} {variant:<10} {:>10.1} {:>10.1} {:>10.1} {:>8.0} {:>8.2}  {}",
                    t.time.median_us, t.time.p10_us, t.time.p90_us, t.gbs, t.tflops, t.case,
                ),
                Err(error) => {
                    failed = true;
                    println!("{kernel} {variant}: {error}");
                }
            }
        }
    }
    ExitCode::from(u8::from(failed))
}
