//! A long text: memory does not grow with it, and no step waits for memory. One test alone in its process, since it
//! looks at the process's memory.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use futures::StreamExt;
use lamina::check::adapters;
use lamina::engine::{Engine, Options, Request};
use lamina::gpu::{self, Usage};
use lamina::kernels::sample::Sampler;
use lamina::model::Model;
use pollster::block_on;
use safetensors::SafeTensors;

/// A folder with the first layer of a checkpoint, which says that it was made for longer contexts: a text of
/// thousands of tokens takes a CPU driver long enough.
struct Longer(PathBuf);

impl Longer {
    fn new(name: &str, context: u32) -> Longer {
        let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/models").join(name);
        let folder = std::env::temp_dir().join(format!("lamina-endurance-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let bytes = std::fs::read(from.join("model.safetensors")).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let first = |name: &str| name.strip_prefix("model.layers.").is_none_or(|rest| rest.starts_with("0."));
        let kept = tensors.tensors().into_iter().filter(|(name, _)| first(name));
        std::fs::write(folder.join("model.safetensors"), safetensors::serialize(kept, None).unwrap()).unwrap();
        let config = std::fs::read_to_string(from.join("config.json")).unwrap();
        let mut config: serde_json::Value = serde_json::from_str(&config).unwrap();
        config["max_position_embeddings"] = context.into();
        config["num_hidden_layers"] = 1.into();
        std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
        Longer(folder)
    }
}

impl Drop for Longer {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Bytes of this process that are in memory, where the system says.
fn resident() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? << 10)
}

/// What was seen behind a token.
struct Seen {
    usage: Usage,
    resident: Option<u64>,
}

const TOKENS: usize = 4000;
/// Behind so many tokens a context is split, and every pipeline and bind group is there.
const SETTLED: usize = 500;

#[test]
fn four_thousand_tokens_take_no_more_memory_than_five_hundred() {
    let options = gpu::Options { checked: false, ..gpu::Options::default() };
    let mut devices = adapters(&options);
    // One adapter, the fastest of the software ones where there is no other.
    devices.sort_by_key(|device| (device.caps().is_software(), device.caps().name.contains("SwiftShader")));
    let device = devices.into_iter().find(|device| device.caps().backend != "gl").expect("an adapter besides GL");
    let folder = Longer::new("youtu", 8192);
    let model = Model::load(&device, &folder.0, |_, _| {}).unwrap();
    assert_eq!(model.config.max_context, 8192);
    let mut engine = Engine::new(&device, model, &Options { context: 8192, ..Options::default() }).unwrap();
    let id = engine.create(&Sampler::default()).unwrap();
    let usage = || device.usage().expect("it is a GPU");
    let start = usage();
    // No end ids: as with --ignore-eos.
    let request = Request { max_tokens: TOKENS, ..Request::default() };
    let (mut seen, mut steps, mut last) = (Vec::new(), Vec::with_capacity(TOKENS), Instant::now());
    {
        let mut stream = std::pin::pin!(engine.generate(id, &[5, 9, 200, 31], request));
        while let Some(record) = block_on(stream.next()) {
            record.unwrap();
            steps.push(last.elapsed());
            if steps.len() == SETTLED || steps.len() == TOKENS {
                seen.push(Seen { usage: usage(), resident: resident() });
            }
            last = Instant::now();
        }
    }
    assert_eq!((steps.len(), engine.tokens(id)), (TOKENS, TOKENS + 3));
    let [settled, end] = &seen[..] else { panic!("two looks") };
    let label = device.caps().label();
    assert_eq!(end.usage.allocations, start.allocations, "buffers were allocated on {label}");
    assert_eq!(end.usage.bind_groups, settled.usage.bind_groups, "bind groups were made on {label}");
    assert_eq!(end.usage.pipelines, settled.usage.pipelines, "pipelines were compiled on {label}");
    if let (Some(before), Some(after)) = (settled.usage.bytes, end.usage.bytes) {
        assert!(after <= before + (1 << 20), "{before} bytes of buffers became {after} on {label}");
    }
    if let (Some(before), Some(after)) = (settled.resident, end.resident) {
        println!("resident: {before} bytes behind {SETTLED} tokens, {after} behind {TOKENS}");
        assert!(after <= before + (8 << 20), "{before} bytes of the process became {after} on {label}");
    }
    // What a pause is measured by: the usual step of the same stretch of the text, since steps grow with it.
    let mut slowest = (Duration::ZERO, 0);
    for (i, stretch) in steps[SETTLED..].chunks(SETTLED).enumerate() {
        let mut sorted = stretch.to_vec();
        sorted.sort();
        let usual = sorted[sorted.len() / 2];
        let (at, most) = stretch.iter().enumerate().max_by_key(|(_, step)| **step).expect("a step");
        slowest = slowest.max((*most, SETTLED * (i + 1) + at));
        // A machine that does something else besides may hold a step up.
        let limit = 20 * usual + Duration::from_millis(500);
        assert!(*most < limit, "a step took {most:?}, the usual {usual:?}, on {label}");
    }
    let all: Duration = steps.iter().sum();
    println!("{TOKENS} tokens in {all:?} on {label}; the slowest step behind {SETTLED}: {slowest:?}");
}
