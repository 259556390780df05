//! Models on a device: every number of a checkpoint stands where the kernels look for it.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use half::bf16;
use lamina::Error;
use lamina::gpu::{Device, Options, View};
use lamina::kernels::weights::{WeightFormat, Weights};
use lamina::model::load::{GatedWeights, MlpWeights, MoeWeights};
use lamina::model::plan;
use lamina::model::tensors::{Expected, ExpertLayout, ExpertTensors, GatedTensors, MlpTensors, QueryTensors, Tensors};
use lamina::model::{Config, Model};
use serde_json::{Map, json};

/// A device whose bindings are small, so that matrices come in several chunks.
fn device_of(binding_bytes: u64) -> Device {
    Device::cpu(&Options { binding_bytes: Some(binding_bytes), ..Options::default() })
}

fn device() -> Device {
    device_of(8192)
}

/// A checkpoint of a configuration of `tests/data/configs`, of drawn bf16 numbers, and what they are.
struct Drawn {
    folder: PathBuf,
    config: Config,
    tensors: Tensors,
    values: HashMap<String, Vec<f32>>,
}

impl Drawn {
    fn new(name: &str, experts: ExpertLayout, left_out: &[&str]) -> Drawn {
        Drawn::changed(name, experts, left_out, json!({}))
    }

    /// With other fields.
    fn changed(name: &str, experts: ExpertLayout, left_out: &[&str], changes: serde_json::Value) -> Drawn {
        let folder = format!("{name} {experts:?} {}", changes.as_object().expect("fields").len());
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("loading").join(folder);
        std::fs::create_dir_all(&folder).expect("a folder under target");
        let text = std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/data/configs/{name}.json")));
        let text = text.expect("a file of this project");
        let mut value: serde_json::Value = serde_json::from_slice(&text).expect("JSON");
        value.as_object_mut().expect("an object").extend(changes.as_object().expect("fields").clone());
        let text = value.to_string().into_bytes();
        let config = Config::parse(&text, Path::new(name)).expect("a model");
        std::fs::write(folder.join("config.json"), text).expect("a file");
        let (tensors, mut random) = (Tensors::of(&config, experts), fastrand::Rng::with_seed(5));
        let (mut header, mut data, mut values) = (Map::new(), Vec::new(), HashMap::new());
        for tensor in tensors.all().into_iter().filter(|tensor| !left_out.iter().any(|end| tensor.name.ends_with(end)))
        {
            let mut draw = || bf16::from_f32(random.f32() - 0.5);
            let drawn: Vec<bf16> = (0..tensor.values()).map(|_| draw()).collect();
            let range = [data.len(), data.len() + 2 * drawn.len()];
            header.insert(tensor.name.clone(), json!({"dtype": "BF16", "shape": tensor.shape, "data_offsets": range}));
            data.extend(drawn.iter().flat_map(|v| v.to_le_bytes()));
            values.insert(tensor.name.clone(), drawn.iter().map(|v| v.to_f32()).collect());
        }
        let header = serde_json::Value::Object(header).to_string();
        let file = [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &data].concat();
        std::fs::write(folder.join("model.safetensors"), file).expect("a file");
        Drawn { folder, config, tensors, values }
    }

    fn row(&self, tensor: &Expected, row: usize) -> &[f32] {
        let columns = *tensor.shape.last().expect("a side");
        &self.values[&tensor.name][row * columns..(row + 1) * columns]
    }

    fn rows<'a>(&'a self, tensor: &'a Expected) -> impl Iterator<Item = &'a [f32]> {
        (0..tensor.values() / tensor.shape.last().expect("a side")).map(|row| self.row(tensor, row))
    }
}

fn read(device: &Device, view: &View) -> Vec<u8> {
    pollster::block_on(device.read(std::slice::from_ref(view))).expect("it can be read").remove(0)
}

fn vector(device: &Device, view: &View) -> Vec<f32> {
    bytemuck::pod_collect_to_vec(&read(device, view))
}

/// The rows of a matrix on the device, without their padding, which must be zero.
fn rows(device: &Device, weights: &Weights) -> Vec<Vec<f32>> {
    let mut rows = Vec::new();
    for chunk in &weights.chunks {
        assert_eq!(chunk.first_row, rows.len());
        let values = weights.format.decode(&read(device, &chunk.view));
        for row in values.chunks(weights.stride).take(chunk.rows) {
            assert!(row[weights.columns..].iter().all(|v| *v == 0.0), "padding");
            rows.push(row[..weights.columns].to_vec());
        }
    }
    assert_eq!(rows.len(), weights.rows);
    rows
}

/// Gate and up rows alternate, expert after expert; a down projection wider than the matrix stands in pieces.
fn assert_gated(device: &Device, drawn: &Drawn, weights: &GatedWeights, experts: &[&GatedTensors]) {
    let mut gate_up = rows(device, &weights.gate_up).into_iter();
    let mut down = rows(device, &weights.down).into_iter();
    for expert in experts {
        for (gate, up) in drawn.rows(&expert.gate).zip(drawn.rows(&expert.up)) {
            assert_eq!((gate_up.next().expect("gate"), gate_up.next().expect("up")), (gate.to_vec(), up.to_vec()));
        }
        let width = weights.down.columns;
        for piece in 0..expert.down.shape[1] / width {
            let rows = drawn.rows(&expert.down).map(|row| &row[piece * width..(piece + 1) * width]);
            rows.for_each(|row| assert_eq!(down.next().expect("down"), row));
        }
    }
    assert!(gate_up.next().is_none() && down.next().is_none());
}

fn assert_moe(device: &Device, drawn: &Drawn, weights: &MoeWeights, tensors: &lamina::model::tensors::MoeTensors) {
    assert_eq!(weights.router.format, WeightFormat::F32);
    assert_eq!(rows(device, &weights.router), drawn.rows(&tensors.router).map(<[f32]>::to_vec).collect::<Vec<_>>());
    let ExpertTensors::Each(experts) = &tensors.experts else { panic!("each for itself") };
    let appended = tensors.shared.iter().filter(|_| weights.appended > 0);
    assert_gated(device, drawn, &weights.experts, &experts.iter().chain(appended).collect::<Vec<_>>());
    let cut = weights.experts.gate_up.rows / (experts.len() + weights.appended as usize);
    assert!(weights.experts.gate_up.chunks.len() > 1);
    assert!(weights.experts.gate_up.chunks.iter().all(|chunk| chunk.first_row % cut == 0 && chunk.rows % cut == 0));
    match (&weights.shared, &tensors.shared) {
        (Some(weights), Some(tensors)) => assert_gated(device, drawn, weights, &[tensors]),
        (None, None) => {}
        _ => panic!("shared experts"),
    }
    if let Some(bias) = &tensors.bias {
        let expected = drawn.values.get(&bias.name).cloned().unwrap_or(vec![0.0; bias.values()]);
        assert_eq!(vector(device, weights.bias.as_ref().expect("a bias"))[..expected.len()], expected);
    }
    assert_eq!(weights.norm.is_some(), tensors.norm.is_some());
}

#[test]
fn every_number_stands_where_the_kernels_look_for_it() {
    let device = device();
    for name in ["deepseek_v2_lite", "deepseek_v3", "longcat_flash", "axk1", "kimi_k25", "minicpm3"] {
        let drawn = Drawn::new(name, ExpertLayout::Each, &["e_score_correction_bias"][..usize::from(name == "axk1")]);
        let mut steps = Vec::new();
        let model = Model::load(&device, &drawn.folder, |done, total| steps.push((done, total)));
        let model = model.unwrap_or_else(|error| panic!("{name}: {error}"));
        let total = 2 * drawn.values.values().map(|values| values.len() as u64).sum::<u64>();
        assert!(steps.is_sorted() && steps[0] == (0, total) && steps.last() == Some(&(total, total)), "{name}");

        let (config, tensors) = (&drawn.config, &drawn.tensors);
        assert_eq!(model.bytes, plan::weight_bytes(tensors, None), "{name}");
        assert_eq!((&model.config, model.layers.len()), (config, tensors.layers.len()));
        assert_eq!(rows(&device, &model.embedding), drawn.rows(&tensors.embedding).collect::<Vec<_>>());
        let head = tensors.head.as_ref().unwrap_or(&tensors.embedding);
        assert_eq!(rows(&device, &model.head), drawn.rows(head).collect::<Vec<_>>());
        assert_eq!(vector(&device, &model.norm), drawn.values[&tensors.norm.name]);
        for (weights, tensors) in model.layers.iter().zip(&tensors.layers) {
            assert_eq!(weights.blocks.len(), tensors.blocks.len());
            for (weights, tensors) in weights.blocks.iter().zip(&tensors.blocks) {
                assert_eq!(vector(&device, &weights.attention_norm), drawn.values[&tensors.attention_norm.name]);
                assert_eq!(vector(&device, &weights.mlp_norm), drawn.values[&tensors.mlp_norm.name]);
                let (weights, tensors, mlps) = (&weights.attention, &tensors.attention, (&weights.mlp, &tensors.mlp));
                let first = match &tensors.query {
                    QueryTensors::Whole(q) => q,
                    QueryTensors::LowRank { q_a, norm, q_b } => {
                        let (on_device, matrix) = weights.query.as_ref().expect("a compressed query");
                        assert_eq!(vector(&device, on_device), drawn.values[&norm.name]);
                        assert_eq!(rows(&device, matrix), drawn.rows(q_b).collect::<Vec<_>>());
                        q_a
                    }
                };
                let input = rows(&device, &weights.input);
                assert_eq!(input[..first.shape[0]], drawn.rows(first).collect::<Vec<_>>());
                assert_eq!(input[weights.kv_offset as usize..], drawn.rows(&tensors.kv_a).collect::<Vec<_>>());
                assert_eq!(vector(&device, &weights.kv_norm), drawn.values[&tensors.kv_a_norm.name]);
                assert_eq!(rows(&device, &weights.kv_b), drawn.rows(&tensors.kv_b).collect::<Vec<_>>());
                assert_eq!(weights.heads.iter().map(|chunk| chunk.heads).sum::<u32>(), config.mla.heads);
                assert_eq!(rows(&device, &weights.output), drawn.rows(&tensors.output).collect::<Vec<_>>());
                match mlps {
                    (MlpWeights::Dense(weights), MlpTensors::Dense(tensors)) => {
                        assert_gated(&device, &drawn, weights, &[tensors]);
                    }
                    (MlpWeights::Moe(weights), MlpTensors::Moe(tensors)) => {
                        assert_moe(&device, &drawn, weights, tensors);
                    }
                    _ => panic!("{name}: another MLP"),
                }
            }
            if let (Some(weights), Some(tensors)) = (&weights.shortcut, &tensors.shortcut) {
                assert_moe(&device, &drawn, weights, tensors);
            }
        }
    }
}

#[test]
fn rows_of_a_compressed_query_are_filled_up_to_four_and_heads_stay_whole() {
    let (device, drawn) =
        (device_of(4096), Drawn::changed("youtu", ExpertLayout::Each, &[], json!({"q_lora_rank": 22})));
    let model = Model::load(&device, &drawn.folder, |_, _| {}).expect("a model");
    let (weights, tensors) = (&model.layers[2].blocks[0].attention, &drawn.tensors.layers[2].blocks[0].attention);
    let QueryTensors::LowRank { q_a, .. } = &tensors.query else { panic!("a compressed query") };
    let input = rows(&device, &weights.input);
    assert_eq!((weights.kv_offset, input.len()), (24, 64));
    assert_eq!(model.bytes, plan::weight_bytes(&drawn.tensors, None));
    assert_eq!(input[..22], drawn.rows(q_a).collect::<Vec<_>>());
    assert_eq!(input[22..24], [vec![0.0; 64], vec![0.0; 64]]);
    assert_eq!(input[24..], drawn.rows(&tensors.kv_a).collect::<Vec<_>>());
    let heads: Vec<(u32, u32)> = weights.heads.iter().map(|chunk| (chunk.first_head, chunk.heads)).collect();
    assert_eq!(heads, [(0, 2), (2, 2)]);
    assert_eq!(rows(&device, &weights.kv_b), drawn.rows(&tensors.kv_b).collect::<Vec<_>>());
}

#[test]
fn experts_in_one_tensor_come_out_as_those_in_many() {
    let (device, drawn) = (device(), Drawn::new("mistral4", ExpertLayout::Fused, &[]));
    let model = Model::load(&device, &drawn.folder, |_, _| {}).expect("a model");
    let (MlpWeights::Moe(weights), MlpTensors::Moe(tensors)) =
        (&model.layers[1].blocks[0].mlp, &drawn.tensors.layers[1].blocks[0].mlp)
    else {
        panic!("experts")
    };
    let ExpertTensors::Fused { gate_up, down } = &tensors.experts else { panic!("in one tensor") };
    let (width, found) = (gate_up.shape[1] / 2, rows(&device, &weights.experts.gate_up));
    for expert in 0..gate_up.shape[0] {
        for i in 0..width {
            let at = expert * 2 * width;
            assert_eq!(found[at + 2 * i], drawn.row(gate_up, at + i), "gate {i} of expert {expert}");
            assert_eq!(found[at + 2 * i + 1], drawn.row(gate_up, at + width + i), "up {i} of expert {expert}");
        }
    }
    // The shared expert, which has tensors of its own, stands behind them.
    let (shared, routed) = (tensors.shared.as_ref().expect("one"), gate_up.shape[0]);
    assert_eq!(weights.appended, 1);
    for i in 0..width {
        let at = routed * 2 * width + 2 * i;
        assert_eq!((&found[at][..], &found[at + 1][..]), (drawn.row(&shared.gate, i), drawn.row(&shared.up, i)));
    }
    let all = drawn.rows(down).chain(drawn.rows(&shared.down));
    assert_eq!(rows(&device, &weights.experts.down), all.collect::<Vec<_>>());
}

#[test]
fn a_norm_that_is_not_finite_is_an_error_that_names_it() {
    let drawn = Drawn::new("youtu", ExpertLayout::Each, &[]);
    let file = drawn.folder.join("model.safetensors");
    let mut bytes = std::fs::read(&file).expect("it was written");
    // The final norm is the last tensor; the head is the embedding.
    let last = bytes.len() - 2;
    bytes[last..].copy_from_slice(&bf16::NAN.to_le_bytes());
    std::fs::write(&file, bytes).expect("a file");
    let error = Model::load(&device(), &drawn.folder, |_, _| {}).err().expect("no number");
    assert!(matches!(error, Error::Invalid { .. }));
    assert!(
        error.to_string().contains("tensor 'model.norm.weight': expected finite numbers, found NaN at 63"),
        "{error}"
    );
}
