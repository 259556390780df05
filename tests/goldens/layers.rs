//! Layers of DeepSeek-V2-Lite's real dimensions: an MLA layer through the engine, and a mixture of experts.

use std::path::{Path, PathBuf};

use half::bf16;
use lamina::engine::{Engine, Options};
use lamina::gpu::{Device, Recording, View};
use lamina::kernels::linear::{Activations, Epilogue, Linear, Product};
use lamina::kernels::moe::Experts;
use lamina::kernels::moe_layer::{Args, MoeLayer, Scratch, Spec};
use lamina::kernels::moe_route::{self, Scoring};
use lamina::kernels::sample::Sampler;
use lamina::kernels::weights::{WeightChunk, WeightFormat, Weights, pack, split};
use lamina::model::Model;
use lamina::model::forward::{Decode, Prefill};
use lamina::num::record::RecordFormat;
use pollster::block_on;
use serde_json::{Map, json};

use super::{Golden, devices, hold, nmse, stream};

const HIDDEN: usize = 2048;
const HEADS: usize = 16;
const LATENT: usize = 512;
const NOPE: usize = 128;
const ROPE: usize = 64;
const VALUE: usize = 128;
/// Of the dense MLP behind the attention, and of the vocabulary: no subject here.
const NARROW: usize = 64;
const TOKENS: usize = 12;

/// A checkpoint of one layer in the test's own folder.
fn checkpoint() -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("goldens");
    std::fs::create_dir_all(&folder).expect("a folder under target");
    let config = json!({
        "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "hidden_act": "silu",
        "vocab_size": NARROW, "hidden_size": HIDDEN, "intermediate_size": NARROW, "num_hidden_layers": 1,
        "num_attention_heads": HEADS, "num_key_value_heads": HEADS, "q_lora_rank": null, "kv_lora_rank": LATENT,
        "qk_nope_head_dim": NOPE, "qk_rope_head_dim": ROPE, "v_head_dim": VALUE, "rms_norm_eps": 1e-6,
        "moe_intermediate_size": 1408, "n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6,
        "first_k_dense_replace": 1, "moe_layer_freq": 1, "topk_method": "greedy", "scoring_func": "softmax",
        "norm_topk_prob": false, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0,
        "max_position_embeddings": 163_840, "rope_theta": 10_000.0, "tie_word_embeddings": false,
        "rope_scaling": {
            "type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096, "beta_fast": 32,
            "beta_slow": 1, "mscale": 0.707, "mscale_all_dim": 0.707,
        },
    });
    std::fs::write(folder.join("config.json"), config.to_string()).expect("a file under target");
    let of = |number, rows: usize, columns: usize, exponent: i32| {
        (vec![rows, columns], stream(number, 0, rows * columns, 8, 2f32.powi(exponent)))
    };
    let norm = |number, length: usize| {
        let values = stream(number, 0, length, 8, 0.25);
        (vec![length], values.iter().map(|v| 1.0 + v).collect::<Vec<f32>>())
    };
    let tensors = [
        ("model.embed_tokens", of(1, NARROW, HIDDEN, 0)),
        ("model.layers.0.self_attn.q_proj", of(2, HEADS * (NOPE + ROPE), HIDDEN, -4)),
        ("model.layers.0.self_attn.kv_a_proj_with_mqa", of(3, LATENT + ROPE, HIDDEN, -4)),
        ("model.layers.0.self_attn.kv_b_proj", of(4, HEADS * (NOPE + VALUE), LATENT, -4)),
        ("model.layers.0.self_attn.o_proj", of(5, HIDDEN, HEADS * VALUE, -4)),
        ("model.layers.0.mlp.gate_proj", of(6, NARROW, HIDDEN, -5)),
        ("model.layers.0.mlp.up_proj", of(7, NARROW, HIDDEN, -5)),
        ("model.layers.0.mlp.down_proj", of(8, HIDDEN, NARROW, -3)),
        ("model.layers.0.input_layernorm", norm(9, HIDDEN)),
        ("model.layers.0.self_attn.kv_a_layernorm", norm(10, LATENT)),
        ("model.layers.0.post_attention_layernorm", norm(11, HIDDEN)),
        ("model.norm", norm(12, HIDDEN)),
        ("lm_head", of(13, NARROW, HIDDEN, -5)),
    ];
    let (mut header, mut data) = (Map::new(), Vec::new());
    for (name, (shape, values)) in tensors {
        let (from, matrix) = (data.len(), shape.len() == 2);
        match matrix {
            true => data.extend(values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes())),
            false => data.extend(values.iter().flat_map(|v| v.to_le_bytes())),
        }
        let dtype = if matrix { "BF16" } else { "F32" };
        let entry = json!({"dtype": dtype, "shape": shape, "data_offsets": [from, data.len()]});
        header.insert(format!("{name}.weight"), entry);
    }
    let mut header = serde_json::Value::Object(header).to_string();
    header.push_str(&" ".repeat(header.len().next_multiple_of(8) - header.len()));
    let length = (header.len() as u64).to_le_bytes();
    let file = [&length, header.as_bytes(), &data].concat();
    std::fs::write(folder.join("model.safetensors"), file).expect("a file under target");
    folder
}

#[test]
fn an_mla_layer_of_deepseek_v2_lite_is_pytorchs_on_cuda() {
    let golden = Golden::open("mla_layer.safetensors");
    let folder = checkpoint();
    let ids: Vec<u32> = (0..TOKENS).map(|i| (5 * i % NARROW) as u32).collect();
    // Against the same records: f32 arithmetic in another order, which now and then rounds a value of a record to
    // its neighbour. Against exact ones: what 11 bits and e4m3's 4 bits lose. Matrix units take activations of 11 bits,
    // too, which rounds more of an fp8 record's values to their neighbours.
    let ways = [
        (RecordFormat::F16, Decode::Separate, Prefill::Absorbed),
        (RecordFormat::F16, Decode::Fused, Prefill::Absorbed),
        (RecordFormat::F16, Decode::Separate, Prefill::Materialised),
        (RecordFormat::Fp8, Decode::Separate, Prefill::Absorbed),
    ];
    let mut wrong = Vec::new();
    for device in devices() {
        for (format, decode, prefill) in ways {
            let (records, same, exact) = match (format, device.caps().matrix_units()) {
                (RecordFormat::Fp8, Err(_)) => ("fp8", 1e-6, 2e-3),
                (RecordFormat::Fp8, Ok(_)) => ("fp8", 2e-4, 2e-3),
                (_, Err(_)) => ("f16", 3e-9, 2e-7),
                (_, Ok(_)) => ("f16", 6e-7, 6e-7),
            };
            let model = Model::load(&device, &folder, |_, _| {}).expect("the checkpoint is a model");
            let options =
                Options { context: 64, step_tokens: Some(16), page: 16, format, decode, prefill, ..Options::default() };
            let mut engine = Engine::new(&device, model, &options).expect("room for a layer");
            let id = engine.create(&Sampler::default()).expect("room for a sequence");
            let hidden = block_on(engine.hidden(id, &ids)).expect("a step");
            let what = format!("{format:?} records, {decode:?}, {prefill:?} on {}", device.caps().label());
            hold(&mut wrong, format!("{what}: same records"), nmse(&hidden[1], &golden.get(records)), same);
            hold(&mut wrong, format!("{what}: exact records"), nmse(&hidden[1], &golden.get("exact")), exact);
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

const EXPERTS: usize = 64;
const TOP_K: usize = 6;
const WIDTH: usize = 1408;
/// Shared experts: one MLP as wide as two.
const SHARED: usize = 2;
const MOE_TOKENS: usize = 3;
/// How gates and ups are stored, and downs: both hold the values.
const FORMATS: [WeightFormat; 2] = [WeightFormat::Bf16, WeightFormat::F16];

/// Rows of gate and up in turn, of `WIDTH` neurons from neuron `first` on of two streams.
fn gate_up(numbers: [u32; 2], first: usize) -> Vec<u8> {
    let [gate, up] = numbers.map(|number| stream(number, first * HIDDEN, WIDTH * HIDDEN, 8, 2f32.powi(-5)));
    let rows: Vec<f32> = gate.chunks(HIDDEN).zip(up.chunks(HIDDEN)).flat_map(|(g, u)| [g, u].concat()).collect();
    pack(&rows, 2 * WIDTH, HIDDEN, FORMATS[0])
}

/// An expert's down matrix, `[HIDDEN, WIDTH]`.
fn down(values: &[f32]) -> Vec<u8> {
    pack(values, HIDDEN, WIDTH, FORMATS[1])
}

/// A matrix of `experts` experts, all zero: what nobody is to read need not be drawn.
fn zeros(device: &Device, experts: usize, (rows, columns): (usize, usize), format: WeightFormat) -> Weights {
    let chunks =
        split(experts * rows, format.row_bytes(columns), rows, device.caps().binding_bytes).expect("an expert fits");
    let alloc = |(first_row, rows)| {
        let view = device.alloc((rows * format.row_bytes(columns)) as u64, "experts").expect("room for experts").view();
        WeightChunk { first_row, rows, view }
    };
    let stride = format.row_bytes(columns) / format.bytes();
    Weights { format, rows: experts * rows, columns, stride, chunks: chunks.into_iter().map(alloc).collect() }
}

/// Writes an expert's rows.
fn fill(device: &Device, weights: &Weights, expert: usize, rows: usize, bytes: &[u8]) {
    let first = expert * rows;
    let chunk = weights.chunks.iter().rfind(|chunk| chunk.first_row <= first).expect("the chunks start at 0");
    let offset = (first - chunk.first_row) * weights.format.row_bytes(weights.columns);
    device.write(&chunk.view, offset as u64, bytes).expect("the driver does its part");
}

/// The layer's matrices in host memory: the chosen experts' and the shared ones'.
struct Drawn {
    /// Expert, gate and up, down.
    experts: Vec<(usize, Vec<u8>, Vec<u8>)>,
    router: Vec<u8>,
    x: Vec<f32>,
}

impl Drawn {
    fn new(chosen: &[f64]) -> Drawn {
        let mut chosen: Vec<usize> = chosen.iter().map(|e| *e as usize).collect();
        chosen.sort();
        chosen.dedup();
        let routed = |e: usize| {
            let values = stream(24, e * HIDDEN * WIDTH, HIDDEN * WIDTH, 8, 2f32.powi(-5));
            (e, gate_up([22, 23], e * WIDTH), down(&values))
        };
        let all = stream(27, 0, HIDDEN * SHARED * WIDTH, 8, 2f32.powi(-5));
        let shared = |s: usize| {
            let columns = all.chunks(SHARED * WIDTH).flat_map(|row| &row[s * WIDTH..][..WIDTH]);
            let columns: Vec<f32> = columns.copied().collect();
            (EXPERTS + s, gate_up([25, 26], s * WIDTH), down(&columns))
        };
        let router = stream(21, 0, EXPERTS * HIDDEN, 8, 2f32.powi(-5));
        Drawn {
            experts: chosen.into_iter().map(routed).chain((0..SHARED).map(shared)).collect(),
            router: pack(&router, EXPERTS, HIDDEN, WeightFormat::F32),
            x: stream(20, 0, MOE_TOKENS * HIDDEN, 8, 1.0),
        }
    }
}

/// Logits, routed experts and what comes out, for the first `tokens` tokens.
struct Run {
    logits: Vec<f32>,
    routes: Vec<moe_route::Route>,
    output: Vec<f32>,
}

fn run(device: &Device, drawn: &Drawn, [gate_up, down]: [&Weights; 2], tokens: usize) -> Run {
    let linear = Linear::new(device.caps());
    let rows = |length: usize, count: usize| {
        let view = device.alloc((4 * length * count) as u64, "rows").expect("room for rows").view();
        Activations::rows(view, length as u32)
    };
    let x = Activations::rows(device.upload(&drawn.x[..tokens * HIDDEN], "x").expect("room").view(), HIDDEN as u32);
    let (logits, y) = (rows(EXPERTS, tokens), rows(HIDDEN, tokens));
    let router =
        Weights::upload(device, &drawn.router, (EXPERTS, HIDDEN), WeightFormat::F32, 1, "router").expect("room");
    let mut recording = Recording::new();
    linear.record(&mut recording, Epilogue::Store, &Product::new(&router, &x, &logits, tokens as u32));
    // One token's shared experts are two experts more; those of several are products of their own, before.
    let apart = tokens > 1;
    if apart {
        for expert in EXPERTS..EXPERTS + SHARED {
            let inner = rows(WIDTH, tokens);
            let part = |weights: &Weights, rows: usize| weights.part(expert * rows..(expert + 1) * rows);
            let (up, down) = (part(gate_up, 2 * WIDTH), part(down, HIDDEN));
            linear.record(&mut recording, Epilogue::Swiglu, &Product::new(&up, &x, &inner, tokens as u32));
            let epilogue = if expert == EXPERTS { Epilogue::Store } else { Epilogue::Add };
            linear.record(&mut recording, epilogue, &Product::new(&down, &inner, &y, tokens as u32));
        }
    }
    let route = moe_route::Spec {
        experts: EXPERTS as u32,
        top_k: TOP_K as u32,
        scoring: Scoring::Softmax,
        bias: false,
        groups: None,
        renormalise: false,
        shared: 0,
    };
    let spec = Spec {
        route,
        scale: 1.0,
        experts: EXPERTS as u32,
        shared: SHARED as u32,
        shared_scale: 1.0,
        hidden: HIDDEN as u32,
        width: WIDTH as u32,
        gate_up: FORMATS[0],
        down: FORMATS[1],
        accumulate: apart,
    };
    let layer = MoeLayer::new(&spec, device.caps(), false);
    let sizes = layer.scratch(tokens as u32);
    let scratch: Scratch<View> = sizes.map(|size, name| device.alloc(*size, name).map(|b| b.view())).expect("room");
    let count = (EXPERTS + SHARED) as u32;
    let args = Args {
        logits: &logits,
        bias: None,
        x: &x,
        norm: None,
        y: &y,
        gate_up: Experts { weights: gate_up, count },
        down: Experts { weights: down, count },
        scratch: &scratch,
        tokens: tokens as u32,
    };
    layer.record(&mut recording, &args);
    device.submit(&recording).expect("the driver does its part");
    let views = [logits.view, scratch.routes, y.view];
    let bytes = block_on(device.read(&views)).expect("the device answers");
    let slots = if apart { TOP_K } else { TOP_K + SHARED };
    let values = |i: usize, count: usize| bytemuck::pod_collect_to_vec::<u8, f32>(&bytes[i])[..count].to_vec();
    let routes: Vec<moe_route::Route> = bytemuck::pod_collect_to_vec(&bytes[1]);
    let routes = routes.chunks(slots).take(tokens).flat_map(|row| row[..TOP_K].to_vec()).collect();
    Run { logits: values(0, tokens * EXPERTS), routes, output: values(2, tokens * HIDDEN) }
}

#[test]
fn a_mixture_of_experts_of_deepseek_v2_lite_is_pytorchs_on_cuda() {
    let golden = Golden::open("moe_layer.safetensors");
    let [logits, experts, weights, output] = ["logits", "experts", "weights", "output"].map(|name| golden.get(name));
    let drawn = Drawn::new(&experts);
    let mut wrong = Vec::new();
    for device in devices() {
        let gate_up = zeros(&device, EXPERTS + SHARED, (2 * WIDTH, HIDDEN), FORMATS[0]);
        let down = zeros(&device, EXPERTS + SHARED, (HIDDEN, WIDTH), FORMATS[1]);
        for (expert, up_bytes, down_bytes) in &drawn.experts {
            fill(&device, &gate_up, *expert, 2 * WIDTH, up_bytes);
            fill(&device, &down, *expert, HIDDEN, down_bytes);
        }
        for tokens in [1, MOE_TOKENS] {
            let found = run(&device, &drawn, [&gate_up, &down], tokens);
            let what = |part: &str| format!("{tokens} tokens on {}: {part}", device.caps().label());
            let chosen: Vec<f64> = found.routes.iter().map(|route| f64::from(route.expert)).collect();
            if chosen != experts[..tokens * TOP_K] {
                wrong.push(format!("{}: {chosen:?}, expected {experts:?}", what("experts")));
            }
            let weigh: Vec<f32> = found.routes.iter().map(|route| route.weight).collect();
            // Products of 2,048 terms in f32, in other orders.
            hold(&mut wrong, what("logits"), nmse(&found.logits, &logits[..tokens * EXPERTS]), 1e-11);
            hold(&mut wrong, what("weights"), nmse(&weigh, &weights[..tokens * TOP_K]), 1e-11);
            hold(&mut wrong, what("output"), nmse(&found.output, &output[..tokens * HIDDEN]), 1e-10);
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
