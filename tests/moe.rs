//! A whole mixture-of-experts layer against a plain computation, on every adapter of this system and on
//! the `cpu` device, with bindings so small that matrices come in chunks and tokens in turns.

use lamina::check::adapters;
use lamina::gpu::{Device, Options, Recording, View};
use lamina::kernels::inputs::{Inputs, strided};
use lamina::kernels::linear::Activations;
use lamina::kernels::moe::Experts;
use lamina::kernels::moe_layer::{Args, MoeLayer, Scratch, Spec};
use lamina::kernels::moe_route::{self, Scoring};
use lamina::kernels::weights::{WeightFormat, Weights, pack};

const HIDDEN: usize = 42;
const WIDTH: usize = 26;
const EXPERTS: usize = 6;
const ALL: usize = 8;
const TOP_K: usize = 3;
const MOST: usize = 170;

/// Shaped as LongCat-Flash: softmax over all, a bias that only chooses, two experts without weights.
fn spec(accumulate: bool) -> Spec {
    let route = moe_route::Spec {
        experts: ALL as u32,
        top_k: TOP_K as u32,
        scoring: Scoring::Softmax,
        bias: true,
        groups: None,
        renormalise: false,
        shared: 0,
    };
    let (experts, hidden, width) = (EXPERTS as u32, HIDDEN as u32, WIDTH as u32);
    let (gate_up, down) = (WeightFormat::F32, WeightFormat::F32);
    Spec { route, scale: 6.0, experts, shared: 0, shared_scale: 1.0, hidden, width, gate_up, down, accumulate }
}

struct Layer {
    logits: Vec<f32>,
    bias: Vec<f32>,
    x: Vec<f32>,
    y: Vec<f32>,
    gate_up: Vec<f32>,
    down: Vec<f32>,
}

impl Layer {
    fn draw() -> Layer {
        let mut inputs = Inputs::seed(11);
        Layer {
            logits: inputs.normals(MOST * ALL, 1.0),
            bias: inputs.normals(ALL, 0.1),
            x: inputs.normals(MOST * HIDDEN, 1.0),
            y: inputs.normals(MOST * HIDDEN, 1.0),
            gate_up: inputs.normals(EXPERTS * 2 * WIDTH * HIDDEN, 0.2),
            down: inputs.normals(EXPERTS * HIDDEN * WIDTH, 0.2),
        }
    }

    /// The layer's definition, in f64.
    fn expected(&self, token: usize, accumulate: bool) -> Vec<f64> {
        let logits: Vec<f64> = self.logits[token * ALL..][..ALL].iter().map(|v| f64::from(*v)).collect();
        let sum: f64 = logits.iter().map(|v| v.exp()).sum();
        let mut order: Vec<usize> = (0..ALL).collect();
        let choice = |e: &usize| logits[*e].exp() / sum + f64::from(self.bias[*e]);
        order.sort_by(|a, b| choice(b).total_cmp(&choice(a)));
        let x = &self.x[token * HIDDEN..][..HIDDEN];
        let dot = |w: &[f32], x: &[f64]| w.iter().zip(x).map(|(w, x)| f64::from(*w) * x).sum::<f64>();
        let x: Vec<f64> = x.iter().map(|v| f64::from(*v)).collect();
        let start = if accumulate { 1.0 } else { 0.0 };
        let mut y: Vec<f64> = self.y[token * HIDDEN..][..HIDDEN].iter().map(|v| start * f64::from(*v)).collect();
        for e in &order[..TOP_K] {
            let weight = 6.0 * logits[*e].exp() / sum;
            let output: Vec<f64> = if *e >= EXPERTS {
                x.clone()
            } else {
                let row = |r: usize| dot(&self.gate_up[(e * 2 * WIDTH + r) * HIDDEN..][..HIDDEN], &x);
                let inner: Vec<f64> =
                    (0..WIDTH).map(|i| row(2 * i) / (1.0 + (-row(2 * i)).exp()) * row(2 * i + 1)).collect();
                (0..HIDDEN).map(|r| dot(&self.down[(e * HIDDEN + r) * WIDTH..][..WIDTH], &inner)).collect()
            };
            y.iter_mut().zip(output).for_each(|(y, o)| *y += weight * o);
        }
        y
    }

    /// The layer on a device, and the kernels that ran.
    fn run(&self, device: &Device, tokens: usize, accumulate: bool) -> (Vec<f32>, Vec<&'static str>) {
        let stride = HIDDEN.next_multiple_of(4);
        let upload = |values: &[f32]| device.upload(values, "test").unwrap().view();
        let rows = |values: &[f32], length: usize| {
            let stride = length.next_multiple_of(4);
            Activations::rows(upload(&strided(&values[..tokens * length], length, stride)), length as u32)
        };
        let weights = |values: &[f32], rows: usize, columns: usize| {
            let bytes = pack(values, EXPERTS * rows, columns, WeightFormat::F32);
            Weights::upload(device, &bytes, (EXPERTS * rows, columns), WeightFormat::F32, rows, "experts").unwrap()
        };
        let gate_up = weights(&self.gate_up, 2 * WIDTH, HIDDEN);
        let down = weights(&self.down, HIDDEN, WIDTH);
        if device.caps().binding_bytes < 1 << 20 {
            assert!(gate_up.chunks.len() > 1, "the matrices come in one chunk");
        }
        let layer = MoeLayer::new(&spec(accumulate), device.caps(), false);
        let sizes = layer.scratch(tokens as u32);
        let scratch: Scratch<View> = sizes.map(|size, name| device.alloc(*size, name).map(|b| b.view())).unwrap();
        let (x, y) = (rows(&self.x, HIDDEN), rows(&self.y, HIDDEN));
        let args = Args {
            logits: &rows(&self.logits, ALL),
            bias: Some(upload(&self.bias)),
            x: &x,
            norm: None,
            y: &y,
            gate_up: Experts { weights: &gate_up, count: EXPERTS as u32 },
            down: Experts { weights: &down, count: EXPERTS as u32 },
            scratch: &scratch,
            tokens: tokens as u32,
        };
        let mut recording = Recording::new();
        layer.record(&mut recording, &args);
        device.submit(&recording).unwrap();
        let found = pollster::block_on(device.read(&[y.view])).unwrap();
        let found: Vec<f32> = bytemuck::pod_collect_to_vec(&found[0]);
        let found = found.chunks(stride).take(tokens).flat_map(|row| row[..HIDDEN].to_vec()).collect();
        (found, recording.calls().iter().map(|call| call.shader.kernel).collect())
    }
}

#[test]
fn a_layer_is_what_its_definition_says_for_any_number_of_tokens() {
    let options = Options { checked: true, binding_bytes: Some(64 << 10), ..Options::default() };
    let layer = Layer::draw();
    let mut devices = adapters(&options);
    devices.push(Device::cpu(&Options::default()));
    for device in devices {
        // Few tokens, tiles of 16 pairs, tiles of 64, and more than fit a binding.
        for (tokens, accumulate, last) in
            [(1, true, "moe_gemv"), (3, false, "moe_gemv"), (40, false, "moe_combine"), (MOST, true, "moe_combine")]
        {
            let (found, kernels) = layer.run(&device, tokens, accumulate);
            assert_eq!((kernels[0], *kernels.last().unwrap()), ("moe_route", last));
            for (token, found) in found.chunks(HIDDEN).enumerate() {
                let expected = layer.expected(token, accumulate);
                let power: f64 = expected.iter().map(|e| e * e).sum();
                let error: f64 = found.iter().zip(&expected).map(|(f, e)| (f64::from(*f) - e).powi(2)).sum();
                let label = device.caps().label();
                assert!(error <= 1e-11 * power, "{label}: token {token} of {tokens}: NMSE {:e}", error / power);
            }
            assert_eq!(layer.run(&device, tokens, accumulate).0, found, "the same call gives the same bits");
        }
    }
}
