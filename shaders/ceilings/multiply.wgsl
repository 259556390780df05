// Multiply-adds in registers and nothing else: each of 4 x LANES numbers goes towards 2 by a = a / 2 + 1.
// Grid: any number of workgroups.
// lib: none.
// Constants: WORKGROUP, TURNS of 16 steps. Types: Scalar, f32 or f16.

struct Params {
  factor: f32, // 0.5
  term: f32,   // 1
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read_write> y: array<f32>; // [invocations]

const LANES = 8u; // chains of four numbers: enough to hide an addition's latency

@compute @workgroup_size(WORKGROUP)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
  let factor = vec4<Scalar>(Scalar(params.factor));
  let term = vec4<Scalar>(Scalar(params.term));
  var a: array<vec4<Scalar>, LANES>;
  for (var i = 0u; i < LANES; i++) {
    a[i] = vec4<Scalar>(Scalar(f32(i + lane % 4u) * 0.25));
  }
  for (var turn = 0u; turn < TURNS; turn++) {
    for (var step = 0u; step < 16u; step++) {
      for (var i = 0u; i < LANES; i++) {
        a[i] = fma(a[i], factor, term);
      }
    }
  }
  var least = a[0];
  for (var i = 1u; i < LANES; i++) {
    least = min(least, a[i]);
  }
  y[group.x * WORKGROUP + lane] = f32(min(min(least.x, least.y), min(least.z, least.w)));
}
