//! The GPU layer on every adapter of this system, and on the `cpu` device where it has the same duties.

mod poison;

use std::sync::Arc;
use std::time::Duration;

use lamina::Error;
use lamina::check::{Prepared, adapters};
use lamina::gpu::{Device, Grid, Host, Options, Recording, Shader, Source, View, grid_1d};
use lamina::kernels::{ALL, Role, Set, Tensors};
use poison::poison;

fn options() -> Options {
    Options { checked: true, ..Options::default() }
}

/// Every adapter, and the `cpu` device.
fn devices() -> Vec<Device> {
    let mut devices = adapters(&options());
    devices.push(Device::cpu(&options()));
    devices
}

fn read<T: bytemuck::Pod>(device: &Device, view: &View) -> Vec<T> {
    let bytes = pollster::block_on(device.read(std::slice::from_ref(view))).expect("the device answers").remove(0);
    bytemuck::pod_collect_to_vec(&bytes)
}

/// Adds `params.x` to `y[params.y]`.
const BUMP: Source = Source {
    name: "bump",
    text: "struct Params { by: u32, at: u32 }
@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read_write> y: array<u32>;
@compute @workgroup_size(1) fn main() { y[params.at] += params.by; }
",
};

fn bump(recording: &mut Recording, y: &View, by: u32, at: u32) {
    let twin = move |host: &Host| {
        let sum = host.get::<u32>("y")[at as usize] + by;
        host.set("y", at as usize, &[sum]);
    };
    let params = [by, at];
    recording.call(&Shader::of(BUMP).build(), vec![("y", y.clone())], bytemuck::bytes_of(&params), grid_1d(1), twin);
}

#[test]
fn memory_is_zero_at_first_and_keeps_what_is_written() {
    for device in devices() {
        let buffer = device.alloc(1000, "memory").unwrap();
        assert_eq!(buffer.size(), 1008, "rounded up to 16");
        assert!(read::<u8>(&device, &buffer.view()).iter().all(|byte| *byte == 0));
        device.write(&buffer.view(), 4, &[1u8, 2, 3, 4, 5]).unwrap();
        device.write(&buffer.slice(512, 16), 0, &[7u32; 4]).unwrap();
        let bytes = read::<u8>(&device, &buffer.view());
        assert_eq!(bytes[..16], [0, 0, 0, 0, 1, 2, 3, 4, 5, 0, 0, 0, 0, 0, 0, 0], "{}", device.caps().label());
        assert_eq!(bytes[508..532].iter().filter(|byte| **byte == 7).count(), 4);
        assert_eq!(read::<u32>(&device, &buffer.slice(512, 12)), [7, 7, 7]);
        let odd = device.upload(&[1u8, 2, 3], "odd").unwrap();
        assert_eq!(read::<u8>(&device, &odd.view())[..4], [1, 2, 3, 0]);
        let several = pollster::block_on(device.read(&[odd.slice(0, 4), buffer.slice(0, 8), odd.view()])).unwrap();
        assert_eq!(several.iter().map(Vec::len).collect::<Vec<_>>(), [4, 8, 16]);
    }
}

#[test]
fn a_write_outside_its_view_and_a_view_outside_its_buffer_are_faults_of_the_program() {
    let device = Device::cpu(&options());
    let buffer = device.alloc(1024, "small").unwrap();
    let panics = |act: &dyn Fn()| std::panic::catch_unwind(std::panic::AssertUnwindSafe(act)).is_err();
    assert!(panics(&|| device.write(&buffer.slice(0, 16), 8, &[0u32; 3]).unwrap()));
    assert!(panics(&|| device.write(&buffer.view(), 2, &[0u32]).unwrap()));
    assert!(panics(&|| drop(buffer.slice(768, 512))));
    assert!(panics(&|| drop(buffer.slice(128, 16))), "a binding starts at a multiple of 256");
    assert!(panics(&|| drop(buffer.slice(0, 18))), "a binding is whole words");
}

#[test]
fn out_of_memory_says_the_adapter_what_was_asked_and_what_there_is() {
    for device in devices() {
        let error = device.alloc(1 << 60, "layers.0.latent").expect_err("nobody has an exbibyte");
        assert!(matches!(error, Error::OutOfMemory { .. }), "{error:?}");
        let text = error.to_string();
        for part in [device.caps().label(), format!("{} bytes for layers.0.latent", 1u64 << 60)] {
            assert!(text.contains(&part), "{part}: {text}");
        }
        if device.caps().backend != "cpu" {
            assert!(text.contains(&format!("at most {} bytes", device.caps().buffer_bytes)), "{text}");
        }
        assert!(device.alloc(1 << 10, "small").is_ok(), "the device goes on");
    }
}

#[test]
fn calls_run_in_order_and_each_has_its_own_params_past_the_ring_s_first_size() {
    for device in devices() {
        let y = device.upload(&[0u32; 8], "y").unwrap().view();
        let recording = |calls: u32| {
            let mut recording = Recording::new();
            (0..calls).for_each(|i| bump(&mut recording, &y, i + 1, i % 8));
            recording
        };
        let lengths = [3, 700, 1500];
        let recordings = lengths.map(recording);
        // The second time each is submitted again; the ring has grown since the first.
        for (calls, recording) in lengths.iter().zip(&recordings).chain(lengths.iter().zip(&recordings)) {
            device.write(&y, 0, &[0u32; 8]).unwrap();
            device.submit(recording).unwrap();
            let expected: Vec<u32> =
                (0..8).map(|at| (0..*calls).filter(|i| i % 8 == at).map(|i| i + 1).sum()).collect();
            assert_eq!(read::<u32>(&device, &y), expected, "{calls} calls on {}", device.caps().label());
        }
    }
}

#[test]
fn submissions_and_writes_take_effect_in_their_order() {
    for device in devices() {
        let y = device.upload(&[0u32; 4], "y").unwrap().view();
        let (mut one, mut ten) = (Recording::new(), Recording::new());
        bump(&mut one, &y, 1, 0);
        bump(&mut ten, &y, 10, 1);
        device.submit(&one).unwrap();
        device.submit(&ten).unwrap();
        device.write(&y, 0, &[100u32]).unwrap();
        device.submit(&one).unwrap();
        device.submit(&ten).unwrap();
        assert_eq!(read::<u32>(&device, &y), [101, 20, 0, 0], "{}", device.caps().label());
    }
}

#[test]
fn a_recording_refuses_bindings_that_the_shader_does_not_have() {
    let device = Device::cpu(&options());
    let y = device.alloc(16, "y").unwrap().view();
    let shader = Shader::of(BUMP).build();
    let record = |bindings: Vec<(&'static str, View)>, params: &[u8]| {
        let call = || Recording::new().call(&shader, bindings.clone(), params, grid_1d(1), |_: &Host| {});
        let panic = std::panic::catch_unwind(std::panic::AssertUnwindSafe(call)).err()?;
        Some(panic.downcast_ref::<String>().expect("a sentence").clone())
    };
    let named = |names: &[&'static str]| names.iter().map(|name| (*name, y.clone())).collect::<Vec<_>>();
    assert_eq!(record(named(&["y"]), &[0; 8]), None);
    assert_eq!(record(named(&[]), &[0; 8]).unwrap(), "bump: nothing is bound to 'y'");
    assert_eq!(record(named(&["y", "y"]), &[0; 8]).unwrap(), "bump: 'y' is bound twice");
    assert_eq!(record(named(&["y", "z"]), &[0; 8]).unwrap(), "bump: the shader has no binding named 'z'");
    assert_eq!(record(named(&["y"]), &[]).unwrap(), "bump: Params and the shader's uniform do not match");
    assert!(record(named(&["y"]), &[0; 260]).unwrap().contains("260 bytes"));
}

#[test]
fn a_wrong_shader_is_reported_with_its_own_file_and_line() {
    const MODULE: Source = Source { name: "lib/part", text: "// a module\nfn part() -> u32 { return 1u; }\n" };
    let head = "// head\n@group(0) @binding(0) var<storage, read_write> y: array<u32>;\n";
    let wrong_module = Source { name: "lib/part", text: "// a module\nfn part() -> u32 {\n  return nothing;\n}\n" };
    let source = |body: &str| Source { name: "broken", text: format!("{head}{body}").leak() };
    for (kernel, module, place, part) in [
        // What the parser finds, what the validator finds, and what stands in a module.
        (
            source("@compute @workgroup_size(1) fn main() {\n  y[0] = part() + x;\n}\n"),
            MODULE,
            "shaders/broken.wgsl:4",
            "x",
        ),
        (
            source("@compute @workgroup_size(1) fn main() {\n  y[0] = part() + 1.5f;\n}\n"),
            MODULE,
            "shaders/broken.wgsl:4",
            "",
        ),
        (
            source("@compute @workgroup_size(1) fn main() { y[0] = part(); }\n"),
            wrong_module,
            "shaders/lib/part.wgsl:3",
            "nothing",
        ),
    ] {
        let shader = Shader::of(kernel).u32("SPARE", 1).module(module).build();
        for device in adapters(&options()) {
            let y = device.alloc(16, "y").unwrap().view();
            let mut recording = Recording::new();
            recording.call(&shader, vec![("y", y)], &[], grid_1d(1), |_: &Host| {});
            let error = pollster::block_on(device.prepare(&recording)).expect_err("the shader is wrong");
            assert!(matches!(error, Error::Shader { .. }), "{error:?}");
            let text = error.to_string();
            assert!(text.starts_with(place) && text.contains(part), "{place}: {text}");
            assert!(text.contains(&device.caps().label()), "{text}");
            assert!(device.submit(&recording).is_err(), "and again when it is submitted");
        }
    }
}

#[test]
fn a_forced_binding_limit_shows_in_the_caps_and_holds() {
    let options = Options { binding_bytes: Some(64 << 10), ..options() };
    for device in adapters(&options) {
        assert_eq!(device.caps().binding_bytes, 64 << 10);
        let buffer = device.alloc(128 << 10, "two chunks").unwrap();
        let run = |view: View| {
            let mut recording = Recording::new();
            bump(&mut recording, &view, 1, 3);
            device.submit(&recording)
        };
        run(buffer.slice(64 << 10, 64 << 10)).unwrap();
        assert_eq!(read::<u32>(&device, &buffer.slice(64 << 10, 16)), [0, 0, 0, 1]);
        let error = run(buffer.view()).expect_err("128 KiB in one binding");
        assert!(matches!(error, Error::Driver { .. }) && error.to_string().contains(&device.caps().label()), "{error}");
        let again = run(buffer.view()).expect_err("128 KiB in one binding, once more");
        assert_eq!(error.to_string(), again.to_string(), "and the reason is told each time");
        run(buffer.slice(0, 64 << 10)).expect("the device goes on");
    }
    assert_eq!(Device::cpu(&options).caps().binding_bytes, 64 << 10);
}

#[test]
fn a_grid_that_an_earlier_call_wrote_is_dispatched() {
    const GRID: Source = Source {
        name: "grid",
        text: "@group(0) @binding(0) var<storage, read_write> grid: array<u32>;
@compute @workgroup_size(1) fn main() { grid[0] = 3u; grid[1] = 2u; grid[2] = 1u; }
",
    };
    const COUNT: Source = Source {
        name: "count",
        text: "@group(0) @binding(0) var<storage, read_write> y: array<atomic<u32>>;
@compute @workgroup_size(1) fn main() { atomicAdd(&y[0], 1u); }
",
    };
    for device in adapters(&options()) {
        let (grid, y) = (device.alloc(16, "grid").unwrap().view(), device.alloc(16, "y").unwrap().view());
        let mut recording = Recording::new();
        recording.call(&Shader::of(GRID).build(), vec![("grid", grid.clone())], &[], grid_1d(1), |_: &Host| {});
        let count = Shader::of(COUNT).build();
        recording.call(&count, vec![("y", y.clone())], &[], Grid::Indirect(grid), |_: &Host| {});
        device.submit(&recording).unwrap();
        assert_eq!(read::<u32>(&device, &y)[0], 6, "{}", device.caps().label());
    }
}

#[test]
fn each_timed_run_has_a_time_where_there_are_timestamps() {
    for device in devices() {
        let y = device.upload(&[0u32; 4], "y").unwrap().view();
        let mut recording = Recording::new();
        (0..200).for_each(|_| bump(&mut recording, &y, 1, 2));
        let times = pollster::block_on(device.time(&[recording.clone(), recording], 3)).unwrap();
        match times {
            Some(times) => {
                assert_eq!(times.len(), 6);
                assert!(times.iter().sum::<Duration>() > Duration::ZERO, "{}: {times:?}", device.caps().label());
                assert!(times.iter().all(|time| *time < Duration::from_secs(60)), "{times:?}");
                assert_eq!(read::<u32>(&device, &y)[2], 1200);
            }
            None => assert!(!device.caps().timestamps),
        }
    }
}

#[test]
fn no_kernel_reads_workgroup_memory_that_it_did_not_write() {
    let mut run = 0;
    for device in adapters(&options()) {
        let poison = poison(&device);
        for kernel in ALL.iter() {
            // The cheapest case of each spec's set of variants: what is read does not depend on the size.
            let mut cases = (kernel.cases)(Set::Pairs);
            cases.sort_by(|a, b| a.flops.total_cmp(&b.flops));
            for case in cases.into_iter().take(3) {
                let prepared = Prepared::new(case).expect("the cpu device has no faults");
                for variant in (prepared.case().variants)(device.caps()) {
                    let poisoned = |recording: Recording| {
                        let mut all = Recording::new();
                        for at in 0..recording.calls().len() {
                            all.append(&poison);
                            all.append(&recording.split_at(at).1.split_at(1).0);
                        }
                        all
                    };
                    let outcome = prepared.run_with(&device, variant, poisoned).expect("the driver does its part");
                    assert!(outcome.passed, "{}: {outcome:?}", device.caps().label());
                    run += 1;
                }
            }
        }
    }
    assert!(run >= ALL.len());
}

#[test]
fn the_same_call_gives_the_same_bits_each_time() {
    for device in adapters(&options()) {
        for kernel in ALL.iter() {
            let mut cases = (kernel.cases)(Set::Pairs);
            cases.sort_by(|a, b| a.flops.total_cmp(&b.flops));
            // One of middling size: the smallest may take a single workgroup.
            let case = cases.swap_remove(cases.len() / 2);
            for variant in (case.variants)(device.caps()) {
                let bits = || {
                    let job = (case.job)();
                    let tensors = Tensors::upload(&device, &job.tensors).expect("room for a case");
                    let mut recording = Recording::new();
                    (job.record)(variant, device.caps(), &tensors, &mut recording);
                    device.submit(&recording).expect("the driver does its part");
                    let outputs = job.tensors.iter().filter(|t| matches!(t.role, Role::Output(_)));
                    let views: Vec<View> = outputs.map(|t| tensors.get(t.name)).collect();
                    pollster::block_on(device.read(&views)).expect("the device answers")
                };
                let label = device.caps().label();
                assert!(bits() == bits(), "{} {variant}, {} on {label}", kernel.name, case.name);
            }
        }
    }
}

#[test]
fn the_poison_is_found_by_a_kernel_that_reads_what_it_did_not_write() {
    const LEAK: Source = Source {
        name: "leak",
        text: "@group(0) @binding(0) var<storage, read_write> y: array<atomic<u32>>;
var<workgroup> memory: array<vec4<u32>, 1024>;
@compute @workgroup_size(64) fn main(@builtin(local_invocation_index) lane: u32) {
  if (atomicLoad(&y[1]) == 1u) { memory[lane] = vec4<u32>(1u); }
  workgroupBarrier();
  if (memory[lane].x == 0x7fc00000u) { atomicAdd(&y[0], 1u); }
}
",
    };
    let leak: Arc<Shader> = Shader::of(LEAK).build();
    let mut found = Vec::new();
    for device in adapters(&options()) {
        let y = device.alloc(16, "y").unwrap().view();
        let mut recording = Recording::new();
        // A driver runs workgroups on several cores, each with memory of its own: more than one try.
        for _ in 0..20 {
            recording.append(&poison(&device));
            recording.call(&leak, vec![("y", y.clone())], &[], grid_1d(256), |_: &Host| {});
        }
        device.submit(&recording).unwrap();
        found.push((device.caps().label(), read::<u32>(&device, &y)[0]));
    }
    assert!(found.iter().any(|(_, seen)| *seen > 0), "the poison shows on no adapter: {found:?}");
}
