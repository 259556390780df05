//! `lamina run`, `chat` and `logits` as a user meets them, with the model that is shipped, on the `cpu` device.

use std::io::Write;
use std::process::{Command, Output, Stdio};

use serde_json::Value;

/// `lamina --adapter cpu` in an empty folder, with a cache of its own.
fn lamina(name: &str, args: &[&str]) -> Command {
    let folder = std::env::temp_dir().join(format!("lamina-text-cli-{name}-{}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("a folder");
    let mut command = Command::new(env!("CARGO_BIN_EXE_lamina"));
    command.args(["--adapter", "cpu"]).args(args).current_dir(&folder).env("XDG_CACHE_HOME", &folder);
    for name in ["LAMINA_ADAPTER", "LAMINA_MODEL", "WGPU_BACKEND", "RUST_LOG"] {
        command.env_remove(name);
    }
    command
}

fn run(name: &str, args: &[&str]) -> Output {
    lamina(name, args).output().expect("lamina starts")
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).expect("UTF-8")
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).expect("UTF-8")
}

fn json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{e}: {}\n{}", stdout(output), stderr(output)))
}

#[test]
fn run_finds_the_shipped_model_from_an_empty_folder_and_says_which_it_uses() {
    let output = run("found", &["run", "Once upon a time", "--max-tokens", "12"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert!(stdout(&output).split_whitespace().count() > 4, "{}", stdout(&output));
    let said = stderr(&output);
    for part in ["model: the small model of stories", "12 of text", "decode", "CPU twins"] {
        assert!(said.contains(part), "{part}: {said}");
    }
}

#[test]
fn the_same_seed_gives_the_same_text_and_another_one_another() {
    let drawn = |seed: &str| {
        let args = ["run", "The old fox", "--max-tokens", "16", "--temperature", "1.5", "--seed", seed];
        let output = run(&format!("seed-{seed}"), &args);
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
        stdout(&output)
    };
    assert_eq!(drawn("1"), drawn("1"));
    assert_ne!(drawn("1"), drawn("2"));
}

#[test]
fn json_has_the_documented_fields_and_agrees_with_itself() {
    let args = ["run", "--prompt-tokens", "5,6,7", "--max-tokens", "4", "--ignore-eos", "--temperature", "0", "--json"];
    let report = json(&run("json", &args));
    let mut keys: Vec<&str> = report.as_object().expect("an object").keys().map(String::as_str).collect();
    keys.sort_unstable();
    assert_eq!(keys, ["device", "finish_reason", "logprobs", "prompt_tokens", "text", "timings", "tokens"]);
    assert_eq!(report["prompt_tokens"], serde_json::json!([5, 6, 7]));
    assert_eq!(report["tokens"].as_array().map(Vec::len), Some(4));
    assert_eq!(report["device"]["type"], "cpu");
    assert_eq!(report["finish_reason"], "length", "--max-tokens");
    for (token, logprob) in report["tokens"].as_array().unwrap().iter().zip(report["logprobs"].as_array().unwrap()) {
        assert_eq!(&logprob["top"][0][0], token, "greedy takes the likeliest");
        assert_eq!(logprob["top"][0][1], logprob["logprob"]);
        assert_eq!(logprob["top"].as_array().map(Vec::len), Some(5));
        assert!(logprob["logprob"].as_f64().is_some_and(|p| p <= 0.0));
    }
}

#[test]
fn a_stop_string_ends_the_text_before_it() {
    let whole = stdout(&run("whole", &["run", "Once upon a time", "--max-tokens", "40"])); // the seed is the same
    let stop = whole.split_whitespace().nth(8).expect("some words");
    let args = ["run", "Once upon a time", "--max-tokens", "40", "--stop", stop];
    let stopped = stdout(&run("stopped", &args));
    assert_eq!(stopped.trim_end(), whole[..whole.find(stop).unwrap()].trim_end());
    let report = json(&run("stopped-json", &[&args[..], &["--json"]].concat()));
    assert_eq!(report["finish_reason"], "stop");
}

#[test]
fn a_text_that_the_context_cuts_off_says_so() {
    let full = "the context of 16 tokens is full (--ctx)";
    let args = ["run", "--prompt-tokens", "5,6,7", "--ctx", "16", "--max-tokens", "64", "--ignore-eos"];
    let output = run("full", &args);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert!(stderr(&output).contains(full), "{}", stderr(&output));
    let report = json(&run("full-json", &[&args[..], &["--json"]].concat()));
    assert_eq!((&report["finish_reason"], report["tokens"].as_array().map(Vec::len)), (&"length".into(), Some(14)));
    let within = ["run", "--prompt-tokens", "5,6,7", "--ctx", "16", "--max-tokens", "13", "--ignore-eos"];
    assert!(!stderr(&run("within", &within)).contains("is full"), "all tokens that were asked for");
}

/// Sends the signal of Ctrl-C once the first answer is there and `chat` waits for a line.
#[cfg(unix)]
#[test]
fn ctrl_c_between_answers_ends_the_conversation() {
    use std::io::{BufRead, BufReader};
    use std::time::{Duration, Instant};
    let mut command = lamina("interrupted", &["chat", "--max-tokens", "2", "--temperature", "0"]);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("it starts");
    let mut input = child.stdin.take().expect("a pipe");
    input.write_all(b"Once upon a time\n").expect("it reads");
    let mut answer = String::new();
    BufReader::new(child.stdout.take().expect("a pipe")).read_line(&mut answer).expect("it answers");
    std::thread::sleep(Duration::from_millis(200)); // it is behind the answer's end
    let sent = Command::new("kill").args(["-INT", &child.id().to_string()]).status().expect("there is kill");
    assert!(sent.success() && !answer.trim().is_empty());
    let deadline = Instant::now() + Duration::from_secs(60);
    let ended = loop {
        match child.try_wait().expect("it can be asked") {
            Some(status) => break status.code(),
            None if Instant::now() > deadline => {
                child.kill().expect("it can be ended");
                panic!("it waits for a line after Ctrl-C");
            }
            None => std::thread::sleep(Duration::from_millis(20)),
        }
    };
    drop(input);
    assert_eq!(ended, Some(130));
}

#[test]
fn logits_are_written_for_every_position() {
    let out = std::env::temp_dir().join(format!("lamina-logits-{}.safetensors", std::process::id()));
    let args = ["logits", "--prompt-tokens", "5,6,7,8,9", "--out", out.to_str().unwrap()];
    let output = run("logits", &args);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let bytes = std::fs::read(&out).expect("it was written");
    let tensors = safetensors::SafeTensors::deserialize(&bytes).expect("a safetensors file");
    let logits = tensors.tensor("logits").expect("its one tensor");
    assert_eq!((logits.shape(), logits.dtype()), ([5, 4096].as_slice(), safetensors::Dtype::F32));
    std::fs::remove_file(out).expect("it is ours");
}

#[test]
fn what_cannot_be_meant_exits_with_2_and_names_it() {
    let cases: [(&[&str], &str); 12] = [
        (&["run"], "PROMPT"),
        (&["run", "x", "--temperature", "-1"], "--temperature"),
        (&["run", "x", "--top-p", "1.5"], "--top-p"),
        (&["run", "--prompt-tokens", "1,4096"], "4096"),
        (&["run", "--prompt-tokens", "1,x"], "'x'"),
        (&["run", "x", "--ctx", "99999"], "--ctx"),
        (&["run", "x", "--page", "17"], "[16, 32, 64, 128]"),
        (&["run", "x", "--page", "0"], "--page"),
        (&["run", "x", "--stop", ""], "--stop"),
        (&["run", "--prompt-tokens", "1,2,3,4,5", "--ctx", "4"], "--ctx: expected at least the 5 tokens"),
        (&["logits", "--prompt-tokens", "1,2,3,4,5", "--ctx", "4", "--out", "none"], "--ctx"),
        (&["run", "x", "--reference-until", "layers.99"], "layers.99"),
    ];
    for (args, part) in cases {
        let output = run("wrong", args);
        assert_eq!(output.status.code(), Some(2), "{args:?}: {}", stderr(&output));
        assert!(stderr(&output).contains(part) && output.stdout.is_empty(), "{args:?}: {}", stderr(&output));
    }
}

#[test]
fn files_that_are_missing_and_memory_that_is_short_exit_with_1_and_name_it() {
    for (args, part) in [
        (&["run", "x", "--model", "/nowhere/at/all"][..], "/nowhere/at/all"),
        (&["run", "x", "--memory", "1MiB"], "of 1.0 MiB"),
    ] {
        let mut command = lamina("missing", args);
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("it starts");
        let _ = child.stdin.take().expect("a pipe").write_all(b"Hello\n");
        let output = child.wait_with_output().expect("it ends");
        assert_eq!(output.status.code(), Some(1), "{args:?}: {}", stderr(&output));
        assert!(stderr(&output).contains(part), "{args:?}: {}", stderr(&output));
    }
}

#[test]
fn a_conversation_with_the_shipped_model_is_one_story() {
    let mut command = lamina("chat", &["chat", "--max-tokens", "8", "--temperature", "0"]);
    let mut child =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("it starts");
    let lines = "There was a little fox who could not sleep.\nOne night she met an owl.\n";
    child.stdin.take().expect("a pipe").write_all(lines.as_bytes()).expect("it reads");
    let output = child.wait_with_output().expect("it ends");
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let said = stdout(&output);
    let answers: Vec<&str> = said.lines().filter(|line| !line.trim().is_empty()).collect();
    assert_eq!(answers.len(), 2, "{said:?}");
    // The second answer is what follows the whole story so far.
    let story = lines.replacen('\n', &format!(" {} ", answers[0].trim()), 1);
    let prompt = story.trim();
    let output = run("chat-run", &["run", prompt, "--max-tokens", "8", "--temperature", "0"]);
    assert_eq!(stdout(&output).trim(), answers[1].trim(), "{prompt:?}: {}", stderr(&output));
}

/// The README shows what a newcomer sees: so it is.
#[test]
fn the_readme_s_session_is_what_the_model_says() {
    let readme = include_str!("../README.md");
    let (_, session) = readme.split_once("$ lamina run \"Once upon a time\"").expect("the session runs the model");
    let shown = session.lines().skip(1).take_while(|line| !line.starts_with("```"));
    let shown = shown.filter(|line| !line.starts_with("model: ")).collect::<Vec<_>>().join("\n");
    let output = run("readme", &["run", "Once upon a time", "--max-tokens", "12"]);
    let said = stdout(&output);
    let said = said.trim();
    assert!(said.len() > 20 && shown.trim().starts_with(said), "README: {shown:?}, found {said:?}");
}

#[test]
fn a_prompt_that_does_not_fit_the_context_is_refused() {
    let ids = vec!["7"; 40].join(",");
    let output = run("long", &["run", "--prompt-tokens", &ids, "--ctx", "16"]);
    assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
    assert!(
        stderr(&output).contains("--ctx: expected at least the 40 tokens that are given, found 16"),
        "{}",
        stderr(&output)
    );
}
