//! What is written, and what stays as it was.

use std::path::{Path, PathBuf};

use crate::{lamina, run, stderr};

const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/models/deepseek_v3");

/// An empty folder under target.
fn folder(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("files").join(name);
    let _ = std::fs::remove_dir_all(&folder);
    std::fs::create_dir_all(&folder).expect("a folder under target");
    folder
}

fn logits(model: &Path, out: &Path) -> (Option<i32>, String) {
    let (model, out) = (model.to_str().expect("UTF-8"), out.to_str().expect("UTF-8"));
    let args = ["--adapter", "cpu", "logits", "--model", model, "--prompt-tokens", "1,2,3", "--out", out];
    let output = run(&args);
    (output.status.code(), stderr(&output))
}

#[test]
fn logits_that_are_no_numbers_are_not_written() {
    let (model, out) = (folder("broken"), folder("broken out").join("logits.safetensors"));
    std::fs::copy(Path::new(MODEL).join("config.json"), model.join("config.json")).expect("the fixture is there");
    let mut bytes = std::fs::read(Path::new(MODEL).join("model.safetensors")).expect("the fixture is there");
    let tensors = safetensors::SafeTensors::deserialize(&bytes).expect("it is a safetensors file");
    let head = tensors.tensor("lm_head.weight").expect("it has a head").data();
    let at = head.as_ptr() as usize - bytes.as_ptr() as usize;
    bytes[at..at + 2].copy_from_slice(&[0xc0, 0x7f]);
    std::fs::write(model.join("model.safetensors"), bytes).expect("a file under target");
    let (code, text) = logits(&model, &out);
    assert_eq!(code, Some(1), "{text}");
    assert!(text.contains("the logits at position 0 are not finite numbers"), "{text}");
    assert!(!out.exists());
}

#[test]
fn a_model_s_own_files_are_not_written_over() {
    let model = folder("own");
    for name in ["config.json", "model.safetensors"] {
        std::fs::copy(Path::new(MODEL).join(name), model.join(name)).expect("the fixture is there");
    }
    let before = std::fs::read(model.join("model.safetensors")).expect("it was copied");
    let (code, text) = logits(&model, &model.join("model.safetensors"));
    assert_eq!(code, Some(2), "{text}");
    assert!(text.contains("--out: expected a new file, or one outside the model's folder"), "{text}");
    assert_eq!(std::fs::read(model.join("model.safetensors")).expect("it is there"), before);
    assert_eq!(logits(&model, &model.join("new.safetensors")).0, Some(0));
}

#[test]
fn a_file_is_replaced_whole_and_nothing_is_left_beside_it() {
    let out = folder("whole");
    std::fs::write(out.join("logits.safetensors"), "older").expect("a file under target");
    assert_eq!(logits(Path::new(MODEL), &out.join("logits.safetensors")).0, Some(0));
    let bytes = std::fs::read(out.join("logits.safetensors")).expect("it was written");
    assert!(safetensors::SafeTensors::deserialize(&bytes).is_ok());
    assert_eq!(std::fs::read_dir(&out).expect("a folder").count(), 1);
    let (code, text) = logits(Path::new(MODEL), &out.join("none").join("logits.safetensors"));
    assert_eq!(code, Some(1), "{text}");
    assert!(text.contains("none/logits.safetensors: "), "{text}");
}

#[test]
fn a_stop_text_without_a_tokenizer_is_refused() {
    let args = ["--adapter", "cpu", "run", "--model", MODEL, "--prompt-tokens", "1,2", "--stop", "x"];
    let output = run(&args);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("--stop: expected a model with a tokenizer"), "{}", stderr(&output));
}

/// A device that takes nothing, for stderr.
#[cfg(target_os = "linux")]
#[test]
fn an_answer_is_given_where_nobody_reads_what_is_said_beside_it() {
    let full = || std::fs::OpenOptions::new().write(true).open("/dev/full").expect("Linux has it");
    let args = ["--adapter", "cpu", "run", "--model", MODEL, "--prompt-tokens", "1,2", "--max-tokens", "2", "--json"];
    let output = lamina(&args).stderr(full()).output().expect("lamina starts");
    assert_eq!(output.status.code(), Some(0));
    assert!(String::from_utf8_lossy(&output.stdout).contains("\"tokens\""));
    let failed = lamina(&["plan", "/nonexistent"]).stderr(full()).status().expect("lamina starts");
    assert_eq!(failed.code(), Some(1), "no panic");
    let warned = lamina(&["info"]).env("WGPU_BACKEND", "nonsense").stderr(full()).output().expect("lamina starts");
    assert_eq!(warned.status.code(), Some(0), "no panic of the log");
}
