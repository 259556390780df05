//! Broken small files: what a mutation makes of a configuration, an index or a tokenizer is right or refused, and
//! never a panic. LAMINA_FUZZ_SECONDS makes each of these tests that much longer.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::time::Instant;

use fastrand::Rng;
use lamina::engine::{Engine, Options};
use lamina::gpu::{self, Device};
use lamina::kernels::sample::Sampler;
use lamina::model::generation::Generation;
use lamina::model::{Config, Model};
use lamina::text::{ChatOptions, Message, Text};
use lamina::weights::Checkpoint;
use pollster::block_on;
use serde_json::{Map, Value, json};

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

fn folder(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("mutations").join(name);
    let _ = std::fs::remove_dir_all(&folder);
    std::fs::create_dir_all(&folder).expect("a folder under target");
    folder
}

fn read(path: &str) -> Value {
    serde_json::from_slice(&std::fs::read(Path::new(ROOT).join(path)).expect(path)).expect("JSON")
}

/// A value somewhere in the tree.
fn somewhere<'a>(value: &'a mut Value, random: &mut Rng) -> &'a mut Value {
    let inner = match value {
        Value::Object(map) => map.len(),
        Value::Array(list) if random.u8(..4) > 0 => list.len(),
        _ => 0,
    };
    if inner == 0 {
        return value;
    }
    let at = random.usize(..inner);
    match value {
        Value::Object(map) => somewhere(map.values_mut().nth(at).expect("it has so many"), random),
        Value::Array(list) => somewhere(&mut list[at], random),
        leaf => leaf,
    }
}

/// The text with a few things wrong: values of another kind or size, fields gone, bytes changed.
fn mutated(whole: &Value, random: &mut Rng) -> Vec<u8> {
    let mut value = whole.clone();
    for _ in 0..random.usize(1..4) {
        let place = somewhere(&mut value, random);
        let numbers = [0.0, -1.0, 0.5, 1e-30, 1e30, 1e308, 3.0, 64.0, 65_536.0, 4_294_967_296.0];
        *place = match random.u8(..9) {
            0 => Value::Null,
            1 => json!(random.bool()),
            2 => json!(""),
            3 => json!("\u{1F600}x"),
            4 => json!([]),
            5 => json!({}),
            6 => json!(u64::MAX - random.u64(..2)),
            7 => place.as_f64().map_or(json!([place.clone()]), |n| json!((n as i64).saturating_add(random.i64(-2..3)))),
            _ => json!(random.choice(numbers).expect("not empty")),
        };
    }
    let mut bytes = value.to_string().into_bytes();
    if random.u8(..4) == 0 {
        for _ in 0..random.usize(1..3) {
            let at = random.usize(..bytes.len());
            match random.u8(..4) {
                0 => bytes[at] = random.u8(..),
                1 => bytes[at] = *random.choice(b"0123456789-.e\"[]{},:\\").expect("not empty"),
                2 => drop(bytes.remove(at)),
                _ => bytes.truncate(at + 1),
            }
        }
    }
    bytes
}

/// Runs `check` on mutations of a file: at least `rounds` of them. It says whether a mutation was accepted.
fn survive(name: &str, whole: &Value, rounds: u64, check: impl Fn(&[u8]) -> bool) {
    let seconds = std::env::var("LAMINA_FUZZ_SECONDS").map_or(0, |text| text.parse().expect("seconds"));
    let (mut random, start) = (Rng::with_seed(11), Instant::now());
    let (mut round, mut accepted) = (0, 0);
    while round < rounds || start.elapsed().as_secs() < seconds {
        let bytes = mutated(whole, &mut random);
        let text = String::from_utf8_lossy(&bytes);
        match catch_unwind(AssertUnwindSafe(|| check(&bytes))) {
            Ok(fits) => accepted += u64::from(fits),
            Err(_) => panic!("{name}, round {round}: {}", text.chars().take(4000).collect::<String>()),
        }
        round += 1;
    }
    println!("{name}: {round} mutations, {accepted} accepted");
    // Where nothing is accepted, or all is, nothing is tried.
    assert!(accepted > 0 && accepted < round, "{name}: {accepted} of {round} accepted");
}

#[test]
fn a_mutated_generation_config_is_right_or_refused() {
    let config = read("tests/data/configs/deepseek_v3.json").to_string();
    let config = Config::parse(config.as_bytes(), Path::new("config.json")).expect("a model");
    let whole = json!({
        "bos_token_id": 1, "eos_token_id": [2, 7], "do_sample": true, "temperature": 0.6, "top_p": 0.95,
        "top_k": 50, "min_p": 0.1, "repetition_penalty": 1.1, "transformers_version": "4.46.3"
    });
    survive("generation_config.json", &whole, 3000, |bytes| {
        let read = Generation::parse(bytes, Path::new("generation_config.json"), &config, Some(3));
        read.is_ok_and(|read| read.eos.iter().all(|id| *id < config.vocab) && !read.eos.is_empty())
    });
}

#[test]
fn a_mutated_index_is_right_or_refused() {
    let folder = folder("index");
    let part = |name: &str| {
        let header = format!(r#"{{"{name}":{{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}}}"#);
        [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &[1; 8]].concat()
    };
    for (name, file) in [("a", "one.safetensors"), ("b", "two.safetensors")] {
        std::fs::write(folder.join(file), part(name)).expect("a file under target");
    }
    let whole = json!({"metadata": {"total_size": 16}, "weight_map": {"a": "one.safetensors", "b": "two.safetensors"}});
    survive("model.safetensors.index.json", &whole, 1000, |bytes| {
        std::fs::write(folder.join("model.safetensors.index.json"), bytes).expect("a file under target");
        Checkpoint::open(&folder)
            .is_ok_and(|checkpoint| checkpoint.tensors().all(|tensor| tensor.bytes().is_ok_and(|b| b.len() == 8)))
    });
}

/// A folder with the shipped model's tokenizer and a chat template; `tried` is the file that is mutated.
fn texts(tried: &str, whole: &Value, rounds: u64) {
    let (folder, others) = (folder(tried), ["tokenizer.json", "tokenizer_config.json"]);
    for name in others {
        std::fs::copy(Path::new(ROOT).join("demos/model").join(name), folder.join(name)).expect("it is shipped");
    }
    survive(tried, whole, rounds, |bytes| {
        std::fs::write(folder.join(tried), bytes).expect("a file under target");
        let Ok(text) = Text::load(&folder) else { return false };
        let _ = text.check(4096);
        let _ = text.chat(&[Message::system("Be brief."), Message::user("Hi")], &ChatOptions::default());
        let Ok(ids) = text.encode("Once upon a time\u{1F600}, \n\n 12") else { return true };
        let Ok(mut stream) = text.stream(&ids, &["stop".into()]) else { return true };
        let _ = ids.iter().chain(&[0, 4095, u32::MAX]).try_for_each(|id| stream.push(*id).map(drop));
        let _ = stream.finish();
        true
    });
}

#[test]
fn a_mutated_tokenizer_is_right_or_refused() {
    // Few of its pieces and merges, so that mutations meet what is not one of them.
    let mut whole = read("demos/model/tokenizer.json");
    let model = whole["model"].as_object_mut().expect("a model");
    if let Some(Value::Array(merges)) = model.get_mut("merges") {
        merges.clear();
    }
    if let Some(Value::Object(vocab)) = model.get_mut("vocab") {
        let short = |(piece, _): &(&String, &Value)| piece.chars().count() <= 1 || piece.starts_with('<');
        *vocab = vocab.iter().filter(short).map(|(p, id)| (p.clone(), id.clone())).collect::<Map<_, _>>();
    }
    texts("tokenizer.json", &whole, 300);
}

#[test]
fn a_mutated_tokenizer_config_is_right_or_refused() {
    let mut whole = read("demos/model/tokenizer_config.json");
    whole["chat_template"] = json!(
        "{% for m in messages %}{{ bos_token + m['role'] + ': ' + m.content | trim }}{% if loop.last %}{{ eos_token }}\
         {% endif %}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    );
    whole["added_tokens_decoder"] = json!({"0": {"content": "<s>", "special": true}});
    texts("tokenizer_config.json", &whole, 300);
}

#[test]
fn a_model_with_a_mutated_configuration_runs_or_is_refused() {
    let device = Device::cpu(&gpu::Options::default());
    for (name, rounds) in [("deepseek_v3", 60), ("minicpm3", 30), ("longcat_flash", 30)] {
        let folder = folder(name);
        let from = Path::new(ROOT).join("tests/data/models").join(name);
        std::fs::copy(from.join("model.safetensors"), folder.join("model.safetensors")).expect("a fixture");
        let whole = read(&format!("tests/data/models/{name}/config.json"));
        survive(name, &whole, rounds, |bytes| {
            std::fs::write(folder.join("config.json"), bytes).expect("a file under target");
            let Ok(model) = Model::load(&device, &folder, |_, _| {}) else { return false };
            let options = Options { context: 48, step_tokens: Some(24), ..Options::default() };
            let Ok(mut engine) = Engine::new(&device, model, &options) else { return false };
            let id = engine.create(&Sampler::default()).expect("the first sequence");
            // Whatever the logits are: no numbers are an answer too.
            let _ = block_on(engine.logits(id, &[1, 5, 9, 250, 3, 7, 8]));
            true
        });
    }
}
