//! Checkpoints on disk: what is read from good ones, and one clear error for each kind of bad one.

use std::path::{Path, PathBuf};

use lamina::model::Config;
use lamina::model::tensors::{ExpertLayout, Tensors};
use lamina::weights::{Checkpoint, Dtype};
use serde_json::{Map, Value, json};

/// A tensor to write: name, dtype, shape, bytes.
type Tensor = (String, &'static str, Vec<usize>, Vec<u8>);

fn tensor(name: &str, dtype: &'static str, shape: &[usize], fill: u8) -> Tensor {
    let each = if dtype == "F32" { 4 } else { 2 };
    (name.into(), dtype, shape.into(), vec![fill; each * shape.iter().product::<usize>()])
}

/// A safetensors file of a header's text and data.
fn file_of(header: &str, data: &[u8]) -> Vec<u8> {
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header.as_bytes());
    file.extend_from_slice(data);
    file
}

/// A safetensors file.
fn file(tensors: &[Tensor]) -> Vec<u8> {
    let (mut header, mut data) = (Map::new(), Vec::new());
    for (name, dtype, shape, bytes) in tensors {
        let end = data.len() + bytes.len();
        let entry = json!({"dtype": dtype, "shape": shape, "data_offsets": [data.len(), end]});
        header.insert(name.clone(), entry);
        data.extend_from_slice(bytes);
    }
    file_of(&Value::Object(header).to_string(), &data)
}

/// An empty folder of this test.
fn folder(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("checkpoints").join(name);
    let _ = std::fs::remove_dir_all(&folder);
    std::fs::create_dir_all(&folder).expect("a folder under target");
    folder
}

fn write(folder: &Path, name: &str, bytes: impl AsRef<[u8]>) {
    std::fs::write(folder.join(name), bytes).expect("a file under target");
}

fn message(folder: &Path) -> String {
    let error = Checkpoint::open(folder).err().expect("no checkpoint");
    assert_eq!(error.exit_code(), 1);
    error.to_string()
}

fn two() -> [Tensor; 2] {
    [tensor("a.weight", "BF16", &[3, 4], 1), tensor("b", "F32", &[2], 2)]
}

#[test]
fn one_file_and_shards_give_the_same_tensors() {
    let (whole, shards) = (folder("whole"), folder("shards"));
    write(&whole, "model.safetensors", file(&two()));
    let [a, b] = two();
    write(&shards, "one.safetensors", file(&[a]));
    write(&shards, "two.safetensors", file(&[b]));
    let map =
        json!({"metadata": {"total_size": 32}, "weight_map": {"a.weight": "one.safetensors", "b": "two.safetensors"}});
    write(&shards, "model.safetensors.index.json", map.to_string());
    for folder in [&whole, &shards] {
        let checkpoint = Checkpoint::open(folder).expect("a checkpoint");
        let names: Vec<&str> = checkpoint.tensors().map(|tensor| tensor.name).collect();
        assert_eq!(names, ["a.weight", "b"]);
        let (a, b) = (checkpoint.get("a.weight").expect("a"), checkpoint.get("b").expect("b"));
        assert_eq!((a.dtype, a.shape, a.bytes().unwrap()), (Dtype::Bf16, &[3, 4][..], &[1; 24][..]));
        assert_eq!((b.dtype, b.shape, b.bytes().unwrap()), (Dtype::F32, &[2][..], &[2; 8][..]));
        checkpoint.release("b");
        assert_eq!(checkpoint.get("b").expect("it is still there").bytes().unwrap(), [2; 8]);
        assert_eq!(checkpoint.again().get("b").expect("and in a copy").bytes().unwrap(), [2; 8]);
        assert!(checkpoint.get("c").is_none());
    }
}

#[test]
fn a_file_cut_at_any_byte_is_an_error_that_names_it() {
    let folder = folder("cut");
    let whole = file(&two());
    for length in 0..whole.len() {
        write(&folder, "model.safetensors", &whole[..length]);
        let message = message(&folder);
        assert!(message.contains("model.safetensors: ") && message.contains("found"), "{length}: {message}");
    }
    write(&folder, "model.safetensors", [whole, vec![0]].concat());
    assert!(message(&folder).contains("the file's length"), "{}", message(&folder));
}

#[test]
fn no_mutation_of_a_header_panics() {
    let folder = folder("mutated");
    let (whole, mut random) = (file(&two()), fastrand::Rng::with_seed(3));
    let header = whole.len() - 32;
    // LAMINA_FUZZ_SECONDS makes it longer.
    let seconds = std::env::var("LAMINA_FUZZ_SECONDS").map_or(0, |text| text.parse().expect("seconds"));
    let start = std::time::Instant::now();
    for round in (0..).take_while(|round| *round < 2000 || start.elapsed().as_secs() < seconds) {
        let mut bytes = whole.clone();
        for _ in 0..random.usize(1..4) {
            let at = random.usize(..header);
            match random.u8(..3) {
                0 => bytes[at] = random.u8(..),
                1 => bytes[at] = *random.choice(b"0123456789-.e\"[]{},:").expect("not empty"),
                _ => bytes[8 + at % (header - 8)] = random.u8(b' '..b'~'),
            }
        }
        write(&folder, "model.safetensors", &bytes);
        // Right or refused; what is accepted can be read to its end.
        if let Ok(checkpoint) = Checkpoint::open(&folder) {
            let read: usize = checkpoint.tensors().map(|tensor| tensor.bytes().unwrap().len()).sum();
            assert_eq!(read, 32, "round {round}");
        }
    }
}

#[test]
fn a_header_that_lies_is_an_error_that_names_the_tensor() {
    let folder = folder("lies");
    let entry = |dtype: &str, shape: &str, begin: u64, end: u64| {
        format!(r#"{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{begin},{end}]}}"#)
    };
    let one = |entry: String| format!(r#"{{"t":{entry}}}"#);
    let huge = u64::MAX;
    for (header, parts) in [
        (one(entry("F32", "[2]", 0, 9)), ["tensor 't'", "[0, 9]"]),
        (one(entry("F32", "[2]", 8, 0)), ["tensor 't'", "[8, 0]"]),
        (one(entry("F32", "[2]", 0, huge)), ["tensor 't'", "lies"]),
        (one(entry("U8", "[18446744073709551615]", 0, huge)), ["tensor 't'", "lies"]),
        (one(entry("F32", "[3]", 0, 8)), ["expected 12 bytes", "found 8 bytes"]),
        (one(entry("F32", "[4294967296,4294967296]", 0, 8)), ["tensor 't'", "whose size can be counted"]),
        (one(entry("F32", "[-2]", 0, 8)), ["tensor 't'", "[-2]"]),
        (one(entry("F32", "[2.0]", 0, 8)), ["tensor 't'", "[2.0]"]),
        (one(entry("F32", "\"2\"", 0, 8)), ["tensor 't'", "a shape"]),
        (one(entry("Q4", "[2]", 0, 8)), ["tensor 't'", "found \"Q4\""]),
        (one(r#"{"dtype":"F32","shape":[2]}"#.into()), ["data_offsets", "found none"]),
        (one("7".into()), ["tensor 't'", "dtype"]),
        (format!(r#"{{"t":{0},"t":{0}}}"#, entry("F32", "[2]", 0, 8)), ["tensor 't'", "found two"]),
        (format!(r#"{{"t":{0},"u":{0}}}"#, entry("F32", "[2]", 0, 8)), ["a gap or an overlap", "tensor"]),
        (one(entry("F32", "[1]", 4, 8)), ["tensor 't'", "a gap or an overlap"]),
        (one(entry("F32", "[1]", 0, 4)), ["the file's length", "more bytes"]),
        ("[1]".into(), ["the header", "a JSON object"]),
        ("{".into(), ["the header", "a JSON object"]),
    ] {
        write(&folder, "model.safetensors", file_of(&header, &[0; 8]));
        let message = message(&folder);
        assert!(message.contains("lies/model.safetensors: "), "{message}");
        parts.iter().for_each(|part| assert!(message.contains(part), "{part}: {message}"));
    }
    let mut broken = file(&two());
    broken[12] = 0xff;
    write(&folder, "model.safetensors", broken);
    assert!(message(&folder).contains("UTF-8"), "{}", message(&folder));
    write(&folder, "model.safetensors", [huge.to_le_bytes(), [b'{'; 8]].concat());
    assert!(message(&folder).contains("a length of 18446744073709551615"), "{}", message(&folder));
}

#[test]
fn an_index_that_does_not_fit_its_shards_is_an_error_that_names_both() {
    let folder = folder("index");
    let [a, b] = two();
    write(&folder, "one.safetensors", file(std::slice::from_ref(&a)));
    write(&folder, "both.safetensors", file(&[a, b]));
    for (index, parts) in [
        (
            json!({"weight_map": {"a.weight": "gone.safetensors"}}),
            ["tensor 'a.weight'", "gone.safetensors, found no such"],
        ),
        (json!({"weight_map": {"a.weight": "one.safetensors", "c": "one.safetensors"}}), ["tensor 'c'", "in any file"]),
        (json!({"weight_map": {"a.weight": "both.safetensors"}}), ["tensor 'b'", "no such tensor in the index"]),
        (
            json!({"weight_map": {"a.weight": "one.safetensors", "b": "both.safetensors"}}),
            ["tensor 'a.weight'", "one in"],
        ),
        (json!({"weight_map": {"a.weight": "../one.safetensors"}}), ["tensor 'a.weight'", "a file in this folder"]),
        (json!({"weight_map": {"a.weight": "/etc/passwd"}}), ["tensor 'a.weight'", "a file in this folder"]),
        (json!({"weight_map": {"a.weight": 3}}), ["tensor 'a.weight'", "found 3"]),
        (json!({"weight_map": {}}), ["weight_map", "found none"]),
        (json!({"weight_map": []}), ["weight_map", "another kind"]),
        (json!({"metadata": {}}), ["weight_map", "found none"]),
        (json!("no object"), ["weight_map", "found none"]),
    ] {
        write(&folder, "model.safetensors.index.json", index.to_string());
        let message = message(&folder);
        parts.iter().for_each(|part| assert!(message.contains(part), "{part}: {message}"));
    }
    write(&folder, "model.safetensors.index.json", "{\"weight_map\": ");
    assert!(message(&folder).contains("a JSON object, found a fault"), "{}", message(&folder));
}

#[test]
fn a_folder_without_a_checkpoint_says_what_was_looked_for() {
    let folder = folder("none");
    assert!(message(&folder).contains("model.safetensors.index.json, found nothing in it"), "{}", message(&folder));
    write(&folder, "pytorch_model.bin", "x");
    assert!(message(&folder).contains("found pytorch_model.bin"), "{}", message(&folder));
    let gone = folder.join("gone");
    assert!(message(&gone).contains("gone: "), "{}", message(&gone));
}

#[test]
fn a_model_s_tensors_are_missed_refused_and_skipped_by_name() {
    let folder = folder("model");
    let text = std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/configs/axk1.json"));
    let config = Config::parse(&text.expect("a file of this project"), Path::new("config.json")).expect("a model");
    let all = Tensors::of(&config, ExpertLayout::Each);
    let whole: Vec<Tensor> = all.all().iter().map(|t| tensor(&t.name, "BF16", &t.shape, 0)).collect();
    let find = |tensors: &[Tensor]| {
        write(&folder, "model.safetensors", file(tensors));
        let checkpoint = Checkpoint::open(&folder).expect("a checkpoint");
        Tensors::find(&config, &checkpoint).map(|(_, skipped)| skipped)
    };
    assert_eq!(find(&whole).expect("all there"), []);

    let name = "model.layers.1.mlp.experts.7.down_proj.weight";
    let without: Vec<Tensor> = whole.iter().filter(|tensor| tensor.0 != name).cloned().collect();
    let message = find(&without).expect_err("one is missing").to_string();
    assert!(message.ends_with(&format!("tensor '{name}': expected shape [64, 32], found no such tensor")), "{message}");

    let with = |tensor: Tensor| [without.clone(), vec![tensor]].concat();
    let message = find(&with(tensor(name, "BF16", &[32, 64], 0))).expect_err("turned").to_string();
    assert!(message.ends_with("expected shape [64, 32], found shape [32, 64]"), "{message}");
    let message = find(&with(tensor(name, "I16", &[64, 32], 0))).expect_err("whole numbers").to_string();
    assert!(message.contains(name) && message.ends_with("I16 weights: not supported"), "{message}");
    let more = |name: &str| [whole.clone(), vec![tensor(name, "BF16", &[64], 0)]].concat();
    for stranger in ["model.layers.3.enorm.weight", "model.layers.1.self_attn.q_proj.bias", "lm_head.bias", "x"] {
        let message = find(&more(stranger)).expect_err(stranger).to_string();
        assert!(message.contains(&format!("tensor '{stranger}': expected no such tensor")), "{message}");
    }
    // A.X-K1's published checkpoints have no bias, and a norm that its dense layers do not use.
    let known = "model.layers.0.post_mlp_layernorm.weight";
    let mut published = more(known);
    published.retain(|tensor| !tensor.0.ends_with("e_score_correction_bias"));
    let skipped = find(&published).expect("as published");
    assert_eq!(skipped.iter().map(|s| s.name.as_str()).collect::<Vec<_>>(), [known]);
    let buffer = find(&more("model.layers.0.self_attn.rotary_emb.inv_freq")).expect("a buffer");
    assert_eq!(buffer.len(), 1);
}
