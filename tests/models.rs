//! Configurations and the tables of tensors, of every family that runs and of those that are refused.

use std::path::{Path, PathBuf};

use lamina::kernels::moe_route::{Groups, Masked, Scoring};
use lamina::model::Config;
use lamina::model::config::{Bias, Growth, Mlp, Moe};
use lamina::model::rope::Scaling;
use lamina::model::tensors::{ExpertLayout, Tensors};
use lamina::num::rope::{RopeLayout, Yarn};
use lamina::weights::Checkpoint;
use serde_json::{Value, json};

/// The text of a configuration under `tests/data/configs`.
fn text(name: &str) -> Value {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/data/configs/{name}.json"));
    serde_json::from_str(&std::fs::read_to_string(&file).expect("a file of this project")).expect("JSON")
}

fn parse(value: &Value) -> lamina::Result<Config> {
    Config::parse(value.to_string().as_bytes(), Path::new("config.json"))
}

fn config(name: &str) -> Config {
    parse(&text(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
}

/// The message for a configuration with some fields changed; `remove` in place of a value removes it.
fn message(name: &str, changes: Value) -> String {
    let mut value = text(name);
    for (field, to) in changes.as_object().expect("fields") {
        let object = value.as_object_mut().expect("an object");
        match to == "remove" {
            true => object.remove(field),
            false => object.insert(field.clone(), to.clone()),
        };
    }
    let error = parse(&value).map(|config| config.family.labels).expect_err(&changes.to_string());
    assert_eq!(error.exit_code(), 1);
    error.to_string()
}

/// The folder of the tiny checkpoints of one architecture.
fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/models").join(name)
}

fn moe(config: &Config) -> &Moe {
    let mut mlps = config.layers.iter().flat_map(|layer| &layer.mlps);
    let routed = mlps.find_map(|mlp| if let Mlp::Moe(moe) = mlp { Some(moe) } else { None });
    routed.or(config.layers[0].shortcut.as_ref()).expect("experts")
}

/// Checkpoints whose configuration also stands here as transformers writes it.
const BOTH_STYLES: [&str; 11] = [
    "deepseek_v2",
    "deepseek_v2_lite",
    "deepseek_v3",
    "deepseek_v3_halfsplit",
    "deepseek_v3_kimi_k2",
    "deepseek_v3_moonlight",
    "glm4_moe_lite",
    "longcat_flash",
    "minicpm3",
    "mistral4",
    "youtu",
];

#[test]
fn both_styles_of_a_configuration_say_the_same() {
    for name in BOTH_STYLES {
        let open = || Config::open(&fixture(name)).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(open(), config(&format!("{name}.transformers")), "{name}");
    }
}

#[test]
fn deepseek_v3_is_read_as_published() {
    let config = config("deepseek_v3");
    let mla = &config.mla;
    assert_eq!((config.hidden, config.vocab, config.layers.len(), config.max_context), (64, 320, 3, 512));
    assert_eq!((mla.heads, mla.q_rank, mla.latent), (4, Some(24), 32));
    assert_eq!((mla.nope, mla.rope, mla.value), (16, 8, 16));
    assert_eq!((config.prefix, config.tied, config.eps, mla.eps), ("", false, 1e-6, 1e-6));
    assert_eq!((config.bos, &config.eos[..], config.mtp_layers), (Some(1), &[2][..], 0));
    assert_eq!((mla.q_scale, mla.latent_scale, mla.growth), (1.0, 1.0, None));
    assert_eq!((config.embedding_scale, config.residual_scale, config.logits_scale), (1.0, 1.0, 1.0));
    let yarn =
        Yarn { factor: 8.0, original_length: 64.0, beta_fast: 32.0, beta_slow: 1.0, mscale: 1.0, mscale_all_dim: 1.0 };
    assert_eq!(mla.rotation.scaling, Scaling::Yarn(yarn));
    assert_eq!((mla.rotation.layout, mla.rotation.theta), (RopeLayout::Interleaved, 1e4));
    assert_eq!(mla.rotation.frequencies(48).attention, 1.0);
    // 24^-1/2 (0.1 ln 8 + 1)^2
    assert!((mla.softmax_scale - 0.297_843_5).abs() < 1e-6, "{}", mla.softmax_scale);
    assert_eq!(config.layers[0].mlps, [Mlp::Dense { width: 96 }]);
    let expected = Moe {
        experts: 8,
        identity: 0,
        width: 32,
        shared_width: 32,
        top_k: 3,
        scoring: Scoring::Sigmoid,
        bias: Bias::Always,
        groups: Some(Groups { count: 4, kept: 2, best: 2, masked: Masked::Last }),
        renormalise: true,
        scaling: 2.5,
        norm: false,
    };
    for layer in &config.layers[1..] {
        assert_eq!((&layer.mlps[..], &layer.shortcut), (&[Mlp::Moe(expected.clone())][..], &None));
    }
}

#[test]
fn each_family_has_its_own_rules() {
    let lite = config("deepseek_v2_lite");
    assert_eq!((lite.mla.q_rank, moe(&lite).groups, moe(&lite).shared_width), (None, None, 64));
    assert_eq!((moe(&lite).scoring, moe(&lite).bias, moe(&lite).renormalise), (Scoring::Softmax, Bias::None, false));
    let v2 = config("deepseek_v2");
    assert_eq!(moe(&v2).groups, Some(Groups { count: 4, kept: 2, best: 1, masked: Masked::ZeroScore }));
    assert_eq!(moe(&v2).scaling, 16.0);

    let moonlight = config("deepseek_v3_moonlight");
    assert_eq!((moonlight.mla.q_rank, moonlight.eps, moonlight.mla.eps), (None, 1e-5, 1e-6));
    assert_eq!((&moonlight.mla.rotation.scaling, moonlight.mla.rotation.theta), (&Scaling::Plain, 5e4));
    assert!((moonlight.mla.softmax_scale - 24f32.powf(-0.5)).abs() < 1e-7);

    let mut half = text("deepseek_v3");
    half["rope_interleave"] = json!(false);
    assert_eq!(parse(&half).expect("a flag").mla.rotation.layout, RopeLayout::Half);

    let glm = config("glm4_moe_lite");
    assert_eq!((glm.mla.nope, glm.mla.value, glm.mla.rotation.theta), (24, 32, 1e6));
    let youtu = config("youtu");
    assert!(youtu.tied && youtu.layers.iter().all(|layer| layer.mlps == [Mlp::Dense { width: 96 }]));

    let small = config("minicpm3");
    assert!(small.tied && small.mla.rotation.layout == RopeLayout::Half);
    assert_eq!((small.embedding_scale, small.logits_scale), (12.0, 0.25));
    assert!((small.residual_scale - 1.4 / 3f32.sqrt()).abs() < 1e-6);
    assert_eq!(small.mla.rotation.frequencies(512).inverse[1], 0.1 / 1.05);
    assert_eq!(small.mla.rotation.frequencies(513).inverse[1], 0.1 / 1.35);

    let axk1 = config("axk1");
    assert!(moe(&axk1).norm && moe(&axk1).bias == Bias::Optional && axk1.layers[0].shortcut.is_none());
    let mistral = config("mistral4");
    assert_eq!(mistral.mla.growth, Some(Growth { beta: 0.1, length: 16 }));
    assert_eq!(
        (moe(&mistral).scoring, moe(&mistral).groups, moe(&mistral).renormalise),
        (Scoring::Softmax, None, true)
    );
    let mut grouped = text("mistral4");
    (grouped["n_group"], grouped["topk_group"]) = (json!(2), json!(1));
    assert_eq!(moe(&parse(&grouped).expect("groups")).groups.expect("two").masked, Masked::ZeroChoice);
    assert!(matches!(mistral.layers[0].mlps[..], [Mlp::Moe(_)]));

    let longcat = config("longcat_flash");
    assert_eq!((longcat.layers.len(), longcat.attentions()), (2, 4));
    assert_eq!(longcat.layers[1].mlps, [Mlp::Dense { width: 96 }, Mlp::Dense { width: 96 }]);
    assert_eq!((moe(&longcat).experts, moe(&longcat).identity, moe(&longcat).shared_width), (6, 3, 0));
    assert!(!moe(&longcat).renormalise && moe(&longcat).bias == Bias::Always);
    assert!((longcat.mla.q_scale - (64f32 / 24.0).sqrt()).abs() < 1e-6);
    assert!((longcat.mla.latent_scale - 2f32.sqrt()).abs() < 1e-6);

    let kimi = config("kimi_k25");
    assert_eq!((kimi.prefix, kimi.layers.len(), moe(&kimi).groups), ("language_model.", 2, None));
    assert_eq!(config("deepseek_v3_mtp").mtp_layers, 1);
}

#[test]
fn yarn_without_both_weights_takes_the_factor_alone() {
    let mut value = text("deepseek_v3");
    let scaling = value["rope_scaling"].as_object_mut().expect("an object");
    scaling.remove("mscale");
    let rotation = parse(&value).expect("it may be missing").mla.rotation;
    assert!((rotation.frequencies(1).attention - (0.1 * 8f64.ln() + 1.0)).abs() < 1e-12);
    value["rope_scaling"]["attention_factor"] = json!(1.5);
    assert_eq!(parse(&value).expect("a factor").mla.rotation.frequencies(1).attention, 1.5);
}

#[test]
fn labels_of_old_and_files_without_a_label_are_known() {
    for label in [json!("kimi_k2"), Value::Null] {
        let mut value = text("deepseek_v3");
        value["model_type"] = label;
        assert_eq!(parse(&value).expect("a label").family, config("deepseek_v3").family);
    }
    let mut value = text("youtu");
    value["model_type"] = json!("youtu_llm");
    assert_eq!(parse(&value).expect("a label"), config("youtu"));
}

#[test]
fn a_field_that_makes_no_sense_is_named_with_what_was_expected() {
    for (name, changes, parts) in [
        ("deepseek_v3", json!({"num_attention_heads": 0}), ["num_attention_heads", "from 1 to", "found 0"]),
        ("deepseek_v3", json!({"num_attention_heads": "4"}), ["num_attention_heads", "a whole number", "\"4\""]),
        ("deepseek_v3", json!({"num_attention_heads": 4.5}), ["num_attention_heads", "a whole number", "4.5"]),
        ("deepseek_v3", json!({"num_attention_heads": -4}), ["num_attention_heads", "a whole number", "-4"]),
        ("deepseek_v3", json!({"num_attention_heads": 1e30}), ["num_attention_heads", "a whole number", "1e+30"]),
        ("deepseek_v3", json!({"num_key_value_heads": 2}), ["num_key_value_heads", "4", "found 2"]),
        ("deepseek_v3", json!({"hidden_size": "remove"}), ["hidden_size", "a whole number", "found none"]),
        ("deepseek_v3", json!({"hidden_size": null}), ["hidden_size", "a whole number", "found null"]),
        ("deepseek_v3", json!({"q_lora_rank": "remove"}), ["q_lora_rank", "a whole number", "found none"]),
        ("deepseek_v3", json!({"qk_rope_head_dim": 7}), ["qk_rope_head_dim", "a multiple of 2", "found 7"]),
        ("deepseek_v3", json!({"kv_lora_rank": 40}), ["kv_lora_rank", "a multiple of 16", "found 40"]),
        ("deepseek_v3", json!({"v_head_dim": 12}), ["v_head_dim", "a multiple of 8", "found 12"]),
        ("deepseek_v3", json!({"qk_head_dim": 25}), ["qk_head_dim", "24", "25"]),
        ("deepseek_v3", json!({"hidden_act": "gelu"}), ["hidden_act", "'silu'", "'gelu'"]),
        ("deepseek_v3", json!({"topk_method": "best"}), ["topk_method", "'noaux_tc'", "'best'"]),
        ("deepseek_v3", json!({"scoring_func": "softmax"}), ["scoring_func", "'sigmoid'", "'softmax'"]),
        ("deepseek_v3", json!({"n_group": 3}), ["n_group", "a divisor of 8", "found 3"]),
        ("deepseek_v3", json!({"topk_group": 5}), ["topk_group", "at most 4", "found 5"]),
        ("deepseek_v3", json!({"num_experts_per_tok": 5}), ["num_experts_per_tok", "from 1 to 4", "found 5"]),
        ("deepseek_v3", json!({"rms_norm_eps": -1e-6}), ["rms_norm_eps", "above 0", "-1e-6"]),
        ("deepseek_v3", json!({"norm_topk_prob": 1}), ["norm_topk_prob", "true or false", "found 1"]),
        ("deepseek_v3", json!({"mlp_layer_types": ["dense"]}), ["mlp_layer_types", "3 times", "1 of them"]),
        ("deepseek_v3", json!({"layer_types": ["full_attention", "x"]}), ["layer_types", "'full_attention'", "\"x\""]),
        ("deepseek_v3", json!({"eos_token_id": [2, 320]}), ["eos_token_id", "below 320", "found 320"]),
        ("deepseek_v3", json!({"model_type": "llama"}), ["model_type", "deepseek_v3, kimi_k2", "'llama'"]),
        ("deepseek_v3", json!({"model_type": 3}), ["model_type", "a string", "found 3"]),
        ("deepseek_v2", json!({"norm_topk_prob": true}), ["norm_topk_prob", "false", "true"]),
        ("deepseek_v2", json!({"topk_method": "remove"}), ["topk_method", "greedy or group_limited", "none"]),
        ("deepseek_v2", json!({"rope_interleave": false}), ["rope_interleave", "true", "false"]),
        ("minicpm3", json!({"scale_emb": "remove"}), ["scale_emb", "above 0", "none"]),
        ("minicpm3", json!({"v_head_dim": "remove", "hidden_size": 3}), ["v_head_dim", "a multiple of 8", "3 / "]),
        ("deepseek_v3", json!({"vocab_size": 300_000}), ["vocab_size", "262144", "300000"]),
        ("longcat_flash", json!({"mla_scale_q_lora": false}), ["mla_scale_q_lora", "true", "false"]),
        ("longcat_flash", json!({"zero_expert_type": "copy"}), ["zero_expert_type", "'identity'", "'copy'"]),
        ("kimi_k25", json!({"text_config": "remove"}), ["text_config", "a JSON object", "none"]),
        ("kimi_k25", json!({"text_config": 7}), ["text_config", "a JSON object", "7"]),
        ("kimi_k25", json!({"text_config": {"model_type": "x"}}), ["text_config.model_type", "one of", "'x'"]),
    ] {
        let message = message(name, changes);
        assert!(message.starts_with("config.json: "), "{message}");
        parts.iter().for_each(|part| assert!(message.contains(part), "{part}: {message}"));
    }
}

#[test]
fn a_rope_that_lamina_does_not_turn_is_refused_by_name() {
    let base = json!({"type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64});
    for (field, value, parts) in [
        ("type", json!("dynamic"), ["rope_scaling.type", "'dynamic'"]),
        ("rope_type", json!("llama3"), ["rope_scaling.rope_type", "'llama3'"]),
        ("rope_type", json!("linear"), ["rope_scaling.type", "'yarn'"]),
        ("factor", json!("remove"), ["rope_scaling.factor", "none"]),
        ("factor", json!(-8), ["rope_scaling.factor", "-8"]),
        ("truncate", json!(false), ["rope_scaling.truncate", "false"]),
        ("llama_4_scaling_beta", json!(0.1), ["llama_4_scaling_beta", "does not know"]),
        ("partial_rotary_factor", json!(0.5), ["partial_rotary_factor", "0.5"]),
        ("rope_theta", json!(5e4), ["rope_scaling.rope_theta", "50000"]),
    ] {
        let mut rope = base.clone();
        match value == "remove" {
            true => rope.as_object_mut().expect("an object").remove(field),
            false => rope.as_object_mut().expect("an object").insert(field.into(), value),
        };
        let message = message("deepseek_v3", json!({ "rope_scaling": rope }));
        parts.iter().for_each(|part| assert!(message.contains(part), "{part}: {message}"));
    }
    let short = json!({"type": "longrope", "short_factor": [1.0], "long_factor": [1.0, 2.0]});
    let message = message("minicpm3", json!({ "rope_scaling": short }));
    assert!(message.contains("rope_scaling.short_factor: expected a list of 4 numbers"), "{message}");
}

#[test]
fn parts_that_lamina_does_not_compute_are_refused_by_name() {
    for (changes, feature) in [
        (json!({"quantization_config": {"quant_method": "fp8"}}), "quantised weights (quantization_config, fp8)"),
        (json!({"index_topk": 2048}), "indexer"),
        (json!({"linear_attn_config": {"kda_layers": [1]}}), "KDA"),
        (json!({"final_logit_softcapping": 30.0}), "soft cap"),
        (json!({"hc_mult": 4}), "hyper-connections"),
        (json!({"attention_bias": true}), "bias of the attention (attention_bias)"),
        (json!({"mlp_bias": true}), "mlp_bias"),
        (json!({"model_type": "deepseek_v4"}), "compressed attention"),
        (json!({"architectures": ["DeepseekV32ForCausalLM"]}), "indexer"),
        (json!({"model_type": null, "architectures": ["KimiLinearForCausalLM"]}), "KDA"),
    ] {
        let message = message("deepseek_v3", changes);
        assert!(message.contains(feature) && message.ends_with("not supported"), "{message}");
    }
    let nothing = json!({"attention_bias": false, "sliding_window": null, "index_topk": 0, "indexer_types": []});
    let mut value = text("deepseek_v3");
    value.as_object_mut().expect("an object").extend(nothing.as_object().expect("fields").clone());
    assert_eq!(parse(&value).expect("nothing besides"), config("deepseek_v3"));
}

#[test]
fn what_is_no_json_is_one_error() {
    for (bytes, part) in [
        (&b""[..], "EOF"),
        (b"{\"a\": ", "EOF"),
        (b"[1, 2]", "a JSON object, found [1,2]"),
        (b"{\"model_type\": \"\xff\"}", "invalid unicode"),
        (b"nonsense", "expected"),
        (b"{}", "model_type"),
    ] {
        let error = Config::parse(bytes, Path::new("config.json")).expect_err("no configuration").to_string();
        assert!(error.starts_with("config.json: ") && error.contains(part), "{error}");
    }
    let deep = "[".repeat(100_000);
    Config::parse(deep.as_bytes(), Path::new("config.json")).expect_err("too deep");
}

#[test]
fn no_mutation_of_a_configuration_panics() {
    let mut random = fastrand::Rng::with_seed(7);
    // LAMINA_FUZZ_SECONDS makes it longer.
    let seconds = std::env::var("LAMINA_FUZZ_SECONDS").map_or(0, |text| text.parse().expect("seconds"));
    let names = ["deepseek_v3", "minicpm3", "longcat_flash", "kimi_k25", "mistral4"];
    for name in names {
        let whole = text(name).to_string().into_bytes();
        let start = std::time::Instant::now();
        let more = |round: u64| round < 4000 || start.elapsed().as_secs() < seconds / names.len() as u64;
        for _ in (0..).take_while(|round| more(*round)) {
            let mut bytes = whole.clone();
            for _ in 0..random.usize(1..4) {
                let at = random.usize(..bytes.len());
                match random.u8(..4) {
                    0 => bytes[at] = random.u8(..),
                    1 => bytes[at] = *random.choice(b"0123456789-.e\"[]{},:").expect("not empty"),
                    2 => drop(bytes.remove(at)),
                    _ => bytes.insert(at, random.u8(b' '..b'~')),
                }
            }
            // Right or refused, never a panic; a table of tensors can be made of what is accepted.
            if let Ok(config) = Config::parse(&bytes, Path::new("config.json")) {
                assert!(Tensors::of(&config, ExpertLayout::Each).all().iter().all(|tensor| tensor.values() > 0));
            }
        }
    }
}

/// Checkpoints that run.
const RUN: [&str; 14] = [
    "axk1",
    "deepseek_v2",
    "deepseek_v2_lite",
    "deepseek_v3",
    "deepseek_v3_halfsplit",
    "deepseek_v3_kimi_k2",
    "deepseek_v3_moonlight",
    "deepseek_v3_mtp",
    "glm4_moe_lite",
    "kimi_k25",
    "longcat_flash",
    "minicpm3",
    "mistral4",
    "youtu",
];
/// Configurations under `tests/data/configs/refused`, with a part of the reason.
const REFUSED: [(&str, &str); 12] = [
    ("axk2", "indexer"),
    ("bailing_hybrid", "KDA"),
    ("deepseek_v32", "indexer"),
    ("deepseek_v3_fp8", "fp8"),
    ("deepseek_v3_int4_ct", "compressed-tensors"),
    ("deepseek_v4", "compressed attention"),
    ("dots3_note", "sliding-window"),
    ("glm5_next", "KDA"),
    ("glm_moe_dsa", "indexer"),
    ("hy_v4", "attention sinks"),
    ("kimi_linear", "KDA"),
    ("mistral_large4", "shared across layers"),
];

#[test]
fn the_tensors_of_every_fixture_are_those_of_its_table() {
    for name in RUN {
        let folder = fixture(name);
        let config = Config::open(&folder).unwrap_or_else(|error| panic!("{name}: {error}"));
        let checkpoint = Checkpoint::open(&folder).unwrap_or_else(|error| panic!("{name}: {error}"));
        let (tensors, skipped) = Tensors::find(&config, &checkpoint).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(
            skipped.is_empty(),
            !["deepseek_v3_mtp", "kimi_k25", "longcat_flash"].contains(&name),
            "{name}: {skipped:?}"
        );
        assert_eq!(skipped.len() + tensors.all().len(), checkpoint.tensors().count(), "{name}");
    }
}

#[test]
fn other_architectures_are_refused_by_name() {
    for (name, part) in REFUSED {
        let error = parse(&text(&format!("refused/{name}"))).expect_err(name).to_string();
        assert!(error.contains(part) && error.ends_with("not supported"), "{name}: {error}");
    }
}
