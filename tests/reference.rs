//! Whole models against their reference implementations: tiny checkpoints of every architecture and the model
//! that is shipped, on every adapter and on the `cpu` device.

use std::path::{Path, PathBuf};

use futures::StreamExt;
use lamina::check::adapters;
use lamina::engine::{Engine, Options, Request};
use lamina::gpu::{self, Device};
use lamina::kernels::sample::Sampler;
use lamina::model::Model;
use lamina::model::forward::{Decode, Prefill};
use lamina::num::record::RecordFormat;
use pollster::block_on;
use safetensors::SafeTensors;

/// The architectures that are computed.
const FIXTURES: [&str; 14] = [
    "deepseek_v2_lite",
    "deepseek_v2",
    "deepseek_v3",
    "deepseek_v3_halfsplit",
    "deepseek_v3_moonlight",
    "deepseek_v3_kimi_k2",
    "deepseek_v3_mtp",
    "kimi_k25",
    "glm4_moe_lite",
    "youtu",
    "minicpm3",
    "axk1",
    "mistral4",
    "longcat_flash",
];

/// The folder of a checkpoint; its README says how all were made.
fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/models").join(name)
}

/// Every adapter and the `cpu` device, which comes first where `cpu_first`.
fn devices(cpu_first: bool) -> Vec<Device> {
    let options = gpu::Options { checked: true, ..gpu::Options::default() };
    let mut devices = adapters(&options);
    devices.insert(if cpu_first { 0 } else { devices.len() }, Device::cpu(&options));
    devices
}

/// What the reference implementation gave.
struct Reference {
    prompt: Vec<u32>,
    greedy: Vec<u32>,
    /// `[prompt + greedy, vocab]`
    logits: Vec<f32>,
    /// Behind the embedding and each layer, `[prompt + greedy, hidden]`; the last normalised.
    hidden: Vec<Vec<f32>>,
}

impl Reference {
    fn open(folder: &Path) -> Reference {
        let bytes = std::fs::read(folder.join("reference.safetensors")).expect("the reference is there");
        let tensors = SafeTensors::deserialize(&bytes).expect("it is a safetensors file");
        let ids = |name: &str| -> Vec<u32> {
            let data = tensors.tensor(name).expect(name).data();
            bytemuck::pod_collect_to_vec::<u8, i64>(data).into_iter().map(|id| id as u32).collect()
        };
        let values = |name: &str| bytemuck::pod_collect_to_vec(tensors.tensor(name).expect(name).data());
        let names = (0..).map(|i| format!("hidden.{i}")).take_while(|name| tensors.tensor(name).is_ok());
        let hidden = names.map(|name| values(&name)).collect();
        Reference { prompt: ids("input_ids"), greedy: ids("greedy_ids"), logits: values("logits"), hidden }
    }
}

fn engine(device: &Device, folder: &Path, options: &Options) -> Engine {
    let model = Model::load(device, folder, |_, _| {}).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    Engine::new(device, model, options).unwrap_or_else(|e| panic!("{}: {e}", folder.display()))
}

/// The relative L2 distance: the root of the squared differences' sum over that of the squared values.
fn relative(found: &[f32], expected: &[f32]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let squares = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>();
    let differ = squares(&mut found.iter().zip(expected).map(|(f, e)| f64::from(f - e)));
    (differ / squares(&mut expected.iter().map(|e| f64::from(*e)))).sqrt()
}

fn greedy(engine: &mut Engine, prompt: &[u32], count: usize) -> Vec<u32> {
    let id = engine.create(&Sampler::default()).unwrap();
    let request = Request { max_tokens: count, ..Request::default() };
    let records: Vec<_> = block_on(engine.generate(id, prompt, request).collect());
    engine.free(id);
    records.into_iter().map(|record| record.unwrap().token).collect()
}

/// What matrix units make of f16 inputs: the tolerance where prompts run on them.
const MATRICES: f64 = 2e-3;

/// The reference's logits and greedy tokens within `tolerance`, for each of `names` on each device.
fn agree(names: &[&str], options: &Options, devices: &[Device], tolerance: f64) {
    let mut wrong = Vec::new();
    for device in devices {
        let tolerance = if device.caps().matrix_units().is_ok() { tolerance.max(MATRICES) } else { tolerance };
        for name in names {
            let reference = Reference::open(&fixture(name));
            let mut engine = engine(device, &fixture(name), options);
            let all = [reference.prompt.as_slice(), &reference.greedy].concat();
            let id = engine.create(&Sampler::default()).unwrap();
            let logits = block_on(engine.logits(id, &all)).unwrap();
            engine.free(id);
            let error = relative(&logits, &reference.logits);
            let tokens = greedy(&mut engine, &reference.prompt, reference.greedy.len());
            let label = device.caps().label();
            println!("{name} on {label}: logits off by {error:e}, greedy {}", tokens == reference.greedy);
            if !(error < tolerance) || tokens != reference.greedy {
                wrong.push(format!("{name} on {label}: {error:e}, {tokens:?}, expected {:?}", reference.greedy));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Prompts in several steps, and pages that end within them.
fn options() -> Options {
    Options { context: 64, step_tokens: Some(24), page: 16, ..Options::default() }
}

#[test]
fn logits_and_greedy_tokens_are_those_of_the_reference_implementation() {
    agree(&FIXTURES, &options(), &devices(false), 1e-3);
}

/// Prompts over expanded keys and values, in pieces that end within pages and steps.
fn materialised() -> Options {
    Options { prefill: Prefill::Materialised, piece: Some(20), ..options() }
}

#[test]
fn materialised_prompts_are_those_of_the_reference_implementation() {
    agree(&FIXTURES, &materialised(), &devices(false), 1e-3);
}

#[test]
fn every_layer_s_hidden_states_are_those_of_the_reference_implementation() {
    let options = Options { format: RecordFormat::F32, step_tokens: Some(48), ..options() };
    let device = &devices(true)[0];
    for name in FIXTURES {
        let reference = Reference::open(&fixture(name));
        let mut engine = engine(device, &fixture(name), &options);
        let all = [reference.prompt.as_slice(), &reference.greedy].concat();
        let id = engine.create(&Sampler::default()).unwrap();
        let hidden = block_on(engine.hidden(id, &all)).unwrap();
        assert_eq!(hidden.len(), reference.hidden.len(), "{name}: layers");
        for (layer, (found, expected)) in hidden.iter().zip(&reference.hidden).enumerate() {
            let error = relative(found, expected);
            assert!(error < 2e-5, "{name}, hidden.{layer}: off by {error:e}");
        }
    }
}

#[test]
fn prompts_in_one_step_in_steps_of_7_and_token_by_token_are_the_same() {
    let device = &devices(true)[0];
    for name in FIXTURES {
        let reference = Reference::open(&fixture(name));
        let mut logits = Vec::new();
        for prefill in [Prefill::Absorbed, Prefill::Materialised] {
            for step_tokens in [64, 7, 1] {
                let options = Options { step_tokens: Some(step_tokens), prefill, ..materialised() };
                let mut engine = engine(device, &fixture(name), &options);
                let id = engine.create(&Sampler::default()).unwrap();
                logits.push(block_on(engine.logits(id, &reference.prompt)).unwrap());
                engine.free(id);
                let found = greedy(&mut engine, &reference.prompt, 8);
                assert_eq!(found, reference.greedy, "{name}, {prefill:?}, {step_tokens} a step");
            }
        }
        for other in &logits[1..] {
            assert!(relative(other, &logits[0]) < 1e-3, "{name}");
        }
    }
}

#[test]
fn with_an_f32_cache_only_rounding_is_left() {
    for options in [options(), materialised()] {
        let exact = Options { format: RecordFormat::F32, ..options };
        agree(&FIXTURES, &exact, &devices(true)[..1], 2e-5);
    }
}

#[test]
fn whole_models_decode_through_the_fused_kernel() {
    let fused = Options { decode: Decode::Fused, format: RecordFormat::F32, ..options() };
    agree(&["deepseek_v3", "glm4_moe_lite", "minicpm3"], &fused, &devices(false), 2e-5);
}

#[test]
fn weights_and_caches_in_many_small_bindings_change_nothing() {
    let limit = gpu::Options { binding_bytes: Some(64 << 10), checked: true, ..gpu::Options::default() };
    for options in [options(), materialised()] {
        let options = Options { format: RecordFormat::F32, ..options };
        agree(&["deepseek_v3", "longcat_flash"], &options, &adapters(&limit), 2e-5);
    }
}

/// The fixture with the first value of a bf16 tensor made no number.
fn broken(name: &str, tensor: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{name} without {tensor}"));
    std::fs::create_dir_all(&folder).expect("a folder under target");
    let mut bytes = std::fs::read(fixture(name).join("model.safetensors")).expect("the fixture is there");
    let tensors = SafeTensors::deserialize(&bytes).expect("it is a safetensors file");
    let at = tensors.tensor(tensor).expect(tensor).data().as_ptr() as usize - bytes.as_ptr() as usize;
    bytes[at..at + 2].copy_from_slice(&[0xc0, 0x7f]);
    std::fs::write(folder.join("model.safetensors"), bytes).expect("a file under target");
    std::fs::copy(fixture(name).join("config.json"), folder.join("config.json")).expect("the fixture is there");
    folder
}

#[test]
fn a_number_that_is_none_in_attention_s_weights_is_none_in_the_logits_whatever_attends() {
    let ways = [
        Options { prefill: Prefill::Absorbed, ..options() },
        Options { prefill: Prefill::Absorbed, format: RecordFormat::F32, ..options() },
        Options { prefill: Prefill::Absorbed, decode: Decode::Fused, ..options() },
        materialised(),
    ];
    for device in devices(true) {
        for tensor in ["q_a_proj", "kv_a_proj_with_mqa", "kv_b_proj"] {
            let folder = broken("deepseek_v3", &format!("model.layers.0.self_attn.{tensor}.weight"));
            for options in &ways {
                let mut engine = engine(&device, &folder, options);
                let id = engine.create(&Sampler::default()).unwrap();
                let what = format!("{}: {tensor}, {:?}, {:?}", device.caps().label(), options.prefill, options.decode);
                let logits = block_on(engine.logits(id, &[1, 2, 3])).unwrap();
                assert!(logits.iter().any(|logit| !logit.is_finite()), "{what}: swallowed in a prompt");
                let logits = block_on(engine.logits(id, &[4])).unwrap();
                assert!(logits.iter().any(|logit| !logit.is_finite()), "{what}: swallowed in decoding");
            }
        }
    }
}

/// What the reference implementation gave for the model that is shipped; see demos/model/golden.py.
fn golden() -> (PathBuf, serde_json::Value) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("demos/model");
    let text = std::fs::read_to_string(folder.join("golden.json")).expect("it is shipped");
    (folder, serde_json::from_str(&text).expect("it is JSON"))
}

fn ids(value: &serde_json::Value) -> Vec<u32> {
    value.as_array().expect("a list").iter().map(|id| id.as_u64().expect("an id") as u32).collect()
}

#[test]
fn the_shipped_model_continues_prompts_as_the_reference_does_everywhere() {
    let (folder, golden) = golden();
    let text = lamina::text::Text::load(&folder).unwrap();
    for device in devices(false) {
        let mut engine = engine(&device, &folder, &Options { context: 128, ..Options::default() });
        // GL and SwiftShader take a minute for what lavapipe does in 20 seconds: fewer tokens there.
        let caps = device.caps();
        let slow = caps.is_software() && (caps.backend == "gl" || caps.name.contains("SwiftShader"));
        for case in golden["greedy"].as_array().unwrap() {
            let (prompt, expected) = (case["prompt"].as_str().unwrap(), ids(&case["ids"]));
            assert_eq!(text.encode(prompt).unwrap(), ids(&case["prompt_ids"]), "the ids of {prompt:?}");
            let count = if slow { 12 } else { expected.len() };
            let found = greedy(&mut engine, &ids(&case["prompt_ids"]), count);
            assert_eq!(found, expected[..count], "{prompt:?} on {}", device.caps().label());
        }
    }
}

#[test]
fn the_shipped_model_s_perplexity_is_the_reference_s() {
    let (folder, golden) = golden();
    let device = Device::cpu(&gpu::Options::default());
    let mut engine = engine(&device, &folder, &Options { context: 1000, ..Options::default() });
    let text = &golden["texts"][0];
    let (all, window) = (ids(&text["ids"]), text["window"].as_u64().unwrap() as usize);
    assert_eq!(all.len(), 2000);
    let vocab = engine.model().config.vocab as usize;
    let (mut loss, mut count) = (0.0, 0);
    for part in all.chunks(window) {
        let id = engine.create(&Sampler::default()).unwrap();
        let logits = block_on(engine.logits(id, part)).unwrap();
        engine.free(id);
        for (row, next) in logits.chunks_exact(vocab).zip(&part[1..]) {
            let largest = row.iter().fold(f32::MIN, |most, v| most.max(*v));
            let sum: f64 = row.iter().map(|v| f64::from(v - largest).exp()).sum();
            loss += f64::from(largest - row[*next as usize]) + sum.ln();
            count += 1;
        }
    }
    let (found, expected) = ((loss / f64::from(count)).exp(), text["perplexity"].as_f64().unwrap());
    println!("perplexity {found}, expected {expected}");
    assert!((found / expected - 1.0).abs() < 5e-3, "perplexity {found}, expected {expected}");
}
