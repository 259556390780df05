//! How exact `mla_decode` is, with `mla_combine` behind it, on every adapter of this system: with length,
//! from run to run, and alone or in a batch.

use lamina::check::adapters;
use lamina::gpu::{Device, Options, Recording};
use lamina::kernels::inputs::Inputs;
use lamina::kernels::mla_combine::{self, MlaCombine, Output};
use lamina::kernels::mla_decode::{self, MlaDecode, Tuning};
use lamina::kernels::plan::{Borders, Target, plan};
use lamina::kernels::weights::WeightFormat;
use lamina::kernels::{CacheChunk, Kernel, Sequence, Variant};
use lamina::num::record::RecordFormat;
use lamina::reference::mla_decode::attend;

const LATENT: usize = 64;
const ROPE: usize = 16;
const HEADS: usize = 4;
const PAGE: usize = 64;

/// A sequence with one new token: its queries `[heads, r + p]` and the records of its context `[tokens, r + p]`.
struct Context {
    queries: Vec<f32>,
    records: Vec<f32>,
}

impl Context {
    /// FlashMLA's values; queries in units of log2.
    fn draw(seed: u64, tokens: usize) -> Context {
        let mut inputs = Inputs::seed(seed);
        let queries = inputs.flashmla(HEADS * (LATENT + ROPE)).iter().map(|q| q * std::f32::consts::LOG2_E).collect();
        Context { queries, records: inputs.flashmla(tokens * (LATENT + ROPE)) }
    }

    fn tokens(&self) -> usize {
        self.records.len() / (LATENT + ROPE)
    }

    /// The twin's outputs, `[heads, r]`.
    fn expected(&self) -> Vec<f64> {
        let of = |query| attend(query, self.records.chunks_exact(LATENT + ROPE), LATENT).0;
        self.queries.chunks_exact(LATENT + ROPE).flat_map(of).collect()
    }
}

fn spec() -> mla_decode::Spec {
    let (latent, rope) = (LATENT as u32, ROPE as u32);
    mla_decode::Spec { latent, rope, format: RecordFormat::F32, rows: HEADS as u32 }
}

/// The outputs of each context, `[heads, r]`, from one step that holds all of them.
fn run(device: &Device, variant: &Variant<Tuning>, contexts: &[Context], borders: Borders) -> Vec<Vec<f32>> {
    let count = contexts.len() as u32;
    let (mut batch, mut table) = (Vec::new(), Vec::<u32>::new());
    let (mut cache, mut queries) = (Vec::<f32>::new(), Vec::<f32>::new());
    for (i, context) in (0..).zip(contexts) {
        let position = context.tokens() as u32 - 1;
        let pages = context.tokens().div_ceil(PAGE);
        batch.push(Sequence { position, tokens: 1, first_row: i, pages: table.len() as u32, ..Sequence::default() });
        table.extend(table.len() as u32..(table.len() + pages) as u32);
        cache.extend(&context.records);
        cache.resize(table.len() * PAGE * (LATENT + ROPE), f32::NAN);
        queries.extend(&context.queries);
    }
    let target = Target {
        page: PAGE as u32,
        chunk_pages: table.len() as u32,
        heads: HEADS as u32,
        rows: variant.tuning.rows,
        little: None,
        workgroups: 264,
        partials: u32::MAX,
        borders,
    };
    let plan = plan(&mut batch, &table, &target).expect("the pages lie in one run");
    let rows = Sequence::rows(&batch);
    let output = contexts.len() * HEADS * LATENT;
    let view = |bytes: &[u8], name| device.upload(bytes, name).expect("room for it").view();
    let scratch = |values: usize, name| device.alloc(4 * values as u64, name).expect("room for it").view();
    let [batch, rows] = [view(bytemuck::cast_slice(&batch), "batch"), view(bytemuck::cast_slice(&rows), "rows")];
    let partials = scratch(plan.partials as usize * HEADS * (LATENT + 4), "partials");
    let output = scratch(output, "output");
    let pages = table.len() as u32;
    let chunk = CacheChunk { first_page: 0, pages, view: view(bytemuck::cast_slice(&cache), "cache") };
    let mut recording = Recording::new();
    let args = mla_decode::Args {
        batch: batch.clone(),
        splits: view(bytemuck::cast_slice(&plan.splits), "splits"),
        block_table: view(bytemuck::cast_slice(&table), "block_table"),
        queries: view(bytemuck::cast_slice(&queries), "queries"),
        cache: &[chunk],
        partials: partials.clone(),
        plan: &plan,
        heads: HEADS as u32,
        most_tokens: 1,
        page: PAGE as u32,
    };
    MlaDecode::new(&spec(), &variant.tuning).record(&mut recording, &args);
    let (latent, format) = (LATENT as u32, WeightFormat::F32);
    let spec = mla_combine::Spec { latent, nope: 8, value: 8, format, output: Output::Latent, tokens: count };
    let args = mla_combine::Args {
        batch,
        rows,
        partials,
        kv_b: &[],
        output: output.clone(),
        lse: scratch(contexts.len() * HEADS, "lse"),
        tokens: count,
        heads: HEADS as u32,
    };
    let tuning = MlaCombine::tuning(&spec, device.caps()).variant.tuning;
    MlaCombine::new(&spec, &tuning).record(&mut recording, &args);
    device.submit(&recording).expect("the driver does its part");
    let bytes = pollster::block_on(device.read(&[output])).expect("the device answers").remove(0);
    let values: Vec<f32> = bytemuck::pod_collect_to_vec(&bytes);
    values.chunks_exact(HEADS * LATENT).map(<[f32]>::to_vec).collect()
}

/// Runs `test` with every variant on every adapter.
fn everywhere(test: impl Fn(&Device, &Variant<Tuning>, &str)) {
    for device in adapters(&Options { checked: true, ..Options::default() }) {
        for variant in MlaDecode::variants(&spec(), device.caps()) {
            test(&device, &variant, &format!("{} on {}", variant.name, device.caps().label()));
        }
    }
}

fn nmse(found: &[f32], expected: &[f64]) -> f64 {
    let error: f64 = found.iter().zip(expected).map(|(f, e)| (f64::from(*f) - e).powi(2)).sum();
    error / expected.iter().map(|e| e * e).sum::<f64>()
}

#[test]
fn an_output_of_70_000_tokens_is_about_as_exact_as_one_of_1_000_and_the_same_each_time() {
    let contexts = [1000, 70_000].map(|tokens| [Context::draw(7, tokens)]);
    let expected = contexts.each_ref().map(|context| context[0].expected());
    everywhere(|device, variant, place| {
        let found = contexts.each_ref().map(|context| run(device, variant, context, Borders::Balanced));
        let [short, long] = [0, 1].map(|i| nmse(&found[i][0], &expected[i]));
        println!("{place}: {short:e} at 1,000 tokens, {long:e} at 70,000");
        assert!(long <= 4.0 * short && long <= 1e-9, "{place}: {short:e} at 1,000 tokens, {long:e} at 70,000");
        let again = run(device, variant, &contexts[1], Borders::Balanced);
        assert!(again == found[1], "{place}: other bits the second time");
    });
}

#[test]
fn a_sequence_gives_the_same_alone_and_in_a_batch() {
    let contexts = [3000, 77, 1, 500].map(|tokens| Context::draw(tokens as u64, tokens));
    everywhere(|device, variant, place| {
        for borders in [Borders::Balanced, Borders::Own] {
            let together = run(device, variant, &contexts, borders);
            for (context, found) in contexts.iter().zip(together) {
                let alone = run(device, variant, std::slice::from_ref(context), borders).remove(0);
                let wide: Vec<f64> = alone.iter().map(|v| f64::from(*v)).collect();
                let (tokens, nmse) = (context.tokens(), nmse(&found, &wide));
                assert!(nmse <= 1e-10, "{place}, {borders:?}: {tokens} tokens, NMSE {nmse:e}");
                let same = borders == Borders::Balanced || found == alone;
                assert!(same, "{place}: {tokens} tokens have other bits in a batch, with borders of their own");
            }
        }
    });
}
