//! `lamina bench tune`: what it finds is kept, told and taken.

use serde_json::Value;

use super::{BENCH, json, keys, lamina, stderr, stdout};

#[test]
fn bench_tune_keeps_the_fastest_variants_for_the_adapter_until_they_are_forgotten() {
    let folder = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join("tuned");
    // What an earlier run may have left.
    let _ = std::fs::remove_dir_all(&folder);
    let lavapipe = |args: &[&str]| {
        let mut command = lamina(args);
        command.env("LAMINA_ADAPTER", "vulkan:llvmpipe").env("LAMINA_CACHE", &folder).output().expect("lamina starts")
    };
    let appends = || {
        let output = lavapipe(&["info", "--json"]);
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
        let kernels = json(&output)["kernels"].as_array().expect("a list").clone();
        let appends = kernels.iter().find(|kernel| kernel["kernel"] == "mla_append").expect("a kernel");
        let choices = appends["choices"].as_array().expect("a list").clone();
        let measured = |choice: &&Value| choice["why"].as_str().expect("text").contains("lamina bench tune");
        (choices.iter().find(measured).cloned(), stderr(&output))
    };

    let output = lavapipe(&["bench", "tune", "mla_append", "--mib", "2", "--json"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let bench = json(&output);
    let mut known = [&BENCH[..], &["failed", "file", "skipped", "tuned"]].concat();
    known.sort_unstable();
    assert_eq!(keys(&bench), known);
    let tuned = bench["tuned"].as_array().expect("a list");
    let classes: Vec<&Value> = tuned.iter().map(|tuned| &tuned["class"]).collect();
    assert_eq!(classes, ["records of F16", "records of Fp8"], "{bench}");
    assert_eq!(keys(&tuned[0]), ["class", "date", "kernel", "shares", "untuned", "variant"]);
    assert_eq!((&tuned[0]["kernel"], &tuned[0]["untuned"]), (&"mla_append".into(), &"subgroup".into()));
    let taken = appends().0.expect("info says what was measured");
    let format =
        |of: &Value| ["F16", "Fp8"].into_iter().find(|name| of.as_str().is_some_and(|text| text.contains(name)));
    let own = tuned.iter().find(|tuned| format(&tuned["class"]) == format(&taken["spec"])).expect("of its class");
    assert_eq!(taken["variant"], own["variant"], "{taken} of {bench}");

    // Whatever won here, the file decides.
    let file = bench["file"].as_str().expect("a path");
    let whole = std::fs::read_to_string(file).expect("the file is there");
    for variant in ["portable", "subgroup"] {
        let mut kept: Value = serde_json::from_str(&whole).expect("JSON");
        (0..2).for_each(|class| kept["tuned"][class]["variant"] = variant.into());
        std::fs::write(file, kept.to_string()).expect("it can be written");
        assert_eq!(appends().0.expect("measured")["variant"], variant);
    }
    std::fs::write(file, &whole[..whole.len() / 2]).expect("it can be written");
    let (taken, warning) = appends();
    assert!(taken.is_none() && warning.contains(file) && warning.contains("ignored"), "{taken:?} {warning}");

    let forget = || stdout(&lavapipe(&["bench", "tune", "--forget"]));
    assert_eq!([forget(), forget()], [format!("removed {file}\n"), format!("there was no {file}\n")]);
    for (bad, what) in [
        (&["nope"][..], "KERNEL: expected one of add"),
        (&["add", "--mib", "2"], "expected one with several variants"),
        (&["add", "--forget"], "cannot be used with"),
        (&["--adapter", "cpu"], "a GPU adapter, found CPU twins"),
    ] {
        let output = lavapipe(&[&["bench", "tune"], bad].concat());
        assert_eq!(output.status.code(), Some(2), "{bad:?}: {}", stderr(&output));
        assert!(stderr(&output).contains(what), "{bad:?}: {}", stderr(&output));
    }
}
