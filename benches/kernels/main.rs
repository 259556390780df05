//! Times each kernel on the adapter that `LAMINA_ADAPTER` names, each case checked first.
//! `cargo bench --bench kernels -- add` times one kernel.

use lamina::bench::{self, clock::Clock};
use lamina::check::Prepared;
use lamina::gpu::{Device, Options};
use lamina::kernels::{ALL, Set};
use pollster::block_on;

/// More than the last-level cache of any GPU.
const COLD: u64 = 512 << 20;

macro_rules! benches {
    ($($name:ident,)*) => {
        $(mod $name;)*
        const BENCHES: &[(&str, fn())] = &[$((stringify!($name), $name::run),)*];
    };
}

benches![
    add,
    embed,
    gemm,
    gemv,
    gqa_append,
    gqa_decode,
    mla_absorb,
    mla_append,
    mla_combine,
    mla_decode,
    mla_decode_coop,
    mla_decode_fused,
    mla_gather,
    mla_prefill,
    moe_combine,
    moe_gemm,
    moe_gemv,
    moe_route,
    moe_sort,
    rms_norm,
    rope,
    sample,
    swiglu,
];

fn main() {
    let wanted: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
    println!(
        "{:<16} {:<10} {:>10} {:>10} {:>10} {:>8} {:>8}  case",
        "kernel", "variant", "median us", "p10 us", "p90 us", "GB/s", "TFLOP/s"
    );
    for (name, run) in BENCHES {
        if wanted.is_empty() || wanted.iter().any(|w| w == name) {
            run();
        }
    }
}

/// Times every timed case and variant of a kernel, one line of the table each.
fn time(kernel: &str) {
    let selector =
        std::env::var("LAMINA_ADAPTER").unwrap_or_default().parse().expect("LAMINA_ADAPTER names an adapter");
    let options = Options { checked: false, ..Options::default() };
    let device = block_on(Device::open(&selector, &options)).expect("the adapter opens");
    let clock = block_on(Clock::of(&device)).expect("the adapter runs");
    let cold = if device.caps().is_software() { 0 } else { COLD };
    let entry = ALL.iter().find(|e| e.name == kernel).expect("the kernel is in the list");
    for case in (entry.cases)(Set::Timed) {
        if (case.variants)(device.caps()).is_empty() {
            println!("{kernel}: {} cannot run {}", device.caps().label(), case.name);
            continue;
        }
        let prepared = Prepared::new(case).expect("the cpu device has no faults");
        for variant in (prepared.case().variants)(device.caps()) {
            match block_on(bench::time(&device, &clock, &prepared, variant, cold)) {
                Ok(t) => println!(
                    "{kernel:<16} {variant:<10} {:>10.1} {:>10.1} {:>10.1} {:>8.0} {:>8.2}  {}",
                    t.time.median_us, t.time.p10_us, t.time.p90_us, t.gbs, t.tflops, t.case,
                ),
                Err(error) => println!("{kernel} {variant}: {error}"),
            }
        }
    }
}
