//! Golden files that PyTorch computed on a CUDA device (`tests/data/goldens/`), against every adapter of this system
//! and the `cpu` device. Inputs and weights come from an integer hash on both sides. No test writes there.

mod attention;
mod layers;

use std::path::Path;

use half::{bf16, f16};
use lamina::check::adapters;
use lamina::gpu::{Device, Options};

/// The tensors of a file, as f64.
struct Golden(Vec<u8>);

impl Golden {
    fn open(name: &str) -> Golden {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/goldens").join(name);
        Golden(std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display())))
    }

    fn get(&self, name: &str) -> Vec<f64> {
        let file = safetensors::SafeTensors::deserialize(&self.0).expect("it is a safetensors file");
        let tensor = file.tensor(name).unwrap_or_else(|error| panic!("{name}: {error}"));
        let data = tensor.data();
        use safetensors::Dtype::{BF16, F16, F32, I32};
        match tensor.dtype() {
            F32 => bytemuck::pod_collect_to_vec::<u8, f32>(data).into_iter().map(f64::from).collect(),
            BF16 => bytemuck::pod_collect_to_vec::<u8, bf16>(data).into_iter().map(f64::from).collect(),
            F16 => bytemuck::pod_collect_to_vec::<u8, f16>(data).into_iter().map(f64::from).collect(),
            I32 => bytemuck::pod_collect_to_vec::<u8, i32>(data).into_iter().map(f64::from).collect(),
            other => panic!("{name}: {other:?}"),
        }
    }

    fn has(&self, name: &str) -> bool {
        safetensors::SafeTensors::deserialize(&self.0).expect("it is a safetensors file").tensor(name).is_ok()
    }
}

/// The hash of make_goldens.py: Chris Wellons' lowbias32.
fn mixed(mut x: u32) -> u32 {
    x = (x ^ (x >> 16)).wrapping_mul(0x7FEB_352D);
    x = (x ^ (x >> 15)).wrapping_mul(0x846C_A68B);
    x ^ (x >> 16)
}

/// Values `from` to `from + count` of a stream: uniform in [-1, 1), multiples of 2^(1 - bits), times `factor`.
fn stream(number: u32, from: usize, count: usize, bits: u32, factor: f32) -> Vec<f32> {
    let (seed, half) = (mixed(number), (1u32 << (bits - 1)) as f32);
    let value = |i: usize| ((mixed(i as u32 ^ seed) >> (32 - bits)) as f32 - half) / half * factor;
    (from..from + count).map(value).collect()
}

/// The `cpu` device, then every adapter.
fn devices() -> Vec<Device> {
    let options = Options { checked: true, ..Options::default() };
    let mut devices = vec![Device::cpu(&options)];
    devices.extend(adapters(&options));
    devices
}

/// The normalised mean square error.
fn nmse(found: &[f32], expected: &[f64]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let error: f64 = found.iter().zip(expected).map(|(f, e)| (f64::from(*f) - e).powi(2)).sum();
    error / expected.iter().map(|e| e * e).sum::<f64>()
}

/// Notes the NMSE, and whether it is over a tolerance.
fn hold(wrong: &mut Vec<String>, what: String, found: f64, tolerance: f64) {
    println!("{what}: NMSE {found:.1e}, at most {tolerance:.0e}");
    if !(found <= tolerance) {
        wrong.push(format!("{what}: NMSE {found:e}, over {tolerance:e}"));
    }
}

#[test]
fn a_stream_is_what_the_script_says() {
    // python: stream(7, (5,), 8) * 128, stream(100, (3,), 11) * 1024
    assert_eq!(stream(7, 0, 5, 8, 128.0), [-44.0, 4.0, 25.0, -51.0, -72.0]);
    assert_eq!(stream(100, 0, 3, 11, 1024.0), [797.0, 585.0, -114.0]);
    assert_eq!(stream(7, 3, 2, 8, 64.0), [-25.5, -36.0]);
}

#[test]
fn the_files_name_what_made_them() {
    for name in ["attention", "mla_layer", "moe_layer"] {
        let golden = Golden::open(&format!("{name}.safetensors"));
        let (_, header) = safetensors::SafeTensors::read_metadata(&golden.0).expect("a header");
        let metadata = header.metadata().as_ref().expect("metadata");
        for key in ["gpu", "torch", "cuda", "script"] {
            assert!(metadata.get(key).is_some_and(|value| !value.is_empty()), "{name}: {key} of {metadata:?}");
        }
        assert!(!metadata["gpu"].contains("CPU"), "{name} was made by {metadata:?}");
    }
}
