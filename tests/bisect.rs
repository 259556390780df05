//! Steps that run on the twins up to a stage, on every adapter of this system and on the `cpu` device.

use lamina::check::adapters;
use lamina::engine::{run_until, stages};
use lamina::gpu::{Device, Grid, Host, Options, Recording, Shader, Source, View};

/// `y[0] = 3 x[0] + 1` on a GPU; its twin adds 1000 instead, so that the answer tells who ran.
const STEP: Source = Source {
    name: "step",
    text: "@group(0) @binding(0) var<storage, read> x: array<u32>;
@group(0) @binding(1) var<storage, read_write> y: array<u32>;
@compute @workgroup_size(1) fn main() { y[0] = 3u * x[0] + 1u; }
",
};

fn step(recording: &mut Recording, stage: &str, x: View, y: View, grid: Grid) {
    let twin = |host: &Host| host.set("y", 0, &[3 * host.get::<u32>("x")[0] + 1000]);
    recording.stage(stage);
    recording.call(&Shader::of(STEP).build(), vec![("x", x), ("y", y)], &[], grid, twin);
}

/// Four calls in three stages. The values stand at two places of one buffer and in two others; the
/// third call's grid is in memory.
fn recording(device: &Device) -> (Recording, Vec<View>) {
    let (a, b) = (device.upload(&[7u32; 128], "a").unwrap(), device.upload(&[0u32; 4], "b").unwrap());
    let groups = device.upload(&[1u32, 1, 1], "groups").unwrap();
    let (first, second) = (a.slice(0, 256), a.slice(256, 256));
    let c = device.alloc(16, "c").unwrap();
    let mut recording = Recording::new();
    step(&mut recording, "embed", first.clone(), b.view(), Grid::Direct([1, 1, 1]));
    step(&mut recording, "layers.0.attention", b.view(), second.clone(), Grid::Direct([1, 1, 1]));
    step(&mut recording, "layers.0.mlp", second.clone(), c.view(), Grid::Indirect(groups.view()));
    step(&mut recording, "layers.1.mlp", c.view(), b.view(), Grid::Direct([1, 1, 1]));
    (recording, vec![first, second, c.view(), b.view()])
}

#[test]
fn the_first_stages_run_on_the_twins_and_the_rest_on_the_device() {
    let options = Options { checked: true, ..Options::default() };
    let mut devices = adapters(&options);
    devices.push(Device::cpu(&options));
    for device in devices {
        let (label, cpu) = (device.caps().label(), device.caps().backend == "cpu");
        let names = ["embed", "layers.0.attention", "layers.0.mlp", "layers.1.mlp"];
        assert_eq!(stages(&recording(&device).0), names);
        for (stage, twins) in [("embed", 1), ("layers.0.attention", 2), ("layers.0", 3), ("layers", 4)] {
            let (recording, views) = recording(&device);
            pollster::block_on(run_until(&device, &recording, stage)).unwrap();
            let found = pollster::block_on(device.read(&views)).unwrap();
            let found: Vec<u32> = found.iter().map(|bytes| bytemuck::pod_read_unaligned(&bytes[..4])).collect();
            let mut expected = vec![7];
            for call in 0..4 {
                let add = if cpu || call < twins { 1000 } else { 1 };
                expected.push(3 * expected[call] + add);
            }
            assert_eq!(found, [expected[0], expected[2], expected[3], expected[4]], "{stage} on {label}");
        }
        let (recording, _) = recording(&device);
        for wrong in ["layers.0.att", "layers.2", "embe"] {
            let error = pollster::block_on(run_until(&device, &recording, wrong)).unwrap_err();
            assert_eq!(error.exit_code(), 2);
            assert!(error.to_string().contains(wrong) && error.to_string().contains("layers.0.mlp"), "{error}");
        }
    }
}
