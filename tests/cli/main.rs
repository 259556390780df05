//! The command line as a user meets it: exit codes, what is printed, and where.

mod files;
mod tune;

use std::io::{BufRead, BufReader};
use std::process::{Command, Output, Stdio};

use serde_json::Value;

/// `lamina` with no setting of this shell, and nothing of what the user keeps.
fn lamina(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lamina"));
    command.args(args);
    let settings = ["LAMINA_ADAPTER", "LAMINA_MATRIX_UNITS", "WGPU_BACKEND", "RUST_LOG"];
    for name in settings.into_iter().chain(["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"]) {
        command.env_remove(name);
    }
    command.env("LAMINA_CACHE", concat!(env!("CARGO_TARGET_TMPDIR"), "/cache"));
    command
}

fn run(args: &[&str]) -> Output {
    lamina(args).output().expect("lamina starts")
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

fn keys(value: &Value) -> Vec<&str> {
    let mut keys: Vec<&str> = value.as_object().expect("an object").keys().map(String::as_str).collect();
    keys.sort_unstable();
    keys
}

/// Every backend that no machine of this kind has: as if there were no adapter.
fn none(args: &[&str]) -> Output {
    let other = if cfg!(target_os = "macos") { "dx12" } else { "metal" };
    lamina(args).env("WGPU_BACKEND", other).output().expect("lamina starts")
}

#[test]
fn info_lists_each_adapter_and_the_path_of_each_kernel() {
    let output = run(&["info"]);
    let text = stdout(&output);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert!(text.contains("adapter 0: ") && text.contains("<- used") && text.contains("used: "), "{text}");
    for kernel in lamina::kernels::ALL.iter() {
        assert!(text.contains(kernel.name), "{}: {text}", kernel.name);
    }
    assert_eq!(stderr(&output), "", "nothing to warn of");
}

#[test]
fn info_as_json_has_the_documented_keys() {
    let info = json(&run(&["info", "--json"]));
    assert_eq!(keys(&info), ["adapters", "chosen", "kernels", "steps", "version"]);
    assert_eq!(keys(&info["chosen"]), ["adapter", "backend", "index", "why"]);
    assert_eq!(
        keys(&info["adapters"][0]),
        [
            "backend",
            "binding_bytes",
            "buffer_bytes",
            "cooperative",
            "device_type",
            "driver",
            "f16",
            "invocations",
            "matrix_kernels",
            "matrix_width",
            "name",
            "pipeline_cache",
            "storage_buffers",
            "subgroups",
            "timestamps",
            "workgroup_bytes"
        ]
    );
    assert_eq!(keys(&info["kernels"][0]), ["choices", "kernel"]);
    assert_eq!(keys(&info["kernels"][0]["choices"][0]), ["spec", "variant", "why"]);
}

#[test]
fn without_an_adapter_info_says_how_to_get_one_and_goes_on_with_the_twins() {
    let output = none(&["info"]);
    let text = stdout(&output);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert!(text.contains("No GPU adapter") && text.contains("driver"), "{text}");
    assert!(text.contains("used: cpu:") && text.contains("portable"), "{text}");
    let chosen = json(&none(&["info", "--json"]))["chosen"].clone();
    assert_eq!((&chosen["index"], &chosen["backend"]), (&Value::Null, &Value::from("cpu")));
}

#[test]
fn without_an_adapter_check_runs_on_the_twins_and_says_so() {
    let output = none(&["check", "--kernel", "add", "--json"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert_eq!(json(&output)["backend"], "cpu");
    assert!(stderr(&output).contains("no GPU adapter found"), "{}", stderr(&output));
}

#[test]
fn check_as_json_has_exactly_the_documented_keys() {
    let output = run(&["check", "--adapter", "cpu", "--kernel", "add", "--json"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let report = json(&output);
    assert_eq!(keys(&report), ["adapter", "backend", "cases", "device_type", "failed", "results"]);
    let results = report["results"].as_array().expect("an array");
    assert!(!results.is_empty());
    assert_eq!((&report["cases"], &report["failed"]), (&Value::from(results.len()), &Value::from(0)));
    for result in results {
        assert_eq!(keys(result), ["case", "kernel", "max_error", "nmse", "passed", "seconds", "tolerance", "variant"]);
        assert_eq!((&result["kernel"], &result["passed"]), (&Value::from("add"), &Value::from(true)));
    }
}

#[test]
fn check_on_an_adapter_prints_a_row_a_variant_and_the_sum() {
    let output = run(&["check", "--adapter", "0", "--kernel", "add"]);
    let text = stdout(&output);
    assert_eq!(output.status.code(), Some(0), "{text}{}", stderr(&output));
    assert!(text.contains(" add      portable") && text.contains(" passed, 0 failed"), "{text}");
}

#[test]
fn the_adapter_is_taken_from_the_environment_and_the_flag_goes_first() {
    let report = |command: &mut Command| json(&command.output().expect("lamina starts"))["backend"].clone();
    let args = ["check", "--kernel", "add", "--json"];
    assert_eq!(report(lamina(&args).env("LAMINA_ADAPTER", "cpu")), "cpu");
    assert_ne!(report(lamina(&args).args(["--adapter", "0"]).env("LAMINA_ADAPTER", "cpu")), "cpu");
    assert_ne!(report(lamina(&args).env("LAMINA_ADAPTER", "")), "cpu");
}

#[test]
fn a_setting_of_matrix_units_that_says_nothing_exits_with_2() {
    let output =
        lamina(&["info", "--adapter", "0"]).env("LAMINA_MATRIX_UNITS", "perhaps").output().expect("lamina starts");
    assert_eq!(output.status.code(), Some(2));
    let text = stderr(&output);
    assert!(text.contains("LAMINA_MATRIX_UNITS: expected on or off, found 'perhaps'"), "{text}");
}

#[test]
fn an_ambiguous_adapter_exits_with_2_and_lists_the_matches() {
    let info = json(&run(&["info", "--json"]));
    let names: Vec<String> =
        info["adapters"].as_array().expect("an array").iter().map(|a| a["name"].to_string()).collect();
    let shared = ('a'..='z').find(|c| names.iter().filter(|n| n.to_lowercase().contains(*c)).count() > 1);
    let shared = shared.expect("tests/run gives a machine several adapters").to_string();
    let output = run(&["--adapter", &shared, "info"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("which fits\n") && stderr(&output).contains("  0  "), "{}", stderr(&output));
    assert_eq!(stdout(&output), "");
}

#[test]
fn what_the_command_line_cannot_mean_exits_with_2_and_says_what_it_can() {
    for (args, part) in [
        (&["check", "--kernel", "nope"][..], "one of add"),
        (&["info", "--adapter", "99"], "an index below"),
        (&["info", "--adapter", "no such adapter"], "a part of an adapter's name"),
        (&["chekc"], "'check'"),
        (&["plan"], "--latent <WIDTH>"),
        (&["plan", "--heads", "3", "--latent", "64", "--layers", "2"], "--head-dim: expected the width"),
        (&["plan", "--heads", "3", "--latent", "64", "--layers", "2", "--hidden", "64"], "a multiple of 3 heads"),
        (&["plan", "--heads", "0", "--latent", "64", "--layers", "2"], "0 is not in 1.."),
        (&["plan", "folder", "--heads", "3"], "cannot be used with"),
        (&["plan", "folder", "--memory", "much"], "a size such as 80GiB"),
        (&["check", "--adapter"], "--adapter"),
        (&[], "Usage"),
    ] {
        let output = run(args);
        assert_eq!(output.status.code(), Some(2), "{args:?}: {}", stdout(&output));
        assert!(stderr(&output).contains(part), "{args:?}: {}", stderr(&output));
    }
}

/// The numbers of the example in `lamina plan --help`.
const NUMBERS: [&str; 15] = [
    "plan",
    "--hidden",
    "4096",
    "--heads",
    "32",
    "--head-dim",
    "128",
    "--gqa",
    "8",
    "--latent",
    "512",
    "--rope",
    "64",
    "--layers",
    "32",
];

#[test]
fn plan_of_bare_numbers_compares_three_caches() {
    let output = run(&[&NUMBERS[..], &["--memory", "80GiB", "--json"]].concat());
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let plan = json(&output);
    let documented = [
        "attention",
        "batch",
        "cache",
        "cache_bytes",
        "context",
        "fits",
        "largest_context",
        "memory_bytes",
        "model",
        "scratch_bytes",
        "total_bytes",
        "weights_bytes",
    ];
    assert_eq!(keys(&plan), documented);
    assert_eq!((&plan["fits"], &plan["model"], &plan["context"]), (&true.into(), &Value::Null, &32768.into()));
    let column = |field: &str| {
        plan["attention"].as_array().expect("a list").iter().map(|row| row[field].clone()).collect::<Vec<_>>()
    };
    assert_eq!(column("kind"), ["MHA", "GQA-8", "MLA"]);
    assert_eq!(column("bytes_per_token"), [524_288, 131_072, 36_864]);
    // 80 GiB over the bytes of a page of 64 tokens.
    assert_eq!(column("largest_context"), [163_840, 655_360, 2_330_112]);
    assert_eq!(column("largest_batch"), [5, 20, 71]);
    assert_eq!(keys(&plan["attention"][0]).len(), 6);

    let file = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join("plan.svg");
    let output = run(&[&NUMBERS[..], &["--svg", file.to_str().expect("UTF-8")]].concat());
    assert!(stdout(&output).contains("MLA") && stdout(&output).contains("36864"), "{}", stdout(&output));
    let svg = std::fs::read_to_string(&file).expect("a plot");
    assert!(
        svg.starts_with("<svg xmlns") && svg.ends_with("</svg>\n") && svg.contains("GQA-8, 128.0 KiB a token"),
        "{svg}"
    );
    let output = run(&[&NUMBERS[..], &["--svg", "/no/such/folder/plan.svg"]].concat());
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("/no/such/folder/plan.svg: "), "{}", stderr(&output));
}

#[test]
fn plan_of_a_configuration_refuses_what_does_not_fit_with_the_numbers() {
    let folder = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join("plan");
    std::fs::create_dir_all(&folder).expect("a folder under target");
    let config = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/configs/deepseek_v3.json");
    std::fs::copy(config, folder.join("config.json")).expect("a file of this project");
    let folder = folder.to_str().expect("UTF-8");

    let output = run(&["plan", folder, "--memory", "1GiB", "--ctx", "500", "--json"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let plan = json(&output);
    assert_eq!((&plan["model"]["model_type"], &plan["cache_bytes"]), (&"deepseek_v3".into(), &(3 * 80 * 512).into()));
    let named = ["layers", "longest_context", "model_type", "parameters", "path", "skipped"];
    assert_eq!(keys(&plan["model"]), named);
    let bytes = |field: &str| plan[field].as_u64().expect("a number");
    assert_eq!(bytes("total_bytes"), bytes("weights_bytes") + bytes("cache_bytes") + bytes("scratch_bytes"));

    // One byte too few.
    let less = (bytes("total_bytes") - 1).to_string();
    let output = run(&["plan", folder, "--memory", &less, "--ctx", "500"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stdout(&output).contains("it does not fit"), "{}", stdout(&output));
    let message = stderr(&output);
    assert!(
        message.contains("of weights") && message.contains("the longest context that fits is 448 tokens"),
        "{message}"
    );

    let output = run(&["plan", folder, "--memory", "1GiB", "--ctx", "513"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("--ctx: expected at most 512"), "{}", stderr(&output));
    // Without --memory the adapter's limits are looked at; the twins have some.
    let output = run(&["plan", folder, "--adapter", "cpu"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert!(stdout(&output).contains("--memory SIZE tells"), "{}", stdout(&output));
    let home = env!("CARGO_TARGET_TMPDIR");
    let output = lamina(&["plan", "owner/model"]).env("HF_HUB_OFFLINE", "1").env("HF_HOME", home).output();
    let output = output.expect("lamina starts");
    assert_eq!(output.status.code(), Some(1));
    let place = format!("{home}/hub/models--owner--model: the files of owner/model: expected config.json");
    assert!(stderr(&output).contains(&place), "{}", stderr(&output));
    let output = run(&["plan", "/no/such/folder"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("/no/such/folder"), "{}", stderr(&output));
}

#[test]
fn help_shows_examples_and_the_environment() {
    for args in [&["--help"][..], &["info", "--help"], &["check", "--help"], &["plan", "--help"]] {
        let output = run(args);
        assert_eq!(output.status.code(), Some(0));
        assert!(stdout(&output).contains("Examples:"), "{}", stdout(&output));
    }
    assert!(stdout(&run(&["--help"])).contains("WGPU_BACKEND"));
}

#[test]
fn a_reader_that_leaves_early_is_no_error() {
    // More than a pipe's buffer, so that lamina still writes after the reader has gone.
    let mut child = lamina(&["check", "--adapter", "cpu", "--json"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("lamina starts");
    let mut line = String::new();
    BufReader::new(child.stdout.take().expect("piped")).read_line(&mut line).expect("a line");
    let output = child.wait_with_output().expect("lamina ends");
    assert_eq!((line.as_str(), output.status.code()), ("{\n", Some(0)), "{}", stderr(&output));
}

/// What every benchmark's JSON has beside its results.
const BENCH: [&str; 7] = ["ceilings", "clock", "command", "commit", "device", "driver", "version"];

#[test]
fn bench_as_json_has_the_documented_keys_and_is_refused_where_nothing_can_be_timed() {
    let output =
        lamina(&["bench", "ceilings", "--mib", "2", "--json"]).env("LAMINA_ADAPTER", "vulkan:llvmpipe").output();
    let bench = json(&output.expect("lamina starts"));
    assert_eq!(keys(&bench), BENCH);
    let ceilings =
        ["bytes", "copy_gbs", "dispatch_us", "f16_tflops", "f32_tflops", "matrix_tflops", "read_gbs", "round_trip_us"];
    assert_eq!(keys(&bench["ceilings"]), ceilings);
    assert!(bench["ceilings"]["read_gbs"].as_f64().expect("a number") > 0.01, "{bench}");
    assert_eq!(bench["command"], "lamina bench ceilings --mib 2 --json");
    assert_eq!((&bench["clock"]["by"], &bench["clock"]["overhead_us"]), (&"timestamps".into(), &0.0.into()));
    for what in [&["bench", "ceilings"][..], &["bench", "kernel"], &["bench", "model", "--depth", "0"]] {
        let output = lamina(what).env("LAMINA_ADAPTER", "cpu").output().expect("lamina starts");
        assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
        assert!(stderr(&output).contains("a GPU adapter, found CPU twins"), "{}", stderr(&output));
    }
    let none = run(&["bench", "ceilings", "--mib", "1"]);
    assert_eq!(none.status.code(), Some(2));
}

/// `lamina bench kernel` on lavapipe, with the smallest ceilings.
fn bench_kernel(args: &[&str]) -> Output {
    let mut command = lamina(&["bench", "kernel", "--mib", "2"]);
    command.args(args).env("LAMINA_ADAPTER", "vulkan:llvmpipe").output().expect("lamina starts")
}

#[test]
fn bench_kernel_times_each_shape_and_format_and_says_what_was_checked() {
    let shape = ["--heads", "3,5", "--context", "100", "--dtype", "f16,fp8", "--repeat", "2"];
    let output = bench_kernel(&[&shape[..], &["--json"]].concat());
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let bench = json(&output);
    assert_eq!(
        keys(&bench),
        [
            &["ceilings", "clock", "command", "commit", "decode"][..],
            &["device", "driver", "failed"],
            &["skipped", "version"]
        ]
        .concat()
    );
    let figures = bench["decode"].as_array().expect("a list");
    let of = |key: &str| figures.iter().map(|figure| figure[key].clone()).collect::<Vec<_>>();
    assert_eq!(of("heads"), [3, 3, 5, 5]);
    assert_eq!(of("dtype"), ["f16", "fp8", "f16", "fp8"]);
    assert_eq!(of("bytes"), [115_200.0, 65_600.0, 115_200.0, 65_600.0]);
    for figure in figures {
        let known = [
            "batch",
            "bound",
            "bytes",
            "checked",
            "contexts",
            "dtype",
            "error",
            "gain_over_f16",
            "gbs",
            "heads",
            "keys",
            "median_us",
            "p10_us",
            "p90_us",
            "published",
            "runs",
            "share",
            "splits",
            "tflops",
            "tokens",
            "variant",
        ];
        assert_eq!(keys(figure), known);
        let number = |key: &str| figure[key].as_f64().expect("a number");
        assert!(number("p10_us") <= number("median_us") && number("median_us") <= number("p90_us"), "{figure}");
        assert!((number("gbs") * number("median_us") * 1e3 - number("bytes")).abs() < 1.0, "{figure}");
        assert!(number("checked") >= 3.0 && number("error") < 1e-5, "{figure}");
        assert_eq!(figure["gain_over_f16"].is_null(), figure["dtype"] == "f16");
    }
    let table = stdout(&bench_kernel(&[&shape[..], &["--markdown", "--variant", "portable"]].concat()));
    assert!(
        table.contains("`lamina bench kernel --mib 2 --heads 3,5") && table.contains("| mla_decode portable |"),
        "{table}"
    );
    assert!(table.contains("rows agreed with the f64 twin"), "{table}");
}

#[test]
fn bench_kernel_refuses_what_cannot_be_meant() {
    for bad in [
        &["--batch", "0"][..],
        &["--heads", "3,x"],
        &["--context", "0"],
        &["--dtype", "int8"],
        &["--variant", "fast"],
        &["--repeat", "0"],
        &["--quick", "--heads", "3"],
        &["--quick"], // beside --mib
        &["thunder", "--batch", "2"],
        &["other"],
        &["--json", "--markdown"],
        &["--variant", "coop", "--context", "64"], // no matrix units here
    ] {
        let output = bench_kernel(bad);
        assert_eq!(output.status.code(), Some(2), "{bad:?}: {}{}", stdout(&output), stderr(&output));
        assert!(output.stdout.is_empty() && !output.stderr.is_empty(), "{bad:?}");
    }
    let coop = bench_kernel(&["--variant", "coop", "--context", "64"]);
    assert!(
        stderr(&coop).contains("mla_decode_coop: no matrix units") || stderr(&coop).contains("software driver"),
        "{}",
        stderr(&coop)
    );
}

/// `lamina bench attention-types` on lavapipe, with the smallest ceilings.
fn bench_attention(args: &[&str]) -> Output {
    let mut command = lamina(&["bench", "attention-types", "--mib", "2"]);
    command.args(args).env("LAMINA_ADAPTER", "vulkan:llvmpipe").output().expect("lamina starts")
}

#[test]
fn bench_attention_types_has_each_kind_at_each_context() {
    let model = ["--hidden", "64", "--heads", "4", "--head-dim", "16", "--latent", "32", "--rope", "8", "--gqa", "2"];
    let output = bench_attention(&[&model[..], &["--context", "100,3", "--repeat", "2", "--json"]].concat());
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let bench = json(&output);
    let mut known = [&BENCH[..], &["attention", "batch", "dims", "failed", "skipped"]].concat();
    known.sort_unstable();
    assert_eq!(keys(&bench), known);
    let figures = bench["attention"].as_array().expect("a list");
    let names: Vec<String> = figures.iter().map(|f| format!("{} {}", f["context"], f["kind"])).collect();
    let expected = [3, 100].map(|c| ["MHA", "GQA-2", "MLA", "MLA expanded"].map(|kind| format!("{c} \"{kind}\"")));
    assert_eq!(names, expected.concat());
    for figure in figures {
        let known = [
            "attention",
            "attention_gbs",
            "cache_bytes",
            "context",
            "dispatches",
            "error",
            "kind",
            "layer",
            "layer_share",
            "layer_to_gqa",
            "token_bytes",
            "weight_bytes",
        ];
        assert_eq!(keys(figure), known);
        assert_eq!(keys(&figure["layer"]), ["median_us", "p10_us", "p90_us", "runs"]);
        let tokens = figure["cache_bytes"].as_u64().expect("a number") / figure["token_bytes"].as_u64().expect("one");
        assert_eq!(Some(tokens), figure["context"].as_u64());
    }
    // Keys and values of two heads, 16 wide, in f16; the projections of a width of 64.
    assert_eq!((&figures[1]["token_bytes"], &figures[1]["weight_bytes"]), (&128.into(), &(2 * 64 * (128 + 64)).into()));
}

#[test]
fn bench_attention_types_refuses_sizes_that_no_kernel_takes() {
    for (bad, what) in [
        (&["--head-dim", "48"][..], "--head-dim: expected 16, 32, 64, 128 or 256, found 48"),
        (&["--nope", "12"], "--nope: expected a multiple of 8, found 12"),
        (&["--latent", "40"], "--latent: expected a multiple of 16, found 40"),
        (&["--rope", "6"], "--rope: expected a multiple of 4, found 6"),
        (&["--gqa", "5"], "--gqa: expected a divisor of 32 heads, found 5"),
        (&["--context", "0"], "--context"),
        (&["seed", "--heads", "4"], "--heads"),
        (&["other"], "other"),
    ] {
        let output = bench_attention(bad);
        assert_eq!(output.status.code(), Some(2), "{bad:?}: {}", stderr(&output));
        assert!(stderr(&output).contains(what), "{bad:?}: {}", stderr(&output));
    }
}
