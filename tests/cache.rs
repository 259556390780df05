//! The latent cache's memory, on every adapter of this system and on the `cpu` device, and what an engine makes of it.

use std::path::Path;

use lamina::Error;
use lamina::check::adapters;
use lamina::engine::{self, Cache, CacheShape, Engine};
use lamina::gpu::{Device, Options};
use lamina::kernels::sample::Sampler;
use lamina::model::Model;
use lamina::num::record::RecordFormat;
use pollster::block_on;

fn devices() -> Vec<Device> {
    let options = Options { checked: true, binding_bytes: Some(64 << 10), ..Options::default() };
    let mut devices = adapters(&options);
    devices.push(Device::cpu(&options));
    devices
}

fn shape() -> CacheShape {
    let format = RecordFormat::F32;
    CacheShape { layers: 2, latent: 32, rope: 8, format, page: 64, pages: 14, most_tokens: 640 }
}

/// The bytes of one page of a layer.
fn page(device: &Device, cache: &Cache, layer: usize, page: u32) -> Vec<u8> {
    let chunks = cache.latent(layer);
    let chunk = chunks.iter().find(|c| (c.first_page..c.first_page + c.pages).contains(&page)).expect("a chunk");
    let bytes = u64::from(page - chunk.first_page) * 10_240;
    pollster::block_on(device.read(&[chunk.view.part(bytes, 10_240)])).expect("the device answers").remove(0)
}

#[test]
fn a_fork_shares_pages_until_it_writes() {
    for device in devices() {
        let label = device.caps().label();
        let mut cache = Cache::new(&device, &shape()).unwrap();
        // A record takes 160 bytes, a page 10,240: six fit one binding, so three chunks of five.
        assert_eq!((cache.chunk_pages(), cache.latent(0).len(), cache.latent(1)[2].pages), (5, 3, 4), "{label}");
        for (layer, byte) in [(0, 1u8), (1, 2)] {
            for chunk in cache.latent(layer) {
                let bytes: Vec<u8> = (0..chunk.view.size()).map(|i| byte.wrapping_mul((i % 251) as u8)).collect();
                device.write(&chunk.view, 0, &bytes).unwrap();
            }
        }
        let first = cache.create();
        cache.append(first, 100).unwrap();
        let fork = cache.fork(first, 90);
        assert_eq!(cache.pages().pages(first), cache.pages().pages(fork));
        let shared = cache.pages().pages(first).to_vec();
        let before = [0, 1].map(|layer| page(&device, &cache, layer, shared[1]));
        cache.append(fork, 1).unwrap();
        let own = cache.pages().pages(fork).to_vec();
        assert_eq!((own[0], own.len()), (shared[0], 2));
        assert_ne!(own[1], shared[1]);
        assert_eq!(cache.pages().pages(first), shared);
        assert_eq!([0, 1].map(|layer| page(&device, &cache, layer, own[1])), before, "{label}: the copy");
        assert_eq!([0, 1].map(|layer| page(&device, &cache, layer, shared[1])), before, "{label}: the original");
        // Nobody shares the copy: the next token moves nothing.
        cache.append(fork, 1).unwrap();
        assert_eq!(cache.pages().pages(fork), own);
        let (batch, table) = cache.batch(&[(fork, 1), (first, 4)]);
        assert_eq!((batch[0].position, batch[0].pages, batch[1].position, batch[1].pages), (91, 0, 96, 2));
        assert_eq!((batch[1].first_row, table), (1, [own, shared].concat()));
        cache.truncate(fork, 64);
        cache.free(first);
        assert_eq!(cache.pages().free_pages(), 13, "the fork still holds the first page");
    }
}

#[test]
fn a_cache_that_cannot_be_is_refused_with_what_there_is() {
    let device = Device::cpu(&Options { binding_bytes: Some(4096), ..Options::default() });
    let refused = |shape: &CacheShape| Cache::new(&device, shape).err().expect("refused");
    let error = refused(&shape());
    assert!(matches!(error, Error::Capacity { asked: 10_240, limit: 4096, .. }), "{error}");
    let error = refused(&CacheShape { page: 48, ..shape() }).to_string();
    assert!(error.contains("48") && error.contains("128"), "{error}");
}

fn small_engine(device: &Device, options: &engine::Options) -> lamina::Result<Engine> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/models/deepseek_v2");
    Engine::new(device, Model::load(device, &folder, |_, _| {})?, options)
}

#[test]
fn a_step_that_does_not_fit_leaves_every_sequence_as_it_was() {
    let device = Device::cpu(&Options::default());
    let options = engine::Options { context: 8, sequences: 2, ..engine::Options::default() };
    let after = |fail: bool| {
        let mut engine = small_engine(&device, &options).unwrap();
        let [room, full] = [0; 2].map(|_| engine.create(&Sampler::default()).unwrap());
        block_on(engine.logits(full, &[1, 2, 3, 4, 5, 6, 7, 8])).unwrap();
        block_on(engine.logits(room, &[9, 10, 11])).unwrap();
        if fail {
            let error = block_on(engine.decode(&[(room, 0), (full, 0)])).err().expect("one is full");
            assert!(matches!(error, Error::Capacity { asked: 9, limit: 8, .. }), "{error}");
            assert_eq!((engine.tokens(room), engine.tokens(full)), (3, 8));
        }
        block_on(engine.logits(room, &[12])).unwrap()
    };
    assert_eq!(after(true), after(false), "a token that nobody wrote was attended to");
}

#[test]
fn an_engine_whose_memory_no_binding_shows_is_refused_when_it_is_made() {
    let device = Device::cpu(&Options { binding_bytes: Some(256 << 10), ..Options::default() });
    let options = engine::Options { context: 8192, step_tokens: Some(4096), ..engine::Options::default() };
    let error = small_engine(&device, &options).err().expect("4,096 rows take more than a binding");
    assert!(matches!(error, Error::OutOfMemory { .. }), "{error}");
    assert!(error.to_string().contains("its largest binding is 262144 bytes"), "{error}");
    assert!(small_engine(&device, &engine::Options { step_tokens: Some(16), ..options }).is_ok());
}
